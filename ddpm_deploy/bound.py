"""What the terms of the variational bound are made of: the posterior of q, and the variance of p, in float64.

    L = L_T + Σ L_t + L_0      (Ho et al. 2020, equation 5)

of a chain that visits any of the timesteps. Training and evaluation both take their constants from here.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.schedule import Floats, Schedule, posterior
from ddpm_deploy.words import Variance

EIGHT_BIT_STEPS: Final = 255  # from the darkest of the 256 values of a pixel to the brightest


@dataclass(frozen=True, eq=False)
class BoundTable:
    """One number for each step of a chain, (N,), the smallest timestep first: that step has the decoder's term, L_0.

    timesteps: from which each step goes, to the one before it. signal, noise: √ᾱ and √(1 - ᾱ) there. k0, kt,
    ln_var_posterior: of q(x_s | x_t, x_0) = N(k0·x_0 + kt·x_t, variance I). ln_var_min, ln_var_max: of p(x_s | x_t);
    the same where the variance is fixed.
    """

    timesteps: NDArray[np.int64]
    signal: Floats
    noise: Floats
    k0: Floats
    kt: Floats
    ln_var_posterior: Floats
    ln_var_min: Floats
    ln_var_max: Floats

    def __len__(self) -> int:
        return len(self.timesteps)


def bound_table(schedule: Schedule, timesteps: NDArray[np.int64], variance: Variance) -> BoundTable:
    """The constants of the chain that visits `timesteps`, (N,), rising."""
    here = schedule.alphas_cumprod[timesteps]
    there = np.append(1.0, here[:-1])
    k0, kt, smallest = posterior(here, there)
    largest = 1 - here / there
    # β̃ is zero on the step to ᾱ = 1, where its place is taken by that of the step before it, as in Ho's code.
    smallest[0] = smallest[1] if len(smallest) > 1 else largest[0]
    large = np.append(smallest[0], largest[1:])
    low, high = {
        "fixed_small": (smallest, smallest),
        "fixed_large": (large, large),
        "learned_range": (smallest, largest),
    }[variance]
    return BoundTable(
        timesteps=timesteps,
        signal=np.sqrt(here),
        noise=np.sqrt(1 - here),
        k0=k0,
        kt=kt,
        ln_var_posterior=np.log(smallest),
        ln_var_min=np.log(low),
        ln_var_max=np.log(high),
    )
