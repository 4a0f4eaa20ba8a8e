"""The network and training: sizes, exactness of resuming, and what is refused."""

import logging
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from PIL import Image

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, BackendError, OutputError, SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import SCHEDULES
from ddpm_deploy.solvers import denoised_coefficients
from ddpm_deploy.spec import ModelSpec, UNetConfig
from ddpm_deploy.words import Prediction, Variance
from tests.golden import improved_diffusion
from tests.models import TINY_UNET, tiny_spec
from tests.tolerances import TOLERANCES

torch = pytest.importorskip("torch")

from ddpm_deploy.train import ema  # noqa: E402
from ddpm_deploy.train.checkpoint import Checkpoint, digest, load_network, new_network  # noqa: E402
from ddpm_deploy.train.data import find_images, read_images  # noqa: E402
from ddpm_deploy.train.diffusion import Diffusion  # noqa: E402
from ddpm_deploy.train.network import TorchNetwork  # noqa: E402
from ddpm_deploy.train.noise import AddressedRandn  # noqa: E402
from ddpm_deploy.train.settings import PRESETS, Settings  # noqa: E402
from ddpm_deploy.train.trainer import Trainer, learning_rate  # noqa: E402
from ddpm_deploy.train.unet import UNet  # noqa: E402
from ddpm_deploy.words import Loss  # noqa: E402

# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "size", "millions"), [("cifar10", 32, 35.7), ("256", 256, 114)])
def test_networks_have_the_papers_sizes(preset: str, size: int, millions: float) -> None:
    """35.7 and 114 million (Ho et al. 2020, appendix B)."""
    with torch.device("meta"):
        network = new_network(PRESETS[preset].spec("x", 3, (size, size)))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"padding": "symmetric", "scale_shift": True, "norm_eps": 1e-5},
        {"head_channels": 4},
        {"attention_levels": (), "blocks": 2},
        {"widths": (8,)},
        {"channels": 4, "widths": (12, 8), "time_width": 20},
    ],
)
def test_network_variants(change: dict[str, object]) -> None:
    """Shapes hold for every variant, in images that are not square, and rows do not mix."""
    network = randomised(UNet(msgspec.structs.replace(TINY_UNET, **change), 3, 8, 3)).eval()
    x, temb = torch.randn(3, 3, 8, 12), torch.randn(3, 8)
    out = network(x, temb)
    assert out.shape == x.shape
    torch.testing.assert_close(out[1:2], network(x[1:2], temb[1:2]), rtol=1e-4, atol=1e-5)
    assert (network(x, temb + 1) - out).abs().max() > 1e-3


def randomised(network: UNet) -> UNet:
    """Weights without the zeros of initialisation, under which half of the network would not count."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


TWIN_CONFIG = UNetConfig(
    channels=32, widths=(32, 64), time_width=128, blocks=1, attention_levels=(1,), groups=8, dropout=0.0
)


PEER_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}


@pytest.fixture(scope="session")
def twins() -> tuple[UNet, Any]:
    """Our network, and diffusers' UNet2DModel with the same weights."""
    from diffusers import UNet2DModel

    mine = randomised(UNet(TWIN_CONFIG, 3, 32, 3)).eval()
    peer = UNet2DModel(**PEER_CONFIG).eval()
    peer.load_state_dict(as_diffusers(mine))
    return mine, peer


