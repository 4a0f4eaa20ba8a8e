"""diffusers: folders of pipelines whose network is a UNet2DModel, of any version, without diffusers itself.

Network and schedule are in two JSON files, whose absent fields are the defaults of the constructors there. The kind of
the scheduler becomes the model's own chain.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.importers.family import Names, Place, build_family
from ddpm_deploy.importers.flags import DiffusersFlags
from ddpm_deploy.importers.imported import Imported, Told, new_spec
from ddpm_deploy.importers.weights import Weights, read_weights
from ddpm_deploy.schedule import (
    Beta,
    BetaSchedule,
    CosineBetas,
    LinearBetas,
    ScaledLinearBetas,
    SigmoidBetas,
    recognise,
)
from ddpm_deploy.spec import ModelSpec, Sampling, Share, Size, UNetConfig
from ddpm_deploy.words import Prediction, Solver, Spacing, Variance

NAME: Final = "diffusers"

# --- the folder -----------------------------------------------------------------------------------

_INDEX: Final = "model_index.json"
_CONFIG: Final = "config.json"
_WEIGHTS: Final = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+))?\.(safetensors|bin)")
_SHARDS: Final = re.compile(r"diffusion_pytorch_model.*(-\d+-of-\d+\.\w+|\.index\.json)")
_MOST_BYTES: Final = 1 << 20  # of a JSON file
_MOST_FILES: Final = 10_000  # looked at in a folder
_MOST_TEXT: Final = 60  # characters of a text out of a configuration
# Parts of a pipeline that works on latents, and of one that needs more than noise.
_LATENT: Final = ("vae", "vqvae", "movq", "vqgan", "first_stage_model")
_CONDITION: Final = ("text_encoder", "image_encoder", "prior", "transformer", "mel")


@dataclass(frozen=True)
class Configs:
    """What a folder holds beside the weights.

    network: its config.json. scheduler: its configuration, if there is one. pipeline: the class of the pipeline, or "".
    others: the variants of the weights that were not chosen.
    """

    name: str
    network: dict[str, Any]
    scheduler: dict[str, Any] | None
    pipeline: str
    others: tuple[str, ...] = ()


def folder_of(path: Path) -> Path | None:
    """The folder that a path of diffusers stands for: itself, or that of one of its files; None: it is of another."""
    if path.is_dir():
        return path
    its_own = path.name in (_INDEX, _CONFIG) or _WEIGHTS.fullmatch(path.name) or _SHARDS.fullmatch(path.name)
    with_configs = any((path.parent / name).is_file() for name in (_CONFIG, _INDEX))
    return path.parent if its_own and with_configs and path.is_file() else None


def read_folder(path: Path, variant: str | None = None) -> Weights:
    """The weights in the folder that a path stands for, with its `Configs` as their content.

    variant: of the weights, as "fp16" (None: those without one, where there are such). A path that names a file of
    weights means that file.

    Raises ArtefactError where a part is missing, broken, or of a network that is not of this family; SettingError where
    there is no such variant.
    """
    whole_file = _WEIGHTS.fullmatch(path.name) and not _SHARDS.fullmatch(path.name) and path.is_file()
    named = path.name if whole_file else None
    folder = _snapshot(folder_of(path) or path)
    whole = _pipeline_of(folder)
    index = _read_json(whole / _INDEX) if (whole / _INDEX).is_file() else {}
    _require_pixels(index, whole)
    network = whole / "unet" if (whole / "unet").is_dir() and folder == whole else folder
    if not (network / _CONFIG).is_file():
        raise ArtefactError(
            f"{show(whole)} has no network: neither {show(network / _CONFIG)} nor weights are there"
        )
    scheduler = _scheduler_file(whole) or _scheduler_file(folder)
    file, others = _weights_file(network, named, variant)
    configs = Configs(
        name=show(network / _CONFIG),
        network=_read_json(network / _CONFIG),
        scheduler=None if scheduler is None else _read_json(scheduler),
        pipeline=str(index.get("_class_name", "")),
        others=others,
    )
    _require_family(configs)
    return dataclasses.replace(read_weights(file), content=configs)


def _snapshot(folder: Path) -> Path:
    """In the cache of the hub, the folder of the revision that `main` is; else the folder itself."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    names = _listed(snapshots)
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size < 200:
        wanted = main.read_text(encoding="utf-8", errors="replace").strip()
        names = [name for name in names if name == wanted] or names
    if len(names) != 1:
        raise ArtefactError(f"{show(snapshots)} has {len(names)} revisions: name one of its folders")
    return snapshots / names[0]


