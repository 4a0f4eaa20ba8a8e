"""Schedules, embeddings, tables and chains against theory first, then against diffusers."""

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import CosineBetas, LinearBetas, Schedule
from ddpm_deploy.solvers import COLUMNS, IDENTITY, StepTable, ddpm
from ddpm_deploy.spacings import spaced
from ddpm_deploy.words import Prediction, Variance
from tests.models import ArrayNetwork, GaussianNetwork, tiny_spec
from tests.tolerances import TOLERANCES

LINEAR = Schedule(LinearBetas().betas(1000))
COSINE = Schedule(CosineBetas().betas(1000))
VARIANCES: list[Variance] = ["fixed_small", "fixed_large"]
PREDICTIONS: list[Prediction] = ["epsilon", "v", "x0"]


@pytest.fixture(scope="session")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


# --- theory ---------------------------------------------------------------------------------------


def test_forward_process_definitions() -> None:
    """ᾱ is the variance kept by T successive q(x_t | x_{t-1}), by running them."""
    kept = 1.0
    for t in range(1000):
        kept *= 1 - LINEAR.betas[t]
        assert LINEAR.alphas_cumprod[t] == pytest.approx(kept, rel=1e-12)
    assert LINEAR.betas[0] == 1e-4
    assert LINEAR.betas[-1] == 0.02
    assert LINEAR.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)  # known of Ho's schedule


def posterior(here: float, there: float) -> tuple[float, float, float]:
    """q(x_s | x_t, x_0) = N(k0·x_0 + kt·x_t, v), by conditioning the joint Gaussian of (x_s, x_t) given x_0.

    here = ᾱ_t, there = ᾱ_s. Nothing is taken from the table or the paper's closed form.
    """
    ratio = here / there
    covariance = np.array(
        [[1 - there, np.sqrt(ratio) * (1 - there)], [np.sqrt(ratio) * (1 - there), 1 - here]]
    )
    kt = covariance[0, 1] / covariance[1, 1]
    k0 = np.sqrt(there) - kt * np.sqrt(here)
    return k0, kt, covariance[0, 0] - kt * covariance[0, 1]


def exact_moments(
    schedule: Schedule, timesteps: NDArray[np.int64], variance: Variance, mean: float, std: float
) -> tuple[float, float]:
    """Mean and variance of the output of ancestral sampling with the optimal ε for data N(mean, std²).

    Each step draws from q(x_s | x_t, x̂0), x̂0 = E[x_0 | x_t] by Bayes: affine in x_t, so moments recurse.
    """
    ac = schedule.alphas_cumprod
    m, v = 0.0, 1.0
    for i, t in enumerate(timesteps):
        here, last = ac[t], i == len(timesteps) - 1
        there = 1.0 if last else ac[timesteps[i + 1]]
        gain = np.sqrt(here) * std**2 / (here * std**2 + 1 - here)  # x̂0 = mean + gain·(x_t - √ᾱ·mean)
        k0, kt, v_small = posterior(here, there)
        slope = k0 * gain + kt
        noise = v_small if variance == "fixed_small" else 1 - here / there
        m = slope * m + k0 * (mean - gain * np.sqrt(here) * mean)
        v = slope**2 * v + (0.0 if last else noise)
    return m, v


def table_moments(table: StepTable, schedule: Schedule, mean: float, std: float) -> tuple[float, float]:
    """The same moments by running the table's rows on them."""
    m, v = 0.0, 1.0
    for row in table.rows:
        r = dict(zip(COLUMNS, row, strict=True))
        ac = schedule.alphas_cumprod[int(r["t"])]
        scale = np.sqrt(1 - ac) / (ac * std**2 + 1 - ac)
        slope_out, offset_out = scale, -scale * np.sqrt(ac) * mean
        slope_x0, offset_x0 = r["a"] + r["b"] * slope_out, r["b"] * offset_out
        slope = r["c"] * slope_x0 + r["d"] + r["g"] * slope_out
        m = slope * m + r["c"] * offset_x0 + r["g"] * offset_out
        v = slope**2 * v + r["e"] ** 2
    return m, v


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1000, 250, 50, 20, 7, 1])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_table_gives_the_exact_moments_on_gaussian_data(
    schedule: Schedule, steps: int, variance: Variance
) -> None:
    timesteps = spaced("leading", LINEAR, steps)
    table = ddpm(schedule, timesteps, variance=variance, clip=None)
    wanted = exact_moments(schedule, timesteps, variance, mean=0.3, std=0.4)
    got = table_moments(table, schedule, mean=0.3, std=0.4)
    np.testing.assert_allclose(got, wanted, rtol=TOLERANCES["gaussian_table"].limit)


def test_known_variances_of_the_chain() -> None:
    """For data variance 0.16: nearly that at 1000 steps, and well below it at 50."""
    assert exact_moments(LINEAR, spaced("leading", LINEAR, 1000), "fixed_small", 0.0, 0.4)[
        1
    ] == pytest.approx(0.157, abs=5e-4)
    assert exact_moments(LINEAR, spaced("leading", LINEAR, 50), "fixed_small", 0.0, 0.4)[1] == pytest.approx(
        0.121, abs=5e-4
    )


