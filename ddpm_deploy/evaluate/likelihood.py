"""The variational bound of 8-bit images, in bits a dimension, over any network: what a DDPM's training is about.

    L = L_T + Σ L_t + L_0                                    Ho et al. 2020, equation 5
    L_T = KL(q(x_T | x_0) ‖ N(0, I))                         `prior_bits`
    L_t = KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t))               `_divergence`
    L_0 = -log₂ p(x_0 | x_1), a pixel's 256 values as bins   `_ln_likelihood`; equation 13

The mean of p is that of the table which `ddpm-run` runs, with its clipping; a chain of fewer steps has its own bound.
All terms of an image are T calls of the network, so by default some are sampled: the steps are divided into strata, one
step of each is drawn for each image, and counts for all of its stratum. That is unbiased, and as each image draws for
itself, the spread of what the images have gives the standard error, of images, timesteps and noise together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.bound import EIGHT_BIT_STEPS, BoundTable, bound_table
from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.noise import AddressedNoise, forward_draw
from ddpm_deploy.runtime.images import Pixels
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.protocols import Array, Labels, Network
from ddpm_deploy.schedule import Floats
from ddpm_deploy.spec import ChainSettings, ModelSpec
from ddpm_deploy.stages import Progress, no_progress

Indices = NDArray[np.int64]
# The images of some indices, (n, C, H, W) uint8.
Read = Callable[[Indices], Pixels]

_GROUP: Final = (
    64  # images that are read and summed at a time, whatever the batch, so that sums do not depend on that
)
_TOGETHER: Final = 1 << 18  # numbers of the rows that are prepared together, and summed together
_TILE: Final = 1 << 14  # numbers that are computed with at a time, within a core's L2 cache in float64
# Φ(-x) = e^(-x²/2)/(5 + x) · P((5 - x)/(5 + x)) for x ≥ 0, fitted at Chebyshev nodes: relative 8e-13, however large x.
_NORMAL_TAIL: Final = (
    0.7691930497500629,
    0.6653825028952081,
    0.4953056159794071,
    0.31353315642325413,
    0.1650203657161463,
    0.06911864220566823,
    0.02079507321255068,
    0.002993354476597973,
    -0.0007979102937203084,
    -0.0005448230793225451,
    -5.923620861591038e-05,
    4.96136025954525e-05,
    1.6407313466403754e-05,
    -3.8085544774946463e-06,
    -2.4547058896750963e-06,
    2.2183002642264407e-07,
    2.2943778464415802e-07,
)


@dataclass(frozen=True)
class Estimate:
    """A mean over images, in bits a dimension, and its standard error (NaN of a single image)."""

    bits: float
    error: float


@dataclass(frozen=True)
class Stratum:
    """Neighbouring steps of a chain, and what they cost.

    first, last: their timesteps, the largest first. steps: how many they are. bits: the sum of their terms. rate: bits
    a dimension that were sent before, L_T and all steps from larger t, to the middle of these. distortion: the root of
    the mean squared error of x̂0(x_t), in steps of 8-bit images, 0 to 255.
    """

    first: int
    last: int
    steps: int
    bits: Estimate
    rate: float
    distortion: float


@dataclass(frozen=True)
class Likelihood:
    """The bound of some images and its parts; strata: of all terms but L_T, in the order of the chain: L_0 is last."""

    images: int
    bound: Estimate
    prior: Estimate
    between: Estimate
    decoder: Estimate
    strata: tuple[Stratum, ...]


class Terms:
    """Which terms of which chain's bound are evaluated.

    settings: steps (None: all T), spacing and timesteps of the chain, which is always the ancestral one. strata: into
    how many the steps are divided (None: each is its own, and all terms are evaluated). They are even in
    -ln(1 - ᾱ) = ln(1 + SNR): Gaussian data of variance 1 would need as many bits in each.

    Raises SettingError where there is no such chain.
    """

    def __init__(
        self, spec: ModelSpec, settings: ChainSettings | None = None, strata: int | None = None
    ) -> None:
        settings = settings or ChainSettings()
        if settings.timesteps is None and settings.steps in (None, spec.timesteps):
            settings = ChainSettings(steps=spec.timesteps, spacing="leading")
        chain = ChainSettings(
            steps=settings.steps, spacing=settings.spacing, timesteps=settings.timesteps, solver="ddpm"
        )
        steps = spec.step_table(chain)
        self.spec = spec
        self.table: BoundTable = bound_table(spec.make_schedule(), steps.timesteps[::-1], spec.variance)
        self.rows: Floats = steps.rows[::-1]
        self.columns = {name: steps[name][::-1] for name in ("a", "b", "lo", "hi", "g")}
        self.starts, self.lengths = _divided(self.table, strata)

    @property
    def per_image(self) -> int:
        """Rows that an image takes: calls of the network, at batch 1."""
        return len(self.starts)

    @property
    def every(self) -> bool:
        """Whether all terms are evaluated."""
        return len(self.starts) == len(self.table)

    def chosen(self, seed: int, indices: Indices) -> NDArray[np.int64]:
        """The steps that are evaluated of some images, (n, strata): a function of the seed and each index."""
        if self.every:
            return np.broadcast_to(self.starts, (len(indices), len(self.starts)))
        drawn = [np.random.Philox(key=seed | int(i) << 64).random_raw(len(self.starts)) for i in indices]
        return self.starts + (np.array(drawn) % self.lengths.astype(np.uint64)).astype(np.int64)


def _divided(table: BoundTable, strata: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first step of each stratum, and how many it has; step 0, of the decoder, is one by itself."""
    count = len(table)
    if strata is None or strata >= count - 1:
        return np.arange(count), np.ones(count, np.int64)
    if strata < 1:
        raise SettingError(f"terms must be 1 or more, not {strata}")
    fall = 2 * np.log(table.noise)  # ln(1 - ᾱ), which rises with the step
    number = np.ceil(strata * (fall[1:] - fall[0]) / (fall[-1] - fall[0]) - 1e-9)
    starts = np.append(0, np.flatnonzero(np.diff(number, prepend=0.0)) + 1)
    return starts, np.diff(starts, append=count)


