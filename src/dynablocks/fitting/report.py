"""What a fit leaves behind: ``metrics.json``, ``verification.json``, ``predictions.csv`` and ``report.html``."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from io import StringIO
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.files import finite_or_none, write_json, write_text
from dynablocks.fitting import figures
from dynablocks.fitting.doubts import doubts
from dynablocks.fitting.job import FitConfig, Fitted
from dynablocks.fitting.rollout import Drift, Rollout, drifts, roll_out, safe_rollout
from dynablocks.fitting.samples import MOST_SAMPLES, SPREAD_SAMPLES, thinned, usual_steps
from dynablocks.fitting.single_steps import column_errors, one_step_error, step_halving_gap
from dynablocks.fitting.verification import verified
from dynablocks.properties import explain
from dynablocks.properties.verify import Verification
from dynablocks.reporting import words
from dynablocks.reporting.page import document, figure, paragraph, table
from dynablocks.run_files import METRICS, PREDICTIONS, REPORT, VERIFICATION

LONG_STEPS, SHORT_FIT_STEPS = 2000, 600
OVERFIT, FAR = 10.0, 0.1
"""From which ratio of test to training error, and which relative error of rollouts, a reader is warned."""
COARSE, COARSE_RATIO = 1e-3, 3.0
"""From which gap of two half steps, also over the relative error of one step, a reader is warned."""
UNEVEN, UNEVEN_RATIO = 0.01, 10.0
"""From which relative error of a column, also over that of all, a reader is warned."""
STILL, NARROW = 0.5, 0.1
"""From which error of one step or of rollouts over the motion, and to which spread of the test states over that of the
training ones, a reader is warned."""
KEPT = {
    "mass": "the mass",
    "symplectic": "the symplectic form",
    "energy": "an energy",
    "volume": "the volume",
    "norm": "the norm",
    "positive": "states nonnegative",
    "none": "nothing",
}
VERIFY_SAMPLES = 8
HALVED_SAMPLES = 64
SHOWN_LABELS = 12


@dataclass(frozen=True)
class Outcome:
    """A fit with everything that was measured of it."""

    fitted: Fitted
    verification: Verification | None
    rollouts: list[Rollout]
    long_times: Tensor
    long_states: Tensor
    long_stop: str | None
    drifts: list[Drift]
    metrics: dict[str, Any]


def long_run(config: FitConfig) -> int:
    """The number of steps of the long run: fewer after a fit of seconds."""
    return SHORT_FIT_STEPS if config.adam_steps <= 100 else LONG_STEPS


def measure(
    fitted: Fitted, long_steps: int = LONG_STEPS, progress: Callable[[float], None] = lambda fraction: None
) -> Outcome:
    """Verify, roll out from every test trajectory's first state, and run long from one of them.

    ``progress`` gets the fraction of the work that is done, about.
    """
    flow, parts = fitted.flow, fitted.plan.parts
    x, _, _ = parts.test.pairs()
    verification = verified(flow, thinned((x,), VERIFY_SAMPLES)[0])
    progress(0.2)
    rollouts: list[Rollout] = []
    if isinstance(parts.test, Trajectories):
        rollouts = roll_out(flow, parts.test, lambda share: progress(0.2 + 0.2 * share))
    progress(0.4)
    step = flow.structure.step
    equal = repeat(torch.tensor(step, dtype=torch.float64), long_steps)
    runs, stopped = safe_rollout(flow, x[:1], _told(equal, long_steps, lambda share: progress(0.4 + 0.5 * share)))
    states = runs[0]
    times = step * torch.arange(len(states), dtype=torch.float64)
    progress(0.9)
    moved = drifts(flow, times, states, thinned((parts.train.pairs()[0],), SPREAD_SAMPLES)[0])
    return Outcome(
        fitted,
        verification,
        rollouts,
        times,
        states,
        stopped,
        moved,
        _metrics(fitted, verification, rollouts, moved, len(states) - 1),
    )


def _told(items: Iterable[Tensor], total: int, progress: Callable[[float], object]) -> Iterator[Tensor]:
    """The items, ``total`` of them; ``progress`` gets the fraction that is done."""
    for done, item in enumerate(items, start=1):
        yield item
        progress(done / total)


def _metrics(
    fitted: Fitted,
    verification: Verification | None,
    rollouts: Sequence[Rollout],
    moved: Sequence[Drift],
    long_steps: int,
) -> dict[str, Any]:
    flow, planned = fitted.flow, fitted.plan
    parts = planned.parts
    x, y, _ = parts.train.pairs()
    states = y if len(y) > 1 else torch.cat([x, y])  # one state alone has no spread
    spread = float(states.var(dim=0).mean())
    usual = partial(usual_steps, usual=flow.structure.step)
    columns = column_errors(flow, usual(parts.test))
    test = math.inf if columns is None else float(columns.mean())
    gap = step_halving_gap(flow, thinned((parts.test.pairs()[0],), HALVED_SAMPLES)[0])
    metrics: dict[str, Any] = {
        "preserve": flow.structure.preserve,
        "parameters": fitted.history.unknowns,
        "train_mse": one_step_error(flow, usual(parts.train)),
        "validation_mse": None if parts.validation is None else one_step_error(flow, usual(parts.validation)),
        "test_mse": test,
        "test_relative_error": math.sqrt(test / spread) if spread > 0 else None,
        "test_error_over_motion": _over_motion(test, usual(parts.test)),
        "test_spread": _test_spread(parts.test, spread),
        "column_relative_errors": None if columns is None else _by_column(flow.structure.names, columns, states),
        "step_halving_error": gap / math.sqrt(spread * y.shape[1]) if gap is not None and spread > 0 else None,
        "samples_used": {name: history.samples for name, history in fitted.stages.items()},
        "training_range": _ranges(flow.structure.names, torch.cat([x, y])),
        "noise_level": planned.noise.pooled,
        "horizon": planned.horizon,
        **_rollout_metrics(rollouts, parts.test, spread),
        "long_steps": long_steps,
        "drift": {drift.what: float(drift.values.max()) for drift in moved},
        "verified": None if verification is None else verification.passed,
        "properties": [planned.told(kept) for kept in flow.properties],
        "seconds": sum(history.seconds for history in fitted.stages.values()),
        "stopped": fitted.history.stopped,
        "doubts": doubts(planned),
    }
    return {key: _as_json(value) for key, value in metrics.items()}


def _rollout_metrics(rollouts: Sequence[Rollout], test: Trajectories | Pairs, spread: float) -> dict[str, Any]:
    compared = [r for r in rollouts if len(r.errors) > 1]
    error = _mean([float(r.errors[1:].mean()) for r in compared])
    held = _mean([float((r.measured[1 : len(r.errors)] - r.measured[0]).square().mean()) for r in compared])
    longest = max(compared, key=lambda r: len(r.errors), default=None)
    return {
        "rollout_mse": error,
        "rollout_relative_error": math.sqrt(error / spread) if error is not None and spread > 0 else None,
        "rollout_error_over_motion": math.sqrt(error / held) if error is not None and held else None,
        "rollout_steps": 0 if longest is None else len(longest.errors) - 1,
        "rollout_time": 0.0 if longest is None else float(longest.times[len(longest.errors) - 1] - longest.times[0]),
        "rollouts_cut": sum(r.cut for r in rollouts),
        "rollouts_left_out": len(test) - len(rollouts) if isinstance(test, Trajectories) else 0,
        "rollouts_ended_early": sum(r.stopped is not None for r in rollouts),
    }


def _over_motion(error: float, data: Trajectories | Pairs) -> float | None:
    """The root of a mean squared error of one step over that of the prediction that nothing moves."""
    x, y, _ = data.pairs()
    motion = float((y - x).square().mean())
    return math.sqrt(error / motion) if motion > 0 else None


def _test_spread(test: Trajectories | Pairs, spread: float) -> float | None:
    """The spread of the test states over that of the training ones; pairs are drawn at random, so that they agree."""
    if not isinstance(test, Trajectories) or spread <= 0:
        return None
    return math.sqrt(float(torch.cat(test.states).var(dim=0).mean()) / spread)


def _ranges(names: Sequence[str], states: Tensor) -> dict[str, list[float]]:
    """The smallest and the largest value of each column."""
    least, most = states.amin(0).tolist(), states.amax(0).tolist()
    return {name: [low, high] for name, low, high in zip(names, least, most, strict=True)}


def _by_column(names: Sequence[str], errors: Tensor, states: Tensor) -> dict[str, float | None]:
    """The root of each column's mean squared error over that column's own spread; ``None`` where it does not move."""
    spreads = states.std(dim=0)
    moves = spreads > 1e-12 * states.abs().amax(0)
    columns = zip(names, (errors.sqrt() / spreads).tolist(), moves.tolist(), strict=True)
    return {name: error if moving else None for name, error, moving in columns}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return finite_or_none(value) if isinstance(value, float) else value


def write_outputs(directory: Path, outcome: Outcome, source: dict[str, Any], command: str) -> None:
    """Write every file of the fit but the model; the metrics last, since they say that all is there."""
    checks = [
        {
            "property": outcome.fitted.plan.told(check.declared),
            "residual": finite_or_none(check.residual),
            "tolerance": finite_or_none(check.tolerance),
            "holds": check.passed,
        }
        for check in outcome.verification or ()
    ]
    write_json(directory / VERIFICATION, checks)
    if outcome.rollouts:
        write_text(directory / PREDICTIONS, predictions(outcome.rollouts, outcome.fitted.flow.structure.names))
    write_text(directory / REPORT, page(outcome, source, command, directory))
    write_json(directory / METRICS, outcome.metrics)


def predictions(rollouts: Sequence[Rollout], names: Sequence[str]) -> str:
    """``trajectory,t,<name>,…,<name>_predicted,…`` for every test trajectory, called as in the data.

    Where a state is called so itself the predictions are ``<name>_predicted_``.
    """
    suffix = "_predicted"
    while any(name + suffix in names for name in names):
        suffix += "_"
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trajectory", "t", *names, *(name + suffix for name in names)])
    for rollout in rollouts:
        for i, predicted in enumerate(rollout.predicted.tolist()):
            label = rollout.label
            writer.writerow([label, float(rollout.times[i]), *rollout.measured[i].tolist(), *predicted])
    return text.getvalue()


def page(outcome: Outcome, source: dict[str, Any], command: str, directory: Path) -> str:
    """``report.html`` as text: one page, no script, no request to anywhere."""
    sections = (_headline, _data, _model, _verification, _training, _rollouts, _drift)
    parts = [part for section in sections for part in section(outcome, source)]
    parts.extend(_usage(outcome, directory, command))
    kept = outcome.fitted.flow.structure.preserve
    title = f"{source['file']}: a surrogate that keeps {KEPT.get(kept, kept)}"
    return document(title, "", parts)


def _headline(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    yield table(("", "result", "meaning"), headline_rows(outcome.metrics), numeric=(1,))
    for warning in warnings(outcome.metrics):
        yield paragraph(f"Warning: {warning}")


def headline_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What matters most, for the page and the terminal: name, value, meaning."""
    noisy = ", the noise of both ends included" if metrics["horizon"] > 1 else ""
    over = "root mean squared error over the spread of the states"
    rows = [
        ("error of one step", _number(metrics["test_mse"]), "mean squared, on data that was not fitted"),
        ("relative error of one step", _share(metrics["test_relative_error"]), over + noisy),
    ]
    if "test_error_over_motion" in metrics:
        meaning = "root mean squared error over that of predicting no change (100 %)" + noisy
        rows.append(("error of one step over the motion", _share(metrics["test_error_over_motion"]), meaning))
    if "step_halving_error" in metrics:
        meaning = "largest distance over the spread: how far shorter steps than the usual one are off; longer ones more"
        rows.append(("two half steps against one", _share(metrics["step_halving_error"]), meaning))
    if metrics["rollout_mse"] is not None or metrics.get("rollout_steps", 0) > 0:
        rows.extend(_rollout_rows(metrics, over))
    if metrics["horizon"] > 1:
        rows.append(("noise in the data", _number(metrics["noise_level"]), "estimate, over the spread of the states"))
    for what, value in metrics["drift"].items():
        rows.append((what, _number(value), f"largest along {metrics['long_steps']} steps"))
    verdict = {True: "hold", False: "VIOLATED", None: "not measured"}[metrics["verified"]]
    of_whom = "; of the surrogate, whether or not the data has them"
    declared = ", ".join(metrics["properties"]) + of_whom if metrics["properties"] else "none"
    rows.append(("declared properties", verdict, declared))
    rows.append(("parameters", words.count(metrics["parameters"]), "numbers that were learned"))
    rows.append(("time of the fit", words.duration(metrics["seconds"]), metrics["stopped"]))
    return rows


