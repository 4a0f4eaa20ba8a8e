"""The forward process in torch, and the loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_deploy.errors import SettingError
from ddpm_deploy.spec import ModelSpec

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Diffusion(nn.Module):
    """q(x_t | x_0) and L_simple of a model's schedule, its constants on one device."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    embedding: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.prediction != "epsilon":
            raise SettingError(
                f"training a network that predicts {spec.prediction} is not supported: use epsilon"
            )
        alphas_cumprod = torch.from_numpy(spec.make_schedule().alphas_cumprod)
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt().float())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt().float())
        self.register_buffer("embedding", torch.from_numpy(spec.embedding.table(spec.timesteps)))

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.embedding)

    def q_sample(self, x0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε, for x0 and ε (B, C, H, W) and t (B,)."""
        signal = self.sqrt_alphas_cumprod[t][:, None, None, None]
        noise = self.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        return signal * x0 + noise * epsilon

    def loss(
        self, network: Network, x0: Tensor, t: Tensor, epsilon: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """L_simple (Ho et al. 2020, equation 14): mean squared error of the predicted ε; y (B,) of conditional ones."""
        return F.mse_loss(network(self.q_sample(x0, t, epsilon), self.embedding[t], y), epsilon)
