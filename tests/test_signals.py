"""Signals: held, heard, and left alone where they are somebody else's."""

import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

from ddpm_deploy.cli.common import Command
from ddpm_deploy.model_file import open_model
from ddpm_deploy.signals import handled, signals_held, stop_on_signals

BIN = Path(sys.executable).parent
BOTH = (signal.SIGINT, signal.SIGTERM)
ALL = (*BOTH, signal.SIGHUP)
TRAINING = (
    *("digits", "-o", "m.pt", "--steps", "100000", "--sample-every", "0", "--batch-size", "2"),
    *("--save-every", "100000"),
)
pytestmark = pytest.mark.usefixtures("ctrl_c")


def nothing() -> None:
    """Do nothing."""


@pytest.fixture
def as_they_were() -> Iterator[None]:
    """The handlers of all, put back after the test."""
    before = {number: signal.getsignal(number) for number in ALL}
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


def test_a_terminal_that_closes_may_send_several(as_they_were: None) -> None:
    heard: list[int] = []
    with stop_on_signals(lambda: heard.append(1), "with nothing lost"):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert heard == [1, 1, 1, 1]


@pytest.mark.parametrize("number", ALL)
def test_a_held_signal_is_passed_on(number: signal.Signals, as_they_were: None) -> None:
    signal.signal(number, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), signals_held(nothing):
        signal.raise_signal(number)
        held = True
    assert held


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_cleans_up_before_it_ends(number: signal.Signals) -> None:
    cleaned: list[bool] = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            if number == signal.SIGHUP:
                signal.raise_signal(number)  # the shell sent one, and the system another
            cleaned.append(True)

    result = CliRunner().invoke(Command("work", callback=work))
    assert (result.exit_code, cleaned) == (130, [True])
    assert signal.getsignal(number) is signal.SIG_DFL


class Interrupted:
    """Ctrl-C comes while it is deleted."""

    def __del__(self) -> None:
        """Send it."""
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_an_object_is_deleted_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        Interrupted()
        time.sleep(20)

    before, start = sys.unraisablehook, time.monotonic()
    result = CliRunner().invoke(Command("x", callback=run), [])
    assert time.monotonic() - start < 10
    assert (result.exit_code, sys.unraisablehook) == (130, before)
    assert "Exception ignored" not in result.output + capfd.readouterr().err


def held() -> Any:
    return signals_held(nothing)


def stopping() -> Any:
    return stop_on_signals(nothing, "")


def any_of_them() -> Any:
    return handled(ALL, lambda number, frame: None)


@pytest.mark.parametrize("holds", [held, stopping, any_of_them])
@pytest.mark.parametrize("number", ALL)
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
    assert set(taken) == {signal.SIGINT, signal.SIGHUP}


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


@pytest.mark.parametrize("number", ALL)
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


def trained(folder: Path, terminal: int | None = None) -> None:
    """Wait until a training has taken some steps, and read what it writes to its terminal."""
    metrics, deadline = folder / "m.train" / "metrics.csv", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.1)
        if terminal is not None:
            with suppress(BlockingIOError):
                os.read(terminal, 1 << 16)


def test_a_training_whose_terminal_closes_is_saved(tmp_path: Path) -> None:
    """The system says SIGHUP, and every line that is written from there on fails."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(
        [BIN / "ddpm-train", *TRAINING], cwd=tmp_path, preexec_fn=own_terminal, **streams
    ) as process:
        os.close(theirs)
        os.set_blocking(ours, False)
        trained(tmp_path, ours)
        os.close(ours)
        process.wait(60)
    assert open_model(tmp_path / "m.pt").spec.provenance.step >= 25


def test_a_training_under_nohup_goes_on(tmp_path: Path) -> None:
    nohup = shutil.which("nohup")
    assert nohup
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([nohup, BIN / "ddpm-train", *TRAINING], cwd=tmp_path, **said) as process:
        trained(tmp_path)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "m.pt").exists()


def test_ctrl_c_is_heard_by_a_child_of_these_tests() -> None:
    """Also where they themselves run with SIGINT ignored: what the fixture is for."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "True\n"
