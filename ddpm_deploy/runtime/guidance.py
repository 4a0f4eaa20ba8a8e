"""Classifier-free guidance (Ho & Salimans 2022): a Denoiser around a Denoiser. The chain knows nothing of it."""

import numpy as np

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.denoiser import Denoiser, allocate


class GuidedDenoiser:
    """Predicts out = out(none) + s·(out(y) - out(none)) for each slot's scale s. Follows `denoiser.Denoiser`.

    scale: (max_batch,) float32: 1 is the plain conditional model, 0 the unconditional one, more than 1 guides;
    diffusers' `guidance_scale`, and 1 + w of the paper. A learned variance is that of the conditional model.

    Both predictions are rows of one batch of the inner Denoiser, so the largest batch is half of the inner one.

    Raises SettingError where the model has no null class, or the inner batch has no room for two.
    """

    def __init__(self, inner: Denoiser) -> None:
        if not inner.spec.null_class:
            raise SettingError(
                "guidance needs a model that knows the null class: train with --labels and --label-dropout"
            )
        if inner.max_batch < 2:
            raise SettingError(
                "guidance takes two rows of the batch for an image, and this model was loaded with max_batch 1: "
                "choose 2 or more"
            )
        self._inner = inner
        self.spec, self.device = inner.spec, inner.device
        self.max_batch = inner.max_batch // 2
        self.x, self.temb, self.y, self.prediction = allocate(self.spec, self.max_batch)
        self.scale = np.ones(self.max_batch, np.float32)

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows, each with its label and with none."""
        inner, channels = self._inner, self.spec.image_shape[0]
        for half in (slice(0, batch), slice(batch, 2 * batch)):
            inner.x[half], inner.temb[half] = self.x[:batch], self.temb[:batch]
        inner.y[:batch] = self.y[:batch]
        inner.y[batch : 2 * batch] = self.spec.num_classes
        inner.run(2 * batch)
        conditional, unconditional = inner.prediction[:batch], inner.prediction[batch : 2 * batch, :channels]
        guided = self.prediction[:batch, :channels]
        np.subtract(conditional[:, :channels], unconditional, out=guided)
        np.multiply(guided, self.scale[:batch, None, None, None], out=guided)
        np.add(guided, unconditional, out=guided)
        self.prediction[:batch, channels:] = conditional[:, channels:]

    def close(self) -> None:
        """Free the inner Denoiser."""
        self._inner.close()
