"""What features cost beside their network: reading, resizing and sums of images, and the comparison.

python -m benches.distances efficientnet demo/mnist.npz
"""

import sys
import time
from typing import Any

import numpy as np
import torch

from ddpm_deploy.evaluate.data import NO_FEATURES, images_as, shape_of
from ddpm_deploy.evaluate.features import Gathered, gather, load_extractor
from ddpm_deploy.evaluate.frechet import bias_by_halves, frechet_distance, standard_error
from ddpm_deploy.evaluate.kernel import kernel_distance
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.train.data import find_images

_IMAGES = 32
_ROUNDS = 4
_COMPARED = 2000


def main(features: str, data: str) -> None:
    """Print the ratio of each round, and how long it takes to compare so many features."""
    torch.set_num_threads(cpu_threads())
    extractor: Any = load_extractor(features, torch.device("cpu"))
    source = find_images(data)
    images = images_as(shape_of(source), source, resize=False, why=NO_FEATURES)
    indices = np.arange(_IMAGES)
    network, spent = extractor._network, 0.0

    def timed(x: torch.Tensor) -> Any:
        nonlocal spent
        start = time.perf_counter()
        made = network(x)
        spent += time.perf_counter() - start
        return made

    extractor._network = timed
    gather(extractor, extractor.width, [images.read(indices)])
    ratios = []
    for _ in range(_ROUNDS):
        spent, start = 0.0, time.perf_counter()
        found = gather(extractor, extractor.width, [images.read(indices)])
        ratios.append((time.perf_counter() - start) / spent)
    print(
        f"{extractor.name}: whole ÷ network {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(f"{extractor.name}: {spent / found.count * 1e3:.0f} ms an image in the network")
    some, other = (_like(found.kept, seed) for seed in (0, 1))
    start = time.perf_counter()
    target, own = some.moments.normal, other.moments.normal
    frechet_distance(target, own), standard_error(target, own, other.kept)
    bias_by_halves(target, own, other.kept)
    kernel_distance(some.kept, other.kept)
    print(
        f"{extractor.name}: {time.perf_counter() - start:.1f} s to compare {_COMPARED} features with as many"
    )


def _like(features: Any, seed: int) -> Gathered:
    """As many features, between those that were found, so that their covariance has its rank."""
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.ones(len(features)), _COMPARED).astype(np.float32)
    noise = 0.01 * random.standard_normal((_COMPARED, features.shape[1]), np.float32)
    made: Any = shares @ features + noise
    found = Gathered(features.shape[1])
    found.add(made)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