def _rollout_rows(metrics: dict[str, Any], over: str) -> Iterator[tuple[str, str, str]]:
    ended, cut, left = (metrics.get(f"rollouts_{what}", 0) for what in ("ended_early", "cut", "left_out"))
    early = f"; {ended} ended early and {'counts to its' if ended == 1 else 'count to their'} end" if ended else ""
    steps = metrics.get("rollout_steps", 0)
    length = f", up to {steps:,} steps (a time of {metrics['rollout_time']:.4g})" if steps else ""
    first = f"; {cut} {'is longer and counts' if cut == 1 else 'are longer and count'} so far" if cut else ""
    others = f"; {left} more were not rolled out" if left else ""
    meaning = f"mean squared, from the first state on{length}{first}{early}{others}"
    yield "error of whole rollouts", _number(metrics["rollout_mse"]), meaning
    meaning = f"{over}; chaos makes it large in the end, however good the fit"
    yield "relative error of whole rollouts", _share(metrics["rollout_relative_error"]), meaning
    if "rollout_error_over_motion" in metrics:
        meaning = "root mean squared error over that of staying at the first state (100 %)"
        yield "error of whole rollouts over the motion", _share(metrics["rollout_error_over_motion"]), meaning


def warnings(metrics: dict[str, Any]) -> list[str]:
    """What should make a reader doubt the surrogate, a sentence each.

    Example:
        >>> poor = {"train_mse": 1e-9, "test_mse": 1e-6, "test_relative_error": 0.01, "noise_level": 0.0}
        >>> warnings(poor | {"rollout_relative_error": 0.3, "rollouts_ended_early": 0})[0][:46]
        'The test error is 1000 times the training one:'
    """
    found = []
    train, test, relative = metrics["train_mse"], metrics["test_mse"], metrics["test_relative_error"]
    above_noise = relative is not None and relative > 3 * (metrics["noise_level"] or 0.0)
    if train and test and test > OVERFIT * train and above_noise:
        found.append(
            f"The test error is {test / train:.0f} times the training one: the training data does not cover the test "
            "data. More trajectories help, or a smaller --width."
        )
    if test is None:
        found.append(
            "Steps from test states are not solved, or leave the range of numbers: the surrogate is not to be used "
            "there. Samples that lie closer, more data, or a structure whose steps solve no equation help."
        )
    if metrics["rollouts_ended_early"]:
        found.append(
            f"Rollouts from test states ended early: {metrics['rollouts_ended_early']}; errors of rollouts are of what "
            "was reached."
        )
    found.extend(_uneven_columns(metrics.get("column_relative_errors") or {}, relative, metrics.get("preserve", "")))
    gap = metrics.get("step_halving_error")
    if gap is not None and gap > max(COARSE, COARSE_RATIO * (relative or 0.0)):
        found.append(
            f"Two half steps end {_share(gap)} of the spread away from a whole one: steps of another length, and "
            "vector_field, are not as accurate as the steps that were fitted. Take the usual step only, or fit with "
            "more --substeps."
        )
    found.extend(_little_motion(metrics, above_noise))
    found.extend(_far_steps(metrics, above_noise))
    found.extend(_far_rollouts(metrics))
    found.extend(_broken_word(metrics))
    return [*found, *metrics.get("doubts", ())]


