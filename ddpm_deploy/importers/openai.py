"""OpenAI's improved-diffusion and guided-diffusion: state dicts without a word on their settings.

Widths, blocks, attention and what else has weights are read off these. Heads, their order, the images' size, the
schedule and the scale of the timesteps are in their flags alone.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.family import Names, Place, build_family
from ddpm_deploy.importers.flags import OpenAIFlags
from ddpm_deploy.importers.imported import Imported, Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.schedule import BetaSchedule, CosineBetas, LinearBetas
from ddpm_deploy.spec import ModelSpec, Sampling, UNetConfig
from ddpm_deploy.words import Variance

NAME: Final = "OpenAI"


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return "input_blocks.0.0.weight" in names and "time_embed.0.weight" in names


def read(weights: Weights, told: Told[OpenAIFlags]) -> Imported:
    """The network and spec of a state dict.

    Raises ArtefactError where the weights are not those of such a network; SettingError where a flag is needed,
    or says other than they do.
    """
    height, width = told.image_size()
    config = _config(weights, told)
    channels, out = weights.shape("input_blocks.0.0.weight")[1], weights.shape("out.2.weight")[0]
    learned = told.agrees("learn_sigma", out == 2 * channels)
    timesteps = told.get("diffusion_steps", 1000, 4000)
    rescaled = timesteps != 1000 and told.get("rescale_timesteps", True, False)
    large: Variance = "fixed_small" if told.flags.sigma_small else "fixed_large"
    classes = weights.shape("label_emb.weight")[0] if "label_emb.weight" in weights else 0
    told.agrees("class_cond", bool(classes))
    spec = ModelSpec(
        image_shape=(channels, height, width),
        timesteps=timesteps,
        schedule=_schedule(told.get("noise_schedule", "linear", "cosine"), timesteps),
        prediction="x0" if told.get("predict_xstart", False, True) else "epsilon",
        variance="learned_range" if learned else large,
        clip=told.flags.clip_denoised is not False,
        sampling=Sampling(spacing="openai"),
        embedding=SinusoidalEmbedding(
            dim=weights.shape("time_embed.0.weight")[1],
            spacing="half",
            order="cos-sin",
            scale=1000 / timesteps if rescaled else 1.0,
        ),
        network=config,
        num_classes=classes,
    )
    legacy = not told.get("use_new_attention_order", False, True)
    network = build_family(weights, spec, _names(config, legacy))
    return Imported(network, spec, "improved-diffusion or guided-diffusion", (), tuple(told.assumed))


def _config(weights: Weights, told: Told[OpenAIFlags]) -> UNetConfig:
    """The network's shape: what the weights say of it, and their flags of the heads."""
    stages = _count(weights, "output_blocks")
    doubled = [n for n in range(stages) if _doubling(weights, n)]
    levels, blocks = len(doubled) + 1, (doubled[0] if doubled else stages - 1)
    if blocks < 1 or stages != levels * (blocks + 1):
        raise ArtefactError(f"{weights.name} is not whole: its {stages} output_blocks make no levels")
    told.agrees("num_res_blocks", blocks)
    first = [1 + level * (blocks + 1) for level in range(levels)]  # input block of each level
    halved = [f"input_blocks.{n - 1}.0" for n in first[1:]]
    if any(
        f"{name}.op.weight" not in weights and f"{name}.in_layers.0.weight" not in weights for name in halved
    ):
        raise ArtefactError(f"{weights.name} halves its images without weights, which is not supported")
    widths = tuple(weights.shape(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in first)
    head_channels = told.flags.num_head_channels or -1
    heads = 1 if head_channels > 0 else told.get("num_heads", 4, 1, 2, 8)
    if told.flags.num_heads_upsample not in (None, -1, heads):
        raise SettingError("--num_heads_upsample other than --num_heads is not supported")
    return UNetConfig(
        channels=weights.shape("input_blocks.0.0.weight")[0],
        widths=widths,
        time_width=weights.shape("time_embed.0.weight")[0],
        blocks=blocks,
        attention_levels=tuple(i for i, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in weights),
        heads=heads,
        head_channels=head_channels if head_channels > 0 else None,
        norm_eps=1e-5,
        padding="symmetric",
        scale_shift=weights.shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        resampling_blocks=tuple(
            level for level in range(levels) if _resamples_by_block(weights, level, first, blocks)
        ),
        dropout=told.flags.dropout or 0.0,
    )


def _count(weights: Weights, prefix: str) -> int:
    """How many parts a list has, by the largest number behind its name."""
    numbers = [name.split(".")[1] for name in weights.state if name.startswith(f"{prefix}.")]
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 5), default=-1)


def _doubling(weights: Weights, stage: int) -> bool:
    return any(
        f"output_blocks.{stage}.{place}.{name}.weight" in weights
        for place in (1, 2)
        for name in ("conv", "in_layers.0")
    )


def _resamples_by_block(weights: Weights, level: int, first: list[int], blocks: int) -> bool:
    """Whether a level ends in a residual block that halves the resolution, and one that doubles it."""
    stage = (len(first) - level) * (blocks + 1) - 1
    behind = [f"input_blocks.{first[level] + blocks}.0"] if level < len(first) - 1 else []
    behind += [f"output_blocks.{stage}.{place}" for place in (1, 2) if level]
    return any(f"{name}.in_layers.0.weight" in weights for name in behind)


def _schedule(name: str, timesteps: int) -> BetaSchedule:
    if name == "linear":  # of the same shape whatever T is
        return LinearBetas(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps)
    if name == "cosine":
        return CosineBetas()
    raise SettingError(f"--noise_schedule {name} is not known: choose from linear, cosine")


def _names(config: UNetConfig, legacy: bool) -> Names:
    def block_at(place: Place) -> str:
        match place.part:
            case "down":
                return f"input_blocks.{place.position + 1}.0"
            case "halve":
                inside = "" if place.level in config.resampling_blocks else ".op"
                return f"input_blocks.{place.position + 1}.0{inside}"
            case "middle":
                return f"middle_block.{2 * place.number}"
            case "up":
                return f"output_blocks.{stage(place)}.0"
            case "double":
                behind = 1 + (place.level in config.attention_levels)
                inside = "" if place.level in config.resampling_blocks else ".conv"
                return f"output_blocks.{stage(place) - 1}.{behind}{inside}"

    def stage(place: Place) -> int:
        return (len(config.widths) - 1 - place.level) * (config.blocks + 1) + place.number

    def attention_at(place: Place) -> str:
        return "middle_block.1" if place.part == "middle" else f"{block_at(place)[:-1]}1"

    return Names(
        outside={
            "temb1": "time_embed.0",
            "temb2": "time_embed.2",
            "label_embedding": "label_emb",
            "conv_in": "input_blocks.0.0",
            "norm_out": "out.0",
            "conv_out": "out.2",
        },
        block={
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "temb": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "shortcut": "skip_connection",
        },
        attention={"norm": "norm", "qkv": "qkv", "out": "proj_out"},
        block_at=block_at,
        attention_at=attention_at,
        order=_by_head if legacy else _as_it_is,
    )


def _by_head(qkv: Tensor, heads: int) -> Tensor:
    """Rows that go head by head, each with its q, k and v → all of q, of k, of v."""
    rows = qkv.reshape(heads, 3, -1, *qkv.shape[1:])
    return torch.movedim(rows, 1, 0).reshape(qkv.shape)


def _as_it_is(qkv: Tensor, heads: int) -> Tensor:
    return qkv
