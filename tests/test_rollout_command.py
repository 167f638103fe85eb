"""``dynablocks rollout``: a linear fit against powers of its matrix, what is written, every way to use it wrongly."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynablocks.cli import main
from dynablocks.data.trajectory_files import read_trajectories
from dynablocks.fitting import FlowMap, Structure, build, save_fit

F64 = torch.float64
ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)


def linear_fit(folder: Path, rate: Tensor, step: float = 0.25) -> Path:
    """A fit that has learned ẋ = Lx, with four terms of the exponential series in a step (rk4)."""
    flow = build(Structure("none", ("q", "p"), width=2, step=step))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        flow.field.rate.linear.copy_(rate)
    save_fit(folder, flow)
    return folder


def runs_of(rate: Tensor, start: list[float], step: float, steps: int) -> Tensor:
    """What that fit does: powers of Σ (hL)ʲ/j!, j <= 4, times the start."""
    small = step * rate
    one = sum((torch.linalg.matrix_power(small, j) / math.factorial(j) for j in range(5)), torch.zeros_like(rate))
    state = torch.tensor(start, dtype=F64)
    return torch.stack([torch.linalg.matrix_power(one, k) @ state for k in range(steps + 1)])


def saved(folder: Path, structure: Structure) -> FlowMap:
    """An untrained fit of any structure."""
    flow = build(structure)
    save_fit(folder, flow)
    return flow


@pytest.fixture
def fit(tmp_path: Path) -> Path:
    return linear_fit(tmp_path / "fit", ROTATION)


def test_one_state_is_rolled_out_to_standard_output(fit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", str(fit), "--start", "0.5,-1", "--steps", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    header, *rows = said.out.splitlines()
    assert header == "trajectory,t,q,p"
    found = torch.tensor([[float(cell) for cell in row.split(",")] for row in rows], dtype=F64)
    assert found[:, 0].tolist() == [0, 0, 0, 0]
    assert found[:, 1].tolist() == [0, 0.25, 0.5, 0.75]
    assert torch.allclose(found[:, 2:], runs_of(ROTATION, [0.5, -1.0], 0.25, 3), rtol=1e-14, atol=1e-14)
    assert main(["rollout", str(fit), "--start", "0.5,-1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 102


def test_a_negative_state_may_be_a_word_of_its_own(fit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", str(fit), "--start", "-0.5,1", "--steps", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "0,0.0,-0.5,1.0"


def test_starts_of_a_file_keep_their_names_and_times(
    fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "states.csv").write_text("p,note,trajectory,q,t\n0,warm,left,0.5,2\n-1,,right,0.25,3\n")
    out = tmp_path / "new" / "runs.csv"
    command = ["rollout", str(fit), "--start", str(tmp_path / "states.csv"), "--steps", "5", "--step", "0.5"]
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    data = read_trajectories(out)
    assert (data.labels, data.names) == (("left", "right"), ("q", "p"))
    for k, (start, begin) in enumerate((([0.5, 0.0], 2.0), ([0.25, -1.0], 3.0))):
        assert data.times[k].tolist() == [begin + 0.5 * i for i in range(6)]
        assert torch.allclose(data.states[k], runs_of(ROTATION, start, 0.5, 5), rtol=1e-14, atol=1e-14)


def test_a_fit_reads_what_was_rolled_out(fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "states.csv").write_text("q,p\n0.5,0\n0.25,-1\n1,1\n")
    out = tmp_path / "runs.csv"
    command = ["rollout", str(fit), "--start", str(tmp_path / "states.csv"), "--steps", "9", "--out", str(out)]
    assert main(command) == 0
    assert main(["fit", str(out), "--preserve", "symplectic", "--dry-run"]) == 0
    assert "columns     positions q; momenta p\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("structure", "start", "what", "most"),
    [
        (Structure("mass", ("S", "I", "R"), width=4, step=0.1), "0.9,0.1,0", "relative change of the mass", 1e-13),
        (Structure("norm", ("a", "b", "c"), width=4, step=0.1), "1,2,-1", "relative change of the norm", 1e-12),
        (Structure("positive", ("a", "b"), width=4, step=0.1), "1,0", "negative part of the smallest entry", 0.0),
    ],
)
def test_what_is_kept_is_told_on_standard_error(
    structure: Structure, start: str, what: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "fit", structure)
    assert main(["rollout", str(tmp_path / "fit"), "--start", start, "--steps", "20"]) == 0
    said = re.fullmatch(r"(.*): at most ([\d.e+-]+) in 20 steps of 0\.1\n", capsys.readouterr().err)
    assert said is not None
    assert said[1] == what
    assert float(said[2]) <= most


def test_the_change_of_a_learned_energy_is_that_along_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = saved(tmp_path / "fit", Structure("symplectic", ("q", "p"), width=4, step=0.5, linear=True))
    assert main(["rollout", str(tmp_path / "fit"), "--start", "0.5,0.25", "--steps", "9"]) == 0
    what = "change of the learned energy over its spread along these runs"
    said = re.fullmatch(what + r": at most (\S+) in 9 steps of 0\.5\n", err(capsys))
    assert said is not None
    start = torch.tensor([[0.5, 0.25]], dtype=F64)
    with torch.no_grad():
        states = flow.rollout(start, torch.full((1, 9), 0.5, dtype=F64))[0]
        energy, middle = flow.energy(states), flow.energy(states.mean(0, keepdim=True))
    wanted = float((energy - energy[0]).abs().max() / (energy - middle).square().mean().sqrt())
    assert float(said[1]) == pytest.approx(wanted, rel=0.06)


def err(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_run_that_leaves_the_numbers_says_when_and_how_far_it_may_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = linear_fit(tmp_path / "fit", 1000 * torch.eye(2, dtype=F64), step=0.1)
    (tmp_path / "states.csv").write_text("trajectory,t,q,p\ncalm,0,0,0\nwild,7,1,1\n")
    command = ["rollout", str(fit), "--start", str(tmp_path / "states.csv"), "--out", str(tmp_path / "runs.csv")]
    assert main(command) == 2
    said = err(capsys)
    found = re.search(r"the run from the start 'wild' ends at t = ([\d.]+), after (\d+) of 100 steps: the states", said)
    assert found is not None
    reached = int(found[2])
    # A step multiplies by Σ 100ʲ/j!, j <= 4, and its last stage is 59 times the state after it.
    factor = sum(100.0**j / math.factorial(j) for j in range(5))
    assert math.log(1.79e308) / math.log(factor) - 2 < reached <= math.log(1.8e308) / math.log(factor)
    assert float(found[1]) == pytest.approx(7 + 0.1 * reached, rel=1e-5)
    assert f"give --steps {reached}, another --start or a smaller --step." in said
    assert not (tmp_path / "runs.csv").exists()
    assert main([*command, "--steps", str(reached + 1)]) == 2
    assert main([*command, "--steps", str(reached)]) == 0


def test_a_run_whose_step_has_no_solution_is_told(
    fit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.errors import NotConverged

    stepped = FlowMap.forward

    def forward(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        if bool((x[:, 1] < -0.3).any()):
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", forward)
    # From (1, 0) the second entry is −sin t.
    assert main(["rollout", str(fit), "--start", "1,0", "--steps", "9"]) == 2
    said = capsys.readouterr()
    assert "ends at t = 0.5, after 2 of 9 steps: the step is not solved for 1 sample; take a smaller" in said.err
    assert "step; give --steps 2, another" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "no fit was given; use: dynablocks rollout DIR"),
        (["{fit}"], "--start is missing; give a number for each state column (q, p)"),
        (["{folder}/absent", "--start", "1,2"], "holds no finished fit (no config.yaml)"),
        (["{folder}/states.csv", "--start", "1,2"], "holds no finished fit (no config.yaml)"),
        (["{folder}/run", "--start", "1,2"], "holds something else than a fit"),
        (["{folder}/begun", "--start", "1,2"], "holds no finished fit (no model.safetensors)"),
        (["{folder}/damaged", "--start", "1,2"], "holds a damaged fit"),
        (["{fit}", "--start", "1"], "of length 1; the fit has 2 state columns (q, p)"),
        (["{fit}", "--start", "1,2,3"], "of length 3; the fit has 2 state columns (q, p)"),
        (["{fit}", "--start", "1,nan"], "every number must be finite"),
        (["{fit}", "--start", "1,x"], "neither numbers separated by commas"),
        (["{fit}", "--start", "{folder}/absent.csv"], "does not exist"),
        (["{fit}", "--start", "{folder}"], "is a folder"),
        (["{fit}", "--start", "{folder}/states.txt"], "has the suffix '.txt'"),
        (["{fit}", "--start", "{folder}/other.csv"], "without the column 'p'"),
        (["{fit}", "--start", "{folder}/states.csv"], "column 'p' is nan"),
        (["{positive}", "--start", "1,-0.5"], "the start '0' has b = -0.5; this fit is of states >= 0"),
        (["{fit}", "--start", "1,2", "--steps", "0"], "--steps is 0; a whole number from 1"),
        (["{fit}", "--start", "1,2", "--steps", "-3"], "--steps is -3; a whole number from 1"),
        (["{fit}", "--start", "1,2", "--steps", "2.5"], "a whole number is needed"),
        (["{fit}", "--start", "1,2", "--steps", "9" * 30], "give --steps 16666665 or less, or fewer starts."),
        (["{fit}", "--start", "1,2", "--step", "0"], "allowed are values in (0, inf)"),
        (["{fit}", "--start", "1,2", "--step", "-0.1"], "--step is -0.1; allowed"),
        (["{fit}", "--start", "1,2", "--step", "1e307"], "give times that are no numbers"),
        (["{fit}", "--start", "{folder}/late.csv"], "rounding; give another --step, or leave out the column t."),
        (["{fit}", "--start", "1,2", "--step", "1e308", "--steps", "1"], "each step taken as 50,000,000 of about"),
        (["{fit}", "--start", "1,2", "--out", "{folder}/there.csv"], "is there already; choose another name"),
        (["{fit}", "--start", "1,2", "--out", "{folder}"], "is a folder; name a file in it"),
        (["{fit}", "--start", "1,2", "--out", "{folder}/a.parquet"], "ends in .csv"),
        (["{fit}", "--start", "1,2", "--out", "{folder}/there.csv/a.csv"], "cannot write to "),
        (["{fit}", "--start", "1,2", "--overwrite"], "--overwrite replaces the file of --out, which is missing"),
        (["{fit}", "--start", "{folder}/gone.npz"], "has no column names; a CSV or Parquet file"),
        (["{timed}", "--start", "1,2"], "has the state column 't', which a CSV of trajectories has already"),
    ],
)
def test_a_bad_use_gets_one_sentence(
    options: list[str], sentence: str, fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positive, timed = tmp_path / "positive", tmp_path / "timed"
    saved(positive, Structure("positive", ("a", "b"), width=2))
    saved(timed, Structure("none", ("q", "t"), width=2))
    for name in ("begun", "damaged", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_bytes((fit / "config.yaml").read_bytes())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "run" / "config.yaml").write_text("model:\n  name: certified\n")
    for name, text in {
        "states.csv": "q,p\n1,nan\n",
        "states.txt": "q,p\n1,2\n",
        "other.csv": "q,v\n1,2\n",
        "late.csv": "t,q,p\n1e300,1,2\n",
        "there.csv": "mine\n",
    }.items():
        (tmp_path / name).write_text(text)
    places = {"fit": fit, "folder": tmp_path, "positive": positive, "timed": timed}
    assert main(["rollout", *(option.format(**places) for option in options)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.err.startswith("dynablocks: error: ")
    assert said.out == ""
    assert (tmp_path / "there.csv").read_text() == "mine\n"


def test_what_is_in_the_way_is_known_before_the_computation_and_replaced_on_request(
    fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs.csv"
    out.write_text("mine\n")
    command = ["rollout", str(fit), "--start", "1,2", "--steps", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("dynablocks.fitting.rollout_command.load_fit", lambda place: pytest.fail("the fit was read"))
        assert main(command) == 2
    assert out.read_text() == "mine\n"
    assert main([*command, "--overwrite"]) == 0
    assert read_trajectories(out).states[0].shape == (3, 2)


def test_the_help_says_where_the_trajectories_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("standard output", "--start states.csv", "trajectory,t,<state columns>", "load_fit", "default: 100"):
        assert said in text
    assert main(["--help"]) == 0
    assert "\n  rollout   " in capsys.readouterr().out


def test_a_file_says_how_many_starts_it_has(fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doubt = ", one a row; if the rows are one measured trajectory, give the row to start from alone"
    for text, said in (
        ("q,p\n1,2\n", "1 start"),
        ("q,p\n1,2\n3,4\n", "2 starts"),
        ("t,q,p\n5,1,2\n0,3,4\n", "2 starts"),
        ("trajectory,t,q,p\na,0,1,2\nb,1,3,4\n", "2 starts"),
        ("t,q,p\n0,1,2\n1,3,4\n", "2 starts" + doubt),
    ):
        (tmp_path / "a.csv").write_text(text)
        assert main(["rollout", str(fit), "--start", str(tmp_path / "a.csv"), "--steps", "1"]) == 0
        assert err(capsys) == f"a.csv: {said}\n"


def test_more_numbers_than_memory_takes_are_refused_before_the_computation(
    fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("q,p\n1,2\n3,4\n")
    command = ["rollout", str(fit), "--start", str(tmp_path / "a.csv"), "--steps"]
    monkeypatch.setattr("dynablocks.fitting.rollout_command.MOST_NUMBERS", 30)
    assert main([*command, "4"]) == 0  # 2 starts, 5 times each, with t, q and p
    monkeypatch.setattr(FlowMap, "forward", lambda *inputs: pytest.fail("a step was computed"))
    capsys.readouterr()
    assert main([*command, "5"]) == 2
    said = err(capsys)
    assert "--steps 5 from 2 starts would be 36 numbers; at most 30 are computed at once" in said
    assert "give --steps 4 or less, or fewer starts." in said
    monkeypatch.setattr("dynablocks.fitting.rollout_command.MOST_NUMBERS", 5)
    assert main([*command, "1"]) == 2
    assert "computed at once: give fewer starts." in err(capsys)


def test_the_start_whose_run_ends_is_found_by_halves(
    fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.errors import NotConverged

    stepped, batches = FlowMap.forward, []

    def forward(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        batches.append(len(x))
        if bool((x[:, 0] > 1).any()):
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", forward)
    (tmp_path / "a.csv").write_text("q,p\n" + "".join(f"{2 if k in (37, 51) else 0},0\n" for k in range(64)))
    assert main(["rollout", str(fit), "--start", str(tmp_path / "a.csv"), "--steps", "3"]) == 2
    assert "the run from the start '37' ends at t = 0, after 0 of 3 steps: the step is not solved" in err(capsys)
    assert batches == [64, 32, 16, 8, 4, 2, 1, 1]


def test_the_usual_step_is_that_of_the_data_without_its_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = linear_fit(tmp_path / "fit", ROTATION, step=0.09999999999999964)
    assert main(["rollout", str(fit), "--start", "1,0", "--steps", "2"]) == 0
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["0.0", "0.1", "0.2"]
    found = torch.tensor([[float(cell) for cell in row[2:]] for row in rows], dtype=F64)
    assert torch.allclose(found, runs_of(ROTATION, [1.0, 0.0], 0.1, 2), rtol=1e-14, atol=1e-14)


def test_an_energy_that_is_no_number_is_not_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "fit", Structure("symplectic", ("q", "p"), width=2, step=0.5))
    monkeypatch.setattr(FlowMap, "energy", lambda self, x: torch.full((len(x),), math.inf, dtype=F64))
    assert main(["rollout", str(tmp_path / "fit"), "--start", "0.5,0", "--steps", "1"]) == 0
    assert err(capsys) == (
        "change of the learned energy over its spread along these runs cannot be measured: it leaves the range of "
        "numbers in 1 step of 0.5\n"
    )


def test_what_is_piped_is_utf_8_whatever_the_encoding_of_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "fit", Structure("none", ("θ", "p"), width=2))
    piped = io.BytesIO()
    output = io.TextIOWrapper(piped, encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert main(["rollout", str(tmp_path / "fit"), "--start", "1,2", "--steps", "1"]) == 0
    assert piped.getvalue().decode("utf-8").splitlines()[0] == "trajectory,t,θ,p"
    assert (output.encoding, output.errors) == ("latin-1", "strict")


@pytest.mark.parametrize("piped", [False, True])
def test_writing_a_long_csv_shows_how_far_it_is(
    piped: bool, fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []

    def recorded(items: Iterable[str], label: str, total: int) -> list[str]:
        parts = list(items)
        told.append((label, len(parts), total))
        return parts

    for place in ("data.trajectories", "fitting.rollout_command"):
        monkeypatch.setattr(f"dynablocks.{place}.CSV_ROWS", 2)
    monkeypatch.setattr("dynablocks.fitting.rollout_command.track", recorded)
    (tmp_path / "states.csv").write_text("q,p\n1,2\n3,4\n")
    out = [] if piped else ["--out", str(tmp_path / "runs.csv")]
    assert main(["rollout", str(fit), "--start", str(tmp_path / "states.csv"), "--steps", "4", *out]) == 0
    # A header, and of each run two, two and one row.
    assert told[-1] == ("writing", 7, 7)
    text = capsys.readouterr().out if piped else (tmp_path / "runs.csv").read_text()
    assert len(text.splitlines()) == 11


LEAVE = "leave the range of the training data (the first in column 'q', from t = "


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("0.5,0", ""),
        # q = cos t + sin t, which is 1.22 after a step, outside of [−1, 1] and a twentieth of 2 beyond.
        ("1,1", f"1 of 1 runs {LEAVE}0.25): nothing was learned there\n"),
        ("{file}", f"a.csv: 2 starts\n1 of 2 runs {LEAVE}7): nothing was learned there\n"),
    ],
)
def test_runs_that_leave_the_range_of_the_training_data_are_told(
    start: str, said: str, fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fit / "metrics.json").write_text('{"training_range": {"p": [-1.0, 1.0], "q": [-1.0, 1.0]}}')
    (tmp_path / "a.csv").write_text("trajectory,t,q,p\ninside,0,0.5,0\noutside,7,1.2,0\n")
    given = start.format(file=tmp_path / "a.csv")
    assert main(["rollout", str(fit), "--start", given, "--steps", "2"]) == 0
    assert err(capsys) == said


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no JSON", '{"training_range": {"q": [0, 0]}}', '{"training_range": {"q": null, "p": [0, 1]}}']
)
def test_a_fit_without_a_range_has_none_to_leave(text: str, fit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fit / "metrics.json").write_text(text)
    assert main(["rollout", str(fit), "--start", "5,0", "--steps", "1"]) == 0
    assert err(capsys) == ""


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("0.5,0.5", ""),
        ("2,0.5", f"1 of 1 runs {LEAVE}0): nothing was learned there\n"),
        ("0.5,0.6", f"1 of 1 runs {LEAVE.replace('q', 'p')}0): nothing was learned there\n"),
    ],
)
def test_a_column_of_one_value_may_move_by_a_share_of_the_size_of_the_data(
    start: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """q decays and p drifts by 1e-4 of it: far less than a twentieth of the size of the data, which is 1."""
    fit = linear_fit(tmp_path / "fit", torch.tensor([[-0.5, 0.0], [1e-4, 0.0]], dtype=F64))
    (fit / "metrics.json").write_text('{"training_range": {"q": [-1.0, 1.0], "p": [0.5, 0.5]}}')
    assert main(["rollout", str(fit), "--start", start, "--steps", "2"]) == 0
    assert err(capsys) == said


def test_a_step_far_longer_than_the_usual_one_is_taken_as_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rollout", str(linear_fit(tmp_path / "fit", ROTATION, step=0.1)), "--start", "1,0"]
    assert main([*command, "--step", "1", "--steps", "2"]) == 0
    long = capsys.readouterr()
    assert long.err == "a step of 1 is taken as 10 of about the usual 0.1\n"
    assert main([*command, "--step", "0.1", "--steps", "20"]) == 0
    usual = capsys.readouterr()
    header, *rows = usual.out.splitlines()
    assert usual.err == ""
    assert long.out.splitlines() == [header, *rows[::10]]
    # Up to five times the usual one it is one step, of other rounding and another error.
    assert main([*command, "--step", "0.5", "--steps", "1"]) == 0
    one = capsys.readouterr()
    found = torch.tensor([float(cell) for cell in one.out.splitlines()[-1].split(",")[2:]], dtype=F64)
    assert one.err == ""
    assert torch.allclose(found, runs_of(ROTATION, [1.0, 0.0], 0.5, 1)[1], rtol=1e-14, atol=1e-14)


def test_the_steps_within_a_long_one_take_room_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = linear_fit(tmp_path / "fit", 1000 * torch.eye(2, dtype=F64), step=0.1)
    command = ["rollout", str(fit), "--start", "1,1", "--step", "1"]
    assert main([*command, "--steps", "9"]) == 2
    # After 45 or 46 of the short steps, as where they are asked for.
    said = err(capsys)
    assert re.search(r"ends at t = 4\.[56], after 4 of 9 steps: the states left .*; give --steps 4, another", said)
    assert main([*command, "--steps", "4"]) == 0
    monkeypatch.setattr("dynablocks.fitting.rollout_command.MOST_NUMBERS", 30)
    capsys.readouterr()
    assert main([*command, "--steps", "2"]) == 2
    expected = (
        "--steps 2 from 1 start, each step taken as 10 of about the usual length, would be 63 numbers; at most 30"
    )
    assert expected in err(capsys)


def test_late_times_are_told_to_twelve_digits(fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fit / "metrics.json").write_text('{"training_range": {"q": [-1.0, 1.0], "p": [-1.0, 1.0]}}')
    (tmp_path / "a.csv").write_text("t,q,p\n1700000000,1,1\n")
    assert main(["rollout", str(fit), "--start", str(tmp_path / "a.csv"), "--steps", "2"]) == 0
    assert "from t = 1700000000.25): nothing was learned there" in err(capsys)


def test_states_called_as_columns_of_pairs_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "fit", Structure("none", ("in_flow", "out_flow"), width=2))
    out = tmp_path / "runs.csv"
    assert main(["rollout", str(tmp_path / "fit"), "--start", "1,2", "--steps", "9", "--out", str(out)]) == 0
    assert read_trajectories(out).names == ("in_flow", "out_flow")
    command = ["fit", str(out), "--preserve", "none", "--dry-run"]
    assert main(command) == 2
    assert "choose them by --columns as they are called" in err(capsys)
    assert main([*command, "--columns", "in_flow,out_flow"]) == 0
