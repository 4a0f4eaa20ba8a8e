"""How good the digits are that each solver draws: `python -m benches.quality` writes docs/quality.md and a picture.

The model is that of `make demo`. A small classifier, trained on a third of the real digits, gives the features in
which a Fréchet distance is taken (Heusel et al. 2017), as FID takes those of Inception. The second third is what
images are held against; the last third against that is the yardstick.
"""

import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ddpm_deploy.cli.bodies.progress import duration
from ddpm_deploy.runtime.images import grid, save_png, to_uint8
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ChainSettings
from ddpm_deploy.train.data import find_images, read_images

_ROOT: Final = Path(__file__).parent.parent
_DOCS: Final = _ROOT / "docs" / "quality.md"
_PICTURE: Final = _ROOT / "docs" / "quality.png"
_MARK: Final = "<!-- made by python -m benches.quality -->"
_CHAINS: Final = {
    "ddpm, 1000 steps": ChainSettings(),
    "ddpm, 50 steps": ChainSettings(steps=50),
    "ddim, 50 steps": ChainSettings(solver="ddim", steps=50),
    "dpmpp-2m, 20 steps": ChainSettings(solver="dpmpp-2m", steps=20, spacing="linspace"),
}
_RESAMPLES: Final = 200
_EPOCHS: Final = 60
_PICTURED: Final = 12

Features = NDArray[np.float64]


def main() -> None:
    """Draw as many images as a third of the data, judge them, and write the part of the page behind the mark."""
    torch.manual_seed(0)
    data = read_images(find_images("digits", labels=True), (8, 8), 1)
    assert data.labels is not None
    order = np.random.default_rng(0).permutation(len(data.images))
    known, reference, held = np.split(order[: len(order) // 3 * 3], 3)
    classifier = _train(data.images[known], data.labels[known])
    accuracy = (_logits(classifier, data.images[held]).argmax(1) == data.labels[held]).mean()
    rows = [_Row("real, the last third", data.images[held], None)]
    rows += _draw(len(held))
    features = classifier.features(data.images[reference])
    lines = [_line(row, classifier, features) for row in rows]
    shown = [row.images[:_PICTURED] for row in rows]
    save_png(grid(np.concatenate(shown).transpose(0, 2, 3, 1), _PICTURED), _PICTURE, {})
    text = _DOCS.read_text().split(_MARK)[0]
    _DOCS.write_text(text + _MARK + "\n\n" + _page(accuracy, len(known), len(held), lines))
    print("\n".join(lines) + f"\nwrote {_DOCS} and {_PICTURE}")


@dataclass(frozen=True)
class _Row:
    """Images (N, 1, 8, 8) uint8, and the seconds that they took."""

    name: str
    images: NDArray[np.uint8]
    seconds: float | None


def _draw(count: int) -> Iterator[_Row]:
    with Sampler.load(_ROOT / "demo" / "digits.onnx") as sampler:
        for name, settings in _CHAINS.items():
            start = time.perf_counter()
            images = sampler.sample(count, table=sampler.spec.step_table(settings), seed=0)
            seconds = time.perf_counter() - start
            print(f"{name}: {duration(seconds)}", flush=True)
            yield _Row(name, to_uint8(images).transpose(0, 3, 1, 2), seconds)


class _Classifier(nn.Module):
    """Two convolutions and two layers; the features are the 64 numbers before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8) in [-1, 1]."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> Features:
        """(N, 64)."""
        return self.eval().body(_scaled(images)).double().numpy()  # type: ignore[no-any-return]


def _scaled(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).float() / 127.5 - 1


@torch.no_grad()
def _logits(classifier: _Classifier, images: NDArray[np.uint8]) -> Features:
    return classifier.eval()(_scaled(images)).double().numpy()  # type: ignore[no-any-return]


def _train(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> _Classifier:
    classifier = _Classifier().train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    x, y = _scaled(images), torch.from_numpy(labels)
    for _ in range(_EPOCHS):
        for part in torch.randperm(len(x)).split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(classifier(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return classifier


def frechet(a: Features, b: Features) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2(Σ_a Σ_b)^½), of the normal distributions with these moments."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)


def _line(row: _Row, classifier: _Classifier, reference: Features) -> str:
    features = classifier.features(row.images)
    rng, count = np.random.default_rng(0), len(features)
    resampled = [
        frechet(reference[rng.integers(0, count, count)], features[rng.integers(0, count, count)])
        for _ in range(_RESAMPLES)
    ]
    logits = torch.from_numpy(_logits(classifier, row.images))
    sure = (logits.softmax(1).amax(1) >= 0.9).double().mean().item()
    took = "" if row.seconds is None else duration(row.seconds)
    return (
        f"| {row.name} | {frechet(reference, features):.2f} ± {np.std(resampled):.2f} | {sure:.0%} | {took} |"
    )


def _page(accuracy: float, known: int, held: int, lines: list[str]) -> str:
    return (
        f"Measured {datetime.date.today().isoformat()}: {held} images of each, seed 0; the classifier, trained on "
        f"{known} real digits, is right on {accuracy:.1%} of the other {held}.\n\n"
        "| images | Fréchet distance to real digits | classified with p ≥ 0.9 | drawn in |\n"
        "| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
