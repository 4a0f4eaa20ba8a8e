"""What the bound costs beside the network: the whole evaluation ÷ the network's own calls.

python -m benches.likelihood demo/digits.onnx digits
"""

import sys
import time
from typing import Any

import numpy as np

from ddpm_deploy.evaluate.data import open_images
from ddpm_deploy.evaluate.likelihood import Terms, likelihood
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import load_network

_IMAGES = 64
_ROUNDS = 5


def main(model: str, data: str) -> None:
    """Print the ratio of each round: both are of the same calls."""
    opened = open_model(model)
    network: Any = load_network(opened)
    images, terms = open_images(data, opened.spec), Terms(opened.spec, strata=20)
    indices = np.linspace(0, images.count - 1, _IMAGES).astype(np.int64)
    labels = None if images.labels is None else images.labels[indices]
    enqueue, spent = network.enqueue, 0.0

    def timed(bucket: int) -> None:
        nonlocal spent
        start = time.perf_counter()
        enqueue(bucket)
        network.device.synchronize()
        spent += time.perf_counter() - start

    network.enqueue = timed
    likelihood(network, terms, images.read, indices, labels)
    ratios = []
    for _ in range(_ROUNDS):
        spent, start = 0.0, time.perf_counter()
        likelihood(network, terms, images.read, indices, labels)
        ratios.append((time.perf_counter() - start) / spent)
    rows = _IMAGES * terms.per_image
    print(
        f"{model}: whole ÷ network {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {rows} rows"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
