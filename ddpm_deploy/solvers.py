"""Every solver is a table: one row of numbers a step, one update rule for them all.

    x̂0 = clip(a·x + b·out, lo, hi)              out: what the network predicts (ε, v or x0)
    x' = c·x̂0 + d·x + e·z + f·x̂0_prev + g·out   z: standard normal; x̂0_prev: the last step's x̂0

A solver is a pure function from a Schedule to a StepTable, computed in float64. Chains, host and
device, run the rows in float32 and do not know which solver made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.schedule import Schedule

Prediction = Literal["epsilon", "v", "x0"]
Variance = Literal["fixed_small", "fixed_large"]
Solver = Literal["ddpm"]
Spacing = Literal["leading"]

# The columns of a row, in the order in which the float32 rows hold them. The last two bound the
# learned-range variance, ln β̃ and ln β; they are zero where the variance is fixed.
COLUMNS: Final = ("t", "a", "b", "lo", "hi", "c", "d", "e", "f", "g", "ln_var_min", "ln_var_max")
# What a slot with nothing to do executes: x' = x.
IDENTITY: Final = tuple(1.0 if name == "d" else 0.0 for name in COLUMNS)


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows of one reverse chain, first step first: (N, len(COLUMNS)) float64."""

    rows: NDArray[np.float64]

    @classmethod
    def from_columns(cls, **columns: NDArray[np.float64] | NDArray[np.int64] | float) -> Self:
        """Build from named columns, (N,) each or one number for all; those not named are zero."""
        length = np.broadcast(*columns.values()).size
        rows = np.zeros((length, len(COLUMNS)))
        for name, values in columns.items():
            rows[:, COLUMNS.index(name)] = values
        rows.setflags(write=False)
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        """One column by its name in COLUMNS, (N,)."""
        return self.rows[:, COLUMNS.index(column)]

    @property
    def timesteps(self) -> NDArray[np.int64]:
        """The timestep of each step, (N,)."""
        return self["t"].astype(np.int64)

    def float32_rows(self) -> NDArray[np.float32]:
        """What a chain runs: the rows rounded once, then the identity row, (N + 1, len(COLUMNS))."""
        return np.concatenate([self.rows, [IDENTITY]]).astype(np.float32)


def leading_timesteps(total: int, steps: int) -> NDArray[np.int64]:
    """Timesteps (N - 1)·(T // N), …, T // N, 0: diffusers' `leading` spacing, and all of them at N = T."""
    if not 1 <= steps <= total:
        raise SettingError(
            f"{steps} steps were asked for, but the model was trained with T = {total} timesteps: "
            f"choose from 1 to {total}"
        )
    return np.arange(steps)[::-1] * (total // steps)


def denoised_coefficients(
    prediction: Prediction, alphas_cumprod: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(a, b) of x̂0 = a·x + b·out, for what the network predicts (Salimans & Ho 2022, section 4)."""
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    match prediction:
        case "epsilon":
            return 1 / signal, -noise / signal
        case "v":
            return signal, -noise
        case "x0":
            return np.zeros_like(signal), np.ones_like(signal)


def ddpm(
    schedule: Schedule,
    timesteps: Sequence[int] | NDArray[np.int64],
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_large",
    clip: tuple[float, float] | None = (-1.0, 1.0),
) -> StepTable:
    """Ancestral sampling over `timesteps`, descending; full where they are all T of them.

    Ho et al. 2020, algorithm 2, with the mean from x̂0 (equation 7) so that x̂0 can be clipped; a subset
    of the timesteps is its own chain with β recomputed from the kept ᾱ (Nichol & Dhariwal 2021,
    section 4). `variance` is β̃ ("fixed_small") or β ("fixed_large"); the last step adds no noise.
    """
    here = schedule.alphas_cumprod[timesteps]
    if here.min() < np.finfo(np.float32).tiny:
        raise SettingError("this schedule has steps that float32 cannot hold: its ᾱ comes too near zero")
    there = np.append(here[1:], 1.0)  # ᾱ after the step
    beta = 1 - here / there
    posterior_variance = beta * (1 - there) / (1 - here)
    sigma = np.sqrt(posterior_variance if variance == "fixed_small" else beta)
    sigma[-1] = 0.0
    a, b = denoised_coefficients(prediction, here)
    lo, hi = clip or (-np.inf, np.inf)
    return StepTable.from_columns(
        t=np.asarray(timesteps),
        a=a,
        b=b,
        lo=lo,
        hi=hi,
        c=np.sqrt(there) * beta / (1 - here),
        d=np.sqrt(here / there) * (1 - there) / (1 - here),
        e=sigma,
    )


# What a name on a command line or in `Sampler.sample` stands for.
SOLVERS: Final = {"ddpm": ddpm}
SPACINGS: Final = {"leading": leading_timesteps}
