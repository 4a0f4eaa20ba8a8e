"""The chain on a GPU against the bare network replayed, and the kernel against what copying takes."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from benches.table import Row
from benches.timing import ROUNDS, interleave, median, ratio
from ddpm_deploy import Sampler
from ddpm_deploy.runtime.device.cuda import CudaStepper
from ddpm_deploy.runtime.network import bucket_of
from ddpm_deploy.runtime.protocols import SLOT
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import COLUMNS

LIMIT: Final = 1.02
NO_GPU: Final = "no NVIDIA GPU is visible: this needs one (ddpm-deploy doctor says what is missing)"


def against_replay(
    sampler: Sampler, batch: int, label: str, steps: int, rounds: int = ROUNDS
) -> Iterator[Row]:
    """The rows of one batch size. steps: of a chain that is timed."""
    network: Any = sampler.network
    device = network.device
    sampler.sample_on_device(batch, steps=steps, seed=0)  # warms it up
    bucket = bucket_of(network, batch)

    def alone() -> None:
        network.enqueue(bucket)

    replay = device.capture(alone) if network.capturable else alone

    def bare() -> None:
        for _ in range(steps):
            replay()
        device.synchronize()

    def ours() -> None:
        sampler.sample_on_device(batch, steps=steps, seed=0)

    times = interleave({"ours": ours, "bare": bare}, steps, rounds)
    got = median(times["ours"]) / median(times["bare"])
    yield Row(
        f"{label}: chain ÷ steps × bare graph replay",
        ratio(times["ours"], times["bare"]),
        f"≤ {LIMIT}",
        got <= LIMIT,
    )
    yield Row(
        f"{label}: images/s of the full chain",
        f"{batch / median(times['ours']) / sampler.spec.timesteps:.2f}",
    )
    yield _kernel(sampler, batch, label)


def _kernel(sampler: Sampler, batch: int, label: str) -> Row:
    """Bytes that the kernel must move over its time, against what copying moves."""
    network: Any = sampler.network
    device, chain = network.device, sampler._chain
    stepper = chain._stepper
    assert isinstance(stepper, CudaStepper)
    size = int(np.prod(network.spec.image_shape))
    # x and x̂0 are read and written, the prediction read; a row, an embedding and a slot for each image.
    moved = batch * 4 * (5 * size + len(COLUMNS) + 2 * network.spec.embedding.dim + SLOT.itemsize // 2)
    chain.start(np.arange(batch), Request(count=batch, seed=0))
    update = device.capture(lambda: stepper._launch(0, batch))
    source, target = (device.empty((1 << 28,), np.uint8) for _ in range(2))
    seconds = _time(update, device)
    copying = _time(
        lambda: target.data.copy_from_device_async(source.data, source.nbytes, device._stream), device
    )
    chain.clear()
    share = (moved / seconds) / (2 * source.nbytes / copying)
    return Row(f"{label}: the kernel's bandwidth ÷ a copy's", f"{share:.2f} ({seconds * 1e6:.0f} µs a step)")


def _time(work: Callable[[], Any], device: Any, times: int = 200) -> float:
    """Seconds that something started takes, many times in a row."""
    work()
    device.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    device.synchronize()
    return (time.perf_counter() - start) / times