def _broken_word(metrics: dict[str, Any]) -> Iterator[str]:
    verified = metrics.get("verified", True)
    if verified is False:
        yield (
            "What the surrogate declares does not all hold at test states (verification.json and the report say what, "
            "and by how much): do not rely on it. Where data lies far from 0 rounding may do that: subtract a constant "
            "before; elsewhere it is a fault of the surrogate's code, which please report."
        )
    if verified is None and metrics.get("properties"):
        yield (
            "What the surrogate declares was not measured, since its step has a solution at none of the test states "
            "that were tried: it is not to be used there."
        )


def _far_steps(metrics: dict[str, Any], above_noise: bool) -> Iterator[str]:
    """Errors of one step where there is nothing longer to compare, as of pairs."""
    error = metrics["test_relative_error"]
    if metrics.get("rollout_steps") == 0 and error is not None and error > FAR and above_noise:
        yield (
            f"Steps are off by {_share(error)} of the spread of the states, and several in a row, which were not "
            "compared, by more. A longer fit (--preset long), a larger --width or more data may help"
            f"{_other_structure(metrics)}."
        )


def _far_rollouts(metrics: dict[str, Any]) -> Iterator[str]:
    error, over = metrics["rollout_relative_error"], metrics.get("rollout_error_over_motion")
    noise = 3 * (metrics["noise_level"] or 0.0)
    if error is None and metrics.get("rollout_mse") is None and metrics.get("rollout_steps", 0) > 0:
        yield (
            "Rollouts from test states grow beyond all numbers, and so does their mean squared error: good for single "
            "steps at most. A longer fit (--preset long), more data or more --substeps may help."
        )
    if error is not None and error > max(FAR, noise):
        yield (
            f"Rollouts are off by {_share(error)} of the spread of the states: good for a few steps only. A longer fit "
            f"(--preset long) or more data may help, though not for long against chaos{_other_structure(metrics)}."
        )
    elif over is not None and over > STILL and (error is None or error > noise):
        yield (
            f"Rollouts are off by {_share(over)} of how far the test states move from the first on (100 % is staying "
            "there), though by little of the spread of all states: hardly anything of these motions was learned. A "
            f"longer fit (--preset long) or more data may help{_other_structure(metrics)}."
        )


