"""diffusers: networks and chains of pipelines that it saved itself, against what it computes with them."""

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpm_deploy.errors import ArtefactError, DdpmDeployError, SettingError
from ddpm_deploy.export.graph import trace
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import CosineBetas
from ddpm_deploy.spec import ChainSettings, UNetConfig
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.train.noise import AddressedRandn
from ddpm_deploy.train.unet import UNet
from tests.golden import improved_diffusion
from tests.importing import predict, randomise, relative_rms
from tests.test_solvers import network, run
from tests.tolerances import TOLERANCES

LIMIT = TOLERANCES["imported_prediction"].limit


@pytest.fixture(scope="session")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        # What it imports only when it is asked for warns too.
        _ = diffusers.DDPMPipeline, diffusers.DDIMPipeline, diffusers.UNet2DModel
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


# google/ddpm-cifar10-32 and what train_unconditional.py makes, with fewer channels.
CIFAR10: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
UNCONDITIONAL: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 32, 32, 32, 64, 64),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "layers_per_block": 2,
}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
TINY: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
NETWORKS: dict[str, dict[str, Any]] = {
    "google": CIFAR10,
    "unconditional": UNCONDITIONAL,
    "scale_shift": SMALL | {"resnet_time_scale_shift": "scale_shift"},
    "middle_groups": SMALL | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "groups_of_the_middle_alone": SMALL | {"attn_norm_num_groups": 16, "dropout": 0.1, "act_fn": "swish"},
    "resnet": SMALL | RESNET | {"resnet_time_scale_shift": "scale_shift"},
    "resnet_blocks": SMALL
    | {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
        "upsample_type": "resnet",
    },
    "classes": SMALL | {"num_class_embeds": 5},
    "timestep_classes": SMALL | {"num_class_embeds": 7, "class_embed_type": "timestep"},
    "no_middle_attention": SMALL | {"add_attention": False, "layers_per_block": 3},
    "pair": SMALL | {"sample_size": (8, 16), "in_channels": 1, "out_channels": 1, "time_embedding_dim": 48},
    "wide_heads": SMALL | {"attention_head_dim": 32, "downsample_padding": 0},
    "one_level": TINY,
}


def saved(diffusers: Any, folder: Path, config: dict[str, Any], scheduler: Any = None, **options: Any) -> Any:
    """A pipeline's network, of weights that are not trivial, and its folder."""
    unet = diffusers.UNet2DModel(**config).eval()
    randomise(unet)
    scheduler = scheduler or diffusers.DDPMScheduler()
    pipeline = diffusers.DDIMPipeline if "DDIM" in type(scheduler).__name__ else diffusers.DDPMPipeline
    pipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, **options)
    return unet


def edit(file: Path, change: Callable[[dict[str, Any]], object] | dict[str, Any]) -> None:
    """Change a JSON file; of a dict, None takes a field away."""
    content = json.loads(file.read_text())
    if callable(change):
        change(content)
    else:
        content |= change
        content = {name: value for name, value in content.items() if value != "absent"}
    file.write_text(json.dumps(content))


@torch.no_grad()
def error(imported: Imported, unet: Any) -> float:
    """Of the imported network's predictions, at timesteps of all sizes and every label."""
    channels, height, width = imported.spec.image_shape
    t = torch.tensor([0, 1, 37, 500, 999, 999])
    x = torch.randn(len(t), channels, height, width, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(t)) % imported.spec.num_classes if imported.spec.num_classes else None
    wanted = unet(x, t, class_labels=labels).sample
    return relative_rms(predict(imported, x, t, labels), wanted)


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_predict_the_same(diffusers: Any, tmp_path: Path, kind: str) -> None:
    unet = saved(diffusers, tmp_path, NETWORKS[kind])
    imported = import_checkpoint(tmp_path, {})
    assert isinstance(imported.network, UNet)
    assert error(imported, unet) <= LIMIT
    assert imported.assumed == ()


def test_a_network_that_was_trained(diffusers: Any, tmp_path: Path) -> None:
    """A few real steps on its own initial weights, from which every part has moved."""
    torch.manual_seed(0)
    unet, scheduler = diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler()
    optimizer = torch.optim.Adam(unet.parameters(), 2e-3)
    for _ in range(4):
        x0, noise, t = (
            torch.randn(8, 3, 8, 8).clamp(-1, 1),
            torch.randn(8, 3, 8, 8),
            torch.randint(1000, (8,)),
        )
        loss = F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    diffusers.DDPMPipeline(unet=unet.eval(), scheduler=scheduler).save_pretrained(tmp_path)
    assert error(import_checkpoint(tmp_path, {}), unet) <= LIMIT


