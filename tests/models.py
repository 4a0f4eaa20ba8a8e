"""Networks and specs for the tests: small, exact, and without a backend."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.network import HostNetwork
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.spec import ModelSpec, Provenance, UNetConfig

if TYPE_CHECKING:
    from ddpm_deploy.train.trainer import Trainer
    from ddpm_deploy.train.world import World

TINY_UNET = UNetConfig(
    channels=8,
    widths=(8, 16),
    time_width=32,
    blocks=1,
    attention_levels=(1,),
    heads=2,
    groups=4,
    dropout=0.0,
)


def tiny_spec(
    shape: tuple[int, int, int] = (1, 8, 8), timesteps: int = 1000, network: UNetConfig | None = TINY_UNET
) -> ModelSpec:
    """The spec of TINY_UNET on images of one shape."""
    return ModelSpec(
        image_shape=shape,
        timesteps=timesteps,
        embedding=SinusoidalEmbedding(dim=8),
        network=network,
        provenance=Provenance(digest="0" * 64),
    )


class ArrayNetwork(HostNetwork):
    """A network in NumPy: `answer` is its prediction, for (B, C, H, W) and t (B,)."""

    def __init__(self, spec: ModelSpec, max_batch: int) -> None:
        super().__init__(spec, max_batch)
        self._embedding = spec.embedding.table(spec.timesteps)

    def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
        """A network with no meaning, whose rows do not depend on one another."""
        wave = np.float32(0.3) + self._embedding[t][:, :1, None, None]
        result: Array = x * wave - np.roll(x, 1, axis=3) * np.float32(0.25)
        return result

    def predict(self, batch: int) -> None:
        """Predict, with t found from the embedding as a network would have to."""
        distance = np.abs(self._embedding[None] - self.memory["temb"][:batch, None]).max(axis=2)  # (B, T)
        t = distance.argmin(axis=1)
        assert distance.min() == 0.0
        self.memory["prediction"][:batch] = self.answer(self.memory["x"][:batch], t)


class GaussianNetwork(ArrayNetwork):
    """The optimal ε-network for data N(mean, std²): E[ε | x_t] in closed form."""

    def __init__(self, spec: ModelSpec, max_batch: int, mean: float, std: float) -> None:
        super().__init__(spec, max_batch)
        self._alphas_cumprod = Schedule(spec.schedule.betas(spec.timesteps)).alphas_cumprod
        self._mean, self._std = mean, std

    def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
        """√(1 - ᾱ)·(x - √ᾱ·mean) / (ᾱ·std² + 1 - ᾱ)."""
        ac = self._alphas_cumprod[t][:, None, None, None]
        epsilon = np.sqrt(1 - ac) * (x - np.sqrt(ac) * self._mean) / (ac * self._std**2 + 1 - ac)
        return epsilon.astype(np.float32)


def tiny_checkpoint(path: Path) -> Path:
    """A checkpoint after a few real training steps on digits, of TINY_UNET."""
    import torch

    from ddpm_deploy.train.data import find_images, read_images
    from ddpm_deploy.train.settings import PRESETS
    from ddpm_deploy.train.trainer import Trainer

    settings = PRESETS["digits"].settings("digits", steps=40, warmup_steps=5, batch_size=16)
    trainer = Trainer(
        tiny_spec(), settings, read_images(find_images("digits"), (8, 8), 1), torch.device("cpu")
    )
    for _ in range(settings.steps):
        trainer.advance()
    trainer.checkpoint().save(path)
    return path


def tiny_trainer(world: "World") -> "Trainer":
    """Ready to take 50 steps with others, of batches that do not divide evenly, in parts."""
    import torch

    from ddpm_deploy.train.data import find_images, read_images
    from ddpm_deploy.train.settings import PRESETS
    from ddpm_deploy.train.trainer import Trainer

    settings = PRESETS["digits"].settings("digits", steps=50, batch_size=9, accumulate=2, flip=True)
    data = read_images(find_images("digits"), (8, 8), 1)
    return Trainer(tiny_spec(), settings, data, torch.device("cpu"), world=world)


def tiny_export(checkpoint: Path) -> Path:
    """That checkpoint, exported beside it."""
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    path = checkpoint.with_suffix(".onnx")
    export_onnx(*load_network(open_model(checkpoint)), path)
    return path
