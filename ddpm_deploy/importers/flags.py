"""What the code of each dialect is told beside its weights, by the names that it has there.

Each field is a flag of ddpm-export (`--image_size 64`), and an entry of the file of `--flags`; None: not told. This
module needs neither PyTorch nor NumPy, as the command line reads it to know its own options.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import msgspec

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.files import require_file, show


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the dialects have in common: height and width of the images, as 32 or 48x64."""

    image_size: int | str | None = None


class OpenAIFlags(Flags, frozen=True, kw_only=True):
    """Of `script_util.py` in improved-diffusion and guided-diffusion."""

    num_channels: int | None = None
    num_res_blocks: int | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: str | None = None
    channel_mult: str | None = None
    dropout: float | None = None
    class_cond: bool | None = None
    use_checkpoint: bool | None = None
    use_scale_shift_norm: bool | None = None
    resblock_updown: bool | None = None
    use_fp16: bool | None = None
    use_new_attention_order: bool | None = None
    learn_sigma: bool | None = None
    sigma_small: bool | None = None
    diffusion_steps: int | None = None
    noise_schedule: str | None = None
    timestep_respacing: str | None = None
    use_kl: bool | None = None
    predict_xstart: bool | None = None
    rescale_timesteps: bool | None = None
    rescale_learned_sigmas: bool | None = None
    clip_denoised: bool | None = None
    use_ddim: bool | None = None


class DiffusersFlags(Flags, frozen=True, kw_only=True):
    """Of a scheduler's configuration in diffusers, in place of what the file says, or where there is no such file."""

    num_train_timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    clip_sample: bool | None = None


class HoFlags(Flags, frozen=True, kw_only=True):
    """Of Ho's network in the code of pesser (pytorch_diffusion), ermongroup (ddim) and w86763777 (pytorch-ddpm)."""

    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    num_diffusion_timesteps: int | None = None
    var_type: str | None = None


class LucidrainsFlags(Flags, frozen=True, kw_only=True):
    """Of `Unet` and `GaussianDiffusion` in denoising-diffusion-pytorch.

    The weights tell most of `Unet`'s, and the buffers beside them most of `GaussianDiffusion`'s.
    """

    dim: int | None = None
    dim_mults: tuple[int, ...] | None = None
    channels: int | None = None
    self_condition: bool | None = None
    learned_variance: bool | None = None
    attn_heads: tuple[int, ...] | None = None
    attn_dim_head: tuple[int, ...] | None = None
    full_attn: tuple[bool, ...] | None = None
    sinusoidal_pos_emb_theta: float | None = None
    timesteps: int | None = None
    sampling_timesteps: int | None = None
    objective: str | None = None
    beta_schedule: str | None = None
    ddim_sampling_eta: float | None = None
    auto_normalize: bool | None = None


class MonaiFlags(Flags, frozen=True, kw_only=True):
    """Of MONAI's `DiffusionModelUNet` and its `DDPMScheduler`; the weights tell most of the first.

    num_channels: what MONAI Generative calls channels. value_range: of the images, by their transforms.
    """

    spatial_dims: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    num_res_blocks: tuple[int, ...] | int | None = None
    channels: tuple[int, ...] | None = None
    num_channels: tuple[int, ...] | None = None
    attention_levels: tuple[bool, ...] | None = None
    norm_num_groups: int | None = None
    norm_eps: float | None = None
    resblock_updown: bool | None = None
    num_head_channels: tuple[int, ...] | int | None = None
    with_conditioning: bool | None = None
    transformer_num_layers: int | None = None
    cross_attention_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = None
    dropout_cattn: float | None = None
    include_fc: bool | None = None
    use_combined_linear: bool | None = None
    use_flash_attention: bool | None = None
    num_train_timesteps: int | None = None
    schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    clip_sample: bool | None = None
    clip_sample_min: float | None = None
    clip_sample_max: float | None = None
    value_range: tuple[float, ...] | None = None


# Those of every dialect, by its name in messages and documents.
FLAGS: Final[dict[str, type[Flags]]] = {
    "diffusers": DiffusersFlags,
    "OpenAI": OpenAIFlags,
    "Ho": HoFlags,
    "lucidrains": LucidrainsFlags,
    "MONAI": MonaiFlags,
}

F = TypeVar("F", bound=Flags)
_MOST_BYTES: Final = 1 << 20  # of a file of flags


def all_names() -> list[str]:
    """Every flag of every dialect, each once."""
    return list(dict.fromkeys(name for kind in FLAGS.values() for name in kind.__struct_fields__))


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a file: a .json or .toml of names and values, or a text as it stands on their command lines.

    Raises SettingError where it is none of these.
    """
    require_file(path, SettingError)
    if path.stat().st_size > _MOST_BYTES:
        raise SettingError(f"{show(path)} is too large for a file of flags")
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix.lower():
            case ".json":
                found = json.loads(text)
            case ".toml":
                found = tomllib.loads(text)
            case _:
                found = _from_command_line(text)
        if not isinstance(found, dict):
            raise ValueError("it holds no names and values")
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{show(path)} is not a file of flags: {first_line(error)}") from error
    # Those that begin with an underscore say what wrote the file, as `_target_` in a bundle of MONAI's.
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _from_command_line(text: str) -> dict[str, str]:
    """`MODEL_FLAGS="--image_size 64 --num_channels 128"` → names and values."""
    words = [
        word for line in shlex.split(text, comments=True) for word in re.sub(r"^\w+=(?=--)", "", line).split()
    ]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ValueError("it is not of the form --name value --name value")
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(names, values, strict=True)
    }


def parse(kind: type[F], told: Mapping[str, Any], dialect: str) -> F:
    """The flags of a dialect, out of texts or values by name.

    Raises SettingError where one is not of this dialect, or has no such value.
    """
    if strays := [name for name in told if name not in kind.__struct_fields__]:
        raise SettingError(
            f"{_typed(strays)} cannot be told of {dialect}: choose from {_typed(kind.__struct_fields__)}"
        )
    lists = [field.name for field in msgspec.structs.fields(kind) if _is_list(field.type)]
    values = {
        name: [part for part in value.strip("()[]").split(",") if part]
        if name in lists and isinstance(value, str)
        else value
        for name, value in told.items()
    }
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingError(f"the flags of {dialect}: {first_line(error)}") from error


def _is_list(kind: Any) -> bool:
    return any(getattr(part, "__origin__", None) is tuple for part in (kind, *get_args(kind)))


def _typed(names: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