@pytest.mark.parametrize(("steps", "variance"), [(1000, "fixed_large"), (50, "fixed_small")])
def test_running_chain_has_the_exact_moments(steps: int, variance: Variance) -> None:
    """The real chain, in float32 on the addressed noise, within five standard errors."""
    spec = tiny_spec((1, 32, 32))
    network = GaussianNetwork(spec, 8, mean=0.3, std=0.4)
    timesteps = spaced("leading", LINEAR, steps)
    table = ddpm(LINEAR, timesteps, variance=variance, clip=None)
    chain = Chain(network)
    chain.start(np.arange(8), Request(table=table, count=8, seed=1))
    while chain.active.any():
        chain.step()
    mean, var = exact_moments(LINEAR, timesteps, variance, 0.3, 0.4)
    x = chain.images(np.arange(8)).astype(np.float64)
    assert abs(x.mean() - mean) < 5 * (var / x.size) ** 0.5
    assert abs(x.var() - var) < 5 * var * (2 / x.size) ** 0.5


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1000, 50, 1])
def test_last_step_gives_x0_and_adds_no_noise(steps: int, variance: Variance) -> None:
    table = ddpm(LINEAR, spaced("leading", LINEAR, steps), variance=variance)
    assert len(table) == steps
    assert table.timesteps[-1] == 0
    assert table["c"][-1] == 1.0
    assert table["d"][-1] == table["e"][-1] == 0.0
    assert (table["e"][:-1] > 0).all()


def test_columns_that_ancestral_sampling_does_not_use_are_zero() -> None:
    table = ddpm(LINEAR, spaced("leading", LINEAR, 10))
    for column in ("f", "g", "ln_var_min", "ln_var_max"):
        assert (table[column] == 0).all()


def test_float32_rows_end_in_the_identity() -> None:
    rows = ddpm(LINEAR, spaced("leading", LINEAR, 10)).float32_rows()
    assert rows.shape == (11, len(COLUMNS))
    assert rows.dtype == np.float32
    assert tuple(rows[-1]) == IDENTITY


def test_table_rows_cannot_be_changed() -> None:
    table = ddpm(LINEAR, spaced("leading", LINEAR, 10))
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0] = 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoised_undoes_the_forward_process(prediction: Prediction) -> None:
    """x̂0 is x_0 when the network is right, whatever it predicts."""
    table = ddpm(LINEAR, spaced("leading", LINEAR, 1000), prediction=prediction)
    signal, noise = np.sqrt(LINEAR.alphas_cumprod[::-1]), np.sqrt(1 - LINEAR.alphas_cumprod[::-1])
    x0, epsilon = 0.7, -1.3
    x = signal * x0 + noise * epsilon
    out = {"epsilon": epsilon, "v": signal * epsilon - noise * x0, "x0": x0}[prediction]
    np.testing.assert_allclose(table["a"] * x + table["b"] * out, x0, rtol=1e-9)


def test_a_schedule_that_float32_cannot_hold() -> None:
    with pytest.raises(SettingError, match="comes too near zero"):
        long = Schedule(LinearBetas().betas(100_000))
        ddpm(long, spaced("leading", long, 100))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(SettingError, match="choose from 1 to 1000"):
        spaced("leading", LINEAR, steps)


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "peer"),
    [
        (SinusoidalEmbedding(dim=128), {"downscale_freq_shift": 1, "flip_sin_to_cos": False}),
        (
            SinusoidalEmbedding(dim=32, spacing="half", order="cos-sin"),
            {"downscale_freq_shift": 0, "flip_sin_to_cos": True},
        ),
        (SinusoidalEmbedding(dim=33), {"downscale_freq_shift": 1}),
        (SinusoidalEmbedding(dim=16, spacing="half", scale=0.25), {"downscale_freq_shift": 0, "scale": 0.25}),
    ],
)
def test_embeddings_are_those_of_diffusers(
    diffusers: Any, settings: SinusoidalEmbedding, peer: dict[str, Any]
) -> None:
    """Its angles are float32: at t = 999 they are off by up to half a unit in the last place of 999."""
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    wanted = get_timestep_embedding(torch.arange(1000), settings.dim, **peer).numpy()
    np.testing.assert_allclose(settings.table(1000), wanted, atol=TOLERANCES["diffusers_embedding"].limit)


def test_sampler_replays_a_diffusers_chain(diffusers: Any) -> None:
    """Our float32 chain, on the noise that the peer drew, with a network that is not Gaussian."""
    import torch

    spec = tiny_spec()
    peer = diffusers.DDPMScheduler(variance_type="fixed_large")
    peer.set_timesteps(1000)
    network = ArrayNetwork(spec, 2)
    generator, draws = torch.Generator().manual_seed(3), {0: torch.zeros(0)}
    x = draws[0] = torch.randn(2, 1, 8, 8, generator=generator)
    shadow = torch.Generator().manual_seed(3)
    torch.randn(2, 1, 8, 8, generator=shadow)
    for t in peer.timesteps.tolist():
        if t > 0:
            draws[t + 1] = torch.randn(2, 1, 8, 8, generator=shadow)
        out = torch.from_numpy(network.answer(x.numpy(), np.array([t, t])))
        x = peer.step(out, t, x, generator=generator).prev_sample
    mine = Sampler(network).sample(2, noise=lambda draw: draws[draw].numpy())
    assert np.abs(mine - x.numpy()).max() <= TOLERANCES["diffusers_replay"].limit


def test_more_noise_than_timesteps_is_an_error() -> None:
    import torch

    from ddpm_deploy.train.noise import AddressedRandn

    with AddressedRandn([1, 0], seed=0):
        first = torch.randn(2, 1, 4, 4)
        second = torch.randn_like(first)
        torch.randn(2, 1, 4, 4)
        with pytest.raises(SettingError, match="more noise than it has timesteps"):
            torch.randn(1)
    assert not torch.equal(first, second)
