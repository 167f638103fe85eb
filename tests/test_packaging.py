"""What is packed and what is pinned, and scripts that ask for a package which an extra brings."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts import load

from dynablocks.errors import DynablocksError

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ADDED = {"pyproject.toml", ".gitignore"}
"""What hatchling packs unasked."""


def test_the_source_archive_has_all_of_the_repository() -> None:
    """Tests, pages and benchmarks read files of each other's folders."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("needs git")
    names = {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    if "pyproject.toml" not in names:
        pytest.skip("needs the repository")
    included = {entry.removeprefix("/") for entry in SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert included == names - ADDED


def names_of(requirements: list[str]) -> set[str]:
    """The packages of requirements or pins, written in one way."""
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in requirements}


def test_pinned_is_what_is_installed_and_not_what_builds_it() -> None:
    """pip takes pins for what it installs alone: a build has an environment of its own."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names_of([line for line in lines if not line.startswith("#")])
    project = SETTINGS["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert names_of(wanted) - pinned == set()
    assert len(pinned) > 60
    assert not pinned & (names_of(SETTINGS["build-system"]["requires"]) | {"editables", "tomlkit", "trove-classifiers"})


def test_benchmarks_tell_of_a_missing_package_before_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    parity, peers = load("benchmarks/attack_parity.py"), load("benchmarks/pendulum_peers.py")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for module, name in ((parity, "trained_on_digits"), (parity, "attack"), (peers, "ours"), (peers, "peer")):
        monkeypatch.setattr(module, name, lambda *given: pytest.fail("computed"))
    for package in ("foolbox", "strupnet"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DynablocksError, match=r"foolbox is not installed; .*-e '\.\[test\]'$"):
        parity.main()
    with pytest.raises(SystemExit) as stopped:
        peers.main()
    assert stopped.value.code == "error: strupnet is not installed; install it with: pip install strupnet==0.0.4"
