"""The judge: a small classifier of real images, in whose features Fréchet distances are, as FID in Inception's."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from benches.quality.data import Labels, Part, Pixels

Features = NDArray[np.float64]


class Judge(nn.Module):
    """Convolutions down to 4×4, and two layers; the features are the 64 numbers before the last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]
        while size > 4:
            width = 32 if len(layers) == 2 else 64
            layers += [nn.Conv2d(width, 64, 3, padding=1, stride=2), nn.ReLU()]
            size //= 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of images (N, 1, H, W) in [-1, 1]."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: Pixels) -> Features:
        """(N, 64)."""
        return self.body(_scaled(images)).double().numpy()  # type: ignore[no-any-return]

    @torch.no_grad()
    def accuracy(self, images: Pixels, labels: Labels) -> float:
        """The share of the images that it takes for what they are labelled as."""
        return float((self(_scaled(images)).argmax(1).numpy() == labels).mean())

    @torch.no_grad()
    def sure(self, images: Pixels) -> float:
        """The share of the images that it takes for one digit with a probability of 0.9 or more."""
        return float((self(_scaled(images)).softmax(1).amax(1) >= 0.9).double().mean())


def _scaled(images: Pixels) -> torch.Tensor:
    return torch.from_numpy(images).float() / 127.5 - 1


def train_judge(known: Part, epochs: int = 60) -> Judge:
    """A judge trained on real images, always the same one; each is moved by up to one pixel in sixteen."""
    torch.manual_seed(0)
    size = known.images.shape[-1]
    judge = Judge(size).train()
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    x, y = _scaled(known.images), torch.from_numpy(known.labels)
    most = size // 16
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            by = torch.randint(-most, most + 1, (2,)).tolist()
            loss = F.cross_entropy(judge(torch.roll(x[part], by, (2, 3))), y[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return judge.eval()
