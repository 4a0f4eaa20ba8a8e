"""Signals: held, heard, and left alone where they are somebody else's."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

from ddpm_deploy.cli.common import Command
from ddpm_deploy.signals import handled, signals_held, stop_on_signals

BIN = Path(sys.executable).parent
BOTH = (signal.SIGINT, signal.SIGTERM)
pytestmark = pytest.mark.usefixtures("ctrl_c")


def nothing() -> None:
    """Do nothing."""


@pytest.fixture
def as_they_were() -> Iterator[None]:
    """The handlers of both, put back after the test."""
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_stops_and_the_second_is_obeyed(number: signal.Signals, as_they_were: None) -> None:
    def ended(number: int, frame: FrameType | None) -> None:
        raise ZeroDivisionError

    signal.signal(number, ended)
    heard: list[int] = []
    with pytest.raises(ZeroDivisionError), stop_on_signals(lambda: heard.append(1), "with nothing lost"):
        signal.raise_signal(number)
        assert heard == [1]
        signal.raise_signal(number)
    assert signal.getsignal(number) is ended


def test_a_held_signal_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt), signals_held(nothing):
        signal.raise_signal(signal.SIGINT)
        held = True
    assert held


def held() -> Any:
    return signals_held(nothing)


def stopping() -> Any:
    return stop_on_signals(nothing, "")


def any_of_them() -> Any:
    return handled(BOTH, lambda number, frame: None)


@pytest.mark.parametrize("holds", [held, stopping, any_of_them])
@pytest.mark.parametrize("number", BOTH)
def test_an_ignored_signal_stays_ignored(
    holds: Callable[[], Any], number: signal.Signals, as_they_were: None
) -> None:
    signal.signal(number, signal.SIG_IGN)
    with holds():
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("holds", [held, stopping, any_of_them])
def test_a_handler_that_is_not_pythons_is_left_alone(
    holds: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python says None of it, and could not put it back. SIGTERM's is made out to be one."""
    getsignal, taken = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else getsignal(n))
    install = signal.signal
    monkeypatch.setattr(signal, "signal", lambda n, handler: (taken.append(n), install(n, handler))[1])
    with holds():
        pass
    assert set(taken) == {signal.SIGINT}


def test_a_command_leaves_a_handler_that_is_not_pythons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    main = Command("nothing", callback=nothing)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    assert CliRunner().invoke(main).exit_code == 0
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_have_no_signals() -> None:
    ended: list[bool] = []

    def work() -> None:
        with stop_on_signals(nothing, ""), signals_held(nothing):
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize("number", BOTH)
def test_a_command_that_was_started_with_a_signal_ignored_goes_on(
    tmp_path: Path, onnx_path: Path, number: signal.Signals
) -> None:
    """As nohup and a shell's background jobs start it; with a snapshot, as that would end the chain."""
    started = subprocess.Popen(
        [BIN / "ddpm-run", onnx_path, "--count", "4", "--snapshot", "s.npz", "-o", "x.npz"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN) and None,
    )
    with started as process:
        assert process.stderr is not None
        process.stderr.readline()  # the forecast: the chain is what comes next
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.05)
        assert process.returncode == 0, process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_ctrl_c_is_heard_by_a_child_of_these_tests() -> None:
    """Also where they themselves run with SIGINT ignored: what the fixture is for."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "True\n"
