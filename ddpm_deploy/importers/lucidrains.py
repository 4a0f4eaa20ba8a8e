"""denoising-diffusion-pytorch, from 2.0 on: its own network, built by the installed package, and its GaussianDiffusion.

The weights tell every argument of `Unet` that changes what it computes but one, and the buffers beside them the
schedule and the objective.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from ddpm_deploy.dependencies import require
from ddpm_deploy.embedding import TimestepItself
from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.importers.flags import LucidrainsFlags
from ddpm_deploy.importers.imported import Imported, new_spec
from ddpm_deploy.importers.own import OwnNetwork
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.schedule import (
    BetaSchedule,
    CosineBetas,
    Floats,
    LinearBetas,
    Schedule,
    SigmoidAlphas,
    recognise,
)
from ddpm_deploy.spec import Sampling
from ddpm_deploy.train.checkpoint import require_fit
from ddpm_deploy.words import Prediction

NAME: Final = "lucidrains"
PACKAGE: Final = "denoising_diffusion_pytorch"

# Where the network stands in a checkpoint of its Trainer, in one of GaussianDiffusion, and alone: the average first.
_ROOTS: Final = ("ema_model.model.", "model.", "")
_OBJECTIVES: Final[dict[str, Prediction]] = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
_SAME_WEIGHT: Final = 1e-3  # of the loss, relative: it was computed in float64 and stored in float32
_MOST_LEVELS: Final = 16
_MOST_TIMESTEPS: Final = 100_000
_REMEDY: Final = (
    "export the network by a function of your own that makes it with the package that trained it: ddpm-export "
    "my_package.models:build --weights FILE --spec FILE"
)


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return _root(names) is not None


def _root(names: Collection[str]) -> str | None:
    return next(
        (
            root
            for root in _ROOTS
            if f"{root}init_conv.weight" in names and f"{root}time_mlp.1.weight" in names
        ),
        None,
    )


def read(weights: Weights, told: Told[LucidrainsFlags]) -> Imported:
    """The network and spec of a checkpoint of its Trainer, or of a state dict of GaussianDiffusion or of Unet alone.

    Raises ArtefactError where it is of a version before 2.0 or of another of its networks; DependencyError where the
    package is not installed; SettingError where a flag is needed, or says other than the file does.
    """
    root = _root(weights.state)
    assert root is not None
    network = _part(weights, root)
    beside = _part(weights, root.removesuffix("model."))
    version = _require_version(weights, network)
    arguments = unet_arguments(network, told)
    height, width = told.image_size()
    if (divisor := 2 ** (len(arguments["dim_mults"]) - 1)) and (height % divisor or width % divisor):
        raise SettingError(
            f"--image_size {height}x{width}: both must be multiples of {divisor} for this network"
        )
    channels, learned = arguments["channels"], arguments["out_dim"] != arguments["channels"]
    timesteps, schedule, objective = _diffusion(beside, told, learned)
    normalized = told.get("auto_normalize", True, False)
    spec = new_spec(
        image_shape=(channels, height, width),
        value_range=(-1.0, 1.0) if normalized else (0.0, 1.0),
        clip=True if normalized else (-1.0, 1.0),
        timesteps=timesteps,
        schedule=schedule,
        prediction=objective,
        variance="learned_range" if learned else "fixed_small",
        sampling=_sampling(told, timesteps),
        embedding=TimestepItself(),
    )
    recognised = (
        f"of {version}",
        f"Unet({', '.join(f'{name}={value}' for name, value in arguments.items())})",
    )
    module = OwnNetwork(_build(arguments, network), "int64")
    return Imported(module, spec, "denoising-diffusion-pytorch", recognised, tuple(told.assumed))


def _part(weights: Weights, root: str) -> Weights:
    """The weights whose names begin with `root`, without it."""
    state = {
        name.removeprefix(root): tensor for name, tensor in weights.state.items() if name.startswith(root)
    }
    return replace(weights, state=state)


def _require_version(weights: Weights, network: Weights) -> str:
    """The version that wrote the checkpoint. Raises ArtefactError where its network is another than that of 2.0."""
    said = weights.content.get("version") if isinstance(weights.content, dict) else None
    parts = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", said) if isinstance(said, str) else None
    numbers = tuple(int(part or 0) for part in parts.groups()) if parts else None
    found = parts[0] if parts else ""
    # Its blocks have RMSNorm, which has a gain alone, since 2.0.0.
    of_two = "mid_block1.block1.norm.g" in network
    if of_two and (numbers is None or numbers >= (2, 0)):
        return f"version {found}" if numbers else "version 2.0 or later, by the names of its norms"
    version = f"version {found}" if numbers else "a version before 2.0, by the names of its norms"
    why = (
        "which standardises its weights with no trace of that in their names"
        if numbers and (0, 27, 3) <= numbers <= (1, 7, 1)
        else "whose network is another than today's, and may standardise its weights"
    )
    raise ArtefactError(
        f"{weights.name} is of {version} of denoising-diffusion-pytorch, {why}: only those from 2.0 on are read; "
        f"{_REMEDY}"
    )


def unet_arguments(network: Weights, told: Told[LucidrainsFlags]) -> dict[str, Any]:
    """The arguments of `Unet`, by the shapes of its weights.

    Raises ArtefactError where they are those of no such network; SettingError where a flag says otherwise.
    """
    _require_plain(network)
    dim = network.shape("time_mlp.1.weight")[0] // 4
    init_dim, channels, *_ = network.shape("init_conv.weight")
    levels = next((n for n in range(_MOST_LEVELS) if f"downs.{n}.2.mem_kv" not in network), _MOST_LEVELS)
    attentions = [_attention(network, f"downs.{level}.2") for level in range(levels)]
    widths = [_width(network, level) for level in range(levels)]
    if not dim or not levels or any(width % dim for width in widths):
        raise ArtefactError(
            f"{network.name} is not whole: levels of the widths {widths} are none of dim = {dim}"
        )
    out = network.shape("final_conv.weight")[0]
    _require_shape_of_images(network, channels, out)
    arguments: dict[str, Any] = {
        "dim": dim,
        "dim_mults": tuple(width // dim for width in widths),
        "channels": channels,
        "full_attn": tuple(full for full, _, _ in attentions),
        "attn_heads": tuple(heads for _, heads, _ in attentions),
        "attn_dim_head": tuple(width for _, _, width in attentions),
    }
    for name, value in arguments.items():
        if (
            name.startswith("attn") and len(getattr(told.flags, name) or ()) == 1
        ):  # one for all levels, as there
            told.agrees(name, tuple(sorted(set(value))))
        else:
            told.agrees(name, value)
    told.agrees("self_condition", False)
    told.agrees("learned_variance", out == 2 * channels)
    theta = told.get("sinusoidal_pos_emb_theta", 10_000)
    return {**arguments, "init_dim": init_dim, "out_dim": out, "sinusoidal_pos_emb_theta": theta}


def _require_plain(network: Weights) -> None:
    """Raise ArtefactError where it is another of the package's networks, by its name."""
    name = network.name
    if len(network.shape("init_conv.weight")) != 4:
        raise ArtefactError(f"{name} is no network of images, as a Unet1D: only `Unet` is supported")
    if "time_mlp.0.weights" in network:
        raise ArtefactError(
            f"{name} takes the logarithm of the signal-to-noise ratio for t, by Fourier features, as the package's "
            "continuous-time and elucidated models: that is not supported"
        )
    if any(part.startswith(("classes_emb", "classes_mlp", "null_classes")) for part in network.state):
        raise ArtefactError(
            f"{name} is of its classifier_free_guidance, which is not supported: only `Unet` is"
        )


