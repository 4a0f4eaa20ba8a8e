"""A batch on several threads of Python's, each with its part of the rows, in one session that has one thread itself.

Where a batch has rows enough for each thread, that is faster than to share out each operator among a library's own
threads: these wait for one another after every one of them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

logger = logging.getLogger(__name__)

Rows = Callable[[int, int], None]  # runs the rows from a first to an end

_FEWEST: Final = 4  # rows of a batch
_ROWS: Final = 2  # of a part, at least
_UNEVEN: Final = 1.1  # the largest part at most, where 1 is an even share
_TURNS: Final = 4  # of each way, the first of which warms it up


class Split:
    """Runs a batch in parts, at the same time. parts: one for each thread; no two of them run the same rows."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._own, *self._others = parts
        self._pool = ThreadPoolExecutor(max(1, len(self._others)), thread_name_prefix="ddpm-part")

    def run(self, batch: int) -> None:
        """Run the leading rows. Whatever happens in one part, all have ended when it returns or raises."""
        count = len(self._others) + 1
        edges = [batch * part // count for part in range(count + 1)]
        started = []
        try:
            for part, first, end in zip(self._others, edges[1:], edges[2:], strict=False):
                started.append(self._pool.submit(part, first, end))
            self._own(*edges[:2])
        finally:
            wait(started)
        for future in started:
            future.result()

    def run_alone(self, batch: int) -> None:
        """Run the leading rows on the caller's thread alone."""
        self._own(0, batch)

    def close(self) -> None:
        """End its threads, once what is under way has ended."""
        self._pool.shutdown()


def worth_splitting(batch: int, threads: int) -> bool:
    """Whether the parts of a batch may be faster than the whole: large enough, and nearly even."""
    largest = -(-batch // threads)
    return threads > 1 and batch >= max(_FEWEST, _ROWS * threads) and largest * threads <= _UNEVEN * batch


class Race:
    """Two ways to run a batch that give the same bits, which take turns at a caller's first calls: the faster.

    whole: has run the batch before."""

    def __init__(self, batch: int, split: Split, whole: Callable[[int], None]) -> None:
        self.batch = batch
        self._ways = split.run, whole
        self._seconds: list[float] = []

    def run(self) -> bool | None:
        """Run the batch. Returns whether the split is the faster; None while that is not known."""
        turn = len(self._seconds)
        start = time.perf_counter()
        self._ways[turn % 2](self.batch)
        self._seconds.append(time.perf_counter() - start)
        if turn + 1 < 2 * _TURNS:
            return None
        split, whole = (min(self._seconds[way + 2 :: 2]) for way in range(2))
        logger.info(
            "one call of the network for a batch of %d takes %.1f ms whole, and %.1f ms divided among the threads, "
            "with the same results: from now on it %s",
            self.batch,
            whole * 1e3,
            split * 1e3,
            "is divided" if split < whole else "stays whole",
        )
        return split < whole
