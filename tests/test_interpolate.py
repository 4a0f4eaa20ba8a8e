"""Strips between two images, and images that share first steps: bits, closed forms, a peer, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ddpm_deploy import Request, Sampler, Schedule, SettingError, Snapshot, StepTable, interpolate, reference
from ddpm_deploy.cli.bodies.between import read_end
from ddpm_deploy.errors import DataError
from ddpm_deploy.noise import AddressedNoise, forward_noise
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.images import grid, read_origin, read_pixels
from ddpm_deploy.runtime.interpolate import Latents, encoded, end_errors, strip_request
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import make_request
from ddpm_deploy.schedule import LinearBetas
from ddpm_deploy.solvers import ddim, ddim_inversion, ddpm, dpmpp_2m, prediction_coefficients, sde_dpmpp_2m
from ddpm_deploy.spacings import spaced
from ddpm_deploy.spec import ChainSettings, Sampling
from ddpm_deploy.words import Encoder, Prediction, Solver
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, GaussianNetwork, tiny_spec
from tests.test_chain import every_column_table
from tests.test_cli import call, refused
from tests.test_guidance import Labelled
from tests.tolerances import TOLERANCES

SPEC = tiny_spec((3, 4, 5), timesteps=30, network=None)
SCHEDULE = SPEC.make_schedule()
LINEAR = Schedule(LinearBetas().betas(1000))
# The host, and a GPU's way over its stand-in, which runs step.cu.
PLACES: dict[str, Callable[[ArrayNetwork], Any]] = {
    "host": lambda network: network,
    "device": lambda network: DeviceNetwork(network, HostDevice(seed=1)),  # type: ignore[arg-type]
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Callable[[ArrayNetwork], Any]:
    """A network where it runs."""
    return PLACES[request.param]


def model(max_batch: int = 3) -> ArrayNetwork:
    return ArrayNetwork(SPEC, max_batch)


def two_images(seed: int = 0, shape: tuple[int, ...] = SPEC.image_shape) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (2, *shape)).astype(np.float32)


# --- images that share their first steps --------------------------------------------------------------------


@pytest.mark.parametrize("share_until", [0, 1, 12, 30])
@pytest.mark.parametrize(
    "table",
    [ddpm(SCHEDULE, spaced("leading", SCHEDULE, 30)), every_column_table(0, 12)],
    ids=["full", "every column"],
)
def test_what_is_shared_equals_the_reference_bit_for_bit(
    place: Callable[[ArrayNetwork], Any], table: StepTable, share_until: int
) -> None:
    """Beside a slot that shares nothing, and moved half-way."""
    chain, first = Chain(place(model(4))), 2**40 + 5
    shared = Request(table=table, seed=7, first_index=first, count=2, share_until=share_until)
    chain.start(np.array([1, 3]), shared)
    chain.start(np.array([0]), Request(table=table, seed=7, first_index=first))
    for step in range(len(table)):
        if step == len(table) // 2:
            chain.move(3, 2)
        chain.step()
    wanted = [
        [*reference.chain(answers, table, SPEC.image_shape, 7, index, until)][-1]
        for index, until in ((first, None), (first, share_until), (first + 1, share_until))
    ]
    np.testing.assert_array_equal(
        chain.images(np.arange(3)).view(np.uint32), np.stack(wanted).view(np.uint32)
    )


def answers(x: Array, t: int) -> Array:
    return model(1).answer(x[None], np.array([t]))[0]


def test_the_images_are_one_until_then_and_then_go_their_own_ways() -> None:
    sampler = Sampler(model())
    plain = sampler.sample(3, seed=5)
    apart = {}
    for until in (0, 11, 30):
        seen = [x for _, x, _ in sampler.stream(3, seed=5, share_until=until)]
        one = [bool((x == x[0]).all()) for x in seen]  # after the steps from t = 29, 28, …
        apart[until] = one.index(False) if False in one else len(one)
    assert apart == {0: 30, 11: 30 - 11, 30: 0}
    np.testing.assert_array_equal(sampler.sample(3, seed=5, share_until=0), plain[[0, 0, 0]])
    shared = sampler.sample(3, seed=5, share_until=11)
    np.testing.assert_array_equal(shared[0], plain[0])  # sample 0 shares with itself
    assert len({image.tobytes() for image in shared}) == 3
    only_start = sampler.sample(3, seed=5, share_until=30)
    np.testing.assert_array_equal(only_start[0], plain[0])
    assert np.abs(only_start[1] - plain[1]).max() > 0.1


def test_the_batch_has_no_say_nor_the_part() -> None:
    sampler = Sampler(model(3))
    whole = sampler.sample(7, seed=5, share_until=11, first_index=100)
    for i in (0, 4, 6):
        alone = sampler.sample(1, seed=5, share_until=11, first_index=100 + i)
        np.testing.assert_array_equal(alone[0], whole[i])
    request = make_request(SPEC, 7, seed=5, share_until=11, first_index=100)
    np.testing.assert_array_equal(np.concatenate(list(sampler.draw(request[2:5]))), whole[2:5])


@pytest.mark.parametrize("at", [4, 25])
def test_a_snapshot_knows_what_is_shared(tmp_path: Path, at: int) -> None:
    """Taken before and after the images part."""
    sampler, kept = Sampler(model()), list[Snapshot]()
    stream = sampler.stream(3, seed=5, share_until=11)
    for step, _, _ in stream:
        if step == at:
            kept.append(sampler.snapshot())
    kept[0].save(tmp_path / "x.npz")
    resumed = Sampler(model()).resume(Snapshot.load(tmp_path / "x.npz"))
    np.testing.assert_array_equal(resumed, sampler.sample(3, seed=5, share_until=11))


def test_shared_noise_is_that_of_sample_0() -> None:
    """By the draws that AddressedNoise is asked for, in one call."""
    noise, draws = AddressedNoise(2, 6), np.array([[0, 30, 12, 11, 1]] * 2)
    out = np.empty((2, 5, noise.width), np.float32)
    part, seeds = slice(0, 2), np.array([3, 3], np.uint64)
    noise.assign(part, seeds, np.array([9, 9], np.uint64), np.array([11, -1], np.int32))
    noise.fill(part, draws, out)
    shared, own = ([reference.normal(3, index, int(draw), (6,)) for draw in draws[0]] for index in (0, 9))
    np.testing.assert_array_equal(out[0, :, :6], np.stack(shared[:3] + own[3:]))
    np.testing.assert_array_equal(out[1, :, :6], np.stack(own))


def test_the_service_shares_too() -> None:
    """Images that join and leave one by one, and the body of POST /v1/samples."""
    pytest.importorskip("starlette")
    from ddpm_deploy.serve.batcher import Batcher
    from ddpm_deploy.serve.bodies import SamplesBody, parse, to_request
    from ddpm_deploy.serve.settings import Settings

    body = parse(b'{"count": 5, "seed": 5, "share_until": 11}', SamplesBody)
    request = to_request(body, SPEC, Settings())
    with Batcher(model(3)) as batcher:
        images = batcher.submit(request).result()
        with pytest.raises(SettingError, match="depth is where given images begin"):
            batcher.submit(Request(depth=5)).result()
    np.testing.assert_array_equal(images, Sampler(model()).sample(5, seed=5, share_until=11))


def test_a_request_says_it_and_most_do_not() -> None:
    assert "share_until" not in make_request(SPEC, 1, seed=0).to_builtins()
    request = make_request(SPEC, 2, seed=0, share_until=0, depth=7)
    fields = json.loads(json.dumps(request.to_builtins()))
    assert (fields["share_until"], fields["depth"]) == (0, 7)
    assert Request.from_builtins(fields, "x") == request
    for name, value, says in (
        ("share_until", -1, "share_until must be from 0 to 30, not -1"),
        ("share_until", 31, "share_until must be from 0 to 30, not 31"),
        ("share_until", 2.5, "share_until must be a whole number"),
        ("depth", 0, "depth must be from 1 to 30, not 0"),
        ("depth", 31, "depth must be from 1 to 30, not 31"),
    ):
        with pytest.raises(SettingError, match=says):
            make_request(SPEC, 1, **{name: value})  # type: ignore[misc]


# --- chains that begin at given images ----------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_chain_that_begins_later_goes_on_as_the_whole_one(
    place: Callable[[ArrayNetwork], Any], solver: Solver
) -> None:
    sampler = Sampler(place(model()))
    seen = [x for _, x, _ in sampler.stream(3, seed=5, solver=solver)]
    begun = sampler.sample(3, seed=5, solver=solver, start=seen[19], depth=10)
    np.testing.assert_array_equal(begun, seen[-1])
    np.testing.assert_array_equal(
        sampler.sample(7, seed=5, solver=solver, start=np.concatenate([seen[19]] * 3)[:7], depth=10)[0],
        begun[0],
    )


def test_a_chain_that_began_later_is_resumed(tmp_path: Path) -> None:
    sampler, kept = Sampler(model()), list[Snapshot]()

    def keep(step: int, x: Array, x0: Array) -> None:
        if step == 4:
            kept.append(sampler.snapshot())

    images = sampler.sample(2, seed=5, start=two_images(), depth=10, callback=keep)
    kept[0].save(tmp_path / "x.npz")
    np.testing.assert_array_equal(Sampler(model()).resume(Snapshot.load(tmp_path / "x.npz")), images)


@pytest.mark.parametrize("solver", [dpmpp_2m, sde_dpmpp_2m])
def test_a_multistep_chain_begins_with_a_step_of_first_order(solver: Callable[..., StepTable]) -> None:
    timesteps = spaced("linspace", LINEAR, 20)
    cut, own = solver(LINEAR, timesteps).below(600), solver(LINEAR, timesteps[timesteps < 600])
    np.testing.assert_allclose(cut.rows, own.rows, rtol=1e-12, atol=1e-15)
    assert cut["f"][0] == 0
    assert cut["f"][1] != 0
    with pytest.raises(SettingError, match="no timestep under a depth of 5: its last is 10"):
        solver(LINEAR, [900, 10]).below(5)


def test_guided_images_begin_where_they_are_given() -> None:
    sampler = Sampler(Labelled())
    keywords: dict[str, Any] = {"seed": 5, "labels": [0, 2], "guidance": [2.0, 3.0]}
    seen = [x for _, x, _ in sampler.stream(2, **keywords)]
    np.testing.assert_array_equal(sampler.sample(2, start=seen[11], depth=8, **keywords), seen[-1])


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"depth": 5}, "depth is where given images begin"),
        (
            {"depth": 5, "table": every_column_table(0, 3), "start": two_images()},
            "timesteps and depth: leave",
        ),
        ({"start": two_images()[:1]}, r"of the shape \(2, 3, 4, 5\), and this has \(1, 3, 4, 5\)"),
        ({"start": two_images() * np.nan}, "must be finite numbers"),
        ({"start": [["x"]]}, "start is no array of numbers"),
        ({"start": two_images(), "noise": lambda draw: two_images()}, "leave noise out"),
        ({"share_until": 3, "noise": lambda draw: two_images()}, "leave share_until out"),
        ({"depth": 1, "timesteps": [20, 10], "start": two_images()}, "no timestep under a depth of 1"),
    ],
)
def test_what_cannot_begin_is_refused(keywords: dict[str, Any], says: str) -> None:
    sampler = Sampler(model())
    with pytest.raises(SettingError, match=says):
        sampler.sample(2, **keywords)
    sampler.sample(1, steps=1)  # and nothing of it stays behind


def test_rows_that_rise_add_no_noise() -> None:
    rising = StepTable(every_column_table(0, 5).rows[::-1])
    with pytest.raises(SettingError, match="must fall"):
        Sampler(model()).sample(1, table=rising)
    long = StepTable.from_columns(t=np.zeros(31), d=1.0, lo=-1.0, hi=1.0)
    with pytest.raises(SettingError, match="31 steps is longer than any chain"):
        Sampler(model()).sample(1, table=long)


# --- DDIM inversion -----------------------------------------------------------------------------------------


def gaussian(mean: float, std: float, clip: bool = False) -> Sampler:
    spec = msgspec.structs.replace(tiny_spec((1, 4, 4), network=None), clip=clip)
    return Sampler(GaussianNetwork(spec, 4, mean, std))


def inverted(sampler: Sampler, x0: Array, steps: int, depth: int = 1000) -> Array:
    settings = ChainSettings(solver="ddim", steps=steps, spacing="linspace")
    return sampler.sample(len(x0), table=sampler.spec.inversion_table(settings, depth), start=x0)


def test_on_gaussian_data_it_is_the_recursion_and_nears_the_flow() -> None:
    """x_t/√ᾱ moves by ε(x, t') dσ, σ = √(1/ᾱ - 1); in the limit (x_t - √ᾱ m)/std_t = (x_0 - m)/s."""
    mean, std, depth = 0.2, 0.4, 600
    sampler, x0 = gaussian(mean, std), two_images(1, (1, 4, 4))
    errors = []
    for steps in (50, 100, 200):
        found = inverted(sampler, x0, steps, depth)
        timesteps = spaced("linspace", LINEAR, steps)
        scaled, sigma = x0.astype(np.float64), 0.0
        for t in timesteps[timesteps < depth][::-1]:
            ac, before = LINEAR.alphas_cumprod[t], 1 / math.sqrt(1 + sigma**2)
            x = scaled * before
            epsilon = math.sqrt(1 - ac) * (x - math.sqrt(ac) * mean) / (ac * std**2 + 1 - ac)
            scaled = scaled + (math.sqrt(1 / ac - 1) - sigma) * epsilon
            sigma = math.sqrt(1 / ac - 1)
        np.testing.assert_allclose(
            found, scaled / math.sqrt(1 + sigma**2), atol=TOLERANCES["inversion_gaussian"].limit
        )
        ac = LINEAR.alphas_cumprod[timesteps[timesteps < depth][0]]
        flow = math.sqrt(ac) * mean + math.sqrt(ac * std**2 + 1 - ac) * (x0 - mean) / std
        errors.append(float(np.abs(found - flow).max()))
    slopes = -np.diff(np.log2(errors))
    assert ((slopes > 0.8) & (slopes < 1.25)).all(), (errors, slopes)  # of first order
    assert errors[-1] < 0.05


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "mean"])
@pytest.mark.parametrize(("stride", "to_first"), [(None, False), (None, True), (50, False)])
def test_where_the_noise_is_the_same_it_undoes_ddim(
    prediction: Prediction, stride: int | None, to_first: bool
) -> None:
    """In float64, row by row, of a network that says one ε whatever x is."""
    timesteps = spaced("trailing", LINEAR, 20)
    told: dict[str, Any] = {"prediction": prediction, "clip": None, "stride": stride, "to_first": to_first}
    epsilon, x0 = two_images(2).astype(np.float64)

    def run(table: StepTable, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        for row in table.rows:
            r = dict(zip(("t", "a", "b", "lo", "hi", "c", "d", "e", "f", "g"), row, strict=False))
            t = np.array([int(r["t"])])
            ac = float(LINEAR.alphas_cumprod[t][0])
            p, q = (float(each[0]) for each in prediction_coefficients(prediction, LINEAR, t))
            out = p * (x - math.sqrt(1 - ac) * epsilon) / math.sqrt(ac) + q * epsilon
            x = r["c"] * (r["a"] * x + r["b"] * out) + r["d"] * x + r["g"] * out
        return x

    up, down = ddim_inversion(LINEAR, timesteps, **told), ddim(LINEAR, timesteps, **told)
    assert up.timesteps.tolist() == timesteps[::-1].tolist()
    latent = run(up, x0)
    assert np.abs(latent - x0).max() > 0.1
    np.testing.assert_allclose(run(down, latent), x0, atol=TOLERANCES["inversion_undone"].limit)


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("leading", 7), ("trailing", 20)])
def test_it_is_the_inverse_scheduler_of_diffusers(spacing: str, steps: int) -> None:
    """Of a network that predicts ε; both ask it at the timestep that a step goes to."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers import DDIMInverseScheduler

    peer = DDIMInverseScheduler(trained_betas=LINEAR.betas, timestep_spacing=spacing, clip_sample=False)
    peer.set_timesteps(steps)
    spec = msgspec.structs.replace(
        tiny_spec((3, 4, 5), network=None), clip=False, sampling=Sampling(fixed_stride=True)
    )
    network, x0 = ArrayNetwork(spec, 2), two_images(3)
    theirs = torch.from_numpy(x0)
    for t in peer.timesteps:
        out = network.answer(theirs.numpy(), np.array([int(t)] * 2))
        theirs = peer.step(torch.from_numpy(out), int(t), theirs).prev_sample
    settings = ChainSettings(solver="ddim", steps=steps, spacing=spacing)  # type: ignore[arg-type]
    ours = Sampler(network).sample(2, table=spec.inversion_table(settings), start=x0)
    assert np.abs(ours - theirs.numpy()).max() <= TOLERANCES["diffusers_inversion"].limit * np.abs(ours).max()


def test_it_comes_back_the_nearer_the_more_steps_there_are(onnx_path: Path) -> None:
    x0 = two_images(4, (1, 8, 8)) * np.float32(0.9)
    with Sampler.load(onnx_path) as sampler:
        errors = [
            max(interpolate(sampler, *x0, count=2, encoder="ddim", depth=400, steps=steps, seed=0).errors)
            for steps in (20, 80, 320)
        ]
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2], errors


# --- strips -------------------------------------------------------------------------------------------------


def test_forward_noise_has_the_moments_of_q_and_is_the_same_for_both() -> None:
    sampler, ends = Sampler(model()), two_images()
    request = strip_request(make_request(SPEC, 2, depth=20, seed=0, share_until=0), SPEC, "noise")
    latents = encoded(sampler, ends, request, "noise")
    np.testing.assert_array_equal(latents.noise[0], latents.noise[1])
    np.testing.assert_array_equal(latents.noise[0], forward_noise(0, np.zeros(1, np.int64), 19, (3, 4, 5))[0])
    x = np.stack(
        [
            encoded(sampler, ends, msgspec.structs.replace(request, seed=seed), "noise").blended(np.zeros(1))[
                0
            ]
            for seed in range(400)
        ]
    )
    ac = SCHEDULE.alphas_cumprod[19]
    standard = (x - math.sqrt(ac) * ends[0]) / math.sqrt(1 - ac)
    assert abs(standard.mean()) < 4 / math.sqrt(standard.size)
    assert abs(standard.var() - 1) < 4 * math.sqrt(2 / standard.size)


@pytest.mark.parametrize("encoder", ["noise", "ddim"])
def test_the_ends_of_a_strip_are_the_chains_of_the_images_themselves(
    place: Callable[[ArrayNetwork], Any], encoder: Encoder
) -> None:
    sampler, ends = Sampler(place(model())), two_images()
    strip = interpolate(sampler, *ends, count=5, depth=20, encoder=encoder, solver="ddpm", seed=3)
    assert (strip.images.shape, strip.weights.tolist()) == ((5, 3, 4, 5), [0, 0.25, 0.5, 0.75, 1])
    t, ac = 19, float(SCHEDULE.alphas_cumprod[19])
    for image, x0 in zip(strip.images[[0, -1]], ends, strict=True):
        if encoder == "noise":
            noise = forward_noise(3, np.zeros(1, np.int64), t, SPEC.image_shape)
            x = (math.sqrt(ac) * x0.astype(np.float64) + math.sqrt(1 - ac) * noise.astype(np.float64)).astype(
                np.float32
            )
        else:
            table = SPEC.inversion_table(ChainSettings(solver="ddpm"), depth=20)
            x = sampler.sample(1, table=table, start=x0[None])
        own = sampler.sample(1, start=x, depth=20, seed=3, share_until=0, solver="ddpm")
        np.testing.assert_array_equal(image, own[0])
    other = interpolate(sampler, *ends, count=3, depth=20, encoder=encoder, solver="ddpm", seed=3)
    np.testing.assert_array_equal(other.images, strip.images[::2])  # the same noise for every λ
    own_noise = interpolate(
        sampler, *ends, count=5, depth=20, encoder=encoder, solver="ddpm", seed=3, share_until=30
    )
    np.testing.assert_array_equal(own_noise.images[0], strip.images[0])
    assert np.abs(own_noise.images[1:] - strip.images[1:]).max(axis=(1, 2, 3)).min() > 1e-3


def test_images_are_blended_on_a_line_and_noise_on_an_arc() -> None:
    ends = np.zeros((2, 1, 1, 2), np.float32)
    ends[0, ..., 0], ends[1, ..., 0] = -1, 1
    noise = np.zeros((2, 1, 1, 2))
    noise[0, ..., 0], noise[1, ..., 1] = 2, 2
    x = Latents(ends, noise, 0.36).blended(np.array([0, 1 / 3, 0.5, 1]))
    arc = 2 * np.array([[1, 0], [math.sqrt(0.75), 0.5], [math.sqrt(0.5)] * 2, [0, 1]])
    line = np.array([[-1, 0], [-1 / 3, 0], [0, 0], [1, 0]])
    np.testing.assert_allclose(x[:, 0, 0], 0.6 * line + 0.8 * arc, atol=1e-6)
    for same in (
        np.repeat(noise[:1], 2, axis=0),
        np.zeros_like(noise),
        noise[[0, 0]] * np.array([1, -1]).reshape(2, 1, 1, 1),
    ):
        x = Latents(ends, same, 0.36).blended(np.array([0.25]))
        wanted = 0.6 * (0.75 * ends[0] + 0.25 * ends[1]) + 0.8 * (0.75 * same[0] + 0.25 * same[1])
        np.testing.assert_allclose(x[0], wanted, atol=1e-6)


def test_how_far_the_ends_are_is_in_steps_of_8_bits() -> None:
    spec = msgspec.structs.replace(SPEC, value_range=(0.0, 1.0))
    ends = two_images()
    first, last = end_errors(ends + np.array([1 / 255, -0.5], np.float32).reshape(2, 1, 1, 1), ends, spec)
    assert (first, last) == (pytest.approx(1, rel=1e-4), pytest.approx(127.5, rel=1e-4))


def test_labels_and_guidance_of_a_strip() -> None:
    """The null class where none is named; both ends are inverted by the label that their image is decoded by."""
    sampler, ends = Sampler(Labelled()), two_images(0, (1, 4, 4))
    request = strip_request(Request(count=4), sampler.spec, "ddim")
    assert (request.labels, request.depth, request.share_until, request.solver) == ((3,), 10, 0, "ddim")
    assert strip_request(Request(count=4), sampler.spec, "noise").solver == "ddpm"
    strip = interpolate(sampler, *ends, count=4, encoder="ddim", labels=[0, 1, 1, 2], guidance=1.5, seed=0)
    for at, label in ((0, 0), (3, 2)):
        twice = interpolate(
            sampler, *ends[[at // 3] * 2], count=2, encoder="ddim", labels=label, guidance=1.5, seed=0
        )
        np.testing.assert_array_equal(strip.images[at], twice.images[0])
    network = Labelled()
    network.spec = msgspec.structs.replace(network.spec, null_class=False)
    bare = Sampler(network)
    with pytest.raises(SettingError, match="say of which the images are to be"):
        interpolate(bare, *ends)
    interpolate(bare, *ends, labels=1)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"count": 1}, "count must be 2 or more, not 1"),
        ({"encoder": "vae"}, "encoder 'vae' is not known: choose from noise, ddim"),
        ({"table": every_column_table(0, 3)}, "leave table out"),
        ({"depth": 31}, "depth must be from 1 to 30"),
        ({"depth": "deep"}, "depth must be a whole number"),
    ],
)
def test_what_makes_no_strip_is_refused(keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        interpolate(Sampler(model()), *two_images(), **keywords)
    with pytest.raises(SettingError, match="finite numbers of the shape"):
        interpolate(Sampler(model()), two_images()[0], np.zeros((1, 4, 5)))
    for value, told in (
        (np.nan, "finite numbers, and one has others"),
        (255, "from 0 to 255, and the model's"),
    ):
        image = np.zeros(SPEC.image_shape)
        image.flat[0] = value
        with pytest.raises(SettingError, match=told):
            interpolate(Sampler(model()), two_images()[0], image)
    with pytest.raises(SettingError, match="no array of numbers"):
        interpolate(Sampler(model()), "a.png", two_images()[0])  # type: ignore[arg-type]


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two grey images of the tiny model's size."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, pixels in zip(paths, np.random.default_rng(0).integers(0, 256, (2, 8, 8)), strict=True):
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


def test_a_strip_shows_the_originals_at_its_ends(
    onnx_path: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    out, arguments = tmp_path / "strip.png", ["--steps", 20, "--seed", 3, "--count", 4]
    result = call("run", onnx_path, "--between", *pictures, "--depth", 300, *arguments, "-o", out)
    assert result.exit_code == 0, result.output
    assert "4 images, 6 steps, seed 3" in result.stdout
    assert "the ends differ from the originals by " in result.stdout
    pixels = read_pixels(out)
    blank = np.zeros((6, 8, 8, 1), np.uint8)
    assert pixels.shape == grid(blank, columns=6).shape
    tile = pixels[2:66:8, 2:66:8, 0]
    np.testing.assert_array_equal(tile, np.asarray(Image.open(pictures[0])))
    origin = read_origin(out)
    assert origin.between is not None
    assert [each["name"] for each in origin.between["between"]] == ["a.png", "b.png"]
    assert (origin.request.depth, origin.request.seed, origin.request.share_until) == (300, 3, 0)
    refused(call("replay", onnx_path, out), 1, "strip.png is a strip between two images")


def test_a_strip_of_inversion_as_numbers(
    onnx_path: Path, tmp_path: Path, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    out, film = tmp_path / "strip.npz", tmp_path / "film.png"
    arguments = ["--encoder", "ddim", "--steps", 50, "--seed", 3, "--count", 2, "--float", "--progress", film]
    with caplog.at_level("INFO", "ddpm_deploy"):
        result = call("run", onnx_path, "--between", *pictures, *arguments, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["encoder"], told["solver"], told["depth"], told["count"]) == ("ddim", "ddim", 500, 2)
    assert "2 images · 25 steps of inversion" in caplog.text
    assert film.exists()
    with Sampler.load(onnx_path) as sampler:
        ends = [read_end(path, sampler.spec) for path in pictures]
        strip = interpolate(sampler, *ends, count=2, encoder="ddim", steps=50, seed=3)
    np.testing.assert_array_equal(np.load(out)["samples"], strip.images)
    assert told["end_errors"] == pytest.approx(list(strip.errors), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--depth", 5], 2, "--depth goes with --between"),
        (["--encoder", "ddim"], 2, "--encoder goes with --between"),
        (["--between", "A", "B", "--shards"], 2, "--shards is not for --between"),
        (["--between", "A", "B", "--snapshot", "x.npz"], 2, "--snapshot is not for --between"),
        (["--between", "A", "B", "--first-index", 2], 2, "--first-index is not for --between"),
        (["--between", "A", "B", "--label", 1, "--label", 2], 2, "one --label"),
        (["-o", "x.png", "--between", "A"], 2, "requires 2 arguments"),
        (["--between", "A", "B", "--label", 1], 1, "unconditional"),
        (["--between", "A", "B", "--depth", 2000], 1, "depth must be from 1 to 1000"),
        (["--between", "A", "B", "--count", 1], 1, "count must be 2 or more"),
        (["--between", "A", "B", "-o", "folder"], 1, "a strip goes to a .png or an .npz"),
        (["--between", "A", "B", "-o", "A"], 1, "a.png is another file of this command"),
        (["--between", "A", "B", "--progress", "A"], 1, "a.png is another file of this command"),
        (["--between", "A", "none.png"], 1, "none.png does not exist"),
        (["--between", "A", "M"], 1, "it is not an image of a kind that is read"),
        (["--between", "A", "B", "--share-until", 1001], 1, "share_until must be from 0 to 1000"),
    ],
)
def test_odd_command_lines_are_refused(
    onnx_path: Path, tmp_path: Path, pictures: list[Path], arguments: list[Any], code: int, says: str
) -> None:
    named = {"A": pictures[0], "B": pictures[1], "M": onnx_path}
    typed = [named.get(each, each) for each in arguments]
    output = [] if "-o" in arguments else ["-o", tmp_path / "out.png"]
    refused(call("run", onnx_path, "--steps", 2, *typed, *output), code, says)
    assert not (tmp_path / "out.png").exists()


def test_images_of_any_kind_become_what_the_model_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, path = tiny_spec((3, 8, 8), network=None), tmp_path / "x.png"
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(path)
    with caplog.at_level("INFO", "ddpm_deploy"):
        assert (read_end(path, spec) == 1).all()  # laid on white
    assert "x.png is 10×20 and was scaled and cropped to 8×8" in caplog.text
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(path)
    assert (read_end(path, spec) == 1).all()
    deep = msgspec.structs.replace(spec, data_range=(0.0, 4095.0), value_range=(0.0, 1.0))
    with pytest.raises(
        DataError, match="from 65535 to 65535, and the images of this model are from 0 to 4095"
    ):
        read_end(path, deep)
    Image.fromarray(np.full((8, 8), 819, np.uint16)).save(path)
    grey = msgspec.structs.replace(deep, image_shape=(1, 8, 8))
    np.testing.assert_allclose(read_end(path, grey), 0.2, atol=1e-6)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif holds floats, and the model is of 8-bit images"):
        read_end(tmp_path / "x.tif", spec)
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(DataError, match="x.png cannot be read"):
        read_end(path, spec)
    with pytest.raises(SettingError, match="2 channels, which no image file has"):
        read_end(path, msgspec.structs.replace(spec, image_shape=(2, 8, 8)))


def test_images_that_share_their_first_steps(onnx_path: Path, tmp_path: Path) -> None:
    shards, arguments = tmp_path / "shards", ["--steps", 20, "--seed", 3, "--count", 5, "--share-until", 400]
    result = call("run", onnx_path, *arguments, "--shards", "--shard-size", 2, "-o", shards)
    assert result.exit_code == 0, result.output
    made = np.concatenate([np.load(path)["arr_0"] for path in sorted(shards.glob("*.npz"))])
    folder = tmp_path / "folder"
    assert call("run", onnx_path, *arguments, "-o", folder).exit_code == 0
    for i, path in enumerate(sorted(folder.iterdir())):
        np.testing.assert_array_equal(read_pixels(path), made[i])
        assert read_origin(path).request.share_until == 400
    assert call("replay", onnx_path, path).exit_code == 0
    refused(call("run", onnx_path, *arguments[:-1], 500, "-o", folder), 1, "share_until 400, not 500")
    result = call("run", onnx_path, *arguments[:-1], 0, "-o", tmp_path / "x.npz")
    assert "this chain adds no noise after --share-until 0" in result.stderr
    assert len({image.tobytes() for image in np.load(tmp_path / "x.npz")["arr_0"]}) == 1
