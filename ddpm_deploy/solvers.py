"""Every solver is a table: one row of numbers a step, one update rule for them all.

    x̂0 = clip(a·x + b·out, lo, hi)              out: what the network predicts (ε, v, x0 or μ̃)
    x' = c·x̂0 + d·x + e·s·z + f·x̂0_prev + g·out   z: standard normal; x̂0_prev: the last step's x̂0
    s  = exp(½·(ln_var_min + ½(v + 1)·(ln_var_max - ln_var_min)))

v is what a network with a learned-range variance predicts beside `out` (Nichol & Dhariwal 2021, equation 15);
where the variance is fixed both bounds are 0, and s is 1.

A solver is a pure function from a Schedule to a StepTable, computed in float64. Chains, host and
device, run the rows in float32 and do not know which solver made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.schedule import Floats, Schedule, posterior
from ddpm_deploy.words import PREDICTIONS, VARIANCES, Prediction, Variance

Clip = tuple[float, float] | None
Timesteps = Sequence[int] | NDArray[np.int64]

# The columns of a row, in the order in which the float32 rows hold them.
COLUMNS: Final = ("t", "a", "b", "lo", "hi", "c", "d", "e", "f", "g", "ln_var_min", "ln_var_max")
T, A, B, LO, HI, C, D, E, F, G, LN_VAR_MIN, LN_VAR_MAX = range(len(COLUMNS))
# What a slot with nothing to do executes: x' = x.
IDENTITY: Final = tuple(1.0 if name == "d" else 0.0 for name in COLUMNS)
# The step before a table's own: x ← 1·z and x̂0 ← 0, of draw 0, which is t + 1 for t = -1.
START: Final = tuple({"t": -1.0, "e": 1.0, "lo": -np.inf, "hi": np.inf}.get(name, 0.0) for name in COLUMNS)


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows of one reverse chain, first step first: (N, len(COLUMNS)) float64, a copy that nobody changes.

    Raises SettingError where the rows have another shape, are none, or hold NaN.
    """

    rows: Floats

    def __post_init__(self) -> None:
        rows = np.array(self.rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS) or not len(rows) or np.isnan(rows).any():
            raise SettingError(
                f"a table has rows of {len(COLUMNS)} numbers ({', '.join(COLUMNS)}), not the shape {rows.shape}, or NaN"
            )
        rows.setflags(write=False)
        object.__setattr__(self, "rows", rows)

    @classmethod
    def from_columns(cls, **columns: Floats | NDArray[np.int64] | float) -> Self:
        """Build from named columns, (N,) each or one number for all; those not named are zero."""
        length = np.broadcast(*columns.values()).size
        rows = np.zeros((length, len(COLUMNS)))
        for name, values in columns.items():
            rows[:, COLUMNS.index(name)] = values
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> Floats:
        """One column by its name in COLUMNS, (N,)."""
        return self.rows[:, COLUMNS.index(column)]

    @property
    def timesteps(self) -> NDArray[np.int64]:
        """The timestep of each step, (N,)."""
        return self["t"].astype(np.int64)

    def below(self, depth: int) -> "StepTable":
        """The chain that begins at its first timestep under `depth`: the rows from there on.

        Where the first of them takes the last step's x̂0 it takes its own, as there was no step before it: of
        DPM-Solver++ that is the step of first order with which its chains begin.

        Raises SettingError where there are none.
        """
        rows = self.rows[self["t"] < depth]
        if not len(rows):
            raise SettingError(
                f"this chain has no timestep under a depth of {depth}: its last is {self.timesteps[-1]}"
            )
        rows[0, C] += rows[0, F]
        rows[0, F] = 0.0
        return StepTable(rows)

    def float32_rows(self) -> NDArray[np.float32]:
        """What a chain runs: the rows rounded once, then the identity row, (N + 1, len(COLUMNS))."""
        return np.concatenate([self.rows, [IDENTITY]]).astype(np.float32)


