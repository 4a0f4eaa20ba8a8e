"""What a pretended CUDA runtime shows, and no GPU would: rules broken without a wrong image, and what is left over.

Run by test_pretended_cuda.py, in a process of its own.
"""

import ctypes
import threading
from collections.abc import Callable

import cupy
import numpy as np
import pytest

from ddpm_deploy import Sampler
from ddpm_deploy.errors import BackendError
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.device.kernel import kernel_source
from tests.pretended_cuda import RUNTIME
from tests.test_chain import SPEC
from tests.test_gpu import Echo, EchoNetwork


def wants_fault(says: str) -> None:
    """The rule that was broken, and no other."""
    faults, RUNTIME.faults[:] = list(RUNTIME.faults), []
    assert any(says in fault for fault in faults), faults


def test_work_is_done_late_and_memory_begins_as_nan() -> None:
    device = Cuda()
    memory = device.empty((4,), np.float32)
    seen = (ctypes.c_float * 4).from_address(memory.data.ptr)  # behind CuPy's back
    device.upload(np.arange(4, dtype=np.float32), memory)
    assert np.isnan(seen).all()
    device.synchronize()
    np.testing.assert_array_equal(seen, range(4))


HOST = np.zeros(2, np.uint8)
BREACHES: dict[str, Callable[[Cuda], object]] = {
    "an allocation while": lambda device: device.empty((1 << 24,), np.uint8),
    "waiting for": lambda device: device.synchronize(),
    "a copy of pageable": lambda device: cupy.cuda.runtime.memcpyAsync(
        device.empty((2,), np.uint8).data.ptr, HOST.ctypes.data, 2, 1, device.stream
    ),
}


@pytest.mark.parametrize("says", BREACHES)
def test_a_capture_is_broken_by(says: str) -> None:
    device = Cuda()
    device.empty((2,), np.uint8)  # from now on there is some in CuPy's pool
    with pytest.raises(BackendError, match="not permitted when stream is capturing"):
        device.capture(lambda: BREACHES[says](device))
    wants_fault(says)
    device.synchronize()  # and it works again


def test_kernels_are_given_live_memory_and_a_grid_that_there_is() -> None:
    device = Cuda()
    kernel = device.compile(kernel_source(), "step")
    memory = device.zeros((4096,), np.float32)
    arguments = (memory, 0, *[memory] * 7, 4, 4, 8)
    with pytest.raises(BackendError, match="the GPU failed: cudaErrorInvalidConfiguration"):
        kernel((1, 65536), arguments)
    wants_fault("a grid of [1, 65536, 1]")
    on_host = np.zeros(4, np.float32)
    with pytest.raises(BackendError, match="an illegal memory access"):
        kernel((1, 1), (np.uintp(on_host.ctypes.data), *arguments[1:]))
    wants_fault("given to a kernel, is not in live memory of GPU 0")


def test_another_current_device_is_a_fault() -> None:
    device = Cuda(1)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        device._stream.record()  # as whoever forgets `here`
    wants_fault("GPU 1 used on GPU 0")
    with pytest.raises(BackendError, match="CuPy cannot use the GPU: .*invalid device ordinal"):
        Cuda(2)


def test_a_chain_runs_on_the_second_gpu_from_any_thread() -> None:
    wanted = Sampler(Echo(SPEC, 4)).sample(3, seed=3)
    sampler = Sampler(EchoNetwork(SPEC, 4, index=1))
    images = []
    thread = threading.Thread(
        target=lambda: images.append(sampler.sample(3, seed=3, callback=lambda *step: None))
    )
    thread.start()
    thread.join()
    np.testing.assert_array_equal(images[0], wanted)
    np.testing.assert_array_equal(sampler.sample(3, seed=3), wanted)


def test_a_full_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIME, "left", 3 << 20)
    with pytest.raises(BackendError, match="the GPU has .* MiB of memory left.*smaller max_batch"):
        Cuda().empty((1 << 26,), np.float32)
