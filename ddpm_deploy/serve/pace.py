"""How long a step takes for so many rows of the batch, s(B): measured once, and kept up to date by real steps."""

import time
from bisect import bisect_left
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.runtime.chain import Chain, time_step
from ddpm_deploy.runtime.network import bucket_of, bucket_sizes
from ddpm_deploy.runtime.protocols import Network

_SECONDS: Final = (
    1.0  # of measuring, when it starts; what is not measured by then is drawn on in a straight line
)
_GATHERED: Final = 16  # steps that are looked at together, as noise is made for so many at once
_SHARE: Final = 0.1  # of a new mean, in what is known
_SWING: Final = (
    2.0  # by which steps may be longer or shorter than they should, before the rest is put down to chance
)


class Pace:
    """s(B) in seconds, for 1 to `capacity` rows; it never falls with more rows.

    sizes, seconds: what was measured, ascending. stairs: whether a batch runs as the next larger of the sizes, as one
    does with buckets; else what lies between two sizes lies on a line.
    """

    def __init__(self, sizes: list[int], seconds: list[float], *, stairs: bool = False) -> None:
        rows = np.arange(sizes[-1] + 1)
        if stairs:
            table = np.array(seconds)[[bisect_left(sizes, size) for size in rows.tolist()]]
        else:
            table = np.interp(rows, sizes, seconds)
        self._raw: NDArray[np.float64] = table
        self._distance = np.log2(np.maximum(rows, 1))
        self._seen: list[tuple[float, float, float]] = []  # log₂ of the rows, seconds, and those foretold
        self._level()

    @classmethod
    def measured(cls, chain: Chain, capacity: int) -> Self:
        """Of a chain that nobody uses, in about a second; of two sizes at least."""
        network = chain.network
        on_host = network.device.is_host
        sizes = bucket_sizes(1, capacity) if on_host else sorted({*_buckets(network, capacity), capacity})
        seconds: list[float] = []
        end = time.perf_counter() + _SECONDS
        for size in sizes:
            if len(seconds) > 1 and time.perf_counter() > end:
                slope = (seconds[-1] - seconds[-2]) / (sizes[len(seconds) - 1] - sizes[len(seconds) - 2])
                seconds.append(seconds[-1] + slope * (size - sizes[len(seconds) - 1]))
            else:
                seconds.append(time_step(chain, size))
        return cls(sizes, seconds, stairs=not on_host)

    @property
    def table(self) -> NDArray[np.float64]:
        """s(B) for B from 0 (as for 1) to `capacity`."""
        return self._table

    def __call__(self, rows: int) -> float:
        return float(self._table[rows])

    def saw(self, rows: int, seconds: float) -> None:
        """Learn from a step, all that went with it included: an exponential average, some steps at a time."""
        self._seen.append((float(self._distance[rows]), seconds, float(self._table[rows])))
        if len(self._seen) == _GATHERED:
            distance, took, foretold = np.mean(self._seen, axis=0)
            self._learn(distance, took / foretold)
            self._seen.clear()

    def _learn(self, distance: float, ratio: float) -> None:
        """Sizes near this one learn all of it; the others half, as a machine is slower at all of them or at none."""
        off = float(np.clip(ratio, 1 / _SWING, _SWING)) - 1
        near = np.maximum(0.5, 1 - np.abs(self._distance - distance))
        self._raw *= 1 + _SHARE * near * off
        self._level()

    def _level(self) -> None:
        self._table = np.maximum.accumulate(self._raw)


def _buckets(network: Network, capacity: int) -> list[int]:
    """The batch sizes that stand for 1 to `capacity` rows, none of them larger than that."""
    last = bucket_of(network, capacity)
    return [bucket for bucket in network.buckets if bucket < last and bucket <= capacity]