def prior_bits(x0: Floats, table: BoundTable) -> Floats:
    """L_T of images (n, D), in bits a dimension: of the timestep that the chain starts from."""
    ac = table.signal[-1] ** 2
    nats: Floats = 0.5 * (ac * np.mean(x0**2, axis=1) - ac - np.log1p(-ac))
    return nats / math.log(2)


def _divergence(squares: Floats, ln_var: Floats, ln_var_posterior: Floats) -> Floats:
    """KL(q ‖ p) of two Gaussians, in nats. squares: of the difference of their means, (n, D); or the mean of these,
    (n, 1), where one variance is all of an image's. ln_var: of p, like it. ln_var_posterior: of q, (n, 1)."""
    difference = ln_var_posterior - ln_var
    nats: Floats = 0.5 * (np.expm1(difference) - difference + squares * np.exp(-ln_var))
    return nats


def _ln_likelihood(x0: Floats, error: Floats, ln_var: Floats, spec: ModelSpec) -> Floats:
    """ln p(x_0 | x_1), (n, D): each of the 256 values of a pixel is a bin, the two outermost without end.

    error: of the mean, (n, D). ln_var: of p, or (n, 1). Unlike in training, no probability is kept from zero.
    """
    low, high = spec.value_range
    half_bin = (high - low) / EIGHT_BIT_STEPS / 2
    lowest, highest = x0 < low + half_bin, x0 > high - half_bin
    inverse = np.broadcast_to(np.exp(-0.5 * ln_var), error.shape)
    # The normal distribution is even: left of its mean, small probabilities keep their digits.
    distance = np.where(lowest, error, np.where(highest, -error, np.abs(error)))
    nats = _ln_normal((half_bin - distance) * inverse)
    inside = ~(lowest | highest)
    below = _ln_normal((-half_bin - distance[inside]) * inverse[inside])
    nats[inside] += np.log(-np.expm1(below - nats[inside]))  # ln(e^nats - e^below)
    return nats


def _ln_normal(z: Floats) -> Floats:
    """ln Φ(z), any shape."""
    x = np.abs(z)
    farther = x + 5
    u = (5 - x) / farther
    series = np.full_like(u, _NORMAL_TAIL[-1])
    for coefficient in _NORMAL_TAIL[-2::-1]:
        series *= u
        series += coefficient
    ln_tail: Floats = np.log(series / farther) - x**2 / 2  # ln Φ(-x)
    return np.where(z < 0, ln_tail, np.log1p(-np.exp(ln_tail)))