def _other_structure(metrics: dict[str, Any]) -> str:
    if metrics.get("preserve") == "none":
        return ""
    return (
        "; or the data does not keep what the surrogate keeps (friction, driving, velocities in place of momenta): "
        "compare with --preserve none"
    )


def _little_motion(metrics: dict[str, Any], above_noise: bool) -> Iterator[str]:
    still, spread = metrics.get("test_error_over_motion"), metrics.get("test_spread")
    if still is not None and still > STILL and above_noise:
        yield (
            f"The error of one step is {_share(still)} of the motion in a step (100 % is predicting no change): hardly "
            "anything of the motion was learned. A longer fit (--preset long), a larger --width or more data may help; "
            "or the columns are not a whole state (positions without velocities or momenta): append the rest."
        )
    if spread is not None and spread < NARROW:
        yield (
            f"The test states spread over {_share(spread)} of what the training states do, as where a motion dies out: "
            "errors over the spread look better than they are; look at those over the motion."
        )


def _uneven_columns(errors: dict[str, float | None], relative: float | None, preserve: str) -> list[str]:
    cure = "scale the columns to similar sizes"
    if preserve == "norm":
        cure = "fit longer (--preset long) or with a larger --width, since other scales would change the norm"
    elif preserve == "mass":
        cure = "scale the columns to similar sizes, and divide their --weights by the same factors"
    elif preserve == "symplectic" or (preserve == "energy" and len(errors) % 2 == 0):
        cure = "scale all positions by one factor and all momenta by another"
    limit = max(UNEVEN, UNEVEN_RATIO * (relative or 0.0))
    return [
        f"Column {name!r} is learned worse than the rest: its error is {_share(error)} of its own spread. Unless that "
        f"is noise, {cure}."
        for name, error in errors.items()
        if relative is not None and error is not None and error > limit
    ]