def test_network_is_that_of_diffusers(twins: tuple[UNet, Any]) -> None:
    """The same weights give the same prediction: attention, skips and all."""
    mine, peer = twins
    x = torch.randn(2, 3, 16, 16)
    temb = torch.from_numpy(SinusoidalEmbedding(dim=32).table(1000)[[3, 700]])
    with torch.no_grad():
        wanted = peer(x, torch.tensor([3, 700])).sample
        error = ((mine(x, temb) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= TOLERANCES["diffusers_network"].limit


def test_conditional_network_is_that_of_diffusers() -> None:
    from diffusers import UNet2DModel

    mine = randomised(UNet(TWIN_CONFIG, 3, 32, 3, num_labels=5)).eval()
    peer = UNet2DModel(**PEER_CONFIG, num_class_embeds=5).eval()
    peer.load_state_dict(
        as_diffusers(mine) | {"class_embedding.weight": mine.state_dict()["label_embedding.weight"]}
    )
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([4, 0])
    temb = torch.from_numpy(SinusoidalEmbedding(dim=32).table(1000)[[3, 700]])
    with torch.no_grad():
        wanted = peer(x, torch.tensor([3, 700]), class_labels=y).sample
        error = ((mine(x, temb, y) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= TOLERANCES["diffusers_network"].limit


def test_a_peers_own_pipeline_runs_on_our_noise(twins: tuple[UNet, Any]) -> None:
    """diffusers' pipeline, called as its users do, and our chain, by seed alone: the same images."""
    from diffusers import DDPMPipeline, DDPMScheduler

    mine, peer = twins
    scheduler = DDPMScheduler(variance_type="fixed_large")
    pipeline = DDPMPipeline(unet=peer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(100)
    with AddressedRandn(scheduler.timesteps, seed=11, first_index=5):
        theirs = pipeline(batch_size=2, num_inference_steps=100, output_type="np").images
    spec = msgspec.structs.replace(
        tiny_spec((3, 16, 16), network=TWIN_CONFIG), embedding=SinusoidalEmbedding(dim=32)
    )
    ours = Sampler(TorchNetwork(mine, spec)).sample(2, steps=100, seed=11, first_index=5)
    error = np.abs(ours.transpose(0, 2, 3, 1) / 2 + 0.5 - theirs).max()
    assert error <= TOLERANCES["diffusers_pipeline"].limit


def as_diffusers(network: UNet) -> dict[str, "torch.Tensor"]:
    """The weights of the network of the test above under diffusers' names."""
    mine = network.state_dict()
    stages = {
        "down.0": "down_blocks.0.resnets.0",
        "down.2": "down_blocks.1.resnets.0",
        "middle.0": "mid_block.resnets.0",
        "middle.1": "mid_block.resnets.1",
        "up.0": "up_blocks.0.resnets.0",
        "up.1": "up_blocks.0.resnets.1",
        "up.3": "up_blocks.1.resnets.0",
        "up.4": "up_blocks.1.resnets.1",
    }
    attentions = {
        "down.2": "down_blocks.1.attentions.0",
        "middle.0": "mid_block.attentions.0",
        "up.0": "up_blocks.0.attentions.0",
        "up.1": "up_blocks.0.attentions.1",
    }
    whole = {
        "temb1": "time_embedding.linear_1",
        "temb2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "down.1.conv": "down_blocks.0.downsamplers.0.conv",
        "up.2.conv": "up_blocks.0.upsamplers.0.conv",
    }
    result = {}
    projections = dict.fromkeys(("weight", "bias"))
    for kind in projections:
        parts = iter(mine[f"temb_projections.{kind}"].split(network.temb_splits))
        for here, there in whole.items():
            result[f"{there}.{kind}"] = mine[f"{here}.{kind}"]
        for here, there in stages.items():
            for layer in ("norm1", "conv1", "norm2", "conv2"):
                result[f"{there}.{layer}.{kind}"] = mine[f"{here}.block.{layer}.{kind}"]
            if f"{here}.block.shortcut.{kind}" in mine:
                result[f"{there}.conv_shortcut.{kind}"] = mine[f"{here}.block.shortcut.{kind}"]
            result[f"{there}.time_emb_proj.{kind}"] = next(parts)
        for here, there in attentions.items():
            result[f"{there}.group_norm.{kind}"] = mine[f"{here}.attention.norm.{kind}"]
            qkv = (
                mine[f"{here}.attention.qkv.{kind}"].flatten(1)
                if kind == "weight"
                else mine[f"{here}.attention.qkv.bias"]
            )
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True):
                result[f"{there}.{name}.{kind}"] = part
            out = mine[f"{here}.attention.out.{kind}"]
            result[f"{there}.to_out.0.{kind}"] = out.flatten(1) if kind == "weight" else out
    return result


# --- diffusion and training ---------------------------------------------------------------------------


def test_q_sample_has_the_forward_moments() -> None:
    diffusion = Diffusion(tiny_spec())
    x0, epsilon = (
        torch.full((2, 1, 64, 64), 0.5),
        torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    x = diffusion.q_sample(x0, torch.tensor([0, 999]), epsilon)
    ac = tiny_spec().make_schedule().alphas_cumprod
    for row, t in zip(x, (0, 999), strict=True):
        assert row.mean().item() == pytest.approx(0.5 * ac[t] ** 0.5, abs=5 * (1 - ac[t]) ** 0.5 / 64)
        assert row.std().item() == pytest.approx((1 - ac[t]) ** 0.5, rel=0.05)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_loss_of_the_right_prediction_is_zero(prediction: Prediction) -> None:
    """What the network is to say is what `denoised_coefficients` takes back to x_0."""
    spec = msgspec.structs.replace(tiny_spec(), prediction=prediction)
    x0, epsilon = torch.rand(2, 3, 1, 8, 8).sub(0.5).double().unbind()
    t = np.array([0, 1, 700])
    a, b = denoised_coefficients(prediction, spec.make_schedule(), t)

    def right(x: "torch.Tensor", temb: "torch.Tensor", y: object) -> "torch.Tensor":
        return (x0 - torch.from_numpy(a)[:, None, None, None] * x) / torch.from_numpy(b)[:, None, None, None]

    loss = Diffusion(spec).loss(right, x0, torch.from_numpy(t), epsilon)
    assert loss.item() < 1e-9


def golden_spec(schedule: str, prediction: Prediction, variance: Variance) -> ModelSpec:
    return msgspec.structs.replace(
        tiny_spec((1, 4, 4)), schedule=SCHEDULES[schedule], prediction=prediction, variance=variance
    )


@pytest.mark.parametrize("case", improved_diffusion.LOSSES, ids=str)
def test_losses_are_those_of_improved_diffusion(case: tuple[str, Prediction, Variance, Loss]) -> None:
    """Except at t = 0 to the rounding of float32; there it takes a tanh for the normal distribution."""
    *of_spec, kind = case
    diffusion = Diffusion(golden_spec(*of_spec), kind)
    x0, epsilon, out = (torch.from_numpy(array).float() for array in improved_diffusion.loss_inputs())
    if "learned_range" in case:
        out = torch.cat([out, improved_diffusion.learned(out)], dim=1)
    mine = [
        diffusion.loss(lambda x, temb, y, i=i: out[i, None], x0[i, None], torch.tensor([t]), epsilon[i, None])
        for i, t in enumerate(improved_diffusion.LOSS_TIMESTEPS)
    ]
    golden = np.load(improved_diffusion.FILE)[f"loss {case}"]
    limit = TOLERANCES["improved_diffusion_loss"].limit
    assert mine[0].item() == pytest.approx(golden[0], rel=TOLERANCES["improved_diffusion_nll"].limit)
    np.testing.assert_allclose(mine[1:], golden[1:], rtol=limit, atol=limit)


def test_the_values_of_a_pixel_share_one_probability() -> None:
    """exp of minus the loss at t = 0, summed over what the pixel could be, is 1, wherever the mean is."""
    diffusion = Diffusion(golden_spec("linear", "x0", "fixed_small"), "vlb")
    values = torch.arange(256)[:, None, None, None] / 127.5 - 1
    for mean in (-1.02, -0.999, 0.1, 1.0):
        nats = [
            diffusion.loss(
                lambda x, temb, y, mean=mean: torch.full_like(x, mean),
                value[None],
                torch.tensor([0]),
                torch.zeros(1, 1, 1, 1),
            )
            * np.log(2)
            for value in values
        ]
        assert torch.exp(-torch.stack(nats).double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_the_bound_in_hybrid_trains_the_variance_alone() -> None:
    spec = golden_spec("cosine", "epsilon", "learned_range")
    gradients = {}
    for loss in ("hybrid", "vlb", "simple"):
        diffusion = Diffusion(
            msgspec.structs.replace(spec, variance="fixed_large") if loss == "simple" else spec, loss
        )
        prediction = torch.full((1, 2, 4, 4), 0.3, requires_grad=True)
        some = prediction if loss != "simple" else prediction[:, :1]
        x0, epsilon = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        diffusion.loss(lambda x, temb, y, some=some: some, x0, torch.tensor([20]), epsilon).backward()
        assert prediction.grad is not None
        gradients[loss] = prediction.grad
    assert torch.equal(gradients["hybrid"][:, :1], gradients["simple"][:, :1])
    torch.testing.assert_close(gradients["hybrid"][:, 1:], gradients["vlb"][:, 1:])  # λ·T = 1
    assert (gradients["hybrid"][:, 1:] != 0).all()


@pytest.mark.parametrize(
    ("loss", "variance", "problem"),
    [
        ("simple", "learned_range", "simple does not train a learned_range variance: choose hybrid or vlb"),
        ("hybrid", "fixed_small", "this one is fixed_small: choose simple or vlb"),
    ],
)
def test_losses_that_do_not_train_the_variance(loss: Loss, variance: Variance, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Diffusion(golden_spec("linear", "epsilon", variance), loss)


def test_learning_rate_warms_up_and_decays() -> None:
    settings = PRESETS["digits"].settings("digits", steps=1000, warmup_steps=100, learning_rate=1e-3)
    rates = [learning_rate(settings, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == pytest.approx(1e-3)
    assert rates == rates[:100] + sorted(rates[100:], reverse=True)
    assert rates[550] == pytest.approx(5e-4, rel=1e-3)
    assert rates[-1] < 1e-8
    level = msgspec.structs.replace(settings, decay="none")
    assert learning_rate(level, 999) == 1e-3


def test_ema_forgets_its_start_and_then_averages() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = ema.averaged(network)
    values = torch.linspace(0, 1, 50)
    wanted = network.weight.item()
    for step, value in enumerate(values):
        network.weight.data.fill_(value)
        ema.update([average.weight], [network.weight], step, 0.9)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value.item()
    assert average.weight.item() == pytest.approx(wanted, rel=1e-5)
    assert not average.weight.requires_grad


def digits_trainer(**settings: object) -> Trainer:
    chosen = PRESETS["digits"].settings("digits", **({"steps": 12, "batch_size": 8, "flip": True} | settings))
    data = read_images(find_images("digits", labels=chosen.labels), (8, 8), 1)
    spec = msgspec.structs.replace(
        tiny_spec(),
        network=msgspec.structs.replace(TINY_UNET, dropout=0.1),
        num_classes=10 if chosen.labels else 0,
        null_class=chosen.label_dropout > 0,
    )
    return Trainer(spec, chosen, data, torch.device("cpu"))


@pytest.mark.parametrize("interrupted", [1, 7, 11])
@pytest.mark.parametrize(
    "settings",
    [{}, {"labels": True, "label_dropout": 0.3}, {"accumulate": 3, "amp": True}],
    ids=["plain", "labels", "amp"],
)
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, interrupted: int, settings: dict[str, Any]
) -> None:
    whole = digits_trainer(**settings)
    for _ in range(12):
        whole.advance()
    first = digits_trainer(**settings)
    for _ in range(interrupted):
        first.advance()
    first.checkpoint().save(tmp_path / "x.pt")
    data = read_images(find_images("digits", labels="labels" in settings), (8, 8), 1)
    second = Trainer.resume(Checkpoint.load(open_model(tmp_path / "x.pt")), data, first.device)
    while second.steps_done < 12:
        second.advance()
    a, b = whole.checkpoint(), second.checkpoint()
    assert digest(a.raw) == digest(b.raw)
    assert digest(a.ema) == digest(b.ema) == a.spec.provenance.digest
    for key, state in a.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b.optimizer["state"][key][name])


@pytest.mark.parametrize(
    ("loss", "prediction", "variance"),
    [("hybrid", "v", "learned_range"), ("vlb", "x0", "fixed_small"), ("simple", "mean", "fixed_large")],
)
def test_every_loss_falls(loss: Loss, prediction: Prediction, variance: Variance) -> None:
    plain = digits_trainer(steps=60, batch_size=32, learning_rate=3e-3, warmup_steps=5)
    spec = msgspec.structs.replace(plain.spec, prediction=prediction, variance=variance)
    data = read_images(find_images("digits"), (8, 8), 1)
    settings = msgspec.structs.replace(plain.settings, loss=loss)
    trainer = Trainer(spec, settings, data, torch.device("cpu"))
    losses = [trainer.advance().item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_training_learns() -> None:
    """The loss of 120 steps falls well below 1, that of predicting zero."""
    trainer = digits_trainer(steps=120, batch_size=32, learning_rate=3e-3, warmup_steps=10)
    losses = [trainer.advance().item() for _ in range(120)]
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert np.mean(losses[-20:]) < 0.5


def weights(trainer: Trainer) -> "torch.Tensor":
    return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])


def test_parts_of_a_batch_add_up_to_it() -> None:
    """The gradient of a batch taken in parts of unequal size is that of the whole."""
    gradients = []
    for accumulate in (1, 3):
        trainer = digits_trainer(accumulate=accumulate)
        trainer.network.eval()  # dropout would draw other masks
        trainer.advance()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_mixed_precision_trains_in_bfloat16() -> None:
    plain, mixed = digits_trainer(), digits_trainer(amp=True)
    seen = set()
    mixed.network.conv_in.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = [[trainer.advance().item() for _ in range(5)] for trainer in (plain, mixed)]
    assert seen == {torch.bfloat16}
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert {parameter.dtype for parameter in mixed.network.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_a_compiled_network_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured as torch.compile captures it; without its C++ compiler, which takes minutes at a tiny network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    data = read_images(find_images("digits"), (8, 8), 1)
    trainers = [
        Trainer(plain.spec, plain.settings, data, torch.device("cpu"), compiled=compiled)
        for plain, compiled in ((digits_trainer(), False), (digits_trainer(), True))
    ]
    for trainer in trainers:
        trainer.network.eval()  # dropout would draw other masks
        trainer.advance()
    torch.testing.assert_close(*map(weights, trainers), rtol=1e-3, atol=1e-5)


def test_label_dropout_shows_images_without_their_label() -> None:
    trainer = digits_trainer(labels=True, label_dropout=0.4, batch_size=64)
    seen: list[torch.Tensor] = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    for _ in range(12):
        trainer.advance()
    labels = torch.cat(seen)
    assert set(labels.tolist()) == set(range(11))
    assert (labels == 10).float().mean().item() == pytest.approx(0.4, abs=0.08)


def test_a_label_stays_with_its_image() -> None:
    """Whatever the order of the epoch, flipping or not."""
    trainer = digits_trainer(labels=True, batch_size=100, flip=False)
    digits = read_images(find_images("digits", labels=True), (8, 8), 1)
    images, labels = trainer._batch(3)
    assert labels is not None
    assert digits.labels is not None
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        pixels = np.rint((image + 1) * 127.5).astype(np.uint8)
        same = (digits.images == pixels).all(axis=(1, 2, 3))
        assert label in digits.labels[same]


def test_every_epoch_shows_every_image_once() -> None:
    trainer = digits_trainer()
    count = len(trainer._images)
    first, second = ([trainer._image_at(epoch * count + i) for i in range(count)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second


def test_a_step_of_another_seed_is_another_step() -> None:
    assert digits_trainer(seed=0).advance() != digits_trainer(seed=1).advance()


# --- checkpoints --------------------------------------------------------------------------------------


def altered(path: Path, out: Path, **changes: object) -> Path:
    content = torch.load(path, weights_only=True)
    for key, value in changes.items():
        content[key] = value
    torch.save(content, out)
    return out


def test_newer_checkpoint_format(tmp_path: Path, checkpoint_path: Path) -> None:
    with pytest.raises(ArtefactError, match="newer ddpm-deploy .checkpoint format 2; this one knows 1"):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "x.pt", format=2)))


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": {}},
        {"ema": None},
        {"ema": {"conv_in.weight": torch.zeros(1)}},
        {"settings": "{}"},
        {"settings": 3},
        {"step": "many"},
        {"format": "one"},
        {"optimizer": {}},
        {"optimizer": None},
    ],
)
def test_checkpoints_that_do_not_fit_themselves(
    tmp_path: Path, checkpoint_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(ArtefactError):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "x.pt", **changes)))


@pytest.mark.parametrize(
    "moment",
    [
        {"exp_avg": torch.zeros(1)},
        {"exp_avg": torch.zeros(1).expand(8, 1, 3, 3)},
        {"exp_avg_sq": torch.zeros(8, 1, 3, 3, dtype=torch.float64)},
        {"step": torch.zeros(0)},
        {"max_exp_avg_sq": torch.zeros(8, 1, 3, 3)},
        {"exp_avg": None},
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    tmp_path: Path, checkpoint_path: Path, moment: dict[str, Any]
) -> None:
    """Its fused kernels would read and write wherever the shapes lead them."""
    optimizer = torch.load(checkpoint_path, weights_only=True)["optimizer"]
    number = next(n for n, state in optimizer["state"].items() if state["exp_avg"].shape == (8, 1, 3, 3))
    optimizer["state"][number] |= moment
    with pytest.raises(ArtefactError, match="does not fit its own ModelSpec"):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "x.pt", optimizer=optimizer)))
    optimizer["state"] = {0: optimizer["state"][number]}
    with pytest.raises(ArtefactError, match="optimizer is not of this network"):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "y.pt", optimizer=optimizer)))


