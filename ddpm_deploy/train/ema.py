"""An exponential moving average of a network's parameters."""

import copy

import torch
from torch import Tensor, nn


def averaged(network: nn.Module) -> nn.Module:
    """A copy of the network to hold the average: in evaluation mode, without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update(average: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Move the averages towards the parameters after training step `step`, counted from 0.

    The decay rises to its value as (1 + step)/(10 + step), so that the average soon forgets the
    random weights at the start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, parameters, 1 - decay)
