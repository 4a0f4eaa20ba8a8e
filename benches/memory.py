"""What a step allocates, and whether memory grows."""

import tracemalloc
from collections.abc import Iterator

import numpy as np

from benches.models import Model
from benches.table import Row
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.request import Request


def measure(model: Model) -> Iterator[Row]:
    """Rows for one network at batch 1, over 20 steps after the first."""
    chain = Chain(OrtNetwork(open_model(model.onnx), max_batch=1))
    chain.start(np.array([0]), Request(seed=0))
    chain.step()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    largest = 0
    for _ in range(20):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        chain.step()
        largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    growth = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    image = chain.images(np.array([0])).nbytes
    shape = "×".join(map(str, model.spec.image_shape))
    share = f"{largest / 1000:.1f} KB ({largest / image:.0%} of an image)"
    yield Row(f"{shape}: most that a step allocates (tracemalloc)", share, "< an image", largest < image)
    yield Row(
        f"{shape}: growth of memory over 20 steps", f"{growth / 1000:.1f} KB", "< 1 MB", growth < 1_000_000
    )