def test_the_settings_of_an_optimizer_are_not_the_files(tmp_path: Path, checkpoint_path: Path) -> None:
    optimizer = torch.load(checkpoint_path, weights_only=True)["optimizer"]
    optimizer["param_groups"][0] |= {"betas": (0.1, 0.2), "amsgrad": True, "eps": 1.0}
    path = altered(checkpoint_path, tmp_path / "x.pt", optimizer=optimizer)
    trainer = Trainer.resume(
        Checkpoint.load(open_model(path)), read_images(find_images("digits"), (8, 8), 1), torch.device("cpu")
    )
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["amsgrad"], group["eps"]) == ((0.9, 0.999), False, 1e-8)


def test_damage_anywhere_in_a_checkpoint_is_told(tmp_path: Path, checkpoint_path: Path) -> None:
    content = bytearray(checkpoint_path.read_bytes())
    for place in np.linspace(5000, len(content) - 20_000, 10).astype(int):
        damaged = content.copy()
        damaged[place] ^= 1
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            loaded = Checkpoint.load(open_model(tmp_path / "x.pt"))
        except ArtefactError:
            continue
        assert digest(loaded.ema) == loaded.spec.provenance.digest  # in the padding between two parts


def test_weights_of_another_type_are_refused(tmp_path: Path, checkpoint_path: Path) -> None:
    state = torch.load(checkpoint_path, weights_only=True)["ema"]
    state["conv_in.weight"] = state["conv_in.weight"].double()
    with pytest.raises(ArtefactError, match=r"conv_in\.weight is not a dense float32"):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "x.pt", ema=state)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, checkpoint_path: Path, value: float) -> None:
    state = torch.load(checkpoint_path, weights_only=True)["ema"]
    state["conv_in.bias"][3] = value
    with pytest.raises(ArtefactError, match=r"not finite in conv_in\.bias"):
        load_network(open_model(altered(checkpoint_path, tmp_path / "x.pt", ema=state)))


