"""Sampler: the public face of the runtime."""

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.artefact import require_intact
from ddpm_deploy.errors import BackendError, OwnershipError, SettingError
from ddpm_deploy.runtime.backend import load_denoiser
from ddpm_deploy.runtime.chain import Chain, NoiseSource
from ddpm_deploy.runtime.denoiser import Array, Denoiser, Labels
from ddpm_deploy.runtime.device_chain import DeviceChain
from ddpm_deploy.runtime.guidance import GuidedDenoiser
from ddpm_deploy.runtime.network import Mirrored
from ddpm_deploy.runtime.snapshot import Batch, Snapshot
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import DEFAULT_CHAIN, ChainSettings, ModelSpec
from ddpm_deploy.words import Solver, Spacing

_MAX_TABLES: Final = 16
_MOST_GUIDANCE: Final = 1000  # of either sign; useful are some 1 to 10
Callback = Callable[[int, Array, Array], None]
Noise = Callable[[int], Array]
Label = int | str
Guidance = float | Sequence[float] | NDArray[Any] | None
_LabelsOf = Callable[[slice, NDArray[np.uint64]], Labels | None]


class SampleSettings(TypedDict, total=False):
    """What to draw, as `Sampler.sample` says of each."""

    steps: int | None
    solver: Solver
    eta: float | None
    spacing: Spacing
    table: StepTable | None
    seed: int | None
    first_index: int
    labels: Label | Sequence[Label] | Labels | None
    guidance: Guidance
    noise: Noise | None


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
        self._chain = DeviceChain(denoiser.network) if isinstance(denoiser, Mirrored) else Chain(denoiser)
        self._guided_chain: Chain | None = None
        self._under_way: tuple[Batch, Chain | DeviceChain, int] | None = None  # and the steps that are done
        self._tables: dict[ChainSettings, StepTable] = {}
        self._busy = threading.Lock()
        self._thread = 0  # that takes the steps
        self._process = os.getpid()

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

        path: an .onnx file or an engine (.plan). device: "cpu" or "cuda" (None: an engine on the GPU, an .onnx on the
        CPU); with "cuda" an .onnx file's engine is built here, once: minutes the first time, seconds ever after; or,
        where there is no TensorRT, ONNX Runtime runs it.
        threads: of the CPU's pool (None: one a core). max_batch: images in flight at once (None: on the CPU 64, fewer
        for images over 16×16; on the GPU what the engine was built for). spec: in place of the file's own.

        Raises ArtefactError, SpecError, DependencyError, BackendError or SettingError.
        """
        require_intact(Path(path))
        return cls(load_denoiser(Path(path), device=device, threads=threads, max_batch=max_batch, spec=spec))

    @property
    def spec(self) -> ModelSpec:
        """What the model says of itself."""
        return self.denoiser.spec

    def max_batch(self, guidance: Guidance = None) -> int:
        """Images in flight at once: half as many with guidance, which takes two rows of the batch for each."""
        return self.denoiser.max_batch if guidance is None else self.denoiser.max_batch // 2

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
        table: StepTable | None = None,
        seed: int | None = None,
        first_index: int = 0,
        labels: Label | Sequence[Label] | Labels | None = None,
        guidance: Guidance = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Array:
        """Draw `count` images: float32 (count, C, H, W) in the model's value range.

        steps: of the chain, 1 .. T (None: all T). solver: "ddpm", "ddim" or "dpmpp-2m" ("ddpm"). eta: of ddim,
            0 to 1 (None: 0). spacing: of the timesteps: "leading", "trailing", "linspace" or "openai" ("leading").
        table: a StepTable of your own in place of these four, as of `solvers.ddim(…, stride=…)`.
        seed: 0 .. 2⁶⁴ - 1 (None: a fresh one). Sample i of the call has sample index first_index + i (0).
        labels: of a class-conditional model, by name or number: one for all, or one for each sample. None:
            each class in turn, by sample index.
        guidance: scale of classifier-free guidance, for a model with a null class: one for all, or one for each
            sample; 1 is the plain model (None: without). It halves the images in flight.
        noise: `noise(draw) -> (count, C, H, W)` in place of the addressed noise, draw 0 for x_T and
            t + 1 for the step from t. A count over the batch asks again for each part of it, so it
            must give the same numbers for the same draw.
        callback: called after each step with (step, x, x̂0), step from 0, the two (k, C, H, W) views that
            the next step overwrites. Raising in it stops the run cleanly. Where it has a method `wants(step)`, it is
            called for the steps of which that says True alone, and the others cost no copy from a GPU.

        Raises SettingError for an argument out of range, BackendError where the backend fails or the
        network gives numbers that are not finite, OwnershipError where the Sampler is already in use.
        """
        draw = self._draw(
            count,
            steps=steps,
            solver=solver,
            eta=eta,
            spacing=spacing,
            table=table,
            seed=seed,
            first_index=first_index,
            labels=labels,
            guidance=guidance,
            noise=noise,
        )
        try:
            images = np.empty((count, *self.spec.image_shape), np.float32)
        except (MemoryError, ValueError) as error:
            raise SettingError(f"{count} images do not fit in memory: use iter_samples") from error
        done = 0
        for part in self._images(draw, callback):
            images[done : done + len(part)] = part
            done += len(part)
        return images

    def sample_on_device(self, count: int, **settings: Unpack[SampleSettings]) -> Any:
        """As `sample`, of one batch, leaving the images on the GPU: float32 (count, C, H, W).

        The result is memory of this Sampler's, which its next call overwrites. It is a CuPy array, which PyTorch and
        others take over without a copy (`torch.from_dlpack`, `__cuda_array_interface__`).

        Raises also SettingError where the model does not run on a GPU, the count is more than `max_batch`, or guidance
        or noise are given, which are the host's.
        """
        draw = self._draw(count, **settings)
        chain = self._chain
        if not isinstance(chain, DeviceChain):
            raise SettingError(f"this model runs on {self.denoiser.device}, and not on a GPU: use sample")
        if draw.guidance is not None or draw.noise is not None:
            raise SettingError("guidance and noise of your own are the host's: use sample")
        if count > self.max_batch():
            raise SettingError(f"{count} images are more than one batch: choose 1 to {self.max_batch()}")
        with self._owned():
            (batch,) = draw.batches(count)
            self._run(batch, self._started(draw, batch), 0, None)
            _require_finite(chain.finite(count))
            return chain.result(count)

    def iter_samples(
        self, count: int, *, callback: Callback | None = None, **settings: Unpack[SampleSettings]
    ) -> Generator[Array, None, None]:
        """As `sample`, giving the images in order as batches finish, for counts that don't fit in memory.

        Arguments are checked at once; the work happens as the result is read.
        """
        return self._images(self._draw(count, **settings), callback)

    def _images(self, draw: "_Draw", callback: Callback | None) -> Generator[Array, None, None]:
        with self._owned():
            for batch in draw.batches(self.max_batch(draw.guidance)):
                yield self._finished(batch, self._started(draw, batch), 0, callback)

    def stream(
        self, count: int, **settings: Unpack[SampleSettings]
    ) -> Generator[tuple[int, Array, Array], None, None]:
        """One batch step by step: yields (step, x_t, x̂0) after each, step from 0, as copies (count, C, H, W).

        The x of the last step is what `sample` gives. count: at most `max_batch`. The Sampler is in use until
        the last step was read, or the iterator is closed.
        """
        draw = self._draw(count, **settings)
        most = self.max_batch(draw.guidance)
        if count > most:
            raise SettingError(
                f"{count} images are more than one batch, which a stream is of: choose 1 to {most}"
            )
        return self._copies(draw)

    def _copies(self, draw: "_Draw") -> Generator[tuple[int, Array, Array], None, None]:
        with self._owned():
            (batch,) = draw.batches(draw.count)
            chain, part = self._started(draw, batch), slice(0, batch.count)
            for step in self._steps(batch, chain, 0):
                yield step, chain.x[part].copy(), chain.x0[part].copy()
            _require_finite(bool(np.isfinite(chain.x[part]).all()))

    def snapshot(self) -> Snapshot:
        """The batch that is under way, as it is after its last step: ask in a callback, or between a stream's steps.

        Raises SettingError where none is, or its noise is a caller's own, which a file cannot hold, OwnershipError
        where another thread takes the steps.
        """
        if self._under_way is None:
            raise SettingError(
                "no chain is under way: ask in the callback of sample, or while reading a stream"
            )
        batch, chain, step = self._under_way
        if self._thread != threading.get_ident():
            raise OwnershipError("another thread runs this Sampler: ask it for the snapshot, in its callback")
        if isinstance(chain.noise, _GivenNoise):
            raise SettingError("a chain on noise of the caller's own cannot be resumed: leave noise out")
        part = slice(0, batch.count)
        return Snapshot(batch, self.spec.provenance.digest, step, chain.x[part].copy(), chain.x0[part].copy())

    def resume(self, snapshot: Snapshot, *, callback: Callback | None = None) -> Array:
        """Go on from a snapshot to its images, (k, C, H, W), on whatever backend this model runs.

        callback: as of `sample`; its first step is the snapshot's.

        Raises SettingError where it is of another model, or of a larger batch than this Sampler's.
        """
        batch = snapshot.batch
        self.require_fits(snapshot)
        if batch.count > self.max_batch(batch.guidance):
            raise SettingError(
                f"the snapshot has {batch.count} images in flight: load the model with max_batch "
                f"{batch.count if batch.guidance is None else 2 * batch.count}"
            )
        with self._owned():
            chain = self._chain_of(batch)
            chain.restore(
                slice(0, batch.count),
                batch.table,
                snapshot.step,
                snapshot.x,
                snapshot.x0,
                *batch.addresses(),
                batch.labels,
            )
            return self._finished(batch, chain, snapshot.step, callback)

    def require_fits(self, snapshot: Snapshot) -> None:
        """Raise SettingError unless a snapshot is of this model, in whatever precision, and of a table of its own."""
        snapshot.require_fits(self.spec)
        settings, rows = snapshot.batch.settings, snapshot.batch.table.rows
        if settings is None:
            return
        mine = self.table(settings).rows
        # Another machine's logarithms may differ in the last place.
        if mine.shape != rows.shape or not np.allclose(mine, rows, rtol=1e-6, atol=1e-12):
            raise SettingError(
                "this snapshot is of another table: its rows are not those of its settings on this model's schedule"
            )

    def _draw(
        self,
        count: int,
        *,
        steps: int | None = None,
        solver: Solver = "ddpm",
        eta: float | None = None,
        spacing: Spacing = "leading",
        table: StepTable | None = None,
        seed: int | None = None,
        first_index: int = 0,
        labels: Label | Sequence[Label] | Labels | None = None,
        guidance: Guidance = None,
        noise: Noise | None = None,
    ) -> "_Draw":
        """What a call asks for. Raises SettingError where it is out of range."""
        count, first_index = _whole("count", count), _whole("first_index", first_index)
        seed = secrets.randbits(64) if seed is None else _whole("seed", seed)
        if count < 1:
            raise SettingError(f"count must be 1 or more, not {count}")
        if not 0 <= seed < 2**64:
            raise SettingError(f"seed must be from 0 to 2^64 - 1, not {seed}")
        if not 0 <= first_index <= 2**64 - count:
            raise SettingError(f"first_index must be from 0 to 2^64 - count, not {first_index}")
        settings = ChainSettings(
            steps=None if steps is None else _whole("steps", steps),
            solver=_word("solver", solver),  # type: ignore[arg-type]
            eta=None if eta is None else _number("eta", eta),
            spacing=_word("spacing", spacing),  # type: ignore[arg-type]
        )
        if table is not None and not isinstance(table, StepTable):
            raise SettingError(
                f"table must be a StepTable, as solvers.ddim makes one, not {type(table).__name__}"
            )
        if table is not None and settings != DEFAULT_CHAIN:
            raise SettingError("a table is instead of steps, solver, eta and spacing: leave these out")
        scales = None if guidance is None else _scales(guidance, count)
        if scales is not None:
            self._guided()  # refuses a model that has no guidance
        return _Draw(
            count,
            self.table(settings) if table is None else table,
            settings if table is None else None,
            seed,
            first_index,
            self._labels(labels, count),
            scales,
            noise,
        )

    def _labels(self, labels: Label | Sequence[Label] | Labels | None, count: int) -> _LabelsOf:
        """What gives the labels of samples by their place in the call and their index; None: there are none."""
        spec = self.spec
        if labels is None:
            classes = np.uint64(spec.num_classes)
            return lambda part, indices: (indices % classes).astype(np.int64) if classes else None
        if isinstance(labels, int | np.integer | str):
            label = spec.label(labels)
            return lambda part, indices: np.full(len(indices), label)
        try:
            each = np.array([spec.label(label) for label in labels])
        except TypeError as error:
            raise SettingError(
                f"labels must be one name or number, or a sequence of them, not {labels!r}"
            ) from error
        if len(each) != count:
            raise SettingError(
                f"{len(each)} labels for {count} images: give one by itself, or a sequence with one for each"
            )
        return lambda part, indices: each[part]

    def _guided(self) -> Chain:
        """The chain with guidance, made when it is first asked for."""
        if self._guided_chain is None:
            self._guided_chain = Chain(GuidedDenoiser(self.denoiser))
        return self._guided_chain

    def _chain_of(self, batch: Batch) -> Chain | DeviceChain:
        """The chain that the batch runs in, the scales of its guidance set."""
        if batch.guidance is None:
            return self._chain
        chain = self._guided()
        assert isinstance(chain.denoiser, GuidedDenoiser)
        chain.denoiser.scale[: batch.count] = batch.guidance
        return chain

    def _started(self, draw: "_Draw", batch: Batch) -> Chain | DeviceChain:
        chain = self._chain_of(batch)
        if draw.noise is not None:  # which is the host's
            done = batch.first_index - draw.first_index
            denoiser = chain.denoiser if isinstance(chain, Chain) else self.denoiser
            chain = Chain(denoiser, _GivenNoise(draw.noise, self.spec.image_shape, draw.count, done))
        chain.start(slice(0, batch.count), batch.table, *batch.addresses(), batch.labels)
        return chain

    def _steps(self, batch: Batch, chain: Chain | DeviceChain, first: int) -> Iterator[int]:
        """Step by step to the end: the number of each step that was taken."""
        for step in range(first, len(batch.table)):
            self._under_way, self._thread = None, threading.get_ident()
            chain.step()
            self._under_way = batch, chain, step + 1
            yield step

    def _finished(
        self, batch: Batch, chain: Chain | DeviceChain, first: int, callback: Callback | None
    ) -> Array:
        """The images of a batch, from step `first` of its chain."""
        self._run(batch, chain, first, callback)
        images = chain.x[: batch.count].copy()
        _require_finite(bool(np.isfinite(images).all()))
        return images

    def _run(self, batch: Batch, chain: Chain | DeviceChain, first: int, callback: Callback | None) -> None:
        """To the end; a callback is told of a step while a device takes the next."""
        if callback is None:
            deque(self._steps(batch, chain, first), maxlen=0)
            return
        wants: Callable[[int], bool] = getattr(callback, "wants", lambda step: True)
        seen: deque[tuple[int, Callable[[], tuple[Array, Array]]]] = deque()
        for step in self._steps(batch, chain, first):
            if wants(step):
                seen.append((step, chain.watch(batch.count)))
            if seen and step >= seen[0][0] + chain.lag:
                number, arrays = seen.popleft()
                callback(number, *arrays())
        for number, arrays in seen:
            callback(number, *arrays())

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the Sampler for one call."""
        self._require_process()
        if not self._busy.acquire(blocking=False):
            raise OwnershipError("this Sampler is in use by another call: load one Sampler for each thread")
        try:
            yield
        finally:
            self._under_way = None
            try:
                self._chain.clear()
                if self._guided_chain:
                    self._guided_chain.clear()
            finally:
                self._busy.release()

    def _require_process(self) -> None:
        if os.getpid() != self._process and isinstance(self._chain, DeviceChain):
            raise OwnershipError(
                "this process was forked after the model was loaded, and a GPU's memory is not shared so: load the "
                'model in the child, or start it with multiprocessing\'s "spawn"'
            )

    def close(self) -> None:
        """Free the backend. The Sampler cannot be used afterwards; closing again does nothing."""
        self._chain.close()
        self.denoiser.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Draw:
    """What one call asks for: the fields of `Batch`, of all of its samples."""

    count: int
    table: StepTable
    settings: ChainSettings | None
    seed: int
    first_index: int
    labels: _LabelsOf
    guidance: Array | None
    noise: Noise | None

    def batches(self, most: int) -> Iterator[Batch]:
        """The samples in order, at most so many at a time."""
        for done in range(0, self.count, most):
            part = slice(done, min(done + most, self.count))
            batch = Batch(
                part.stop - done,
                self.table,
                self.settings,
                self.seed,
                self.first_index + done,
                guidance=None if self.guidance is None else self.guidance[part],
            )
            yield replace(batch, labels=self.labels(part, batch.addresses()[1]))


def _require_finite(finite: bool) -> None:
    if not finite:
        raise BackendError(
            "the network gave numbers that are not finite, so the images are worthless: "
            "check the model with ddpm-verify"
        )


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer):
        raise SettingError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float | np.integer | np.floating):
        raise SettingError(f"{name} must be a number, not {value!r}")
    return float(value)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{name} must be a name, not {value!r}")
    return value


def _scales(guidance: float | Sequence[float] | NDArray[Any], count: int) -> Array:
    """(count,), of one for all or one for each."""
    try:
        given = np.asarray(guidance, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingError(f"guidance must be a number, not {guidance!r}") from error
    if given.shape not in ((), (count,)):
        raise SettingError(f"guidance must be one number, or one for each of the {count} images")
    if not (abs(given) <= _MOST_GUIDANCE).all():
        raise SettingError(f"guidance must be from {-_MOST_GUIDANCE} to {_MOST_GUIDANCE}, not {guidance}")
    return np.full(count, given, np.float32)


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
