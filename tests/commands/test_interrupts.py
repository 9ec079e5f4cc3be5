"""Signals: the first asks for an end, the next one enforces it, and handlers are given back."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import typer

from gain_ops.commands.console import clear_errors
from gain_ops.commands.interrupts import Interrupted, StopRequest, raised_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_on_a_terminal() -> Iterator[None]:
    """A process in the background ignores SIGINT, and one under nohup SIGHUP; and so would these tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_asks_and_the_next_one_ends(first: signal.Signals, second: signal.Signals):
    asked: list[int] = []
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(lambda: asked.append(1)) as stop:
        assert (stop.requested, stop.number) == (False, None)
        _send(first)
        assert (stop.requested, stop.number, asked) == (True, first, [1])
        with pytest.raises(Interrupted) as ended:
            _send(second)
        assert ended.value.number == second
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("kind", [raised_signals, lambda: StopRequest(lambda: pytest.fail("asked"))])
def test_a_signal_that_is_ignored_stays_ignored(kind):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with kind():
        _send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_takes_no_signals():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen: list[list[object]] = []

    def run() -> None:
        with raised_signals():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handlers]


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_command_ends_with_a_line_and_the_status_of_the_signal(
    number: int, name: str, capsys: pytest.CaptureFixture[str]
):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(typer.Exit) as ended, clear_errors(lambda: "All is kept."):
        _send(number)
    assert ended.value.exit_code == 128 + number
    assert capsys.readouterr().out == f"Stopped by {name}. All is kept.\n"
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
