"""What in the data itself should make a reader doubt a fit of it, a sentence each."""

from __future__ import annotations

import csv
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.fitting.rollout import GAP, NOISE_DIFFERENCES
from dynablocks.fitting.samples import fitted_parts
from dynablocks.fitting.surrogates import LEARNED_ENERGY, change_of_units, departures
from dynablocks.reporting import words
from dynablocks.reporting.words import several

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from dynablocks.fitting.job import Plan

JUMP, CALM = 0.8, 0.1
"""An angle that wraps jumps by more of its range than the first, and mostly moves by less than the second."""
LEAK, LEAK_NOISE = 0.01, 3.0
"""From which share of the motion, and how many times the noise, what is to be kept varies in the data."""
LARGE_TEST = 2.0
"""From how many times the training steps on a test is too large; where there are two trajectories alike it has 1.3."""
FAR_AWAY = 1e4
"""At so many times the size of the motion the rounding of the states is 1e-12 of the motion, in every step."""
ROUNDED_STEP = 1e-6
"""From which share of a usual step on the rounding of the times is told."""
WHOLE, NEAR = 1e-3, 1.75
"""Times are multiples of a unit where they are off by no more than the first of it; a step that takes so many times the
usual one as the second is longer because a sample was left out."""
LEFT_OUT = 0.1
"""From which share on of the steps that the second stage leaves out, since their runs are short, a reader is told."""
REPEATED = 0.1
"""From which share on of the test steps that the training has, too, a reader is told."""


def doubts(planned: Plan) -> list[str]:
    """What the data may be unfit for, before anything is fitted.

    Example:
        >>> from dynablocks.fitting.job import FitConfig, plan
        >>> t = torch.linspace(0, 3, 31, dtype=torch.float64)
        >>> log = Trajectories((t,), (torch.stack([t.cos(), -t.sin()], 1),), ("q", "p"))
        >>> [sentence[:24] for sentence in doubts(plan(log, FitConfig("symplectic")))]
        ['There is one trajectory:']
    """
    kinds = (
        _alone,
        _large_test,
        _repeated,
        _gaps,
        _short,
        _left_out,
        _far_from_zero,
        _late,
        _rounded,
        _wrapped,
        _alternating,
        _not_kept,
    )
    return [sentence for kind in kinds for sentence in kind(planned)]


def _alone(planned: Plan) -> Iterator[str]:
    train, test = planned.parts.train, planned.parts.test
    # Parts of one trajectory are called alike.
    if isinstance(train, Trajectories) and isinstance(test, Trajectories) and train.labels == test.labels:
        yield (
            "There is one trajectory: the test is how it goes on, and says little about other starts. Measure from "
            "several."
        )


def _large_test(planned: Plan) -> Iterator[str]:
    train, test = (len(part.pairs()[2]) for part in (planned.parts.train, planned.parts.test))
    if test > LARGE_TEST * train:
        yield (
            f"The training has {train:,} steps, the test {test:,}: give another --seed, name other --test "
            "trajectories, or cut the long ones into several."
        )


def _repeated(planned: Plan) -> Iterator[str]:
    """Test steps that the training has, too, or pairs that follow one another from the one into the other.

    Not where the training repeats itself: coarse measurements of few columns do, whichever trajectories they are of.
    """
    train, test = planned.parts.train, planned.parts.test
    (x, y, _), (start, end, _) = train.pairs(), test.pairs()
    moving = list(_bytes(torch.cat([x, y], dim=1)[(x != y).any(dim=1)]))
    if 2 * len(set(moving)) < len(moving):
        return
    known = _are_among(torch.cat([start, end], dim=1), torch.cat([x, y], dim=1))
    told = "stand in the training, too"
    cause = "does a trajectory stand in the file under two labels? Leave one of them out"
    if isinstance(train, Pairs):
        known |= _are_among(start, y) | _are_among(end, x)
        told = "stand in the training, too, or end or begin where a training pair begins or ends"
        cause = "are the pairs cut from trajectories, or are there rows twice? Give the trajectories, and each row once"
    # A state at rest stays there in every trajectory.
    share = float((known & (start != end).any(dim=1).cpu()).double().mean())
    if share > REPEATED:
        yield f"Of the test steps {words.percent(share)} {told}, so that errors look too small: {cause}."


