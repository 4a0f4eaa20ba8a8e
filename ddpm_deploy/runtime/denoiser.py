"""The Denoiser protocol: the network as a chain sees it, and its buffers."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.spec import ModelSpec

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


class Denoiser(Protocol):
    """A network that owns its input and output memory: the chain writes x and temb, and reads
    prediction, which is its to overwrite until the next run.

    spec: the model's. device: where it runs, for people ("cpu", "cuda:0"). max_batch: B.
    x: (B, C, H, W). temb: (B, D), the timestep embedding. y: (B,) int64, the labels, which only a
    class-conditional model reads. prediction: (B, *spec.prediction_shape). All others float32, and the same
    memory from the first call to the last.
    """

    spec: ModelSpec
    device: str
    max_batch: int
    x: Array
    temb: Array
    y: Labels
    prediction: Array

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows: x, temb (and y) → prediction."""

    def close(self) -> None:
        """Free what the backend holds. Nothing may be called afterwards."""


def default_max_batch(spec: ModelSpec) -> int:
    """The largest batch on a CPU, where nothing else is said: 64, and less for images over 16×16.

    Throughput on a CPU stops growing there, while the memory of the activations goes on.
    """
    _, height, width = spec.image_shape
    return max(1, min(64, 128 * 128 // (height * width)))


def allocate(spec: ModelSpec, max_batch: int) -> tuple[Array, Array, Labels, Array]:
    """Host buffers (x, temb, y, prediction) of a Denoiser; the system gives memory only where they are used."""
    return (
        np.zeros((max_batch, *spec.image_shape), np.float32),
        np.zeros((max_batch, spec.embedding.dim), np.float32),
        np.zeros(max_batch, np.int64),
        np.zeros((max_batch, *spec.prediction_shape), np.float32),
    )
