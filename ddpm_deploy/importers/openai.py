"""OpenAI's improved-diffusion and guided-diffusion: state dicts without a word on their settings.

Widths, blocks, attention and what else has weights are read off these. Heads, their order, the images' size, the
schedule and the scale of the timesteps are in their flags alone, and flags that say other than the weights are refused.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import torch
from msgspec.structs import replace
from torch import Tensor

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError, plural
from ddpm_deploy.files import show
from ddpm_deploy.importers.family import Names, Place, build_family, in_order
from ddpm_deploy.importers.flags import OpenAIFlags
from ddpm_deploy.importers.imported import Imported, new_spec
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.schedule import BetaSchedule, CosineBetas, LinearBetas, Schedule
from ddpm_deploy.spacings import spaced
from ddpm_deploy.spec import DEFAULT_CHAIN, ModelSpec, Sampling, UNetConfig
from ddpm_deploy.words import Prediction, Solver, Spacing, Variance

NAME: Final = "OpenAI"

# The multiples of --num_channels that their code takes for images of a size by itself; of no two sizes the same.
_SIZES: Final = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
# Flags that improved-diffusion has not. The order of q, k and v is none of these, so that another reading of it changes
# nothing else.
_OF_GUIDED: Final = ("num_head_channels", "resblock_updown", "channel_mult")
_RGB: Final = 3  # channels of the images in their own scripts
_MOST_TIMESTEPS: Final = 100_000


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return "input_blocks.0.0.weight" in names and "time_embed.0.weight" in names


def read(weights: Weights, told: Told[OpenAIFlags]) -> Imported:
    """The network and spec of a state dict.

    Raises ArtefactError where the weights are not those of such a network; SettingError where a flag is needed,
    or says other than they do.
    """
    _refuse_relatives(weights, told.flags)
    config, base = _config(weights, told), _shape(weights, "time_embed.0.weight", 2)[1]
    guided = bool(config.resampling_blocks) or config.channels != base
    guided |= any(getattr(told.flags, name) is not None for name in _OF_GUIDED)
    config = _with_heads(config, guided, told)
    told.agrees("num_channels", base)
    height, width = _image_size(tuple(width / base for width in config.widths), told)
    _require_attention(config, height, told)
    spec = _spec(weights, config, (height, width), guided, told)
    network = build_family(weights, spec, _names(config, _is_legacy(config, told)))
    recognised = (*_recognised(spec, config), *_not_carried(told.flags, spec.timesteps))
    return Imported(network, spec, "improved-diffusion or guided-diffusion", recognised, tuple(told.assumed))


def _spec(
    weights: Weights, config: UNetConfig, size: tuple[int, int], guided: bool, told: Told[OpenAIFlags]
) -> ModelSpec:
    """The spec: what the weights say of the images and labels, and their flags of the diffusion."""
    channels, out = _shape(weights, "input_blocks.0.0.weight", 4)[1], _shape(weights, "out.2.weight", 4)[0]
    learned = told.agrees("learn_sigma", out == 2 * channels)
    variance: Variance = "learned_range" if learned else _fixed(told)
    classes = _shape(weights, "label_emb.weight", 2)[0] if "label_emb.weight" in weights else 0
    told.agrees("class_cond", bool(classes))
    timesteps = told.get("diffusion_steps", 1000, 4000)
    if not 1 <= timesteps <= _MOST_TIMESTEPS:
        raise SettingError(f"--diffusion_steps must be from 1 to {_MOST_TIMESTEPS}, not {timesteps}")
    # Improved-diffusion rescales them unless it is told not to, and guided-diffusion does not; of 1000 it is the same.
    rescaled = timesteps != 1000 and told.get("rescale_timesteps", not guided, guided)
    schedule = _schedule(told.get("noise_schedule", "linear", "cosine"), timesteps)
    prediction: Prediction = "x0" if told.get("predict_xstart", False, True) else "epsilon"
    sampling = _sampling(told.flags, timesteps)
    dim = _shape(weights, "time_embed.0.weight", 2)[1]
    return new_spec(
        image_shape=(channels, *size),
        timesteps=timesteps,
        schedule=schedule,
        prediction=prediction,
        variance=variance,
        clip=told.flags.clip_denoised is not False,
        sampling=sampling,
        embedding=SinusoidalEmbedding(dim, "half", "cos-sin", 1000 / timesteps if rescaled else 1.0),
        network=config,
        num_classes=classes,
    )


def _refuse_relatives(weights: Weights, flags: OpenAIFlags) -> None:
    """Raise where the weights, or the flags, are of a network of theirs, or of their heirs, that is not supported."""
    name, first = weights.name, weights.shape("input_blocks.0.0.weight")
    if len(first) != 4:
        raise ArtefactError(
            f"{name} is of a network of dims {len(first) - 2}: only images, dims 2, are supported"
        )
    if strays := [one for one in weights.state if ".transformer_blocks." in one]:
        raise ArtefactError(
            f"{name} attends to a text or another condition, as latent diffusion does ({show(strays[0])}), which is "
            "not supported"
        )
    if not _numbers(weights, "output_blocks"):
        raise ArtefactError(
            f"{name} is a classifier or an encoder: it has no output_blocks, and makes no images"
        )
    if "label_emb.weight" not in weights and any(one.startswith("label_emb.") for one in weights.state):
        raise ArtefactError(f"{name} makes its condition by a network (label_emb), which is not supported")
    if flags.large_size is not None or flags.small_size is not None or flags.base_samples is not None:
        raise SettingError(
            "--large_size, --small_size and --base_samples are of super-resolution, which is not supported: it is "
            "conditioned on an image"
        )
    channels, out = first[1], _shape(weights, "out.2.weight", 4)[0]
    # With 6 and 6, the variance may be learned of 3, or the images be of 6 channels, if their owner says so.
    if out not in (channels, 2 * channels) or (
        channels == out == 2 * _RGB and flags.learn_sigma is not False
    ):
        raise ArtefactError(
            f"{name} takes {channels} channels and gives {out}: a super-resolution network, conditioned on an image, "
            "is not supported" + "; of images of 6 channels, say --learn_sigma False" * (channels == out)
        )


def _shape(weights: Weights, name: str, axes: int) -> tuple[int, ...]:
    """Of a tensor. Raises ArtefactError where it is missing, empty, or has another number of axes."""
    shape = weights.shape(name)
    if len(shape) != axes or 0 in shape:
        raise ArtefactError(f"{weights.name}: {show(name)} is {shape}, and {axes} axes of numbers are needed")
    return shape


def _numbers(weights: Weights, prefix: str) -> set[int]:
    """The numbers behind a list's name in the names of its weights."""
    numbers = (name.split(".")[1] for name in weights.state if name.startswith(f"{prefix}."))
    return {int(number) for number in numbers if number.isdecimal() and len(number) < 5}