def _are_among(rows: Float[Tensor, "row n"], others: Float[Tensor, "other n"]) -> Bool[Tensor, " row"]:
    """Which rows are among the others, to the last bit."""
    own = list(_bytes(rows))
    found = set(own).intersection(_bytes(others))
    return torch.tensor([row in found for row in own])


def _bytes(rows: Tensor) -> Iterator[bytes]:
    return (row.tobytes() for row in (rows.detach().cpu() + 0.0).numpy())  # the sum of −0 is 0


def _gaps(planned: Plan) -> Iterator[str]:
    usual = planned.structure.step
    longer = {use: part.pairs()[2] > GAP * usual for use, part in _parts(planned).items()}
    counts = [f"{int(gaps.sum())} of {len(gaps)} {use} steps" for use, gaps in longer.items() if bool(gaps.any())]
    if counts:
        only = "; the {} has no others, and its error is of them"
        alone = "".join(only.format(use) for use, gaps in longer.items() if bool(gaps.all()))
        yield (
            f"{', '.join(counts)} take more than {GAP:g} times the usual {usual:.4g}: they are left out of the fit and "
            f"of the errors of one step{alone}."
        )


def _short(planned: Plan) -> Iterator[str]:
    if planned.noise_untold:
        yield (
            f"No training trajectory has the {NOISE_DIFFERENCES[-1] + 1} samples in a row that tell noise from "
            "curvature, so all are taken for clean: give --noise yes if there is noise, --noise no if there is none."
        )
    if planned.cut_to_one:
        yield (
            "The data looks noisy, but too many trajectories of the training or validation part are too short, or cut "
            "by gaps, for several steps in a row: single steps are fitted, and noise may be as large as these. Give "
            "longer trajectories or another --seed, or --noise no if there is none."
        )


def _left_out(planned: Plan) -> Iterator[str]:
    """What has no part in the second stage, whose parameters are kept."""
    if planned.unsolved:
        compared = "single steps" if planned.horizon == 1 else f"{several(planned.horizon, 'step')} in a row"
        yield (
            f"The equations of {several(planned.unsolved, 'step')} in a row were not all solved after the first stage, "
            f"so {compared} were compared: noise may be as large as these. Try more substeps, a shorter time between "
            "samples, or another seed."
        )
    if planned.horizon == 1:
        return
    train, held = fitted_parts(planned.parts, planned.structure.step)
    short = []
    for use, part in (("training", train), ("validation", held)):
        lengths = [len(times) - 1 for times in part.times] if isinstance(part, Trajectories) else []
        missed = sum(steps for steps in lengths if steps < planned.horizon)
        if missed > LEFT_OUT * sum(lengths):
            short.append(f"{missed} of {sum(lengths)} {use} steps")
    if short:
        yield (
            f"{' and '.join(short)} lie in runs of fewer than {planned.horizon}, of trajectories that are short or cut "
            "by gaps: the second stage, which compares so many in a row, leaves them out."
        )


def _far_from_zero(planned: Plan) -> Iterator[str]:
    structure = planned.structure
    # A mass may be shifted by hand, other than a norm, a sign or the centre of an odd system.
    if change_of_units(structure) != "shift" and (structure.preserve != "mass" or structure.odd):
        return
    x, y, _ = planned.parts.train.pairs()
    centre = x.mean(0)
    size = departures(x, y, centre).square().mean().sqrt()
    far = (centre.abs() > FAR_AWAY * size).tolist()
    named = [name for name, is_far in zip(planned.structure.names, far, strict=True) if is_far]
    if named:
        kept = "" if planned.structure.preserve == "none" else ", and so is what it keeps"
        yield (
            f"Far from 0, by more than {FAR_AWAY:g} times the size of the motion: {', '.join(named)}. Every step is "
            f"rounded at the size of the states{kept}: subtract a constant before."
        )


