"""Ctrl-C and SIGTERM for work that ends the step at hand first."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signals(stop: Callable[[], None], kept: str) -> Iterator[None]:
    """Call `stop` on Ctrl-C or SIGTERM, so that the step at hand ends and what is `kept` is saved.

    A second signal is obeyed at once.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        logger.info("stopping after this step, with the %s saved (again: stop at once)", kept)
        stop()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()
