"""diffusers: folders of pipelines whose network is a UNet2DModel, of any version, without diffusers itself.

Network and schedule are in two JSON files, whose absent fields are the defaults of the constructors there. The kind of
the scheduler becomes the model's own chain.
"""

from collections.abc import Collection
from typing import Any, Final

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.diffusers.folder import CONFIG, Configs, convert, folder_of, read_folder, word
from ddpm_deploy.importers.diffusers.network import NetworkFields, unet_config, unet_names, with_class_table
from ddpm_deploy.importers.diffusers.scheduler import SchedulerFields, read_scheduler, variance_of
from ddpm_deploy.importers.family import build_family
from ddpm_deploy.importers.flags import DiffusersFlags
from ddpm_deploy.importers.imported import Imported, new_spec
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.spec import ModelSpec

__all__ = ["NAME", "folder_of", "read", "read_folder", "recognises"]

NAME: Final = "diffusers"


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
            f"{weights.name} is of diffusers, and says nothing of itself: its {CONFIG} is needed beside it, "
            "and the weights must be called diffusion_pytorch_model.safetensors or .bin"
        )
    fields = convert(configs.network, NetworkFields, configs.name)
    if reason := fields.refusal():
        raise ArtefactError(f"{configs.name} cannot be taken: {reason}")
    scheduler = read_scheduler(configs, told)
    network, sampling = unet_config(fields, configs.name), scheduler.sampling()
    spec = _spec(
        configs.name,
        image_shape=(fields.in_channels, *_image_size(fields, told)),
        timesteps=scheduler.fields.num_train_timesteps,
        schedule=scheduler.schedule(),
        prediction=scheduler.prediction(),
        variance=variance_of(scheduler, told, fields.out_channels != fields.in_channels, configs),
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
        weights = with_class_table(weights, spec)
    old = any(name.endswith(".proj_attn.weight") for name in weights.state)
    unet = build_family(weights, spec, unet_names(network, old))
    recognised = [*_said(weights, configs), *scheduler.words, scheduler.said(sampling)]
    return Imported(unet, spec, "diffusers", tuple(recognised), tuple(told.assumed))


def _spec(where: str, **fields: Any) -> ModelSpec:
    """A spec in which every number is in its range. Raises ArtefactError where one is not."""
    try:
        return new_spec(**fields)
    except SettingError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _image_size(fields: NetworkFields, told: Told[DiffusersFlags]) -> tuple[int, int]:
    """Height and width: as told, or as the configuration says."""
    size = fields.sample_size
    if told.flags.image_size is not None or size is None:
        return told.image_size()
    return (size, size) if isinstance(size, int) else size


def _classes(fields: NetworkFields, told: Told[DiffusersFlags]) -> int:
    count = fields.num_class_embeds
    if fields.class_embed_type == "timestep" and count is None:
        return int(
            told.need("num_class_embeds", "its classes are numbers like timesteps, and nothing counts them")
        )
    return int(told.agrees("num_class_embeds", count)) if count else 0


def _said(weights: Weights, configs: Configs) -> list[str]:
    """What the files say, for people."""
    kind = word(configs.network.get("_class_name", "UNet2DModel"))
    version = word(configs.network.get("_diffusers_version", "unknown"))
    pipeline = word(configs.pipeline) if configs.pipeline else "no pipeline"
    lines = [f"{kind} of diffusers {version}, in {pipeline}; weights of {weights.name}"]
    if kind != "UNet2DModel":
        lines.append(f"{kind} is taken for a UNet2DModel by its fields, whatever it does beside")
    ignored = [
        word(name)
        for found, known in ((configs.network, NetworkFields), (configs.scheduler or {}, SchedulerFields))
        for name, value in found.items()
        if name not in (*known.__struct_fields__, *_IDLE) and value not in (None, False) and name[:1] != "_"
    ]
    if ignored:
        more = f" and {len(ignored) - 10} more" if len(ignored) > 10 else ""
        lines.append(f"not known, and ignored: {', '.join(ignored[:10])}{more}")
    if configs.averaged:
        lines.append(
            f"these weights are as trained; averaged ones are in {configs.averaged}: name it to take them"
        )
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