def _late(planned: Plan) -> Iterator[str]:
    """Times that their type knows too poorly for the steps between them, as float64 does seconds since 1970."""
    parts = [part for part in _parts(planned).values() if isinstance(part, Trajectories)]
    latest = max((float(times[[0, -1]].abs().max()) for part in parts for times in part.times), default=0.0)
    stored = parts[0].times_stored_as if parts else torch.float64  # the parts are of one file
    rounding = torch.finfo(stored).eps * latest
    if rounding > ROUNDED_STEP * planned.structure.step:
        cure = "save them as float64 where they are made"
        if stored == torch.float64:
            cure = "subtract the first time while they are still whole numbers or decimals, as nanoseconds are"
        yield (
            f"Times reach {latest:.12g}, where {str(stored).removeprefix('torch.')} rounds the time between two "
            f"samples by up to {rounding:.2g}, and the usual one is {planned.structure.step:.4g}: {cure}; afterwards "
            "it mends nothing."
        )


def _rounded(planned: Plan) -> Iterator[str]:
    """Times of even samples that were rounded to decimals, so that their steps are of two lengths, a unit apart."""
    times = [t for part in _parts(planned).values() if isinstance(part, Trajectories) for t in part.times]
    usual = planned.structure.step
    unit = _decimal_unit(torch.cat(times), usual) if times and math.isfinite(usual) else None
    if unit is None:
        return
    # Each by itself: two trajectories may well be measured at two rates.
    steps = [near for t in times if (near := t.diff()[t.diff() < NEAR * usual]).numel()]
    for least, most in {(float(near.min()), float(near.max())) for near in steps}:
        # Of steps of one unit and of two the longer ones may be samples that were left out.
        if abs(most - least - unit) > 0.1 * unit or least <= 1.5 * unit:
            continue
        yield (
            f"Times are multiples of {unit:g}, and the steps between them {least:.6g} or {most:.6g}, as of even times "
            f"that were rounded: each step may be off by up to {unit / usual:.2g} of itself. Write times with more "
            "digits, or as multiples of the true step."
        )
        return


def _decimal_unit(times: Float[Tensor, " time"], usual: float) -> float | None:
    """The largest power of ten up to a usual step of which all times are multiples; ``None`` where it is too small."""
    latest, eps = float(times.abs().max()), torch.finfo(times.dtype).eps
    exponent = math.floor(math.log10(usual))
    while (unit := 10.0**exponent) > ROUNDED_STEP * usual and eps * latest < WHOLE * unit:
        counts = times / unit
        if bool(((counts - counts.round()).abs() <= WHOLE).all()):
            return unit
        exponent -= 1
    return None


def _wrapped(planned: Plan) -> Iterator[str]:
    # In a long step any column may do what an angle that wraps does in a usual one.
    pieces = (part.without_gaps(GAP * planned.structure.step) for part in _parts(planned).values())
    steps = (piece.pairs()[:2] for piece in pieces if piece is not None)
    x, y = (torch.cat(ends) for ends in zip(*steps, strict=True))
    both, moves = torch.cat([x, y]), (y - x).abs()
    width = both.amax(0) - both.amin(0)
    jumps = (moves.amax(0) > JUMP * width) & (moves.median(dim=0).values < CALM * width)
    for name, jump, wraps in zip(planned.structure.names, moves.amax(0).tolist(), jumps.tolist(), strict=True):
        if wraps:
            yield (
                f"Column {name!r} jumps by {jump:.3g}: an angle that wraps? Then take numpy.unwrap of it before (of "
                "degrees with period=360), one trajectory at a time; or a value that stands for a missing one: remove "
                "those rows."
            )


def _alternating(planned: Plan) -> Iterator[str]:
    names = planned.structure.names
    order = positions_first(names) if planned.structure.preserve in LEARNED_ENERGY else None
    if order is not None:
        half = len(names) // 2
        yield (
            f"Positions and momenta seem to alternate, but {', '.join(names[:half])} are taken for the positions and "
            f"{', '.join(names[half:])} for the momenta. If that is wrong: {columns_option(order)}"
        )


def columns_option(names: Sequence[str]) -> str:
    """``--columns`` with these names, as a shell takes it.

    Example:
        >>> print(columns_option(["q", "p"]), columns_option(["angle, rad", "p"]))
        --columns q,p --columns '"angle, rad",p'
    """
    row = StringIO()
    csv.writer(row, lineterminator="\n").writerow(names)
    return f"--columns {shlex.quote(row.getvalue().rstrip())}"


