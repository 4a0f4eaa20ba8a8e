"""The GPU as the runtime needs it: memory, copies, one stream, one kernel, and work that is replayed.

Small on purpose: tests put the host in its place (tests/host_device.py), and so run all but the last millimetre of the
way without a GPU.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import BackendError, one_line
from ddpm_deploy.runtime.kernel import THREADS, compiled

# Launches a kernel on a grid of (x, y) blocks of THREADS threads; whole numbers are passed as int32.
Kernel = Callable[[tuple[int, int], tuple[Any, ...]], None]


class Device(Protocol):
    """Memory, which can be sliced by rows, and a stream on which everything that is started happens in order.

    name: for people ("cuda:0"). stream: the handle that TensorRT takes.
    """

    name: str
    stream: int

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory, holding anything; freed with the last reference."""

    def start(self, work: Callable[[], None]) -> None:
        """Call what starts work on the stream by its handle."""

    def address(self, memory: Any) -> int:
        """Where it starts, a multiple of 256."""

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy an array into memory of its shape; the array may be changed at once."""

    def download(self, memory: Any, host: NDArray[Any]) -> None:
        """Start to copy memory into an array of its shape, which is whole after `synchronize`."""

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array of the host's, that copies can go to beside other work."""

    def copy_out(self, copies: Sequence[tuple[Any, Any, NDArray[Any]]]) -> Callable[[], None]:
        """Bring memory as it is at this point of the stream to arrays, beside what is started later; gives what waits
        for that. copies: (memory, other memory to keep it in until it is copied, array), all of one shape."""

    def free(self) -> int:
        """Bytes of memory that are left."""

    def mark(self) -> Callable[[], None]:
        """What waits for all that was started so far, and not for what is later."""

    def synchronize(self) -> None:
        """Wait for all that was started."""

    def release(self) -> None:
        """Give back memory that nothing refers to any more."""

    def compile(self, source: str, name: str) -> Kernel:
        """A kernel of CUDA C."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` starts, done so far at least once, as one piece that can be started again and again."""


class Cuda:
    """The first visible GPU, through CuPy. Follows `Device`.

    extra: of this package, that brings CuPy. Raises DependencyError where CuPy is missing, BackendError where it sees
    no GPU; its methods BackendError where the GPU fails.
    """

    def __init__(self, extra: str = "gpu") -> None:
        self._cupy: Any = require("cupy", extra)
        self._extra = extra
        try:
            self._device = self._cupy.cuda.Device(0)
            with self._device:
                self._stream = self._cupy.cuda.Stream(non_blocking=True)
                self._side = self._cupy.cuda.Stream(non_blocking=True)  # for what leaves while chains go on
        except Exception as error:  # CuPy's own, which needs CuPy to name
            raise BackendError(
                f"CuPy cannot use the GPU: {one_line(error)} (see ddpm-deploy doctor)"
            ) from error
        self.name, self.stream = "cuda:0", self._stream.ptr

    @contextmanager
    def _here(self) -> Iterator[None]:
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
        with self._here():
            return self._cupy.empty(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array of page-locked memory."""
        size = int(np.prod(shape))
        with self._here():
            memory = self._cupy.cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, size).reshape(shape)

    def start(self, work: Callable[[], None]) -> None:
        """Call it: the stream is CUDA's, and puts it in order."""
        with self._here():
            work()

    def address(self, memory: Any) -> int:
        """Where it starts."""
        return int(memory.data.ptr)

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy an array into memory of its shape."""
        with self._here():
            memory.set(host, stream=self._stream)  # from pageable memory: staged before it returns

    def download(self, memory: Any, host: NDArray[Any]) -> None:
        """Start to copy memory into an array of its shape."""
        with self._here():
            memory.get(stream=self._stream, out=host, blocking=False)

    def copy_out(self, copies: Sequence[tuple[Any, Any, NDArray[Any]]]) -> Callable[[], None]:
        """By copies on the device, which the stream goes on from, and a side stream to the host."""
        with self._here():
            for memory, kept, _ in copies:
                kept.data.copy_from_device_async(memory.data, memory.nbytes, self._stream)
            self._side.wait_event(self._stream.record())
            for _, kept, host in copies:
                kept.get(stream=self._side, out=host, blocking=False)
            return self._waits_for(self._side.record())

    def mark(self) -> Callable[[], None]:
        """By an event."""
        with self._here():
            return self._waits_for(self._stream.record())

    def _waits_for(self, event: Any) -> Callable[[], None]:
        def wait() -> None:
            with self._here():
                event.synchronize()

        return wait

    def free(self) -> int:
        """Bytes of memory that are left, CuPy's own reserve among them."""
        with self._device:
            left, _ = self._cupy.cuda.runtime.memGetInfo()
            return int(left) + int(self._cupy.get_default_memory_pool().free_bytes())

    def synchronize(self) -> None:
        """Wait for all that was started."""
        with self._here():
            self._stream.synchronize()

    def release(self) -> None:
        """Give back to the GPU what is not in use any more; CuPy keeps it otherwise."""
        self._cupy.get_default_memory_pool().free_all_blocks()

    def compile(self, source: str, name: str) -> Kernel:
        """Compile for this GPU."""
        cubin = compiled(source, self._device.compute_capability, self._extra)
        with self._here(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.cubin"
            path.write_bytes(cubin)
            kernel = self._cupy.RawModule(path=str(path)).get_function(name)

        def launch(grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
            with self._here():
                kernel(grid, (THREADS,), tuple(np.int32(a) if isinstance(a, int) else a for a in arguments))

        return launch

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph."""
        self.synchronize()
        with self._here():
            self._stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # of the capture, which is broken too: the cause is what counts
                    self._stream.end_capture()
                raise
            graph = self._stream.end_capture()

        def replay() -> None:
            with self._here():
                graph.launch(self._stream)

        return replay
