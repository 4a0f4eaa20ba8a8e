"""CuPy's own code over a pretended CUDA runtime: what we ask of CuPy, and CuPy of CUDA, is run without a GPU.

A plugin of pytest, for a process of its own: `python -m pytest -n 0 -p tests.pretended_cuda tests/test_gpu.py`. CuPy's
modules reach CUDA through two of their own, whose functions they look up as capsules when they are imported; these are
exchanged before that. No code of NVIDIA's runs but NVRTC's, which compiles the kernel; step.cu itself runs as C++.

It is as strict as the worst of GPUs: work is done when it is waited for, and not before; memory that was never written
holds NaN; freeing memory does not wait. What CUDA refuses, or leaves undefined, is raised as an error of CUDA's, and
noted as a fault, which may not get lost where an error is handled.
"""

# ruff: noqa: N802, N815  its methods have the names that CuPy gives CUDA's functions
import collections
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy import gpu
from ddpm_deploy.runtime.device.kernel import kernel_source
from tests.capsules import exchange
from tests.host_device import build

GPU: Final = gpu.Gpu("a pretended GPU", "9.0", 80 << 30)
_INVALID_VALUE, _OUT_OF_MEMORY, _INVALID_CONFIGURATION, _INVALID_DEVICE = 1, 2, 9, 101
_INVALID_HANDLE, _NOT_READY, _ILLEGAL_ADDRESS = 400, 600, 700
_CAPTURE_UNSUPPORTED, _CAPTURE_INVALIDATED, _CAPTURED_EVENT = 900, 901, 907
_BLOCKING: Final = 1  # of an event: whoever waits for it sleeps
_PAGE: Final = 512  # to which memory is aligned

Work = Callable[[], None]


@dataclass
class Stream:
    """Work that is yet to be done, in order. recorded: while a thread captures. broken: that capture, by a fault."""

    device: int
    queue: collections.deque[Work] = field(default_factory=collections.deque)
    recorded: list[Work] | None = None
    thread: int = 0
    broken: bool = False


@dataclass
class Mark:
    """A point of a stream. captured: it is one of a graph."""

    stream: Stream
    captured: bool
    passed: bool = False

    def passes(self) -> None:
        """The work before it is done."""
        self.passed = True


@dataclass
class Event:
    """What was last recorded in it."""

    device: int
    blocking: bool
    mark: Mark | None = None


@dataclass
class Graph:
    """Captured work; instantiated, or as it was captured."""

    device: int
    work: list[Work]


@dataclass
class Module:
    """A cubin."""

    device: int
    cubin: bytes


@dataclass
class Memory:
    """device: of a GPU, or None of pinned memory."""

    device: int | None
    address: int
    size: int
    held: NDArray[np.uint8]


