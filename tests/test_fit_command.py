"""``dynablocks fit`` from a file to a report, and every way to use it wrongly."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dynablocks.cli import main
from dynablocks.errors import BadCheckpoint, InvalidArgument
from dynablocks.fitting import load_fit, save_fit
from dynablocks.fitting.report import headline_rows, warnings

OUTPUTS = (
    "config.yaml",
    "metrics.json",
    "model.safetensors",
    "predictions.csv",
    "report.html",
    "verification.json",
)


def write_csv(
    path: Path, trajectories: int = 3, samples: int = 12, columns: tuple[str, ...] = ("q", "p"), label: str = ""
) -> Path:
    """Noisy rotations with irregular times."""
    generator = torch.Generator().manual_seed(0)
    lines = ["trajectory,t," + ",".join(columns)]
    for k in range(trajectories):
        t = 0.0
        for _ in range(samples):
            noise = 0.01 * torch.randn(len(columns), generator=generator)
            state = [(1 + 0.3 * k) * math.cos(t + i * math.pi / 2) + float(noise[i]) for i in range(len(columns))]
            lines.append(f"{label}{k},{t!r}," + ",".join(map(repr, state)))
            t += 0.1 + 0.05 * float(torch.rand((), generator=generator))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_trajectories_of_the_test_may_be_named(tmp_path: Path) -> None:
    file, out = write_csv(tmp_path / "data.csv", label="run "), tmp_path / "out"
    options = ["--preserve", "none", "--preset", "smoke", "--width", "3", "--substeps", "1", "--out", str(out)]
    assert main(["fit", str(file), *options, "--test", "run 1"]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["fit"]["test"] == ["run 1"]
    with (out / "predictions.csv").open() as lines:
        assert {row["trajectory"] for row in csv.DictReader(lines)} == {"run 1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole fit."""
    folder = tmp_path_factory.mktemp("fit")
    file = write_csv(folder / "data.csv")
    out = folder / "out"
    options = ["--preset", "smoke", "--width", "3", "--substeps", "1", "--out", str(out)]
    assert main(["fit", str(file), "--preserve", "symplectic", *options]) == 0
    return out


def test_one_command_leads_from_a_csv_to_a_report(finished: Path) -> None:
    assert all((finished / name).exists() for name in OUTPUTS)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["verified"]
    assert metrics["horizon"] > 1
    assert metrics["rollout_mse"] < 0.5
    assert {entry["holds"] for entry in json.loads((finished / "verification.json").read_text())} == {True}
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 5
    for said in ("data.csv", "Symplectic", "load_fit", "Verification", "dynablocks fit"):
        assert said in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert re.search(r"1 trajectory \(\d\), 11 steps", page)
    assert re.search(r"torch\.full\(\(1, 100\), [\d.]+, dtype=torch\.float64\)", page)
    assert set(metrics["column_relative_errors"]) == {"q", "p"}
    assert metrics["samples_used"]["one step"] == 11
    assert 0 <= metrics["step_halving_error"] < 0.1
    assert "two half steps against one" in page
    assert "change of the learned energy over its spread" in metrics["drift"]
    with open(finished.parent / "data.csv") as stream:
        column = [float(row["q"]) for row in csv.DictReader(stream)]
    low, high = metrics["training_range"]["q"]
    assert min(column) <= low < high <= max(column)
    assert {low, high} <= set(column)
    assert 0 < metrics["test_error_over_motion"] < 1
    assert metrics["rollout_steps"] == 11
    assert metrics["doubts"] == []


def test_predictions_join_with_the_file_by_trajectory_and_time(tmp_path: Path) -> None:
    from dynablocks.data.trajectory_files import read_trajectories
    from dynablocks.fitting import Structure, build
    from dynablocks.fitting.report import predictions
    from dynablocks.fitting.rollout import roll_out

    file = write_csv(tmp_path / "data.csv", trajectories=5, label="run ")
    with open(file) as stream:
        measured = {(row["trajectory"], float(row["t"])): row for row in csv.DictReader(stream)}
    _, test = read_trajectories(file).split(0.4)
    flow = build(Structure("none", ("q", "p"), width=2, step=0.1))
    rows = list(csv.DictReader(predictions(roll_out(flow, test), ("q", "p")).splitlines()))
    assert len(rows) == 24
    for row in rows:
        found = measured[row["trajectory"], float(row["t"])]
        assert (float(row["q"]), float(row["p"])) == (float(found["q"]), float(found["p"]))


def test_every_column_of_the_predictions_has_a_name_of_its_own() -> None:
    from dynablocks.fitting.report import predictions
    from dynablocks.fitting.rollout import Rollout

    times, x = torch.arange(2.0, dtype=torch.float64), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    header, first, _ = predictions([Rollout(times, x, 10 * x, None, "a")], ("q", "q_predicted")).splitlines()
    assert header == "trajectory,t,q,q_predicted,q_predicted_,q_predicted_predicted_"
    assert first == "a,0.0,1.0,2.0,10.0,20.0"


def test_steps_in_snippets_are_float64() -> None:
    text = (Path(__file__).parent.parent / "docs" / "fit.md").read_text(encoding="utf-8")
    snippets = [line for line in text.splitlines() if "torch.full(" in line or "torch.tensor(" in line]
    assert snippets
    assert all("float64" in line for line in snippets)


def test_the_saved_surrogate_makes_the_written_predictions(finished: Path) -> None:
    flow = load_fit(finished)
    with open(finished / "predictions.csv") as stream:
        rows = list(csv.DictReader(stream))
    times = torch.tensor([float(row["t"]) for row in rows], dtype=torch.float64)
    predicted = [[float(row[f"{name}_predicted"]) for name in ("q", "p")] for row in rows]
    wanted = torch.tensor(predicted, dtype=torch.float64)
    assert torch.allclose(flow.rollout(wanted[:1], times.diff()[None])[0], wanted, rtol=0, atol=1e-12)


