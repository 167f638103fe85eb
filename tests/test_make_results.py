"""The scripts in docs/: tables that are none are refused, pages are whole or untouched, runs are told apart."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from scripts import load

make_results = load("docs/make_results.py")
TABLE = dict.fromkeys(("title", "caption", "command", *make_results.ORIGIN), "x") | {
    "columns": ["network", "clean"],
    "rows": [["ours", 71.25]],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one table and a README."""
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results" / "one.json").write_text(json.dumps(TABLE))
    (tmp_path / "README.md").write_text(f"before\n{make_results.START}\n{make_results.END}\nafter\n")
    return tmp_path


def test_pages_are_written_once_and_then_fresh(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--root", str(root)]
    assert make_results.main([*given, "--check"]) == 1
    assert make_results.main([*given, "--readme"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote docs/results.md", "wrote README.md"]
    assert make_results.main([*given, "--check"]) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n")
    assert "| ours | 71.25 |" in readme
    assert readme.endswith("\nafter\n")


def test_a_table_that_the_readme_does_not_want_is_on_the_page_alone(root: Path) -> None:
    other = TABLE | {"rows": [["theirs", 60.5]], "readme": False}
    (root / "results" / "two.json").write_text(json.dumps(other))
    assert make_results.main(["--root", str(root), "--readme"]) == 0
    readme, page = (root / "README.md").read_text(), (root / "docs" / "results.md").read_text()
    assert "| ours | 71.25 |" in readme
    assert "theirs" not in readme
    assert "| ours | 71.25 |" in page
    assert "| theirs | 60.5 |" in page


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"title": None}, "title is None; text is needed"),
        ({"caption": ["a"]}, "caption is .* text is needed"),
        ({"command": 5}, "command is 5; text is needed"),
        ({"note": {}}, "note is {}; text is needed"),
        ({"rows": [["ours"]]}, "row 1 does not have 2 cells"),
    ],
)
def test_a_table_that_is_none_gets_one_sentence(
    change: dict, sentence: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "results" / "one.json").write_text(json.dumps(TABLE | change))
    assert make_results.main(["--root", str(root)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(make_results.BadTable, match=sentence):
        make_results.read_tables(root / "results")


def test_a_root_without_tables_keeps_its_pages(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "results" / "one.json").unlink()
    before = (root / "README.md").read_text()
    assert make_results.main(["--root", str(root), "--readme"]) == 2
    assert "holds no table" in capsys.readouterr().err
    assert (root / "README.md").read_text() == before
    assert not (root / "docs" / "results.md").exists()


def test_a_full_disk_leaves_the_readme_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (root / "README.md").read_text()
    monkeypatch.setattr(os, "fsync", full)
    assert make_results.main(["--root", str(root), "--readme"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (root / "README.md").read_text() == before


def test_a_misspelt_flag_leaves_the_tables_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables = load("docs/make_tables.py")
    monkeypatch.setattr(make_tables, "DOCS", tmp_path)
    page, stale = tmp_path / "page.md", "<!-- table: regions -->\nold\n<!-- table: end -->\n"
    page.write_text(stale)
    for arguments, code in ((["--chek"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            make_tables.main(arguments)
        assert stopped.value.code == code
    assert make_tables.main(["--check"]) == 1
    assert page.read_text() == stale
    assert make_tables.main([]) == 0
    assert "| name |" in page.read_text()
    assert make_tables.main(["--check"]) == 0


METRICS = {
    "model": "certified",
    "preset": "cpu",
    "clean_accuracy": 0.625,
    "robust_accuracy": [{"epsilon": 0.5, "accuracy": 0.25}],
    "certified_accuracy": [{"epsilon": 36 / 255, "accuracy": 0.5}],
    "auc": 0.5,
    "lipschitz_bound": 1.0,
    "train_seconds": 90.0,
    "epochs": 2.0,
    "parameters": 1000,
    "dataset": "digits",
    "test_images": 359,
    "attacked_images": 64,
    "seed": 0,
}
UNATTACKED = {"robust_accuracy": None, "auc": None, "attacked_images": None}


def collected(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: dict[str, object]) -> tuple[int, dict]:
    """What becomes of runs with these figures: the exit code, and the table that is there then."""
    collect_runs = load("docs/collect_runs.py")
    monkeypatch.setattr(collect_runs, "ROOT", folder)
    monkeypatch.setattr(collect_runs, "commit", lambda: pytest.fail("git was asked"))
    runs = [folder / f"run{number}" for number in range(len(changes))]
    for run, change in zip(runs, changes, strict=True):
        (run / "checkpoint").mkdir(parents=True, exist_ok=True)
        (run / "checkpoint" / "config.yaml").write_text("model: {config: {lift: paper}}")
        (run / "metrics.json").write_text(json.dumps(METRICS | change))
    origin = ["--command", "dynablocks run", "--hardware", "two cores", "--commit", "abc"]
    code = collect_runs.main(["one", "Title", *map(str, runs), *origin])
    path = folder / "results" / "one.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_a_table_of_runs_lists_what_they_differ_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ({}, {"seed": 1, "preset": "smoke", "attacked_images": 32})
    code, table = collected(tmp_path, monkeypatch, *changes)
    assert code == 0
    assert (table["seed"], table["preset"], table["data"], table["commit"]) == ("0, 1", "cpu, smoke", "digits", "abc")
    tested = "Clean and certified: all 359 test images."
    attacked = "Attacked: the worst of the losses of ℓ2-PGD on the first 64 or 32."
    assert table["caption"] == f"{tested} {attacked} Seeds 0, 1."
    assert collected(tmp_path, monkeypatch, {})[1]["caption"].endswith("on the first 64. One seed.")
    make_results.Table.read(tmp_path / "results" / "one.json")


def test_a_run_without_an_attack_has_cells_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncertified_run = {"certified_accuracy": None, "lipschitz_bound": None, "test_images": None}
    code, table = collected(tmp_path, monkeypatch, UNATTACKED, uncertified_run)
    assert code == 0
    without, uncertified = (dict(zip(table["columns"], cells, strict=True)) for cells in table["rows"])
    assert (without["clean %"], without["certified @36/255 %"], without["body bound"]) == ("62.50", "50.00", "1.000000")
    assert {without["AUC"], without["attacked @0.5 %"]} == {"not measured"}
    assert {uncertified["body bound"], uncertified["clean %"]} == {"not measured"}
    assert (uncertified["AUC"], uncertified["attacked @0.5 %"]) == ("0.500", "25.00")
    assert collected(tmp_path, monkeypatch, UNATTACKED)[1]["caption"].endswith("359 test images. One seed.")


@pytest.mark.parametrize("change", [{"dataset": "cifar10"}, {"test_images": 100}, {"fingerprint": "f" * 64}])
def test_runs_on_other_images_get_no_common_table(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"fingerprint": "e" * 64}
    assert collected(tmp_path, monkeypatch, own, own | change) == (2, {})
    assert f"error: the runs differ in {next(iter(change))}: " in capsys.readouterr().err


def test_runs_of_which_one_does_not_say_of_which_images_it_is_have_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, table = collected(tmp_path, monkeypatch, {"fingerprint": "e" * 64}, {})
    assert code == 0
    assert len(table["rows"]) == 2


def test_what_is_certified_is_rounded_down_and_a_bound_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"epsilon": 36 / 255, "accuracy": 0.99996}, {"epsilon": 1.0, "accuracy": 0.7}]
    change = {"certified_accuracy": points, "lipschitz_bound": 34.5649, "robust_accuracy": points}
    code, table = collected(tmp_path, monkeypatch, change)
    assert code == 0
    found = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert (found["certified @36/255 %"], found["certified @1 %"]) == ("99.99", "70.00")
    assert (found["attacked @36/255 %"], found["body bound"]) == ("100.00", "34.57")


def test_what_was_written_into_a_table_of_runs_by_hand_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, table = collected(tmp_path, monkeypatch, {})
    assert "readme" not in table
    kept = {"readme": False, "note": "Tests ran beside it."}
    (tmp_path / "results" / "one.json").write_text(json.dumps(table | kept | {"seed": 7}))
    assert collected(tmp_path, monkeypatch, {}) == (0, table | kept)
