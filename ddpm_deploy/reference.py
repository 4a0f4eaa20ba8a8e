"""The slow, obvious chain: one sample at a time, the noise one number at a time.

The oracle of the fast paths: tests hold `noise.AddressedNoise` and `runtime.chain.Chain` (and the CUDA
kernel to come) against it, bit for bit. Nothing else imports it.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy import noise
from ddpm_deploy.exponential import EXP_SERIES, LARGEST, LOG2_E
from ddpm_deploy.solvers import COLUMNS, StepTable

Array = NDArray[np.float32]


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as its paper writes it, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(noise.ROUNDS):
        product0, product1 = noise.MULTIPLIERS[0] * c0, noise.MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + noise.WEYL[0]) & 0xFFFFFFFF, (k1 + noise.WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _polynomial(series: Sequence[float], x: float) -> float:
    value = x * series[-1]
    for coefficient in series[-2:0:-1]:
        value = (value + coefficient) * x
    return value + series[0]


def box_muller(r0: int, r1: int) -> tuple[np.float32, np.float32]:
    """Two random words → two normal numbers, as `noise` defines them."""
    u0, u1 = (r0 + 0.5) * 2.0**-32, (r1 + 0.5) * 2.0**-32
    (bits,) = struct.unpack("<q", struct.pack("<d", u0))
    k = (bits - noise.SQRT_HALF_BITS) >> 52
    m = math.ldexp(u0, -k)
    s = (m - 1.0) / (m + 1.0)
    rho = -2.0 * (_polynomial(noise.LN_SERIES, s * s) * s + k * noise.LN_2)
    v = u1 - 0.5
    sine = _polynomial(noise.SIN_PI_SERIES, v * v) * v
    cosine = _polynomial(noise.COS_PI_SERIES, v * v)
    radius = np.sqrt(np.float32(rho))
    return radius * np.float32(-1.0 - -2.0 * sine * sine), radius * np.float32(-2.0 * sine * cosine)


def normal(seed: int, index: int, draw: int, shape: tuple[int, ...]) -> Array:
    """The addressed noise of one sample."""
    count = math.prod(shape)
    key = seed & 0xFFFFFFFF, seed >> 32
    values: list[np.float32] = []
    for block in range(-(-count // 4)):
        r0, r1, r2, r3 = philox4x32((block, draw, index & 0xFFFFFFFF, index >> 32), key)
        values += box_muller(r0, r1) + box_muller(r2, r3)
    return np.array(values[:count], np.float32).reshape(shape)


def exponential(w: np.float32) -> np.float32:
    """exp w, as `exponential` defines it."""
    w64 = min(max(float(w), -LARGEST), LARGEST)
    k = round(w64 * LOG2_E)  # to even, as rint
    return np.float32(math.ldexp(_polynomial(EXP_SERIES, w64 - k * noise.LN_2), k))


def _term(coefficient: np.float32, values: Array) -> Array:
    """A term with no coefficient is not there: 0 times an infinity would be NaN."""
    return coefficient * values if coefficient else np.zeros_like(values)


def update(row: Array, x: Array, prediction: Array, z: Array, x0_previous: Array) -> tuple[Array, Array]:
    """One step by one float32 row of a table: (x', x̂0). prediction: out, and v behind it where it was learned."""
    r = dict(zip(COLUMNS, row, strict=True))
    out, v = prediction[: len(x)], prediction[len(x) :]
    noise_term = _term(r["e"], z)
    if r["ln_var_min"] or r["ln_var_max"]:
        quarter = (r["ln_var_max"] - r["ln_var_min"]) * np.float32(0.25)
        w = v * quarter + (quarter + r["ln_var_min"] * np.float32(0.5))
        noise_term = noise_term * np.vectorize(exponential, otypes=[np.float32])(w)
    x0 = np.minimum(np.maximum(_term(r["a"], x) + _term(r["b"], out), r["lo"]), r["hi"])
    # The last + 0 makes -0 a +0, so that a term whose coefficient is zero may as well not be computed.
    x = _term(r["c"], x0) + _term(r["d"], x) + noise_term
    x = x + _term(r["f"], x0_previous) + _term(r["g"], out) + np.float32(0)
    return x, x0


def chain(
    predict: Callable[[Array, int], Array],
    table: StepTable,
    shape: tuple[int, ...],
    seed: int,
    index: int,
    share_until: int | None = None,
) -> Iterator[Array]:
    """The reverse chain of one sample: yields x_T, then x after each step, each `shape` float32.

    `predict(x, t)` is the network on one sample.
    """
    shares = share_until is not None
    x, x0 = normal(seed, 0 if shares else index, 0, shape), np.zeros(shape, np.float32)
    yield x
    for row, t in zip(table.float32_rows(), table.timesteps, strict=False):
        whose = 0 if share_until is not None and t >= share_until else index
        z = normal(seed, whose, int(t) + 1, shape) if row[COLUMNS.index("e")] else np.zeros(shape, np.float32)
        x, x0 = update(row, x, predict(x, int(t)), z, x0)
        yield x
