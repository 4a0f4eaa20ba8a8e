"""Solvers, spacings and predictions: theory on Gaussian data, orders of convergence, then the peers."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import CosineBetas, LinearBetas, ScaledLinearBetas, Schedule, SigmoidBetas
from ddpm_deploy.solvers import COLUMNS, StepTable, ddim, ddpm, dpmpp_2m, sde_dpmpp_2m
from ddpm_deploy.spacings import SPACINGS, spaced
from ddpm_deploy.spec import ChainSettings
from ddpm_deploy.words import Prediction, Spacing, Variance
from tests.golden import improved_diffusion
from tests.models import GaussianNetwork, tiny_spec
from tests.tolerances import TOLERANCES

SCHEDULES = {
    "linear": Schedule(LinearBetas().betas(1000)),
    "scaled_linear": Schedule(ScaledLinearBetas().betas(1000)),
    "cosine": Schedule(CosineBetas().betas(1000)),
    "sigmoid": Schedule(SigmoidBetas().betas(1000)),
}
LINEAR = SCHEDULES["linear"]
PREDICTIONS: list[Prediction] = ["epsilon", "v", "x0"]
MEAN, STD = 0.3, 0.4  # of the data

Vector = NDArray[np.float64]


def denoised(x: Any, ac: Any) -> Any:
    """E[x_0 | x_t] for the data, by Bayes."""
    return MEAN + np.sqrt(ac) * STD**2 / (ac * STD**2 + 1 - ac) * (x - np.sqrt(ac) * MEAN)


def noise_of(x: Any, ac: Any) -> Any:
    """E[ε | x_t]."""
    return (x - np.sqrt(ac) * denoised(x, ac)) / np.sqrt(1 - ac)


def network(prediction: Prediction, x: Any, t: int, schedule: Schedule) -> Any:
    """The optimal network for the data, whatever it predicts."""
    ac = schedule.alphas_cumprod[t]
    x0, epsilon = denoised(x, ac), noise_of(x, ac)
    if prediction == "mean":  # of q(x_{t-1} | x_t, x_0), by conditioning the joint Gaussian
        before = schedule.alphas_cumprod[t - 1] if t else 1.0
        kt = np.sqrt(ac / before) * (1 - before) / (1 - ac)
        return kt * x + (np.sqrt(before) - kt * np.sqrt(ac)) * x0
    return {"epsilon": epsilon, "v": np.sqrt(ac) * epsilon - np.sqrt(1 - ac) * x0, "x0": x0}[prediction]


def run(
    table: StepTable,
    prediction: Prediction,
    schedule: Schedule,
    x: Any,
    noise: Callable[[int], Any] = lambda step: 0.0,
    learned: Callable[[Any], Any] = lambda x: 0.0,
) -> Any:
    """The table's rows in float64. learned: v at x, of a learned-range variance."""
    x0 = np.zeros_like(x)
    for step, row in enumerate(table.rows):
        r = dict(zip(COLUMNS, row, strict=True))
        out = network(prediction, x, int(r["t"]), schedule)
        before, x0 = x0, np.clip(r["a"] * x + r["b"] * out, r["lo"], r["hi"])
        log_variance = r["ln_var_min"] + (learned(x) + 1) / 2 * (r["ln_var_max"] - r["ln_var_min"])
        z = np.exp(log_variance / 2) * noise(step)
        x = r["c"] * x0 + r["d"] * x + r["e"] * z + r["f"] * before + r["g"] * out
    return x


# --- theory ---------------------------------------------------------------------------------------


def exact_ddim(schedule: Schedule, timesteps: NDArray[np.int64], eta: float) -> tuple[float, float]:
    """Mean and variance of DDIM's output on the data, by equation 12 of Song et al.: every step is affine."""
    ac = schedule.alphas_cumprod
    m, v = 0.0, 1.0
    for i, t in enumerate(timesteps):
        here, there = ac[t], ac[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        sigma = eta * np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)

        def step(x: float, here: float = here, there: float = there, sigma: float = sigma) -> float:
            epsilon = noise_of(x, here)
            return float(
                np.sqrt(there) * (x - np.sqrt(1 - here) * epsilon) / np.sqrt(here)
                + np.sqrt(1 - there - sigma**2) * epsilon
            )

        m, slope = step(m), step(1.0) - step(0.0)
        v = slope**2 * v + sigma**2
    return m, v