def test_the_same_command_again_computes_nothing_and_another_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(finished.parent / "data.csv")
    options = ["--preset", "smoke", "--width", "3", "--substeps", "1", "--out", str(finished)]
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert main(["fit", file, "--preserve", "symplectic", *options]) == 0
    assert (finished / "model.safetensors").stat().st_mtime_ns == before
    assert "already" in capsys.readouterr().err
    assert main(["fit", file, "--preserve", "none", *options]) == 2
    assert "another preserve" in capsys.readouterr().err


def test_a_fit_whose_time_was_over_says_so_where_more_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_csv(tmp_path / "data.csv"), tmp_path / "out"
    settings = ["--preset", "smoke", "--width", "2", "--substeps", "1", "--noise", "no", "--out", str(out)]
    command = ["fit", str(file), "--preserve", "none", *settings]
    assert main([*command, "--max-minutes", "1e-9"]) == 0
    assert json.loads((out / "metrics.json").read_text())["stopped"] == "the time was over"
    made = "holds this fit already, made with --max-minutes 1e-09 until its time was over; --overwrite fits anew with"
    for limit, said in (
        (["--max-minutes", "60"], f"{made} --max-minutes 60\n"),
        ([], f"{made}out a limit of time\n"),
        (["--max-minutes", "1e-9"], "holds this fit already; --overwrite makes it anew\n"),
    ):
        capsys.readouterr()
        assert main([*command, *limit]) == 0
        assert f"{out} {said}" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*command, "--max-minutes", "60"]) == 0
    assert "already; --overwrite makes it anew" in capsys.readouterr().err


