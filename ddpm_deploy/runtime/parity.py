"""A network held against a reference: the same questions (teacher-forced), and its chains on the same noise.

The reference runs once, and is recorded as a `Trajectory`; any number of candidates are judged by that,
here or, as a proof that travels (`runtime.proof`), where there is no reference any more.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.protocols import Array, Labels, Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.schedule import Floats
from ddpm_deploy.spec import ChainSettings, ModelSpec
from ddpm_deploy.stages import Progress, no_progress
from ddpm_deploy.tolerances import FOREIGN_PREDICTION, MEAN_PSNR, PARITY, Parity

# Any model's, whatever its own code runs: it visits every timestep where it has as many steps.
PROOF_CHAIN: Final = ChainSettings(solver="ddpm", spacing="leading")

_SPOTS: Final = 2  # timesteps of a spot check


@dataclass(frozen=True)
class StepErrors:
    """The candidate's prediction at one timestep, at the reference's own x_t.

    rms, max: of the error over the batch. reference_rms: of the reference's prediction. limit: what its relative
    RMS is allowed.
    """

    timestep: int
    rms: float
    max: float
    reference_rms: float
    limit: float

    @property
    def relative_rms(self) -> float:
        """RMS of the error relative to the RMS of the reference's prediction.

        0 where there is no error; infinite where the reference is zero or a number is not finite.
        """
        if self.rms == 0:
            return 0.0
        ratio = self.rms / self.reference_rms if self.reference_rms else math.inf
        return ratio if math.isfinite(ratio) else math.inf

    @property
    def within(self) -> bool:
        """Whether it is within tolerance."""
        return self.relative_rms <= self.limit


@dataclass(frozen=True)
class Comparison:
    """What `judge` found of a candidate, and whether it is within `tolerance`.

    steps: teacher-forced, first step of the chain (largest t) first. psnr: of each final image of the
    free-running chains, in dB, (count,); infinite where they are equal. timesteps: T.
    """

    steps: Sequence[StepErrors]
    psnr: Floats
    tolerance: Parity
    timesteps: int

    @property
    def first_past(self) -> int | None:
        """The first timestep, in the order of the chain, whose prediction is past tolerance."""
        return next((step.timestep for step in self.steps if not step.within), None)

    @property
    def worst(self) -> StepErrors:
        """The prediction with the largest share of what it is allowed."""
        return worst(self.steps)

    @property
    def within(self) -> bool:
        """Whether every prediction and every image is within tolerance."""
        return self.first_past is None and bool((self.psnr >= self.tolerance.psnr).all())


@dataclass(frozen=True)
class Trajectory:
    """Whole chains of a reference, recorded: what it was asked on the way, what it said, where it ended.

    spec: the reference's. seed, steps: of the chains, on samples 0 .. count - 1.
    labels: (count,), 0 for an unconditional model. timesteps: (K,), those that were kept, in the order of the
    chain. x: (K, count, C, H, W), x_t. prediction: (K, count, *spec.prediction_shape), the reference's there.
    images: (count, C, H, W), the last x.
    """

    spec: ModelSpec
    seed: int
    steps: int
    labels: Labels
    timesteps: NDArray[np.int64]
    x: Array
    prediction: Array
    images: Array

    @property
    def count(self) -> int:
        """Images."""
        return len(self.images)

    def thinned(self, keep: int) -> "Trajectory":
        """The same chains with at most `keep` of the timesteps, evenly spaced, first and last among them."""
        kept = _spread(len(self.timesteps), keep)
        return replace(self, timesteps=self.timesteps[kept], x=self.x[kept], prediction=self.prediction[kept])

    def first(self, count: int) -> "Trajectory":
        """The first `count` of the chains, which do not depend on the others; all where there are no more."""
        return replace(
            self,
            labels=self.labels[:count],
            x=self.x[:, :count],
            prediction=self.prediction[:, :count],
            images=self.images[:count],
        )


def record(
    reference: Network,
    *,
    count: int,
    steps: int | None = None,
    seed: int = 0,
    keep: int = 50,
    progress: Progress = no_progress,
) -> Trajectory:
    """Run whole chains of the reference, and keep what it was asked and said at some timesteps.

    count: images, at most the reference's max_batch. steps: of the chains (None: T). keep: timesteps,
    evenly spaced, at most all of the chain's. They are kept in memory: 2·keep·count images.

    Raises SettingError where an argument is out of range.
    """
    spec = reference.spec
    labels = _labels(spec, count)
    request = _request(spec, labels, seed, steps)
    table = request.table_for(spec)
    kept = _spread(len(table), keep)
    x = np.empty((len(kept), count, *spec.image_shape), np.float32)
    prediction = np.empty((len(kept), count, *spec.prediction_shape), np.float32)
    place = {int(step): i for i, step in enumerate(kept)}
    slots = np.arange(count)
    with _running(reference, request) as chain:
        for step in range(len(table)):
            at = place.get(step)
            if at is not None:
                x[at] = chain.images(slots)
            chain.step()
            if at is not None:
                prediction[at] = reference.device.fetch(reference.memory["prediction"][:count])
            progress(1)
        images = chain.images(slots)
    timesteps = table.timesteps[kept]
    return Trajectory(spec, seed, len(table), labels, timesteps, x, prediction, images)


def judge(trajectory: Trajectory, candidate: Network, progress: Progress = no_progress) -> Comparison:
    """Ask the candidate what the reference was asked, then run its own chains on the same noise: as many of the
    chains as fit its batch.

    Raises SettingError where it is not the same kind of model.
    """
    require_comparable(trajectory.spec, candidate.spec)
    trajectory = trajectory.first(candidate.max_batch)
    errors = teacher_forced(trajectory, candidate, progress)
    spec = trajectory.spec
    request = _request(spec, trajectory.labels, trajectory.seed, trajectory.steps)
    with _running(candidate, request) as chain:
        for _ in range(trajectory.steps):
            chain.step()
            progress(1)
        images = chain.images(np.arange(trajectory.count))
    lo, hi = spec.value_range
    # Without clipping, a chain may end far outside the range of the images that the network was trained on.
    peak = max(hi - lo, float(np.ptp(trajectory.images)))
    near = psnr(images, trajectory.images, peak)
    return Comparison(errors, near, tolerance(spec, candidate.spec), spec.timesteps)


def teacher_forced(
    trajectory: Trajectory, candidate: Network, progress: Progress = no_progress
) -> list[StepErrors]:
    """The candidate's predictions at the reference's own x_t, against what the reference said there.

    As many timesteps at once as fit the candidate's batch.
    """
    _require_count(trajectory.count, candidate)
    spec, count = trajectory.spec, trajectory.count
    allowed = tolerance(spec, candidate.spec)
    embedding = spec.embedding.table(spec.timesteps)[trajectory.timesteps]
    together = candidate.max_batch // count
    errors: list[StepErrors] = []
    for first in range(0, len(trajectory.timesteps), together):
        part = slice(first, first + together)
        timesteps, wanted = trajectory.timesteps[part].tolist(), trajectory.prediction[part]
        x = trajectory.x[part].reshape(-1, *spec.image_shape)
        labels = np.tile(trajectory.labels, len(timesteps))
        got = ask(candidate, x, embedding[part].repeat(count, axis=0), labels).reshape(wanted.shape)
        for t, one, other in zip(timesteps, got, wanted, strict=True):
            errors.append(_errors(t, one, other, allowed.limit(t, spec.timesteps)))
        progress(len(timesteps))
    return errors


def _request(spec: ModelSpec, labels: Labels, seed: int, steps: int | None) -> Request:
    """Samples 0 on of a seed with these labels, by the model's own chain."""
    each = tuple(labels.tolist()) if spec.num_classes else ()
    chain = PROOF_CHAIN
    return Request(
        count=len(labels), seed=seed, steps=steps, solver=chain.solver, spacing=chain.spacing, labels=each
    ).checked(spec)


