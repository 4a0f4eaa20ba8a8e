"""Ctrl-C and SIGTERM for work that ends the step at hand first."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signals(stop: Callable[[], None], says: str) -> Iterator[None]:
    """Call `stop` on Ctrl-C or SIGTERM, so that the step at hand ends; `says` tells the user what is kept.

    A second signal is obeyed at once. Signals reach the main thread alone: in another this does nothing.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        logger.info("stopping after this step, %s (again: stop at once)", says)
        stop()

    with _handled(handle) as restore:
        yield


@contextmanager
def signals_held(stop: Callable[[], None], says: str = "") -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM during what cannot bear an exception, as native code: `stop` is called, the user is told
    what `says` says, and the signal is passed on at the end."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if says and not received:
            logger.info(says)
        received.append(number)
        stop()

    try:
        with _handled(handle):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Handle both signals, in the main thread; gives what restores the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()
