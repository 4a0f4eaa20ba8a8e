"""What the code of each dialect is told beside its weights, by the names that it has there.

Each field is a flag of ddpm-export (`--image_size 64`), and an entry of the file of `--flags`; None: not told. This
module needs neither PyTorch nor NumPy, as the command line reads it to know its own options.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar, get_args

import msgspec

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.files import require_file, show


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the dialects have in common: height and width of the images, as 32 or 48x64.

    ignored: names that whole command lines of a dialect hold beside these, and that are of no account here.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()

    image_size: int | str | None = None


# How they train, and a classifier: of no account for the network and its samples.
_OF_OPENAI_SCRIPTS: Final = """
anneal_lr batch_size data_dir ema_rate eval_interval fp16_scale_growth iterations log_interval lr lr_anneal_steps
microbatch model_path noised num_samples rescale_learned_sigmas resume_checkpoint save_interval schedule_sampler
use_checkpoint use_fp16 use_kl val_data_dir weight_decay
classifier_attention_resolutions classifier_depth classifier_pool classifier_resblock_updown classifier_use_fp16
classifier_use_scale_shift_norm classifier_width
"""


class OpenAIFlags(Flags, frozen=True, kw_only=True):
    """Of `script_util.py` in improved-diffusion and guided-diffusion, and of their scripts."""

    ignored: ClassVar[frozenset[str]] = frozenset(_OF_OPENAI_SCRIPTS.split())

    num_channels: int | None = None
    num_res_blocks: int | None = None
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    num_head_channels: int | None = None
    attention_resolutions: str | None = None
    channel_mult: str | None = None
    dropout: float | None = None
    class_cond: bool | None = None
    use_scale_shift_norm: bool | None = None
    resblock_updown: bool | None = None
    use_new_attention_order: bool | None = None
    learn_sigma: bool | None = None
    sigma_small: bool | None = None
    diffusion_steps: int | None = None
    noise_schedule: str | None = None
    timestep_respacing: str | None = None
    predict_xstart: bool | None = None
    rescale_timesteps: bool | None = None
    clip_denoised: bool | None = None
    use_ddim: bool | None = None
    classifier_path: str | None = None
    classifier_scale: float | None = None
    base_samples: str | None = None
    large_size: int | None = None
    small_size: int | None = None


class DiffusersFlags(Flags, frozen=True, kw_only=True):
    """Of a scheduler's configuration in diffusers, in place of what the file says, or where there is no such file.

    num_class_embeds: of a network that embeds its classes as it does timesteps, and does not count them.
    """

    num_train_timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    clip_sample: bool | None = None
    num_class_embeds: int | None = None


class HoFlags(Flags, frozen=True, kw_only=True):
    """Of Ho's network in the code of pesser (pytorch_diffusion), ermongroup (ddim) and w86763777 (pytorch-ddpm).

    By the names in ddim's configurations and command line; of pytorch-ddpm, beta_1, beta_T, T and img_size are
    beta_start, beta_end, num_diffusion_timesteps and image_size here, and mean_type is its own.
    """

    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    num_diffusion_timesteps: int | None = None
    var_type: str | None = None
    mean_type: str | None = None
    sample_type: str | None = None
    skip_type: str | None = None
    timesteps: int | None = None
    eta: float | None = None


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
# Of a flag that is true or false, beside these two and 1 and 0.
_WORDS: Final = {**dict.fromkeys(("yes", "y", "t"), True), **dict.fromkeys(("no", "n", "f"), False)}


def all_names() -> list[str]:
    """Every flag of every dialect, each once, and what their command lines hold beside these."""
    names = [name for kind in FLAGS.values() for name in (*kind.__struct_fields__, *sorted(kind.ignored))]
    return list(dict.fromkeys(names))


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a file: a .json or .toml of names and values, or a text as it stands on their command lines.

    Raises SettingError where it is none of these.
    """
    require_file(path, SettingError)
    if path.stat().st_size > _MOST_BYTES:
        raise SettingError(f"{show(path)} is too large for a file of flags")
    try:
        text = path.read_text(encoding="utf-8-sig")
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
    """`MODEL_FLAGS="--image_size 64 --num_channels 128"`, `python image_sample.py --num_samples 4` → names and values.

    A flag that stands there twice, as where both training and sampling were pasted, must have the same value.
    """
    found: dict[str, str] = {}
    free = frozenset().union(*(kind.ignored for kind in FLAGS.values()))
    for name, value in _pairs(text):
        if found.setdefault(name, value) != value and name not in free:
            raise ValueError(f"--{name} is {found[name]} in one place and {value} in another")
    return found


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The flags in a text of shell commands, in order."""
    known: set[str] = set()  # variables
    for command in _commands(text):
        words: list[str] = []
        for word in _behind_program(command):
            if words and words[-1].startswith("--") and "=" not in words[-1]:
                words.append(word)  # a value, whatever it looks like
            elif match := re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL):  # NAME="--flags"
                known.add(match[1])
                words += match[2].split() if "--" in match[2] else []
            elif match := re.fullmatch(r"\$(?:(\w+)|\{(\w+)\})", word):
                if (name := match[1] or match[2]) not in known:
                    raise ValueError(f'{word} stands in it, and no {name}="--flags …" that says what that is')
            else:
                words.append(word)
        yield from _paired(words)


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command: a line, or what stands between && and the like; a quoted word may be of many lines."""
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    text = re.sub(r"(?m)(^|\s)#.*", r"\1", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word and not word.strip(";&|\n"):
            yield words
            words = []
        else:
            words.append(word)


def _behind_program(words: list[str]) -> list[str]:
    """A command without `mpiexec -n 8 python scripts/image_train.py` in front, of what runs it."""
    program = next((n for n, word in enumerate(words) if word.endswith(".py") and "=" not in word), -1)
    words = words[program + 1 :]
    flags = (n for n, word in enumerate(words) if word.startswith(("--", "$")) or re.match(r"\w+=", word))
    return words[next(flags, len(words)) :]


def _paired(words: list[str]) -> Iterator[tuple[str, str]]:
    """`--name value` and `--name=value` → names and values."""
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w-]*", name):
            raise ValueError(f"{show(word)} is not of the form --name value")
        value = value if sign else next(rest, "--")
        if value.startswith("--"):
            raise ValueError(f"{name} has no value")
        yield name.removeprefix("--").replace("-", "_"), value


def parse(kind: type[F], told: Mapping[str, Any], dialect: str) -> F:
    """The flags of a dialect, out of texts or values by name.

    Raises SettingError where one is not of this dialect, or has no such value.
    """
    told = {name: value for name, value in told.items() if name not in kind.ignored}
    if strays := [name for name in told if name not in kind.__struct_fields__]:
        raise SettingError(
            f"{_typed(strays)} cannot be told of {dialect}: choose from {_typed(kind.__struct_fields__)}"
        )
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values = {name: _as_told(value, types[name]) for name, value in told.items()}
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingError(f"the flags of {dialect}: {first_line(error)}") from error


def _as_told(value: Any, kind: Any) -> Any:
    """A value as its type takes it: the words and lists of command lines, and the numbers and lists of files."""
    if isinstance(value, str):
        if _is_list(kind):
            return [part.strip() for part in value.strip("()[]").split(",") if part.strip()]
        return _WORDS.get(value.lower(), value) if bool in get_args(kind) else value
    if str not in get_args(kind) or int in get_args(kind) or isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(part, int | float | str) for part in value):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) else value


def _is_list(kind: Any) -> bool:
    return any(getattr(part, "__origin__", None) is tuple for part in (kind, *get_args(kind)))


def _typed(names: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
