"""The chain on a GPU: against the bare network replayed, against peers, and the kernel against the card's bandwidth.

    python -m benches.gpu [cifar10]

Prints one table for the card that is visible. Needs the extras `gpu` and `train`, and diffusers; it has not been run
yet, as no GPU was at hand.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benches.models import Model, diffusers_pipeline, export_preset
from benches.table import Row
from benches.timing import interleave, median, ratio
from ddpm_deploy import Sampler
from ddpm_deploy.gpu import driver, visible_gpu
from ddpm_deploy.runtime.device.cuda import Cuda, CudaStepper
from ddpm_deploy.runtime.network import bucket_of
from ddpm_deploy.runtime.protocols import SLOT
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import COLUMNS

BATCHES: Final = (1, 16, 64, 256)
STEPS: Final = 1000  # the full chain, so that what a call costs once counts as it does in use
LIMIT: Final = 1.02


def measure(model: Model) -> Iterator[Row]:
    """The rows of one network."""
    for batch in BATCHES:
        before = Cuda().free()
        with Sampler.load(model.onnx, device="cuda", max_batch=batch) as sampler:
            used = before - Cuda().free()
            yield Row(f"{model.name}, batch {batch}: memory of the card", f"{used / 2**20:.0f} MiB")
            yield from _chain(sampler, batch, f"{model.name}, batch {batch}")
    yield from _against_peers(model, 16, f"{model.name}, batch 16")


def _chain(sampler: Sampler, batch: int, label: str) -> Iterator[Row]:
    network: Any = sampler.network
    device = network.device
    sampler.sample_on_device(batch, steps=STEPS, seed=0)  # warms it up, and captures the graph
    bucket = bucket_of(network, batch)

    def alone() -> None:
        network.enqueue(bucket)

    replay = device.capture(alone) if network.capturable else alone

    def bare() -> None:
        for _ in range(STEPS):
            replay()
        device.synchronize()

    def ours() -> None:
        sampler.sample_on_device(batch, steps=STEPS, seed=0)

    times = interleave({"ours": ours, "bare": bare}, STEPS)
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


def _against_peers(model: Model, batch: int, label: str) -> Iterator[Row]:
    """The same chain by PyTorch in half precision, compiled or not, and by diffusers' pipeline."""
    network = model.network.half().cuda().eval()
    table = torch.from_numpy(model.spec.embedding.table(model.spec.timesteps)).cuda().half()
    rows = model.spec.step_table().float32_rows()[:STEPS]
    shape = (batch, *model.spec.image_shape)

    def loop(predict: Callable[[Any, Any], Any]) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            x = torch.randn(shape, device="cuda")
            for row in rows:
                r = dict(zip(COLUMNS, row.tolist(), strict=True))
                temb = table[int(r["t"])].expand(batch, -1)
                out = predict(x.half(), temb).float()
                x0 = (r["a"] * x + r["b"] * out).clamp(r["lo"], r["hi"])
                x = r["c"] * x0 + r["d"] * x + r["e"] * torch.randn_like(x)
            torch.cuda.synchronize()

        return run

    pipeline = diffusers_pipeline(model).to("cuda", torch.float16)
    with Sampler.load(model.onnx, device="cuda", max_batch=batch) as sampler:
        blocks = {
            "ours": lambda: sampler.sample(batch, steps=STEPS, seed=0),
            "PyTorch eager, fp16": loop(network),
            "torch.compile, fp16": loop(torch.compile(network)),
            "diffusers' DDPMPipeline, fp16": lambda: pipeline(batch_size=batch, num_inference_steps=STEPS),
        }
        times = interleave(blocks, STEPS)
    for name, seconds in times.items():
        if name != "ours":
            yield Row(f"{label}: {name} ÷ ours", ratio(seconds, times["ours"]))


def main() -> None:
    """Print the table."""
    gpu = visible_gpu()
    if gpu is None:
        sys.exit("no NVIDIA GPU is visible: this needs one (ddpm-deploy doctor says what is missing)")
    print(
        f"{gpu.name}, driver {driver().version}\n\n| what | measured | asked | |\n| --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(
            export_preset(sys.argv[1] if len(sys.argv) > 1 else "cifar10", Path(folder), precision="fp16")
        ):
            print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
