"""Which timesteps a chain of fewer steps than T visits: pure functions (Schedule, N) → at most (N,), descending.

Each is a peer's, by its name there, so that its chains can be repeated.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError, plural
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.words import Spacing

Timesteps = NDArray[np.int64]


def leading(schedule: Schedule, steps: int) -> Timesteps:
    """(N - 1)·(T // N), …, T // N, 0 (diffusers' "leading"): ends at 0, and begins below T - 1."""
    return np.arange(steps)[::-1] * (schedule.timesteps // steps)


def trailing(schedule: Schedule, steps: int) -> Timesteps:
    """T - 1, and from there down by T / N, rounded (diffusers' "trailing"): begins at T - 1, and ends above 0."""
    return np.arange(schedule.timesteps, 0, -schedule.timesteps / steps)[:steps].round().astype(np.int64) - 1


def linspace(schedule: Schedule, steps: int) -> Timesteps:
    """From T - 1 to 0 evenly, rounded (diffusers' "linspace"); a single step is at 0."""
    return np.linspace(0, schedule.timesteps - 1, steps).round()[::-1].astype(np.int64)


def openai(schedule: Schedule, steps: int) -> Timesteps:
    """From T - 1 to 0 by (T - 1)/(N - 1), summed and rounded as in `space_timesteps` of improved-diffusion."""
    stride = (schedule.timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    return np.cumsum([0.0, *[stride] * (steps - 1)]).round()[::-1].astype(np.int64)


def openai_ddim(schedule: Schedule, steps: int) -> Timesteps:
    """Multiples of T / N, rounded up, from 0 (`ddimN` of improved-diffusion).

    Fewer than N where no whole stride makes that many, which their code refuses.
    """
    return np.arange(0, schedule.timesteps, -(-schedule.timesteps // steps))[::-1]


def quad(schedule: Schedule, steps: int) -> Timesteps:
    """The squares of N even numbers from 0 to √(0.8·T), truncated ("quad" of Song et al.'s DDIM code): ends at 0."""
    return _once(np.linspace(0, np.sqrt(schedule.timesteps * 0.8), steps) ** 2)


def lucidrains(schedule: Schedule, steps: int) -> Timesteps:
    """From T - 1 down by T / N, truncated: the DDIM of denoising-diffusion-pytorch; ends above 0."""
    return np.linspace(-1, schedule.timesteps - 1, steps + 1, dtype=np.float32).astype(np.int64)[:0:-1]


def dpm_linspace(schedule: Schedule, steps: int) -> Timesteps:
    """From T - 1 by (T - 1)/N, rounded, without 0: "linspace" of diffusers' DPMSolverMultistepScheduler."""
    return _once(np.linspace(0, schedule.timesteps - 1, steps + 1).round()[1:])


def dpm_leading(schedule: Schedule, steps: int) -> Timesteps:
    """N·(T // (N + 1)), …, T // (N + 1): "leading" of diffusers' DPMSolverMultistepScheduler."""
    last, stride = schedule.timesteps - 1, max(1, schedule.timesteps // (steps + 1))
    return _once(np.minimum(np.arange(1, steps + 1) * stride, last))


def log_snr(schedule: Schedule, steps: int) -> Timesteps:
    """From T - 1 to 0 by even steps of the log-SNR, ln(ᾱ/(1 - ᾱ)), each the nearest timestep (Lu et al. 2022, 4.3).

    Where timesteps are few there, as at either end, the same one is the nearest more than once, and visited once.
    """
    there = schedule.log_snr
    finite = there[np.isfinite(there)]
    even = np.linspace(finite[-1], finite[0], steps)
    return _once(np.abs(there[:, None] - even).argmin(axis=0))


def _once(timesteps: NDArray[Any]) -> Timesteps:
    """Whole timesteps, falling, each once: to visit one again would change nothing, or divide by nothing."""
    return np.unique(timesteps.astype(np.int64))[::-1]


# What a name on a command line or in `Sampler.sample` stands for.
SPACINGS: Final[dict[Spacing, Callable[[Schedule, int], Timesteps]]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "openai": openai,
    "openai-ddim": openai_ddim,
    "quad": quad,
    "lucidrains": lucidrains,
    "dpm-linspace": dpm_linspace,
    "dpm-leading": dpm_leading,
    "log-snr": log_snr,
}


def spaced(spacing: Spacing, schedule: Schedule, steps: int) -> Timesteps:
    """The timesteps of a chain of `steps` steps, by the name of the spacing.

    Raises SettingError where there is no such spacing, or not 1 ≤ steps ≤ T.
    """
    if spacing not in SPACINGS:
        raise SettingError(f"spacing {spacing!r} is not known: choose from {', '.join(SPACINGS)}")
    if not 1 <= steps <= schedule.timesteps:
        total = schedule.timesteps
        raise SettingError(
            f"{steps} steps were asked for, but the model was trained with T = {plural(total, 'timestep')}: "
            f"choose from 1 to {total}"
        )
    return SPACINGS[spacing](schedule, steps)
