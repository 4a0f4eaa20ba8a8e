"""A GPU as a device, through CuPy: memory, copies, one stream, one kernel, and work that is replayed; and its stepper.

Small on purpose: tests put the host in its place (tests/host_device.py), and so run all but the last millimetre of the
way without a GPU.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import BackendError, one_line
from ddpm_deploy.runtime.device.kernel import THREADS, blocks, compiled, kernel_source
from ddpm_deploy.runtime.protocols import SLOT, Array, Look, Network, Slots, runs_of, upload_rows
from ddpm_deploy.solvers import COLUMNS, IDENTITY, T

# Launches a kernel on a grid of (x, y) blocks of THREADS threads; whole numbers are passed as int32.
Kernel = Callable[[tuple[int, int], tuple[Any, ...]], None]

_AHEAD: Final = 0.25  # seconds of work that wait on the device, at most

logger = logging.getLogger(__name__)


class Cuda:
    """One of the visible GPUs, by its number. Follows `protocols.Device`.

    index: its number. stream: the handle that TensorRT takes. extra: of this package, that brings CuPy.

    Raises DependencyError where CuPy is missing, BackendError where it does not see that GPU; its methods BackendError
    where the GPU fails.
    """

    is_host = False
    lag = 1  # what is watched comes while the next step runs

    def __init__(self, index: int = 0, extra: str = "gpu") -> None:
        self._cupy: Any = require("cupy", extra)
        self._extra = extra
        try:
            self._device = self._cupy.cuda.Device(index)
            with self._device:
                self._stream = self._cupy.cuda.Stream(non_blocking=True)
                self._side = self._cupy.cuda.Stream(non_blocking=True)  # for what leaves while chains go on
        except Exception as error:  # CuPy's own, which needs CuPy to name
            raise BackendError(
                f"CuPy cannot use the GPU: {one_line(error)} (see ddpm-deploy doctor)"
            ) from error
        self.name, self.index, self.stream = f"cuda:{index}", index, self._stream.ptr
        self._staged: deque[tuple[Any, NDArray[Any]]] = deque()  # what uploads read, until they are done

    @contextmanager
    def here(self) -> Iterator[None]:
        """On this device and stream, whatever the thread's own are; CUDA's errors as ours."""
        try:
            with self._device, self._stream:
                yield
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise BackendError(
                f"the GPU has {self.free() / 2**20:.0f} MiB of memory left, and more are needed ({one_line(error)}): "
                "load the model with a smaller max_batch"
            ) from error
        except RuntimeError as error:
            raise BackendError(f"the GPU failed: {one_line(error)} (see ddpm-deploy doctor)") from error

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory, holding anything."""
        with self.here():
            return self._cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory that holds zeros."""
        with self.here():
            return self._cupy.zeros(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array of page-locked memory."""
        size = int(np.prod(shape))
        with self.here():
            memory = self._cupy.cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, size).reshape(shape)

    def start(self, work: Callable[[], None]) -> None:
        """Call it: the stream is CUDA's, and puts it in order."""
        with self.here():
            work()

    def address(self, memory: Any) -> int:
        """Where it starts."""
        return int(memory.data.ptr)

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy an array into memory of its shape."""
        staged = self.pinned(host.shape, host.dtype)
        staged[...] = host
        with self.here():
            while self._staged and self._staged[0][0].done:
                self._staged.popleft()
            memory.set(staged, stream=self._stream)
            self._staged.append((self._event(self._stream), staged))

    def copy(self, source: Any, target: Any) -> None:
        """Start to copy memory into other memory of its shape."""
        with self.here():
            target.data.copy_from_device_async(source.data, source.nbytes, self._stream)

    def fetch(self, memory: Any) -> NDArray[Any]:
        """A new array with what memory holds, once everything that was started is done."""
        host = self.pinned(memory.shape, memory.dtype)
        with self.here():
            memory.get(stream=self._stream, out=host, blocking=False)
        self.mark()()
        return host.copy()

    def copy_out(self, copies: Sequence[tuple[Any, Any, NDArray[Any]]]) -> Callable[[], None]:
        """Bring memory as it is at this point of the stream to arrays, beside what is started later; gives what waits
        for that. copies: (memory, other memory to keep it in until it is copied, array), all of one shape."""
        with self.here():
            for memory, kept, _ in copies:
                self.copy(memory, kept)
            self._side.wait_event(self._event(self._stream))
            for _, kept, host in copies:
                kept.get(stream=self._side, out=host, blocking=False)
            return self._waits_for(self._event(self._side))

    def mark(self) -> Callable[[], None]:
        """What waits for everything that was started so far, and not for what is later."""
        with self.here():
            return self._waits_for(self._event(self._stream))

    def _event(self, stream: Any) -> Any:
        """This point of a stream. Whoever waits for it sleeps, where a stream's own wait keeps a core busy."""
        return stream.record(self._cupy.cuda.Event(block=True, disable_timing=True))

    def _waits_for(self, event: Any) -> Callable[[], None]:
        def wait() -> None:
            with self.here():
                event.synchronize()

        return wait

    def free(self) -> int:
        """Bytes of memory that are left, CuPy's own reserve among them."""
        with self._device:
            left, _ = self._cupy.cuda.runtime.memGetInfo()
            return int(left) + int(self._cupy.get_default_memory_pool().free_bytes())

    def synchronize(self) -> None:
        """Wait for all that was started, on its way out too."""
        with self.here():
            for stream in (self._stream, self._side):
                self._event(stream).synchronize()
        self._staged.clear()

    def release(self) -> None:
        """Give back to the GPU what is not in use any more; CuPy keeps it otherwise."""
        with self._device:
            self._cupy.get_default_memory_pool().free_all_blocks()
            self._cupy.get_default_pinned_memory_pool().free_all_blocks()

    def compile(self, source: str, name: str) -> Kernel:
        """Compile for this GPU."""
        cubin = compiled(source, self._device.compute_capability, self._extra)
        module = self._cupy.cuda.Module()  # unloaded with its last function: CuPy keeps a RawModule for ever
        with self.here():
            module.load(cubin)
            kernel = module.get_function(name)

        def launch(grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
            with self.here():
                kernel(grid, (THREADS,), tuple(np.int32(a) if isinstance(a, int) else a for a in arguments))

        return launch

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` starts, done so far at least once, as one piece that is started again and again: a CUDA graph."""
        self.synchronize()
        with self.here():
            self._stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # of the capture, which is broken too: the cause is what counts
                    self._stream.end_capture()
                raise
            graph = self._stream.end_capture()

        def replay() -> None:
            with self.here():
                graph.launch(self._stream)

        return replay

    def stepper(self, network: Network, rows: int) -> "CudaStepper":
        """The network and one kernel, step.cu."""
        return CudaStepper(network, self, rows)


class CudaStepper:
    """Follows `protocols.Stepper`: a step is the network and one kernel, and nothing comes back until it is asked.

    All memory is allocated, and the steps of every batch size captured, when it is made; between a start and its images
    there is no allocation, no copy to the device, and no waiting that the device would notice, but for a caller's noise
    and what is watched.
    """

    def __init__(self, network: Network, device: Cuda, rows: int) -> None:
        spec, slots, memory = network.spec, network.max_batch, network.memory
        self._network, self._device = network, device
        self._size, self._outputs = (
            int(np.prod(shape)) for shape in (spec.image_shape, spec.prediction_shape)
        )
        self._kernel = device.compile(kernel_source(), "step")
        self._embedding = spec.embedding.table(spec.timesteps)
        self._timesteps = np.zeros(rows, np.int64)  # of each row
        self._inputs = [memory[tensor.name] for tensor in spec.inputs]
        self._x0 = device.empty((slots, *spec.image_shape), np.float32)
        self._given = device.empty((slots, *spec.image_shape), np.float32)
        self._slots = device.zeros((slots, _WORDS), np.uint32)
        self._rows = device.zeros((rows, len(COLUMNS)), np.float32)
        self._embeddings = device.zeros(self._embedding.shape, np.float32)
        device.upload(self._embedding, self._embeddings)
        device.upload(np.array([IDENTITY], np.float32), self._rows[:1])
        device.upload(np.repeat(self._embedding[:1], slots, axis=0), memory["temb"][:slots])
        # What `watch` keeps and gives, in turn: x and x̂0, on the device and on the host; made when it is first asked.
        self._kept: list[tuple[Any, NDArray[np.float32]]] = []
        self._marks: deque[tuple[Callable[[], None], int]] = deque()  # with the steps before each
        self._unmarked, self._stride, self._bucket, self._passed = 0, 1, 0, 0.0
        self._captures = network.capturable
        self._steps = {bucket: self._prepare(bucket) for bucket in network.buckets}

    def put_rows(self, first: int, rows: Array) -> None:
        """Write rows of a step table."""
        part = slice(first, first + len(rows))
        self._timesteps[part] = rows[:, T]
        self._device.upload(np.ascontiguousarray(rows), self._rows[part])

    def assign(self, slots: Slots, records: NDArray[np.void]) -> None:
        """Say what slots run from now on."""
        upload_rows(self._device, slots, records.view(np.uint32).reshape(len(records), -1), self._slots)

    def begin(self, slots: Slots, noise: Array | None) -> None:
        """The kernel on the START row."""
        if noise is not None:
            self.give(slots, noise)
        for run in runs_of(slots):
            self._launch(run.start, run.stop - run.start)

    def resume(self, slots: Slots, x: Array, x0: Array) -> None:
        """Set x and the last x̂0, and the embedding that the next step reads."""
        records = self._device.fetch(self._slots).view(SLOT)[:, 0][slots]
        temb = self._embedding[self._timesteps[records["row"]]]
        memory, partners = self._network.memory, records["partner"].astype(np.intp)
        upload_rows(self._device, slots, x0, self._x0)
        for name, rows in (("x", x), ("temb", temb)):
            upload_rows(self._device, slots, rows, memory[name])
            for partner, row in zip(partners.tolist(), rows, strict=True):
                if partner >= 0:
                    upload_rows(self._device, np.array([partner]), row[None], memory[name])

    def give(self, slots: Slots, noise: Array) -> None:
        """The noise of a caller's for the next step."""
        upload_rows(self._device, slots, noise, self._given)

    def pair(self, guide: int, partner: int) -> None:
        """Say which slot has the unconditional row of a guided one."""
        word = slice(_PARTNER, _PARTNER + 1)
        self._device.upload(np.array([partner], np.int32).view(np.uint32), self._slots[guide, word])

    def move(self, source: int, target: int) -> None:
        """Copies on the device, in order with its steps."""
        for memory in (*self._inputs, self._x0, self._given, self._slots):
            self._device.copy(memory[source : source + 1], memory[target : target + 1])
        self._device.upload(np.zeros((1, _WORDS), np.uint32), self._slots[source : source + 1])

    def step(self, bucket: int) -> None:
        """It returns as soon as the step is started."""
        self._steps[bucket]()
        self._bound_queue(bucket)

    def _bound_queue(self, bucket: int) -> None:
        """Wait for what was started long ago, so that signals and progress are not a whole chain ahead.

        A mark is set every so many steps, and the one before it waited for: how many, the last ones tell; the first
        step of another batch size is waited for itself.
        """
        if bucket != self._bucket:
            self._bucket, self._stride = bucket, 1
        self._unmarked += 1
        if self._unmarked < self._stride:
            return
        self._marks.append((self._device.mark(), self._unmarked))
        self._unmarked = 0
        while len(self._marks) > (self._stride > 1):
            wait, steps = self._marks.popleft()
            wait()
            now = time.perf_counter()
            fitting = _AHEAD / 3 * steps / max(now - self._passed, 1e-9)
            self._stride, self._passed = max(1, min(2 * self._stride, int(fitting))), now

    def _prepare(self, bucket: int) -> Callable[[], None]:
        """What starts a step of a bucket: captured, where that can be, after a run of it with every slot idle."""
        if self._captures:
            self._start_step(bucket)
            try:
                return self._device.capture(lambda: self._start_step(bucket))
            except BackendError as error:
                logger.warning(
                    "this network cannot be captured into a CUDA graph, so its steps are started one by one, which "
                    f"takes longer: {one_line(error)}"
                )
                self._captures = False
        return lambda: self._start_step(bucket)

    def _start_step(self, bucket: int) -> None:
        self._network.enqueue(bucket)
        self._launch(0, min(bucket, self._network.max_batch))

    def _launch(self, first: int, count: int) -> None:
        memory = self._network.memory
        arrays = (
            *(self._rows, self._embeddings, memory["x"], self._x0),
            *(memory["temb"], memory["prediction"], self._given),
        )
        sizes = self._size, self._outputs, self._embedding.shape[1]
        self._kernel((blocks(self._size), count), (self._slots, first, *arrays, *sizes))

    def broken(self, slots: Slots) -> NDArray[np.bool_]:
        """The kernel keeps watch."""
        records = self._device.fetch(self._slots).view(SLOT)[:, 0]
        broken: NDArray[np.bool_] = records["broken"][slots] != 0
        return broken

    def x(self, part: slice) -> Array:
        """As it is now: this waits for the device."""
        return self._device.fetch(self._network.memory["x"][part])

    def x0(self, part: slice) -> Array:
        """Likewise."""
        return self._device.fetch(self._x0[part])

    def watch(self, part: slice) -> Look:
        """Bring x and x̂0 to the host as they are after this step, while the next one runs."""
        shape = (2, *self._x0.shape)
        if not self._kept:
            make = self._device.empty, self._device.pinned
            self._kept = [(make[0](shape, np.float32), make[1](shape, np.float32)) for _ in range(2)]
        self._kept.reverse()
        kept, host = (pair[:, part] for pair in self._kept[0])
        wait = self._device.copy_out(
            [(self._network.memory["x"][part], kept[0], host[0]), (self._x0[part], kept[1], host[1])]
        )

        def look() -> tuple[Array, Array]:
            wait()
            return host[0], host[1]

        return look

    def close(self) -> None:
        """Free the memory, once what is under way there has ended."""
        if self._steps:
            with suppress(BackendError):
                self._device.synchronize()
        with self._device.here():
            self._steps, self._kept, self._inputs = {}, [], []
            self._marks.clear()
            self._x0 = self._given = self._slots = self._rows = self._embeddings = None


_WORDS: Final = SLOT.itemsize // 4
_PARTNER: Final = SLOT.fields["partner"][1] // 4  # type: ignore[index]
