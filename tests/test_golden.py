"""Images of a network in closed form, as the version before the one chain drew them: the same seed, the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.runtime.network import HostNetwork
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec, Provenance
from ddpm_deploy.words import Variance
from tests.host_device import DeviceNetwork, HostDevice

GOLDEN = Path(__file__).parent / "golden" / "images-v1.npz"
CASES: dict[str, tuple[Variance, dict[str, Any]]] = {
    "ddpm": ("fixed_large", {"seed": 7}),
    "ddpm_small_strided": ("fixed_small", {"seed": 2**63 + 5, "steps": 9, "first_index": 2**40}),
    "learned": ("learned_range", {"seed": 3, "steps": 13}),
    "ddim": ("fixed_large", {"seed": 11, "steps": 10, "solver": "ddim", "eta": 0.5, "spacing": "trailing"}),
    "guided": ("learned_range", {"seed": 5, "steps": 8, "labels": [2, 0, 1], "guidance": [3.0, 1.0, -0.5]}),
}


class ClosedForm(HostNetwork):
    """Sums and products of float32 alone, so that every machine has its bits; t is found by the embedding."""

    def __init__(self, variance: Variance) -> None:
        super().__init__(
            ModelSpec(
                image_shape=(3, 5, 6),
                timesteps=40,
                variance=variance,
                num_classes=3,
                null_class=True,
                embedding=SinusoidalEmbedding(dim=8),
                provenance=Provenance(digest="0" * 64),
            ),
            max_batch=8,
        )
        self._embedding = self.spec.embedding.table(40)

    def predict(self, batch: int) -> None:
        x, label = self.memory["x"][:batch], self.memory["y"][:batch].astype(np.float32)
        distance = np.abs(self._embedding[None] - self.memory["temb"][:batch, None]).max(axis=2)
        wave = np.float32(0.25) + distance.argmin(axis=1).astype(np.float32) * np.float32(1 / 64)
        out = x * wave[:, None, None, None] - np.roll(x, 1, axis=3) * np.float32(0.25)
        out = out + label[:, None, None, None] * np.float32(0.125)
        self.memory["prediction"][:batch, :3] = out
        if self.spec.variance == "learned_range":
            self.memory["prediction"][:batch, 3:] = np.clip(np.roll(out, 2, axis=2), -1, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", ["host", "device"])
def test_golden_images(case: str, place: str) -> None:
    variance, keywords = CASES[case]
    network: Any = ClosedForm(variance)
    if place == "device":
        network = DeviceNetwork(network, HostDevice())
    images = Sampler(network).sample(3, **keywords)
    np.testing.assert_array_equal(images.view(np.uint32), np.load(GOLDEN)[case].view(np.uint32))