def exact_2m(schedule: Schedule, timesteps: NDArray[np.int64]) -> tuple[float, float]:
    """The same of DPM-Solver++(2M), by algorithm 2 of Lu et al.: the output is affine in x_T."""

    def solve(x: float) -> float:
        alpha = np.sqrt(schedule.alphas_cumprod[timesteps])
        sigma = np.sqrt(1 - alpha**2)
        lam = np.log(alpha / sigma)
        q: list[float] = []
        for i, t in enumerate(timesteps):
            q.append(float(denoised(x, schedule.alphas_cumprod[t])))
            if i + 1 == len(timesteps):
                return q[-1]
            h = lam[i + 1] - lam[i]
            d = q[-1]
            if i:
                r = (lam[i] - lam[i - 1]) / h
                d = (1 + 1 / (2 * r)) * q[-1] - 1 / (2 * r) * q[-2]
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (np.exp(-h) - 1) * d
        return x

    offset = solve(0.0)
    return offset, (solve(1.0) - offset) ** 2


def exact_sde_2m(schedule: Schedule, timesteps: NDArray[np.int64]) -> tuple[float, float]:
    """The same of SDE-DPM-Solver++(2M), as its authors write it: λ-steps of dx = … dλ + … dω, each affine."""
    alpha = np.sqrt(schedule.alphas_cumprod[timesteps])
    sigma = np.sqrt(1 - alpha**2)
    lam = np.log(alpha / sigma)
    size = len(timesteps) + 1
    unit = np.eye(size + 1)  # x_T, the noise of each step, and the constant
    x, q = unit[0], []
    for i, t in enumerate(timesteps):
        q.append(
            denoised(x, schedule.alphas_cumprod[t])
            - denoised(0.0, schedule.alphas_cumprod[t]) * (1 - unit[-1])
        )
        if i + 1 == len(timesteps):
            x = q[-1]
            break
        h = lam[i + 1] - lam[i]
        d = q[-1] if not i else q[-1] + (q[-1] - q[-2]) * h / (2 * (lam[i] - lam[i - 1]))
        x = sigma[i + 1] / sigma[i] * np.exp(-h) * x + alpha[i + 1] * (1 - np.exp(-2 * h)) * d
        x = x + sigma[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * unit[i + 1]
    return float(x[-1]), float((x[:-1] ** 2).sum())


def moments(table: StepTable, prediction: Prediction, schedule: Schedule) -> tuple[float, float]:
    """Mean and variance of a table's output: it is affine in x_T and in the noise of each step."""
    size = len(table) + 1
    unit = np.eye(size + 1)  # all zero but one, last: all zero
    out = run(table, prediction, schedule, unit[0], lambda step: unit[step + 1])
    gains = out[:size] - out[size]
    return float(out[size]), float((gains**2).sum())


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("prediction", [*PREDICTIONS, "mean"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [50, 7])
def test_tables_give_the_exact_moments_on_gaussian_data(
    kind: str, prediction: Prediction, spacing: Spacing, steps: int
) -> None:
    schedule, timesteps = SCHEDULES[kind], spaced(spacing, SCHEDULES[kind], steps)
    limit = TOLERANCES["gaussian_table"].limit
    for eta, raw in itertools.product((0.0, 0.5, 1.0), (False, True)):
        table = ddim(
            schedule, timesteps, prediction=prediction, eta=eta, clip=None, use_clipped_model_output=not raw
        )
        np.testing.assert_allclose(
            moments(table, prediction, schedule), exact_ddim(schedule, timesteps, eta), rtol=limit
        )
    table = dpmpp_2m(schedule, timesteps, prediction=prediction, clip=None)
    np.testing.assert_allclose(
        moments(table, prediction, schedule), exact_2m(schedule, timesteps), rtol=limit
    )
    table = sde_dpmpp_2m(schedule, timesteps, prediction=prediction, clip=None)
    np.testing.assert_allclose(
        moments(table, prediction, schedule), exact_sde_2m(schedule, timesteps), rtol=limit
    )


def test_the_sde_solver_comes_to_the_datas_variance_with_more_steps() -> None:
    """Its noise is that of the reverse SDE, whose exact solution keeps the variance of the forward process."""
    errors = []
    for steps in (20, 50, 100, 250):
        timesteps = spaced("log-snr", LINEAR, steps)
        mean, variance = moments(sde_dpmpp_2m(LINEAR, timesteps, clip=None), "epsilon", LINEAR)
        assert mean == pytest.approx(MEAN, abs=2e-2)
        errors.append(abs(variance - STD**2))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_log_snr_is_even() -> None:
    steps = np.diff(LINEAR.log_snr[spaced("log-snr", LINEAR, 20)])
    assert steps.std() / steps.mean() < 0.15


def test_ddim_at_eta_1_is_ancestral_sampling() -> None:
    timesteps = spaced("leading", LINEAR, 50)
    wanted = ddpm(LINEAR, timesteps, variance="fixed_small")
    np.testing.assert_allclose(ddim(LINEAR, timesteps, eta=1.0).rows, wanted.rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1000, 50])
def test_a_predicted_mean_is_ancestral_sampling(steps: int) -> None:
    """Unclipped it is the chain of a predicted ε, full or strided."""
    timesteps = spaced("leading", LINEAR, steps)
    results = [
        moments(ddpm(LINEAR, timesteps, prediction=prediction, clip=None), prediction, LINEAR)
        for prediction in ("epsilon", "mean")
    ]
    np.testing.assert_allclose(*results, rtol=1e-9)
    full = ddpm(LINEAR, spaced("leading", LINEAR, 1000), prediction="mean")
    assert (full["g"] == 1).all()
    assert (full["c"] == 0).all()
    assert (full["d"] == 0).all()


@pytest.mark.parametrize(
    ("solver", "least", "most"), [(ddim, 0.95, 1.02), (dpmpp_2m, 1.85, 2.15)], ids=["ddim", "2m"]
)
def test_orders_of_convergence(solver: Any, least: float, most: float) -> None:
    """Against the exact solution of the probability-flow ODE, which for Gaussian data scales x_t - √ᾱ·mean.

    The last row, the jump to ᾱ = 1, is left out.
    """
    ac = LINEAR.alphas_cumprod
    variance = ac * STD**2 + 1 - ac
    errors, counts = [], [50, 100, 200, 500]
    for count in counts:
        timesteps = np.linspace(0, 999, count + 1).round()[::-1].astype(np.int64)
        rows = solver(LINEAR, timesteps, clip=None).rows[:-1]
        got = run(StepTable(rows), "epsilon", LINEAR, np.array(1.0))
        exact = np.sqrt(ac[0]) * MEAN + (1.0 - np.sqrt(ac[-1]) * MEAN) * np.sqrt(variance[0] / variance[-1])
        errors.append(abs(float(got) - exact))
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert (slopes >= least).all(), slopes
    assert (slopes <= most).all(), slopes


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ddim", "steps": 50},
        {"solver": "ddim", "steps": 50, "eta": 0.7, "spacing": "trailing"},
        {"solver": "dpmpp-2m", "steps": 20, "spacing": "linspace"},
        {"solver": "sde-dpmpp-2m", "steps": 20, "spacing": "log-snr"},
        {"solver": "sde-dpmpp-2m", "timesteps": (999, 800, 431, 90, 12, 0)},
    ],
)
def test_running_chains_have_the_exact_moments(settings: dict[str, Any]) -> None:
    """The Sampler in float32, on the addressed noise, within five standard errors."""
    spec = msgspec.structs.replace(tiny_spec((1, 32, 32)), value_range=(-1e6, 1e6))  # as good as unclipped
    sampler = Sampler(GaussianNetwork(spec, 8, mean=MEAN, std=STD))
    x = sampler.sample(8, seed=1, **settings).astype(np.float64)
    timesteps = spec.step_table(ChainSettings(**settings)).timesteps
    exact = {"dpmpp-2m": exact_2m, "sde-dpmpp-2m": exact_sde_2m}.get(settings["solver"])
    mean, variance = (
        exact(LINEAR, timesteps) if exact else exact_ddim(LINEAR, timesteps, settings.get("eta", 0.0))
    )
    assert abs(x.mean() - mean) < 5 * (variance / x.size) ** 0.5
    assert abs(x.var() - variance) < 5 * variance * (2 / x.size) ** 0.5


