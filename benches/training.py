"""Training against a bare PyTorch loop, and what its data costs it."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benches.table import Row
from benches.timing import interleave, median, ratio
from ddpm_deploy.train.checkpoint import new_network
from ddpm_deploy.train.data import Dataset, find_images, read_images
from ddpm_deploy.train.diffusion import Diffusion
from ddpm_deploy.train.settings import PRESETS
from ddpm_deploy.train.trainer import Trainer

_BLOCK: Final = 8  # steps in a row, before the other's turn
_CPU: Final = torch.device("cpu")
_FILES: Final = 2000


def measure(preset_name: str) -> Iterator[Row]:
    """Rows for one preset: throughput as a ratio, and the share of a step that fetching its images takes."""
    preset = PRESETS[preset_name]
    spec = preset.spec(preset_name, 3, preset.image_size)
    settings = preset.settings(preset_name, steps=10**6)
    images = np.random.default_rng(0).integers(0, 256, (2048, *spec.image_shape), np.uint8)
    trainer = Trainer(spec, settings, Dataset(images), _CPU)
    bare = _Bare(trainer, torch.from_numpy(images))

    def ours() -> None:
        for _ in range(_BLOCK):
            trainer.advance()

    times = interleave({"ours": ours, "bare": bare}, _BLOCK)
    share = median(times["ours"]) / median(times["bare"])
    label = f"training {preset_name}, batch {settings.batch_size}"
    yield Row(
        f"{label}: our step ÷ a bare PyTorch loop's",
        ratio(times["ours"], times["bare"]),
        "≤ 1.05",
        share <= 1.05,
    )
    yield Row(f"{label}: images/s", f"{settings.batch_size / median(times['ours']):.0f}")
    fetching = []
    for step in range(50):
        start = time.perf_counter()
        trainer._batch(step)
        fetching.append(time.perf_counter() - start)
    part = statistics.median(fetching) / median(times["ours"])
    yield Row(f"{label}: fetching a batch ÷ a step", f"{part:.2%}", "≤ 5%", part <= 0.05)


class _Bare:
    """What is left of training without everything that a person wants of it: no EMA, clipping, schedule, flips."""

    def __init__(self, trainer: Trainer, images: torch.Tensor) -> None:
        self._size = trainer.settings.batch_size
        self._images = images
        self._network = new_network(trainer.spec).train()
        self._diffusion = Diffusion(trainer.spec)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> None:
        """Some steps."""
        for _ in range(_BLOCK):
            x0 = self._images[torch.randint(len(self._images), (self._size,))].float() / 127.5 - 1
            t, epsilon = torch.randint(1000, (self._size,)), torch.randn(x0.shape)
            x = self._diffusion.q_sample(x0, t, epsilon)
            loss = F.mse_loss(self._network(x, self._diffusion.embedding[t]), epsilon)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()


def measure_reading() -> Iterator[Row]:
    """How fast a folder of photographs is read, once, before training."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        photo = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((640, 480))
        for i in range(_FILES):
            photo.save(Path(folder) / f"{i}.jpg", quality=90) if i < 50 else (
                Path(folder) / f"{i}.jpg"
            ).symlink_to(Path(folder) / f"{i % 50}.jpg")
        start = time.perf_counter()
        read_images(find_images(folder), (32, 32), 3)
        speed = _FILES / (time.perf_counter() - start)
    yield Row("reading JPEGs of 640×480 for 32×32, once before training", f"{speed:.0f} images/s")
