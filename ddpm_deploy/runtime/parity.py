"""Two Denoisers compared: the same question to both (teacher-forced), and their chains on the same noise."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.denoiser import Array, Denoiser
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.tolerances import PARITY, Parity

_SPOTS: Final = 8  # timesteps of a spot check

Progress = Callable[[int], None]  # how many steps more are done


@dataclass(frozen=True)
class SpotCheck:
    """The largest relative RMS error of a quick comparison, and where it was."""

    relative_rms: float
    timestep: int
    batch: int


@dataclass(frozen=True)
class StepErrors:
    """The candidate's prediction at one timestep, at the reference's own x_t.

    rms, max: of the error over the batch. reference_rms: of the reference's prediction.
    """

    timestep: int
    rms: float
    max: float
    reference_rms: float

    @property
    def relative_rms(self) -> float:
        """RMS of the error relative to the RMS of the reference's prediction.

        0 where there is no error; infinite where the reference is zero or a number is not finite.
        """
        if self.rms == 0:
            return 0.0
        ratio = self.rms / self.reference_rms if self.reference_rms else math.inf
        return ratio if math.isfinite(ratio) else math.inf


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, and whether it is within `tolerance`.

    steps: teacher-forced, first step of the chain (largest t) first. psnr: of each final image of the
    free-running chains, in dB, (count,); infinite where they are equal.
    """

    steps: Sequence[StepErrors]
    psnr: NDArray[np.float64]
    tolerance: Parity

    @property
    def first_past(self) -> int | None:
        """The first timestep, in the order of the chain, whose prediction is past tolerance."""
        return next((s.timestep for s in self.steps if s.relative_rms > self.tolerance.prediction), None)

    @property
    def within(self) -> bool:
        """Whether every prediction and every image is within tolerance."""
        return self.first_past is None and bool((self.psnr >= self.tolerance.psnr).all())


def spot_check(reference: Denoiser, candidate: Denoiser, batches: Sequence[int]) -> SpotCheck:
    """Compare two networks on noise at a few timesteps for each batch size: seconds, not minutes."""
    spec = reference.spec
    table = spec.embedding.table(spec.timesteps)
    rng = np.random.default_rng(0)
    worst = SpotCheck(0.0, 0, batches[0])
    for batch in batches:
        for t in np.unique(np.linspace(0, spec.timesteps - 1, _SPOTS).astype(int)):
            reference.x[:batch] = rng.standard_normal((batch, *spec.image_shape), np.float32)
            reference.temb[:batch] = table[t]
            reference.run(batch)
            errors = _forced(reference, candidate, batch, int(t))
            if errors.relative_rms > worst.relative_rms:
                worst = SpotCheck(errors.relative_rms, int(t), batch)
    return worst


def compare(
    reference: Denoiser,
    candidate: Denoiser,
    *,
    count: int,
    steps: int | None = None,
    seed: int = 0,
    forced: int = 50,
    progress: Progress | None = None,
) -> Comparison:
    """Run both chains whole on the same noise, and the candidate on the reference's x_t on the way.

    count: images, at most either's max_batch. steps: of the chains (None: T). forced: timesteps that
    are compared teacher-forced, evenly spaced, at most all of the chain's.

    Raises SettingError where the two are not the same kind of model, or an argument is out of range.
    """
    require_comparable(reference.spec, candidate.spec)
    if not 1 <= count <= min(reference.max_batch, candidate.max_batch):
        raise SettingError(
            f"count must be from 1 to {min(reference.max_batch, candidate.max_batch)}, not {count}"
        )
    table = reference.spec.step_table(steps)
    compared = set(np.linspace(0, len(table) - 1, min(forced, len(table))).round().astype(int).tolist())

    def run(denoiser: Denoiser, visit: Callable[[int], None]) -> Array:
        chain = Chain(denoiser)
        chain.start(
            slice(0, count), table, np.full(count, seed, np.uint64), np.arange(count, dtype=np.uint64)
        )
        for step in range(len(table)):
            batch = chain.predict()
            visit(step)
            chain.update(batch)
            if progress:
                progress(1)
        return chain.x[:count].copy()

    errors: list[StepErrors] = []

    def visit(step: int) -> None:
        if step in compared:
            errors.append(_forced(reference, candidate, count, int(table.timesteps[step])))

    wanted = run(reference, visit)
    got = run(candidate, lambda step: None)
    lo, hi = reference.spec.value_range
    return Comparison(errors, psnr(got, wanted, hi - lo), tolerance(reference.spec, candidate.spec))


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
    ):
        mine, theirs = getattr(reference, name), getattr(candidate, name)
        if mine != theirs:
            raise SettingError(
                f"the two models differ in {name} ({mine} and {theirs}): they cannot be compared"
            )


def tolerance(reference: ModelSpec, candidate: ModelSpec) -> Parity:
    """What the coarser of the two precisions is allowed."""
    return PARITY[max(reference.precision, candidate.precision, key=list(PARITY).index)]


def psnr(images: Array, wanted: Array, peak: float) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image, (N,), in dB; infinite where equal.

    peak: the width of the range of values, 2 for [-1, 1].
    """
    difference = (images.astype(np.float64) - wanted).reshape(len(images), -1)
    with np.errstate(divide="ignore"):
        result: NDArray[np.float64] = 10 * np.log10(peak**2 / (difference**2).mean(axis=1))
    return result


def _forced(reference: Denoiser, candidate: Denoiser, batch: int, timestep: int) -> StepErrors:
    """Ask the candidate what the reference has just answered."""
    candidate.x[:batch] = reference.x[:batch]
    candidate.temb[:batch] = reference.temb[:batch]
    candidate.run(batch)
    wanted = reference.prediction[:batch].astype(np.float64)
    error = candidate.prediction[:batch] - wanted
    return StepErrors(timestep, _rms(error), float(np.abs(error).max()), _rms(wanted))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def summarise(steps: Sequence[StepErrors], timesteps: int) -> list[dict[str, Any]]:
    """Errors by range of t, in ten ranges from the largest t down: what a table shows."""
    edges = [round(timesteps * k / 10) for k in range(10, -1, -1)]
    rows = []
    for top, bottom in itertools.pairwise(edges):
        inside = [s for s in steps if bottom <= s.timestep < top]
        if inside:
            relative = [s.relative_rms for s in inside]
            rows.append(
                {
                    "from": top - 1,
                    "to": bottom,
                    "max": max(s.max for s in inside),
                    "relative_rms": max(relative),
                }
            )
    return rows
