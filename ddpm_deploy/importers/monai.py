"""MONAI's two-dimensional DiffusionModelUNet, and that of MONAI Generative before it: into our own U-Net.

Levels, widths, attention and classes are read off the weights. The groups and the ε of the norms, the width of the
heads, the images' size and range and all of the scheduler are in their configuration alone.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Final, TypeVar

import torch

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.files import show
from ddpm_deploy.importers.family import Names, Place, build_family
from ddpm_deploy.importers.flags import MonaiFlags
from ddpm_deploy.importers.imported import Imported, new_spec
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.schedule import BetaSchedule, CosineBetas, LinearBetas, ScaledLinearBetas, SigmoidBetas
from ddpm_deploy.spec import Sampling, UNetConfig
from ddpm_deploy.words import Prediction, Variance

NAME: Final = "MONAI"

_SCHEDULES: Final[dict[str, type[LinearBetas | ScaledLinearBetas | SigmoidBetas]]] = {
    "linear_beta": LinearBetas,
    "scaled_linear_beta": ScaledLinearBetas,
    "sigmoid_beta": SigmoidBetas,
}
_PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_VARIANCES: Final[dict[str, Variance]] = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}

V = TypeVar("V")


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return "conv_in.conv.weight" in names and "time_embed.0.weight" in names


def read(weights: Weights, told: Told[MonaiFlags]) -> Imported:
    """The network and spec of a state dict.

    Raises ArtefactError where the weights are not those of such a network in two dimensions and without a context;
    SettingError where a flag is needed, is not supported, or says other than the weights do.
    """
    channels = _image_channels(weights, told)
    height, width = told.image_size()
    config = _config(weights, told)
    classes = weights.shape("class_embedding.weight")[0] if "class_embedding.weight" in weights else 0
    told.agrees("num_class_embeds", classes)
    spec = new_spec(
        image_shape=(channels, height, width),
        value_range=_range(told.get("value_range", (0.0, 1.0), (-1.0, 1.0))),
        clip=_clip(told),
        timesteps=told.get("num_train_timesteps", 1000),
        schedule=_schedule(told),
        prediction=_named(
            "prediction_type", told.get("prediction_type", "epsilon", "v_prediction"), _PREDICTIONS
        ),
        variance=_variance(told),
        sampling=Sampling(spacing="linspace", fixed_stride=True, raw_epsilon=True),
        embedding=SinusoidalEmbedding(
            dim=weights.shape("time_embed.0.weight")[1], spacing="half", order="cos-sin"
        ),
        network=config,
        num_classes=classes,
    )
    whole = _with_projections(weights, told)
    network = build_family(whole, spec, _names(whole, config))
    return Imported(network, spec, "MONAI's DiffusionModelUNet", (), tuple(told.assumed))


def _image_channels(weights: Weights, told: Told[MonaiFlags]) -> int:
    """C of the images. Raises ArtefactError where the network is of another kind than ours."""
    first, last = weights.shape("conv_in.conv.weight"), weights.shape("out.2.conv.weight")
    told.agrees("spatial_dims", len(first) - 2)
    if len(first) != 4 or len(last) != 4:
        raise ArtefactError(
            f"{weights.name} is a network of {len(first) - 2} spatial dimensions: only those of 2 are supported"
        )
    if any(".transformer_blocks." in name for name in weights.state) or told.flags.with_conditioning:
        raise ArtefactError(
            f"{weights.name} attends to a context (with_conditioning), which is not supported: only networks of x and "
            "t, and of class labels, are"
        )
    if last[0] == 2 * first[1]:
        raise ArtefactError(
            f"{weights.name} learned its variance, which MONAI interpolates itself, and not its logarithm: that is "
            "not supported"
        )
    if last[0] != first[1]:
        raise ArtefactError(
            f"{weights.name} takes {first[1]} channels and gives {last[0]}: networks that are given an image beside x "
            "are not supported"
        )
    told.agrees("in_channels", first[1])
    told.agrees("out_channels", last[0])
    return first[1]


def _config(weights: Weights, told: Told[MonaiFlags]) -> UNetConfig:
    """The network's shape: what the weights say of it, and their settings of norms and heads."""
    counts = _counts(weights)
    levels = range(len(counts))
    if len(set(counts)) > 1:
        raise ArtefactError(
            f"{weights.name} has {', '.join(map(str, counts))} residual blocks in its levels: only the same number "
            "in each is supported"
        )
    if told.flags.num_res_blocks not in (None, counts[0], counts):
        raise SettingError(
            f"--num_res_blocks is not what the weights say: they have {counts[0]} in each level"
        )
    widths = tuple(weights.shape(f"down_blocks.{i}.resnets.0.conv1.conv.weight")[0] for i in levels)
    attends = tuple(f"down_blocks.{i}.attentions.0.norm.weight" in weights for i in levels)
    for name in ("channels", "num_channels"):
        told.agrees(name, widths)
    told.agrees("attention_levels", attends)
    by_blocks = "down_blocks.0.downsampler.conv1.conv.weight" in weights
    told.agrees("resblock_updown", by_blocks)
    heads, head_channels = _heads(told, widths, [i for i in levels if attends[i] or i == levels[-1]])
    return UNetConfig(
        channels=weights.shape("conv_in.conv.weight")[0],
        widths=widths,
        time_width=weights.shape("time_embed.0.weight")[0],
        blocks=counts[0],
        attention_levels=tuple(i for i in levels if attends[i]),
        heads=heads,
        head_channels=head_channels,
        groups=_groups(told, widths),
        norm_eps=told.get("norm_eps", 1e-6),
        padding="symmetric",
        resampling_blocks=tuple(levels) if by_blocks else (),
        dropout=0.0,
    )


