"""The addressed noise for a sampler of your own in torch, so that it and our chain run on the same z."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ddpm_deploy.errors import SettingError
from ddpm_deploy.noise import addressed_noise


class AddressedRandn(TorchFunctionMode):
    """While it is entered, `torch.randn` and `torch.randn_like` give the addressed noise.

        with AddressedRandn(scheduler.timesteps, seed=0):
            images = pipeline(batch_size=4, num_inference_steps=1000).images

    The first call gives x_T, the next ones the z of each timestep in turn, as samplers draw them; a
    sampler that draws none at t = 0 may leave the last one out. A generator that it passes is not used.

    timesteps: of its steps, in order. seed: 0 .. 2⁶⁴ - 1. first_index: sample index of the first image.

    Raises SettingError where more is drawn than there are timesteps.
    """

    def __init__(self, timesteps: Iterable[int], *, seed: int, first_index: int = 0) -> None:
        super().__init__()
        self._draws = iter([0, *(int(t) + 1 for t in timesteps)])
        self._seed = seed
        self._first_index = first_index

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace what the two functions give; everything else is torch's own."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            draw = next(self._draws, None)
            if draw is None:
                raise SettingError(
                    "the sampler draws more noise than it has timesteps: it is not a plain reverse chain"
                )
            indices = np.uint64(self._first_index) + np.arange(len(result), dtype=np.uint64)
            noise = addressed_noise(self._seed, indices, draw, tuple(result.shape[1:]))
            result.copy_(torch.from_numpy(noise))
        return result
