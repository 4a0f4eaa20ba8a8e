"""A DDPM whose every answer is known: data N(μ, σ²), the optimal ε-network in closed form, twelve steps.

It is what `ddpm-deploy doctor` runs on a backend that it was never on. For Gaussian data the best ε-network is affine
in x (E[ε | x_t] of Ho et al. 2020's forward process),

    ε(x, t) = √(1-ᾱ)·(x - √ᾱ·μ) / (ᾱ·σ² + 1-ᾱ) = p(t)·x + q(t)

so whole chains can be followed in two numbers, their mean and variance, without a network and without a table.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.noise import addressed_noise
from ddpm_deploy.schedule import LinearBetas
from ddpm_deploy.spec import ModelSpec, Provenance

MEAN: Final = 0.3
STD: Final = 0.4

# Twelve timesteps that the embedding keeps well apart: p and q are then linear functions of it, to 1e-6.
SPEC: Final = ModelSpec(
    image_shape=(3, 16, 16),
    value_range=(-100.0, 100.0),  # nothing is clipped, as a clipped chain is not affine
    timesteps=12,
    schedule=LinearBetas(beta_start=0.02, beta_end=0.8),
    embedding=SinusoidalEmbedding(dim=64, max_period=6.0),
    provenance=Provenance(digest="0" * 64, data="N(0.3, 0.16), in closed form"),
)


def coefficients() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and q of each t, (T,)."""
    ac = SPEC.make_schedule().alphas_cumprod
    p = np.sqrt(1 - ac) / (ac * STD**2 + 1 - ac)
    return p, -p * np.sqrt(ac) * MEAN


def moments() -> tuple[float, float]:
    """The mean and variance of each pixel of the full ancestral chain's images, by recursion from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for slope, shift, sigma in _steps():
        mean, variance = slope * mean + shift, slope**2 * variance + sigma**2
    return float(mean), float(variance)


def exact_images(count: int, seed: int) -> NDArray[np.float64]:
    """The images of the full chain on the addressed noise, in float64 and without a network: (count, C, H, W)."""
    indices = np.arange(count, dtype=np.uint64)

    def draw(number: int) -> NDArray[np.float64]:
        return addressed_noise(seed, indices, number, SPEC.image_shape).astype(np.float64)

    x = draw(0)
    for t, (slope, shift, sigma) in zip(reversed(range(SPEC.timesteps)), _steps(), strict=True):
        x = slope * x + shift + (sigma * draw(t + 1) if sigma else 0.0)
    return x


def _steps() -> list[tuple[float, float, float]]:
    """x ← slope·x + shift + σ·z of each step from t = T-1 to 0: Ho's equation 11, with σ² = β and none at t = 0."""
    schedule = SPEC.make_schedule()
    betas, ac = schedule.betas, schedule.alphas_cumprod
    p, q = coefficients()
    steps = []
    for t in reversed(range(SPEC.timesteps)):
        share, root = betas[t] / math.sqrt(1 - ac[t]), math.sqrt(1 - betas[t])
        sigma = math.sqrt(betas[t]) if t else 0.0
        steps.append(((1 - share * p[t]) / root, -share * q[t] / root, sigma))
    return steps


@contextmanager
def onnx_model() -> Iterator[ModelFile]:
    """The network as an .onnx file with its ModelSpec; tests/golden/gaussian.py made it.

    prediction = x·unsqueeze(temb @ P) + unsqueeze(temb @ Q), P and Q the interpolation of p and q; and x goes through a
    normalisation, as in real networks, whose effect is undone from the mean and variance of each channel.
    """
    with resources.as_file(resources.files("ddpm_deploy.doctor").joinpath("gaussian.onnx")) as path:
        yield open_model(path)


@contextmanager
def ncnn_model() -> Iterator[ModelFile]:
    """The same as a .ncnn file, which tests/golden/gaussian.py made of it."""
    with resources.as_file(resources.files("ddpm_deploy.doctor").joinpath("gaussian.ncnn")) as path:
        yield open_model(path)
