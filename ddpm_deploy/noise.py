"""Noise with an address: z = f(seed, sample index, draw, element), the same bits on every machine.

Version 1 of the function (the number is in every ModelSpec as `noise_version`):

  generator  Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
             key = (seed low, seed high); counter = (block, draw, sample low, sample high).
  draw       0 for x_T; t + 1 for the noise added when stepping from timestep t. Its top 8 bits are a
             stream number: 0 of chains; 1 of the forward process, where t + 1 is the noise in x_t.
  elements   block i yields elements 4i .. 4i+3 of the sample in C order (C, H, W): its words r0..r3
             make the Box-Muller pairs (r0, r1) and (r2, r3).
  pair       u = (r + 0.5)·2⁻³² in float64; ρ = -2 ln u0, cos 2πu1 and sin 2πu1 by the polynomials
             below in float64; each of the three rounded to float32; then √ρ·cos and √ρ·sin in float32.

Only +, -, ×, ÷ and √ touch the numbers, in the order written, none of them contracted: IEEE 754 fixes
each result, so NumPy, C++ and CUDA agree bit for bit, where library logarithms and cosines do not.
`reference.normal` is the same function written for reading; this file is written for speed.
"""

import math
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION: Final = 1

FORWARD_STREAM: Final = 1 << 24

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round

# Three polynomials of six terms, fitted at Chebyshev nodes; what each leaves is in its line.
# ln m = s·P(s²) with s = (m - 1)/(m + 1), for m in [√½, √2): 5e-14.
LN_SERIES: Final = (
    1.9999999999999472,
    0.6666666667957926,
    0.3999999489183238,
    0.28572166145875727,
    0.2217424991007749,
    0.19608095639753054,
)
# sin πv = v·P(v²) for |v| ≤ ½: 5e-11.
SIN_PI_SERIES: Final = (
    3.141592653536132,
    -5.167712764593,
    2.550163317938427,
    -0.599252186531583,
    0.08205035020147247,
    -0.007028303855203096,
)
# cos πv = P(v²) for |v| ≤ ½: 2e-10.
COS_PI_SERIES: Final = (
    0.999999999779154,
    -4.934802136928946,
    4.058709154763134,
    -1.3352119493905503,
    0.2349370685950865,
    -0.024395932097550446,
)
LN_2: Final = 0.6931471805599453
SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD

# Constants as arrays without axes: NumPy would convert a Python number anew at every call.
_HALF: Final = np.array(0.5)
_ONE: Final = np.array(1.0)
_MINUS_1: Final = np.array(-1.0)
_MINUS_2: Final = np.array(-2.0)
_2_TO_MINUS_32: Final = np.array(2.0**-32)
_LN_2: Final = np.array(LN_2)
_SQRT_HALF_BITS: Final = np.array(SQRT_HALF_BITS)
_52: Final = np.array(52)
# The halves of a uint64 seen as two uint32.
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
# The scratch of one tile (0.4 MB) stays within a core's L2 cache, whatever the size of the images.
_TILE_BLOCKS: Final = 1024
# What is made in one call at the most, unless one step takes more.
_WINDOW_BLOCKS: Final = 16384
_WINDOW_STEPS: Final = 64