def _share(value: float | None) -> str:
    return words.percent(value) if value is not None and 1e-3 < value < 1e4 else _number(value)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _data(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    flow, parts = outcome.fitted.flow, outcome.fitted.plan.parts
    yield "<h2>What was read</h2>"
    kind = "trajectories" if isinstance(parts.test, Trajectories) else "pairs"
    rows = [("file", str(source["file"])), ("state columns", ", ".join(flow.structure.names))]
    for name, part in (("training", parts.train), ("validation", parts.validation), ("test", parts.test)):
        if part is not None:
            count = len(part.pairs()[0])
            several = f"{_trajectories(part, name == 'test')}, {count} steps"
            many = several if kind == "trajectories" else f"{count} pairs"
            fitted = 0 if name == "test" else len(usual_steps(part, flow.structure.step).pairs()[0])
            thinned = fitted > MOST_SAMPLES
            rows.append((name, f"{many}, of which {MOST_SAMPLES:,} are used, evenly spaced" if thinned else many))
    h = parts.train.pairs()[2]
    least, most, median = float(h.min()), float(h.max()), float(h.median())
    spread = f"{least:.4g}" if most - least <= 1e-9 * most else f"{least:.4g} to {most:.4g}, median {median:.4g}"
    rows.append(("time between samples", spread))
    yield table(("", "value"), rows)


def _trajectories(part: Trajectories | Pairs, named: bool) -> str:
    """How many trajectories there are, and which."""
    count = f"{len(part)} {'trajectory' if len(part) == 1 else 'trajectories'}"
    if not named or not isinstance(part, Trajectories) or not part.labels:
        return count
    more = ", …" if len(part) > SHOWN_LABELS else ""
    return f"{count} ({', '.join(part.labels[:SHOWN_LABELS])}{more})"


def _model(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    flow, given = outcome.fitted.flow, outcome.fitted.plan.weights
    yield "<h2>The surrogate and what it is guaranteed to keep</h2>"
    steps = f"{flow.structure.substeps} step{'s' if flow.structure.substeps > 1 else ''}"
    yield paragraph(
        f"A learned {type(flow.field).__name__} moved by {flow.method!r}, {steps} between two samples (times in the "
        "derivation are in the surrogate's own unit). The guarantees hold for every state, every parameter and "
        f"{flow.scope()}, by construction; the fit chooses among maps that have them."
    )
    if given is not None and flow.structure.weights != tuple(given):
        yield paragraph("Weights in the derivation are those that were given over a power of two: the sum is the same.")
    yield f"<pre>{escape(str(explain(flow)))}</pre>"


def _verification(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Verification</h2>"
    told = outcome.fitted.plan.told
    rows = [
        (told(c.declared), f"{c.residual:.2e}", f"{c.tolerance:.2e}", "holds" if c.passed else "VIOLATED")
        for c in outcome.verification or ()
    ]
    if outcome.verification is None:
        yield paragraph("Not measured: the equation of a step is not solved at the test states.")
    elif rows:
        yield paragraph(
            "Each declared property, measured in float64 at test states, in the size of the data as a unit; the "
            "tolerance is rounding."
        )
        yield table(("property", "residual", "tolerance", "verdict"), rows, numeric=(1, 2))
    else:
        yield paragraph("Nothing is declared, so there is nothing to verify.")


def _training(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    yield "<h2>The fit</h2>"
    chosen = "training data" if outcome.fitted.history.validation is None else "validation"
    caption = (
        f"Adam, then from the dotted line on a second-order finish. The best parameters on the {chosen} were kept. "
        "Residuals are over the size of the states."
    )
    yield figure(figures.loss_figure(outcome.fitted.curve()), "loss", caption)
    rows = [(key, _number(outcome.metrics[f"{key}_mse"])) for key in ("train", "validation", "test")]
    yield table(("data", "mean squared error of one step"), rows, numeric=(1,))


def _rollouts(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    rollouts, names = outcome.rollouts, outcome.fitted.flow.structure.names
    yield "<h2>Rollouts</h2>"
    if not rollouts:
        yield paragraph("The file holds single steps, so only their errors are known; trajectories would show more.")
        return
    ended = next((r.stopped for r in rollouts if r.stopped), None)
    if ended:
        yield paragraph(f"Some predictions end early: {ended}.")
    if len(names) >= 2:
        caption = "Left: test data and predictions from their first states. Right: a long run from the first of them."
        yield figure(figures.portrait_figure(rollouts, outcome.long_states, names), "portrait", caption)
    caption = "The first test trajectory: only its first state was given."
    yield figure(figures.component_figure(rollouts[0], names), "components", caption)
    caption = "All rollouts."
    if len(rollouts) > figures.MOST_CURVES:
        caption = f"Some of {len(rollouts):,} rollouts, evenly spaced, and the median of all."
    if outcome.fitted.plan.horizon > 1:
        caption += " The error cannot fall below the noise of the data."
    yield figure(figures.error_figure(rollouts), "errors", caption)


def _drift(outcome: Outcome, source: dict[str, Any]) -> Iterator[str]:
    if not outcome.drifts:
        return
    yield "<h2>Drift over a long time</h2>"
    if outcome.long_stop:
        yield paragraph(f"The run ended after {len(outcome.long_states) - 1} steps: {outcome.long_stop}.")
    yield figure(figures.drift_figure(outcome.drifts), "drift", "Values below 1e-18 are drawn there.")


def _usage(outcome: Outcome, directory: Path, command: str) -> Iterator[str]:
    x = outcome.fitted.plan.parts.test.pairs()[0][0].tolist()
    step = outcome.fitted.flow.structure.step
    snippet = f"""import torch
from dynablocks.fitting import load_fit

flow = load_fit({str(directory)!r})
x = torch.tensor([{x}], dtype=torch.float64)
flow(x)                                  # the state after {step:g}
flow(x, {step / 2:g})                    # after half of that
flow.rollout(x, torch.full((1, 100), {float(step)!r}, dtype=torch.float64))  # 101 states
flow.vector_field(x)                     # the learned dx/dt
"""
    start = ",".join(map(str, x))
    rollout = f"dynablocks rollout {shlex.quote(str(directory))} --start {start} --steps 100 --out trajectory.csv"
    yield f"<h2>Use it from Python</h2>\n<pre>{escape(snippet)}</pre>"
    yield f'<h2>Use it from the command line</h2>\n<pre class="command">{escape(rollout)}</pre>'
    yield f'<h2>How to get this result again</h2>\n<pre class="command">{escape(command)}</pre>'