class Runtime:
    """Two GPUs. memory, handles: what was made and not freed. left: bytes of memory that there are.

    faults: what no program may do. spins: waits that keep a core busy. pageable: copies from or to memory of the host
    that is not pinned.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Memory] = {}
        self.handles: dict[int, Any] = {}
        self.faults: list[str] = []
        self.left = GPU.memory
        self.spins = self.pageable = 0
        self._defaults = [Stream(device) for device in range(2)]
        self._functions: dict[int, tuple[str, int]] = {}  # of a module, by its handle
        self._numbers = itertools.count(0x1000, 16)
        self._threads = threading.local()
        self._seeds = np.random.default_rng(0)
        source = kernel_source()
        self._step = build(source)
        parameters = source.partition("__global__ void step(")[2].partition(")")[0].split(",")
        self._types = [ctypes.c_void_p if "*" in one else ctypes.c_int for one in parameters]

    def _fault(self, status: int, says: str) -> None:
        """Of a rule that was broken; while a thread captures, so is its capture."""
        self.faults.append(says)
        for stream in self._capturing():
            stream.broken = True
        raise _error(status)

    def _capturing(self) -> list[Stream]:
        """The streams of this thread that are."""
        streams = [
            one for one in self.handles.values() if isinstance(one, Stream) and one.recorded is not None
        ]
        return [stream for stream in streams if stream.thread == threading.get_ident()]

    def _refuse_capture(self, what: str) -> None:
        if self._capturing():
            self._fault(_CAPTURE_UNSUPPORTED, f"{what} while capturing")

    def _new(self, what: object) -> int:
        handle = next(self._numbers)
        self.handles[handle] = what
        return handle

    def _of(self, handle: int, kind: type, here: bool = True) -> Any:
        """What a handle is of. here: it must be the thread's current device's."""
        current = self.getDevice()
        found: Any = self.handles.get(handle) if handle else self._defaults[current]
        if not isinstance(found, kind):
            self._fault(_INVALID_HANDLE, f"{handle:#x} is no {kind.__name__}")
        if here and found.device != current:
            self._fault(_INVALID_HANDLE, f"a {kind.__name__} of GPU {found.device} used on GPU {current}")
        return found

    # Devices

    def getDevice(self) -> int:
        return int(getattr(self._threads, "device", 0))

    def setDevice(self, device: int) -> None:
        if not 0 <= device < len(self._defaults):
            raise _error(_INVALID_DEVICE)
        self._threads.device = device

    def getDeviceCount(self) -> int:
        return len(self._defaults)

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        major, minor = map(int, GPU.capability.split("."))
        return {75: major, 76: minor}[attribute]

    def _ensure_context(self) -> None:
        """There is one."""

    # Memory

    def _allocate(self, size: int, device: int | None) -> int:
        self._refuse_capture("an allocation")
        held = np.full(size + _PAGE, 0xFF, np.uint8)
        address = -(-held.ctypes.data // _PAGE) * _PAGE
        self.memory[address] = Memory(device, address, size, held)
        return address

    def _free(self, address: int, pinned: bool) -> None:
        memory = self.memory.get(address)
        if not memory or (memory.device is None) != pinned:
            self._fault(_INVALID_VALUE, f"{address:#x} is freed, and is no such memory")
        self._refuse_capture("freeing memory")
        del self.memory[address]

    def malloc(self, size: int) -> int:
        if size > self.left:
            raise _error(_OUT_OF_MEMORY)
        return self._allocate(size, self.getDevice())

    def free(self, address: int) -> None:
        self._free(address, pinned=False)

    def hostAlloc(self, size: int, flags: int) -> int:
        return self._allocate(size, None)

    def freeHost(self, address: int) -> None:
        self._free(address, pinned=True)

    def memGetInfo(self) -> tuple[int, int]:
        return self.left, GPU.memory

    def _holding(self, address: int, size: int) -> Memory | None:
        """The memory that bytes lie in."""
        blocks = list(self.memory.values())
        return next(
            (b for b in blocks if b.address <= address and address + size <= b.address + b.size), None
        )

    def _require_on(self, device: int | None, address: int, size: int, what: str) -> None:
        memory = self._holding(address, size)
        if not memory or memory.device != device:
            place = "pinned memory" if device is None else f"memory of GPU {device}"
            self._fault(_ILLEGAL_ADDRESS, f"{what} is not in live {place}")

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        on = self._of(stream, Stream)

        def work() -> None:
            self._require_on(on.device, address, size, "what is set")
            ctypes.memset(address, value, size)

        self._put(on, work)

    def memcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        on = self._of(stream, Stream)
        from_host, to_host = kind == 1, kind == 2
        host = source if from_host else target if to_host else 0
        pageable = bool(host) and not self._holding(host, 1)
        staged = ctypes.create_string_buffer(0)
        if pageable:
            self._refuse_capture("a copy of pageable memory")
            self.pageable += 1
            if from_host:
                staged = ctypes.create_string_buffer(ctypes.string_at(source, size), size)

        def check() -> None:
            for address, on_host, what in ((source, from_host, "source"), (target, to_host, "target")):
                if not (on_host and pageable):
                    self._require_on(None if on_host else on.device, address, size, f"the {what} of a copy")

        def work() -> None:
            check()
            ctypes.memmove(target, ctypes.addressof(staged) if pageable and from_host else source, size)

        check()
        self._put(on, work)
        if pageable and to_host:  # CUDA waits
            self._finish(on)

    # Streams and events

    def _put(self, stream: Stream, work: Work) -> None:
        (stream.queue if stream.recorded is None else stream.recorded).append(work)

    def _finish(self, stream: Stream, mark: Mark | None = None) -> None:
        """Do the work of a stream, to a mark or to its end."""
        while stream.queue and not (mark and mark.passed):
            stream.queue.popleft()()

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:
        return self._new(Stream(self.getDevice()))

    def streamDestroy(self, stream: int) -> None:
        self._finish(self._of(stream, Stream, here=False))  # CUDA does it later
        del self.handles[stream]

    def streamSynchronize(self, stream: int) -> None:
        self._refuse_capture("waiting for a stream")
        self.spins += 1
        self._finish(self._of(stream, Stream))

    def eventCreateWithFlags(self, flags: int) -> int:
        return self._new(Event(self.getDevice(), bool(flags & _BLOCKING)))

    def eventDestroy(self, event: int) -> None:
        self._of(event, Event, here=False)
        del self.handles[event]

    def eventRecord(self, event: int, stream: int) -> None:
        on = self._of(stream, Stream)
        mark = self._of(event, Event).mark = Mark(on, on.recorded is not None)
        self._put(on, mark.passes)

    def _mark(self, event: int) -> Mark | None:
        mark: Mark | None = self._of(event, Event, here=False).mark
        if mark and mark.captured:
            self._fault(_CAPTURED_EVENT, "an event of a graph is asked for")
        return mark

    def eventSynchronize(self, event: int) -> None:
        self._refuse_capture("waiting for an event")
        self.spins += not self._of(event, Event, here=False).blocking
        if mark := self._mark(event):
            self._finish(mark.stream, mark)

    def eventQuery(self, event: int) -> int:
        mark = self._mark(event)
        return _NOT_READY if mark and not mark.passed else 0

    def streamWaitEvent(self, stream: int, event: int) -> None:
        if mark := self._mark(event):
            self._put(self._of(stream, Stream), partial(self._finish, mark.stream, mark))

    def launchHostFunc(self, stream: int, callback: Callable[[Any], None], argument: Any) -> None:
        self._put(self._of(stream, Stream), partial(callback, argument))

    def _launchHostFuncUnmanaged(self, stream: int, call: tuple[Callable[[Any], None], Any]) -> None:
        self.launchHostFunc(stream, *call)

    # Graphs

    def streamBeginCapture(self, stream: int) -> None:
        on = self._of(stream, Stream)
        on.recorded, on.thread, on.broken = [], threading.get_ident(), False

    def streamIsCapturing(self, stream: int) -> int:
        return int(self._of(stream, Stream, here=False).recorded is not None)

    def streamEndCapture(self, stream: int) -> int:
        on = self._of(stream, Stream)
        work, on.recorded = on.recorded, None
        if on.broken or work is None:
            raise _error(_CAPTURE_INVALIDATED)
        return self._new(Graph(on.device, work))

    def graphInstantiate(self, graph: int) -> int:
        return self._new(Graph(**vars(self._of(graph, Graph))))

    def graphLaunch(self, graph: int, stream: int) -> None:
        on, work = self._of(stream, Stream), self._of(graph, Graph).work
        for piece in work:
            self._put(on, piece)

    def graphDestroy(self, graph: int) -> None:
        self._of(graph, Graph, here=False)
        del self.handles[graph]

    graphExecDestroy = graphDestroy

    # Kernels

    def moduleLoadData(self, data: bytes) -> int:
        self._refuse_capture("loading a module")
        if not bytes(data).startswith(b"\x7fELF"):
            self._fault(_INVALID_VALUE, "what is loaded is no cubin")
        return self._new(Module(self.getDevice(), bytes(data)))

    def moduleUnload(self, module: int) -> None:
        self._of(module, Module, here=False)
        del self.handles[module]

    def moduleGetFunction(self, module: int, name: str) -> int:
        if name.encode() not in self._of(module, Module).cubin:
            self._fault(_INVALID_VALUE, f"the cubin has no {name}")
        function = next(self._numbers)
        self._functions[function] = name, module
        return function

    def launchKernel(self, function: int, *geometry_and_arguments: int) -> None:
        *geometry, shared, stream, arguments, _ = geometry_and_arguments
        name, module = self._functions[function]
        on, grid, block = self._of(stream, Stream), geometry[:3], geometry[3:]
        self._of(module, Module)
        if name != "step" or shared:
            self._fault(_INVALID_VALUE, f"the kernel {name}, with {shared} bytes of shared memory")
        too_large = any(n > most for n, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True))
        if min(geometry) < 1 or too_large or np.prod(block) > 1024:
            self._fault(_INVALID_CONFIGURATION, f"a grid of {grid}, of blocks of {block}")
        places = (ctypes.c_void_p * len(self._types)).from_address(arguments)
        given = [
            kind.from_buffer_copy(kind.from_address(place or 0))
            for kind, place in zip(self._types, places, strict=True)
        ]

        def check() -> None:
            for pointer in [value.value or 0 for value in given if isinstance(value, ctypes.c_void_p)]:
                self._require_on(on.device, pointer, 4, f"{pointer:#x}, given to a kernel,")

        def work() -> None:
            check()
            self._step.launch(*grid[:2], block[0], int(self._seeds.integers(2**31)), *given)

        check()
        self._put(on, work)


def _error(status: int) -> Exception:
    from cupy_backends.cuda.api import runtime

    error: Exception = runtime.CUDARuntimeError(status)
    return error


RUNTIME: Final = Runtime()


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    """A fault fails the test in which it comes, whoever handled the error; a test that wants one takes it away."""
    yield
    faults, RUNTIME.faults[:] = list(RUNTIME.faults), []
    assert not faults


def pytest_configure() -> None:
    """Before any test is imported."""
    gpu.driver = lambda: gpu.Driver("580.65.06", "13.0", (GPU, GPU))
    from cupy_backends.cuda.api import driver, runtime  # which import no more of CuPy

    lock = threading.RLock()

    def locked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with lock:
                return method(*arguments)

        return call

    answers = {name: locked(getattr(RUNTIME, name)) for name in vars(Runtime)}
    for module in (runtime, driver):
        exchange(module, {name: answers[name] for name in answers if name in module.__pyx_capi__})