# --- layouts --------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The weights as a .bin, changed."""
    from safetensors.torch import load_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = change(load_file(file))
    file.unlink()
    torch.save(state, file.with_suffix(".bin"))
    return file.with_suffix(".bin")


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the projections before diffusers 0.15."""
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in pairs.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    return state


def test_old_names_in_a_flat_folder_with_few_fields(diffusers: Any, tmp_path: Path) -> None:
    """As google/ddpm-* are: everything in one folder, a .bin, and configurations of version 0.0.4."""
    unet = saved(diffusers, tmp_path / "saved", CIFAR10, diffusers.DDPMScheduler(variance_type="fixed_large"))
    file = rewrite(tmp_path / "saved", old_names)
    assert any(name.endswith("proj_attn.weight") for name in torch.load(file))
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "saved" / "unet").iterdir():
        shutil.copy(path, flat)
    shutil.copy(tmp_path / "saved" / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(tmp_path / "saved" / "model_index.json", flat)
    later = ("resnet_time_scale_shift", "class_embed_type", "num_class_embeds", "add_attention", "dropout")
    later += ("downsample_type", "upsample_type", "attn_norm_num_groups", "time_embedding_dim")
    edit(flat / "config.json", dict.fromkeys(later, "absent") | {"_diffusers_version": "0.0.4"})
    later = ("prediction_type", "timestep_spacing", "steps_offset", "thresholding", "clip_sample_range")
    edit(flat / "scheduler_config.json", dict.fromkeys(later, "absent") | {"tensor_format": "pt"})
    for path in (flat, flat / "model_index.json", flat / "config.json", flat / file.name):
        imported = import_checkpoint(path, {})
        assert error(imported, unet) <= LIMIT
        assert imported.spec.variance == "fixed_large"
        assert imported.assumed == ()
    assert open_model(flat / "config.json").kind == "foreign"


def test_absent_heads_are_of_eight_channels_and_null_is_one_head(diffusers: Any, tmp_path: Path) -> None:
    unet = saved(diffusers, tmp_path, SMALL)
    edit(tmp_path / "unet" / "config.json", {"attention_head_dim": "absent"})
    assert error(import_checkpoint(tmp_path, {}), unet) <= LIMIT
    edit(tmp_path / "unet" / "config.json", {"attention_head_dim": None})
    assert error(import_checkpoint(tmp_path, {}), unet) > 100 * LIMIT


def test_half_precision_and_variants(diffusers: Any, tmp_path: Path) -> None:
    """Without a variant first, else that with more bits; --key takes any."""
    unet = saved(diffusers, tmp_path, SMALL)
    folder = tmp_path / "unet"
    whole = error(import_checkpoint(tmp_path, {}), unet)
    half = diffusers.UNet2DModel(**SMALL)
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(folder, variant="fp16")
    torch.save(
        {name: tensor * 2 for name, tensor in unet.state_dict().items()},
        folder / "diffusion_pytorch_model.bin",
    )
    imported = import_checkpoint(tmp_path, {})
    assert error(imported, unet) == whole
    assert any("other weights there: fp16 (--key takes one)" in line for line in imported.recognised)
    named = import_checkpoint(folder / "diffusion_pytorch_model.fp16.safetensors", {})
    chosen = import_checkpoint(tmp_path, {}, "fp16")
    rounded = half.float().eval()
    assert error(named, rounded) == error(chosen, rounded) <= LIMIT < error(chosen, unet)
    (folder / "diffusion_pytorch_model.safetensors").rename(
        folder / "diffusion_pytorch_model.non_ema.safetensors"
    )
    (folder / "diffusion_pytorch_model.bin").unlink()
    assert error(import_checkpoint(tmp_path, {}), unet) == whole
    with pytest.raises(SettingError, match=r"no weights of the variant --key fp32: it has fp16, non_ema"):
        import_checkpoint(tmp_path, {}, "fp32")


def test_the_cache_of_the_hub(diffusers: Any, tmp_path: Path) -> None:
    """models--owner--name: links out of snapshots/REVISION into blobs."""
    unet = saved(diffusers, tmp_path / "saved", SMALL)
    cache = tmp_path / "models--owner--name"
    for name in ("blobs", "refs"):
        (cache / name).mkdir(parents=True)
    for revision in ("0123", "4567"):
        for path in (path for path in (tmp_path / "saved").rglob("*") if path.is_file()):
            link = cache / "snapshots" / revision / path.relative_to(tmp_path / "saved")
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = cache / "blobs" / f"{len(list((cache / 'blobs').iterdir()))}"
            shutil.copy(path, blob)
            link.symlink_to(blob)
    (cache / "refs" / "main").write_text("4567")
    edit(cache / "snapshots" / "0123" / "unet" / "config.json", {"flip_sin_to_cos": False})
    assert open_model(cache).kind == "foreign"
    assert error(import_checkpoint(cache, {}), unet) <= LIMIT
    assert error(import_checkpoint(cache / "snapshots" / "4567", {}), unet) <= LIMIT
    assert error(import_checkpoint(cache / "snapshots" / "0123", {}), unet) > LIMIT
    (cache / "refs" / "main").unlink()
    with pytest.raises(ArtefactError, match="has 2 revisions: name one of its folders"):
        import_checkpoint(cache, {})


def test_the_networks_folder_alone(diffusers: Any, tmp_path: Path) -> None:
    """In its pipeline it has that one's schedule; alone, what is assumed is told."""
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = saved(diffusers, tmp_path / "pipeline", SMALL, scheduler)
    inside = import_checkpoint(tmp_path / "pipeline" / "unet", {})
    assert (inside.spec.prediction, inside.spec.sampling.solver, inside.spec.sampling.steps) == (
        "v",
        "ddim",
        50,
    )
    shutil.copytree(tmp_path / "pipeline" / "unet", tmp_path / "unet")
    alone = import_checkpoint(tmp_path / "unet", {"prediction_type": "v_prediction", "beta_end": "0.01"})
    assert error(alone, unet) <= LIMIT
    assert alone.spec.prediction == "v"
    assert msgspec.to_builtins(alone.spec.schedule) == {
        "kind": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.01,
    }
    told = [assumption.flag for assumption in alone.assumed]
    assert told == ["num_train_timesteps", "beta_schedule", "clip_sample", "variance_type"]