def _config(weights: Weights, told: Told[OpenAIFlags]) -> UNetConfig:
    """The network's shape without its heads: what the weights say of it."""
    levels, blocks = _levels(weights)
    told.agrees("num_res_blocks", blocks)
    first = [1 + level * (blocks + 1) for level in range(levels)]  # input block of each level
    widths = tuple(_shape(weights, f"input_blocks.{n}.0.out_layers.3.weight", 4)[0] for n in first)
    attention = tuple(i for i, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in weights)
    by_block = levels > 1 and f"input_blocks.{first[1] - 1}.0.in_layers.0.weight" in weights
    if levels > 1:
        told.agrees("resblock_updown", by_block)
    doubled = _shape(weights, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0]
    told.agrees("use_scale_shift_norm", doubled)
    return UNetConfig(
        channels=_shape(weights, "input_blocks.0.0.weight", 4)[0],
        widths=widths,
        time_width=_shape(weights, "time_embed.0.weight", 2)[0],
        blocks=blocks,
        attention_levels=attention,
        norm_eps=1e-5,
        padding="symmetric",
        scale_shift=doubled,
        resampling_blocks=tuple(range(levels)) if by_block else (),
        dropout=told.flags.dropout or 0.0,
    )


def _levels(weights: Weights) -> tuple[int, int]:
    """How many levels there are, and blocks in each. Raises ArtefactError where the parts make none."""
    ways = {way: _numbers(weights, way) for way in ("input_blocks", "output_blocks")}
    for way, numbers in ways.items():
        if gaps := set(range(max(numbers) + 1)) - numbers:
            raise ArtefactError(
                f"{weights.name} is not whole: {way}.{min(gaps)} has no weights; a network of conv_resample False, "
                "which halves its images without any, is not supported"
            )
    stages = len(ways["output_blocks"])
    doubling = [stage for stage in range(stages) if _doubles(weights, stage)]
    levels, blocks = len(doubling) + 1, (doubling[0] if doubling else stages - 1)
    if blocks < 1 or stages != levels * (blocks + 1) or len(ways["input_blocks"]) != stages:
        raise ArtefactError(f"{weights.name} is not whole: its {stages} output_blocks make no levels")
    return levels, blocks


