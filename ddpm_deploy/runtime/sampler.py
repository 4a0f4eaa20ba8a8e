"""Sampler: the public face of the runtime."""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES, require_intact
from ddpm_deploy.errors import ArtefactError, BackendError, OwnershipError, SettingError
from ddpm_deploy.files import quoted, show
from ddpm_deploy.runtime.chain import Chain, NoiseSource
from ddpm_deploy.runtime.denoiser import Array, Denoiser, Labels
from ddpm_deploy.solvers import Solver, StepTable
from ddpm_deploy.spacings import Spacing
from ddpm_deploy.spec import DEFAULT_CHAIN, ChainSettings, ModelSpec

_MAX_TABLES: Final = 16
Callback = Callable[[int, Array, Array], None]
Noise = Callable[[int], Array]
Label = int | str
_LabelsOf = Callable[[slice, NDArray[np.uint64]], Labels | None]


def load_denoiser(
    path: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
    spec: ModelSpec | None = None,
) -> Denoiser:
    """The backend of an exported model, by the suffix of its name. Arguments as of `Sampler.load`."""
    from ddpm_deploy.runtime.ort import OrtDenoiser

    if device not in (None, "cpu"):
        raise SettingError(f"device {device!r} is not supported by this version: leave it out, or say 'cpu'")
    if threads is not None and threads < 1:
        raise SettingError(f"threads must be 1 or more, not {threads}")
    if max_batch is not None and max_batch < 1:
        raise SettingError(f"max_batch must be 1 or more, not {max_batch}")
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        raise ArtefactError(f"{show(path)} is a checkpoint: export it first, with ddpm-export {quoted(path)}")
    return OrtDenoiser(path, threads=threads, max_batch=max_batch, spec=spec)


