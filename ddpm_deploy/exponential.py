"""exp as chains need it for a learned variance: the same bits on every machine, as the noise has them.

exp w = 2ᵏ·P(w - k·ln 2) with k = w·log2 e rounded to even, in float64, in the order written and uncontracted;
rounded once to float32. `reference.exponential` is the same function written for reading.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.noise import LN_2

LOG2_E: Final = 1.4426950408889634
LARGEST: Final = 80.0  # of |w|: what float32 holds with room for a product
# exp r = P(r) for |r| ≤ ½ ln 2, fitted at Chebyshev nodes: 3e-9, and P(0) is 1.
EXP_SERIES: Final = (
    1.0,
    1.0000000377388718,
    0.500000004714611,
    0.16666415414039484,
    0.04166635277095147,
    0.008375134774731624,
    0.0013941118906404205,
)

# Adding this to a float64 rounds it to a whole number, and leaves that in the low bits.
_ROUNDER: Final = np.array(1.5 * 2.0**52)
_EXPONENT_BIAS: Final = np.array(1023)
_MANTISSA_BITS: Final = np.array(52)
_LN_2: Final = np.array(LN_2)
_LOG2_E: Final = np.array(LOG2_E)
_ENDS: Final = np.array([-LARGEST, LARGEST], np.float32)
_SERIES: Final = [np.array(coefficient) for coefficient in EXP_SERIES]


class Exponential:
    """exp of float32 arrays of up to (slots, elements), in memory allocated once."""

    def __init__(self, slots: int, elements: int) -> None:
        self._k = np.empty((slots, elements))
        self._r = np.empty((slots, elements))
        self._series = np.empty((slots, elements))

    def apply(self, w: NDArray[np.float32]) -> None:
        """w ← exp w, for w (B, elements), its numbers outside ±LARGEST moved there first; NaN stays NaN."""
        k, r, series = self._k[: len(w)], self._r[: len(w)], self._series[: len(w)]
        np.maximum(w, _ENDS[0], out=w)
        np.minimum(w, _ENDS[1], out=w)
        r[:] = w
        np.multiply(r, _LOG2_E, out=k)
        np.add(k, _ROUNDER, out=k)
        np.subtract(k, _ROUNDER, out=series)
        np.multiply(series, _LN_2, out=series)
        np.subtract(r, series, out=r)
        np.multiply(r, _SERIES[-1], out=series)
        for coefficient in _SERIES[-2:0:-1]:
            np.add(series, coefficient, out=series)
            np.multiply(series, r, out=series)
        np.add(series, _SERIES[0], out=series)
        bits = k.view(np.int64)  # those of 2ᵏ, from the low bits of k
        np.add(bits, _EXPONENT_BIAS, out=bits)
        np.left_shift(bits, _MANTISSA_BITS, out=bits)
        np.multiply(series, k, out=series)
        w[:] = series
