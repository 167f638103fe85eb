"""What long work says of itself: bars on a terminal, lines elsewhere, on a clock that is moved by hand."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from dynablocks import progress
from dynablocks.progress import is_terminal, output_console, progress_bar, track


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The hand of the clock: ``now``, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def file_console(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=False, width=20)


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(hand: SimpleNamespace) -> None:
    stream = io.StringIO()
    with progress_bar("certifying [a]", file_console(stream)) as update:
        for second in range(301):
            hand.now = float(second)
            update(second / 300)
    assert stream.getvalue().splitlines() == [
        "certifying [a]: 20 %, about 4:00 left",
        "certifying [a]: 40 %, about 3:00 left",
        "certifying [a]: 60 %, about 2:00 left",
        "certifying [a]: 80 %, about 1:00 left",
    ]


def test_a_terminal_that_draws_nothing_gets_lines_too(hand: SimpleNamespace) -> None:
    stream = io.StringIO()
    dumb = Console(file=stream, force_terminal=True, width=40, _environ={"TERM": "dumb"})
    with progress_bar("attacking", dumb) as update:
        update(0.0)
        hand.now = 90.0
        update(0.5)
    assert stream.getvalue() == "attacking: 50 %, about 1:30 left\n"


def test_the_time_left_of_work_that_goes_on_is_that_of_the_present_speed(hand: SimpleNamespace) -> None:
    stream = io.StringIO()
    with progress_bar("attacking", file_console(stream)) as update:
        update(0.5)
        hand.now = 60.0
        update(0.6)
    assert stream.getvalue() == "attacking: 60 %, about 4:00 left\n"


def test_no_time_left_is_invented_where_no_speed_is_known(hand: SimpleNamespace) -> None:
    stream = io.StringIO()
    with progress_bar("attacking", file_console(stream)) as update:
        hand.now = 70.0
        update(0.25)
        update(0.5)
    assert stream.getvalue() == "attacking: 25 %\n"


def test_a_bar_that_seldom_moves_shows_the_time_left(hand: SimpleNamespace) -> None:
    bar = progress._bar(Console(file=io.StringIO(), force_terminal=True))
    bar.get_time = lambda: hand.now
    task = bar.add_task("slow", total=1.0)
    for moves in range(1, 4):
        hand.now = 600.0 * moves
        bar.update(task, completed=0.1 * moves)
    assert bar.tasks[0].time_remaining == pytest.approx(4200, abs=1)


def test_a_terminal_gets_a_bar() -> None:
    stream = io.StringIO()
    with progress_bar("counting", Console(file=stream, force_terminal=True, _environ={"TERM": "xterm"})) as update:
        update(0.5)
    assert "counting" in stream.getvalue()
    assert "50 %" in stream.getvalue()


def test_results_that_are_piped_do_not_go_to_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, piped = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", piped)
        with progress_bar("writing", Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"})) as update:
            update(0.5)
            print("t,q")
    assert piped.getvalue() == "t,q\n"
    assert "t,q" not in terminal.getvalue()


def test_items_come_one_by_one_and_are_told_of_once_they_take_long(
    hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, seen = io.StringIO(), []
    monkeypatch.setattr(progress, "error_console", lambda: file_console(stream))
    for item in track(range(300), "reading", 300):
        seen.append(item)
        hand.now += 1.0
    assert seen == list(range(300))
    # The bar begins after two seconds, and the first line comes a minute later.
    assert [line.partition("about ")[2] for line in stream.getvalue().splitlines()] == [
        "3:58 left",
        "2:58 left",
        "1:58 left",
        "0:58 left",
    ]
    assert list(track([], "reading", 0)) == []


def test_what_is_quick_is_not_told(hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "error_console", lambda: pytest.fail("a bar was made"))
    for _ in track(range(19), "reading", 19):
        hand.now += 0.1


def test_a_closed_or_missing_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    assert not is_terminal(closed)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        console = output_console(70)
        console.print("to nobody")
        assert console.width == 70
