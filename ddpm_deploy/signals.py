"""Ctrl-C and SIGTERM for work that ends the step at hand first."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signals(stop: Callable[[], None], says: str) -> Iterator[list[int]]:
    """Call `stop` on Ctrl-C or SIGTERM, so that the step at hand ends; `says` tells the user what is kept.

    Gives the list of the signals that came, for whoever passes them on. A second signal is obeyed at once. Signals
    reach the main thread alone: in another this does nothing.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        received.append(number)
        logger.info("stopping after this step, %s (again: stop at once)", says)
        stop()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()