def test_a_subclass_is_taken_by_its_fields(diffusers: Any, tmp_path: Path) -> None:
    unet = saved(diffusers, tmp_path, SMALL)
    edit(tmp_path / "unet" / "config.json", {"_class_name": "MyUNet2DModel", "my_field": 3})
    imported = import_checkpoint(tmp_path, {})
    assert error(imported, unet) <= LIMIT
    assert any(
        "MyUNet2DModel is taken for a UNet2DModel by its fields" in line for line in imported.recognised
    )
    assert any("not known, and ignored: my_field" in line for line in imported.recognised)


def test_size_that_is_only_told(diffusers: Any, tmp_path: Path) -> None:
    unet = saved(diffusers, tmp_path, SMALL | {"sample_size": None})
    with pytest.raises(SettingError, match="--image_size is needed"):
        import_checkpoint(tmp_path, {})
    imported = import_checkpoint(tmp_path, {"image_size": "16x8"})
    assert imported.spec.image_shape == (3, 16, 8)
    assert error(imported, unet) <= LIMIT


def test_classes_that_only_a_flag_counts(diffusers: Any, tmp_path: Path) -> None:
    unet = saved(diffusers, tmp_path, SMALL | {"class_embed_type": "timestep"})
    with pytest.raises(SettingError, match="--num_class_embeds is needed"):
        import_checkpoint(tmp_path, {})
    assert error(import_checkpoint(tmp_path, {"num_class_embeds": 4}), unet) <= LIMIT


# --- chains ---------------------------------------------------------------------------------------

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = ("leading", "trailing", "linspace")


