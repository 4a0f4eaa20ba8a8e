"""The forward process: β_t by name, and everything that follows from it, in float64.

t runs 0 .. T-1 as in Ho's code: t = 0 is an image diffused for one step.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Beta = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]


class _Betas(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """What the kinds of schedule have in common: they are told apart by their "kind"."""


class _Rising(_Betas, frozen=True):
    """Those whose β rises from `beta_start` to `beta_end`."""

    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02


class LinearBetas(_Rising, frozen=True, tag="linear"):
    """β rises linearly from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""

    def betas(self, timesteps: int) -> Floats:
        """β_t, (T,)."""
        return np.linspace(self.beta_start, self.beta_end, timesteps, dtype=np.float64)


class ScaledLinearBetas(_Rising, frozen=True, tag="scaled_linear"):
    """√β rises linearly (Rombach et al. 2022; diffusers' "scaled_linear")."""

    def betas(self, timesteps: int) -> Floats:
        """β_t, (T,)."""
        betas: Floats = np.linspace(self.beta_start**0.5, self.beta_end**0.5, timesteps) ** 2
        return betas


class SigmoidBetas(_Rising, frozen=True, tag="sigmoid"):
    """β rises along a logistic curve from -6 to 6 (diffusers' "sigmoid"; that of lucidrains is another, in ᾱ)."""

    def betas(self, timesteps: int) -> Floats:
        """β_t, (T,)."""
        rise: Floats = 1 / (1 + np.exp(-np.linspace(-6.0, 6.0, timesteps)))
        return self.beta_start + rise * (self.beta_end - self.beta_start)


class CosineBetas(_Betas, frozen=True, tag="cosine"):
    """ᾱ falls as a squared cosine, β capped at `max_beta` (Nichol & Dhariwal 2021, equation 17)."""

    s: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.008
    max_beta: Beta = 0.999

    def betas(self, timesteps: int) -> Floats:
        """β_t, (T,)."""
        time = np.arange(timesteps + 1) / timesteps
        alphas_cumprod = np.cos((time + self.s) / (1 + self.s) * np.pi / 2) ** 2
        betas: Floats = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], self.max_beta)
        return betas


class SigmoidAlphas(_Betas, frozen=True, tag="sigmoid_alpha"):
    """ᾱ falls along a logistic curve, β capped at `max_beta` (Jabri et al. 2022; lucidrains' "sigmoid")."""

    start: Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)] = -3.0
    end: Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)] = 3.0
    tau: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
    max_beta: Beta = 0.999

    def betas(self, timesteps: int) -> Floats:
        """β_t, (T,)."""
        # In float32, as lucidrains has its two ends: that moves the last β, where ᾱ is as small as their rounding.
        first, last = (float(np.float32(1 / (1 + np.exp(-x / self.tau)))) for x in (self.start, self.end))
        time = np.arange(timesteps + 1) / timesteps
        fall = 1 / (1 + np.exp(-(time * (self.end - self.start) + self.start) / self.tau))
        alphas_cumprod = (last - fall) / (last - first)
        betas: Floats = np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 1e-12, self.max_beta)
        return betas


BetaSchedule = LinearBetas | ScaledLinearBetas | CosineBetas | SigmoidBetas | SigmoidAlphas
# Each with its usual constants, by name.
SCHEDULES: Final[dict[str, BetaSchedule]] = {
    "linear": LinearBetas(),
    "cosine": CosineBetas(),
    "sigmoid": SigmoidBetas(),
    "scaled_linear": ScaledLinearBetas(),
    "sigmoid_alpha": SigmoidAlphas(),
}


_SAME_BETA: Final = 1e-6  # of β itself: they may have been stored in float32, or computed in it


def recognise(betas: Floats) -> BetaSchedule | None:
    """The named schedule that gives these betas (T,), to 1e-6; None where it is none of them.

    A model's spec holds the name of its schedule, as a thousand numbers do not fit in an engine.
    """
    first, last = float(betas[0]), float(betas[-1])
    rising: list[BetaSchedule] = []
    if 0 < first <= last < 1:
        rising += [LinearBetas(first, last), ScaledLinearBetas(first, last)]
    # A logistic curve from -6 to 6 begins and ends short of its bounds.
    short = 1 / (1 + np.exp(6.0))
    spread = (last - first) / (1 - 2 * short)
    if 0 < (low := first - short * spread) < (high := last + short * spread) < 1:
        rising.append(SigmoidBetas(low, high))
    for schedule in (*SCHEDULES.values(), *rising):
        if np.abs(schedule.betas(len(betas)) - betas).max() <= _SAME_BETA:
            return schedule
    return None


@dataclass(frozen=True, eq=False)
class Schedule:
    """A forward process q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I), given by its betas (T,) in float64."""

    betas: Floats

    @property
    def timesteps(self) -> int:
        """T, the number of diffusion steps."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Floats:
        """ᾱ_t = ∏ (1 - β_s) for s ≤ t, (T,)."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def log_snr(self) -> Floats:
        """ln(ᾱ_t/(1 - ᾱ_t)), (T,): falls with t."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @cached_property
    def alphas_cumprod_prev(self) -> Floats:
        """ᾱ_{t-1}, (T,): 1 at t = 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])


def posterior(here: Floats, there: Floats) -> tuple[Floats, Floats, Floats]:
    """(k0, kt, variance) of q(x_s | x_t, x_0) = N(k0·x_0 + kt·x_t, variance I), for ᾱ_t = here and ᾱ_s = there.

    Ho et al. 2020, equation 7.
    """
    beta = 1 - here / there
    k0 = np.sqrt(there) * beta / (1 - here)
    kt = np.sqrt(here / there) * (1 - there) / (1 - here)
    return k0, kt, beta * (1 - there) / (1 - here)
