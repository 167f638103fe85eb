"""What goes to standard error: bars on a terminal, lines elsewhere, on a clock that is moved by hand; errors."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dynablocks import progress
from dynablocks.cli import main
from dynablocks.data import ImageDataset, cache, cifar
from dynablocks.errors import DynablocksError
from dynablocks.progress import (
    error_console,
    is_terminal,
    output_console,
    print_line,
    printable,
    progress_bar,
    show,
    tell,
    track,
)
from dynablocks.training.display import Display


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


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("attacking 10000 images", "attacking 10000 images "),
        ("certify flexible, margin 0.15, cifar100, 1024 test image", "certify flexible, margin 0.15, cifar10… "),
    ],
)
def test_a_bar_tells_the_time_left_from_the_time_gone_in_80_columns(
    label: str, shown: str, hand: SimpleNamespace
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = progress._bar(console)
    bar.get_time = lambda: hand.now
    task = bar.add_task(label, total=1.0)
    for moves in range(1, 4):
        hand.now = 600.0 * moves
        bar.update(task, completed=0.1 * moves)
    with console.capture() as printed:
        console.print(bar.get_renderable())
    (line,) = re.sub(r"\x1b\[[0-9;]*m", "", printed.get()).splitlines()
    assert line.startswith(shown)
    assert line.rstrip().endswith("30 % 1:10:00 left, 0:30:00 gone")


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


def test_results_that_are_piped_do_not_go_to_the_bar_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, piped = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", piped)
        with Display(Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"})) as display:
            display.update(0.5, 90.0, {"loss": 1.0})
            print("t,q")
    assert "1:30 left" in terminal.getvalue()
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


class Refusing(io.StringIO):
    """A standard error whose disk is full, or whose reader is gone."""

    def __init__(self, number: int, *, terminal: bool = False) -> None:
        super().__init__()
        self.number, self.terminal, self.tries = number, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.fixture
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_plain_terminal")
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_standard_error_that_takes_nothing_ends_no_computation(
    number: int, terminal: bool, hand: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, output = Refusing(number, terminal=terminal), sys.stdout
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        console = error_console()
        print_line(console, "one")
        assert (console.quiet, stream.tries) == (True, 1)
        print_line(console, "two")
        assert stream.tries == 1
        tell("three")
        assert stream.tries == 2
        with progress_bar("counting") as update:
            for second in (0.0, 90.0, 180.0):
                hand.now = second
                update(second / 200)
        assert (sys.stderr, sys.stdout) == (stream, output)
        assert stream.tries > 2


def test_a_closed_standard_error_ends_no_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        tell("to nobody")
        print_line(error_console(), "to nobody")


def test_a_line_for_a_console_of_the_callers_ends_no_computation() -> None:
    console = Console(file=Refusing(errno.ENOSPC))
    print_line(console, "one")
    assert console.quiet


def test_what_is_told_reaches_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a [name]: with brackets")
    print_line(error_console(), "a [name]: with brackets")
    assert capsys.readouterr() == ("", "a [name]: with brackets\n" * 2)


HOSTILE = "a [name]\x1b[2J\x07\b\r\x9b1m\nthe certificate holds\t\u202e\u2028\udce9 größer …"
WRITTEN = r"a [name]\x1b[2J\x07\x08\r\x9b1m\nthe certificate holds\t\u202e\u2028\udce9 größer …"


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A name moves no cursor, begins no line of its own and turns no text round."""
    show(HOSTILE)
    tell(HOSTILE)
    print_line(error_console(), HOSTILE)
    assert capsys.readouterr() == (f"{WRITTEN}\n", f"{WRITTEN}\n" * 2)
    assert printable(WRITTEN) == WRITTEN
    assert printable("") == ""


def test_what_is_worked_on_moves_no_cursor(hand: SimpleNamespace) -> None:
    bar, lines = io.StringIO(), io.StringIO()
    terminal = Console(file=bar, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    for console in (terminal, file_console(lines)):
        with progress_bar("decoding \x1b]0;a\x07", console) as update:
            for second in (0.0, 90.0):
                hand.now += second
                update(second / 180)
    for shown in (bar.getvalue(), lines.getvalue()):
        assert r"decoding \x1b]0;a\x07" in shown
        assert "\x1b]0;" not in shown


def images(count: int) -> ImageDataset:
    return ImageDataset("cifar10", torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.arange(count), ("a", "b"))


def note_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise DynablocksError("cannot write")

    monkeypatch.setattr(cache, "write_atomically", refused)
    cache._save(Path("nowhere") / "a.safetensors", "key", "digest", images(2), images(1))


def note_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "require_folder", lambda folder: folder)
    monkeypatch.setattr(cifar, "find_copy", lambda kind, root: cifar.Copy(root, (), lambda: (images(2), images(1))))
    monkeypatch.setattr(cifar, "cached", lambda name, root, files, read: (*read(), "digest"))
    cifar.load_cifar(cifar.CIFAR10, Path("here"))


def error_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["no-such-command"]) == 2


@pytest.mark.parametrize("message", [note_of_the_cache, note_of_a_copy, error_of_a_command])
def test_a_message_is_never_taken_for_a_result(
    message: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message(monkeypatch)
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        message(monkeypatch)
        tell("to nobody")
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk is always full here")
def test_the_exit_code_is_right_where_standard_error_takes_nothing() -> None:
    command = [sys.executable, "-m", "dynablocks", "no-such-command"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