@pytest.fixture(scope="session")
def folders(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pipelines of which only the schedulers count, by the channels of what the network gives."""
    result = {}
    for channels in (1, 2):
        result[channels] = tmp_path_factory.mktemp(f"tiny{channels}")
        saved(diffusers, result[channels], TINY | {"out_channels": channels})
    return result


def chains_differ(imported: Imported, scheduler: Any, settings: ChainSettings, **step: Any) -> float:
    """The largest difference of its own loop to ours on shared noise, of the optimal network of known data."""
    spec = imported.spec
    table, schedule = spec.step_table(settings), spec.make_schedule()
    rng = np.random.default_rng(0)
    start = theirs = rng.standard_normal((2, 1, 4, 4))
    noise = rng.standard_normal((len(table), 2, 1, 4, 4))
    scheduler.set_timesteps(len(table))
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), table.timesteps)
    learned = improved_diffusion.learned if spec.variance == "learned_range" else lambda x: 0.0
    with _Draws(noise, table.timesteps):
        for number, t in enumerate(table.timesteps.tolist()):
            out = network(spec.prediction, theirs, t, schedule)
            if spec.variance == "learned_range":
                out = np.concatenate([out, learned(theirs)], axis=1)
            if step.get("eta"):
                step["variance_noise"] = torch.from_numpy(noise[number])
            theirs = scheduler.step(
                torch.from_numpy(out), t, torch.from_numpy(theirs), **step
            ).prev_sample.numpy()
    mine = run(table, spec.prediction, schedule, start, lambda number: noise[number], learned)
    return float(np.abs(mine - theirs).max())


class _Draws(torch.overrides.TorchFunctionMode):
    """torch.randn gives the noise of each step in turn, while it is entered."""

    def __init__(self, noise: Any, timesteps: Any) -> None:
        super().__init__()
        self._draws = iter(noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.from_numpy(next(self._draws)) if func is torch.randn else func(*args, **(kwargs or {}))


def scheduled(folder: Path, scheduler: Any) -> Imported:
    """The import of a folder with another scheduler in it."""
    edit(folder / "model_index.json", {"_class_name": "DDPMPipeline"})
    scheduler.save_pretrained(folder / "scheduler")
    return import_checkpoint(
        folder, {"variance_type": "fixed_small"} if "Solver" in str(type(scheduler)) else {}
    )


CLIPS: list[dict[str, Any]] = [{"clip_sample": False}, {"clip_sample": True}, {"clip_sample_range": 0.5}]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [None, 50, 8])
def test_ddpm(diffusers: Any, folders: dict[int, Path], spacing: str, steps: int | None) -> None:
    cases = itertools.product(
        CLIPS, ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"], [0, 1]
    )
    for number, (clip, variance, offset) in enumerate(cases):
        if (steps != 8 and number % 5) or (
            not steps and offset
        ):  # the long ones in turn; there an offset is past the end
            continue
        prediction = list(PREDICTIONS)[number % 3]
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=300,
            timestep_spacing=spacing,
            variance_type=variance,
            steps_offset=offset,
            prediction_type=PREDICTIONS[prediction],
            beta_schedule=["linear", "scaled_linear", "sigmoid"][number % 3],
            **clip,
        )
        imported = scheduled(folders[2 if variance == "learned_range" else 1], scheduler)
        assert imported.spec.prediction == prediction
        assert imported.spec.completed(ChainSettings()).solver == "ddpm"
        assert imported.spec.completed(ChainSettings()).steps == 300
        got = chains_differ(imported, scheduler, ChainSettings(steps=steps))
        assert got <= TOLERANCES["imported_ddpm"].limit, (clip, variance, offset)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [None, 7])
def test_ddim(diffusers: Any, folders: dict[int, Path], spacing: str, steps: int | None) -> None:
    cases = itertools.product(CLIPS, [0, 1], [True, False], [0.0, 0.6])
    for number, (clip, offset, to_one, eta) in enumerate(cases):
        if steps is None and number % 5:  # the long ones in turn
            continue
        prediction = list(PREDICTIONS)[number % 3]
        scheduler = diffusers.DDIMScheduler(
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            prediction_type=PREDICTIONS[prediction],
            beta_schedule=["linear", "scaled_linear"][number % 2],
            **clip,
        )
        imported = scheduled(folders[1], scheduler)
        own = imported.spec.completed(ChainSettings())
        assert (own.solver, own.steps, own.eta) == ("ddim", 50, None)
        got = chains_differ(imported, scheduler, ChainSettings(steps=steps, eta=eta), eta=eta)
        assert got <= TOLERANCES["imported_ddim"].limit, (clip, offset, to_one, eta)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers about itself
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver(diffusers: Any, folders: dict[int, Path], spacing: str, order: int) -> None:
    for number, (steps, offset) in enumerate(itertools.product([None, 50, 7], [0, 1])):
        prediction = list(PREDICTIONS)[number % 3]
        scheduler = diffusers.DPMSolverMultistepScheduler(
            timestep_spacing=spacing,
            steps_offset=offset,
            solver_order=order,
            prediction_type=PREDICTIONS[prediction],
            lower_order_final=bool(number % 2),
        )
        imported = scheduled(folders[1], scheduler)
        own = imported.spec.completed(ChainSettings())
        assert (own.solver, own.steps) == ("dpmpp-2m" if order == 2 else "ddim", 20)
        assert imported.spec.clip is False
        got = chains_differ(imported, scheduler, ChainSettings(steps=steps))
        assert got <= TOLERANCES["imported_dpm"].limit, (steps, offset)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers about itself
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_dpm_solver_with_noise(diffusers: Any, folders: dict[int, Path], spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        timestep_spacing=spacing, algorithm_type="sde-dpmsolver++"
    )
    imported = scheduled(folders[1], scheduler)
    assert imported.spec.completed(ChainSettings()).solver == "sde-dpmpp-2m"
    for steps in (None, 50, 7):
        got = chains_differ(imported, scheduler, ChainSettings(steps=steps))
        assert got <= TOLERANCES["imported_dpm"].limit, steps


def test_cosine_by_name_and_by_its_betas(diffusers: Any, folders: dict[int, Path]) -> None:
    by_name = scheduled(folders[1], diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    betas = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.tolist()
    scheduler = diffusers.DDIMScheduler(trained_betas=betas)
    by_betas = scheduled(folders[1], scheduler)
    assert by_name.spec.schedule == by_betas.spec.schedule
    assert chains_differ(by_betas, scheduler, ChainSettings()) <= TOLERANCES["imported_ddim"].limit
    own = scheduled(folders[1], diffusers.DDPMScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()))
    assert msgspec.to_builtins(own.spec.schedule)["kind"] == "linear"
    with pytest.raises(ArtefactError, match="those of no schedule that is known by name"):
        scheduled(folders[1], diffusers.DDPMScheduler(trained_betas=np.geomspace(1e-4, 0.02, 1000).tolist()))


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_clipping_that_is_null_is_none(diffusers: Any, folders: dict[int, Path], kind: str) -> None:
    """As its code asks whether it is true; only a field that is not there is the default."""
    scheduler = getattr(diffusers, kind)(clip_sample=None)
    imported = scheduled(folders[1], scheduler)
    assert imported.spec.clip is False
    assert chains_differ(imported, scheduler, ChainSettings(steps=20)) <= TOLERANCES["imported_ddpm"].limit
    edit(folders[1] / SCHEDULER, {"clip_sample": "absent"})
    assert import_checkpoint(folders[1], {}).spec.clip is True


def test_a_ddim_pipeline_makes_ddim_of_any_scheduler(diffusers: Any, folders: dict[int, Path]) -> None:
    """As its constructor does."""
    scheduled(folders[1], diffusers.DDPMScheduler())
    edit(folders[1] / "model_index.json", {"_class_name": "DDIMPipeline"})
    theirs = diffusers.DDIMPipeline.from_pretrained(folders[1])
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    imported = import_checkpoint(folders[1], {})
    assert imported.spec.sampling.solver == "ddim"
    assert chains_differ(imported, theirs.scheduler, ChainSettings()) <= TOLERANCES["imported_ddim"].limit


def test_a_solver_that_is_not_here_leaves_its_schedule(diffusers: Any, folders: dict[int, Path]) -> None:
    imported = scheduled(folders[1], diffusers.PNDMScheduler(beta_end=0.01, timestep_spacing="leading"))
    assert imported.spec.sampling.solver == "ddpm"
    assert msgspec.to_builtins(imported.spec.schedule)["beta_end"] == 0.01
    assert any("its PNDMScheduler is not here" in line for line in imported.recognised)
    assert [assumption.flag for assumption in imported.assumed] == ["clip_sample", "variance_type"]


def test_a_whole_pipeline(diffusers: Any, tmp_path: Path) -> None:
    """Called as its users do, on our noise, and the imported model by seed alone: the same images."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=60, variance_type="fixed_large", beta_end=0.2)
    saved(diffusers, tmp_path, SMALL, scheduler)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(60)
    with AddressedRandn(pipeline.scheduler.timesteps, seed=11, first_index=5):
        theirs = pipeline(batch_size=2, num_inference_steps=60, output_type="np").images
    imported = import_checkpoint(tmp_path, {})
    ours = Sampler(TorchNetwork(imported.network, imported.spec)).sample(2, seed=11, first_index=5)
    difference = np.abs(np.clip(ours.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) - theirs).max()
    assert difference <= TOLERANCES["diffusers_pipeline"].limit
    assert theirs.std() > 0.1


def test_the_graph_is_that_of_our_own_network(diffusers: Any, tmp_path: Path) -> None:
    """A shrunk google/ddpm-cifar10-32 exports to the same nodes and names as a network of ours with its settings."""
    config = CIFAR10 | {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    }
    config |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "sample_size": 8}
    saved(diffusers, tmp_path, config)
    imported = import_checkpoint(tmp_path, {})
    ours = UNetConfig(channels=32, widths=(32, 64), time_width=128, blocks=1, attention_levels=(1,))
    own = UNet(ours, 3, 32, 3)
    randomise(own, seed=1)  # the exporter leaves out a bias of zeros
    graphs = []
    for net in (imported.network, own):
        graph = trace(net.eval(), imported.spec).graph
        nodes = [(node.op_type, node.name, list(node.input), list(node.output)) for node in graph.node]
        graphs.append((nodes, sorted((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)))
    assert graphs[0] == graphs[1]


# --- what is refused ------------------------------------------------------------------------------

NETWORK, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
SOLVER = {"_class_name": "DPMSolverMultistepScheduler"}
SKIP = ["SkipDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
UNLIKE = ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (INDEX, {"vae": ["diffusers", "AutoencoderKL"]}, "works on latents, not on pixels (it has a vae)"),
        (INDEX, {"vqvae": ["diffusers", "VQModel"]}, "works on latents"),
        (INDEX, {"text_encoder": ["transformers", "CLIP"]}, "is conditioned on more (it has a text_encoder)"),
        (NETWORK, {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel, which is another network"),
        (NETWORK, {"cross_attention_dim": 8}, "conditioned networks are not supported"),
        (NETWORK, {"down_block_types": SKIP}, "SkipDownBlock2D is a block of another network"),
        (NETWORK, {"down_block_types": SKIP[1:]}, "are not 3 each, as block_out_channels"),
        (
            NETWORK,
            {"up_block_types": UNLIKE},
            "the attention of DownBlock2D on the way down is not that of AttnUp",
        ),
        (
            NETWORK,
            {"downsample_type": "resnet"},
            "the resampling of AttnDownBlock2D on the way down is not that",
        ),
        (NETWORK, {"downsample_type": "fir"}, "only conv and resnet"),
        (NETWORK, {"downsample_padding": 2}, "downsample_padding 2"),
        (NETWORK, {"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        (NETWORK, {"time_embedding_type": "learned"}, "time_embedding_type learned"),
        (NETWORK, {"class_embed_type": "identity"}, "class_embed_type identity"),
        (NETWORK, {"freq_shift": 0.5}, "freq_shift 0.5"),
        (NETWORK, {"center_input_sample": True}, "center_input_sample"),
        (NETWORK, {"mid_block_type": None}, "mid_block_type None"),
        (NETWORK, {"mid_block_scale_factor": 1.4}, "mid_block_scale_factor other than 1"),
        (NETWORK, {"act_fn": "mish"}, "act_fn mish"),
        (NETWORK, {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift spatial"),
        (NETWORK, {"in_channels": 6}, "in_channels 6 and out_channels 3"),
        (
            NETWORK,
            {"out_channels": 6},
            "variance_type fixed_small is not of a network with channels 3 in, 6 out",
        ),
        (NETWORK, {"block_out_channels": [16, 32, 64]}, "down_blocks.2.resnets.0.conv1.weight is"),
        (NETWORK, {"layers_per_block": 2}, "up_blocks.1.resnets.1.norm1.weight is (48,), and (64,)"),
        (NETWORK, {"add_attention": False}, "group_norm.bias is not of the network (and 9 more)"),
        (NETWORK, {"num_class_embeds": 5}, "class_embedding.weight is missing"),
        (NETWORK, {"num_class_embeds": 5, "class_embed_type": "timestep"}, "class_embedding.linear_1.weight"),
        (NETWORK, {"attention_head_dim": 12}, "whole attention heads"),
        (NETWORK, {"norm_num_groups": 5}, "cannot make 5 groups"),
        (NETWORK, {"norm_num_groups": None}, "norm_num_groups"),
        (NETWORK, {"norm_eps": float("nan")}, "norm_eps"),
        (NETWORK, {"sample_size": 6}, "cannot be halved"),
        (NETWORK, {"sample_size": 0}, "makes none: Expected `int` >= 1"),
        (NETWORK, {"sample_size": [10**9, 8]}, "<= 16384"),
        (NETWORK, {"sample_size": "8"}, "sample_size"),
        (NETWORK, {"block_out_channels": [10**9] * 3}, "block_out_channels"),
        (NETWORK, {"block_out_channels": [16] * 40}, "block_out_channels"),
        (NETWORK, {"layers_per_block": 10**6}, "layers_per_block"),
        (SCHEDULER, {"thresholding": True}, "thresholding: its clipping depends on the whole image"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (SCHEDULER, {"beta_schedule": "laplace"}, "beta_schedule laplace is not supported"),
        (SCHEDULER, {"variance_type": "learned"}, "variance_type learned is not supported"),
        (SCHEDULER, {"variance_type": "learned_range"}, "variance_type learned_range is not of a network"),
        (
            SCHEDULER,
            {"prediction_type": "flow_prediction"},
            "prediction_type flow_prediction is not supported",
        ),
        (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing karras is not supported"),
        (SCHEDULER, {"beta_end": 2.0}, "beta_end"),
        (SCHEDULER, {"num_train_timesteps": 10**7}, "num_train_timesteps"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "2 trained_betas are not of 1000 num_train_timesteps"),
        (
            SCHEDULER,
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "a FlowMatchEulerDiscreteScheduler, which",
        ),
        (SCHEDULER, SOLVER | {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (SCHEDULER, SOLVER | {"use_lu_lambdas": True}, "use_lu_lambdas"),
        (SCHEDULER, SOLVER | {"use_flow_sigmas": True}, "use_flow_sigmas"),
        (SCHEDULER, {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        (SCHEDULER, SOLVER | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (SCHEDULER, SOLVER | {"solver_order": 3}, "solver_order 3"),
        (SCHEDULER, SOLVER | {"solver_type": "heun"}, "solver_type heun"),
        (SCHEDULER, SOLVER | {"algorithm_type": "sde-dpmsolver"}, "algorithm_type sde-dpmsolver"),
        (SCHEDULER, SOLVER | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type sigma_min"),
        (SCHEDULER, SOLVER | {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
    ],
)
def test_what_is_refused(
    small: Path, tmp_path: Path, file: str, change: dict[str, Any], problem: str
) -> None:
    """By name, in one line."""
    shutil.copytree(small, tmp_path / "it")
    edit(tmp_path / "it" / file, change)
    with pytest.raises(DdpmDeployError) as refused:
        import_checkpoint(tmp_path / "it", {})
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="session")
def small(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    saved(diffusers, folder, SMALL)
    return folder


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "is not a whole JSON file"),
        ("{", "is not a whole JSON file"),
        ("[1]", "holds no names and values"),
        ('{"sample_size": ' + "9" * 5000 + "}", "is not a whole JSON file"),
        (" " * (1 << 20) + "{}", "is too large for a configuration"),
        ('{"_class_name": ["UNet2DModel"], "sample_size": {}}', "sample_size"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not a whole JSON file"),
    ],
)
def test_configurations_that_are_none(small: Path, tmp_path: Path, text: str | bytes, problem: str) -> None:
    shutil.copytree(small, tmp_path / "it")
    for name in (NETWORK, SCHEDULER, INDEX) if "sample_size" not in str(text) else (NETWORK,):
        before = (tmp_path / "it" / name).read_bytes()
        (tmp_path / "it" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ArtefactError, match=problem):
            import_checkpoint(tmp_path / "it", {})
        (tmp_path / "it" / name).write_bytes(before)


def test_folders_that_are_not_whole(small: Path, tmp_path: Path) -> None:
    shutil.copy(small / INDEX, tmp_path)
    with pytest.raises(ArtefactError, match=r"has no network: neither .*config\.json nor weights"):
        import_checkpoint(tmp_path, {})
    shutil.copytree(small / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(ArtefactError, match="are split into several files"):
        import_checkpoint(tmp_path, {})
    next(tmp_path.glob("unet/*.safetensors")).unlink()
    with pytest.raises(ArtefactError, match="has no weights: diffusion_pytorch_model"):
        import_checkpoint(tmp_path, {})
    shutil.copy(small / "unet" / weights.name, tmp_path / weights.name)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ArtefactError, match=r"says nothing of itself: its config\.json is needed beside it"):
        import_checkpoint(tmp_path / weights.name, {})
    weights.write_bytes((small / "unet" / weights.name).read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="is not a whole, safe file of weights"):
        import_checkpoint(tmp_path / "unet", {})


def test_weights_that_are_whole_numbers(diffusers: Any, tmp_path: Path) -> None:
    saved(diffusers, tmp_path, SMALL)
    rewrite(tmp_path, lambda state: state | {"conv_in.weight": state["conv_in.weight"].long()})
    with pytest.raises(ArtefactError, match=r"conv_in\.weight holds whole numbers, and no weights"):
        import_checkpoint(tmp_path, {})


def test_another_flag_is_refused(small: Path) -> None:
    with pytest.raises(SettingError, match="--num_heads cannot be told of diffusers"):
        import_checkpoint(small, {"num_heads": 4})


# --- folders as people have them ------------------------------------------------------------------


def test_a_checkpoint_of_train_unconditional(diffusers: Any, tmp_path: Path) -> None:
    """PIPELINE/checkpoint-500/unet and unet_ema: with the pipeline's schedule, and the averaged weights are named."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    unet = saved(diffusers, tmp_path, SMALL, scheduler)
    for name in ("unet", "unet_ema"):
        folder = tmp_path / "checkpoint-500" / name
        shutil.copytree(tmp_path / "unet", folder)
        imported = import_checkpoint(folder, {})
        assert error(imported, unet) <= LIMIT
        assert imported.assumed == ()
        assert (imported.spec.prediction, imported.spec.schedule) == ("x0", CosineBetas())
    shutil.copytree(tmp_path / "unet", tmp_path / "others" / "unet_ema")
    assert import_checkpoint(tmp_path / "others" / "unet_ema", {}).assumed
    (line,) = [
        line
        for line in import_checkpoint(tmp_path / "checkpoint-500" / "unet", {}).recognised
        if "averaged" in line
    ]
    assert str(folder) in line
    assert not any("averaged" in line for line in imported.recognised)


def test_a_scheduler_beside_the_network_without_a_pipeline(diffusers: Any, tmp_path: Path) -> None:
    """What a script of one's own saves: its schedule holds, whichever of the two folders is named."""
    unet = saved(diffusers, tmp_path, SMALL, diffusers.DDPMScheduler(prediction_type="v_prediction"))
    (tmp_path / INDEX).unlink()
    for folder in (tmp_path, tmp_path / "unet"):
        imported = import_checkpoint(folder, {})
        assert error(imported, unet) <= LIMIT
        assert imported.spec.prediction == "v"
        assert imported.assumed == ()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_git_did_not_fetch(small: Path, tmp_path: Path, suffix: str) -> None:
    shutil.copytree(small, tmp_path / "it")
    weights = tmp_path / "it" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")
    weights.rename(weights.with_suffix(f".{suffix}"))
    with pytest.raises(
        ArtefactError, match=r"only a pointer of git-lfs to the weights: fetch them with git lfs"
    ):
        import_checkpoint(tmp_path / "it", {})


def test_weights_under_another_name(small: Path, tmp_path: Path) -> None:
    """The configuration is beside them, and only the name is not as it must be."""
    shutil.copy(small / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    shutil.copy(small / "unet" / "config.json", tmp_path)
    with pytest.raises(ArtefactError, match=r"must be called diffusion_pytorch_model\.safetensors or \.bin"):
        import_checkpoint(tmp_path / "model.safetensors", {})


def test_a_part_of_what_becomes_one_tensor_is_missing(small: Path, tmp_path: Path) -> None:
    """As the timestep's projection of one block, which stands with those of the others in ours."""
    folder = Path(shutil.copytree(small, tmp_path / "one"))
    name = "down_blocks.0.resnets.0.time_emb_proj.weight"
    rewrite(folder, lambda state: {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ArtefactError, match=f"another network: {re.escape(name)} is missing"):
        import_checkpoint(folder, {})