def test_pairs_are_fitted_without_rollouts(tmp_path: Path) -> None:
    lines = ["in_S,in_I,out_S,out_I,h"]
    for k in range(20):
        s = 0.2 + 0.03 * k
        lines.append(f"{s},{1 - s},{s * 0.9},{1 - 0.9 * s},0.5")
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert (
        main(["fit", str(file), "--preserve", "mass", "--weights", "1,1", "--preset", "smoke", "--out", str(out)]) == 0
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rollout_mse"] is None
    assert metrics["test_mse"] < 1e-4
    assert metrics["drift"]["relative change of the mass"] < 1e-12
    assert not (out / "predictions.csv").exists()


def test_a_poor_surrogate_is_not_sold_as_a_good_one() -> None:
    good = {"train_mse": 1e-6, "test_mse": 2e-6, "test_relative_error": 1e-3, "noise_level": 0.0}
    good |= {"rollout_relative_error": 0.02, "rollouts_ended_early": 0}
    assert warnings(good) == []
    (overfitted,) = warnings(good | {"test_mse": 1e-4, "test_relative_error": 1e-2})
    assert "100 times the training one" in overfitted
    assert warnings(good | {"test_mse": 1e-4, "test_relative_error": 1e-2, "noise_level": 0.01}) == []
    (far,) = warnings(good | {"rollout_relative_error": 0.4})
    assert "40.0 %" in far
    (early,) = warnings(good | {"rollouts_ended_early": 3})
    assert "ended early: 3;" in early
    unknown = {"test_mse": None, "test_relative_error": None, "rollout_relative_error": None}
    (unsolved,) = warnings(good | unknown)
    assert "not solved" in unsolved
    (coarse,) = warnings(good | {"step_halving_error": 0.02})
    assert coarse.startswith("Two half steps end 2.0 % of the spread away")
    assert "--substeps" in coarse
    for gap in (None, 9e-4, 2.9e-3):
        assert warnings(good | {"step_halving_error": gap}) == []
    (uneven,) = warnings(good | {"column_relative_errors": {"q": 1e-3, "p": 0.02, "still": None}})
    assert uneven.startswith("Column 'p' is learned worse than the rest: its error is 2.0 % of its own spread")
    assert warnings(good | {"column_relative_errors": {"q": 1e-3, "p": 0.009}}) == []
    assert warnings(good | {"test_relative_error": 0.01, "column_relative_errors": {"q": 0.01, "p": 0.09}}) == []
    (still,) = warnings(good | {"test_error_over_motion": 0.6})
    assert "is 60.0 % of the motion in a step (100 % is predicting no change)" in still
    assert warnings(good | {"test_error_over_motion": 0.6, "noise_level": 0.01}) == []
    assert warnings(good | {"test_error_over_motion": 0.4, "test_spread": 0.2}) == []
    (narrow,) = warnings(good | {"test_spread": 0.05})
    assert narrow.startswith("The test states spread over 5.0 % of what the training states do")
    assert warnings(good | {"rollout_relative_error": 0.4, "noise_level": 0.2}) == []
    assert "friction" in far
    assert "friction" not in warnings(good | {"rollout_relative_error": 0.4, "preserve": "none"})[0]
    assert warnings(good | {"doubts": ["There is one trajectory."]}) == ["There is one trajectory."]


def test_rollouts_that_are_far_off_over_their_own_motion_are_told() -> None:
    good = {"train_mse": 1e-6, "test_mse": 2e-6, "test_relative_error": 1e-3, "noise_level": 0.0}
    good |= {"rollout_relative_error": 0.05, "rollouts_ended_early": 0, "rollout_steps": 20}
    (over,) = warnings(good | {"rollout_error_over_motion": 2.0})
    assert over.startswith("Rollouts are off by 200.0 % of how far the test states move from the first on (100 % is st")
    assert "friction" in over
    assert "friction" not in warnings(good | {"rollout_error_over_motion": 2.0, "preserve": "none"})[0]
    assert warnings(good | {"rollout_error_over_motion": 0.4}) == []
    assert warnings(good | {"rollout_error_over_motion": 2.0, "noise_level": 0.02}) == []
    (far,) = warnings(good | {"rollout_relative_error": 0.4, "rollout_error_over_motion": 2.0})
    assert far.startswith("Rollouts are off by 40.0 % of the spread of the states")


def test_steps_that_are_far_off_are_told_where_nothing_longer_is_compared() -> None:
    pairs = {"train_mse": 1e-6, "test_mse": 2e-6, "test_relative_error": 0.4, "noise_level": 0.0, "rollout_mse": None}
    pairs |= {"rollout_relative_error": None, "rollout_error_over_motion": None, "rollouts_ended_early": 0}
    (far,) = warnings(pairs | {"rollout_steps": 0})
    assert far.startswith("Steps are off by 40.0 % of the spread of the states, and several in a row, which were")
    assert warnings(pairs | {"rollout_steps": 0, "test_relative_error": 0.05}) == []
    assert warnings(pairs | {"rollout_steps": 0, "noise_level": 0.2}) == []
    assert warnings(pairs | {"rollout_steps": 20, "rollout_mse": 1e-6, "rollout_relative_error": 0.05}) == []


def test_what_is_declared_and_does_not_hold_is_told() -> None:
    good = {"train_mse": 1e-6, "test_mse": 2e-6, "test_relative_error": 1e-3, "noise_level": 0.0}
    good |= {"rollout_relative_error": 0.02, "rollouts_ended_early": 0, "properties": ["Symplectic"]}
    (broken,) = warnings(good | {"verified": False})
    assert broken.startswith("What the surrogate declares does not all hold at test states")
    (unmeasured,) = warnings(good | {"verified": None})
    assert unmeasured.startswith("What the surrogate declares was not measured")
    assert warnings(good | {"verified": True}) == []
    assert warnings(good | {"verified": None, "properties": []}) == []


def test_a_column_that_does_not_move_has_no_relative_error() -> None:
    from dynablocks.fitting.report import _by_column

    t = torch.linspace(0, 6, 61, dtype=torch.float64)
    states = torch.stack([t.sin(), 1e-3 * t.cos(), torch.full_like(t, 3.31e8)], dim=1)
    found = _by_column(("q", "p", "N"), torch.tensor([1e-6, 1e-6, 1e-6], dtype=torch.float64), states)
    assert found["q"] == pytest.approx(1e-3 / float(states[:, 0].std()), rel=1e-12)
    assert found["p"] == pytest.approx(1.0 / float(1e3 * states[:, 1].std()), rel=1e-12)
    assert found["N"] is None


def test_one_training_pair_spreads_from_its_start_to_its_end(recwarn: pytest.WarningsRecorder) -> None:
    from dynablocks.data.trajectories import Trajectories
    from dynablocks.fitting.job import FitConfig, plan, run_stages
    from dynablocks.fitting.report import measure

    t = torch.tensor([0.0, 0.1], dtype=torch.float64)
    one, other = torch.tensor([[[1.0, 0.0], [0.995, -0.1]], [[0.5, 0.2], [0.518, 0.149]]], dtype=torch.float64)
    config = FitConfig("none", width=2, substeps=1, adam_steps=5, finish_steps=2, max_minutes=None)
    planned = plan(Trajectories((t, t), (one, other), ("q", "p")), config)
    metrics = measure(run_stages(planned, config), 2).metrics
    assert not [warned for warned in recwarn if "degrees of freedom" in str(warned.message)]
    (train,), (test,) = planned.parts.train.states, planned.parts.test.states
    spreads = train.diff(dim=0)[0].abs() / 2**0.5
    spread, motion = float(spreads.square().mean()), float(test.diff(dim=0).square().mean())
    assert metrics["test_relative_error"] == pytest.approx(math.sqrt(metrics["test_mse"] / spread), rel=1e-9)
    assert metrics["test_spread"] == pytest.approx(math.sqrt(motion / 2 / spread), rel=1e-9)
    by_column = torch.tensor(list(metrics["column_relative_errors"].values()), dtype=torch.float64) * spreads
    assert float(by_column.square().mean()) == pytest.approx(metrics["test_mse"], rel=1e-9)
    assert metrics["step_halving_error"] is not None
    assert metrics["rollout_relative_error"] is not None


def test_the_commands_of_a_report_start_where_the_test_does_in_any_unit() -> None:
    from dynablocks.data.trajectories import Pairs
    from dynablocks.fitting.report import _usage

    x = torch.tensor([[1.23456789e-9, -123456.789], [0.0, 0.0]], dtype=torch.float64)
    test = Pairs(x, x, torch.ones(2, dtype=torch.float64), ("q", "p"))
    plan, flow = SimpleNamespace(parts=SimpleNamespace(test=test)), SimpleNamespace(structure=SimpleNamespace(step=0.1))
    outcome = SimpleNamespace(fitted=SimpleNamespace(plan=plan, flow=flow))
    said = "".join(_usage(outcome, Path("out"), "dynablocks fit"))
    assert "x = torch.tensor([[1.23456789e-09, -123456.789]], dtype=torch.float64)" in said
    assert "--start 1.23456789e-09,-123456.789 --steps 100" in said


def test_metrics_from_before_a_measure_are_shown() -> None:
    old = {"test_mse": 1e-6, "test_relative_error": 1e-3, "horizon": 1, "rollout_mse": None, "drift": {}}
    old |= {"verified": True, "properties": [], "parameters": 3, "seconds": 1.0, "stopped": "done"}
    assert "two half steps against one" not in [row[0] for row in headline_rows(old)]
    rows = {name: value for name, value, _ in headline_rows(old | {"step_halving_error": None})}
    assert rows["two half steps against one"] == "unknown"


def test_the_table_says_how_long_rollouts_are_and_whose_the_properties_are() -> None:
    metrics = {"test_mse": 1e-6, "test_relative_error": 1e-3, "horizon": 1, "rollout_mse": 0.01, "drift": {}}
    metrics |= {"verified": True, "properties": ["Symplectic"], "parameters": 3, "seconds": 1.0, "stopped": "done"}
    metrics |= {"rollout_relative_error": 0.1, "rollout_error_over_motion": 0.25, "test_error_over_motion": 0.05}
    metrics |= {"rollout_steps": 5000, "rollout_time": 500.0, "rollouts_cut": 2, "rollouts_ended_early": 0}
    rows = {name: (value, meaning) for name, value, meaning in headline_rows(metrics)}
    said = rows["error of whole rollouts"][1]
    assert "up to 5,000 steps (a time of 500); 2 are longer and count so far" in said
    assert rows["error of one step over the motion"][0] == "5.0 %"
    assert rows["error of whole rollouts over the motion"][0] == "25.0 %"
    assert rows["declared properties"] == ("hold", "Symplectic; of the surrogate, whether or not the data has them")
    assert "chaos" in rows["relative error of whole rollouts"][1]


@pytest.mark.parametrize(("verified", "said"), [(True, "hold"), (False, "VIOLATED"), (None, "not measured")])
def test_the_table_says_whether_what_is_declared_holds(verified: bool | None, said: str) -> None:
    metrics = {"test_mse": 1e-6, "test_relative_error": 1e-3, "horizon": 1, "rollout_mse": None, "drift": {}}
    metrics |= {"verified": verified, "properties": ["Symplectic"], "parameters": 3, "seconds": 1.0, "stopped": "done"}
    assert {name: value for name, value, _ in headline_rows(metrics)}["declared properties"] == said


def test_a_surrogate_with_unsolved_steps_is_reported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynablocks.errors import NotConverged
    from dynablocks.fitting.surrogates import FlowMap

    whole = FlowMap.forward

    def forward(self: FlowMap, x: torch.Tensor, step: object = None) -> torch.Tensor:
        if not self.training and bool((x[:, 0] > 0).any()):
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return whole(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", forward)
    out, file = tmp_path / "out", write_csv(tmp_path / "d.csv")
    command = ["fit", str(file), "--preserve", "energy", "--preset", "smoke", "--width", "2", "--out", str(out)]
    assert main(command) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test_mse"] is None
    assert metrics["rollouts_ended_early"] > 0
    assert "not solved" in (out / "report.html").read_text()


def test_negative_weights_may_be_given_as_a_word_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "d.csv")
    assert main(["fit", str(file), "--preserve", "mass", "--weights", "-1,1", "--dry-run"]) == 0
    assert "(-1.0, 1.0)" in capsys.readouterr().out


def test_the_median_error_is_taken_at_equal_times() -> None:
    from dynablocks.fitting.figures import median_error
    from dynablocks.fitting.rollout import Rollout

    rollouts = []
    for step, count in ((0.1, 50), (1.0, 6), (0.5, 20)):
        times = 7 + step * torch.arange(count, dtype=torch.float64)
        measured = torch.zeros(count, 1, dtype=torch.float64)
        rollouts.append(Rollout(times, measured, measured + (times - 7)[:, None]))
    times, median = median_error(rollouts)
    assert float(times[-1]) == pytest.approx(4.9)
    assert torch.allclose(median, times, rtol=1e-12, atol=1e-12)


def test_an_example_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "first"
    assert main(["fit", "--example", "mass-spring", "--dry-run", "--out", str(out)]) == 0
    assert "SeparableHamiltonian" in capsys.readouterr().out
    assert not out.exists()


def test_a_refused_example_leaves_the_data_of_the_fit_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "first"
    command = ["fit", "--example", "mass-spring", "--preset", "smoke", "--width", "2", "--out", str(out)]
    assert main([*command, "--max-minutes", "0.01"]) == 0
    before = {name: (out / name).read_bytes() for name in ("example.csv", "config.yaml")}
    assert main([*command, "--seed", "1"]) == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "example.csv").unlink()
    assert main(command) == 0
    assert (out / "example.csv").read_bytes() == before["example.csv"]