def test_weights_that_repeat_a_number_are_refused(tmp_path: Path, checkpoint_path: Path) -> None:
    """They are small in the file, and of any size in memory once they are used."""
    state = torch.load(checkpoint_path, weights_only=True)["ema"]
    state["conv_in.weight"] = torch.zeros(1).expand(state["conv_in.weight"].shape)
    with pytest.raises(ArtefactError, match=r"conv_in\.weight is not a dense float32"):
        Checkpoint.load(open_model(altered(checkpoint_path, tmp_path / "x.pt", ema=state)))


def test_a_loss_that_is_not_finite_saves_nothing(tmp_path: Path) -> None:
    from ddpm_deploy.train.session import Session

    trainer = digits_trainer(steps=10, save_every=3, sample_every=0)
    output = tmp_path / "m.pt"

    def break_after_the_first_save(steps: int, note: str | None) -> None:
        if trainer.steps_done == 4:
            saved.append(output.read_bytes())
            next(trainer.network.parameters()).data.fill_(float("nan"))

    saved: list[bytes] = []
    with pytest.raises(BackendError, match="not finite by step 6"):
        Session(trainer, output, break_after_the_first_save).run()
    assert output.read_bytes() == saved[0]


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path: Path) -> None:
    """The loss was finite, and its gradient was not."""
    from ddpm_deploy.train.session import Session

    trainer = digits_trainer(steps=3, sample_every=0)
    output = tmp_path / "m.pt"

    def break_it(steps: int, note: str | None) -> None:
        if trainer.steps_done == 3:
            next(trainer.network.parameters()).data.fill_(float("inf"))

    with pytest.raises(BackendError, match="the weights are not finite by step 3"):
        Session(trainer, output, break_it).run()
    assert not output.exists()