# --- settings -------------------------------------------------------------------------------------


# As their code has them, these come to the same timestep more than once, or past the last, where there are many steps.
REPEATS = ("quad", "dpm-linspace", "dpm-leading", "openai-ddim", "log-snr")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 10, 1000, 4000])
def test_spacings_fall_within_their_range(spacing: Spacing, total: int) -> None:
    schedule = Schedule(LinearBetas().betas(total))
    for steps in sorted({1, 2, 3, 7, total // 3 or 1, total - 1 or 1, total}):
        if steps <= total:
            timesteps = spaced(spacing, schedule, steps)
            assert len(timesteps) == steps or (spacing in REPEATS and 1 <= len(timesteps) < steps)
            assert (np.diff(timesteps) < 0).all()
            assert 0 <= timesteps[-1] <= timesteps[0] < total
    if spacing not in REPEATS:
        assert spaced(spacing, schedule, total).tolist() == list(range(total))[::-1]


@pytest.mark.parametrize(
    ("timesteps", "problem"),
    [
        ([], "must fall"),
        ([3, 3, 0], "must fall"),
        ([0, 5], "must fall"),
        ([1000, 0], "at most 999"),
        ([5, -1], "0 or more"),
    ],
)
def test_timesteps_that_are_no_chain(timesteps: list[int], problem: str) -> None:
    for solver in (ddpm, ddim, dpmpp_2m, sde_dpmpp_2m):
        with pytest.raises(SettingError, match=problem):
            solver(LINEAR, timesteps)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"solver": "euler"}, "solver 'euler' is not known: choose from ddpm, ddim, dpmpp-2m"),
        ({"spacing": "even"}, "spacing 'even' is not known: choose from leading"),
        ({"eta": 0.5}, "eta is of the solver ddim, and ddpm has none"),
        ({"solver": "ddim", "eta": 1.5}, "eta must be from 0 to 1, not 1.5"),
        ({"solver": "ddim", "eta": float("nan")}, "eta must be from 0 to 1"),
        ({"steps": 1001}, "choose from 1 to 1000"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        tiny_spec().step_table(ChainSettings(**settings))


@pytest.mark.parametrize(
    "rows", [np.zeros((3, 5)), np.zeros(12), np.zeros((0, 12)), np.full((2, 12), np.nan)], ids=str
)
def test_rows_that_are_no_table(rows: Vector) -> None:
    with pytest.raises(SettingError, match="a table has rows of 12 numbers"):
        StepTable(rows)


def test_a_table_is_a_copy_that_nobody_changes() -> None:
    rows = ddpm(LINEAR, [5, 0]).rows.astype(np.float32)
    table = StepTable(rows)
    rows[:] = 7
    assert table.rows.dtype == np.float64
    assert table["t"].tolist() == [5, 0]
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1


@pytest.mark.parametrize("clip", [(1, -1), (float("nan"), 1), (0, 0)])
def test_a_clip_that_is_no_range(clip: tuple[float, float]) -> None:
    with pytest.raises(SettingError, match="clip must be a range"):
        ddpm(LINEAR, [5, 0], clip=clip)


@pytest.mark.parametrize("variance", ["learned", "fixed_small_log"])
def test_other_variances_are_refused_by_name(variance: Any) -> None:
    with pytest.raises(
        SettingError, match=f"variance '{variance}' is not supported: choose from fixed_small"
    ):
        ddpm(LINEAR, [5, 0], variance=variance)


@pytest.mark.parametrize("solver", [ddpm, ddim, dpmpp_2m])
def test_other_predictions_are_refused_by_name(solver: Any) -> None:
    with pytest.raises(SettingError, match="prediction 'score' is not supported: choose from epsilon, v, x0"):
        solver(LINEAR, [5, 0], prediction="score")


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "steps"), improved_diffusion.SPACED)
def test_spacing_is_that_of_improved_diffusion(total: int, steps: int) -> None:
    golden = np.load(improved_diffusion.FILE)[f"spaced {total} {steps}"]
    assert golden.tolist() == spaced("openai", Schedule(LinearBetas().betas(total)), steps).tolist()[::-1]


