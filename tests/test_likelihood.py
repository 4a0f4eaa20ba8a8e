"""The variational bound: against theory, improved-diffusion, our own training, and as a command."""

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_deploy.bound import bound_table
from ddpm_deploy.cli.bodies.evaluate import _title
from ddpm_deploy.errors import BackendError, DataError, SettingError
from ddpm_deploy.evaluate.data import open_images
from ddpm_deploy.evaluate.likelihood import (
    Estimate,
    Likelihood,
    Terms,
    _ln_likelihood,
    _ln_normal,
    likelihood,
)
from ddpm_deploy.noise import forward_noise
from ddpm_deploy.runtime.images import Pixels
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.schedule import SCHEDULES, Schedule
from ddpm_deploy.solvers import prediction_coefficients
from ddpm_deploy.spec import ChainSettings, ModelSpec
from ddpm_deploy.words import Prediction, Variance
from tests.golden import improved_diffusion
from tests.models import ArrayNetwork, GaussianNetwork, tiny_spec
from tests.test_cli import call, refused
from tests.test_solvers import SCHEDULES as CHAINS
from tests.test_solvers import network
from tests.tolerances import TOLERANCES

MEAN, STD = 0.1, 0.3
Answer = Callable[[Array, NDArray[np.int64]], Array]


def spec_of(**changes: Any) -> ModelSpec:
    return msgspec.structs.replace(tiny_spec((1, 4, 4)), **{"clip": False, **changes})


def with_answer(spec: ModelSpec, answer: Answer, batch: int = 64) -> ArrayNetwork:
    """A network that predicts what `answer` says of x and t (B,)."""
    made = ArrayNetwork(spec, batch)
    made.answer = answer  # type: ignore[method-assign]
    return made


def gaussian_images(count: int, shape: tuple[int, int, int] = (1, 4, 4)) -> Pixels:
    values = np.random.default_rng(3).normal(MEAN, STD, (count, *shape))
    return np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8)


def evaluated(
    one: ArrayNetwork, images: Pixels, terms: Terms | None = None, seed: int = 0, batch: int | None = None
) -> Likelihood:
    terms = terms or Terms(one.spec)
    return likelihood(
        one, terms, lambda i: images[i], np.arange(len(images)), seed=seed, batch=batch or one.max_batch
    )


def bits_of(found: Likelihood) -> NDArray[np.float64]:
    """Of each stratum, the smallest timestep first."""
    return np.array([stratum.bits.bits for stratum in found.strata])[::-1]


def errors_of(found: Likelihood) -> NDArray[np.float64]:
    return np.array([stratum.bits.error for stratum in found.strata])[::-1]


def squares_of(found: Likelihood) -> NDArray[np.float64]:
    """Mean squared error of x̂0 in a value range of 2, the smallest timestep first."""
    return np.array([stratum.distortion / 127.5 for stratum in found.strata])[::-1] ** 2


# --- theory -----------------------------------------------------------------------------------------


def mmse(schedule: Schedule, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
    """E (E[x_0 | x_t] - x_0)² of Gaussian data: the variance of x_0 given x_t."""
    ac = schedule.alphas_cumprod[timesteps]
    return STD**2 * (1 - ac) / (ac * STD**2 + 1 - ac)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [100, 23])