def _doubles(weights: Weights, stage: int) -> bool:
    """Whether a stage going up ends in what doubles the resolution."""
    return any(
        f"output_blocks.{stage}.{place}.{name}.weight" in weights
        for place in (1, 2)
        for name in ("conv", "in_layers.0")
    )


def _with_heads(config: UNetConfig, guided: bool, told: Told[OpenAIFlags]) -> UNetConfig:
    """The network's shape with its heads, which only the flags tell. guided: whether it is of guided-diffusion."""
    attending = _attending(config)

    def fits(number: int) -> bool:
        return all(width % number == 0 for width in attending)

    def sound(name: str, number: int) -> int:
        if number < 1 or not fits(number):
            widths = ", ".join(map(str, attending))
            raise SettingError(f"--{name} {number} does not divide the widths of the attention ({widths})")
        return number

    flags, width = told.flags, -1
    if flags.num_head_channels is not None:
        width = flags.num_head_channels
    elif guided and flags.num_heads is None:
        width = told.get("num_head_channels", -1, *filter(fits, (64, 32)))
    if width != -1:  # it goes before the number of heads
        return replace(config, head_channels=sound("num_head_channels", width))
    heads = sound("num_heads", told.get("num_heads", *filter(fits, (4, 1, 2, 8))))
    if flags.num_heads_upsample not in (None, -1, heads):
        raise SettingError(
            f"--num_heads_upsample {flags.num_heads_upsample} is another number than --num_heads {heads}, which is not "
            "supported"
        )
    return replace(config, heads=heads)


def _attending(config: UNetConfig) -> list[int]:
    """The widths of all that has attention."""
    return sorted({config.widths[-1], *(config.widths[level] for level in config.attention_levels)})