@pytest.mark.parametrize("case", improved_diffusion.CHAINS, ids=str)
def test_chains_are_those_of_improved_diffusion(case: tuple[str, Variance, int, bool]) -> None:
    """Respaced, each variance, whole chains on shared noise."""
    kind, variance, steps, clip = case
    noise, schedule = improved_diffusion.given(steps + 1), SCHEDULES[kind]
    table = ddpm(
        schedule, spaced("openai", schedule, steps), variance=variance, clip=(-1, 1) if clip else None
    )
    mine = run(table, "epsilon", schedule, noise[0], lambda step: noise[step + 1], improved_diffusion.learned)
    golden = np.load(improved_diffusion.FILE)[f"chain {case}"]
    assert np.abs(mine - golden).max() <= TOLERANCES[f"improved_diffusion_{kind}"].limit


@pytest.fixture(scope="session")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


PEER_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}
PEER_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_betas_are_those_of_diffusers(diffusers: Any, kind: str) -> None:
    peer = diffusers.DDPMScheduler(beta_schedule=PEER_SCHEDULES[kind])
    np.testing.assert_allclose(
        SCHEDULES[kind].betas, peer.betas.numpy(), rtol=TOLERANCES["diffusers_betas"].limit
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_alphas_cumprod_are_those_of_diffusers(diffusers: Any, kind: str) -> None:
    """Within the roundings of its float32: of β, of 1 - β, and of each product."""
    schedule = SCHEDULES[kind]
    theirs = diffusers.DDPMScheduler(trained_betas=schedule.betas).alphas_cumprod.double().numpy()
    roundings = np.cumsum(2 + schedule.betas / (1 - schedule.betas))
    assert (np.abs(theirs / schedule.alphas_cumprod - 1) <= 2.0**-24 * roundings * 1.001).all()


@pytest.mark.parametrize("steps", [1000, 250, 50, 20, 10, 7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_those_of_diffusers(diffusers: Any, spacing: Spacing, steps: int) -> None:
    peer = diffusers.DDPMScheduler(timestep_spacing=spacing)
    peer.set_timesteps(steps)
    assert peer.timesteps.tolist() == spaced(spacing, LINEAR, steps).tolist()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [250, 50, 7])
def test_stride_replays_ddim_of_diffusers_in_any_spacing(
    diffusers: Any, spacing: Spacing, steps: int
) -> None:
    """It steps to t - T // N: where that is not the next timestep, our consistent chain is another one."""
    import torch

    timesteps = spaced(spacing, LINEAR, steps)
    start = theirs = np.random.default_rng(0).standard_normal((2, 1, 4, 4))
    peer = diffusers.DDIMScheduler(trained_betas=LINEAR.betas, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    for t in timesteps.tolist():
        out = torch.from_numpy(network("epsilon", theirs, t, LINEAR))
        theirs = peer.step(out, t, torch.from_numpy(theirs)).prev_sample.numpy()
    replayed, consistent = (
        np.abs(
            run(
                ddim(LINEAR, timesteps, use_clipped_model_output=False, stride=stride),
                "epsilon",
                LINEAR,
                start,
            )
            - theirs
        ).max()
        for stride in (1000 // steps, None)
    )
    assert replayed <= TOLERANCES["diffusers_ddim"].limit
    if spacing == "linspace" or 1000 % steps:
        assert consistent > 10 * TOLERANCES["diffusers_ddim"].limit


def test_a_stride_past_the_start_goes_to_the_image() -> None:
    np.testing.assert_array_equal(
        ddim(LINEAR, [5, 0], stride=5000)["c"][0], ddim(LINEAR, [5], stride=6)["c"][0]
    )


def test_stride_out_of_range() -> None:
    with pytest.raises(SettingError, match="stride must be 1 or more, not 0"):
        ddim(LINEAR, [5, 0], stride=0)


def float32_bound(
    table: StepTable,
    prediction: Prediction,
    schedule: Schedule,
    x: Vector,
    noise: Vector,
    learned: Callable[[Any], Any],
) -> Vector:
    """How far a chain of ancestral sampling may be off where the coefficients of its steps are made in float32.

    To first order: what each rounding does to its coefficient, then to x, then through the steps that are left. The
    ᾱ are those of the schedule, and exact: a difference of two of them is off by one rounding, and only
    1 - ᾱ/ᾱ_prev, whose quotient is rounded already, by as many as it cancels.
    """
    u = 2.0**-24
    ac = schedule.alphas_cumprod
    there = np.append(ac[table.timesteps[1:]], 1.0)
    error = np.zeros_like(x)
    for step, row in enumerate(table.rows):
        r = dict(zip(COLUMNS, row, strict=True))
        t, z = int(r["t"]), noise[step]
        out = network(prediction, x, t, schedule)
        free = r["a"] * x + r["b"] * out
        x0 = np.clip(free, r["lo"], r["hi"])
        beta = 1 / (1 - ac[t] / there[step]) if there[step] < 1 else 1.0  # in roundings, as all that follows
        log_variance = r["ln_var_min"] + (learned(x) + 1) / 2 * (r["ln_var_max"] - r["ln_var_min"])
        deviation = r["e"] * np.exp(log_variance / 2)
        mine = np.abs(r["c"] * x0) * (beta + 7) + np.abs(r["d"] * x) * 8
        mine += np.abs(deviation * z) * (beta + 7 + np.abs(log_variance))
        mine += np.where(x0 == free, r["c"] * (np.abs(r["a"] * x) * 4 + np.abs(r["b"] * out) * 5), 0)
        slope = r["a"] + r["b"] * (network(prediction, x + 1, t, schedule) - out)
        error = error * np.abs(np.where(x0 == free, r["c"] * slope, 0) + r["d"]) + u * mine
        x = r["c"] * x0 + r["d"] * x + deviation * z
    return error


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 1000), *itertools.product(["leading", "trailing", "linspace"], [250, 50, 20, 10, 7])],
)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddpm_is_that_of_diffusers(
    diffusers: Any, monkeypatch: pytest.MonkeyPatch, kind: str, spacing: Spacing, steps: int
) -> None:
    """Whole chains on shared noise, every prediction, variance and clipping; all spacings are one at 1000 steps.

    Where the last timestep is not 0 (trailing), it adds noise after it: only fixed_small has none to add.
    """
    import torch

    schedule, timesteps = SCHEDULES[kind], spaced(spacing, SCHEDULES[kind], steps)
    rng = np.random.default_rng(0)
    start, noise = rng.standard_normal((2, 1, 4, 4)), rng.standard_normal((steps, 2, 1, 4, 4))
    draw = torch.zeros(())
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: draw)
    peers = diffusers.DDPMScheduler(trained_betas=schedule.betas).alphas_cumprod.double().numpy()
    variances = get_args(Variance) if timesteps[-1] == 0 else ("fixed_small",)
    cases = list(itertools.product(PREDICTIONS, variances, (True, False)))
    if steps >= 250:  # the long ones in turn: the four schedules have them all
        cases = cases[list(SCHEDULES).index(kind) :: len(SCHEDULES)]
    for prediction, variance, clip in cases:
        peer = diffusers.DDPMScheduler(
            trained_betas=schedule.betas,
            timestep_spacing=spacing,
            variance_type=variance,
            clip_sample=clip,
            prediction_type=PEER_PREDICTIONS[prediction],
        )
        peer.set_timesteps(steps)
        theirs = start
        for step, t in enumerate(timesteps.tolist()):
            out, draw = network(prediction, theirs, t, schedule), torch.from_numpy(noise[step])
            if variance == "learned_range":
                out = np.concatenate([out, improved_diffusion.learned(theirs)], axis=1)
            theirs = peer.step(torch.from_numpy(out), t, torch.from_numpy(theirs)).prev_sample.numpy()
        of_peer = Schedule(1 - peers / np.append(1.0, peers[:-1]))
        table = ddpm(
            of_peer, timesteps, prediction=prediction, variance=variance, clip=(-1, 1) if clip else None
        )
        learned = improved_diffusion.learned
        mine = run(table, prediction, schedule, start, lambda step: noise[step], learned)
        bound = float32_bound(table, prediction, schedule, start, noise, learned)
        assert (np.abs(mine - theirs) <= bound).all(), (prediction, variance, clip)
        assert bound.max() <= TOLERANCES["diffusers_ddpm_bound"].limit


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        *itertools.product(["leading"], [1000, 250, 50, 20, 10, 7]),
        *itertools.product(["trailing"], [250, 50, 20, 10]),
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_is_that_of_diffusers(
    diffusers: Any, kind: str, prediction: Prediction, spacing: Spacing, steps: int
) -> None:
    """Whole chains on shared noise, where its scheduler follows its own timesteps."""
    import torch

    schedule, timesteps = SCHEDULES[kind], spaced(spacing, SCHEDULES[kind], steps)
    rng = np.random.default_rng(0)
    start, noise = rng.standard_normal((2, 1, 4, 4)), rng.standard_normal((steps, 2, 1, 4, 4))
    etas = (0.0, 0.6) if steps < 1000 else (0.6,)
    for eta, clip, clipped_output in itertools.product(etas, (True, False), (True, False)):
        if steps == 1000 and clip == clipped_output:
            continue  # the longest ones, half of them
        peer = diffusers.DDIMScheduler(
            trained_betas=schedule.betas,
            timestep_spacing=spacing,
            clip_sample=clip,
            prediction_type=PEER_PREDICTIONS[prediction],
        )
        peer.set_timesteps(steps)
        theirs = start
        for step, t in enumerate(timesteps.tolist()):
            theirs = peer.step(
                torch.from_numpy(network(prediction, theirs, t, schedule)),
                t,
                torch.from_numpy(theirs),
                eta=eta,
                use_clipped_model_output=clipped_output,
                variance_noise=torch.from_numpy(noise[step]) if eta else None,
            ).prev_sample.numpy()
        table = ddim(
            schedule,
            timesteps,
            prediction=prediction,
            eta=eta,
            clip=(-1, 1) if clip else None,
            use_clipped_model_output=clipped_output,
        )
        mine = run(table, prediction, schedule, start, lambda step: noise[step])
        assert np.abs(mine - theirs).max() <= TOLERANCES["diffusers_ddim"].limit


