"""Candidates timed in turn, in one process, so that a busy moment strikes all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

ROUNDS: Final = 12

Block = Callable[[], None]  # runs some steps


def interleave(blocks: Mapping[str, Block], steps: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a step of each candidate, in turn, `rounds` times after a warm-up. steps: that a block runs."""
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for round_ in range(rounds + 1):
        for name, block in blocks.items():
            start = time.perf_counter()
            block()
            if round_:
                times[name].append((time.perf_counter() - start) / steps)
    return times


def median(times: list[float]) -> float:
    """The median."""
    return statistics.median(times)


def ratio(upper: list[float], lower: list[float]) -> str:
    """The ratio of medians, with the smallest and largest of two neighbours."""
    pairs = [a / b for a, b in zip(upper, lower, strict=True)]
    return f"{median(upper) / median(lower):.3f} ({min(pairs):.3f} … {max(pairs):.3f})"
