"""The chain on a GPU: against the bare network replayed, against peers, and the kernel against the card's bandwidth.

    python -m benches.gpu [cifar10]

Prints one table for the card that is visible. Needs the extras `gpu` and `train`, and diffusers; it has not been run
yet, as no GPU was at hand.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from benches.models import Model, diffusers_pipeline, export_preset
from benches.replay import NO_GPU, against_replay
from benches.table import HEAD, Row
from benches.timing import interleave, ratio
from ddpm_deploy import Sampler
from ddpm_deploy.gpu import driver, visible_gpu
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.solvers import COLUMNS

BATCHES: Final = (1, 16, 64, 256)
STEPS: Final = 1000  # the full chain, so that what a call costs once counts as it does in use


def measure(model: Model) -> Iterator[Row]:
    """The rows of one network."""
    for batch in BATCHES:
        before = Cuda().free()
        with Sampler.load(model.onnx, device="cuda", max_batch=batch) as sampler:
            used = before - Cuda().free()
            yield Row(f"{model.name}, batch {batch}: memory of the card", f"{used / 2**20:.0f} MiB")
            yield from against_replay(sampler, batch, f"{model.name}, batch {batch}", STEPS)
    yield from _against_peers(model, 16, f"{model.name}, batch 16")


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

    pipeline = diffusers_pipeline(model.spec).to("cuda", torch.float16)
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
        sys.exit(NO_GPU)
    print(f"{gpu.name}, driver {driver().version}\n\n{HEAD}", end="")
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(
            export_preset(sys.argv[1] if len(sys.argv) > 1 else "cifar10", Path(folder), precision="fp16")
        ):
            print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
