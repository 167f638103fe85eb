"""``docs/make_results.py``: tables that are none are refused, and pages are written whole or not at all."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    """The script as a module."""
    file = Path(__file__).parents[1] / "docs" / "make_results.py"
    specification = importlib.util.spec_from_file_location("make_results", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["make_results"] = module
    specification.loader.exec_module(module)
    return module


make_results = load()
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
