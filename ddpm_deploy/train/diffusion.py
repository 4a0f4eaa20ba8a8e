"""The forward process in torch, and the losses."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.special import log_ndtr, ndtr

from ddpm_deploy.bound import EIGHT_BIT_STEPS, bound_table
from ddpm_deploy.errors import SettingError
from ddpm_deploy.solvers import denoised_coefficients, prediction_coefficients
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Loss

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_SMALLEST_PROBABILITY: Final = 1e-12  # of a pixel's value, so that its logarithm is finite


class Diffusion(nn.Module):
    """q(x_t | x_0) of a model, and what its network is trained on, its constants on one device.

    The loss, for timesteps t drawn evenly, is one of
      simple  L_simple: mean squared error of the prediction (Ho et al. 2020, equation 14).
      vlb     L_t of the variational bound (equation 5), in bits a dimension; T times its mean is the bound, but
              for L_T, which nothing is trained on.
      hybrid  L_simple + λ·L_vlb with λ = 0.001, where the bound trains the variance alone (Nichol & Dhariwal
              2021, equation 16).

    Raises SettingError where the loss does not train the variance that the spec has.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    x0_share: Tensor
    epsilon_share: Tensor
    mean_scale: Tensor
    ln_var_posterior: Tensor
    ln_var_min: Tensor
    ln_var_max: Tensor
    embedding: Tensor

    def __init__(self, spec: ModelSpec, loss: Loss = "simple") -> None:
        super().__init__()
        require_trainable(spec, loss)
        self._loss = loss
        self._channels = spec.image_shape[0]
        self._range = spec.value_range
        schedule, every = spec.make_schedule(), np.arange(spec.timesteps)
        x0_share, epsilon_share = prediction_coefficients(spec.prediction, schedule, every)
        _, b = denoised_coefficients(spec.prediction, schedule, every)
        bound = bound_table(schedule, every, spec.variance)
        constants = {
            "sqrt_alphas_cumprod": bound.signal,
            "sqrt_one_minus_alphas_cumprod": bound.noise,
            "x0_share": x0_share,
            "epsilon_share": epsilon_share,
            "mean_scale": bound.k0 * b,  # x̂0 = a·x + b·out, and k0 times that is in the mean
            "ln_var_posterior": bound.ln_var_posterior,
            "ln_var_min": bound.ln_var_min,
            "ln_var_max": bound.ln_var_max,
            "embedding": spec.embedding.table(spec.timesteps),
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.from_numpy(values).float())

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.embedding)

    def q_sample(self, x0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε, for x0 and ε (B, C, H, W) and t (B,)."""
        return _at(self.sqrt_alphas_cumprod, t) * x0 + _at(self.sqrt_one_minus_alphas_cumprod, t) * epsilon

    def loss(
        self, network: Network, x0: Tensor, t: Tensor, epsilon: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """The mean loss of x0 (B, C, H, W) at t (B,) with the noise ε (B, C, H, W); y (B,) of conditional models."""
        prediction = network(self.q_sample(x0, t, epsilon), self.embedding[t], y).float()
        out, v = prediction[:, : self._channels], prediction[:, self._channels :]
        target = _at(self.x0_share, t) * x0 + _at(self.epsilon_share, t) * epsilon
        if self._loss == "simple":
            return F.mse_loss(out, target)
        if self._loss == "vlb":
            return self._bound(x0, t, out - target, v)
        bound = self._bound(x0, t, (out - target).detach(), v)
        return F.mse_loss(out, target) + 0.001 * self.timesteps * bound

    def _bound(self, x0: Tensor, t: Tensor, error: Tensor, v: Tensor) -> Tensor:
        """L_t in bits a dimension, meaned over the batch, from the error of the prediction.

        The mean of p(x_{t-1} | x_t) is then off by mean_scale · error, whatever is predicted.
        """
        error = _at(self.mean_scale, t) * error
        ln_var = _at(self.ln_var_min, t).expand_as(error)
        if v.shape[1]:
            ln_var = ln_var + (v + 1) / 2 * (_at(self.ln_var_max, t) - ln_var)
        first = (t == 0)[:, None, None, None]
        # Of t = 0 the other term is taken; an infinity in this one would still reach the gradient.
        difference = (_at(self.ln_var_posterior, t) - ln_var).masked_fill(first, 0.0)
        squares = (error**2 * torch.exp(-ln_var.masked_fill(first, 0.0))).masked_fill(first, 0.0)
        divergence = 0.5 * (torch.expm1(difference) - difference + squares)
        nats = torch.where(first, -self._log_likelihood(x0, error, ln_var), divergence)
        return nats.mean() / math.log(2)

    def _log_likelihood(self, x0: Tensor, error: Tensor, ln_var: Tensor) -> Tensor:
        """ln p(x_0 | x_1), each of the 256 values of a pixel a bin (Ho et al. 2020, equation 13)."""
        lo, hi = self._range
        half_bin = (hi - lo) / EIGHT_BIT_STEPS / 2
        inverse = torch.exp(-0.5 * ln_var)
        # The normal distribution is even: left of its mean, small probabilities keep their digits.
        inside = ndtr((half_bin - error.abs()) * inverse) - ndtr((-half_bin - error.abs()) * inverse)
        inside = inside.clamp(min=_SMALLEST_PROBABILITY).log()
        # Towards the ends the two outermost bins take all that is left.
        lowest = log_ndtr((half_bin - error) * inverse)
        highest = log_ndtr((half_bin + error) * inverse)
        return torch.where(x0 < lo + half_bin, lowest, torch.where(x0 > hi - half_bin, highest, inside))


def _at(constants: Tensor, t: Tensor) -> Tensor:
    """Those of t (B,), to go with images."""
    return constants[t][:, None, None, None]


def require_trainable(spec: ModelSpec, loss: Loss) -> None:
    """Raise SettingError where the loss does not train the variance that the spec has."""
    learned = spec.variance == "learned_range"
    if learned and loss == "simple":
        raise SettingError("the loss simple does not train a learned_range variance: choose hybrid or vlb")
    if loss == "hybrid" and not learned:
        raise SettingError(
            f"the loss hybrid trains a learned_range variance, and this one is {spec.variance}: choose simple or vlb"
        )
