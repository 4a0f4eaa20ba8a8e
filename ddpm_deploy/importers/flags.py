"""What the code of each dialect is told beside its weights, by the names that it has there.

Each field is a flag of ddpm-export (`--image_size 64`), and an entry of the file of `--flags`; None: not told. The
command line reads this module to know its own options, so it imports nothing that takes time.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Final


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the dialects have in common.

    image_size: height and width, as 32 or 48x64. null_class: whether the last class stands for none, as in training for
    classifier-free guidance.
    ignored: names that whole command lines of a dialect hold beside these, and that are of no account here.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()

    image_size: int | str | None = None
    null_class: bool | None = None


# How they train, and a classifier: of no account for the network and its samples.
_OF_OPENAI_SCRIPTS: Final = """
anneal_lr batch_size data_dir ema_rate eval_interval fp16_scale_growth iterations log_interval lr lr_anneal_steps
microbatch model_path noised num_samples rescale_learned_sigmas resume_checkpoint save_interval schedule_sampler
use_checkpoint use_fp16 use_kl val_data_dir weight_decay
classifier_attention_resolutions classifier_depth classifier_pool classifier_resblock_updown classifier_use_fp16
classifier_use_scale_shift_norm classifier_width
"""


@dataclass(frozen=True, kw_only=True)
class OpenAIFlags(Flags):
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


@dataclass(frozen=True, kw_only=True)
class DiffusersFlags(Flags):
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


@dataclass(frozen=True, kw_only=True)
class HoFlags(Flags):
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


@dataclass(frozen=True, kw_only=True)
class LucidrainsFlags(Flags):
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


@dataclass(frozen=True, kw_only=True)
class MonaiFlags(Flags):
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


def names_of(kind: type[Flags]) -> tuple[str, ...]:
    """The flags of a dialect."""
    return tuple(field.name for field in fields(kind))


def all_names() -> list[str]:
    """Every flag of every dialect, each once, and what their command lines hold beside these."""
    names = [name for kind in FLAGS.values() for name in (*names_of(kind), *sorted(kind.ignored))]
    return list(dict.fromkeys(names))