def learns_variance(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the rows (N, len(COLUMNS)) take their variance from the network, (N,)."""
    learns: NDArray[np.bool_] = (rows[:, [LN_VAR_MIN, LN_VAR_MAX]] != 0).any(axis=1)
    return learns


def ddpm(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_large",
    clip: Clip = (-1.0, 1.0),
    noise_to_end: bool = False,
) -> StepTable:
    """Ancestral sampling over `timesteps`, descending; full where they are all T of them.

    Ho et al. 2020, algorithm 2, with the mean from x̂0 (equation 7) so that x̂0 can be clipped; a subset
    of the timesteps is its own chain with β recomputed from the kept ᾱ (Nichol & Dhariwal 2021,
    section 4). `variance` is β̃ ("fixed_small"), β ("fixed_large"), or between the two by what the network says
    ("learned_range"); the last step adds no noise.
    A predicted mean is used itself, unclipped, where the step is one of the full chain.
    noise_to_end: add noise on the last step too where that is not from t = 0, with a posterior variance of at least
    1e-20, as diffusers' DDPM scheduler does.

    Raises SettingError where the variance is of another kind, as one that is learned without a range.
    """
    if variance not in VARIANCES:
        raise SettingError(f"variance {variance!r} is not supported: choose from {', '.join(VARIANCES)}")
    step = _Steps(schedule, timesteps)
    k0, kt, posterior_variance = posterior(step.here, step.there)
    noisy = step.t > 0 if noise_to_end else np.arange(len(step.t)) < len(step.t) - 1
    if noise_to_end:
        posterior_variance = np.maximum(posterior_variance, 1e-20)
    itself = (prediction == "mean") & (step.there == schedule.alphas_cumprod_prev[step.t])
    return step.table(
        prediction,
        clip,
        c=np.where(itself, 0.0, k0),
        d=np.where(itself, 0.0, kt),
        g=itself * 1.0,
        **_deviation(variance, posterior_variance, 1 - step.here / step.there, noisy),
    )


def _deviation(
    variance: Variance, smallest: Floats, largest: Floats, noisy: NDArray[np.bool_]
) -> dict[str, Floats]:
    """The columns of the noise, from the variance's bounds β̃ and β, on the steps that add any."""
    if variance == "learned_range":
        # β̃ of a step to ᾱ = 1 is nothing, and has no logarithm.
        learned = noisy & (smallest > 0)
        low, high = (np.log(np.where(learned, bound, 1.0)) for bound in (smallest, largest))
        return {"e": np.where(learned, 1.0, 0.0), "ln_var_min": low, "ln_var_max": high}
    return {"e": np.where(noisy, np.sqrt(smallest if variance == "fixed_small" else largest), 0.0)}


def ddim(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    prediction: Prediction = "epsilon",
    eta: float = 0.0,
    clip: Clip = (-1.0, 1.0),
    use_clipped_model_output: bool = True,
    stride: int | None = None,
    to_first: bool = False,
) -> StepTable:
    """Denoising diffusion implicit models over `timesteps`, descending (Song et al. 2021, equation 12).

    eta: 0 (no noise) to 1 (ancestral sampling with "fixed_small"). use_clipped_model_output: whether ε is
    taken from the clipped x̂0, as OpenAI's code does, or is the network's own, as is the default of diffusers,
    which has this name for it; without clipping the two are the same.
    stride: take each step to t - stride, whatever timestep comes next, as diffusers' DDIM scheduler does with
    T // N, so that its chains can be replayed where the two differ (linspace; trailing where N does not divide
    T); None is the consistent chain. to_first: end at ᾱ_0 in place of 1 (diffusers' `set_alpha_to_one` as false).

    Raises SettingError where eta or stride is out of range.
    """
    if not 0.0 <= eta <= 1.0:
        raise SettingError(f"eta must be from 0 to 1, not {eta}")
    step = _Steps(schedule, timesteps, stride, to_first)
    _, _, posterior_variance = posterior(step.here, step.there)
    sigma = eta * np.sqrt(posterior_variance)
    direction = np.sqrt(np.maximum(1 - step.there - sigma**2, 0.0))  # of ε
    d, c, signal = direction / np.sqrt(1 - step.here), np.sqrt(step.there), np.sqrt(step.here)
    if use_clipped_model_output:  # ε = (x - √ᾱ x̂0)/√(1 - ᾱ)
        return step.table(prediction, clip, c=c - d * signal, d=d, e=sigma)
    # ε = (x - √ᾱ (a·x + b·out))/√(1 - ᾱ)
    a, b = denoised_coefficients(prediction, schedule, step.t)
    return step.table(prediction, clip, c=c, d=d * (1 - signal * a), e=sigma, g=-d * signal * b)


def ddim_inversion(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    prediction: Prediction = "epsilon",
    clip: Clip = (-1.0, 1.0),
    stride: int | None = None,
    to_first: bool = False,
) -> StepTable:
    """From an image up to x_t at the first of `timesteps`, descending: the steps of `ddim` from the last to the first,
    each the other way (Song et al. 2021, section 4.3).

        x' = √ᾱ'·(x - √(1 - ᾱ)·ε)/√ᾱ + √(1 - ᾱ')·ε

    ε is what the network says of x at the timestep that the step goes to, where `ddim` asks it of x': that the two are
    the same is all that is assumed, and is the nearer to the truth the shorter the steps are. clip: as of the chain
    that is to come back, since it changes ε; what it takes away is not lost, as that chain goes on with x too. stride,
    to_first: as of `ddim`.
    """
    step = _Steps(schedule, timesteps, stride, to_first)
    there, here = step.here, step.there
    rise = np.sqrt(1 - there) - np.sqrt(there * (1 - here) / here)  # of ε = (x - √ᾱ'·x̂0)/√(1 - ᾱ')
    share = rise / np.sqrt(1 - there)
    down = step.table(prediction, clip, c=-share * np.sqrt(there), d=np.sqrt(there / here) + share)
    return StepTable(down.rows[::-1])


def dpmpp_2m(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    prediction: Prediction = "epsilon",
    clip: Clip = (-1.0, 1.0),
) -> StepTable:
    """DPM-Solver++(2M) over `timesteps`, descending (Lu et al. 2022, algorithm 2): no noise, second order.

    The first step has no x̂0 before it, and the last one, to ᾱ = 1, no finite log-SNR: these are of first
    order.
    """
    step = _Steps(schedule, timesteps)
    h, before = step.multistep()
    fall = np.sqrt(step.there) * -np.expm1(-h)  # of x̂0
    return step.table(
        prediction,
        clip,
        c=fall * (1 + before),
        d=np.sqrt((1 - step.there) / (1 - step.here)),
        f=-fall * before,
    )


def sde_dpmpp_2m(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    prediction: Prediction = "epsilon",
    clip: Clip = (-1.0, 1.0),
) -> StepTable:
    """SDE-DPM-Solver++(2M) over `timesteps`, descending (Lu et al. 2022, appendix B): noise on each step but the last.

    The first step and the last one are of first order, as in `dpmpp_2m`.
    """
    step = _Steps(schedule, timesteps)
    h, before = step.multistep()
    noise = np.sqrt(1 - step.there)  # σ after the step
    fall = np.sqrt(step.there) * -np.expm1(-2 * h)
    return step.table(
        prediction,
        clip,
        c=fall * (1 + before),
        d=noise / np.sqrt(1 - step.here) * np.exp(-h),
        e=noise * np.sqrt(-np.expm1(-2 * h)),
        f=-fall * before,
    )


def prediction_coefficients(
    prediction: Prediction, schedule: Schedule, timesteps: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """(p, q) of out = p·x_0 + q·ε: what the network is trained to say at x_t.

    v: Salimans & Ho 2022, section 4; the mean, of the full chain's posterior whatever steps are taken: Ho et al.
    2020, Table 2.

    Raises SettingError where it is none of Prediction.
    """
    here = schedule.alphas_cumprod[timesteps]
    signal, noise, nothing, one = np.sqrt(here), np.sqrt(1 - here), np.zeros_like(here), np.ones_like(here)
    match prediction:
        case "epsilon":
            return nothing, one
        case "x0":
            return one, nothing
        case "v":
            return -noise, signal
        case "mean":  # k0·x_0 + kt·x_t
            k0, kt, _ = posterior(here, schedule.alphas_cumprod_prev[timesteps])
            return k0 + kt * signal, kt * noise
    raise SettingError(f"prediction {prediction!r} is not supported: choose from {', '.join(PREDICTIONS)}")


def denoised_coefficients(
    prediction: Prediction, schedule: Schedule, timesteps: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """(a, b) of x̂0 = a·x + b·out: x_t = √ᾱ·x_0 + √(1 - ᾱ)·ε and out = p·x_0 + q·ε, solved for x_0."""
    here = schedule.alphas_cumprod[timesteps]
    signal, noise = np.sqrt(here), np.sqrt(1 - here)
    p, q = prediction_coefficients(prediction, schedule, timesteps)
    determinant = signal * q - noise * p
    return q / determinant, -noise / determinant


class _Steps:
    """The steps of a chain: t and ᾱ before each, and ᾱ after it.

    stride: where given, each step goes to t - stride. to_first: whether the last goes to ᾱ_0, and not to 1.
    """

    def __init__(
        self,
        schedule: Schedule,
        timesteps: Timesteps,
        stride: int | None = None,
        to_first: bool = False,
    ) -> None:
        self._schedule = schedule
        self.t = np.asarray(timesteps, np.int64)
        if (
            not self.t.size
            or self.t[0] >= schedule.timesteps
            or self.t[-1] < 0
            or (np.diff(self.t) >= 0).any()
        ):
            raise SettingError(f"timesteps must fall from at most {schedule.timesteps - 1} to 0 or more")
        self.here = schedule.alphas_cumprod[self.t]
        if self.here.min() < np.finfo(np.float32).tiny:
            raise SettingError("this schedule has steps that float32 cannot hold: its ᾱ comes too near zero")
        end = float(schedule.alphas_cumprod[0]) if to_first else 1.0
        self.there = np.append(self.here[1:], end)
        if stride is not None:
            if stride < 1:
                raise SettingError(f"stride must be 1 or more, not {stride}")
            before = self.t - stride
            self.there = np.where(before >= 0, schedule.alphas_cumprod[np.maximum(before, 0)], end)

    def multistep(self) -> tuple[Floats, Floats]:
        """The step h in half the log-SNR, and 1/(2r), r = h_before/h: the share of the difference to the last x̂0.

        The first step has no x̂0 before it, and the last one, to ᾱ = 1, no finite h: these are of first order.
        """
        half_log_snr = self._schedule.log_snr[self.t] / 2
        h = np.append(half_log_snr[1:], np.inf) - half_log_snr
        share = np.zeros_like(h)
        share[1:-1] = h[1:-1] / (2 * h[:-2])
        return h, share

    def table(self, prediction: Prediction, clip: Clip, **columns: Floats) -> StepTable:
        """The rows, from the columns of the update."""
        a, b = denoised_coefficients(prediction, self._schedule, self.t)
        lo, hi = clip or (-np.inf, np.inf)
        if not lo < hi:
            raise SettingError(f"clip must be a range (least, most), not ({lo}, {hi})")
        return StepTable.from_columns(t=self.t, a=a, b=b, lo=lo, hi=hi, **columns)