def test_metrics_that_are_damaged_do_not_stop_training(tmp_path: Path) -> None:
    from ddpm_deploy.train.session import Session

    trainer = digits_trainer(steps=6, sample_every=0)
    trainer.advance()
    (tmp_path / "m.train").mkdir()
    metrics = tmp_path / "m.train" / "metrics.csv"
    metrics.write_bytes(
        "step,loss,learning_rate,images_per_second\n1,0.5,1e-4,9\n²,1,1,1\n\x00".encode() + b"\xff\n12"
    )
    Session(trainer, tmp_path / "m.pt", lambda steps, note: None).run()
    assert [line.split(",")[0] for line in metrics.read_text().splitlines()] == ["step", "1", "6"]


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ddpm_deploy.train.session import Session

    trainer = digits_trainer(steps=6, save_every=3, sample_every=0)
    Session(trainer, tmp_path / "m.pt", lambda steps, note: None).run()
    events = EventAccumulator(str(tmp_path / "m.train"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["images_per_second", "learning_rate", "loss"]
    assert [event.step for event in events.Scalars("loss")] == [3, 6]


def test_pictures_and_metrics_that_cannot_be_written_do_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_deploy.train import pictures
    from ddpm_deploy.train.session import Session

    def full(*arguments: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(pictures, "save_png", full)
    trainer = digits_trainer(steps=3, save_every=3, sample_every=2)
    assert Session(trainer, tmp_path / "m.pt", lambda steps, note: None).run()
    assert Checkpoint.load(open_model(tmp_path / "m.pt")).step == 3


# --- pictures ---------------------------------------------------------------------------------------------


class SlowNetwork:
    """Makes out that a call of the network takes `seconds` for each image, and counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        from ddpm_deploy.runtime import network as networks

        self.now, self.calls = 0.0, 0
        predict = TorchNetwork.predict

        def slow(network: TorchNetwork, batch: int) -> None:
            self.now += seconds * batch
            self.calls += 1
            predict(network, batch)

        monkeypatch.setattr(TorchNetwork, "predict", slow)
        monkeypatch.setattr(networks, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize(
    ("seconds", "images", "said"),
    [
        (0.001, 16, "each picture of samples has 16 images and takes about 1.6 s"),
        (0.046, 13, "has 13 images and takes about 60 s: with 16 it would take 74 s"),
        (0.5, 1, "has 1 image and takes about 50 s: with 16 it would take 800 s"),
        (0.7, 0, "no pictures of samples are drawn: one of a single image would take about 70 s here"),
    ],
)
def test_a_picture_takes_a_minute_at_most_and_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    images: int,
    said: str,
) -> None:
    from ddpm_deploy.train.session import Session

    caplog.set_level(logging.INFO, "ddpm_deploy")
    slow = SlowNetwork(monkeypatch, seconds)
    trainer = digits_trainer(steps=4, sample_every=2)
    told: list[float] = []
    assert Session(trainer, tmp_path / "m.pt", lambda steps, note: told.append(slow.now)).run()
    assert told[0] < 50  # seconds, to find out
    assert said in caplog.text
    assert len([message for message in caplog.messages if "picture" in message]) == 1
    names = [path.name for path in sorted((tmp_path / "m.train").glob("*.png"))]
    assert names == (["samples-000002.png", "samples-000004.png"] if images else [])
    if images:
        side = int(np.ceil(np.sqrt(images)))
        with Image.open(tmp_path / "m.train" / "samples-000004.png") as picture:
            assert picture.size[0] == side * 66 + 2


def test_no_pictures_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_deploy.train.session import Session

    slow = SlowNetwork(monkeypatch)
    assert Session(digits_trainer(steps=2, sample_every=0), tmp_path / "m.pt", lambda *_: None).run()
    assert slow.calls == 0


def test_pictures_do_not_change_the_training(tmp_path: Path) -> None:
    from ddpm_deploy.train.session import Session

    for every in (0, 1):
        output = tmp_path / f"{every}.pt"
        Session(digits_trainer(steps=3, sample_every=every), output, lambda steps, note: None).run()
    first, second = (Checkpoint.load(open_model(tmp_path / f"{every}.pt")) for every in (0, 1))
    assert digest(first.raw) == digest(second.raw)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last", [True, False])
def test_a_stop_during_a_picture_is_heard_within_a_step_of_its_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, last: bool
) -> None:
    """What was trained is saved before a picture is begun where that is due, and in any case before the end."""
    from ddpm_deploy.train.session import Session

    trainer = digits_trainer(steps=3, save_every=50, sample_every=3 if last else 2)
    output, calls, saved = tmp_path / "m.pt", 0, []
    predict = TorchNetwork.predict

    def interrupted(network: TorchNetwork, batch: int) -> None:
        nonlocal calls
        predict(network, batch)
        calls += trainer.steps_done > 0
        if calls == 5:
            saved.append(output.exists())
            signal.raise_signal(number)

    monkeypatch.setattr(TorchNetwork, "predict", interrupted)
    finished = Session(trainer, output, lambda steps, note: None).run()
    assert (finished, saved, calls) == (last, [last], 5)
    assert Checkpoint.load(open_model(output)).step == (3 if last else 2)
    assert not list((tmp_path / "m.train").glob("*.png"))


# --- settings ---------------------------------------------------------------------------------------


def test_image_size_must_fit_the_network() -> None:
    with pytest.raises(
        SettingError, match="30 is not a multiple of 8: choose 24 or 32, or --preset digits, which"
    ):
        PRESETS["cifar10"].spec("x", 3, (32, 30))


def test_settings_survive_their_json() -> None:
    settings = PRESETS["small"].settings("x", seed=2**63 - 1)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings
