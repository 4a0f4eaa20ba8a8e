"""MONAI's checkpoints, against MONAI itself: predictions, whole chains, and what is refused."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.importers.told import read_flags
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import CosineBetas, LinearBetas, Schedule
from ddpm_deploy.spacings import spaced
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.train.unet import UNet
from tests.importing import predict, randomise, relative_rms
from tests.tolerances import TOLERANCES

SMALL: dict[str, Any] = {
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    # Three levels, attention at the first, as many heads in each; one matrix for q, k and v.
    "heads": {
        **SMALL,
        "num_res_blocks": 2,
        "channels": (8, 16, 32),
        "attention_levels": (True, False, True),
        "num_head_channels": (4, 0, 16),
        "use_combined_linear": True,
        "use_flash_attention": True,
    },
    # Resampling by residual blocks, attention without a last projection, classes.
    "blocks": {
        **SMALL,
        "resblock_updown": True,
        "include_fc": False,
        "num_class_embeds": 3,
        "norm_eps": 1e-5,
    },
    # As in MONAI's tutorial of 2-D DDPM: heads wider than the first level, which has none.
    "tutorial": {
        **SMALL,
        "channels": (8, 16, 16),
        "attention_levels": (False, True, True),
        "num_head_channels": 16,
    },
}


@pytest.fixture(scope="session")
def monai() -> Any:
    pytest.importorskip("einops")  # of its attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai.networks")


def network_of(monai: Any, colours: int = 1, **settings: Any) -> Any:
    network = monai.nets.DiffusionModelUNet(2, colours, colours, **settings).eval()
    randomise(network)
    return network


def flags_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {"image_size": 16, **settings}


def imported_from(folder: Path, state: dict[str, Tensor], flags: dict[str, Any], **around: Any) -> Imported:
    path = folder / "unet.pt"
    torch.save({"model": state, **around} if around else state, path)
    return import_checkpoint(path, flags)


def some_inputs(channels: int = 1, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0, 1, 17, 500, 999])
    return torch.randn(len(t), channels, size, size, generator=generator), t


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_predictions_are_those_of_monai(name: str, monai: Any, tmp_path: Path) -> None:
    settings = CONFIGURATIONS[name]
    network = network_of(monai, 3, **settings)
    imported = imported_from(tmp_path, network.state_dict(), flags_of(settings))
    (x, t), classes = some_inputs(3), settings.get("num_class_embeds")
    y = torch.arange(len(t)) % classes if classes else None
    with torch.no_grad():
        theirs = network(x, t, class_labels=y)
    assert isinstance(imported.network, UNet)
    assert imported.spec.num_classes == (classes or 0)
    assert relative_rms(predict(imported, x, t, y), theirs) <= TOLERANCES["monai_network"].limit


def test_predictions_after_training_are_those_of_monai(monai: Any, tmp_path: Path) -> None:
    """As it trains: L_simple in its scheduler's noise; the entry of a training script's checkpoint."""
    network = network_of(monai, **SMALL).train()
    scheduler = monai.schedulers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        images, noise = (torch.rand(4, 1, 16, 16, generator=generator) for _ in range(2))
        t = torch.randint(0, 1000, (4,), generator=generator)
        loss = F.mse_loss(network(scheduler.add_noise(images, noise, t), t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    imported = imported_from(
        tmp_path, network.state_dict(), flags_of(SMALL), optimizer=optimizer.state_dict()
    )
    x, t = some_inputs()
    with torch.no_grad():
        theirs = network(x, t)
    assert relative_rms(predict(imported, x, t), theirs) <= TOLERANCES["monai_network"].limit


def generative_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that MONAI Generative had for them."""
    renamed = {
        name.replace("attn.to_", "to_")
        .replace("attn.out_proj", "proj_attn")
        .replace("postconv", "conv"): value
        for name, value in state.items()
    }
    assert renamed.keys() != state.keys()
    return renamed