@contextmanager
def _running(network: Network, request: Request) -> Iterator[Chain]:
    """The chain of a request, started in the leading slots."""
    _require_count(request.count, network)
    chain = Chain(network)
    try:
        chain.start(np.arange(request.count), request)
        yield chain
    finally:
        chain.close()


def _require_count(count: int, network: Network) -> None:
    if not 1 <= count <= network.max_batch:
        raise SettingError(f"count must be from 1 to {network.max_batch}, not {count}")


def _labels(spec: ModelSpec, count: int) -> Labels:
    """Each label in turn, the null class too."""
    turns = Request(count=count, labels=tuple(range(spec.num_labels))).label_numbers(spec)
    return np.zeros(count, np.int64) if turns is None else turns


def _spread(length: int, keep: int) -> NDArray[np.int64]:
    """At most `keep` of the places 0 .. length - 1, evenly spaced."""
    return np.linspace(0, length - 1, min(keep, length)).round().astype(np.int64)


def worst(steps: Iterable[StepErrors]) -> StepErrors:
    """The prediction with the largest share of what it is allowed."""
    return max(steps, key=lambda step: step.relative_rms / step.limit)


def spot_check(reference: Network, candidate: Network, batch: int) -> StepErrors:
    """Compare two networks on noise at a few timesteps, and give the worst: seconds, not minutes."""
    spec = reference.spec
    allowed = tolerance(spec, candidate.spec)
    table = spec.embedding.table(spec.timesteps)
    rng = np.random.default_rng(0)
    checks = []
    for t in np.unique(_spread(spec.timesteps, _SPOTS)).tolist():
        x = rng.standard_normal((batch, *spec.image_shape), np.float32)
        got, wanted = (
            ask(network, x, table[[t] * batch], _labels(spec, batch)) for network in (candidate, reference)
        )
        checks.append(_errors(t, got, wanted, allowed.limit(t, spec.timesteps)))
    return worst(checks)