def test_a_killed_fit_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "data.csv")
    command = ["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    calls = []

    def killed(*arguments: object) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dynablocks.fitting.commands.write_weights", killed)
        assert main([*command, "--out", str(tmp_path / "a")]) == 130
    assert calls
    said = capsys.readouterr().err
    assert "the same command, without --overwrite, goes on" in said
    assert "what was finished" not in said
    assert len(list((tmp_path / "a" / "checkpoint").glob("*.pt"))) == 2
    assert not (tmp_path / "a" / "metrics.json").exists()
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "one step: going on from" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    assert "going on" not in capsys.readouterr().err
    first, second = (load_fit(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give a FILE or --example"),
        (["{file}", "--example", "pendulum"], "both came"),
        (["{file}"], "--preserve is missing"),
        (["{file}", "--preserve", "symplektic"], "did you mean 'symplectic'"),
        (["{file}", "--preserve", "mass", "--weights", "1,x"], "--weights is '1,x'"),
        (["{file}", "--preserve", "mass", "--weights", "1,0"], "other than 0; fit the field"),
        (["{file}", "--preserve", "mass", "--weights", "1,nan"], "a finite number other than 0."),
        (["{file}", "--preserve", "mass", "--weights", "1,2,3"], "one a column"),
        (["{file}", "--preserve", "none", "--weights", "1,2"], "belong to --preserve mass"),
        (["{file}", "--preserve", "mass", "--coupled"], "--coupled belongs"),
        (["{file}", "--preserve", "positive"], "negative values"),
        (["{file}", "--preserve", "none", "--max-minutes", "0"], "max-minutes"),
        (["{file}", "--preserve", "none", "--width", "0"], "width"),
        (["{file}", "--preserve", "none", "--width", "many"], "a whole number"),
        (["{file}", "--preserve", "none", "--substeps", "-1"], "substeps"),
        (["{file}", "--preserve", "none", "--seed", "-1"], "seed"),
        (["{file}", "--preserve", "none", "--preset", "huge"], "unknown preset"),
        (["{file}", "--preserve", "none", "--noise", "perhaps"], "unknown noise"),
        (["{file}", "--preserve", "none", "--out", "{file}"], "is a file"),
        (["{file}", "--preserve", "none", "--columns", "q,speed"], "unknown column 'speed'. Known: p, q."),
        (["{odd}", "--preserve", "none", "--columns", "a,bb"], "column 'bb'; did you mean 'b'? Known: b, a, c."),
        (["{file}", "--preserve", "none", "--columns", "q,t"], "unknown column 't'. Known: p, q."),
        (["{file}", "--preserve", "none", "--columns", "q,q"], "columns has 'q' twice"),
        (["{file}", "--preserve", "none", "--test", "0,"], "--test is '0,'; names separated by commas"),
        (["{file}", "--preserve", "none", "--columns", "q,"], "--columns is 'q,'; names separated by commas"),
        (["{file}", "--preserve", "none", "--columns", '"q,p'], "--columns is '\"q,p'; names separated by commas"),
        (["{odd}", "--preserve", "symplectic", "--columns", "a,b,c"], "even number"),
        (["{pairs}", "--preserve", "none", "--columns", "in_q"], "(named without in_ and out_) 'in_q'. Known: p, q."),
        (["{pairs}", "--preserve", "none", "--columns", "p"], "has the column 'in_p' but not 'out_p'"),
        (["{timed}", "--preserve", "none", "--columns", "t,q"], "has a state called 't' (in_t, out_t)"),
        (["{index}", "--preserve", "none"], "to_csv(index=False), or choose the state columns with --columns."),
        (["--example", "pendulum", "--columns", "q,p"], "leave it out with --example"),
        (["{folder}/absent.csv", "--preserve", "none"], "does not exist"),
        (["--example", "pendulun"], "pendulum"),
        (["{odd}", "--preserve", "symplectic"], "even number"),
        (["{short}", "--preserve", "none"], ""),
        (["{still}", "--preserve", "none"], "no motion"),
        (["{huge}", "--preserve", "none"], "column 'q' reaches 1e+200"),
        (["{huge}", "--preserve", "mass", "--substeps", "1"], "column 'q' reaches 1e+200"),
    ],
)
def test_a_bad_use_gets_one_sentence(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "file.csv")
    write_csv(tmp_path / "odd.csv", columns=("a", "b", "c"))
    (tmp_path / "short.csv").write_text("t,q\n0,1\n1,2\n")
    (tmp_path / "still.csv").write_text("t,q\n" + "".join(f"{k},1\n" for k in range(20)))
    (tmp_path / "huge.csv").write_text("t,q,p\n" + "".join(f"{k},{(-1) ** k}e200,{k}\n" for k in range(20)))
    (tmp_path / "pairs.csv").write_text("in_q,in_p,out_q\n" + "".join(f"{k},{k},{k + 1}\n" for k in range(20)))
    (tmp_path / "timed.csv").write_text("in_t,in_q,out_t,out_q\n" + "".join(f"{k},1,{k + 1},2\n" for k in range(20)))
    (tmp_path / "index.csv").write_text(",t,q\n" + "".join(f"{k},{k},{k % 3}\n" for k in range(20)))
    paths = {path.stem: str(path) for path in tmp_path.glob("*.csv")}
    assert main(["fit", *(option.format(folder=tmp_path, **paths) for option in options)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.err.startswith("dynablocks: error: ")
    assert not (tmp_path / "runs").exists()


def test_the_lock_of_a_fit_lies_beside_its_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.files import lock_file

    file, inside = write_csv(tmp_path / "data.csv"), tmp_path / "new"
    inside.mkdir()
    monkeypatch.chdir(inside)
    command = ["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    with lock_file(tmp_path / ".new.lock") as free:
        assert free
        assert main([*command, "--out", "."]) == 2
    assert "another process" in capsys.readouterr().err
    assert main([*command, "--out", "."]) == 0
    assert not list(inside.glob("*.lock")) + list(inside.glob(".*.lock"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_csv(tmp_path / "data.csv")
    assert main(["fit", str(file), "--preserve", "none", "--preset", "smoke", "--out", str(tmp_path)]) == 2
    assert "other files" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv"}


def test_the_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for said in ("trajectory,t,<state columns>", "--example pendulum", "symplectic", "load_fit"):
        assert said in text


def test_a_surrogate_that_breaks_its_word_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.fitting.surrogates import FlowMap
    from dynablocks.properties import Declaration, Lipschitz

    monkeypatch.setattr(FlowMap, "declare", lambda self: Declaration.of(Lipschitz(1e-6), reason="hope"))
    out, file = tmp_path / "out", write_csv(tmp_path / "d.csv")
    assert main(["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--out", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["verified"] is False
    assert [row["holds"] for row in json.loads((out / "verification.json").read_text())] == [False]
    assert "VIOLATED" in (out / "report.html").read_text()
    sentence = "arning: What the surrogate declares does not all hold at test states"
    assert sentence in (out / "report.html").read_text()
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize(
    ("system", "kept"),
    [("rigid-body", "energy"), ("lotka-volterra", "positive"), ("pendulum", "symplectic"), ("sir", "mass")],
)
def test_an_example_keeps_what_suits_its_system(system: str, kept: str, tmp_path: Path) -> None:
    from dynablocks.fitting.commands import _choices

    options = SimpleNamespace(file=None, example=system, preserve=None)
    assert _choices(options) == (kept, system)


@pytest.mark.parametrize(
    ("system", "field"), [("double-pendulum", "NeuralHamiltonian"), ("kepler", "SeparableHamiltonian")]
)
def test_the_learned_energy_of_an_example_is_of_its_form(
    system: str, field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", "--example", system, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert field in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--example", "kepler", "--preserve", "symplectic"], "columns     positions q1, q2; momenta p1, p2\n"),
        (["--example", "pendulum", "--preserve", "energy"], "columns     positions q; momenta p\n"),
        (["--example", "rigid-body", "--preserve", "energy"], "columns     y1, y2, y3\n"),
        (["--example", "sir", "--preserve", "mass"], "columns     S, I, R\n"),
    ],
)
def test_a_dry_run_says_what_the_columns_are_taken_for(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert said in capsys.readouterr().out


def test_columns_that_alternate_get_the_order_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_csv(tmp_path / "data.csv", columns=("q1", "p1", "q2", "p2"))
    command = ["fit", str(file), "--preserve", "symplectic", "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "warning: Positions and momenta seem to alternate, but q1, p1 are taken for the positions" in said
    assert "--columns q1,q2,p1,p2\n" in said
    assert main([*command, "--columns", "q1,q2,p1,p2"]) == 0
    assert "alternate" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [("angle {}", "momentum {}"), ("angle, rad {}", "momentum, kg m/s {}")])
def test_the_order_to_give_can_be_pasted_whatever_the_columns_are_called(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [name.format(k) for k in (1, 2) for name in names]
    file = write_csv(tmp_path / "data.csv", columns=tuple(f'"{name}"' for name in columns))
    command = ["fit", str(file), "--preserve", "symplectic", "--dry-run"]
    assert main(command) == 0
    advice = re.search("If that is wrong: (.*)", capsys.readouterr().out)
    assert advice is not None
    assert main([*command, *shlex.split(advice[1])]) == 0
    said = capsys.readouterr().out
    assert "alternate" not in said
    wanted = [name.format(k) for name in names for k in (1, 2)]
    assert f"columns     positions {', '.join(wanted[:2])}; momenta {', '.join(wanted[2:])}\n" in said
    chosen = f'"{columns[3]}", "{columns[0]}"'
    assert main(["fit", str(file), "--preserve", "none", "--columns", chosen, "--dry-run"]) == 0
    assert f"columns     {columns[3]}, {columns[0]}\n" in capsys.readouterr().out


def test_every_fit_says_which_columns_are_momenta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, settings = write_csv(tmp_path / "data.csv"), ["--preset", "smoke", "--width", "2", "--substeps", "1"]
    assert main(["fit", str(file), "--preserve", "symplectic", *settings, "--out", str(tmp_path / "a")]) == 0
    assert "positions q; momenta p" in capsys.readouterr().err
    assert main(["fit", str(file), "--preserve", "none", *settings, "--out", str(tmp_path / "b")]) == 0
    assert "momenta" not in capsys.readouterr().err


def test_an_example_of_positive_states_may_keep_them_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dynablocks.data.trajectories import Trajectories
    from dynablocks.fitting.commands import _read

    options = SimpleNamespace(file=None, example="sir", seed=0, overwrite=False, dry_run=True)
    kept, measured = (_read(options, preserve, tmp_path).data for preserve in ("positive", "mass"))
    assert isinstance(kept, Trajectories)
    assert isinstance(measured, Trajectories)
    assert float(torch.cat(measured.states).min()) < 0
    assert torch.equal(torch.cat(kept.states), torch.cat(measured.states).clamp_min(0))
    command = ["fit", "--preserve", "positive", "--dry-run", "--out", str(tmp_path / "out")]
    assert main([*command, "--example", "sir"]) == 0
    assert main([*command, "--example", "pendulum"]) == 2
    assert "negative values" in capsys.readouterr().err


def test_a_dry_run_says_how_many_steps_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_csv(tmp_path / "data.csv")
    command = ["fit", str(file), "--preserve", "none", "--dry-run"]
    assert main(command) == 0
    assert "are used" not in capsys.readouterr().out
    monkeypatch.setattr("dynablocks.fitting.commands.MOST_SAMPLES", 5)
    assert main(command) == 0
    assert "5 of 11 training steps are used, evenly spaced" in capsys.readouterr().out


def test_chosen_columns_are_fitted_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_csv(tmp_path / "two.csv").read_text().splitlines()
    head, *rows = (line.split(",") for line in lines)
    more = [[label, t, "fine", p, "nan", q] for label, t, q, p in rows]
    wide = tmp_path / "wide.csv"
    wide.write_text("\n".join(",".join(row) for row in [[*head[:2], "note", "p", "gap", "q"], *more]) + "\n")
    options = ["--preserve", "symplectic", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    chosen = ["fit", str(wide), "--columns", "q,p", *options]
    assert main([*chosen, "--dry-run"]) == 0
    assert "columns     positions q; momenta p\n" in capsys.readouterr().out
    assert main([*chosen, "--out", str(tmp_path / "a")]) == 0
    assert main(["fit", str(tmp_path / "two.csv"), *options, "--out", str(tmp_path / "b")]) == 0
    first, second = (load_fit(tmp_path / name) for name in "ab")
    assert first.structure == second.structure
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    capsys.readouterr()
    assert main([*chosen, "--out", str(tmp_path / "a")]) == 0
    assert "already" in capsys.readouterr().err
    assert main(["fit", str(wide), "--columns", "p,q", *options, "--out", str(tmp_path / "a")]) == 2
    assert "another choice of --columns (['q', 'p'], now ['p', 'q'])" in capsys.readouterr().err


def test_columns_of_an_npz_are_numbered_and_those_of_pairs_have_no_prefix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    t = np.linspace(0, 3, 31)
    np.savez(tmp_path / "a.npz", t=t, x=np.stack([np.sin(t), t**2, np.cos(t)], axis=1))
    assert main(["fit", str(tmp_path / "a.npz"), "--preserve", "none", "--columns", "x3,x1", "--dry-run"]) == 0
    assert "columns     x3, x1\n" in capsys.readouterr().out
    assert main(["fit", str(tmp_path / "a.npz"), "--preserve", "none", "--columns", "q", "--dry-run"]) == 2
    assert "unknown column 'q'. Known: x1, x2, x3." in capsys.readouterr().err
    rows = [f"{k},{k + 0.5},{k + 1},{k + 1.5},0.1,a\n" for k in range(20)]
    (tmp_path / "pairs.csv").write_text("in_q,in_p,out_q,out_p,h,trajectory\n" + "".join(rows))
    assert main(["fit", str(tmp_path / "pairs.csv"), "--preserve", "none", "--columns", "p,q", "--dry-run"]) == 0
    assert "columns     p, q\n" in capsys.readouterr().out


def test_the_help_promises_what_the_maps_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert "not flows that stretch along their own axis" in text
    for claimed in ("incompressible", "exactly", "a minute or two"):
        assert claimed not in text


def test_the_lock_of_a_fit_lies_in_its_folder_where_nothing_can_be_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.files import lock_file

    file, out, access = write_csv(tmp_path / "data.csv"), tmp_path / "shared" / "mine", os.access
    out.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent and access(path, mode))
    command = ["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    with lock_file(out / ".lock") as free:
        assert free
        assert main([*command, "--out", str(out)]) == 2
    assert "another process" in capsys.readouterr().err
    assert main([*command, "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    assert load_fit(out).structure.names == ("q", "p")


def test_what_is_hidden_in_a_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    file, out = write_csv(tmp_path / "data.csv"), tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", ".config.yaml.0f0f.tmp"):
        (out / name).touch()
    command = ["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    assert main([*command, "--out", str(out)]) == 0


def test_too_little_memory_for_a_fit_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dynablocks.fitting.commands.plan", fails)
    assert main(["fit", str(write_csv(tmp_path / "data.csv")), "--preserve", "none"]) == 2
    said = capsys.readouterr().err
    assert said == "dynablocks: error: out of memory; give fewer rows or a smaller --width.\n"


def test_losses_are_drawn_as_mean_squares() -> None:
    """A loss is half of one."""
    from dynablocks.fitting import figures
    from dynablocks.fitting.regression import FitRecord

    records = [FitRecord("adam", 5, 1.0, 0.5, 0.25), FitRecord("adam", 10, 2.0, 0.125, 1.0)]
    (axes,) = figures.loss_figure([("one step", record) for record in records]).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1.0, 0.25], [0.5, 2.0]]


def test_a_long_curve_is_drawn_by_some_of_its_points() -> None:
    from dynablocks.fitting import figures
    from dynablocks.fitting.rollout import Drift, Rollout

    times = torch.linspace(0, 1, 50_001, dtype=torch.float64)
    states = torch.stack([times, 1 - times], dim=1)
    rollout = Rollout(times, states, states)
    drawn = [
        figures.component_figure(rollout, ("q", "p")),
        figures.portrait_figure([rollout], states, ("q", "p")),
        figures.error_figure([rollout] * 3),
        figures.drift_figure([Drift("a mass", times, times)]),
    ]
    lines = [line.get_xydata() for figure in drawn for axes in figure.axes for line in axes.lines]
    assert len(lines) == 12
    assert {len(points) for points in lines} == {figures.MOST_POINTS}
    # Points of the curve, its first and its last among them.
    assert lines[0][0].tolist() == [0.0, 0.0]
    assert lines[0][-1].tolist() == [1.0, 1.0]
    short = figures.component_figure(Rollout(times[:9], states[:9], states[:9]), ("q", "p"))
    assert [len(line.get_xydata()) for line in short.axes[0].lines] == [9, 9]


@pytest.mark.parametrize("text", ["{}", "[]", "5", "null", '"whole"', "[1]", "stopped", "verified", "drift"])
def test_metrics_that_were_cut_or_edited_are_one_sentence(
    text: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    whole = json.loads((out / "metrics.json").read_text())
    edited = json.dumps(whole | {text: 10**400}) if text in whole else text
    (out / "metrics.json").write_text(edited)
    options = ["--preset", "smoke", "--width", "3", "--substeps", "1", "--out", str(out)]
    command = ["fit", str(finished.parent / "data.csv"), "--preserve", "symplectic", *options]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    sentence = f"{out / 'metrics.json'} was cut or edited; remove it and give the command again."
    assert said == f"dynablocks: error: {sentence}"


def test_metrics_that_are_removed_are_made_again(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    whole = (out / "metrics.json").read_text()
    (out / "metrics.json").unlink()
    options = ["--preset", "smoke", "--width", "3", "--substeps", "1", "--out", str(out)]
    assert main(["fit", str(finished.parent / "data.csv"), "--preserve", "symplectic", *options]) == 0
    again, before = json.loads((out / "metrics.json").read_text()), json.loads(whole)
    del again["seconds"], before["seconds"]
    assert again == before


def test_the_folder_of_a_fit_takes_no_other_parameters(finished: Path) -> None:
    """Its report and metrics would be of those before."""
    flow, files = load_fit(finished), [path for path in finished.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    with pytest.raises(BadCheckpoint, match="holds a fit of dynablocks fit and its results; give another folder"):
        save_fit(finished, flow)
    assert {path: path.read_bytes() for path in files} == before


@pytest.mark.parametrize(("end", "told"), [(200.0, "grow beyond all numbers"), (100.0, "are off by 5.77e+99 of")])
def test_rollouts_that_grow_beyond_all_numbers_are_shown_and_told(end: float, told: str) -> None:
    from dynablocks.data.trajectories import Trajectories
    from dynablocks.fitting.report import _as_json, _rollout_metrics
    from dynablocks.fitting.rollout import Rollout

    t = torch.arange(4, dtype=torch.float64)
    measured, predicted = (column[:, None].expand(-1, 2) for column in (t, 10.0 ** (t * end / 3)))
    data = Trajectories((t,), (measured,), ("q", "p"))
    metrics = _as_json(_rollout_metrics([Rollout(t, measured, predicted)], data, 1.0))
    assert (metrics["rollout_mse"] is None) == (end == 200)
    assert (metrics["rollout_steps"], metrics["rollouts_ended_early"]) == (3, 0)
    metrics |= {"train_mse": 1e-6, "test_mse": 1e-6, "test_relative_error": 1e-3, "noise_level": 0.0, "horizon": 1}
    metrics |= {"verified": True, "properties": [], "parameters": 3, "seconds": 1.0, "stopped": "done", "drift": {}}
    rows = {name: (value, meaning) for name, value, meaning in headline_rows(metrics)}
    for name in ("error of", "relative error of"):
        assert (rows[f"{name} whole rollouts"][0] == "unknown") == (end == 200)
    assert "up to 3 steps" in rows["error of whole rollouts"][1]
    assert "error of whole rollouts over the motion" in rows
    (sentence,) = warnings(metrics)
    assert sentence.startswith("Rollouts")
    assert told in sentence


def test_states_at_the_end_of_the_range_of_numbers_are_drawn() -> None:
    from dynablocks.fitting import figures
    from dynablocks.fitting.rollout import Rollout
    from dynablocks.reporting.page import figure

    t, largest = torch.arange(4, dtype=torch.float64), 1.7e308
    predicted = torch.tensor([[0, 1], [1, -1], [largest, -largest], [-largest, largest]], dtype=torch.float64)
    rollout = Rollout(t, torch.zeros(4, 2, dtype=torch.float64), predicted)
    for drawn in (
        figures.component_figure(rollout, ("q", "p")),
        figures.portrait_figure([rollout], predicted, ("q", "p")),
    ):
        assert "<svg" in figure(drawn, "states", "as far as they go")


def test_of_many_errors_some_are_drawn_and_the_median_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting import figures
    from dynablocks.fitting.rollout import Rollout

    monkeypatch.setattr(figures, "MOST_CURVES", 2)
    t = torch.arange(4, dtype=torch.float64)
    rollouts = [Rollout(t, 0 * t[:, None], (k + 1) * t[:, None]) for k in range(5)]
    (axes,) = figures.error_figure(rollouts).axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn == [[1.0, 2.0, 3.0], [4.0, 8.0, 12.0], [3.0, 6.0, 9.0]]


@pytest.mark.parametrize(("trajectories", "samples", "chosen"), [(3, 9, "validation"), (1, 9, "training data")])
def test_a_page_says_on_what_the_best_parameters_were_chosen(
    trajectories: int, samples: int, chosen: str, tmp_path: Path
) -> None:
    file = write_csv(tmp_path / "data.csv", trajectories, samples)
    settings = ["--preset", "smoke", "--width", "2", "--substeps", "1", "--noise", "no"]
    assert main(["fit", str(file), "--preserve", "none", *settings, "--out", str(tmp_path / "out")]) == 0
    assert f"The best parameters on the {chosen} were kept." in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "; 1 is longer and counts so far; 1 ended early and counts to its end"),
        (2, "; 2 are longer and count so far; 2 ended early and count to their end"),
    ],
)
def test_one_rollout_is_not_spoken_of_as_several(count: int, said: str) -> None:
    metrics = {"test_mse": 1e-6, "test_relative_error": 1e-3, "horizon": 1, "rollout_mse": 0.01, "drift": {}}
    metrics |= {"verified": True, "properties": [], "parameters": 3, "seconds": 1.0, "stopped": "done"}
    metrics |= {"rollout_relative_error": 0.1, "rollouts_cut": count, "rollouts_ended_early": count}
    rows = {name: meaning for name, _, meaning in headline_rows(metrics)}
    assert rows["error of whole rollouts"].endswith(said)


def test_one_substep_is_not_called_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", str(write_csv(tmp_path / "data.csv")), "--preserve", "none", "--noise", "no", "--dry-run"]
    assert main([*command, "--substeps", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert ", 1 substep\n" in said
    assert re.search(r"^compared +step by step$", said, flags=re.MULTILINE)
    assert main([*command, "--substeps", "3", "--out", str(tmp_path / "out")]) == 0
    assert ", 3 substeps\n" in capsys.readouterr().out


def test_a_fit_from_python_is_that_of_the_command(tmp_path: Path) -> None:
    from dynablocks.data import read_dynamics
    from dynablocks.fitting import FitConfig, fit_trajectories
    from dynablocks.fitting.job import PRESETS

    file, out = write_csv(tmp_path / "data.csv"), tmp_path / "out"
    command = ["fit", str(file), "--preserve", "none", "--preset", "smoke", "--width", "2", "--substeps", "1"]
    assert main([*command, "--out", str(out)]) == 0
    config = FitConfig("none", substeps=1, **(PRESETS["smoke"] | {"width": 2}))
    found, stored = fit_trajectories(read_dynamics(file), config), load_fit(out).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in found.flow.state_dict().items())
    again, metrics = json.loads(json.dumps(found.metrics)), json.loads((out / "metrics.json").read_text())
    del again["seconds"], metrics["seconds"]
    assert again == metrics
    assert metrics["horizon"] > 1
    assert found.warnings == warnings(found.metrics)
    with pytest.raises(InvalidArgument, match="data is a Tensor; give Trajectories or Pairs"):
        fit_trajectories(torch.ones(3, 2), config)  # type: ignore[arg-type]


def test_weights_are_shown_as_they_were_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, said = write_csv(tmp_path / "data.csv"), tmp_path / "out", "LinearInvariant(5.0, 2.5)"
    settings = ["--preset", "smoke", "--width", "2", "--substeps", "1", "--noise", "no", "--out", str(out)]
    command = ["fit", str(file), "--preserve", "mass", "--weights", "5,2.5", *settings]
    assert main([*command, "--dry-run"]) == 0
    assert f"declares    {said}\n" in capsys.readouterr().out
    assert main(command) == 0
    assert json.loads((out / "metrics.json").read_text())["properties"] == [said]
    assert [row["property"] for row in json.loads((out / "verification.json").read_text())] == [said]
    page = (out / "report.html").read_text()
    assert said in page
    assert "Weights in the derivation are those that were given over a power of two: the sum is the same." in page
    assert load_fit(out).structure.weights == (1.25, 0.625)
    assert main(command) == 0
    assert "already" in capsys.readouterr().err


def test_errors_are_drawn_alike_in_every_unit() -> None:
    from dynablocks.fitting import figures
    from dynablocks.fitting.rollout import Rollout

    t, drawn = torch.arange(4, dtype=torch.float64), []
    for unit in (1.0, 2.0**-80):
        rollouts = [Rollout(t, unit * t[:, None], unit * (t + 1e-3 * k)[:, None]) for k in range(4)]
        (axes,) = figures.error_figure(rollouts).axes
        drawn.append([(line.get_ydata() / unit).tolist() for line in axes.lines])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] == [1e-17 * 3.0] * 3
    (axes,) = figures.error_figure([Rollout(t, 0 * t[:, None], 0 * t[:, None])]).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1e-17] * 3]
