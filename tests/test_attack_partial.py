"""What an attack has found so far: of a file with a flipped bit nothing is gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynablocks.robustness.partial import Partial


def test_a_flipped_bit_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynablocks.progress.LINE_SECONDS", 0.0)
    file = tmp_path / "attack.partial.safetensors"
    found = {"norm": torch.tensor([0.25, torch.inf], dtype=torch.float64), "broken.ce": torch.tensor([[True], [False]])}
    Partial(file, "weights").write(3, found)
    rounds, again = Partial(file, "weights").read()
    assert rounds == 3
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - start == 18
    for place in range(start, len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert Partial(file, "weights").read() == (0, {}), place
    assert content.count(b'"rounds":"3"') == 1
    file.write_bytes(content.replace(b'"rounds":"3"', b'"rounds":"7"'))
    assert Partial(file, "weights").read() == (0, {})
    file.write_bytes(content)
    assert Partial(file, "weights").read()[0] == 3


def test_what_has_no_digest_is_not_gone_on_from(tmp_path: Path) -> None:
    """As earlier commits stored it."""
    from safetensors.torch import save_file

    partial = Partial(tmp_path / "attack.partial.safetensors", "weights")
    save_file({"norm": torch.zeros(2)}, partial.path, {"key": partial.key, "rounds": "3"})
    assert partial.read() == (0, {})