def multistep(
    diffusers: Any, kind: str, prediction: Prediction, spacing: str, steps: int, **options: str
) -> Any:
    """Its DPMSolverMultistepScheduler, ready for so many steps."""
    peer = diffusers.DPMSolverMultistepScheduler(
        trained_betas=SCHEDULES[kind].betas,
        prediction_type=PEER_PREDICTIONS[prediction],
        timestep_spacing=spacing,
        **options,
    )
    peer.set_timesteps(steps)
    return peer


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers about itself
@pytest.mark.parametrize("steps", [50, 20, 7])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_sde_dpmpp_2m_is_that_of_diffusers(
    diffusers: Any, kind: str, prediction: Prediction, spacing: str, steps: int
) -> None:
    """On its own timesteps, and with the same noise at each."""
    import torch

    peer = multistep(diffusers, kind, prediction, spacing, steps, algorithm_type="sde-dpmsolver++")
    timesteps, schedule = peer.timesteps.numpy(), SCHEDULES[kind]
    rng = np.random.default_rng(0)
    start = theirs = rng.standard_normal((2, 1, 4, 4))
    noise = rng.standard_normal((steps, 2, 1, 4, 4))
    for step, t in enumerate(timesteps.tolist()):
        out = torch.from_numpy(network(prediction, theirs, t, schedule))
        given = torch.from_numpy(noise[step])
        theirs = peer.step(out, t, torch.from_numpy(theirs), variance_noise=given).prev_sample.numpy()
    mine = run(
        sde_dpmpp_2m(schedule, timesteps, prediction=prediction, clip=None),
        prediction,
        schedule,
        start,
        lambda step: noise[step],
    )
    assert np.abs(mine - theirs).max() <= TOLERANCES["diffusers_sde_2m"].limit


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers about itself
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [*itertools.product(["leading", "linspace", "trailing"], [250, 50, 20, 10, 7]), ("trailing", 1000)],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_dpmpp_2m_is_that_of_diffusers(
    diffusers: Any, kind: str, prediction: Prediction, spacing: str, steps: int
) -> None:
    """On its own timesteps: its linspace is one of N + 1 without the last."""
    import torch

    peer = multistep(diffusers, kind, prediction, spacing, steps)
    timesteps, schedule = peer.timesteps.numpy(), SCHEDULES[kind]
    start = theirs = np.random.default_rng(0).standard_normal((2, 1, 4, 4))
    for t in timesteps.tolist():
        out = torch.from_numpy(network(prediction, theirs, t, schedule))
        theirs = peer.step(out, t, torch.from_numpy(theirs)).prev_sample.numpy()
    table = dpmpp_2m(schedule, timesteps, prediction=prediction, clip=None)
    mine = run(table, prediction, schedule, start)
    limit = TOLERANCES["diffusers_2m_cosine" if kind == "cosine" else "diffusers_2m"].limit
    assert np.abs(mine - theirs).max() <= limit
