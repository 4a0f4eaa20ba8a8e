"""Sampler: the public face of the runtime."""

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack

import numpy as np

from ddpm_deploy.errors import OwnershipError, SettingError, first_line, plural
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.chain import Chain, Noise, noise_of_part
from ddpm_deploy.runtime.network import not_finite, require_process
from ddpm_deploy.runtime.protocols import Array, Look, Network, Slots
from ddpm_deploy.runtime.request import Keywords, Request, make_request
from ddpm_deploy.runtime.snapshot import Snapshot
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Backend, RunPrecision

Callback = Callable[[int, Array, Array], None]


class EachStep:
    """A callback that is told of every step that was taken, and looks at none: what moves a progress bar."""

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell

    def passed(self, step: int) -> None:
        """A step was taken."""
        self._tell()

    def wants(self, step: int) -> bool:
        """Nothing needs to be seen."""
        return False

    def __call__(self, step: int, x: Array, x0: Array) -> None:
        """Nothing is looked at."""


@dataclass(frozen=True)
class _Batch:
    """Samples that run together: a part of a request, and the slots that it is in."""

    request: Request
    table: StepTable
    slots: Slots
    given: bool


class Sampler:
    """Draws images from a model by running its whole reverse Markov chain.

        with Sampler.load("model.onnx") as sampler:
            images = sampler.sample(16, seed=0)  # float32 (16, C, H, W) in [-1, 1]

    The noise of a sample depends on its seed and index alone, so the same image comes out whatever batch,
    process or machine draws it. Its bits are the same too, on one machine and ONNX Runtime version, alone and
    in a batch, with 1, 8 and 16 threads, where `spec.same_bits` is True: the export found it so.
    A Sampler serves one call at a time: another thread's call during one raises OwnershipError.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._chain = Chain(network)
        self._under_way: tuple[_Batch, int] | None = None  # and the steps that are done
        self._busy = threading.Lock()
        self._thread = 0  # that takes the steps
        self._process = os.getpid()
        _OPEN.add(self)
        # Again for each, as what is registered last runs first: before the exit of the backend's libraries.
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        backend: Backend | None = None,
        precision: RunPrecision | None = None,
        threads: int | None = None,
        max_batch: int | None = None,
        spec: ModelSpec | None = None,
    ) -> Self:
        """Load a model; the suffix of its name, and the device, choose the backend.

        path: an .onnx file, a .ncnn file, an engine (.plan), or a checkpoint (.pt), which PyTorch runs. device: "cpu",
        "cuda" or "cuda:1" (None: an engine on the GPU, others on the CPU); on a GPU an .onnx file's engine is built
        here, once: minutes the first time, seconds ever after; or, where there is no TensorRT, ONNX Runtime runs it.
        backend: "onnxruntime", "openvino", "ncnn", "tensorrt" or "torch", in place of that choice. precision: to
        compute in, of OpenVINO: "fp32" (None) or "bf16", where the processor has it. threads: CPU threads to use (None:
        as many as this process may: OMP_NUM_THREADS, or the cores that the system gives it). max_batch: rows of the
        batch (None: on the CPU 64, fewer for images over 16×16; on the GPU what the engine was built for). spec: in
        place of the file's own.

        Raises ArtefactError, SpecError, DependencyError, BackendError or SettingError.
        """
        model = open_model(path, spec)
        model.require_intact()
        settings = LoadSettings(device=device, threads=threads, max_batch=max_batch, precision=precision)
        return cls(load_network(model, settings, backend=backend))

    @property
    def spec(self) -> ModelSpec:
        """What the model says of itself."""
        return self.network.spec

    def max_batch(self, guided: bool = False) -> int:
        """Images in flight at once: half as many with guidance, which takes two rows of the batch for each.

        Raises SettingError where there are no two rows.
        """
        most = self.network.max_batch // (2 if guided else 1)
        if not most:
            raise SettingError(
                "guidance takes two rows of the batch for an image, and this model's batch has one row: load it with "
                "max_batch 2 or more"
            )
        return most

    def sample(
        self,
        count: int,
        *,
        noise: Noise | None = None,
        start: Array | None = None,
        callback: Callback | None = None,
        **keywords: Unpack[Keywords],
    ) -> Array:
        """Draw `count` images: float32 (count, C, H, W) in the model's value range.

        steps: of the chain, 1 .. T. solver: "ddpm", "ddim", "dpmpp-2m" or "sde-dpmpp-2m"; or "fast", which is
            the best known of 20 steps (`spec.FAST`). eta: of ddim, 0 to 1.
            spacing: of the timesteps, one of `words.SPACINGS`. timesteps: the very ones, falling, in place of steps
            and spacing. Those not given are as `spec.sampling` has them: all T, "ddpm", 0 and
            "leading", unless the model was imported.
        table: a StepTable of your own in place of all these, as of `solvers.ddim(…, stride=…)`.
        seed: 0 .. 2⁶⁴ - 1 (None: a fresh one). Sample i of the call has sample index first_index + i (0).
        labels: of a class-conditional model, by name or number: one for all, or one for each sample. None:
            each class in turn, by sample index.
        guidance: scale of classifier-free guidance, for a model with a null class: one for all, or one for each
            sample; 1 is the plain model (None: without). It halves the images in flight.
        share_until: 0 .. T, where the images share the noise of x_T and of the steps from t ≥ share_until, so that one
            sees what those decide: at 0 they are all the same (None: each has its own). A model with classes needs one
            label for all of them.
        start: (count, C, H, W), where the chains begin, in place of x_T. depth: 1 .. T, with start: only the steps from
            t < depth are taken, and start is x_t of the first of them (None: all).
        noise: `noise(draw) -> (count, C, H, W)` in place of the addressed noise, draw 0 for x_T and
            t + 1 for the step from t. A count over the batch asks again for each part of it, so it
            must give the same numbers for the same draw.
        callback: called after each step with (step, x, x̂0), step from 0, the two (k, C, H, W) views that
            the next step overwrites. Raising in it stops the run cleanly. Where it has a method `wants(step)`, it is
            called for the steps of which that says True alone, and the others cost no copy from a GPU; where it has a
            method `passed(step)`, that is called once for every step that was taken.

        Raises SettingError for an argument out of range, BackendError where the backend fails or the
        network gives numbers that are not finite, OwnershipError where the Sampler is already in use.
        """
        request = self._request(count, keywords, noise, callback)
        try:
            images = np.empty((request.count, *self.spec.image_shape), np.float32)
        except (MemoryError, ValueError) as error:
            raise SettingError(
                f"{count} × {self.spec.image_shape} numbers do not fit in memory: use iter_samples"
            ) from error
        done = 0
        for part in self.draw(request, callback, noise=noise, start=start):
            images[done : done + len(part)] = part
            done += len(part)
        return images

    def sample_on_device(
        self, count: int, *, noise: Noise | None = None, **keywords: Unpack[Keywords]
    ) -> Any:
        """As `sample`, of one batch, leaving the images on the GPU: float32 (count, C, H, W).

        The result is memory of this Sampler's, which its next call overwrites. It is a CuPy array, which PyTorch and
        others take over without a copy (`torch.from_dlpack`, `__cuda_array_interface__`).

        Raises also SettingError where the model does not run on a GPU, or the count is more than `max_batch`.
        """
        request = self._request(count, keywords, noise)
        if self.network.device.is_host:
            raise SettingError(f"this model runs on {self.network.device.name}, and not on a GPU: use sample")
        self._require_one_batch(request)
        with self._owned():
            batch = self._started(request, request.count, noise)
            self._run(batch, 0, None)
            self._require_finite(batch)
            return self.network.memory["x"][: request.count]

    def iter_samples(
        self,
        count: int,
        *,
        noise: Noise | None = None,
        callback: Callback | None = None,
        **keywords: Unpack[Keywords],
    ) -> Generator[Array, None, None]:
        """As `sample`, giving the images in order as batches finish, for counts that don't fit in memory.

        Arguments are checked at once; the work happens as the result is read, and the Sampler is in use until it was
        read to the end, or is closed.
        """
        return self.draw(self._request(count, keywords, noise, callback), callback, noise=noise)

    def draw(
        self,
        request: Request,
        callback: Callback | None = None,
        *,
        noise: Noise | None = None,
        start: Array | None = None,
    ) -> Generator[Array, None, None]:
        """The images of a request, in order as batches finish. It is checked when the first of them is asked for.

        start: (count, C, H, W), where the chains begin, in place of x_T, as of `sample`.
        """
        require_callable(noise=noise, callback=callback)
        request = request.checked(self.spec)
        most = self.max_batch(bool(request.guidance))
        x = None if start is None else self._given_start(start, request, noise)
        with self._owned():
            for first in range(0, request.count, most):
                part = request[first : first + most]
                if x is None:
                    batch = self._started(part, request.count, noise, first)
                else:
                    batch = self._started_from(part, x[first : first + most])
                yield self._finished(batch, 0, callback)

    def _given_start(self, start: Array, request: Request, noise: Noise | None) -> Array:
        """Where the chains of a request are to begin, checked."""
        if noise is not None:
            raise SettingError("start is for the addressed noise: leave noise out")
        shape = request.count, *self.spec.image_shape
        try:
            x = np.asarray(start, np.float32)
        except (TypeError, ValueError) as error:
            raise SettingError(f"start is no array of numbers: {first_line(error)}") from error
        if x.shape != shape or not np.isfinite(x).all():
            raise SettingError(f"start must be finite numbers of the shape {shape}, and this has {x.shape}")
        return x

    def _request(
        self, count: int, keywords: Keywords, noise: Noise | None, callback: Callback | None = None
    ) -> Request:
        """The checked request of a call, for which there is room."""
        require_callable(noise=noise, callback=callback)
        request = make_request(self.spec, count, **keywords)
        self.max_batch(bool(request.guidance))  # or is refused
        return request

    def stream(
        self, count: int, *, noise: Noise | None = None, **keywords: Unpack[Keywords]
    ) -> Generator[tuple[int, Array, Array], None, None]:
        """One batch step by step: yields (step, x_t, x̂0) after each, step from 0, as copies (count, C, H, W).

        The x of the last step is what `sample` gives. count: at most `max_batch`. The Sampler is in use until
        the last step was read, or the iterator is closed.
        """
        request = self._request(count, keywords, noise)
        self._require_one_batch(request)
        return self._copies(request, noise)

    def _copies(
        self, request: Request, noise: Noise | None
    ) -> Generator[tuple[int, Array, Array], None, None]:
        with self._owned():
            batch = self._started(request, request.count, noise)
            for step in self._steps(batch, 0):
                yield step, *self._chain.read(batch.slots)
            self._require_finite(batch)

    def snapshot(self) -> Snapshot:
        """The batch that is under way, as it is after its last step: ask in a callback, or between a stream's steps.

        Raises SettingError where none is, or its noise is a caller's own, which a file cannot hold, OwnershipError
        where another thread takes the steps, BackendError where its numbers are not finite.
        """
        if self._under_way is None:
            raise SettingError(
                "no chain is under way: ask in the callback of sample, or while reading a stream"
            )
        batch, step = self._under_way
        if self._thread != threading.get_ident():
            raise OwnershipError("another thread runs this Sampler: ask it for the snapshot, in its callback")
        if batch.given:
            raise SettingError("a chain on noise of the caller's own cannot be resumed: leave noise out")
        self._require_finite(batch)
        x, x0 = self._chain.read(batch.slots)
        return Snapshot(batch.request, batch.table, self.spec.provenance.digest, step, x, x0)

    def resume(self, snapshot: Snapshot, *, callback: Callback | None = None) -> Array:
        """Go on from a snapshot to its images, (k, C, H, W), on whatever backend this model runs.

        callback: as of `sample`; its first step is the snapshot's.

        Raises SettingError where it is of another model, or of a larger batch than this Sampler's.
        """
        require_callable(callback=callback)
        snapshot.require_fits(self.spec)
        request = snapshot.request.checked(self.spec)
        if request.rows > self.network.max_batch:
            raise SettingError(
                f"the snapshot has {plural(request.count, 'image')} in flight: load the model with max_batch "
                f"{request.rows}"
            )
        with self._owned():
            slots = self._chain.free[: request.rows]
            self._chain.restore(slots, request, snapshot.table, snapshot.step, snapshot.x, snapshot.x0)
            batch = _Batch(request, snapshot.table, slots[: request.count], False)
            return self._finished(batch, snapshot.step, callback)

    def _require_one_batch(self, request: Request) -> None:
        most = self.max_batch(bool(request.guidance))
        if request.count > most:
            raise SettingError(f"{request.count} images are more than one batch: choose 1 to {most}")

    def _started(self, request: Request, total: int, noise: Noise | None, first: int = 0) -> _Batch:
        """Start samples `first` on of a call for `total`, whose noise is of them all."""
        slots = self._chain.free[: request.rows]
        part = (
            None
            if noise is None
            else noise_of_part(noise, (total, *self.spec.image_shape), first, request.count)
        )
        self._chain.start(slots, request, part)
        return _Batch(request, request.table_for(self.spec), slots[: request.count], noise is not None)

    def _started_from(self, request: Request, x: Array) -> _Batch:
        """Start samples at x, (count, C, H, W), in place of x_T."""
        slots, table = self._chain.free[: request.rows], request.table_for(self.spec)
        self._chain.restore(slots, request, table, 0, x, np.zeros_like(x))
        return _Batch(request, table, slots[: request.count], False)

    def _steps(self, batch: _Batch, first: int) -> Iterator[int]:
        """Step by step to the end: the number of each step that was taken."""
        for step in range(first, len(batch.table)):
            self._require_process()  # a generator may be read on in a fork
            self._under_way, self._thread = None, threading.get_ident()
            self._chain.step()
            self._under_way = batch, step + 1
            yield step

    def _finished(self, batch: _Batch, first: int, callback: Callback | None) -> Array:
        """The images of a batch, from step `first` of its chain."""
        self._run(batch, first, callback)
        self._require_finite(batch)
        return self._chain.images(batch.slots)

    def _run(self, batch: _Batch, first: int, callback: Callback | None) -> None:
        """To the end; a callback is told of a step while a device takes the next."""
        if callback is None:
            deque(self._steps(batch, first), maxlen=0)
            return
        wants: Callable[[int], bool] = getattr(callback, "wants", lambda step: True)
        passed: Callable[[int], None] = getattr(callback, "passed", lambda step: None)
        seen: deque[tuple[int, Look]] = deque()
        for step in self._steps(batch, first):
            if wants(step):
                seen.append((step, self._chain.watch(batch.slots)))
            if seen and step >= seen[0][0] + self._chain.lag:
                number, look = seen.popleft()
                callback(number, *look())
            passed(step)
        for number, look in seen:
            callback(number, *look())

    @contextmanager
    def lent(self) -> Iterator[Chain]:
        """Hold the Sampler, in this thread, and drive its chain oneself, as a Batcher does."""
        with self._owned():
            yield self._chain

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the Sampler for one call."""
        self._require_process()
        if not self._busy.acquire(blocking=False):
            raise self._taken()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._under_way, self._thread = None, 0
            try:
                self._chain.clear()
            finally:
                self._busy.release()

    def _taken(self) -> OwnershipError:
        """The error that says what holds the Sampler."""
        if self._thread == threading.get_ident():
            return OwnershipError(
                "an iterator of this Sampler (iter_samples, draw or stream) is still open in this thread, or this is "
                "its callback: read the iterator to its end, or close() it, before the next call"
            )
        return OwnershipError(
            "another thread's call or open iterator holds this Sampler: let threads wait for one another with a "
            "threading.Lock, or load one Sampler for each thread"
        )

    def _require_process(self) -> None:
        require_process(self._process)

    def _require_finite(self, batch: _Batch) -> None:
        if self._chain.broken(batch.slots).any():
            raise not_finite()

    def close(self) -> None:
        """Free the backend. The Sampler cannot be used afterwards; closing again does nothing, and the end of the
        process closes what is still open.

        In a process that was forked after the model was loaded, it is left as it is: freeing it would hang. Raises
        OwnershipError while another thread uses it.
        """
        if self._busy.locked() and self._thread != threading.get_ident():
            raise self._taken()
        if os.getpid() == self._process:
            _OPEN.discard(self)
            self._chain.close()
            self.network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_OPEN: Final["weakref.WeakSet[Sampler]"] = weakref.WeakSet()


def _close_all() -> None:
    """At the end of the process: a backend is to be freed before its libraries are, and waits for what it runs."""
    for sampler in list(_OPEN):
        with suppress(Exception):  # another thread may use it, or the GPU be gone
            sampler.close()


def require_callable(**functions: Any) -> None:
    """Raise SettingError unless each is a function, or None."""
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise SettingError(f"{name} must be a function, not {type(given).__name__}")