def _is_legacy(config: UNetConfig, told: Told[OpenAIFlags]) -> bool:
    """Whether q, k and v stand head by head, as in all of improved-diffusion; of one head the orders are the same."""
    several = any(width > (config.head_channels or width // config.heads) for width in _attending(config))
    return several and not told.get("use_new_attention_order", False, True)


def _image_size(multiples: tuple[float, ...], told: Told[OpenAIFlags]) -> tuple[int, int]:
    """Height and width; not told, those that their code has such multiples for. Checks the multiples too."""
    own = _SIZES.get(multiples)
    if own and told.flags.image_size is None:
        height = width = int(told.get("image_size", own))
    else:
        height, width = told.image_size()

    by_itself = next((one for one, size in _SIZES.items() if size == height), multiples)
    if told.flags.channel_mult == "" and by_itself != multiples:
        raise SettingError(
            f"--image_size {height} and no --channel_mult stand for {_listed(by_itself)}, and the weights have "
            f"{_listed(multiples)}"
        )
    if told.flags.channel_mult:
        found = _listed(multiples)
        told.agrees("channel_mult", found, lambda text: _listed(_numbers_in("channel_mult", text)))
    return height, width


def _require_attention(config: UNetConfig, size: int, told: Told[OpenAIFlags]) -> None:
    """Raise SettingError where --attention_resolutions, in pixels, names other levels than have weights."""
    pixels = [size // 2**level for level in range(len(config.widths))]

    def meaning(text: str) -> str:
        rates = {size // max(1, int(number)) for number in _numbers_in("attention_resolutions", text)}
        return _listed(pixels[level] for level in range(len(pixels)) if 2**level in rates) or "none"

    found = _listed(pixels[level] for level in config.attention_levels) or "none"
    told.agrees("attention_resolutions", found, meaning)


def _numbers_in(name: str, text: str) -> list[float]:
    if not re.fullmatch(r"\s*\d{1,5}(\.\d{1,5})?\s*(,\s*\d{1,5}(\.\d{1,5})?\s*)*", text, re.ASCII):
        raise SettingError(f"--{name} {show(text)} is not a list of numbers, as 32,16")
    return [float(part) for part in text.split(",")]


def _listed(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _fixed(told: Told[OpenAIFlags]) -> Variance:
    return "fixed_small" if told.get("sigma_small", False) else "fixed_large"


def _sampling(flags: OpenAIFlags, timesteps: int) -> Sampling:
    """The chain of --use_ddim and --timestep_respacing, as 250 or ddim50."""
    solver: Solver = "ddim" if flags.use_ddim else "ddpm"
    text = flags.timestep_respacing or ""
    if not re.fullmatch(r"((ddim)?\d{1,6}|\d{1,6}(,\d{1,6})+)?", text, re.ASCII):
        raise SettingError(
            f"--timestep_respacing {show(text)} is neither a number, as 250, nor one as ddim50, nor a list"
        )
    if not text or "," in text:
        return Sampling(solver=solver, spacing="openai")
    steps = int(text.removeprefix("ddim"))
    if not 1 <= steps <= timesteps:
        raise SettingError(f"--timestep_respacing {text} is none of 1 to {timesteps}, of --diffusion_steps")
    spacing: Spacing = "openai-ddim" if text.startswith("ddim") else "openai"
    if len(spaced(spacing, Schedule(LinearBetas().betas(timesteps)), steps)) < steps:
        raise SettingError(f"--timestep_respacing {text}: no whole stride makes {steps} steps of {timesteps}")
    return Sampling(solver=solver, steps=steps, spacing=spacing)


def _not_carried(flags: OpenAIFlags, timesteps: int) -> Iterator[str]:
    """A word on each thing that the flags ask for and that the model does not do by itself here."""
    if "," in (flags.timestep_respacing or ""):
        yield (
            f"--timestep_respacing {flags.timestep_respacing} has a number of steps for each part of the chain, for "
            f"which there is no spacing here: by itself it takes all {timesteps} steps"
        )
    if flags.classifier_path or flags.classifier_scale:
        yield "the guidance by a classifier is not carried: its samples are those of --classifier_scale 0"


def _recognised(spec: ModelSpec, config: UNetConfig) -> list[str]:
    """What the weights themselves say, for people."""
    channels, height, width = spec.image_shape
    at = ", ".join(f"{height // 2**level}×{width // 2**level}" for level in config.attention_levels)
    labels = f", {plural(spec.num_classes, 'class')}" if spec.num_classes else ""
    chain = spec.completed(DEFAULT_CHAIN)
    return [
        f"images of {plural(channels, 'channel')}{labels}; widths {', '.join(map(str, config.widths))} with "
        f"{plural(config.blocks, 'block')} each; attention {f'at {at} and ' * bool(at)}in the middle"
        f"{'; a learned variance' * (spec.variance == 'learned_range')}",
        f"by itself it is sampled as by their image_sample.py: {chain.solver}, {plural(chain.steps or 0, 'step')}, x̂0 "
        f"{'' if spec.clip else 'not '}clipped",
    ]


def _schedule(name: str, timesteps: int) -> BetaSchedule:
    if name == "linear":  # of the same shape whatever T is
        return LinearBetas(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps)
    if name == "cosine":
        return CosineBetas()
    raise SettingError(f"--noise_schedule {name} is not known: choose from linear, cosine")


# Our names → theirs.
_OUTSIDE: Final = {
    "temb1": "time_embed.0",
    "temb2": "time_embed.2",
    "label_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "temb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}


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
        outside=_OUTSIDE,
        block=_BLOCK,
        attention={"norm": "norm", "qkv": "qkv", "out": "proj_out"},
        block_at=block_at,
        attention_at=attention_at,
        order=_by_head if legacy else in_order,
    )


def _by_head(qkv: Tensor, heads: int) -> Tensor:
    """Rows that go head by head, each with its q, k and v → all of q, of k, of v."""
    rows = qkv.reshape(heads, 3, -1, *qkv.shape[1:])
    return torch.movedim(rows, 1, 0).reshape(qkv.shape)