def _pipeline_of(folder: Path) -> Path:
    """The folder of the pipeline that a folder of a network is a part of; else the folder itself."""
    alone = not (folder / _INDEX).is_file() and _scheduler_file(folder) is None
    above = folder.resolve().parent
    return above if alone and folder.resolve().name == "unet" and (above / _INDEX).is_file() else folder


def _scheduler_file(folder: Path) -> Path | None:
    names = ("scheduler/scheduler_config.json", "scheduler_config.json", "scheduler/config.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _listed(folder: Path) -> list[str]:
    """The names in a folder, in order. Raises ArtefactError where they are absurdly many."""
    try:
        names = [entry.name for entry in itertools.islice(folder.iterdir(), _MOST_FILES + 1)]
    except OSError as error:
        raise ArtefactError(f"{show(folder)} cannot be read: {first_line(error)}") from error
    if len(names) > _MOST_FILES:
        raise ArtefactError(f"{show(folder)} has more than {_MOST_FILES} files: it is no folder of a network")
    return sorted(names)


def _weights_file(folder: Path, named: str | None, variant: str | None) -> tuple[Path, tuple[str, ...]]:
    """The file of weights to read, and the variants that were left."""
    names = _listed(folder)
    found: dict[str, str] = {}
    for name in names:  # .bin comes first, so that .safetensors stands in its place
        if match := _WEIGHTS.fullmatch(name):
            found[match["variant"] or ""] = name
    if shards := [name for name in names if _SHARDS.fullmatch(name)]:
        found = {key: name for key, name in found.items() if name not in shards}
        if not found and named is None:
            raise ArtefactError(
                f"the weights in {show(folder)} are split into several files ({show(shards[0])}): save them as one, "
                'with save_pretrained(FOLDER, max_shard_size="100GB")'
            )
    if not found:
        raise ArtefactError(
            f"{show(folder)} has no weights: diffusion_pytorch_model.safetensors or .bin is needed beside its "
            f"{_CONFIG}"
        )
    if variant is not None and variant not in found:
        known = ", ".join(show(key) for key in found if key) or "none"
        raise SettingError(f"{show(folder)} has no weights of the variant --key {variant}: it has {known}")
    # Without a variant first; of what else there is, that with more bits.
    key = variant if variant is not None else min(found, key=lambda key: (key != "", "16" in key, key))
    chosen = named if named is not None and variant is None else found[key]
    return folder / chosen, tuple(other for other, name in found.items() if other and name != chosen)


def _word(text: object) -> str:
    """A text out of a configuration, for a message: one short line."""
    return show(str(text)[:_MOST_TEXT])


def _read_json(path: Path) -> dict[str, Any]:
    """An object out of a file. Raises ArtefactError where it is none, or too large to be one of diffusers."""
    require_file(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ArtefactError(f"{show(path)} is too large for a configuration of diffusers")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{show(path)} is not a whole JSON file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{show(path)} holds no names and values")
    return content


def _require_pixels(index: Mapping[str, Any], folder: Path) -> None:
    """Refuse pipelines of which the network is only a part of the model."""
    for parts, what in ((_LATENT, "works on latents, not on pixels"), (_CONDITION, "is conditioned on more")):
        if there := [part for part in parts if index.get(part) not in (None, [None, None])]:
            raise ArtefactError(
                f"{show(folder)} is a {_word(index.get('_class_name', 'pipeline'))} that {what} (it has a "
                f"{there[0]}), which is not supported: a pipeline of a UNet2DModel and a scheduler is needed"
            )


# Names of other networks; a class that is none of them may be somebody's own subclass of UNet2DModel.
_ANOTHER: Final = re.compile(
    r"Condition|VQ|Autoencoder|VAE|Transformer|ControlNet|[13]D|Motion|Prior|UVit|Adapter|Kandinsky"
)


def _require_family(configs: Configs) -> None:
    kind = str(configs.network.get("_class_name", "UNet2DModel"))
    if _ANOTHER.search(kind):
        raise ArtefactError(
            f"{configs.name} is of a {_word(kind)}, which is another network: only UNet2DModel is supported"
        )
    if configs.network.get("cross_attention_dim") is not None:
        raise ArtefactError(f"{configs.name} has cross_attention_dim: conditioned networks are not supported")


# --- the network ----------------------------------------------------------------------------------

Names_ = Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)]


