"""Ctrl-C, SIGTERM and SIGHUP for work that ends the step at hand first."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals(stop: Callable[[], None], says: str) -> Iterator[None]:
    """Call `stop` on Ctrl-C, SIGTERM or SIGHUP, so that the step at hand ends; `says` tells the user what is kept.

    A second Ctrl-C or SIGTERM is obeyed at once; not so a second SIGHUP, as a terminal that closes may send several.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        logger.info("stopping after this step, %s (again: stop at once)", says)
        stop()

    with _repeatedly([signal.SIGHUP], stop, says), handled(_ENDING, handle) as restore:
        yield


@contextmanager
def stop_on_repeated_signals(stop: Callable[[], None], says: str) -> Iterator[None]:
    """Do the same in a process whose launcher passes on what it is sent, perhaps more than once, and kills what does
    not end: here all signals mean the same as the first."""
    with _repeatedly((*_ENDING, signal.SIGHUP), stop, says):
        yield


@contextmanager
def _repeatedly(numbers: Iterable[int], stop: Callable[[], None], says: str) -> Iterator[None]:
    """Call `stop` on each of these signals, and tell the user once."""
    told: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not told:
            logger.info("stopping after this step, %s", says)
        told.append(number)
        stop()

    with handled(numbers, handle):
        yield


@contextmanager
def signals_held(stop: Callable[[], None], says: str = "") -> Iterator[None]:
    """Hold these signals during what cannot bear an exception, as native code: `stop` is called, the user is told
    what `says` says, and the signal is passed on at the end."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if says and not received:
            logger.info(says)
        received.append(number)
        stop()

    try:
        with handled((*_ENDING, signal.SIGHUP), handle):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise a KeyboardInterrupt again that Python dropped, as it does where one comes while an object is deleted.

    Signals reach the main thread alone: in another this does nothing.
    """
    before = sys.unraisablehook
    pending: list[threading.Timer] = []

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        number = next((n for n in _ENDING if callable(signal.getsignal(n))), None)
        if number is None or not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)
            return
        # Not from here, where it would be dropped again.
        again = threading.Timer(0.01, signal.pthread_kill, [threading.get_ident(), number])
        again.daemon = True
        pending.append(again)
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for again in pending:
            again.cancel()


@contextmanager
def handled(numbers: Iterable[int], handle: Handler) -> Iterator[Callable[[], None]]:
    """Have `handle` called on these signals; gives what puts the handlers before it back.

    A signal that is ignored stays so, as whoever started this process meant it (nohup, a job in the background).
    One that something other than Python handles is left to that, as Python could not put its handler back. Signals
    reach the main thread alone: in another this does nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        present = {number: signal.getsignal(number) for number in numbers}
        before = {n: there for n, there in present.items() if there not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in before:
            signal.signal(number, handle)
        yield restore
    finally:
        restore()
