"""What a run directory holds is reused while the weights, the images and the code that made it are the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynablocks.robustness import CertificateResult
from dynablocks.run_directory import results
from dynablocks.run_directory.results import CERTIFICATE, belongs_to, restored, store
from dynablocks.run_directory.source import COMPUTING, source_hash


def package(place: Path) -> Path:
    for name in ("blocks.py", "numerics/bounds.py", "robustness/attacks.py", "reporting/page.py", "cli.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"# {name}\n")
    return place


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "numerics" / "bounds.py").write_text("SLACK = 0\n"),
        lambda place: (place / "blocks.py").write_text(""),
        lambda place: (place / "models").mkdir() or (place / "models" / "new.py").write_text("x = 1\n"),
        lambda place: (place / "robustness" / "attacks.py").unlink(),
        lambda place: (place / "robustness" / "attacks.py").rename(place / "robustness" / "renamed.py"),
    ],
    ids=["edited", "emptied", "added", "removed", "renamed"],
)
def test_changed_code_that_computes_is_noticed(change: Callable[[Path], object], tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    assert source_hash(place) == before
    change(place)
    assert source_hash(place) != before


def test_code_that_computes_no_certificate_may_change(tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    (place / "reporting" / "page.py").write_text("other\n")
    (place / "cli.py").unlink()
    (place / "numerics" / "notes.txt").write_text("no code\n")
    (place / "numerics" / ".#bounds.py").symlink_to("an-editor-that-runs")
    assert source_hash(place) == before


def test_what_is_hashed_is_what_certificates_and_attacks_import() -> None:
    code = "import sys, dynablocks.robustness; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("dynablocks.")}
    sentences_and_names = {"errors", "registry"}
    assert rooms - sentences_and_names == {entry.removesuffix(".py") for entry in COMPUTING}


def test_a_result_of_other_code_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "weights_hash", lambda directory: "w")
    labels = torch.tensor([0, 1])
    made = CertificateResult(torch.tensor([0.5, 0.0], dtype=torch.float64), labels, labels.clone(), body_lipschitz=1.0)
    store(tmp_path, CERTIFICATE, made.summary([0.0]) | belongs_to(tmp_path, "images"), made.tensors())
    again = restored(tmp_path, CERTIFICATE, "images")
    assert again is not None
    assert torch.equal(again.radii, made.radii)
    assert restored(tmp_path, CERTIFICATE, "other images") is None
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is not None
    monkeypatch.setattr(results, "SOURCE", "of another commit")
    assert restored(tmp_path, CERTIFICATE, "images") is not None  # it is shown, and not taken for the computation
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is None