class _Network(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of UNet2DModel, with the defaults of its constructor."""

    # Without bounds, as msgspec 0.22 crashes on a bounded number or a pair; the ModelSpec has them.
    sample_size: int | tuple[int, int] | None = None
    in_channels: Size = 3
    out_channels: Size = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: Annotated[int, msgspec.Meta(ge=0, le=16_384)] | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: Names_ = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: Names_ = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=16)] = (
        224,
        448,
        672,
        896,
    )
    layers_per_block: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: Size | None = 8  # null is one head
    norm_num_groups: Size = 32
    attn_norm_num_groups: Size | None = None
    norm_eps: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    num_train_timesteps: int | None = None  # of a learned embedding alone

    def refusal(self) -> str | None:
        """What of it cannot be carried, and why; None: nothing."""
        blocks = (self.down_block_types, self.up_block_types)
        levels = len(self.block_out_channels)
        reasons = {
            f"down_block_types and up_block_types are not {levels} each, as block_out_channels": any(
                len(names) != levels for names in blocks
            ),
            "center_input_sample: its first convolution sees 2x - 1, which at the padded border is not x": (
                self.center_input_sample
            ),
            f"time_embedding_type {_word(self.time_embedding_type)}: only positional is a table of sinusoids": (
                self.time_embedding_type != "positional"
            ),
            f"freq_shift {self.freq_shift}: only 0 and 1 are known": self.freq_shift not in (0, 1),
            f"mid_block_type {_word(self.mid_block_type)}: only UNetMidBlock2D is supported": (
                self.mid_block_type != "UNetMidBlock2D"
            ),
            "mid_block_scale_factor other than 1": self.mid_block_scale_factor != 1,
            f"downsample_padding {_word(self.downsample_padding)}: only 0 and 1 are known": (
                self.downsample_padding not in (0, 1)
            ),
            "downsample_type and upsample_type: only conv and resnet are known": any(
                kind not in (None, "conv", "resnet") for kind in (self.downsample_type, self.upsample_type)
            ),
            f"act_fn {_word(self.act_fn)}: only silu, which is swish, is supported": (
                self.act_fn.lower() not in ("silu", "swish")
            ),
            f"resnet_time_scale_shift {_word(self.resnet_time_scale_shift)}: only default and scale_shift are known": (
                self.resnet_time_scale_shift not in ("default", "scale_shift")
            ),
            f"class_embed_type {_word(self.class_embed_type)}: only null and timestep are tables of classes": (
                self.class_embed_type not in (None, "timestep")
            ),
            f"in_channels {self.in_channels} and out_channels {self.out_channels}: its input holds more than the "
            "image, or its output less": self.out_channels not in (self.in_channels, 2 * self.in_channels),
        }
        return next((reason for reason, found in reasons.items() if found), None)


# Of each block, whether it has attention, and whether a residual block resamples: None is as downsample_type says.
_DOWN: Final[dict[str, tuple[bool, bool | None]]] = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
_UP: Final[dict[str, tuple[bool, bool | None]]] = {
    "UpBlock2D": (False, False),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, True),
}


def _blocks(
    names: Iterable[str], known: Mapping[str, tuple[bool, bool | None]], resampling: str | None, where: str
) -> tuple[list[bool], list[bool]]:
    """Which levels have attention, and which resample by a residual block."""
    attention, resamples = [], []
    for name in names:
        short = name.removeprefix("UNetRes")  # before 0.1
        if short not in known:
            raise ArtefactError(
                f"{where}: {_word(name)} is a block of another network: only {', '.join(known)} are supported"
            )
        attends, by_block = known[short]
        attention.append(attends)
        resamples.append(resampling == "resnet" if by_block is None else by_block)
    return attention, resamples


def _unet(fields: _Network, where: str) -> UNetConfig:
    """The network's shape. Raises ArtefactError where ours has none like it."""
    down, halving = _blocks(fields.down_block_types, _DOWN, fields.downsample_type, where)
    up, doubling = _blocks(reversed(fields.up_block_types), _UP, fields.upsample_type, where)
    last = len(down) - 1
    for what, ways in (("attention", zip(down, up, strict=True)), ("resampling", _both(halving, doubling))):
        for level in (number for number, (one, other) in enumerate(ways) if one != other):
            raise ArtefactError(
                f"{where}: the {what} of {show(fields.down_block_types[level])} on the way down is not that of "
                f"{show(fields.up_block_types[last - level])} on the way up, which is not supported"
            )
    scale_shift = fields.resnet_time_scale_shift == "scale_shift"
    # The middle's attention has a norm of its own number of groups, or with scale_shift none.
    groups = fields.attn_norm_num_groups or (0 if scale_shift else None)
    return UNetConfig(
        channels=fields.block_out_channels[0],
        widths=fields.block_out_channels,
        time_width=fields.time_embedding_dim or 4 * fields.block_out_channels[0],
        blocks=fields.layers_per_block,
        attention_levels=tuple(level for level, there in enumerate(down) if there),
        head_channels=fields.attention_head_dim,
        groups=fields.norm_num_groups,
        norm_eps=fields.norm_eps,
        padding="symmetric" if fields.downsample_padding else "asymmetric",
        scale_shift=scale_shift,
        resampling_blocks=tuple(
            level
            for level in range(last + 1)
            if (level < last and halving[level]) or (level > 0 and doubling[level])
        ),
        middle_attention=fields.add_attention,
        middle_groups=groups if fields.add_attention else None,
        dropout=fields.dropout,
    )


def _both(halving: list[bool], doubling: list[bool]) -> Iterable[tuple[bool, bool]]:
    """How each level halves and doubles: the first only halves, and the last only doubles."""
    yield from [(halving[0], halving[0]), *zip(halving[1:-1], doubling[1:-1], strict=True)]


def _names(config: UNetConfig, old: bool) -> Names:
    last = len(config.widths) - 1

    def block_at(place: Place) -> str:
        conv = "" if place.level in config.resampling_blocks else ".conv"
        match place.part:
            case "down":
                return f"down_blocks.{place.level}.resnets.{place.number}"
            case "halve":
                return f"down_blocks.{place.level}.downsamplers.0{conv}"
            case "middle":
                return f"mid_block.resnets.{place.number}"
            case "up":
                return f"up_blocks.{last - place.level}.resnets.{place.number}"
            case "double":
                return f"up_blocks.{last - place.level}.upsamplers.0{conv}"

    def attention_at(place: Place) -> str:
        return block_at(place).replace("resnets", "attentions")

    projections = {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
    if not old:
        projections = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    return Names(
        outside={
            "temb1": "time_embedding.linear_1",
            "temb2": "time_embedding.linear_2",
            "label_embedding": "class_embedding",
            "conv_in": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "temb": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "shortcut": "conv_shortcut",
        },
        attention={"norm": "group_norm", **projections},
        block_at=block_at,
        attention_at=attention_at,
    )


_TABLE_MOST: Final = 2**26  # numbers in a table of classes


def _with_class_table(weights: Weights, spec: ModelSpec) -> Weights:
    """With the classes' embedding as a table, where the network makes it of sinusoids: MLP(sinusoid(k)) for k < N."""
    assert spec.network is not None
    width, state = spec.network.time_width, dict(weights.state)
    if spec.num_classes * width > _TABLE_MOST:
        raise ArtefactError(f"{weights.name}: a table of {spec.num_classes} classes is larger than supported")
    layers: list[Tensor] = []
    for layer, shape in (("linear_1", (width, spec.embedding.dim)), ("linear_2", (width, width))):
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            name = f"class_embedding.{layer}.{kind}"
            if (got := weights.shape(name)) != wanted:
                raise ArtefactError(f"{weights.name}: {show(name)} is {got}, and {wanted} is needed")
            layers.append(state.pop(name).double())
    sinusoids = torch.from_numpy(spec.embedding.table(spec.num_classes)).double()
    hidden = F.silu(F.linear(sinusoids, *layers[:2]))
    state["class_embedding.weight"] = F.linear(hidden, *layers[2:]).float()
    return dataclasses.replace(weights, state=state)


# --- the scheduler --------------------------------------------------------------------------------


class _Scheduler(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of DDPMScheduler, DDIMScheduler and DPMSolverMultistepScheduler that have a say here.

    What has another default in each is None.
    """

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[Beta, ...], msgspec.Meta(max_length=100_000)] | None = None
    variance_type: str | None = None
    clip_sample: bool | None = None
    clip_sample_range: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    prediction_type: str | None = None
    predict_epsilon: bool = True  # in its place, before 0.10
    timestep_spacing: str | None = None
    steps_offset: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    rescale_betas_zero_snr: bool = False
    # Of DPM-Solver++ alone.
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    use_dynamic_shifting: bool | None = False
    final_sigmas_type: str | None = "zero"
    lambda_min_clipped: float = -np.inf

    def refusal(self, multistep: bool) -> str | None:
        """What of it cannot be carried; None: nothing. multistep: whether it is a DPM-Solver++."""
        reasons = {
            "thresholding: its clipping depends on the whole image": self.thresholding,
            "rescale_betas_zero_snr: its last timestep has no signal, which no step can divide by": (
                self.rescale_betas_zero_snr
            ),
            "use_dynamic_shifting: its timesteps depend on the image's size": self.use_dynamic_shifting,
        }
        if multistep:
            reasons |= {
                f"algorithm_type {_word(self.algorithm_type)}: only dpmsolver++ is here": (
                    self.algorithm_type not in ("dpmsolver++", "deis")
                ),
                f"solver_order {_word(self.solver_order)}: only 1 and 2 are here": self.solver_order
                not in (1, 2),
                f"solver_type {_word(self.solver_type)}: only midpoint is here": (
                    self.solver_order == 2 and self.solver_type == "heun"
                ),
                f"final_sigmas_type {_word(self.final_sigmas_type)}: only zero is here": (
                    self.final_sigmas_type not in (None, "zero")
                ),
                "lambda_min_clipped: it begins below T - 1": self.lambda_min_clipped > -1e9,
            } | {
                f"{name}: its timesteps are not whole ones of the training": bool(getattr(self, name))
                for name in self.__struct_fields__
                if name.startswith("use_") and name != "use_dynamic_shifting"
            }
        return next((reason for reason, found in reasons.items() if found), None)


_PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_VARIANCES: Final[dict[str, Variance]] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_SCHEDULES: Final[dict[str, Callable[[float, float], BetaSchedule]]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
    "squaredcos_cap_v2": lambda start, end: CosineBetas(),
    "sigmoid": SigmoidBetas,
}
_SPACINGS: Final[dict[str, Spacing]] = {name: name for name in ("leading", "trailing", "linspace")}
_DPM_SPACINGS: Final[dict[str, Spacing]] = {
    "leading": "dpm-leading",
    "trailing": "trailing",
    "linspace": "dpm-linspace",
}
Kind = Literal["DDPM", "DDIM", "DPM-Solver++"]
_KINDS: Final[dict[str, Kind]] = {
    "DDPMScheduler": "DDPM",
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
}
# Solvers that are not here, for the same networks on the same schedules.
_OTHER_SOLVERS: Final = (
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
# Steps of each, and whose number that is.
_STEPS: Final[dict[Kind, tuple[int, str]]] = {
    "DDPM": (1000, "the default of DDPMPipeline"),
    "DDIM": (50, "the default of DDIMPipeline"),
    "DPM-Solver++": (20, "what its documentation shows"),
}
_Value = TypeVar("_Value")


def _known(of: Mapping[str, _Value], value: str, name: str, where: str) -> _Value:
    if value not in of:
        raise ArtefactError(f"{where}: {name} {_word(value)} is not supported: only {', '.join(of)} are")
    return of[value]


@dataclass(frozen=True)
class _Read:
    """A scheduler's configuration, read. kind: its solver. where: for messages."""

    fields: _Scheduler
    kind: Kind
    where: str
    words: tuple[str, ...] = ()

    def schedule(self) -> BetaSchedule:
        """By name. Raises ArtefactError where it has none."""
        fields = self.fields
        if fields.trained_betas is None:
            make = _known(_SCHEDULES, fields.beta_schedule, "beta_schedule", self.where)
            return make(fields.beta_start, fields.beta_end)
        if len(fields.trained_betas) != fields.num_train_timesteps:
            raise ArtefactError(
                f"{self.where}: {len(fields.trained_betas)} trained_betas are not of {fields.num_train_timesteps} "
                "num_train_timesteps"
            )
        found = recognise(np.array(fields.trained_betas, np.float64))
        if found is None:
            raise ArtefactError(
                f"{self.where}: its trained_betas are those of no schedule that is known by name, and a ModelSpec "
                "holds only the name"
            )
        return found

    def prediction(self) -> Prediction:
        before = "epsilon" if self.fields.predict_epsilon else "sample"
        kind = self.fields.prediction_type or before
        return _known(_PREDICTIONS, kind, "prediction_type", self.where)

    def clip(self) -> bool | tuple[float, float]:
        """DPM-Solver++ clips nothing."""
        most = self.fields.clip_sample_range
        if self.kind == "DPM-Solver++" or self.fields.clip_sample is False:
            return False
        return True if most == 1.0 else (-most, most)

    def sampling(self) -> Sampling:
        """Its chain, as its own loop runs it."""
        fields, ours = self.fields, self.kind == "DPM-Solver++"
        default = "linspace" if ours else "leading"
        spacing = fields.timestep_spacing or default
        known = _DPM_SPACINGS if ours else _SPACINGS
        solvers: dict[Kind, Solver] = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++": "dpmpp-2m"}
        steps = _STEPS[self.kind][0]
        first_order = ours and fields.solver_order == 1  # which is DDIM
        return Sampling(
            solver="ddim" if first_order else solvers[self.kind],
            steps=steps if steps < fields.num_train_timesteps else None,
            spacing=_known(known, spacing, "timestep_spacing", self.where),
            offset=fields.steps_offset if spacing == "leading" else 0,
            fixed_stride=self.kind == "DDIM",
            raw_epsilon=True,
            to_first=self.kind == "DDIM" and not fields.set_alpha_to_one,
            noise_to_end=self.kind == "DDPM",
        )

    def said(self, sampling: Sampling) -> str:
        """Of its chain, for people."""
        number, whose = _STEPS[self.kind]
        steps = sampling.steps or f"all {self.fields.num_train_timesteps}"
        why = f": {whose}" if number >= self.fields.num_train_timesteps or sampling.steps else ""
        return f"its own chain is {sampling.solver} of {steps} steps ({self.kind}{why}), {sampling.spacing}"


def _scheduler(configs: Configs, told: Told[DiffusersFlags]) -> _Read:
    """The scheduler's configuration with the flags in place of what they name; without one, what they and we say."""
    flags, found = told.flags, configs.scheduler
    names = [name for name in DiffusersFlags.__struct_fields__ if name in _Scheduler.__struct_fields__]
    given = {name: value for name in names if (value := getattr(flags, name)) is not None}
    if "beta_schedule" in given:
        given["trained_betas"] = None
    if found is None:
        assumed = {
            "num_train_timesteps": told.get("num_train_timesteps", 1000),
            "beta_schedule": told.get("beta_schedule", "linear", "squaredcos_cap_v2", "scaled_linear"),
            "prediction_type": told.get("prediction_type", "epsilon", "v_prediction", "sample"),
            "clip_sample": told.get("clip_sample", True, False),
        }
        return _Read(_convert(assumed | given, _Scheduler, configs.name), "DDPM", configs.name)
    name = str(found.get("_class_name", "DDPMScheduler"))
    where, words = f"the scheduler of {configs.name}", []
    if configs.pipeline == "DDIMPipeline":  # whose constructor makes a DDIMScheduler of any
        name = "DDIMScheduler"
    if name not in _KINDS and name not in _OTHER_SOLVERS:
        raise ArtefactError(
            f"{where} is a {_word(name)}, which is not supported: save the pipeline with the DDPMScheduler that it was "
            "trained with, or name the folder of its network outside the pipeline, and its schedule by flags"
        )
    fields = _convert(found | given, _Scheduler, where)
    kind = _KINDS.get(name, "DDPM")
    if name in _OTHER_SOLVERS:
        words.append(f"its {name} is not here: its schedule is taken, and the chain is ddpm's")
        fields = msgspec.structs.replace(fields, timestep_spacing="leading", steps_offset=0)
        if fields.clip_sample is None:
            fields = msgspec.structs.replace(fields, clip_sample=told.get("clip_sample", True, False))
    if reason := fields.refusal(multistep=kind == "DPM-Solver++"):
        raise ArtefactError(f"{where} has {reason}, which is not supported")
    return _Read(fields, kind, where, tuple(words))


def _variance(read: _Read, told: Told[DiffusersFlags], learns: bool, configs: Configs) -> Variance:
    """Of the reverse steps; only DDPM's configuration says it."""
    kind = read.fields.variance_type
    if kind is None and learns:
        kind = told.flags.variance_type or "learned_range"
    elif kind is None and (configs.scheduler or {}).get("_class_name") == "DDPMScheduler":
        kind = "fixed_small"  # the default of its constructor
    elif kind is None:
        kind = told.get("variance_type", "fixed_small", "fixed_large")
    variance = _known(_VARIANCES, kind, "variance_type", read.where)
    if (variance == "learned_range") != learns:
        channels = f"{configs.network.get('in_channels', 3)} in, {configs.network.get('out_channels', 3)} out"
        raise ArtefactError(
            f"{read.where}: variance_type {_word(kind)} is not of a network with channels {channels}"
        )
    return variance


# --- all of it ------------------------------------------------------------------------------------


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return "time_embedding.linear_1.weight" in names and "conv_norm_out.weight" in names


def read(weights: Weights, told: Told[DiffusersFlags]) -> Imported:
    """The network and spec of weights with their `Configs`.

    Raises ArtefactError where a part of the configuration is of no network or chain that is here, or the weights are
    not those of such a network; SettingError where a flag is needed.
    """
    configs = weights.content
    if not isinstance(configs, Configs):
        raise ArtefactError(
            f"{weights.name} is of diffusers, and says nothing of itself: its {_CONFIG} is needed beside it"
        )
    fields = _convert(configs.network, _Network, configs.name)
    if reason := fields.refusal():
        raise ArtefactError(f"{configs.name} has {reason}, which is not supported")
    scheduler = _scheduler(configs, told)
    network, sampling = _unet(fields, configs.name), scheduler.sampling()
    spec = _spec(
        configs.name,
        image_shape=(fields.in_channels, *_image_size(fields, told)),
        timesteps=scheduler.fields.num_train_timesteps,
        schedule=scheduler.schedule(),
        prediction=scheduler.prediction(),
        variance=_variance(scheduler, told, fields.out_channels != fields.in_channels, configs),
        clip=scheduler.clip(),
        sampling=sampling,
        embedding=SinusoidalEmbedding(
            dim=fields.block_out_channels[0],
            spacing="half-1" if fields.freq_shift else "half",
            order="cos-sin" if fields.flip_sin_to_cos else "sin-cos",
        ),
        network=network,
        num_classes=_classes(fields, told),
    )
    if fields.class_embed_type == "timestep":
        weights = _with_class_table(weights, spec)
    old = any(name.endswith(".proj_attn.weight") for name in weights.state)
    unet = build_family(weights, spec, _names(network, old))
    recognised = [*_said(weights, configs), *scheduler.words, scheduler.said(sampling)]
    return Imported(unet, spec, "diffusers", tuple(recognised), tuple(told.assumed))


def _spec(where: str, **fields: Any) -> ModelSpec:
    """A spec in which every number is in its range. Raises ArtefactError where one is not."""
    try:
        return new_spec(**fields)
    except SettingError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _image_size(fields: _Network, told: Told[DiffusersFlags]) -> tuple[int, int]:
    """Height and width: as told, or as the configuration says."""
    size = fields.sample_size
    if told.flags.image_size is not None or size is None:
        return told.image_size()
    return (size, size) if isinstance(size, int) else size


def _classes(fields: _Network, told: Told[DiffusersFlags]) -> int:
    count = fields.num_class_embeds
    if fields.class_embed_type == "timestep" and count is None:
        return int(
            told.need("num_class_embeds", "its classes are numbers like timesteps, and nothing counts them")
        )
    return int(told.agrees("num_class_embeds", count)) if count else 0


def _said(weights: Weights, configs: Configs) -> list[str]:
    """What the files say, for people."""
    kind = _word(configs.network.get("_class_name", "UNet2DModel"))
    version = _word(configs.network.get("_diffusers_version", "unknown"))
    pipeline = _word(configs.pipeline) if configs.pipeline else "no pipeline"
    lines = [f"{kind} of diffusers {version}, in {pipeline}; weights of {weights.name}"]
    if kind != "UNet2DModel":
        lines.append(f"{kind} is taken for a UNet2DModel by its fields, whatever it does beside")
    ignored = [
        _word(name)
        for found, known in ((configs.network, _Network), (configs.scheduler or {}, _Scheduler))
        for name, value in found.items()
        if name not in (*known.__struct_fields__, *_IDLE) and value not in (None, False) and name[:1] != "_"
    ]
    if ignored:
        more = f" and {len(ignored) - 10} more" if len(ignored) > 10 else ""
        lines.append(f"not known, and ignored: {', '.join(ignored[:10])}{more}")
    if configs.others:
        lines.append(f"other weights there: {', '.join(configs.others)} (--key takes one)")
    return lines


# Fields that change nothing here: of thresholding, of other solvers, and of an average's own configuration.
_IDLE: Final = (
    *("dynamic_thresholding_ratio", "sample_max_value", "lower_order_final", "euler_at_final", "flow_shift"),
    *("time_shift_type", "tensor_format", "skip_prk_steps", "decay", "inv_gamma", "min_decay", "power"),
    *(
        "optimization_step",
        "update_after_step",
        "use_ema_warmup",
        "interpolation_type",
        "solver_p",
        "predict_x0",
    ),
)

S = TypeVar("S", bound=msgspec.Struct)


def _convert(found: Mapping[str, Any], kind: type[S], where: str) -> S:
    """Its fields. Raises ArtefactError where one has no such value."""
    try:
        return msgspec.convert(dict(found), kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtefactError(f"{where} is not sound: {first_line(error)}") from error
