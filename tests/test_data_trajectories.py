"""Trajectories and pairs: shapes and splits, round trips through every format, a sentence for every bad file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.data.trajectory_files import read_dynamics, read_starts, read_trajectories
from dynablocks.errors import BadData, InvalidArgument

GOOD = "trajectory,t,q,p\na,0,1,2\na,0.5,3,4\nb,0,5,6\nb,1,7,8\nb,3,9,10\n"


def _random(lengths: tuple[int, ...] = (4, 2, 7), n: int = 2, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    times = tuple(torch.rand(k, dtype=torch.float64, generator=generator).add(0.01).cumsum(0) for k in lengths)
    states = tuple(torch.randn(k, n, dtype=torch.float64, generator=generator) for k in lengths)
    return Trajectories(times, states, tuple(f"s{k}" for k in range(n)))


def _assert_equal(a: Trajectories, b: Trajectories) -> None:
    assert a.names == b.names
    assert len(a) == len(b)
    for x, y in zip(a.times + a.states, b.times + b.states, strict=True):
        assert x.dtype == torch.float64
        assert torch.equal(x, y)


def _rows(data: Trajectories) -> dict[str, list[Any]]:
    labels = [k for k, times in enumerate(data.times) for _ in times]
    columns = {name: torch.cat(data.states)[:, k].tolist() for k, name in enumerate(data.names)}
    return {"trajectory": labels, "t": torch.cat(data.times).tolist(), **columns}


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pairs_are_the_states_stride_apart(stride: int) -> None:
    data = _random()
    x, y, h = data.pairs(stride)
    expected = [
        (states[k], states[k + stride], times[k + stride] - times[k])
        for times, states in zip(data.times, data.states, strict=True)
        for k in range(len(times) - stride)
    ]
    for got, wanted in zip((x, y, h), zip(*expected, strict=True), strict=True):
        assert torch.equal(got, torch.stack(wanted))
    assert bool((h > 0).all())


def test_a_split_keeps_trajectories_whole_and_loses_none() -> None:
    data = _random((2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    train, test = data.split(0.2, seed=1)
    assert (len(train), len(test)) == (8, 2)
    assert sorted(len(t) for t in train.times + test.times) == list(range(2, 12))
    _assert_equal(train, data.split(0.2, seed=1)[0])
    assert any(len(data.split(0.2, seed=s)[1].times[0]) != len(test.times[0]) for s in range(2, 8))
    for fraction, held in ((1e-9, 1), (0.999, 9)):
        assert len(data.split(fraction)[1]) == held


def test_a_single_trajectory_is_split_in_time() -> None:
    data = _random((10,))
    train, test = data.split(0.3)
    assert torch.equal(torch.cat([train.times[0], test.times[0]]), data.times[0])
    assert torch.equal(torch.cat([train.states[0], test.states[0]]), data.states[0])
    assert len(test.times[0]) == 3
    assert len(_random((4,)).split(0.001)[1].times[0]) == 2


def test_csv_parquet_and_npz_round_trips_are_exact(tmp_path: Path) -> None:
    data = _random()
    data.write_csv(tmp_path / "a.csv")
    _assert_equal(read_trajectories(tmp_path / "a.csv"), data)
    parquet.write_table(pa.table(_rows(data)), tmp_path / "a.parquet")
    _assert_equal(read_trajectories(str(tmp_path / "a.parquet")), data)
    states = np.random.default_rng(0).standard_normal((3, 5, 2))
    np.savez(tmp_path / "a.npz", t=np.arange(5), x=states)
    read = read_trajectories(tmp_path / "a.npz")
    assert (len(read), read.dimension, read.names) == (3, 2, ("x1", "x2"))
    assert np.array_equal(torch.stack(read.states).numpy(), states)
    np.savez_compressed(tmp_path / "a.npz", t=np.arange(5.0), x=states[0].astype(np.float32))
    assert np.array_equal(read_trajectories(tmp_path / "a.npz").states[0].numpy(), states[0].astype(np.float32))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        GOOD.replace(",", " , "),
        GOOD.replace("\n", "\n\n"),
        GOOD.rstrip("\n"),
        "t,q,p,trajectory\n0,1,2,a\n0,5,6,b\n0.5,3,4,a\n1,7,8,b\n3,9,1e1,b\n",
        '"trajectory","t","q","p"\n' + GOOD.split("\n", 1)[1],
        '"trajectory", "t", "q", "p"\n' + GOOD.split("\n", 1)[1],
        GOOD.replace("t,q,p", 't, "q", "p"').replace("a,0,1,2", 'a, "0",  "1", 2'),
    ],
    ids=[
        "plain",
        "crlf",
        "bom",
        "spaces",
        "blank lines",
        "no last newline",
        "mixed rows",
        "quotes",
        "quotes after spaces",
        "some quotes after spaces",
    ],
)
def test_harmless_variations_of_a_csv_read_alike(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    data = read_trajectories(tmp_path / "a.csv")
    assert data.names == ("q", "p")
    assert [t.tolist() for t in data.times] == [[0, 0.5], [0, 1, 3]]
    assert [s.tolist() for s in data.states] == [[[1, 2], [3, 4]], [[5, 6], [7, 8], [9, 10]]]


def test_a_file_without_the_trajectory_column_is_one_trajectory(tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text("t,q\n0,0.1\n1,0.2\n")
    data = read_trajectories(tmp_path / "A.CSV")
    assert len(data) == 1
    assert data.states[0].tolist() == [[0.1], [0.2]]


def test_labels_are_kept_by_reading_splitting_and_writing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    data = read_trajectories(tmp_path / "a.csv")
    assert data.labels == ("a", "b")
    assert data.to_csv().split("\n")[1] == "a,0.0,1.0,2.0"
    data.write_csv(tmp_path / "b.csv")
    assert read_trajectories(tmp_path / "b.csv").labels == ("a", "b")
    columns = {"trajectory": [7, 7, 3, 3], "t": [0, 1, 0, 1], "q": [1, 2, 3, 4]}
    parquet.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert read_trajectories(tmp_path / "c.parquet").labels == ("7", "3")
    (tmp_path / "d.csv").write_text("t,q\n0,0.1\n1,0.2\n")
    assert read_trajectories(tmp_path / "d.csv").labels == ()


def test_the_parts_of_a_csv_do_not_change_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _random()
    rows = [",".join(map(str, row)) for row in zip(*_rows(data).values(), strict=True)]
    for most in (65536, 2):
        monkeypatch.setattr("dynablocks.data.trajectories.CSV_ROWS", most)
        assert data.to_csv().splitlines() == ["trajectory,t,s0,s1", *rows]


def test_a_split_calls_the_trajectories_as_before() -> None:
    lengths = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    for data in (_random(lengths), replace(_random(lengths), labels=tuple("abcdefghij"))):
        train, test = data.split(0.2, seed=1)
        assert {*train.labels, *test.labels} == {data.label(k) for k in range(10)}
        for part in (train, test):
            for k, times in enumerate(part.times):
                assert len(times) == lengths[[data.label(i) for i in range(10)].index(part.label(k))]
    first, last = replace(_random((10,)), labels=("only",)).split(0.3)
    assert first.labels == last.labels == ("only",)
    assert _random((10,)).split(0.3)[1].label(0) == "0"


def test_short_trajectories_are_drawn_for_the_test_only_where_others_are_too_few() -> None:
    data, few = _random((2, 9, 9, 3, 9, 9, 9)), _random((2, 9, 3, 2))
    for seed in range(16):
        train, test = data.split(0.2, seed, shortest=7)
        assert [len(times) for times in test.times] == [9]
        assert sorted(map(len, train.times)) == [2, 3, 9, 9, 9, 9]
        for other, shortest in ((data, 2), (few, 7)):
            for part, wanted in zip(other.split(0.2, seed, shortest=shortest), other.split(0.2, seed), strict=True):
                _assert_equal(part, wanted)
                assert part.labels == wanted.labels


def test_trajectories_are_taken_by_their_numbers() -> None:
    data = _random()
    for labels, wanted in (((), ("2", "0")), (("a", "b", "c"), ("c", "a"))):
        taken = replace(data, labels=labels).take([2, 0])
        assert taken.labels == wanted
        _assert_equal(taken, Trajectories(data.times[2::-2], data.states[2::-2], data.names))


def test_columns_that_only_look_like_an_index_or_labels_are_states(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Unnamed: 0,t,TRAJECTORY,q\n7,0,5,1\n8,1,6,2\n")
    chosen = read_dynamics(tmp_path / "a.csv", ["Unnamed: 0", "TRAJECTORY"])
    assert isinstance(chosen, Trajectories)
    assert chosen.states[0].tolist() == [[7, 5], [8, 6]]
    data = replace(_random(), names=("Trajectory", "Unnamed: a"))
    data.write_csv(tmp_path / "b.csv")
    _assert_equal(read_trajectories(tmp_path / "b.csv"), data)


def test_pairs_are_read_from_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("out_p,in_q,in_p,out_q,h\n4,1,2,3,0.5\n8,5,6,7,0.25\n")
    columns = {"in_q": [1, 5], "in_p": [2, 6], "out_q": [3.0, 7.0], "out_p": [4, 8], "h": [0.5, 0.25]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        pairs = read_dynamics(tmp_path / name)
        assert isinstance(pairs, Pairs)
        assert (len(pairs), pairs.dimension, pairs.names) == (2, 2, ("q", "p"))
        assert pairs.x.tolist() == [[1, 2], [5, 6]]
        assert pairs.y.tolist() == [[3, 4], [7, 8]]
        assert pairs.h.tolist() == [0.5, 0.25]
    (tmp_path / "a.csv").write_text("in_q,out_q\n4,1\n8,5\n")
    pairs = read_dynamics(tmp_path / "a.csv")
    assert isinstance(pairs, Pairs)
    assert pairs.h.tolist() == [1.0, 1.0]


WIDE = {"note": ["a", "b"], "p": [2.0, 4.0], "gap": [np.nan, 1.0], "t": [0.0, 0.5], "q": [1.0, 3.0]}


def test_chosen_columns_are_read_in_their_order_and_others_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("note,p,gap,t,q\na,2,,0,1\nb,4,x,0.5,3\n")
    parquet.write_table(pa.table(WIDE), tmp_path / "a.parquet")
    x = np.stack([[1.0, 3.0], [np.nan, 9.0], [2.0, 4.0]], axis=1)
    np.savez(tmp_path / "a.npz", t=[0.0, 0.5], x=x)
    np.savez(tmp_path / "many.npz", t=[0.0, 0.5], x=np.stack([x, 2 * x]))
    for name, columns in (("a.csv", ("q", "p")), ("a.parquet", ("q", "p")), ("a.npz", ("x1", "x3"))):
        data = read_dynamics(tmp_path / name, columns)
        assert isinstance(data, Trajectories)
        assert data.names == columns
        assert data.states[0].tolist() == [[1, 2], [3, 4]]
        assert data.times[0].tolist() == [0, 0.5]
        _refused(tmp_path / name, {"a.npz": "x[0, 1] is nan"}.get(name, "column 'note' is"))
    many = read_dynamics(tmp_path / "many.npz", ["x3"])
    assert isinstance(many, Trajectories)
    assert [states.tolist() for states in many.states] == [[[2], [4]], [[4], [8]]]
    rows = "4,x,1,run,2,3,0.5\n8,y,5,run,6,7,0.25\n"
    (tmp_path / "pairs.csv").write_text("out_p,note,in_q,trajectory,in_p,out_q,h\n" + rows)
    pairs = read_dynamics(tmp_path / "pairs.csv", ["p"])
    assert isinstance(pairs, Pairs)
    assert (pairs.names, pairs.x.tolist(), pairs.y.tolist()) == (("p",), [[2], [6]], [[4], [8]])
    assert pairs.h.tolist() == [0.5, 0.25]
    assert read_dynamics(tmp_path / "pairs.csv", ["q", "p"]).names == ("q", "p")
    (tmp_path / "pairs.csv").write_text("trajectory,in_q,out_q\n,4,5\nrun,6,7\n")
    assert read_dynamics(tmp_path / "pairs.csv", ["q"]).names == ("q",)


def test_names_that_are_not_read_may_be_missing_or_stand_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",t,gap,q,gap,p\n0,0,,1,,2\n1,0.5,,3,,4\n")
    columns = [[0.0, 0.5], [None, 1.0], [1.0, 3.0], [None, 2.0], [2.0, 4.0]]
    parquet.write_table(pa.table(columns, names=["t", "gap", "q", "gap", "p"]), tmp_path / "a.parquet")
    unknown = re.escape("unknown column 'gp'; did you mean 'gap'? Known: gap, p, q.")
    for name in ("a.csv", "a.parquet"):
        data = read_dynamics(tmp_path / name, ["q", "p"])
        assert isinstance(data, Trajectories)
        assert data.states[0].tolist() == [[1, 2], [3, 4]]
        assert read_starts(tmp_path / name, ("p", "q")).states.tolist() == [[2, 1], [4, 3]]
        with pytest.raises(InvalidArgument, match=unknown):
            read_dynamics(tmp_path / name, ["gp"])
        with pytest.raises(BadData, match="the column name 'gap' stands twice"):
            read_dynamics(tmp_path / name, ["q", "gap"])


def test_of_a_wide_parquet_only_the_columns_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(pa.table({"trajectory": ["a", "b"], **WIDE}), tmp_path / "a.parquet")
    whole, asked = parquet.ParquetFile.read, []

    def read(self: Any, columns: Any = None, **settings: Any) -> Any:
        asked.append(columns)
        return whole(self, columns=columns, **settings)

    monkeypatch.setattr(parquet.ParquetFile, "read", read)
    read_starts(tmp_path / "a.parquet", ("q",))
    with contextlib.suppress(BadData):
        read_dynamics(tmp_path / "a.parquet", ["p"])
    assert [set(columns) for columns in asked] == [{"q", "trajectory", "t"}, {"trajectory", "t", "p"}]


def test_a_log_with_columns_called_as_those_of_pairs_is_one_of_trajectories_once_states_are_chosen(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.csv").write_text("t,in_temp,out_temp,q,p\n0,7,8,1,2\n1,9,10,3,4\n")
    for columns, states in ((["q", "p"], [[1, 2], [3, 4]]), (["out_temp", "in_temp"], [[8, 7], [10, 9]])):
        data = read_dynamics(tmp_path / "a.csv", columns)
        assert isinstance(data, Trajectories)
        assert (data.names, data.states[0].tolist()) == (tuple(columns), states)
    with pytest.raises(InvalidArgument, match=re.escape("unknown column 'pp'; did you mean 'p'?")):
        read_dynamics(tmp_path / "a.csv", ["q", "pp"])
    for chosen in (None, ["temp"]):
        with pytest.raises(BadData, match="has the column 't' of a trajectory"):
            read_dynamics(tmp_path / "a.csv", chosen)


def test_a_column_of_text_is_no_obstacle_once_the_states_are_chosen(tmp_path: Path) -> None:
    """As the error that it is in the way advises."""
    pairs = {"in_q": [1.0, 3.0], "out_q": [2.0, 4.0], "note": ["warm", "cold"]}
    for name, rows in (("log", {key: WIDE[key] for key in ("t", "note", "q")}), ("pairs", pairs)):
        lines = [",".join(rows), *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
        parquet.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
        for suffix in (".csv", ".parquet"):
            file = tmp_path / f"{name}{suffix}"
            _refused(file, "or choose the state columns with --columns.")
            found = read_dynamics(file, ["q"])
            states = found.x if isinstance(found, Pairs) else found.states[0]
            assert states.tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([], "columns is empty"),
        (["q", "q"], "columns has 'q' twice"),
        (["q", "pp"], "unknown column 'pp'; did you mean 'p'? Known: p, q."),
        (["trajectory"], "unknown column 'trajectory'. Known: p, q."),
    ],
)
def test_columns_that_cannot_be_chosen_get_a_sentence(tmp_path: Path, columns: list[str], words: str) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        read_dynamics(tmp_path / "a.csv", columns)


def test_starts_are_the_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("p,note,q\n2,x,1\n4,,3\n")
    starts = read_starts(tmp_path / "a.csv", ("q", "p"))
    assert starts.states.tolist() == [[1, 2], [3, 4]]
    assert starts.times.tolist() == [0, 0]
    assert [starts.label(k) for k in range(2)] == ["0", "1"]
    columns = {"trajectory": ["left", "right"], **WIDE}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    starts = read_starts(tmp_path / "a.parquet", ("q", "p"))
    assert starts.states.tolist() == [[1, 2], [3, 4]]
    assert starts.times.tolist() == [0, 0.5]
    assert [starts.label(k) for k in range(2)] == ["left", "right"]
    (tmp_path / "a.csv").write_text("q,p\n1,2\n")
    assert len(read_starts(tmp_path / "a.csv", ("q", "p")).states) == 1


START_FAULTS = {
    "empty": ("", "is empty; a header line and at least one row are needed"),
    "no rows": ("q,p\n", "has a header but no rows; at least one row is needed"),
    "missing": ("q,momentum\n1,2\n", "has the header 'q,momentum', without the column 'p'; the columns q,p are needed"),
    "no header": ("1,2\n3,4\n", "has no header: line 1 is '1,2'; the header must be q,p and optionally trajectory"),
    "text": (
        "q,p\n1,warm\n",
        "line 2, column 'p' is the text 'warm'; a finite number is needed; correct it or remove the line.",
    ),
    "text time": ("t,q,p\nnoon,1,2\n", "times are numbers, such as seconds since the start: convert them."),
    "nan": ("q,p\n1,nan\n", "line 2, column 'p' is nan"),
    "nan time": ("t,q,p\ninf,1,2\n", "line 2, column 't' is inf"),
    "repeated": ("trajectory,q,p\na,1,2\nb,1,2\na,3,4\n", "line 4, column 'trajectory': 'a' stands in line 2 already"),
    "no label": ("trajectory,q,p\n,1,2\n", "line 2, column 'trajectory' is empty"),
}


@pytest.mark.parametrize(("text", "words"), START_FAULTS.values(), ids=START_FAULTS)
def test_bad_starts_get_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.csv").write_text(text)
    _refused(tmp_path / "data.csv", words, lambda path: read_starts(path, ("q", "p")))


def test_starts_without_names_are_refused(tmp_path: Path) -> None:
    for name in ("a.npz", "a.npy"):
        _refused(tmp_path / name, "has no column names; a CSV", lambda path: read_starts(path, ("q", "p")))
    (tmp_path / "a.txt").write_text("q,p\n1,2\n")
    words = "has the suffix '.txt'; allowed are .csv, .parquet; convert it"
    _refused(tmp_path / "a.txt", words, lambda path: read_starts(path, ("q", "p")))
    with pytest.raises(InvalidArgument, match="names has 't', which is no state column"):
        read_starts(tmp_path / "a.csv", ("q", "t"))


CSV_FAULTS = {
    "empty": ("", "is empty; a header line"),
    "blank": ("\n  \n", "has only blank lines"),
    "header only": ("t,q\n", "has a header but no rows"),
    "one row": ("t,q\n0,1\n", "has one row; at least 2"),
    "no header": ("0,1,2\n1,2,3\n", "has no header: line 1 is '0,1,2'; the header must be trajectory,t,<state"),
    "wrong header": ("time,q\n0,1\n1,2\n", "has the header 'time,q', without the column 't'; the header must be"),
    "semicolons": ("t;q\n0;1\n1;2\n", "line 1: 't;q' is not separated by commas"),
    "no states": ("trajectory,t\n0,0\n0,1\n", "has no state columns; the header must be trajectory,t"),
    "twice": ("t,q,q\n0,1,2\n1,2,3\n", "the column name 'q' stands twice"),
    "index": (",t,q\n0,0,1\n1,1,2\n", "column 1 has no name and numbers the rows: it was written by pandas"),
    "saved index": (
        "Unnamed: 0,t,q\n0,0,1\n1,1,2\n",
        "the column 'Unnamed: 0' had no name when pandas read it, as the index of a saved table; use "
        "to_csv(index=False), or choose the state columns with --columns.",
    ),
    "saved index twice": ("Unnamed: 0.1,t,q\n0,0,1\n1,1,2\n", "the column 'Unnamed: 0.1' had no name when pandas read"),
    "labels in capitals": (
        "Trajectory,t,q\n0,0,1\n0,1,2\n",
        "has the column 'Trajectory'; call it 'trajectory' if it says of which trajectory a row is, or choose the "
        "state columns with --columns.",
    ),
    "no name": (",t,q\n0,0,1\n2,1,2\n", "column 1 has no name in the header ',t,q'; name or remove it"),
    "no last name": ("t,q,\n0,1,0\n1,2,1\n", "column 3 has no name in the header 't,q,'; name or remove it"),
    "short row": ("t,q,p\n0,1,2\n\n1,2\n", "line 4 has 2 cells; the header has 3 columns"),
    "long row": ("t,q\n0,1\n1,2,3\n", "line 3 has 3 cells; the header has 2 columns"),
    "nan": ("t,q\n0,1\n1,nan\n", "line 3, column 'q' is nan"),
    "infinity": ("t,q\n0,1\n-inf,2\n", "line 3, column 't' is -inf"),
    "overflow": ("t,q\n0,1e999\n1,2\n", "line 2, column 'q' is inf"),
    "text": ("t,q\n0,1\n1,warm\n", "line 3, column 'q' is the text 'warm'"),
    "empty cell": ("t,q\n0,1\n1, \n", "line 3, column 'q' is empty"),
    "underscore": ("t,q\n0,1_0\n1,2\n", "line 2, column 'q' is the text '1_0'"),
    "unit": ("t,q\n0,1\n1 s,2\n", "line 3, column 't' is the text '1 s'"),
    "note": (
        "t,note,q\n0,warm,1\n1,cold,2\n",
        "column 'note' is the text 'warm'; a finite number is needed; correct it or remove the line, or choose the "
        "state columns with --columns.",
    ),
    "sparse note": ("t,q,note\n0,1,\n1,2,cold\n", "line, or choose the state columns with --columns."),
    "date": (
        "t,q\n2024-01-01,1\n2024-01-02,2\n",
        "column 't' is the text '2024-01-01'; a finite number is needed; times are numbers, such as seconds since the "
        "start: convert them.",
    ),
    "empty time": (
        "t,q\n0,1\n ,2\n",
        "line 3, column 't' is empty; a finite number is needed; correct it or remove the line.",
    ),
    "no label": ("trajectory,t,q\na,0,1\n,1,2\n", "line 3, column 'trajectory' is empty"),
    "lone row": ("trajectory,t,q\na,0,1\na,1,1\nb,1,2\n", "line 4: the trajectory 'b' has this row only"),
    "unsorted": (
        "trajectory,t,q\na,0,1\na,2,1\na,1,2\n",
        "line 4, column 't': the time 1.0 comes before 2.0 of line 3 in the trajectory 'a'; times must increase; sort "
        "the rows by time.",
    ),
    "repeated": (
        "t,q\n0,1\n0,2\n",
        "line 3, column 't': the time 0.0 repeats 0.0 of line 2; times must increase; keep one of the two rows, or "
        "write times with more digits; if a new trajectory begins here, add a column 'trajectory'.",
    ),
    "unclosed quote": ('t,q\n0,1\n1,"2\n', "line 3: no CSV"),
    "pairs unmatched": ("in_q,in_p,out_q\n0,1,1\n1,2,2\n", "has the column 'in_p' but not 'out_p'"),
    "pairs only out": ("out_q\n0\n1\n", "has the column 'out_q' but not 'in_q'"),
    "pairs extra": ("in_q,out_q,note\n0,1,1\n1,2,2\n", "has the column 'note'; a file of pairs has in_<name>"),
    "pairs trajectory": ("trajectory,in_q,out_q\n0,1,1\n1,2,2\n", "has the column 'trajectory'"),
    "pairs or trajectory": ("t,in_q,out_q\n0,1,1\n1,2,2\n", "remove 't' if the rows are pairs"),
    "pairs time": ("in_q,in_t,out_q,out_t\n0,1,1,2\n1,2,2,3\n", "has a state called 't' (in_t, out_t)"),
    "pairs label": ("in_trajectory,out_trajectory\n0,1\n1,2\n", "has a state called 'trajectory' (in_trajectory,"),
    "pairs step": ("in_q,out_q,h\n0,1,1\n1,2,0\n", "line 3, column 'h' is 0.0; a time step above 0"),
    "pairs one row": ("in_q,out_q\n0,1\n", "has one row"),
    "pairs text": ("in_q,out_q\n0,1\n1,x\n", "line 3, column 'out_q' is the text 'x'"),
    "pairs note": (
        "in_q,out_q,note\n0,1,warm\n1,2,\n",
        "line 2, column 'note' is the text 'warm'; a finite number is needed; correct it or remove the line, or choose "
        "the state columns with --columns.",
    ),
    "pairs step text": (
        "in_q,out_q,h\n0,1,1 s\n1,2,1\n",
        "line 2, column 'h' is the text '1 s'; a finite number is needed; correct it or remove the line.",
    ),
}


def _refused(path: Path, words: str, read: Callable[[Path], object] = read_dynamics) -> None:
    with pytest.raises(BadData, match=re.escape(words)) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith((".", ")"))
    assert "\n" not in message


@pytest.mark.parametrize(("text", "words"), CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_a_bad_csv_gets_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.csv").write_text(text)
    _refused(tmp_path / "data.csv", words)


BYTE_FAULTS = {
    "latin-1": ("a.csv", "t,q\n0,1\n1,\xe9\n".encode("latin-1"), "line 3 is not UTF-8"),
    "utf-16": ("a.csv", GOOD.encode("utf-16"), "line 1 is not UTF-8"),
    "nul": ("a.csv", b"t,q\n0,1\n1,\x00\n", "line 3"),
    "long cell": ("a.csv", b"t,q\n0," + b"1" * 200_000 + b"\n1,2\n", "line 2: no CSV"),
    "no npz": ("a.npz", b"t,q\n0,1\n", "is truncated or no npz file"),
    "empty npz": ("a.npz", b"", "is empty"),
    "no parquet": ("a.parquet", b"t,q\n0,1\n", "is truncated or no parquet file"),
    "xlsx": ("a.xlsx", b"PK", "has the suffix '.xlsx'; allowed are .csv, .parquet, .npz"),
    "npy": ("a.npy", b"\x93NUMPY", "has states but no times; save both"),
    "pickle": ("a.pkl", b"\x80\x04.", "has the suffix '.pkl'"),
    "none": ("a", b"t", "has the suffix ''"),
}


@pytest.mark.parametrize(("name", "content", "words"), BYTE_FAULTS.values(), ids=BYTE_FAULTS)
def test_bad_bytes_get_a_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, words)


PARQUET_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "header": ({"time": [0.0, 1.0]}, "has the header 'time'"),
    "text": ({"t": [0.0, 1.0], "q": ["1", "2"]}, "the column 'q' is string; integers"),
    "note": (
        {"t": [0.0, 1.0], "q": [1.0, 2.0], "note": ["warm", "cold"]},
        "the column 'note' is string; integers or floating point are needed; convert it, or choose the state columns "
        "with --columns.",
    ),
    "date": (
        {"t": np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[ms]"), "q": [1.0, 2.0]},
        "the column 't' is timestamp[ms]; integers or floating point are needed; times are numbers, such as seconds "
        "since the start: convert them.",
    ),
    "pairs note": ({"in_q": [0, 2], "out_q": [1, 2], "note": ["a", "b"]}, "choose the state columns with --columns."),
    "pairs step text": (
        {"in_q": [0, 2], "out_q": [1, 2], "h": ["1 s", "2 s"]},
        "the column 'h' is string; integers or floating point are needed; convert it.",
    ),
    "flags": ({"t": [0.0, 1.0], "q": [True, False]}, "the column 'q' is bool"),
    "nested": ({"t": [0.0, 1.0], "q": [[1.0], [2.0]]}, "the column 'q' is list"),
    "null": ({"t": [0.0, 1.0, 2.0], "q": [1.0, None, 2.0]}, "row 2, column 'q' is nan (or empty)"),
    "null integer": ({"t": [0, 1, None], "q": [1, 2, 3]}, "row 3, column 't' is nan"),
    "infinite": ({"t": [0.0, 1.0], "q": [1.0, np.inf]}, "row 2, column 'q' is inf"),
    "label": ({"trajectory": [0, 0, None], "t": [0, 1, 2], "q": [1, 2, 3]}, "row 3, column 'trajectory' is empty"),
    "one row": ({"t": [0.0], "q": [1.0]}, "has one row"),
    "no rows": ({"t": pa.array([], pa.float64()), "q": pa.array([], pa.float64())}, "has a header but no rows"),
    "no states": ({"t": [0.0, 1.0]}, "has no state columns"),
    "unsorted": ({"t": [0, 2, 1], "q": [1, 2, 3]}, "row 3, column 't': the time 1.0 comes before 2.0 of row 2"),
    "lone": ({"trajectory": ["a", "b", "a"], "t": [0, 2, 1], "q": [1, 2, 3]}, "row 2: the trajectory 'b'"),
    "labels": ({"TRAJECTORY": [0, 0], "t": [0.0, 1.0], "q": [1.0, 2.0]}, "has the column 'TRAJECTORY'; call it"),
    "index": ({"t": [0, 2], "q": [1, 2], "__index_level_0__": [5, 6]}, "the pandas index '__index_level_0__'"),
    "pairs": ({"in_q": [0, 2], "out_p": [1, 2]}, "has the column 'out_p' but not 'in_p'"),
}


@pytest.mark.parametrize(("columns", "words"), PARQUET_FAULTS.values(), ids=PARQUET_FAULTS)
def test_a_bad_parquet_gets_a_sentence(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    _refused(tmp_path / "a.parquet", words)


def test_a_parquet_with_a_name_twice_or_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table([[0, 1], [1, 2], [3, 4]], names=["t", "q", "q"]), file)
    _refused(file, "the column name 'q' stands twice")
    parquet.write_table(pa.table({"t": [0.0, 1.0], "q": [1.0, 2.0]}), file)
    content = bytearray(file.read_bytes())
    file.write_bytes(content[:-20])
    _refused(file, "is truncated or no parquet file")
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    _refused(file, "is truncated or no parquet file")


def test_a_parquet_with_damaged_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {"trajectory": ["abcd", "abcd"], "t": [0.0, 1.0], "q": [1.0, 2.0]}
    parquet.write_table(pa.table(columns), file, compression="none", use_dictionary=False, write_statistics=False)
    file.write_bytes(file.read_bytes().replace(b"abcd", b"ab\xff\xfe"))
    _refused(file, "is truncated or no parquet file")


T5 = np.arange(5.0)
NPZ_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no t": ({"x": T5[:, None]}, "has the arrays x, without 't'"),
    "no x": ({"t": T5, "y": T5}, "has the arrays t, y, without 'x'"),
    "nothing": ({}, "has the arrays none"),
    "shapes": ({"t": T5, "x": np.ones((4, 2))}, "has t of shape (5,) and x of shape (4, 2)"),
    "flat": ({"t": T5, "x": T5}, "x of shape (5,)"),
    "no states": ({"t": T5, "x": np.ones((5, 0))}, "x of shape (5, 0)"),
    "one": ({"t": T5[:1], "x": np.ones((1, 2))}, "has one sample a trajectory"),
    "nan": (
        {"t": T5, "x": np.where(np.eye(5)[:, :2] > 0, np.nan, 1.0)},
        "x[0, 0] is nan; finite numbers are needed; leave that sample out.",
    ),
    "unsorted": ({"t": T5[::-1], "x": np.ones((5, 2))}, "t[1] = 3.0 does not come after t[0] = 4.0"),
    "repeated": (
        {"t": T5 * 0, "x": np.ones((5, 2))},
        "t[1] = 0.0 does not come after t[0] = 0.0; times must increase; keep one of the two samples, or save times "
        "with more digits, unless a new trajectory begins",
    ),
    "complex": ({"t": T5, "x": np.ones((5, 2)) * 1j}, "the array 'x' is of type complex128"),
    "text": ({"t": T5, "x": np.full((5, 2), "a")}, "the array 'x' is of type <U1"),
    "objects": ({"t": T5, "x": np.full((5, 2), None)}, "the array 'x' holds Python objects"),
}


@pytest.mark.parametrize(("arrays", "words"), NPZ_FAULTS.values(), ids=NPZ_FAULTS)
def test_a_bad_npz_gets_a_sentence(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    _refused(tmp_path / "a.npz", words)


TWO = np.ones((2, 5, 2))
WRITER = "dynablocks.data.Trajectories(times, states, names).write_csv"
SEVERAL_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "without an axis": ({"t": np.stack([T5, T5]), "x": TWO.reshape(10, 2)}, "t of shape (2, 5) and x of shape (10, 2)"),
    "one after another": (
        {"t": np.tile(T5, 2), "x": TWO.reshape(10, 2)},
        "t[5] = 0.0 does not come after t[4] = 4.0; times must increase; sort the samples by time, unless a new "
        "trajectory begins",
    ),
    "padded by 0": (
        {"t": [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]], "x": TWO},
        "t[1, 3] = 0.0 does not come after t[1, 2] = 2.0",
    ),
    "padded by nan": (
        {"t": T5, "x": np.where(np.arange(20).reshape(2, 5, 2) < 16, 1.0, np.nan)},
        "x[1, 3, 0] is nan; finite numbers are needed; leave that sample out of all trajectories, unless a shorter",
    ),
    "times padded by nan": ({"t": [[0, 1, 2, 3, 4], [0, 1, 2, np.nan, np.nan]], "x": TWO}, "t[1, 3] is nan"),
    "of two lengths": (
        {"t": T5, "x": np.array([np.ones((5, 2)), np.ones((4, 2))], dtype=object)},
        "the array 'x' holds Python objects or is damaged; save plain numbers",
    ),
}


@pytest.mark.parametrize(("arrays", "words"), SEVERAL_FAULTS.values(), ids=SEVERAL_FAULTS)
def test_an_npz_of_several_trajectories_that_cannot_be_read_is_told_how_to_save_them(
    tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    _refused(tmp_path / "a.npz", words)
    for cure in ("x (K, T, n) with t (T,) or (K, T), and those of different", f"a column 'trajectory' ({WRITER})."):
        _refused(tmp_path / "a.npz", cure)


def test_trajectories_of_an_npz_may_have_times_of_their_own(tmp_path: Path) -> None:
    data, file = _random((5, 5, 5)), tmp_path / "a.npz"
    t, x = torch.stack(data.times).numpy(), torch.stack(data.states).numpy()
    np.savez(file, t=t, x=x)
    _assert_equal(read_trajectories(file), replace(data, names=("x1", "x2")))
    chosen = read_dynamics(file, ["x2"])
    assert isinstance(chosen, Trajectories)
    assert np.array_equal(torch.stack(chosen.times).numpy(), t)
    assert np.array_equal(torch.stack(chosen.states).numpy(), x[..., 1:])
    np.savez(file, t=t[:1], x=x[:1])
    _assert_equal(read_trajectories(file), Trajectories(data.times[:1], data.states[:1], ("x1", "x2")))
    np.savez(file, t=t[0], x=x)
    _assert_equal(read_trajectories(file), Trajectories(data.times[:1] * 3, data.states, ("x1", "x2")))


def _with_times(file: Path, t: Any) -> Trajectories:
    if file.suffix == ".npz":
        np.savez(file, t=t, x=np.ones((len(t), 1)))
    else:
        parquet.write_table(pa.table({"t": t, "q": np.ones(len(t))}), file)
    return read_trajectories(file)


@pytest.mark.parametrize("name", ["a.npz", "a.parquet"])
def test_times_that_were_rounded_where_they_were_stored_are_known(tmp_path: Path, name: str) -> None:
    tenths, whole, file = np.arange(40) * 0.1, np.arange(40), tmp_path / name
    assert _with_times(file, tenths.astype(np.float32)).times_stored_as == torch.float32
    assert np.array_equal(_with_times(file, tenths.astype(np.float32)).times[0].numpy(), tenths.astype(np.float32))
    for exact in (tenths, whole, whole.astype(np.float32), (whole / 4).astype(np.float32), whole[20:].astype(np.int32)):
        data = _with_times(file, exact)
        assert data.times_stored_as == torch.float64
        assert np.array_equal(data.times[0].numpy(), exact)
    alike = "times must increase, and as float32 some may be rounded alike: save them as float64 where they are made"
    with pytest.raises(BadData, match=alike):
        _with_times(file, (1.7e9 + tenths).astype(np.float32))


def test_times_of_an_npz_may_be_of_half_precision_or_in_another_order_of_bytes(tmp_path: Path) -> None:
    tenths = np.arange(40) * 0.1
    assert _with_times(tmp_path / "a.npz", tenths.astype(np.float16)).times_stored_as == torch.float16
    for order in "<>":
        data = _with_times(tmp_path / "a.npz", tenths.astype(f"{order}f4"))
        assert data.times_stored_as == torch.float32
        assert np.array_equal(data.times[0].numpy(), tenths.astype(np.float32))


@pytest.mark.parametrize("lengths", [(4, 2, 7), (10,)])
def test_parts_keep_how_their_times_were_stored(lengths: tuple[int, ...]) -> None:
    data = replace(_random(lengths), times_stored_as=torch.float32)
    usual = float(data.pairs()[2].median())
    for part in (*data.split(0.4), data.without_gaps(usual), *(half.without_gaps(9.0) for half in data.split(0.4))):
        assert part is not None
        assert part.times_stored_as == torch.float32


def test_a_damaged_npz_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, t=T5, x=np.random.default_rng(0).standard_normal((5, 3)))
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        broken = bytearray(content)
        broken[place] ^= 0xFF
        file.write_bytes(broken)
        with contextlib.suppress(BadData):
            assert read_trajectories(file).dimension == 3
    file.write_bytes(content[:-30])
    _refused(file, "is truncated or no npz file")


@pytest.mark.parametrize("header", ["{1: 2, 'a': 3}", "{[]: 1}", "{'descr': (), 'fortran_order': False, 'shape': ()}"])
def test_a_header_that_numpy_stumbles_over_is_refused(header: str, tmp_path: Path) -> None:
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in ("t", "x"):
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    _refused(tmp_path / "a.npz", "a.npz")


def test_an_object_array_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").touch, ())

    np.savez(tmp_path / "a.npz", t=T5, x=np.array([Trap()] * 5, dtype=object))
    _refused(tmp_path / "a.npz", "holds Python objects")
    assert not tmp_path.joinpath("sprung").exists()


def test_missing_files_and_folders_get_a_sentence(tmp_path: Path) -> None:
    _refused(tmp_path / "gone.csv", "does not exist; check the path")
    (tmp_path / "folder.csv").mkdir()
    _refused(tmp_path / "folder.csv", "is a folder; name one file in it")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    _refused(tmp_path / "a.csv", "is a pipe or a device; write what it gives into a file (.csv, .parquet, .npz)")
    words = "is a pipe or a device; write what it gives into a file (.csv, .parquet)"
    _refused(tmp_path / "a.csv", words, lambda path: read_starts(path, ("q", "p")))


def test_the_other_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("in_q,out_q\n0,1\n1,2\n")
    _refused(tmp_path / "b.csv", "holds input/output pairs", read_trajectories)


T = torch.arange(3, dtype=torch.float64)
X = T[:, None]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Trajectories((), (), ("q",)), "0 rows of times"),
        (lambda: Trajectories((T, T), (X,), ("q",)), "2 rows of times and 1 of states"),
        (lambda: Trajectories((T,), (X,), ("q", "p")), r"\(T, 2\)"),
        (lambda: Trajectories((T,), (X.expand(-1, 2),), ("q", "q")), "different name"),
        (lambda: Trajectories((T[:1],), (X[:1],), ("q",)), "at least 2"),
        (lambda: Trajectories((T.flip(0),), (X,), ("q",)), "times of trajectory 0 do not increase"),
        (lambda: Trajectories((T,), (X / 0,), ("q",)), "trajectory 0 has a number that is not finite"),
        (lambda: Trajectories((T,), (X.float(),), ("q",)), "float64 tensors are needed"),
        (lambda: Trajectories((T.numpy(),), (X.numpy(),), ("q",)), "trajectory 0 is ndarray and ndarray; float64 tens"),
        (lambda: replace(_random(), times_stored_as=torch.int64), "times_stored_as is torch.int64"),
        (lambda: Trajectories((T,), (X,), ("q",), ("a", "b")), "there are 2 labels, 2 of them different, of 1 traj"),
        (lambda: Trajectories((T, T), (X, X), ("q",), ("a", "a")), "there are 2 labels, 1 of them different"),
        (lambda: Pairs(X, X, T + 1, ("q", "q")), "different name"),
        (lambda: Pairs(X, X, T + 1, ()), "different name"),
        (lambda: Pairs(X.float(), X, T + 1, ("q",)), "x, y and h are torch.float32, torch.float64 and torch.float"),
        (lambda: Pairs(X.numpy(), X.numpy(), 1.0, ("q",)), "x, y and h are ndarray, ndarray and float; float64"),
        (lambda: Pairs(X, X, T + 1, ("q", "p")), r"shapes \(3, 1\), \(3, 1\) and \(3,\); \(N, 2\), \(N, 2\)"),
        (lambda: Pairs(X[:2], X, T + 1, ("q",)), r"shapes \(2, 1\), \(3, 1\) and \(3,\)"),
        (lambda: Pairs(X, X, T[:2] + 1, ("q",)), r"shapes \(3, 1\), \(3, 1\) and \(2,\)"),
        (lambda: Pairs(X[:1], X[:1], T[1], ("q",)), r"shapes \(1, 1\), \(1, 1\) and \(\)"),
        (lambda: Pairs(T, T, T + 1, ("q",)), r"shapes \(3,\), \(3,\) and \(3,\)"),
        (lambda: Pairs(X[:0], X[:0], T[:0], ("q",)), "N at least 1"),
        (lambda: Pairs(X, X / 0, T + 1, ("q",)), "x, y or h has a number that is not finite"),
        (lambda: Pairs(X, X, T / 0, ("q",)), "x, y or h has a number that is not finite"),
        (lambda: Pairs(X, X, T, ("q",)), "h has 0.0; times above 0 are needed"),
        (lambda: Pairs(X, X, T - 1, ("q",)), "h has -1.0; times above 0 are needed"),
        (lambda: _random().pairs(0), "stride is 0"),
        (lambda: _random().pairs(7), "stride is 7; the longest trajectory allows at most 6"),
        (lambda: _random().split(0.0), "fraction is 0.0"),
        (lambda: _random().split(1.0), "fraction is 1"),
        (lambda: _random((3,)).split(0.5), "has 3 states; 4 are needed"),
    ],
)
def test_bad_arguments_get_a_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        call()


def test_reading_a_long_csv_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []

    def recorded(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        told.append((label, total))
        return iter(items)

    monkeypatch.setattr("dynablocks.data.trajectory_files.track", recorded)
    (tmp_path / "log.csv").write_text(GOOD)
    _assert_equal(read_trajectories(tmp_path / "log.csv"), read_trajectories(tmp_path / "log.csv"))
    assert told[:2] == [("reading log.csv", GOOD.count("\n") + 1), ("parsing log.csv", 5)]


def test_a_damaged_header_in_an_npz_is_refused(tmp_path: Path) -> None:
    """Its bracket is never closed, at which numpy's second look gives up by an error of its tokenizer."""
    buffer = io.BytesIO()
    np.save(buffer, T5)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in ("t.npy", "x.npy"):
            file.writestr(name, buffer.getvalue().replace(b"}", b" "))
    _refused(tmp_path / "a.npz", "the array 't' holds Python objects or is damaged")