class _Rows:
    """What a network says of rows of (image, step), in memory that is allocated once.

    It is asked for `batch` of them at a time. What comes before and after is done for many rows together: a call of the
    network leaves nothing of ours in the processor's caches.
    """

    def __init__(self, network: Network, terms: Terms, seed: int, batch: int, progress: Progress) -> None:
        self._network, self._terms, self._seed, self._batch = network, terms, seed, batch
        self._progress, self._spec = progress, network.spec
        self._elements = math.prod(network.spec.image_shape)
        embedding = network.spec.embedding.table(network.spec.timesteps)
        self._embedding = embedding[terms.table.timesteps]
        self.together = batch * max(1, _TOGETHER // (batch * self._elements))
        self._noise = AddressedNoise(self.together, self._elements)
        self._drawn = np.empty((self.together, 1, self._noise.width), np.float32)
        self._said = np.empty((self.together, math.prod(network.spec.output.shape)), np.float32)
        self._tile = max(1, _TILE // self._elements)
        self._scratch = np.empty((3, self._tile, self._elements))

    def evaluate(
        self, x0: Floats, image: Indices, indices: Indices, steps: NDArray[np.int64], y: Labels | None
    ) -> tuple[Floats, Floats]:
        """The terms of up to `together` rows in bits a dimension, and the mean squared errors of x̂0: (n,) each.

        x0: (images, D). image: which of them a row is of, (n,). indices: (images,). steps: (n,). y: (images,).
        """
        count = len(steps)
        x = self._forward_noise(indices[image], steps)
        tiles = [slice(first, first + self._tile) for first in range(0, count, self._tile)]
        for some in tiles:
            self._diffuse(x0, image[some], x[some], steps[some])
        said = self._ask(x, steps, None if y is None else y[image])
        found = [self._of_tile(x0, image[some], x[some], said[some], steps[some]) for some in tiles]
        bits, squares = (np.concatenate(each) for each in zip(*found, strict=True))
        return bits, squares

    def _forward_noise(self, indices: Indices, steps: NDArray[np.int64]) -> Array:
        """The addressed noise of x_t, as `noise.forward_noise` gives it, (n, D)."""
        part, draws = slice(0, len(steps)), forward_draw(self._terms.table.timesteps[steps])
        self._noise.assign(part, np.full(len(steps), self._seed, np.uint64), indices.astype(np.uint64))
        self._noise.fill(part, draws[:, None], self._drawn[part])
        return self._drawn[part, 0, : self._elements]

    def _diffuse(self, all_x0: Floats, image: Indices, x: Array, steps: NDArray[np.int64]) -> None:
        """x ← x_t, of a tile: x holds the noise."""
        table, at = self._terms.table, steps[:, None]
        x0, noise, _ = self._scratch[:, : len(steps)]
        np.take(all_x0, image, axis=0, out=x0, mode="clip")  # this mode writes straight into `out`
        np.multiply(table.signal[at], x0, x0)
        np.multiply(table.noise[at], x, noise)
        np.add(x0, noise, x, casting="same_kind")

    def _ask(self, x: Array, steps: NDArray[np.int64], y: Labels | None) -> Array:
        """What the network says of x (n, D), for each row."""
        said, shape = self._said[: len(x)], (-1, *self._spec.image_shape)
        for first in range(0, len(x), self._batch):
            some = slice(first, first + self._batch)
            its = None if y is None else y[some]
            answer = ask(self._network, x[some].reshape(shape), self._embedding[steps[some]], its)
            said[some] = answer.reshape(len(answer), -1)
            self._progress(len(answer))
        return said

    def _of_tile(
        self, all_x0: Floats, image: Indices, x: Array, said: Array, steps: NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """What `evaluate` gives, of a tile, from what the network said of x_t."""
        if not np.isfinite(said).all():
            raise BackendError("the network gave numbers that are not finite")
        out, v = said[:, : self._elements], said[:, self._elements :]
        table, column, at = self._terms.table, self._terms.columns, steps[:, None]
        x0, scratch, error = self._scratch[:, : len(steps)]
        np.take(all_x0, image, axis=0, out=x0, mode="clip")
        np.multiply(column["a"][at], x, scratch)
        np.multiply(column["b"][at], out, error)
        denoised = np.add(scratch, error, error)
        np.clip(denoised, column["lo"][at], column["hi"][at], denoised)
        np.subtract(denoised, x0, error)
        squares = _mean_square(error)
        # The mean of p less that of q; where the output is the mean itself (g), it is taken as it is.
        np.multiply(table.k0[at], error, error)
        itself = column["g"][steps] != 0
        if itself.any():
            mean = table.k0[at] * x0 + table.kt[at] * x
            error[itself] = (out - mean)[itself]
        return self._bits(x0, error, v, steps), squares

    def _bits(self, x0: Floats, error: Floats, v: Array, steps: NDArray[np.int64]) -> Floats:
        """The terms, (n,), from the error of the mean of p, (n, D), and what the network says of the variance."""
        table, at = self._terms.table, steps[:, None]
        ln_var, squares = table.ln_var_min[at], _mean_square(error)[:, None]
        if v.shape[1]:
            ln_var, squares = ln_var + (v + 1) / 2 * (table.ln_var_max[at] - ln_var), error**2
        nats: Floats = _divergence(squares, ln_var, table.ln_var_posterior[at]).mean(axis=1)
        first = steps == 0
        if first.any():
            nats[first] = -_ln_likelihood(x0[first], error[first], ln_var[first], self._spec).mean(axis=1)
        return nats / math.log(2)


def _mean_square(values: Floats) -> Floats:
    """Of each row of (n, D), (n,)."""
    squares: Floats = np.einsum("ij,ij->i", values, values) / values.shape[1]
    return squares


class _Moments:
    """Sums over images, of a few numbers for each: what there is of them does not grow."""

    def __init__(self, strata: int) -> None:
        self.count = 0
        self._sum, self._squares = np.zeros(4 + strata), np.zeros(4 + strata)
        self._distortion = np.zeros(strata)

    def add(self, prior: Floats, bits: Floats, distortion: Floats) -> None:
        """Of n images: L_T (n,), and of their strata the bits and the squared error of x̂0, (n, strata)."""
        decoder, between = bits[:, 0], bits[:, 1:].sum(axis=1)
        values = np.column_stack([prior + between + decoder, prior, between, decoder, bits])
        self.count += len(values)
        self._sum += values.sum(axis=0)
        self._squares += (values**2).sum(axis=0)
        self._distortion += distortion.sum(axis=0)

    @cached_property
    def estimates(self) -> list[Estimate]:
        """Bound, L_T, those between, L_0, and each stratum."""
        mean = self._sum / self.count
        variance = np.maximum(self._squares / self.count - mean**2, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(variance / np.float64(self.count - 1)) if self.count > 1 else mean * math.nan
        return [Estimate(float(one), float(its)) for one, its in zip(mean, error, strict=True)]

    @property
    def distortion(self) -> Floats:
        """The mean squared error of x̂0 in each stratum."""
        return self._distortion / self.count


def likelihood(
    network: Network,
    terms: Terms,
    read: Read,
    indices: Indices,
    labels: Labels | None = None,
    *,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress = no_progress,
) -> Likelihood:
    """Evaluate the bound of the images `indices`, (N,), by the network in as many rows at a time as `batch` has.

    read: gives the images of some indices. labels: (N,) of a conditional model. seed: with an index and a timestep the
    address of the noise; with an index that of the terms. batch: None is the network's largest. progress: is told of
    rows, `terms.per_image` for each image.

    Raises SettingError where there are no images or the batch is out of range, BackendError where the network gives
    numbers that are not finite.
    """
    if not len(indices):
        raise SettingError("there are no images to evaluate")
    batch = network.max_batch if batch is None else batch
    if not 1 <= batch <= network.max_batch:
        raise SettingError(f"batch must be from 1 to {network.max_batch}, not {batch}")
    rows, moments = _Rows(network, terms, seed, batch, progress), _Moments(terms.per_image)
    low, high = network.spec.value_range
    for first in range(0, len(indices), _GROUP):
        part = indices[first : first + _GROUP]
        y = None if labels is None else labels[first : first + _GROUP]
        x0 = low + (high - low) * (read(part).reshape(len(part), -1) / EIGHT_BIT_STEPS)
        # Step by step, so that the decoder's terms are in few batches.
        steps, image = terms.chosen(seed, part).T.ravel(), np.tile(np.arange(len(part)), terms.per_image)
        found = np.empty((2, steps.size))
        for start in range(0, steps.size, rows.together):
            some = slice(start, start + rows.together)
            found[:, some] = rows.evaluate(x0, image[some], part, steps[some], y)
        bits, squares = found.reshape(2, -1, len(part)).transpose(0, 2, 1)
        moments.add(prior_bits(x0, terms.table), bits * terms.lengths, squares)
    return _summed(moments, terms)


def _summed(moments: _Moments, terms: Terms) -> Likelihood:
    """The estimates, and the curve of rate and distortion."""
    bound, prior, between, decoder, *each = moments.estimates
    low, high = terms.spec.value_range
    distortion = np.sqrt(moments.distortion) * EIGHT_BIT_STEPS / (high - low)
    sent, strata = prior.bits, []
    for i in reversed(range(len(each))):
        start, steps, bits = int(terms.starts[i]), int(terms.lengths[i]), each[i].bits
        strata.append(
            Stratum(
                first=int(terms.table.timesteps[start + steps - 1]),
                last=int(terms.table.timesteps[start]),
                steps=steps,
                bits=each[i],
                rate=sent + bits * (steps - 1) / (2 * steps),
                distortion=float(distortion[i]),
            )
        )
        sent += bits
    return Likelihood(moments.count, bound, prior, between, decoder, tuple(strata))