def _require_shape_of_images(network: Weights, channels: int, out: int) -> None:
    if channels == 2 * out:
        raise ArtefactError(
            f"{network.name} takes {channels} channels and gives {out}: it is conditioned on its own last x̂0 "
            "(self_condition), which is not supported"
        )
    if out not in (channels, 2 * channels):
        raise ArtefactError(
            f"{network.name} takes {channels} channels and gives {out}, which is not supported"
        )


def _attention(network: Weights, name: str) -> tuple[bool, int, int]:
    """Whether an attention is a full one, not linear; its heads, and their width."""
    full = f"{name}.to_out.weight" in network
    shape = network.shape(f"{name}.mem_kv")
    if len(shape) != 4:
        raise ArtefactError(f"{network.name} is not whole: {name}.mem_kv is {shape}")
    return full, shape[1], shape[3] if full else shape[2]


def _width(network: Weights, level: int) -> int:
    """Of the level below."""
    halves = f"downs.{level}.3.1.weight"
    return network.shape(halves if halves in network else f"downs.{level}.3.weight")[0]


def _build(arguments: Mapping[str, Any], network: Weights) -> nn.Module:
    """Their network with its weights, which it shares. Raises ArtefactError where they do not fit it."""
    package = require(PACKAGE, "lucidrains")
    try:
        with torch.device("meta"):  # allocates nothing, whatever size the shapes claim
            built: nn.Module = package.Unet(**arguments)
        require_fit(network.state, built)
        built.load_state_dict(network.state, assign=True)
    except Exception as error:  # it is theirs, of any version
        raise ArtefactError(
            f"the weights in {network.name} are not of the Unet that they seem to be of: {first_line(error)}"
        ) from error
    return built.eval()