@pytest.mark.parametrize("content", [b"", b"no array"])
def test_a_member_of_an_npz_that_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    """As an interrupted copy leaves one; numpy gives its bytes."""
    buffer = io.BytesIO()
    np.save(buffer, T5)
    for broken, whole in (("t", "x"), ("x", "t")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr(f"{broken}.npy", content)
            file.writestr(f"{whole}.npy", buffer.getvalue())
        _refused(tmp_path / "a.npz", f"{broken!r} is no NumPy array; save t and x with numpy.savez.")


def test_labels_that_are_no_values_of_python_are_refused(tmp_path: Path) -> None:
    far = pa.array([2**61, 2**61], pa.timestamp("us"))  # 73,000 years from now
    parquet.write_table(pa.table({"trajectory": far, "t": [0.0, 1.0], "q": [1.0, 2.0]}), tmp_path / "a.parquet")
    _refused(tmp_path / "a.parquet", "has a value that cannot be read (")


@pytest.mark.skipif(importlib.util.find_spec("pandas") is not None, reason="pandas has times of nanoseconds")
def test_labels_of_nanoseconds_are_refused(tmp_path: Path) -> None:
    fine = pa.array([1, 1], pa.timestamp("ns"))
    parquet.write_table(pa.table({"trajectory": fine, "t": [0.0, 1.0], "q": [1.0, 2.0]}), tmp_path / "a.parquet")
    _refused(tmp_path / "a.parquet", "write the labels of trajectories as text.")


def test_states_called_as_columns_of_pairs_come_back(tmp_path: Path) -> None:
    data = replace(_random(), names=("in_flow", "out_flow"))
    data.write_csv(tmp_path / "a.csv")
    parquet.write_table(pa.table(_rows(data)), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        _assert_equal(read_trajectories(tmp_path / name), data)
        chosen = read_dynamics(tmp_path / name, data.names)
        assert isinstance(chosen, Trajectories)
        _assert_equal(chosen, data)
        _refused(tmp_path / name, "of a trajectory rename the states, or choose them by --columns as they are called.")


def test_a_csv_is_written_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    data = _random()
    data.write_csv("~/a.csv")
    _assert_equal(read_trajectories(tmp_path / "a.csv"), data)
    _assert_equal(read_trajectories("~/a.csv"), data)