def positions_first(names: Sequence[str]) -> tuple[str, ...] | None:
    """The names with all of one kind first, where two kinds alternate; else ``None``.

    Two letters with equal numbers, or every other name is the one before with the same prefix or suffix.

    Example:
        >>> positions_first(("q1", "p1", "q2", "p2")), positions_first(("x", "vx", "y", "vy"))
        (('q1', 'q2', 'p1', 'p2'), ('x', 'y', 'vx', 'vy'))
    """
    if len(names) < 4 or len(names) % 2:
        return None
    return (*names[0::2], *names[1::2]) if _numbers_alternate(names) or _affix_alternates(names) else None


def _numbers_alternate(names: Sequence[str]) -> bool:
    matches = [re.fullmatch(r"(.*?)_?(\d+)", name) for name in names]
    parts = [(match[1], match[2]) for match in matches if match is not None]
    if len(parts) < len(names):
        return False
    stems, numbers = zip(*parts, strict=True)
    first, second = set(stems[0::2]), set(stems[1::2])
    return len(first) == len(second) == 1 and first != second and numbers[0::2] == numbers[1::2]


def _affix_alternates(names: Sequence[str]) -> bool:
    """Whether every other name is the one before with the same prefix, or suffix, that has no digit."""
    firsts, seconds = list(names[0::2]), list(names[1::2])
    more = len(seconds[0]) - len(firsts[0])
    if more < 1:
        return False
    prefix, suffix = seconds[0][:more], seconds[0][-more:]
    if seconds == [prefix + first for first in firsts]:
        return not re.search(r"\d", prefix)
    return seconds == [first + suffix for first in firsts] and not re.search(r"\d", suffix)


def _not_kept(planned: Plan) -> Iterator[str]:
    """The deviations of the sum or norm from its mean along each trajectory or pair, against those of the states."""
    preserve, pairs = planned.structure.preserve, isinstance(planned.parts.train, Pairs)
    if preserve not in ("mass", "norm"):
        return
    runs = [run for part in _parts(planned).values() for run in _runs(part)]
    states = torch.cat([run.flatten(0, 1) for run in runs])
    motion = _within(runs).square().sum(1).mean().sqrt()
    if preserve == "mass":
        weights = states.new_tensor(planned.structure.weights or (1.0,) * states.shape[1])
        left, most = _within([(run @ weights)[..., None] for run in runs]), float(weights.norm())
        what, cure = "the weighted sum of the columns", "check --weights and the units of the columns"
    else:
        left, most = _within([run.norm(dim=2, keepdim=True) for run in runs]), 1.0
        # The norm has the part of the noise that lies along the state.
        along = nn.functional.normalize(states, dim=1, eps=torch.finfo(states.dtype).tiny)
        weights = along.square().mean(0).sqrt()
        what, cure = "the norm of the state", "check the units of the columns and that 0 is their centre"
    share = float(left.square().mean().sqrt() / (most * motion))
    noise = (weights * states.new_tensor(planned.noise.columns)).norm()
    if share > max(LEAK, float(LEAK_NOISE * noise / (most * motion))):
        yield (
            f"In the data {what} does not stay: {'from in to out' if pairs else 'along a trajectory'} it varies by "
            f"{words.percent(share)} of the motion (root mean square), which no surrogate that keeps it can follow. If "
            f"that is not noise, {cure}, and compare with --preserve none."
        )


def _runs(part: Trajectories | Pairs) -> list[Float[Tensor, "run time n"]]:
    """States that follow one another: of trajectories one by one, of all pairs together."""
    if isinstance(part, Pairs):
        return [torch.stack([part.x, part.y], dim=1)]
    return [states[None] for states in part.states]


def _within(runs: Sequence[Float[Tensor, "run time n"]]) -> Float[Tensor, "states n"]:
    """The deviations from the mean of each run."""
    return torch.cat([(run - run.mean(dim=1, keepdim=True)).flatten(0, 1) for run in runs])


def _parts(planned: Plan) -> dict[str, Trajectories | Pairs]:
    """What there is of training, validation and test, by name."""
    parts = planned.parts
    found: dict[str, Trajectories | Pairs | None]
    found = {"training": parts.train, "validation": parts.validation, "test": parts.test}
    return {use: part for use, part in found.items() if part is not None}