def _counts(weights: Weights) -> tuple[int, ...]:
    """Residual blocks of each level on the way down. Raises ArtefactError where there are none."""
    counts: list[int] = []
    while f"down_blocks.{len(counts)}.resnets.0.norm1.weight" in weights and len(counts) < 16:
        number = 1
        while f"down_blocks.{len(counts)}.resnets.{number}.norm1.weight" in weights and number < 64:
            number += 1
        counts.append(number)
    if not counts:
        raise ArtefactError(f"{weights.name} is not whole: it has no down_blocks")
    return tuple(counts)


def _groups(told: Told[MonaiFlags], widths: tuple[int, ...]) -> int:
    if any(width % 32 for width in widths):
        return int(told.need("norm_num_groups", f"MONAI's default, 32, does not divide the widths {widths}"))
    return int(told.get("norm_num_groups", 32))


def _heads(told: Told[MonaiFlags], widths: tuple[int, ...], attending: list[int]) -> tuple[int, int | None]:
    """Heads and their width, of the levels that have attention; the middle has that of the last level."""
    if any(widths[level] % 8 for level in attending):
        value = told.need("num_head_channels", f"MONAI's default, 8, does not divide the widths {widths}")
    else:
        value = told.get("num_head_channels", 8, 32, 64)
    each = (
        (value,) * len(widths) if isinstance(value, int) else value if len(value) > 1 else value * len(widths)
    )
    if len(each) != len(widths) or any(each[level] < 1 for level in attending):
        raise SettingError(f"--num_head_channels {value} is not a width for each of {len(widths)} levels")
    sizes = {each[level] for level in attending}
    counts = {widths[level] / each[level] for level in attending}
    if any(count % 1 for count in counts):
        raise SettingError(f"--num_head_channels {value} does not divide the widths of the levels, {widths}")
    if len(sizes) == 1:
        return 1, sizes.pop()
    if len(counts) == 1:
        return int(counts.pop()), None
    raise SettingError(
        f"--num_head_channels {value}: heads that differ from level to level in number and in width are not supported"
    )


def _clip(told: Told[MonaiFlags]) -> bool | tuple[float, float]:
    if not told.get("clip_sample", True):
        return False
    low, high = told.flags.clip_sample_min, told.flags.clip_sample_max
    return -1.0 if low is None else low, 1.0 if high is None else high


def _range(value: tuple[float, ...]) -> tuple[float, float]:
    if len(value) != 2 or not value[0] < value[1]:
        raise SettingError(f"--value_range {value} is not two numbers, the least and the most of the images")
    return value[0], value[1]