class Sampler:
    """Draws images from a model by running its whole reverse Markov chain.

        with Sampler.load("model.onnx") as sampler:
            images = sampler.sample(16, seed=0)  # float32 (16, C, H, W) in [-1, 1]

    The noise of a sample depends on its seed and index alone, so the same image comes out whatever
    batch, process or machine draws it. A Sampler serves one call at a time: another thread's call
    during one raises OwnershipError.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self._chain = Chain(denoiser)
        self._tables: dict[ChainSettings, StepTable] = {}
        self._busy = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        max_batch: int | None = None,
        spec: ModelSpec | None = None,
    ) -> Self:
        """Load an exported model; the suffix of its name chooses the backend.

        path: an .onnx file. device: "cpu". threads: of the backend's pool (None: one a core).
        max_batch: images in flight at once (None: 64, fewer for images over 16×16). spec: in place of
        the file's own.

        Raises ArtefactError, SpecError, DependencyError or SettingError.
        """
        require_intact(Path(path))
        return cls(load_denoiser(Path(path), device=device, threads=threads, max_batch=max_batch, spec=spec))

    @property
    def spec(self) -> ModelSpec:
        """What the model says of itself."""
        return self.denoiser.spec

    def table(self, settings: ChainSettings = DEFAULT_CHAIN) -> StepTable:
        """The rows that `sample` runs for these settings."""
        if settings not in self._tables:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            self._tables[settings] = self.spec.step_table(settings)
        return self._tables[settings]

    def sample(
        self,
        count: int,
        *,
        steps: int | None = None,
        solver: Solver = "ddpm",
        eta: float | None = None,
        spacing: Spacing = "leading",
        seed: int | None = None,
        first_index: int = 0,
        labels: Label | Sequence[Label] | Labels | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Array:
        """Draw `count` images: float32 (count, C, H, W) in the model's value range.

        steps: of the chain, 1 .. T (None: all T). solver: "ddpm", "ddim" or "dpmpp-2m". eta: of ddim, 0 to 1
            (None: 0). spacing: of the timesteps: "leading", "trailing", "linspace" or "openai".
        seed: 0 .. 2⁶⁴ - 1 (None: a fresh one). Sample i of the call has sample index first_index + i.
        labels: of a class-conditional model, by name or number: one for all, or one for each sample. None:
            each class in turn, by sample index.
        noise: `noise(draw) -> (count, C, H, W)` in place of the addressed noise, draw 0 for x_T and
            t + 1 for the step from t. A count over the batch asks again for each part of it, so it
            must give the same numbers for the same draw.
        callback: called after each step with (step, x, x̂0), step from 0, the two (k, C, H, W) views that
            the next step overwrites. Raising in it stops the run cleanly.

        Raises SettingError for an argument out of range, BackendError where the backend fails or the
        network gives numbers that are not finite, OwnershipError where the Sampler is already in use.
        """
        parts = self.iter_samples(
            count,
            steps=steps,
            solver=solver,
            eta=eta,
            spacing=spacing,
            seed=seed,
            first_index=first_index,
            labels=labels,
            noise=noise,
            callback=callback,
        )
        try:
            images = np.empty((count, *self.spec.image_shape), np.float32)
        except (MemoryError, ValueError) as error:
            raise SettingError(f"{count} images do not fit in memory: use iter_samples") from error
        done = 0
        for part in parts:
            images[done : done + len(part)] = part
            done += len(part)
        return images

    def iter_samples(
        self,
        count: int,
        *,
        steps: int | None = None,
        solver: Solver = "ddpm",
        eta: float | None = None,
        spacing: Spacing = "leading",
        seed: int | None = None,
        first_index: int = 0,
        labels: Label | Sequence[Label] | Labels | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Iterator[Array]:
        """As `sample`, giving the images in order as batches finish, for counts that don't fit in memory.

        Arguments are checked at once; the work happens as the result is read.
        """
        for name, value in (("count", count), ("seed", seed), ("first_index", first_index), ("steps", steps)):
            if value is not None and not isinstance(value, int | np.integer):
                raise SettingError(f"{name} must be a whole number, not {value!r}")
        if count < 1:
            raise SettingError(f"count must be 1 or more, not {count}")
        seed = secrets.randbits(64) if seed is None else seed
        if not 0 <= seed < 2**64:
            raise SettingError(f"seed must be from 0 to 2^64 - 1, not {seed}")
        if not 0 <= first_index <= 2**64 - count:
            raise SettingError(f"first_index must be from 0 to 2^64 - count, not {first_index}")
        table = self.table(ChainSettings(steps=steps, solver=solver, eta=eta, spacing=spacing))
        return self._run(count, table, seed, first_index, self._labels(labels, count), noise, callback)

    def _labels(self, labels: Label | Sequence[Label] | Labels | None, count: int) -> _LabelsOf:
        """What gives the labels of samples by their place in the call and their index; None: there are none."""
        spec = self.spec
        if labels is None:
            classes = np.uint64(spec.num_classes)
            return lambda part, indices: (indices % classes).astype(np.int64) if classes else None
        if isinstance(labels, int | np.integer | str):
            label = spec.label(labels)
            return lambda part, indices: np.full(len(indices), label)
        each = np.array([spec.label(label) for label in labels])
        if len(each) != count:
            raise SettingError(
                f"{len(each)} labels for {count} images: give one by itself, or a sequence with one for each"
            )
        return lambda part, indices: each[part]

    def _run(
        self,
        count: int,
        table: StepTable,
        seed: int,
        first_index: int,
        labels_of: _LabelsOf,
        noise: Noise | None,
        callback: Callback | None,
    ) -> Iterator[Array]:
        with self._owned():
            for done in range(0, count, self.denoiser.max_batch):
                batch = min(self.denoiser.max_batch, count - done)
                indices = np.uint64(first_index + done) + np.arange(batch, dtype=np.uint64)
                chain = (
                    self._chain
                    if noise is None
                    else Chain(self.denoiser, _GivenNoise(noise, self.spec.image_shape, count, done))
                )
                chain.start(
                    slice(0, batch),
                    table,
                    np.full(batch, seed, np.uint64),
                    indices,
                    labels_of(slice(done, done + batch), indices),
                )
                for step in range(len(table)):
                    chain.step()
                    if callback is not None:
                        callback(step, chain.x[:batch], chain.x0[:batch])
                images = chain.x[:batch].copy()
                if not np.isfinite(images).all():
                    raise BackendError(
                        "the network gave numbers that are not finite, so the images are worthless: "
                        "check the model with ddpm-verify"
                    )
                yield images

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the Sampler for one call."""
        if not self._busy.acquire(blocking=False):
            raise OwnershipError("this Sampler is in use by another call: load one Sampler for each thread")
        try:
            yield
        finally:
            self._chain.clear()
            self._busy.release()

    def close(self) -> None:
        """Free the backend. The Sampler cannot be used afterwards; closing again does nothing."""
        self.denoiser.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _GivenNoise(NoiseSource):
    """A caller's noise for the part of the call's samples that starts at `done`."""

    lookahead = 1

    def __init__(self, noise: Noise, image_shape: tuple[int, ...], count: int, done: int) -> None:
        self._noise = noise
        self._shape = (count, *image_shape)
        self._done = done

    def assign(self, slots: slice, seeds: NDArray[np.uint64], indices: NDArray[np.uint64]) -> None:
        """Nothing to note: the caller's noise knows only draws."""

    def fill(self, draws: NDArray[np.int64]) -> Array:
        """The caller's noise for this draw, the same for all slots, as they started together."""
        given = np.asarray(self._noise(int(draws[0, 0])), np.float32)
        if given.shape != self._shape:
            raise SettingError(f"noise(draw) gave the shape {given.shape}, and {self._shape} is needed")
        batch = draws.shape[1]
        return given[self._done : self._done + batch].reshape(1, batch, -1)
