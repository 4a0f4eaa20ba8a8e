"""Classifier-free guidance: its closed form, scales by slot, and what is refused."""

from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.sampler import Sampler
from tests.models import ArrayNetwork, tiny_spec


class Labelled(ArrayNetwork):
    """One whose prediction depends on the label; v, where it is learned, is the label."""

    def __init__(self, max_batch: int = 8, **changes: Any) -> None:
        spec = msgspec.structs.replace(
            tiny_spec((1, 4, 4), timesteps=20), num_classes=3, null_class=True, **changes
        )
        super().__init__(spec, max_batch)
        self.batches: list[int] = []

    def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The network's, scaled by the label."""
        label = self.memory["y"][: len(x), None, None, None].astype(np.float32)
        out = super().answer(x, t) * (1 + label)
        if self.spec.variance == "learned_range":
            out = np.concatenate([out, np.broadcast_to(label / 8, out.shape)], axis=1)
        return out

    def predict(self, batch: int) -> None:
        """Predict, and note the batch."""
        self.batches.append(batch)
        super().predict(batch)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_scale_1_is_the_plain_model(variance: str) -> None:
    sampler = Sampler(Labelled(variance=variance))
    plain = sampler.sample(6, seed=0)
    guided = sampler.sample(6, seed=0, guidance=1)
    np.testing.assert_allclose(guided, plain, atol=1e-5)
    assert np.abs(sampler.sample(6, seed=0, guidance=3.0) - plain).max() > 1e-3
    np.testing.assert_array_equal(sampler.sample(6, seed=0), plain)  # and nothing of it stays behind


def test_every_image_may_have_its_own_scale() -> None:
    sampler = Sampler(Labelled())
    scales = [0.0, 1.5, 2.0, 4.0, -1.0, 7.5]
    together = sampler.sample(6, seed=0, labels=1, guidance=scales)  # over two batches
    for i, scale in enumerate(scales):
        alone = sampler.sample(1, seed=0, labels=1, guidance=scale, first_index=i)
        np.testing.assert_array_equal(together[i], alone[0])


def test_guidance_halves_the_images_in_flight() -> None:
    inner = Labelled(max_batch=5)
    sampler = Sampler(inner)
    assert (sampler.max_batch(), sampler.max_batch(2.0)) == (5, 2)
    assert [len(part) for part in sampler.iter_samples(5, steps=2, guidance=2.0)] == [2, 2, 1]
    assert inner.batches == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("network", "guidance", "problem"),
    [
        (ArrayNetwork(tiny_spec(), 4), 2.0, "needs a model that knows the null class"),
        (Labelled(max_batch=1), 2.0, "load it with max_batch 2 or more"),
        (Labelled(), float("nan"), "guidance must be from -1000 to 1000, not nan"),
        (Labelled(), float("inf"), "guidance must be from -1000 to 1000, not inf"),
        (Labelled(), [1.0, 2.0], "for 3 images: give one for all of them, or one for each"),
        (Labelled(), 1e300, "guidance must be from -1000 to 1000"),
        (Labelled(), [2.0], "for 3 images: give one for all of them, or one for each"),
        (Labelled(), "much", "guidance must be a number, not 'much'"),
    ],
)
def test_guidance_that_is_refused(network: ArrayNetwork, guidance: Any, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Sampler(network).sample(3, guidance=guidance)
