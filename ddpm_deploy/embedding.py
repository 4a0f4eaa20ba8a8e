"""Sinusoidal timestep embeddings: what the network sees of t, before its time MLP.

The conventions in the field differ in three ways and nothing in a network's weights tells which one it
was trained with; a wrong guess is off by up to 2 and silent. So a ModelSpec names all three.
"""

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray


class SinusoidalEmbedding(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="sinusoidal"
):
    """A table of sinusoids at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    dim: D, the width of the embedding.
    spacing: the last frequency is 1/max_period ("half-1": Ho's code, diffusers' google/ddpm-*) or one
        step short of it ("half": OpenAI's, diffusers' UNet2DModel defaults).
    order: whether the sines or the cosines stand first.
    scale: what t is multiplied by first (improved-diffusion rescales to 1000/T).
    """

    dim: Annotated[int, msgspec.Meta(ge=2, le=65_536)]
    spacing: Literal["half-1", "half"] = "half-1"
    order: Literal["sin-cos", "cos-sin"] = "sin-cos"
    scale: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    max_period: Annotated[float, msgspec.Meta(gt=1.0, le=1e9)] = 10_000.0

    def table(self, timesteps: int) -> NDArray[np.float32]:
        """The embedding of each t in 0 .. T-1: (T, D), computed in float64, rounded once."""
        half = self.dim // 2
        steps = max(1, half - 1 if self.spacing == "half-1" else half)
        frequencies = self.max_period ** (-np.arange(half) / steps)
        angles = self.scale * np.arange(timesteps)[:, None] * frequencies  # (T, half)
        halves = [np.sin(angles), np.cos(angles)]
        if self.order == "cos-sin":
            halves.reverse()
        padding = np.zeros((timesteps, self.dim % 2))  # an odd width ends in a zero
        return np.concatenate([*halves, padding], axis=1).astype(np.float32)


class TimestepItself(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="timestep"
):
    """The timestep as one number, for a network that makes its own embedding of it: scale·t + offset.

    scale, offset: as 1/T where the network takes t from 0 to 1; an offset of 1 where its timesteps begin at 1.
    """

    scale: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    offset: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] = 0.0

    @property
    def dim(self) -> int:
        """Its width."""
        return 1

    @property
    def whole(self) -> bool:
        """Whether all its numbers are whole ones."""
        return float(self.scale).is_integer() and float(self.offset).is_integer()

    def table(self, timesteps: int) -> NDArray[np.float32]:
        """Of each t in 0 .. T-1: (T, 1), computed in float64, rounded once."""
        return (self.scale * np.arange(timesteps)[:, None] + self.offset).astype(np.float32)


# Every kind of embedding there is, told apart by its "kind"; each has a width `dim` and a `table`.
Embedding = SinusoidalEmbedding | TimestepItself