def require_comparable(reference: ModelSpec, candidate: ModelSpec) -> None:
    """Raise SettingError unless both answer the same question: same images, process and embedding."""
    for name in (
        "image_shape",
        "timesteps",
        "schedule",
        "prediction",
        "embedding",
        "value_range",
        "variance",
        "num_classes",
        "null_class",
    ):
        mine, theirs = getattr(reference, name), getattr(candidate, name)
        if mine != theirs:
            raise SettingError(
                f"the two models differ in {name} ({mine} and {theirs}): they cannot be compared"
            )


def tolerance(reference: ModelSpec, candidate: ModelSpec) -> Parity:
    """What the coarser of the two precisions is allowed."""
    precision = max(reference.precision, candidate.precision, key=list(PARITY).index)
    allowed = PARITY[precision]
    if precision == "fp32" and reference.network is None:
        allowed = replace(allowed, prediction=FOREIGN_PREDICTION)
    if precision == "fp32" and reference.prediction == "mean":
        allowed = replace(allowed, psnr=MEAN_PSNR)
    return allowed


def psnr(images: Array, wanted: Array, peak: float) -> Floats:
    """Peak signal-to-noise ratio of each image, (N,), in dB; infinite where equal.

    peak: the width of the range of values, 2 for [-1, 1].
    """
    difference = (images.astype(np.float64) - wanted).reshape(len(images), -1)
    with np.errstate(divide="ignore"):
        result: Floats = 10 * np.log10(peak**2 / (difference**2).mean(axis=1))
    return result


def _errors(timestep: int, prediction: Array, wanted: Array, limit: float) -> StepErrors:
    """One prediction against another, both (B, C, H, W)."""
    reference = wanted.astype(np.float64)
    error = prediction - reference
    return StepErrors(timestep, _rms(error), float(np.abs(error).max()), _rms(reference), limit)


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


@dataclass(frozen=True)
class RangeErrors:
    """Errors over a range of t, `top` down to `bottom`; `within`: whether each is allowed."""

    top: int
    bottom: int
    relative_rms: float
    within: bool


def summarise(comparison: Comparison) -> list[RangeErrors]:
    """Errors by range of t, in ten ranges from the largest t down, the last of them split at T/100."""
    shares = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.01, 0.0]
    edges = [round(comparison.timesteps * share) for share in shares]
    rows = []
    for top, bottom in itertools.pairwise(edges):
        inside = [step for step in comparison.steps if bottom <= step.timestep < top]
        if inside:
            largest = max(step.relative_rms for step in inside)
            rows.append(RangeErrors(top - 1, bottom, largest, all(step.within for step in inside)))
    return rows
