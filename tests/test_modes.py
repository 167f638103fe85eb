"""Eval mode for a while: every module's own mode comes back, also after an error."""

from __future__ import annotations

import pytest
from torch import nn

from dynablocks.modes import eval_mode


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def fail_in_eval_mode(model: nn.Module) -> None:
    with eval_mode(model):
        assert not any(modes(model))
        raise RuntimeError("stopped")


def test_modes_come_back_after_an_error_and_each_its_own() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).eval())
    before = modes(model)
    assert len(set(before)) == 2
    with pytest.raises(RuntimeError, match="stopped"):
        fail_in_eval_mode(model)
    assert modes(model) == before
    # What a restore of the root's mode alone makes of it.
    model.train(model.training)
    assert modes(model) != before


def test_contexts_may_stand_in_each_other() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with eval_mode(model):
        with eval_mode(model):
            pass
        assert modes(model) == [False, False, False]
    assert modes(model) == [True, True, False]