def test_gaussian_data_have_a_bound_in_closed_form(schedule: str, variance: Variance, steps: int) -> None:
    spec = spec_of(timesteps=100, schedule=SCHEDULES[schedule], variance=variance)
    process, terms = spec.make_schedule(), Terms(spec, ChainSettings(steps=steps, spacing="linspace"))
    found = evaluated(GaussianNetwork(spec, 64, MEAN, STD), gaussian_images(128), terms)
    here = process.alphas_cumprod[terms.table.timesteps]
    there = np.append(1.0, here[:-1])
    beta = 1 - here / there
    q = beta * (1 - there) / (1 - here)
    p = q if variance == "fixed_small" else beta
    left = mmse(process, terms.table.timesteps)
    error = there * beta**2 / (1 - here) ** 2 * left
    wanted = 0.5 * (np.log(p[1:] / q[1:]) - 1 + (q[1:] + error[1:]) / p[1:]) / math.log(2)
    assert (np.abs(bits_of(found)[1:] - wanted) < 5 * errors_of(found)[1:]).all()
    assert found.between.bits == pytest.approx(wanted.sum(), abs=4 * found.between.error)
    np.testing.assert_allclose(squares_of(found), left, rtol=0.2)
    # L_0: the mean of p is off by an error of variance `left`; 1 in 10⁴ of the values is at an end of [-1, 1].
    at, weights = np.polynomial.hermite_e.hermegauss(60)
    errors = at[:, None] * math.sqrt(left[0])
    nats = _ln_likelihood(np.zeros_like(errors), errors, np.full_like(errors, math.log(q[1])), spec)
    decoder = -(nats[:, 0] * weights).sum() / math.sqrt(2 * math.pi) / math.log(2)
    assert found.decoder.bits == pytest.approx(decoder, abs=4 * found.decoder.error)
    prior = 0.5 * (here[-1] * (MEAN**2 + STD**2) - here[-1] - math.log(1 - here[-1])) / math.log(2)
    assert found.prior.bits == pytest.approx(prior, abs=4 * found.prior.error + 1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_network_that_says_nothing(variance: Variance) -> None:
    """ε = 0: x̂0 is off by √(1 - ᾱ)/√ᾱ times the noise itself. x_0 = 0: by the image itself."""
    images = gaussian_images(5)
    x0 = images / 127.5 - 1
    for prediction in ("epsilon", "x0"):
        spec = spec_of(timesteps=100, prediction=prediction, variance=variance)
        ac = spec.make_schedule().alphas_cumprod
        found = evaluated(with_answer(spec, lambda x, t: np.zeros_like(x)), images)
        noise = [(forward_noise(0, np.arange(5), t, (1, 4, 4)) ** 2).mean() for t in range(100)]
        squares = np.array(noise) * (1 - ac) / ac if prediction == "epsilon" else np.full(100, (x0**2).mean())
        np.testing.assert_allclose(squares_of(found), squares, rtol=1e-4)
        before = np.append(1.0, ac[:-1])
        beta = 1 - ac / before
        q = beta * (1 - before) / (1 - ac)
        p = (q if variance == "fixed_small" else beta)[1:]
        error = (before * (beta / (1 - ac)) ** 2 * squares)[1:]
        wanted = 0.5 * (np.log(p / q[1:]) - 1 + (q[1:] + error) / p) / math.log(2)
        np.testing.assert_allclose(bits_of(found)[1:], wanted, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "mean"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_kinds_of_prediction_say_the_same(prediction: Prediction, clip: bool) -> None:
    """One denoiser, told in another way, has the same bound; a mean is used as it is, whatever is clipped."""
    spec = spec_of(timesteps=60, schedule=SCHEDULES["cosine"], prediction=prediction, clip=clip)
    process = spec.make_schedule()
    images, ac = gaussian_images(3), process.alphas_cumprod

    def answer(x: Array, t: NDArray[np.int64]) -> Array:
        here = ac[t][:, None, None, None]
        x0 = np.tanh(x) * 0.9  # within what x̂0 may be
        epsilon = (x - np.sqrt(here) * x0) / np.sqrt(1 - here)
        p, q = (one[:, None, None, None] for one in prediction_coefficients(prediction, process, t))
        result: Array = (p * x0 + q * epsilon).astype(np.float32)
        return result

    found = evaluated(with_answer(spec, answer), images)
    x0spec = msgspec.structs.replace(spec, prediction="x0")
    wanted = evaluated(with_answer(x0spec, lambda x, t: np.tanh(x) * np.float32(0.9)), images)
    np.testing.assert_allclose(bits_of(found), bits_of(wanted), rtol=2e-3)
    assert found.bound.bits == pytest.approx(wanted.bound.bits, rel=2e-4)


def test_the_values_of_a_pixel_share_one_probability() -> None:
    spec = spec_of()
    x0 = np.arange(256)[:, None] / 127.5 - 1
    for mean, ln_var in itertools.product((-3.0, -0.999, 0.1, 1.0), (-9.0, -5.0, 1.0)):
        nats = _ln_likelihood(x0, mean - x0, np.full((256, 1), ln_var), spec)
        assert np.exp(nats).sum() == pytest.approx(1, abs=1e-12)


def test_the_logarithm_of_the_normal_distribution_has_its_digits_far_out() -> None:
    special = pytest.importorskip("scipy.special")
    z = np.array([-1e4, -100.0, -38.0, -30.1, -29.9, -8.0, -1.0, 0.0, 3.0, 9.0])
    np.testing.assert_allclose(_ln_normal(z), special.log_ndtr(z), rtol=1e-9, atol=1e-18)


def test_improbable_pixels_cost_their_bits() -> None:
    """Nothing is kept from zero: 100 standard deviations off are 5,000 nats."""
    nats = _ln_likelihood(
        np.zeros((1, 1)), np.full((1, 1), 0.7), np.full((1, 1), math.log(0.007**2)), spec_of()
    )
    assert nats[0, 0] == pytest.approx(-(((0.7 - 1 / 255) / 0.007) ** 2) / 2, rel=5e-3)


# --- peers and our own training ---------------------------------------------------------------------


@pytest.mark.parametrize("case", improved_diffusion.BOUNDS, ids=str)
def test_bounds_are_those_of_improved_diffusion(case: tuple[str, Prediction, Variance, int, bool]) -> None:
    """To the rounding of its float32; L_0 with the normal distribution in place of its tanh."""
    schedule, prediction, variance, steps, clip = case
    spec = spec_of(schedule=SCHEDULES[schedule], prediction=prediction, variance=variance, clip=clip)

    def answer(x: Array, t: NDArray[np.int64]) -> Array:
        rows = [
            network(prediction, one.astype(np.float64), int(its), CHAINS[schedule])
            for one, its in zip(x, t, strict=True)
        ]
        out = np.array(rows)
        if variance == "learned_range":
            out = np.concatenate([out, improved_diffusion.learned(x.astype(np.float64))], axis=1)
        return out.astype(np.float32)

    terms = Terms(spec, ChainSettings(steps=steps, spacing="openai"))
    found = evaluated(with_answer(spec, answer), improved_diffusion.bound_images(), terms)
    kept = [step for step in improved_diffusion.BOUND_STEPS if step < steps]
    (*golden, prior, bound), (*squares, _, decoder) = np.load(improved_diffusion.FILE)[f"bound {case}"]
    limit = TOLERANCES["improved_diffusion_bound"].limit
    np.testing.assert_allclose(bits_of(found)[kept[1:]], golden[1:], rtol=limit, atol=limit)
    # x̂0 = a·x + b·out has the rounding of both.
    amplified = np.maximum(np.abs(terms.columns["a"]), np.abs(terms.columns["b"]))[kept]
    rounding = np.sqrt(squares) * amplified * TOLERANCES["improved_diffusion_denoised"].limit
    assert (np.abs(squares_of(found)[kept] - squares) <= rounding).all()
    assert found.prior.bits == pytest.approx(prior, abs=limit)
    assert found.decoder.bits == pytest.approx(decoder, rel=limit)
    assert found.bound.bits == pytest.approx(bound, rel=TOLERANCES["improved_diffusion_decoder"].limit)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "mean"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_are_those_of_training(prediction: Prediction, variance: Variance) -> None:
    torch = pytest.importorskip("torch")
    from ddpm_deploy.train.diffusion import Diffusion

    spec = spec_of(timesteps=30, prediction=prediction, variance=variance)
    images = gaussian_images(1)

    def out(x: Array, t: NDArray[np.int64]) -> Array:
        p, q = (
            one[:, None, None, None] for one in prediction_coefficients(prediction, spec.make_schedule(), t)
        )
        ac = spec.make_schedule().alphas_cumprod[t][:, None, None, None]
        # 1 % off the truth, so that no probability is kept from zero in training.
        x0 = images[:1] / 127.5 - 1.01
        said = p * x0 + q * (x - np.sqrt(ac) * x0) / np.sqrt(1 - ac)
        both = np.concatenate([said, np.sin(3 * x)], axis=1) if variance == "learned_range" else said
        return both.astype(np.float32)

    found = bits_of(evaluated(with_answer(spec, out), images))
    diffusion, x0 = Diffusion(spec, "vlb"), torch.from_numpy(images / 127.5 - 1).float()
    theirs = [
        diffusion.loss(
            lambda x, temb, y, t=t: torch.from_numpy(out(x.numpy(), np.array([t]))),
            x0,
            torch.tensor([t]),
            torch.from_numpy(forward_noise(0, np.arange(1), t, (1, 4, 4))),
        ).item()
        for t in range(30)
    ]
    limit = TOLERANCES["bound_of_training"].limit
    np.testing.assert_allclose(found, theirs, rtol=limit, atol=limit * 1e-3)


# --- the estimate -----------------------------------------------------------------------------------


def test_the_parts_add_up() -> None:
    spec = spec_of()
    for terms in (Terms(spec), Terms(spec, strata=9), Terms(spec, ChainSettings(steps=12))):
        found = evaluated(GaussianNetwork(spec, 64, MEAN, STD), gaussian_images(3), terms)
        parts = found.prior.bits + found.between.bits + found.decoder.bits
        assert found.bound.bits == pytest.approx(parts, abs=1e-12)
        assert bits_of(found).sum() == pytest.approx(found.between.bits + found.decoder.bits, abs=1e-12)
        assert found.strata[-1].bits == found.decoder
        assert found.strata[-1].rate == pytest.approx(found.bound.bits - found.decoder.bits, abs=1e-12)
        assert sum(stratum.steps for stratum in found.strata) == len(terms.table)
        assert [stratum.first for stratum in found.strata] == sorted(
            (stratum.first for stratum in found.strata), reverse=True
        )
        rates = [stratum.rate for stratum in found.strata]
        assert rates == sorted(rates)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_strata_cover_every_step_once(schedule: str) -> None:
    spec = spec_of(schedule=SCHEDULES[schedule])
    for count in (1, 2, 20, 500, 998, 999, 5000):
        terms = Terms(spec, strata=count)
        assert terms.starts[0] == 0
        assert terms.lengths[0] == 1
        assert (terms.starts[1:] == np.cumsum(terms.lengths)[:-1]).all()
        assert terms.lengths.sum() == 1000
        assert 2 <= terms.per_image <= min(count + 1, 1000)
        chosen = terms.chosen(7, np.arange(200))
        assert ((chosen >= terms.starts) & (chosen < terms.starts + terms.lengths)).all()
        assert (terms.chosen(7, np.array([150])) == chosen[150]).all()
    assert Terms(spec, strata=999).every
    with pytest.raises(SettingError, match="terms must be 1 or more"):
        Terms(spec, strata=0)


def test_the_standard_error_is_what_other_seeds_give() -> None:
    """Of one image many times, so that timesteps and noise alone differ; and the mean is that of all terms."""
    spec = spec_of(timesteps=300)
    images = np.repeat(gaussian_images(1), 64, axis=0)
    one = GaussianNetwork(spec, 64, MEAN, STD)
    terms = Terms(spec, strata=4)
    found = [evaluated(one, images, terms, seed).bound for seed in range(40)]
    spread = np.std([estimate.bits for estimate in found], ddof=1)
    said = np.mean([estimate.error for estimate in found])
    assert 0.75 < spread / said < 1.3
    every = evaluated(one, images).bound
    assert np.mean([estimate.bits for estimate in found]) == pytest.approx(
        every.bits, abs=4 * (spread / math.sqrt(40) + every.error)
    )


def test_figures_do_not_depend_on_the_batch_and_repeat_exactly() -> None:
    spec = spec_of(timesteps=50)
    images = gaussian_images(70)
    wanted = evaluated(ArrayNetwork(spec, 64), images, Terms(spec, strata=6), seed=2**64 - 1)
    for batch in (1, 7, 64):
        assert evaluated(ArrayNetwork(spec, 64), images, Terms(spec, strata=6), 2**64 - 1, batch) == wanted
    assert evaluated(ArrayNetwork(spec, 64), images, Terms(spec, strata=6), seed=1) != wanted


def test_figures_do_not_depend_on_what_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(timesteps=50, variance="learned_range")
    images = gaussian_images(70)
    wanted = evaluated(ArrayNetwork(spec, 8), images, Terms(spec, strata=6))
    for rows in (1, 3, 20):
        monkeypatch.setattr("ddpm_deploy.evaluate.likelihood._TOGETHER", 16 * rows)
        monkeypatch.setattr("ddpm_deploy.evaluate.likelihood._TILE", 16 * (rows // 2))
        assert evaluated(ArrayNetwork(spec, 8), images, Terms(spec, strata=6)) == wanted


def test_every_row_has_the_label_of_its_image() -> None:
    """A network that knows the image by its label makes no error, and the variance is that of q."""
    spec = spec_of(timesteps=50, num_classes=5, prediction="x0", variance="fixed_small")
    images = gaussian_images(5)
    one = ArrayNetwork(spec, 8)
    one.answer = lambda x, t: (images[one.memory["y"][: len(x)]] / 127.5 - 1).astype(np.float32)  # type: ignore[method-assign]
    found = likelihood(one, Terms(spec, strata=7), lambda i: images[i], np.arange(5), np.arange(5))
    assert found.between.bits == pytest.approx(0, abs=1e-6)
    wrong = likelihood(one, Terms(spec, strata=7), lambda i: images[i], np.arange(5), np.arange(5)[::-1])
    assert wrong.between.bits > 1


def test_a_chain_of_one_step_is_the_decoder_alone() -> None:
    spec = spec_of()
    found = evaluated(ArrayNetwork(spec, 8), gaussian_images(2), Terms(spec, ChainSettings(timesteps=(400,))))
    assert found.between.bits == 0
    assert len(found.strata) == 1
    assert found.prior.bits > 1e-3
    assert math.isfinite(found.bound.bits)


def test_of_a_single_image_there_is_no_error() -> None:
    found = evaluated(ArrayNetwork(spec_of(timesteps=20), 8), gaussian_images(1))
    assert math.isnan(found.bound.error)


def test_what_cannot_be_evaluated() -> None:
    spec = spec_of(timesteps=20)
    one = ArrayNetwork(spec, 8)
    with pytest.raises(SettingError, match="no images"):
        evaluated(one, gaussian_images(0))
    with pytest.raises(SettingError, match="batch must be from 1 to 8, not 9"):
        evaluated(one, gaussian_images(1), batch=9)
    with pytest.raises(SettingError, match="the model was trained with T = 20"):
        Terms(spec, ChainSettings(steps=21))
    with pytest.raises(BackendError, match="not finite"):
        evaluated(with_answer(spec, lambda x, t: x * np.float32(np.nan)), gaussian_images(1))


def test_memory_does_not_grow_with_the_data() -> None:
    spec = msgspec.structs.replace(tiny_spec((1, 32, 32)), timesteps=10)
    one, few = ArrayNetwork(spec, 16), Terms(spec, strata=2)

    def peak(count: int) -> int:
        tracemalloc.start()
        image = np.zeros((1, 1, 32, 32), np.uint8)
        likelihood(one, few, lambda i: np.repeat(image, len(i), axis=0), np.arange(count), batch=16)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(64)
    assert peak(640) < 1.1 * peak(128)


def test_the_constants_are_those_of_the_chain() -> None:
    """What p's mean and variance are made of is what `ddpm-run` runs."""
    spec = spec_of(variance="fixed_small")
    settings = ChainSettings(steps=40, spacing="linspace", solver="ddpm")
    rows = spec.step_table(settings)
    table = bound_table(spec.make_schedule(), rows.timesteps[::-1], spec.variance)
    np.testing.assert_array_equal(table.k0, rows["c"][::-1])
    np.testing.assert_array_equal(table.kt, rows["d"][::-1])
    np.testing.assert_allclose(np.exp(table.ln_var_min / 2)[1:], rows["e"][::-1][1:], rtol=1e-12)


# --- data -------------------------------------------------------------------------------------------


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def refuses(data: str, match: str, spec: ModelSpec | None = None, **keywords: Any) -> None:
    with pytest.raises((DataError, SettingError), match=match) as raised:
        images = open_images(data, spec or tiny_spec(), **keywords)
        images.read(np.arange(images.count))
    assert "\n" not in str(raised.value)


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    eight = np.zeros((2, 8, 8), np.uint8)
    refuses(
        saved(tmp_path / "a.npz", images=np.zeros((2, 9, 8), np.uint8)),
        "image 0 of .* is 9×8, and 8×8 is needed: pass --resize",
    )
    refuses(saved(tmp_path / "b.npz", images=eight.astype(np.float32)), "holds floats, and not 8 bits: .*L_0")
    refuses(saved(tmp_path / "c.npz", images=eight.astype(np.uint16) + 256), "from 256 to 256: .*256 values")
    refuses(saved(tmp_path / "d.npz", images=eight.astype(bool)), "holds bool")
    refuses(saved(tmp_path / "e.npz", images=np.zeros((0, 8, 8), np.uint8)), "shape")
    refuses(saved(tmp_path / "f.npz", images=np.zeros((2, 8, 8, 5), np.uint8)), "5 channels")
    refuses(str(tmp_path / "none"), "does not exist")
    (tmp_path / "empty").mkdir()
    refuses(str(tmp_path / "empty"), "holds no images")
    deep = msgspec.structs.replace(tiny_spec(), data_range=(0.0, 4095.0))
    refuses(saved(tmp_path / "g.npz", images=eight), "this model is of images from 0 to 4095: .*L_0", deep)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    refuses(str(tmp_path / "broken"), "x.png cannot be read")


def test_images_of_another_size_are_resized_where_that_is_asked_for(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.npz", images=np.full((2, 16, 20), 77, np.uint8))
    assert (open_images(data, tiny_spec(), resize=True).read(np.arange(2)) == 77).all()


def test_whole_numbers_in_a_larger_type_are_8_bits(tmp_path: Path) -> None:
    pixels = np.arange(64).reshape(1, 8, 8) * 4
    images = open_images(saved(tmp_path / "a.npz", images=pixels), tiny_spec())
    np.testing.assert_array_equal(images.read(np.array([0]))[0], pixels)


def test_images_of_other_channels_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny_spec((1, 8, 8))
    open_images(saved(tmp_path / "grey.npz", images=np.zeros((4, 8, 8), np.uint8)), spec)
    assert not caplog.text
    open_images(saved(tmp_path / "colour.npz", images=np.zeros((4, 8, 8, 3), np.uint8)), spec)
    assert "have 3 channels, and are made to have 1" in caplog.text


def test_labels_are_found_by_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in (("dog", 9), ("cat", 5)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "pets" / name / "0.png")
    spec = msgspec.structs.replace(tiny_spec(), num_classes=3, class_names=("ant", "dog", "cat"))
    images = open_images(str(tmp_path / "pets"), spec)
    assert images.labels is not None
    assert images.labels.tolist() == [2, 1]
    other = msgspec.structs.replace(spec, class_names=("ant", "dog", "cow"))
    refuses(str(tmp_path / "pets"), "has the class cat, which the model does not know", other)
    data = saved(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 3]))
    refuses(data, "labels up to 3, and the model knows 3 classes", spec)
    bare = saved(tmp_path / "b.npz", images=np.zeros((2, 8, 8), np.uint8))
    refuses(bare, "has no labels", spec)
    null = open_images(bare, msgspec.structs.replace(spec, null_class=True))
    assert null.labels is not None
    assert null.labels.tolist() == [3, 3]
    assert "as of no class" in caplog.text


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(shared: Path) -> Path:
    """Sixteen images for the models of the tests."""
    path = shared / "evaluated.npz"
    if not path.exists():
        np.savez(path, images=gaussian_images(16, (1, 8, 8))[:, 0])
    return path


def found_of(*arguments: Any) -> Any:
    result = call("evaluate", *arguments, "--nll", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_pt_and_onnx_agree(checkpoint_path: Path, onnx_path: Path, pixels: Path) -> None:
    one, other = (found_of(path, pixels, "--terms", 6) for path in (checkpoint_path, onnx_path))
    limit = TOLERANCES["bound_pt_onnx"].limit
    for name, part in one["bits_per_dimension"].items():
        assert other["bits_per_dimension"][name]["bits"] == pytest.approx(part["bits"], rel=limit, abs=1e-9)
    assert one["model"] == other["model"]


def test_what_it_prints(
    onnx_path: Path, pixels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddpm_deploy")
    plot = tmp_path / "curve.png"
    said = call("evaluate", onnx_path, pixels, "--nll", "--count", 5, "--terms", 7, "--plot", plot)
    assert said.exit_code == 0, said.output
    assert "5 images of 16" in caplog.text
    assert "of 1000 terms of each" in caplog.text
    words = said.stdout.split()
    assert {"L", "L_T", "L_t", "L_0", "rate", "distortion"} <= set(words)
    with Image.open(plot) as picture:
        assert picture.size[0] > 800


def test_a_plot_of_a_single_image_claims_no_error() -> None:
    assert _title(Estimate(1.25, math.nan)) == "1.250 bits/dim"
    assert _title(Estimate(1.25, 0.5)) == "1.250 ± 0.500 bits/dim"


def test_every_term_and_shorter_chains(onnx_path: Path, pixels: Path) -> None:
    every = found_of(onnx_path, pixels, "--count", 2, "--all", "--steps", 30)
    assert every["terms_of_each_image"] == every["steps"] == len(every["strata"]) == 30
    assert every["predictions"] == 60
    lines = call(
        "evaluate", onnx_path, pixels, "--nll", "--count", 2, "--all", "--steps", 60
    ).stdout.splitlines()
    assert len(lines) < 32
    some = found_of(onnx_path, pixels, "--count", 1, "--timesteps", "999,400,3")
    assert [stratum["first"] for stratum in some["strata"]] == [999, 400, 3]
    assert some["bits_per_dimension"]["bound"]["standard_error"] is None


def test_mistakes_are_one_line(onnx_path: Path, pixels: Path, tmp_path: Path) -> None:
    refused(call("evaluate", onnx_path, pixels), 2, "--nll")
    refused(call("evaluate", onnx_path, pixels, "--nll", "--all", "--terms", 3), 2, "omit")
    refused(call("evaluate", onnx_path, pixels, "--nll", "--steps", 2000), 1, "T = 1000")
    refused(
        call("evaluate", onnx_path, pixels, "--nll", "--weights", "raw"), 1, "--weights is for a checkpoint"
    )
    refused(call("evaluate", onnx_path, pixels, "--nll", "--plot", tmp_path / "x.gif"), 1, ".png")
    refused(call("evaluate", onnx_path, pixels, "--nll", "--plot", pixels), 1, "another file of this command")
    refused(call("evaluate", onnx_path, tmp_path / "none", "--nll"), 1, "does not exist")


def test_it_runs_without_torch(onnx_path: Path, pixels: Path) -> None:
    arguments = ["evaluate", str(onnx_path), str(pixels), "--nll", "--count", "1", "--steps", "3"]
    code = (
        f"import sys; from ddpm_deploy.cli import main; main({arguments}, standalone_mode=False); "
        "print([m for m in ('torch', 'onnx', 'sklearn', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