def _diffusion(
    beside: Weights, told: Told[LucidrainsFlags], learned: bool
) -> tuple[int, BetaSchedule, Prediction]:
    """T, the schedule and what the network predicts: from the buffers, or from flags where these are not there."""
    if "betas" not in beside:
        timesteps: int = told.get("timesteps", 1000)
        if not 1 <= timesteps <= _MOST_TIMESTEPS:
            raise SettingError(f"--timesteps {timesteps} is not from 1 to {_MOST_TIMESTEPS}")
        named = _schedules(timesteps)
        name = told.get("beta_schedule", "sigmoid", "cosine", "linear")
        if name not in named:
            raise SettingError(f"--beta_schedule {name} is not known: choose from {', '.join(named)}")
        schedule = named[name]
    else:
        betas = _buffer(beside, "betas", beside.shape("betas"))
        timesteps = told.agrees("timesteps", len(betas))
        name, schedule = _recognised(betas, beside.name)
        told.agrees("beta_schedule", name)
    return timesteps, schedule, _objective(beside, told, Schedule(schedule.betas(timesteps)), learned)


def _schedules(timesteps: int) -> dict[str, BetaSchedule]:
    """Theirs by name, each with its usual arguments."""
    end = min(20 / timesteps, 0.999)  # of fewer than 21 timesteps it has none
    return {
        "linear": LinearBetas(0.1 / timesteps, end),
        "cosine": CosineBetas(),
        "sigmoid": SigmoidAlphas(),
    }


def _recognised(betas: Floats, name: str) -> tuple[str, BetaSchedule]:
    for usual, schedule in _schedules(len(betas)).items():
        if np.abs(schedule.betas(len(betas)) - betas).max() <= 1e-6:
            return usual, schedule
    found = recognise(betas)
    if found is None:
        raise ArtefactError(
            f"the betas in {name} are of no schedule that is known, as where schedule_fn_kwargs were given: only "
            "linear, cosine and sigmoid with their usual arguments are read"
        )
    return "linear" if isinstance(found, LinearBetas) else type(found).__name__, found


def _buffer(beside: Weights, name: str, shape: tuple[int, ...]) -> Floats:
    """A buffer of one number a timestep, (T,) in float64."""
    if beside.shape(name) != shape or len(shape) != 1 or not 1 <= shape[0] <= _MOST_TIMESTEPS:
        raise ArtefactError(
            f"{beside.name}: {name} is {beside.shape(name)}, and one number a timestep is needed"
        )
    return beside.state[name].double().numpy()


def _objective(beside: Weights, told: Told[LucidrainsFlags], schedule: Schedule, learned: bool) -> Prediction:
    """What the network predicts, by the weight that its loss had at each timestep."""
    if learned:  # its loss is that of the noise, whatever it was told
        return "epsilon"
    if "loss_weight" not in beside:
        name = told.get("objective", "pred_v", "pred_noise", "pred_x0")
        if name not in _OBJECTIVES:
            raise SettingError(f"--objective {name} is not known: choose from {', '.join(_OBJECTIVES)}")
        return _OBJECTIVES[name]
    weight = _buffer(beside, "loss_weight", (schedule.timesteps,))
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    # What it was divided by, after the ratio was perhaps cut off (min_snr_loss_weight).
    for name, divisor in (("pred_noise", snr), ("pred_x0", np.ones_like(snr)), ("pred_v", snr + 1)):
        cut = weight * divisor
        if np.allclose(cut, np.minimum(snr, cut.max()), rtol=_SAME_WEIGHT, atol=0):
            return _OBJECTIVES[told.agrees("objective", name)]
    raise ArtefactError(
        f"the loss_weight in {beside.name} is of none of the objectives {', '.join(_OBJECTIVES)}"
    )


def _sampling(told: Told[LucidrainsFlags], timesteps: int) -> Sampling:
    """How it samples: DDIM where that is in fewer steps than T."""
    steps = told.get("sampling_timesteps", timesteps)
    if not 1 <= steps <= timesteps:
        raise SettingError(f"--sampling_timesteps {steps} is not from 1 to {timesteps}, the model's T")
    if steps == timesteps:
        return Sampling(spacing="lucidrains")
    eta = told.get("ddim_sampling_eta", 0.0)
    return Sampling(steps=steps, solver="ddim", eta=eta, spacing="lucidrains")