def _schedule(told: Told[MonaiFlags]) -> BetaSchedule:
    name = told.get("schedule", "linear_beta", "scaled_linear_beta")
    if name == "cosine":
        return CosineBetas()
    # MONAI Generative's names lack the ending.
    kind = _named("schedule", name if name.endswith("_beta") else f"{name}_beta", _SCHEDULES, "cosine")
    start, end = told.get("beta_start", 1e-4), told.get("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise SettingError(f"--beta_start {start} --beta_end {end} are not two numbers that rise from 0 to 1")
    return kind(start, end)


def _variance(told: Told[MonaiFlags]) -> Variance:
    return _named("variance_type", told.get("variance_type", "fixed_small"), _VARIANCES)


def _named(flag: str, value: str, known: dict[str, V], *more: str) -> V:
    if value not in known:
        raise SettingError(f"--{flag} {value} is not supported: choose from {', '.join([*known, *more])}")
    return known[value]


def _with_projections(weights: Weights, told: Told[MonaiFlags]) -> Weights:
    """The weights with a projection that changes nothing behind each attention, where it has none (include_fc)."""
    values = [name for name in weights.state if name.endswith(("attn.qkv.weight", "attn.to_v.weight"))]
    bare = not any(name.endswith("attn.out_proj.weight") for name in weights.state)
    if not values or not bare:  # MONAI Generative always has one
        told.agrees("include_fc", True)
        return weights
    told.agrees("include_fc", False)
    added = {}
    for name in values:
        width = weights.shape(name)[-1]
        if weights.shape(name) not in (
            (width, width),
            (3 * width, width),
        ):  # before anything is made of that size
            raise ArtefactError(f"{weights.name} is not whole: {show(name)} is {weights.shape(name)}")
        before = name.rpartition("attn.")[0]
        added[f"{before}attn.out_proj.weight"] = torch.eye(width)
        added[f"{before}attn.out_proj.bias"] = torch.zeros(width)
    return replace(weights, state={**weights.state, **added})


# Our names → theirs.
_OUTSIDE: Final = {
    "temb1": "time_embed.0",
    "temb2": "time_embed.2",
    "label_embedding": "class_embedding",
    "conv_in": "conv_in.conv",
    "norm_out": "out.0",
    "conv_out": "out.2.conv",
}
_BLOCK: Final = {
    "norm1": "norm1",
    "conv1": "conv1.conv",
    "temb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2.conv",
    "shortcut": "skip_connection.conv",
}


def _names(weights: Weights, config: UNetConfig) -> Names:
    last = len(config.widths) - 1
    generative = "middle_block.attention.to_q.weight" in weights
    doubling = next(
        (name for name in ("postconv", "conv") if f"up_blocks.0.upsampler.{name}.conv.weight" in weights),
        "postconv",
    )

    def block_at(place: Place) -> str:
        match place.part:
            case "down":
                return f"down_blocks.{place.level}.resnets.{place.number}"
            case "halve":
                inside = "" if config.resampling_blocks else ".op.conv"
                return f"down_blocks.{place.level}.downsampler{inside}"
            case "middle":
                return f"middle_block.resnet_{place.number + 1}"
            case "up":
                return f"up_blocks.{last - place.level}.resnets.{place.number}"
            case "double":
                inside = "" if config.resampling_blocks else f".{doubling}.conv"
                return f"up_blocks.{last - place.level}.upsampler{inside}"

    def attention_at(place: Place) -> str:
        return (
            "middle_block.attention"
            if place.part == "middle"
            else block_at(place).replace(".resnets.", ".attentions.")
        )

    return Names(
        outside=_OUTSIDE,
        block=_BLOCK,
        attention=_attention_names(weights, generative),
        block_at=block_at,
        attention_at=attention_at,
    )


def _attention_names(weights: Weights, generative: bool) -> dict[str, str]:
    if generative:
        return {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "proj_attn"}
    out = {"norm": "norm", "out": "attn.out_proj"}
    if "middle_block.attention.attn.qkv.weight" in weights:
        return {**out, "qkv": "attn.qkv"}
    return {**out, "q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v"}
