"""What a pretended CUDA runtime shows, and no GPU would: rules broken without a wrong image, and what is left over.

Run by test_pretended_cuda.py, in a process of its own.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator

import cupy
import numpy as np
import pytest

from benches import first_run
from benches.replay import against_replay
from ddpm_deploy import Sampler
from ddpm_deploy.errors import BackendError
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.device.kernel import kernel_source
from ddpm_deploy.runtime.request import Request
from tests.pretended_cuda import RUNTIME
from tests.test_chain import SPEC, TABLES
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


class Waiting(EchoNetwork):
    """It says that it can be captured, and waits in the middle."""

    def enqueue(self, bucket: int) -> None:
        """As ever, once what was started is done."""
        self.device.synchronize()
        super().enqueue(bucket)


def test_a_capture_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    sampler = Sampler(Waiting(SPEC, 4))
    wants_fault("waiting for")
    (told,) = caplog.messages
    assert "cannot be captured into a CUDA graph" in told
    assert "not permitted" in told
    np.testing.assert_array_equal(sampler.sample(3, seed=0), Sampler(Echo(SPEC, 4)).sample(3, seed=0))
    assert len(caplog.messages) == 1
    assert not RUNTIME.faults


def test_waits_sleep_and_copies_are_of_pinned_memory() -> None:
    RUNTIME.spins = RUNTIME.pageable = 0
    with Sampler(EchoNetwork(SPEC, 4)) as sampler:
        sampler.sample(3, seed=0, callback=lambda *step: None)
        sampler.sample_on_device(2, seed=1)
        sampler.sample(2, steps=3, noise=lambda draw: np.zeros((2, *SPEC.image_shape), np.float32))
    assert RUNTIME.spins == 0
    assert RUNTIME.pageable == 0


class Slow(EchoNetwork):
    """A batch of one is quick; of two, it takes SECONDS."""

    SECONDS = 0.015
    done = 0

    def enqueue(self, bucket: int) -> None:
        """As ever, and then sleep."""
        super().enqueue(bucket)
        with self.device.here():
            self.device._stream.launch_host_func(self._sleep, bucket)

    def _sleep(self, bucket: int) -> None:
        time.sleep(self.SECONDS * (bucket - 1))
        self.done += 1


def test_what_is_queued_takes_a_quarter_of_a_second_at_most() -> None:
    network = Slow(SPEC, 2)
    chain = Chain(network)
    most = {}
    for count in (1, 2):
        chain.start(np.arange(count), Request(table=TABLES["full"], count=count, seed=0))
        before, taken, ahead = network.done, 0, []
        while chain.active.any():
            chain.step()
            taken += 1
            ahead.append(taken - (network.done - before))
        chain.images(np.arange(count))
        most[count] = max(ahead)
    assert most[1] > 1  # the GPU has something to do
    assert 1 < most[2] <= 0.25 / Slow.SECONDS


def in_use() -> tuple[dict[int, object], dict[int, object]]:
    """Handles and memory that are left once what is unreachable, and CuPy's reserves, are gone."""
    gc.collect()
    for device in (0, 1):
        with cupy.cuda.Device(device):
            cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()
    return dict(RUNTIME.handles), dict(RUNTIME.memory)


def test_nothing_is_left_after_close() -> None:
    assert in_use() == ({}, {})
    for index in (0, 1):
        with Sampler(EchoNetwork(SPEC, 4, index)) as sampler:
            sampler.sample(3, seed=0, callback=lambda *step: None)
        del sampler
        assert (RUNTIME.handles, RUNTIME.memory) == ({}, {})


def pinned_bytes() -> int:
    """Of what was made and not freed."""
    return sum(memory.size for memory in RUNTIME.memory.values() if memory.device is None)


def test_preview_buffers_are_made_when_they_are_asked_for() -> None:
    sampler = Sampler(EchoNetwork(SPEC, 8))
    sampler.sample(8, seed=0)
    before = pinned_bytes()
    sampler.sample(8, seed=0)
    assert pinned_bytes() == before
    sampler.sample(8, seed=0, callback=lambda *step: None)
    assert pinned_bytes() >= before + 2 * 2 * sampler.network.memory["x"].nbytes


@pytest.fixture
def without_reserves() -> Iterator[None]:
    """CuPy frees memory at once, so what comes later is seen."""
    in_use()
    pools = cupy.get_default_memory_pool(), cupy.get_default_pinned_memory_pool()
    cupy.cuda.set_allocator(None)
    cupy.cuda.set_pinned_memory_allocator(None)
    yield
    cupy.cuda.set_allocator(pools[0].malloc)
    cupy.cuda.set_pinned_memory_allocator(pools[1].malloc)


@pytest.mark.usefixtures("without_reserves")
def test_close_waits_for_every_stream() -> None:
    sampler = Sampler(EchoNetwork(SPEC, 4))
    with pytest.raises(ZeroDivisionError):  # while a preview is on its way
        sampler.sample(3, seed=0, callback=lambda step, x, x0: 1 / (step - 5))
    sampler.close()
    del sampler
    assert in_use() == ({}, {})


@pytest.mark.usefixtures("without_reserves")
def test_memory_outlives_the_work_on_it() -> None:
    wanted = Sampler(Echo(SPEC, 4)).sample(9, seed=0)
    sampler = Sampler(EchoNetwork(SPEC, 4))
    np.testing.assert_array_equal(sampler.sample(9, seed=0, callback=lambda *step: None), wanted)
    sampler.close()


def test_what_the_first_run_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the network of PyTorch's; the figures mean nothing here."""
    monkeypatch.setattr(first_run, "_sampler", lambda preset, batch: Sampler(EchoNetwork(SPEC, batch)))
    monkeypatch.setattr(first_run, "LOADS", 3)
    assert [row.measured for row in first_run.load_and_close()] == ["0.0 MiB, 0.0 MiB"]
    with Sampler(EchoNetwork(SPEC, 4)) as sampler:
        assert len(list(against_replay(sampler, 4, "echo", steps=5, rounds=1))) == 3
