"""What a fit goes on from and what it leaves: checkpoints of its last step, and weights with a flipped bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynablocks.errors import BadCheckpoint, DynablocksError
from dynablocks.fitting import Structure, build, fit, load_fit, regression, save_fit
from dynablocks.fitting.second_order import LimitedMemoryBFGS
from dynablocks.fitting.surrogates import FlowMap


class Exponential(nn.Module):
    """a e^{bx} + c."""

    def __init__(self, start: tuple[float, float, float] = (1.0, -0.5, 0.0)) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.theta
        return a * torch.exp(b * x) + c


@pytest.mark.parametrize("finish", ["levenberg-marquardt", "lbfgs"])
def test_a_fit_that_was_killed_after_its_last_step_takes_no_other(
    finish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedMemoryBFGS, "inner_steps", 3)
    monkeypatch.setattr(regression, "PLATEAU_STEPS", 1)
    monkeypatch.setattr(regression, "PLATEAU_RATE", 1.0)  # so that the second record of the finish is the last
    x = torch.linspace(0, 3, 30, dtype=torch.float64)[:, None]
    y = Exponential((2.0, -1.3, 0.5))(x).detach()
    options: dict[str, Any] = {"adam_steps": 20, "finish": finish, "checkpoint_seconds": 0.0}
    straight, resumed = Exponential(), Exponential()
    history = fit(straight, x, y, **options)
    assert history.stopped == "the loss fell by less than a thousandth in twenty steps"
    assert [record.phase for record in history.records].count(finish) == 2
    last, save = history.records[-1].step, regression._Run.save

    def killed(self: regression._Run, optimiser: Any, *, now: bool = False) -> None:
        save(self, optimiser, now=now)
        if (self.phase, self.step) == ("finish", last):
            raise KeyboardInterrupt

    path = tmp_path / "state.pt"
    with monkeypatch.context() as patch:
        patch.setattr(regression._Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(Exponential(), x, y, checkpoint=path, **options)
    later = fit(resumed, x, y, checkpoint=path, **options)
    assert torch.equal(resumed.theta, straight.theta)
    steps = [[(record.phase, record.step, record.loss) for record in h.records] for h in (history, later)]
    assert steps[0] == steps[1]
    assert (later.loss, later.stopped) == (history.loss, history.stopped)


def test_the_steps_of_a_finish_are_as_many_as_were_asked_for() -> None:
    x = torch.linspace(0, 3, 30, dtype=torch.float64)[:, None]
    y = Exponential((2.0, -1.3, 0.5))(x).detach()
    for count in range(3):
        history = fit(Exponential(), x, y, adam_steps=0, finish_steps=count)
        assert [record.step for record in history.records] == list(range(count + 1))
        assert history.stopped == "the steps of the finish were done"


def surrogate() -> FlowMap:
    torch.manual_seed(0)
    return build(Structure("symplectic", ("q", "p"), width=3, step=0.1))


def test_weights_with_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    flow = surrogate()
    save_fit(tmp_path, flow)
    x = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(3, 2)
    assert torch.equal(load_fit(tmp_path)(x), flow(x))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 8):  # the lowest bit of each number
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BadCheckpoint, match="holds a damaged fit; make it again with --overwrite"):
            load_fit(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_what_cannot_be_read_now_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    save_fit(tmp_path, surrogate())
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(DynablocksError, match=f"{name} cannot be read .*; nothing was changed: make it readable"):
        load_fit(tmp_path)


def test_weights_of_another_precision_are_those_that_were_stored(tmp_path: Path) -> None:
    flow = surrogate().float()
    save_fit(tmp_path, flow)
    again = load_fit(tmp_path)
    assert all(torch.equal(value.double(), again.state_dict()[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_weights_without_a_digest_are_loaded_where_they_are_finite(value: float, tmp_path: Path) -> None:
    """As earlier commits stored them."""
    from safetensors.torch import save_model

    flow = surrogate()
    save_fit(tmp_path, flow)
    with torch.no_grad():
        next(flow.parameters()).flatten()[0] = value
    save_model(flow, str(tmp_path / "model.safetensors"))
    if value == 1.0:
        loaded = load_fit(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in flow.state_dict().items())
    else:
        with pytest.raises(BadCheckpoint, match="holds a damaged fit"):
            load_fit(tmp_path)