def _round_keys(key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Give the key of each round: key (2, ...) → (ROUNDS, 2, ...); even rounds as (k1, k0), see `_Philox`."""
    bump = np.arange(ROUNDS, dtype=np.uint32)[:, None] * np.array(WEYL, np.uint32)  # (ROUNDS, 2), wraps
    keys = key + bump.reshape(ROUNDS, 2, *(1,) * (key.ndim - 1))
    keys[::2] = keys[::2, ::-1].copy()
    return keys


class _Philox:
    """Scratch for Philox4x32-10 on counters of one shape, and the ten rounds over it.

    A round is

        c0, c1, c2, c3  ←  hi(M1·c2) ^ c1 ^ k0,  lo(M1·c2),  hi(M0·c0) ^ c3 ^ k1,  lo(M0·c0)

    `even` holds (c0, c2), 32 bits each in 64, and the halves of a product are read where it lies, so
    that a round is three operations on whole arrays. The exchange of the two words costs nothing:
    even rounds leave them exchanged, odd rounds put them back.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.even = np.zeros((2, *shape), np.uint64)
        self.even_low = self._half(self.even, _LOW)
        # c1 and c3 at the start, as if they were the low halves of a product before the first.
        self.start = np.zeros((2, *shape), np.uint64)
        self._keyed = np.empty((2, *shape), np.uint32)
        multipliers = np.empty((2, *shape), np.uint64)
        multipliers[0], multipliers[1] = MULTIPLIERS
        exchanged = multipliers[::-1].copy()
        products = [np.empty_like(self.even) for _ in range(2)]
        low = [self._half(self.start, _LOW)] + [self._half(products[r % 2], _LOW) for r in range(ROUNDS)]
        self._rounds = [
            (
                exchanged if r % 2 else multipliers,
                products[r % 2],
                low[r][::-1],
                self._half(products[r % 2], _HIGH),
            )
            for r in range(ROUNDS)
        ]
        self.odd_low = low[ROUNDS]

    @staticmethod
    def _half(array: NDArray[np.uint64], which: int) -> NDArray[np.uint32]:
        return array.view(np.uint32).reshape(*array.shape, 2)[..., which]

    def run(self, keys: NDArray[np.uint32]) -> None:
        """Turn the counter in `even` and `start` into words: (r0, r2) in `even_low`, (r1, r3) in `odd_low`."""
        even, even_low, keyed = self.even, self.even_low, self._keyed
        for key, (multipliers, product, low, high) in zip(keys, self._rounds, strict=True):
            np.multiply(even, multipliers, product)
            np.bitwise_xor(low, key, keyed)
            np.bitwise_xor(high, keyed, even_low)


class _Tile:
    """Scratch for `slots` × `blocks` Philox blocks, and the normal numbers they make."""

    def __init__(self, slots: int, blocks: int) -> None:
        pairs = (2, slots, blocks)  # a block makes two Box-Muller pairs
        self._philox = _Philox((slots, blocks))
        self._blocks = np.arange(blocks, dtype=np.uint64)
        self._u = np.empty((2, *pairs))
        self._exponent = np.empty(pairs, np.int64)
        self._shifted = np.empty(pairs, np.int64)
        self._sv = np.empty((2, *pairs))
        self._squares = np.empty((3, *pairs))
        self._series = np.empty((3, *pairs))
        self._rounded = np.empty((3, *pairs), np.float32)
        # The three polynomials are evaluated together, so each coefficient fills an array.
        coefficients = np.array([LN_SERIES, SIN_PI_SERIES, COS_PI_SERIES]).T[::-1, :, None, None, None]
        self._coefficients = list(np.broadcast_to(coefficients, (6, 3, *pairs)).copy())

    def fill(
        self,
        keys: NDArray[np.uint32],
        counter: NDArray[np.uint64],
        first_block: int,
        out: NDArray[np.float32],
    ) -> None:
        """Fill out (slots, blocks, 2, 2) from keys (ROUNDS, 2, slots, 1) and counter (3, slots, 1)."""
        even, start = self._philox.even, self._philox.start
        even[0] = self._blocks
        if first_block:
            even[0] += np.uint64(first_block)
        start[0], even[1], start[1] = counter
        self._philox.run(keys)
        self._box_muller(np.moveaxis(out, 2, 0))  # (pair, slots, blocks, 2)

    def _box_muller(self, out: NDArray[np.float32]) -> None:
        u, exponent, shifted = self._u, self._exponent, self._shifted
        u[0], u[1] = self._philox.even_low, self._philox.odd_low
        np.add(u, _HALF, u)
        np.multiply(u, _2_TO_MINUS_32, u)

        # u0 = m·2ᵏ with m in [√½, √2), by the bits of the float64: u[0] becomes m.
        m, bits = u[0], u[0].view(np.int64)
        np.subtract(bits, _SQRT_HALF_BITS, exponent)
        np.right_shift(exponent, _52, exponent)
        np.left_shift(exponent, _52, shifted)
        np.subtract(bits, shifted, bits)

        # s = (m - 1)/(m + 1) and v = u1 - ½, then the polynomials in s², v² and v².
        sv, squares, series = self._sv, self._squares, self._series
        np.add(m, _ONE, sv[0])
        np.subtract(m, _ONE, m)
        np.divide(m, sv[0], sv[0])
        np.subtract(u[1], _HALF, sv[1])
        np.multiply(sv, sv, squares[:2])
        squares[2] = squares[1]
        np.multiply(squares, self._coefficients[0], series)
        for coefficient in self._coefficients[1:-1]:
            np.add(series, coefficient, series)
            np.multiply(series, squares, series)
        np.add(series, self._coefficients[-1], series)
        np.multiply(series[:2], sv, series[:2])

        # ρ = -2·(ln m + k·ln 2); cos 2πu1 = -1 - (-2 sin πv)·sin πv; sin 2πu1 = (-2 sin πv)·cos πv.
        logarithm, sine, cosine = series
        np.multiply(exponent, _LN_2, m)
        np.add(logarithm, m, logarithm)
        np.multiply(logarithm, _MINUS_2, logarithm)
        np.multiply(sine, _MINUS_2, m)
        np.multiply(m, sine, sine)
        np.subtract(_MINUS_1, sine, sine)
        np.multiply(m, cosine, cosine)

        self._rounded[:] = series
        radius, cosine32, sine32 = self._rounded
        np.sqrt(radius, radius)
        np.multiply(radius, cosine32, out[..., 0])
        np.multiply(radius, sine32, out[..., 1])


class AddressedNoise:
    """The addressed noise of up to `slots` samples of `elements` numbers, in scratch allocated once.

    A sample that shares its noise until s has that of sample 0 for x_T and for the steps from timesteps t ≥ s.

    width: numbers that a sample's noise takes in memory: elements, in whole Philox blocks. lookahead: steps whose
    noise is best made in one call, for one sample (`window`: for several). NumPy's cost of a call is paid once for
    them all, which counts for small images.
    """

    def __init__(self, slots: int, elements: int) -> None:
        self._blocks = -(-elements // 4)
        self.width = 4 * self._blocks
        self.lookahead = self.window(1)
        self._keys = np.zeros((ROUNDS, 2, slots, 1), np.uint32)
        self._samples = np.zeros((2, slots, 1), np.uint64)  # sample low, sample high
        self._share_until = np.full(slots, -1)  # -1: shares none
        self._tiles: dict[tuple[int, ...], _Tile] = {}

    def window(self, slots: int) -> int:
        """Steps whose noise is best made in one call, for so many samples at once."""
        return min(_WINDOW_STEPS, max(1, _WINDOW_BLOCKS // (slots * self._blocks)))

    def assign(
        self,
        slots: slice,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        share_until: NDArray[np.int32] | int = -1,
    ) -> None:
        """Say whose noise these slots make from now on: sample `indices` (k,) of the `seeds` (k,).

        share_until: of each, or of all; -1: it shares none.
        """
        halves = np.stack([seeds, indices]).view(np.uint32).reshape(2, -1, 2)
        low, high = halves[..., _LOW], halves[..., _HIGH]
        self._keys[:, :, slots] = _round_keys(np.stack([low[0], high[0]])[..., None])
        self._samples[0, slots, 0], self._samples[1, slots, 0] = low[1], high[1]
        self._share_until[slots] = share_until

    def move(self, source: int, target: int) -> None:
        """Let a slot make the noise of another."""
        self._keys[:, :, target] = self._keys[:, :, source]
        self._samples[:, target] = self._samples[:, source]
        self._share_until[target] = self._share_until[source]

    def fill(self, slots: slice, draws: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write the noise of k slots for some draws each, (k, draws), into out (k, draws, width), contiguous memory."""
        steps, blocks = draws.shape[1], self._blocks
        normal = out.reshape(draws.size, blocks, 2, 2)
        keys = np.repeat(self._keys[:, :, slots], steps, axis=2)
        counter = np.empty((3, draws.size, 1), np.uint64)
        counter[0, :, 0] = draws.ravel()
        counter[1:] = np.repeat(self._samples[:, slots], steps, axis=1)
        until = self._share_until[slots, None]
        if (until >= 0).any():
            shared = (until >= 0) & ((draws == 0) | (draws > until))  # the step from t is of draw t + 1
            counter[1:, shared.ravel()] = 0
        stride = max(1, _TILE_BLOCKS // blocks)
        for row in range(0, draws.size, stride):
            part = slice(row, min(row + stride, draws.size))
            for block in range(0, blocks, _TILE_BLOCKS):
                place = normal[part, block : block + _TILE_BLOCKS]
                tile = self._tile(place.shape[0], place.shape[1])
                tile.fill(keys[:, :, part], counter[:, part], block, place)

    def _tile(self, rows: int, blocks: int) -> _Tile:
        """The scratch for this shape: of whole tiles, and of the last one each way."""
        tile = self._tiles.get((rows, blocks))
        if tile is None:
            if len(self._tiles) == 4:  # a changing batch must not collect a tile for each size
                self._tiles.clear()
            tile = self._tiles[rows, blocks] = _Tile(rows, blocks)
        return tile


def addressed_noise(
    seed: int, indices: NDArray[np.uint64], draw: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The noise of samples `indices` (k,) of a seed for one draw: (k, *shape). For whoever needs it once."""
    count, elements = len(indices), math.prod(shape)
    noise = AddressedNoise(count, elements)
    noise.assign(slice(0, count), np.full(count, seed, np.uint64), indices)
    out = np.empty((count, 1, noise.width), np.float32)
    noise.fill(slice(0, count), np.full((count, 1), draw), out)
    return out[:, 0, :elements].reshape(count, *shape)


def forward_draw(timesteps: Any) -> Any:
    """The draw of the noise that x_t has in it, of a timestep or an array of them."""
    return timesteps + 1 | FORWARD_STREAM


def forward_noise(
    seed: int, indices: NDArray[np.int64], timestep: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The noise ε of x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε for images `indices` (n,) of a seed: (n, *shape)."""
    return addressed_noise(seed, indices.astype(np.uint64), forward_draw(timestep), shape)
