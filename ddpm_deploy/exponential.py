"""exp as chains need it for a learned variance: the same bits on every machine, as the noise has them.

exp w = 2ᵏ·P(w - k·ln 2) with k = rint(w·log2 e), in float64, in the order written and uncontracted; rounded
once to float32. `reference.exponential` is the same function written for reading.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.noise import LN_2

LOG2_E: Final = 1.4426950408889634
LARGEST: Final = 80.0  # of |w|: what float32 holds with room for a product
# exp r = P(r) for |r| ≤ ½ ln 2, fitted at Chebyshev nodes: 6e-11, and P(0) rounds to 1.
EXP_SERIES: Final = (
    0.9999999999595615,
    0.9999999999955084,
    0.5000000107729166,
    0.16666666786314904,
    0.04166621831932009,
    0.008333283537609778,
    0.00139485783242701,
    0.00019907569849416228,
)


class Exponential:
    """exp of float32 arrays of up to (slots, elements), in memory allocated once."""

    def __init__(self, slots: int, elements: int) -> None:
        self._r = np.empty((slots, elements))
        self._series = np.empty((slots, elements))
        self._k = np.empty((slots, elements), np.int32)

    def apply(self, w: NDArray[np.float32]) -> None:
        """w ← exp w, for w (B, elements), its numbers outside ±LARGEST moved there first."""
        batch = len(w)
        r, series, k = self._r[:batch], self._series[:batch], self._k[:batch]
        np.clip(w, -LARGEST, LARGEST, out=w)
        np.multiply(w, LOG2_E, out=series, dtype=np.float64)
        np.rint(series, out=series)
        np.multiply(series, LN_2, out=r)
        np.subtract(w, r, out=r)
        with np.errstate(invalid="ignore"):  # of NaN, which the polynomial keeps
            k[:] = series
        np.multiply(r, EXP_SERIES[-1], out=series)
        for coefficient in EXP_SERIES[-2:0:-1]:
            np.add(series, coefficient, out=series)
            np.multiply(series, r, out=series)
        np.add(series, EXP_SERIES[0], out=series)
        np.ldexp(series, k, out=series)
        w[:] = series