def test_the_names_of_monai_generative_are_read(monai: Any, tmp_path: Path) -> None:
    """They are those which MONAI itself takes for its predecessor's."""
    network, other = network_of(monai, **SMALL), network_of(monai, **SMALL)
    randomise(network, seed=5)
    old = generative_names(network.state_dict())
    other.load_old_state_dict(dict(old))
    flags = {"num_channels" if name == "channels" else name: value for name, value in flags_of(SMALL).items()}
    imported = imported_from(tmp_path, old, flags)
    x, t = some_inputs()
    with torch.no_grad():
        theirs = other(x, t)
    assert relative_rms(predict(imported, x, t), theirs) <= TOLERANCES["monai_network"].limit


SCHEDULERS: dict[str, dict[str, Any]] = {
    "default": {},
    "large": {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195},
    "v": {"schedule": "sigmoid_beta", "prediction_type": "v_prediction", "clip_sample_min": 0.0},
    "sample": {"schedule": "cosine", "prediction_type": "sample"},
    "unclipped": {"prediction_type": "v_prediction", "clip_sample": False},
}


def shared_noise(timesteps: int) -> Tensor:
    """Of draw t + 1, (T + 1, 2, 1, 16, 16); x_T is draw 0."""
    return torch.randn(timesteps + 1, 2, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def in_float64(scheduler: Any) -> Any:
    """The same scheduler with tables that are exact: in float32 its 1 - ᾱ of 1e-4 has three digits."""
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


@torch.no_grad()
def their_chain(
    network: Any, scheduler: Any, steps: int, draws: Tensor, patch: pytest.MonkeyPatch, **more: Any
) -> Tensor:
    scheduler.set_timesteps(steps)
    x = draws[0]
    for t in scheduler.timesteps:
        out = network(x, t[None].expand(len(x)))
        patch.setattr(torch, "randn", lambda *size, t=t, **kind: draws[t + 1])
        x, _ = scheduler.step(out, int(t), x, **more)
        patch.undo()
    return x


def our_chain(network: Any, settings: dict[str, Any], draws: Tensor, folder: Path, **chain: Any) -> Any:
    imported = imported_from(folder, network.state_dict(), {**flags_of(SMALL), **settings})
    sampler = Sampler(TorchNetwork(imported.network, imported.spec))
    return sampler.sample(2, noise=lambda draw: draws[draw].numpy(), **chain)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_full_chains_are_those_of_its_ddpm_scheduler(
    name: str, variance: str, monai: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, draws = network_of(monai, **SMALL), shared_noise(40)
    settings = {"num_train_timesteps": 40, "variance_type": variance, **SCHEDULERS[name]}
    scheduler = in_float64(monai.schedulers.DDPMScheduler(**settings))
    theirs = their_chain(network, scheduler, 40, draws, monkeypatch)
    mine = our_chain(network, settings, draws, tmp_path)
    assert relative_rms(mine, theirs) <= TOLERANCES["monai_chain"].limit


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.0), (7, 0.5), (20, 1.0)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_strided_chains_are_those_of_its_ddim_scheduler(
    name: str, steps: int, eta: float, monai: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, settings, draws = network_of(monai, **SMALL), SCHEDULERS[name], shared_noise(1000)
    scheduler = in_float64(monai.schedulers.DDIMScheduler(num_train_timesteps=1000, **settings))
    theirs = their_chain(network, scheduler, steps, draws, monkeypatch, eta=eta)
    mine = our_chain(network, settings, draws, tmp_path, steps=steps, solver="ddim", eta=eta)
    assert relative_rms(mine, theirs) <= TOLERANCES["monai_chain"].limit


@pytest.mark.parametrize("name", SCHEDULERS)
def test_chains_are_those_of_its_own_tables_to_their_precision(
    name: str, monai: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, draws = network_of(monai, **SMALL), shared_noise(40)
    settings = {"num_train_timesteps": 40, **SCHEDULERS[name]}
    theirs = their_chain(network, monai.schedulers.DDPMScheduler(**settings), 40, draws, monkeypatch)
    assert (
        relative_rms(our_chain(network, settings, draws, tmp_path), theirs)
        <= TOLERANCES["monai_float32"].limit
    )


@pytest.mark.parametrize("steps", [2, 7, 10, 50, 250, 500, 1000])
def test_its_timesteps_are_ours(steps: int, monai: Any) -> None:
    """It divides in float32, and so rounds a half to the other side here and there, as for 999 of 1000."""
    scheduler = monai.schedulers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    assert (
        scheduler.timesteps.tolist()
        == spaced("linspace", Schedule(LinearBetas().betas(1000)), steps).tolist()
    )


@pytest.fixture(scope="session")
def small(monai: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = network_of(monai, **SMALL).state_dict()
    return state


def test_a_bundles_network_is_a_file_of_flags(small: dict[str, Tensor], tmp_path: Path) -> None:
    """The network_def of its .json as it stands."""
    network_def = {
        "_target_": "monai.networks.nets.DiffusionModelUNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        **SMALL,
        "num_res_blocks": [1, 1],
        "num_head_channels": [0, 8],
        "with_conditioning": False,
        "cross_attention_dim": None,
    }
    (tmp_path / "net.json").write_text(json.dumps(network_def))
    imported = imported_from(tmp_path, small, {**read_flags(tmp_path / "net.json"), "image_size": "16"})
    assert imported.spec.network is not None
    assert imported.spec.network.head_channels == 8


def test_what_nothing_tells_is_assumed_and_told(small: dict[str, Tensor], tmp_path: Path) -> None:
    """Values as typed on a command line; an old name of a schedule."""
    told = {"image_size": "16x24", "norm_num_groups": "4", "value_range": "-1,1", "schedule": "cosine"}
    imported = imported_from(tmp_path, small, told)
    assert {one.flag: one.value for one in imported.assumed} == {
        "num_head_channels": 8,
        "norm_eps": 1e-6,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": True,
    }
    spec = imported.spec
    assert (spec.image_shape, spec.value_range, spec.clip_range) == ((1, 16, 24), (-1.0, 1.0), (-1.0, 1.0))
    assert spec.schedule == CosineBetas()
    assert imported_from(tmp_path, small, flags_of(SMALL)).spec.value_range == (0.0, 1.0)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"image_size": None}, "--image_size is needed"),
        ({"image_size": "15"}, "cannot be halved"),
        ({"norm_num_groups": None}, "--norm_num_groups is needed: MONAI's default, 32,"),
        ({"norm_num_groups": 0}, "network.groups"),
        ({"norm_num_groups": 5}, "cannot make 5 groups"),
        ({"num_head_channels": 5}, "does not divide the widths"),
        ({"num_head_channels": 0}, "not a width for each of 2 levels"),
        ({"num_head_channels": (8, 8, 8)}, "not a width for each of 2 levels"),
        ({"num_res_blocks": 2}, "they have 1 in each level"),
        ({"channels": (8, 32)}, "they have (8, 16)"),
        ({"attention_levels": (True, True)}, "they have (False, True)"),
        ({"resblock_updown": True}, "they have False"),
        ({"include_fc": False}, "they have True"),
        ({"in_channels": 3}, "they have 1"),
        ({"spatial_dims": 3}, "they have 2"),
        ({"num_class_embeds": 7}, "they have 0"),
        ({"variance_type": "learned_range"}, "choose from fixed_small, fixed_large"),
        ({"prediction_type": "flow"}, "choose from epsilon, sample, v_prediction"),
        ({"schedule": "mine"}, "choose from linear_beta, scaled_linear_beta, sigmoid_beta, cosine"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "rise from 0 to 1"),
        ({"value_range": (1.0, 0.0)}, "the least and the most"),
        ({"num_train_timesteps": 0}, "timesteps"),
        ({"num_train_timesteps": 10**9}, "timesteps"),
        ({"clip_sample_min": 2.0}, "clipped"),
        ({"num_heads": 4}, "--num_heads cannot be told of MONAI"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(
    told: dict[str, Any], said: str, small: dict[str, Tensor], tmp_path: Path
) -> None:
    flags = {name: value for name, value in {**flags_of(SMALL), **told}.items() if value is not None}
    with pytest.raises(SettingError, match=re.escape(said)):
        imported_from(tmp_path, small, flags)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spatial_dims": 3}, "a network of 3 spatial dimensions"),
        ({"with_conditioning": True, "cross_attention_dim": 4}, "attends to a context"),
        ({"out_channels": 2}, "interpolates itself, and not its logarithm"),
        ({"in_channels": 2}, "takes 2 channels and gives 1"),
        ({"num_res_blocks": (1, 2)}, "has 1, 2 residual blocks"),
    ],
)
def test_networks_of_other_kinds_are_refused_by_name(
    settings: dict[str, Any], said: str, monai: Any, tmp_path: Path
) -> None:
    usual = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
    network = monai.nets.DiffusionModelUNet(**{**usual, **SMALL, **settings})
    with pytest.raises(ArtefactError, match=re.escape(said)):
        imported_from(tmp_path, network.state_dict(), {"image_size": 16, "norm_num_groups": 4})


def test_heads_that_differ_in_number_and_width_are_refused(monai: Any, tmp_path: Path) -> None:
    settings = {**SMALL, "attention_levels": (True, True), "num_head_channels": (8, 4)}
    with pytest.raises(SettingError, match="differ from level to level"):
        imported_from(tmp_path, network_of(monai, **settings).state_dict(), flags_of(settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state.pop("middle_block.resnet_1.norm1.bias"),
            "middle_block.resnet_1.norm1.bias is missing",
        ),
        (lambda state: state.update({"top.weight": torch.ones(3)}), "top.weight is not of the network"),
        (
            lambda state: state.update({"out.0.weight": torch.ones(9)}),
            "out.0.weight is (9,), and (8,) is needed",
        ),
        (lambda state: state.pop("out.2.conv.weight"), "out.2.conv.weight is missing"),
        (lambda state: state.pop("down_blocks.0.resnets.0.norm1.weight"), "it has no down_blocks"),
        (lambda state: state.update({"conv_in.conv.weight": torch.ones(8)}), "spatial dimensions"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    change: Any, said: str, small: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(small)
    change(state)
    with pytest.raises(ArtefactError, match=re.escape(said)):
        imported_from(tmp_path, state, flags_of({**SMALL, "channels": None}))


def test_a_projection_that_is_not_there_is_made_in_the_size_of_real_weights_alone(
    small: dict[str, Tensor], tmp_path: Path
) -> None:
    """A short file must not make a large matrix."""
    state = {name: tensor for name, tensor in small.items() if "attn.out_proj" not in name}
    state["middle_block.attention.attn.to_v.weight"] = torch.ones(1, 10**6)
    with pytest.raises(ArtefactError, match=re.escape("attn.to_v.weight is (1, 1000000)")):
        imported_from(tmp_path, state, flags_of({**SMALL, "channels": None}))


def test_wrong_guesses_show(monai: Any, small: dict[str, Tensor], tmp_path: Path) -> None:
    """What the weights do not tell does change the prediction, so that a wrong assumption matters."""
    x, t = some_inputs()
    right = predict(imported_from(tmp_path, small, flags_of(SMALL)), x, t)
    for told in ({"norm_num_groups": 8}, {"num_head_channels": 4}, {"norm_eps": 1e-2}):
        wrong = predict(imported_from(tmp_path, small, {**flags_of(SMALL), **told}), x, t)
        assert relative_rms(wrong, right) > 100 * TOLERANCES["monai_network"].limit
    assert np.isfinite(right.numpy()).all()
