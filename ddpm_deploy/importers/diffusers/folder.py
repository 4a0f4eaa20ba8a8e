"""A folder of diffusers: which of its files are read, and what it must not be."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.importers.weights import Weights, read_weights

_INDEX: Final = "model_index.json"
CONFIG: Final = "config.json"
_WEIGHTS: Final = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+))?\.(safetensors|bin)")
_SHARDS: Final = re.compile(r"diffusion_pytorch_model.*(-\d+-of-\d+\.\w+|\.index\.json)")
_MOST_BYTES: Final = 1 << 20  # of a JSON file
_MOST_FILES: Final = 10_000  # looked at in a folder
_MOST_TEXT: Final = 60  # characters of a text out of a configuration
_POINTER: Final = b"version https://git-lfs."  # what git leaves in place of a large file that was not fetched
_AVERAGED: Final = "unet_ema"  # what train_unconditional.py keeps beside unet/ in its checkpoints
# Parts of a pipeline that works on latents, and of one that needs more than noise.
_LATENT: Final = ("vae", "vqvae", "movq", "vqgan", "first_stage_model")
_CONDITION: Final = ("text_encoder", "image_encoder", "prior", "transformer", "mel")


@dataclass(frozen=True)
class Configs:
    """What a folder holds beside the weights.

    network: its config.json. scheduler: its configuration, if there is one. pipeline: the class of the pipeline, or "".
    others: the variants of the weights that were not chosen. averaged: the folder beside it with averaged weights,
    or "".
    """

    name: str
    network: dict[str, Any]
    scheduler: dict[str, Any] | None
    pipeline: str
    others: tuple[str, ...] = ()
    averaged: str = ""


def folder_of(path: Path) -> Path | None:
    """The folder that a path of diffusers stands for: itself, or that of one of its files; None: it is of another."""
    if path.is_dir():
        return path
    its_own = path.name in (_INDEX, CONFIG) or _WEIGHTS.fullmatch(path.name) or _SHARDS.fullmatch(path.name)
    with_configs = any((path.parent / name).is_file() for name in (CONFIG, _INDEX))
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
    if not (network / CONFIG).is_file():
        raise ArtefactError(
            f"{show(whole)} has no network: neither {show(network / CONFIG)} nor weights are there"
        )
    scheduler = _scheduler_file(whole) or _scheduler_file(folder)
    file, others = _weights_file(network, named, variant)
    _require_fetched(file)
    average = network.resolve().parent / _AVERAGED
    beside = network.resolve().name == "unet" and (average / CONFIG).is_file()
    configs = Configs(
        name=show(network / CONFIG),
        network=_read_json(network / CONFIG),
        scheduler=None if scheduler is None else _read_json(scheduler),
        pipeline=str(index.get("_class_name", "")),
        others=others,
        averaged=show(average) if beside else "",
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
    """The folder with the pipeline or the scheduler that a folder of a network belongs to; else the folder itself.

    A checkpoint of train_unconditional.py has its networks in PIPELINE/checkpoint-500/unet and …/unet_ema.
    """
    if _has_schedule(folder):
        return folder
    here = folder.resolve()
    above = [here.parent] if here.name == "unet" else []
    if here.name in ("unet", _AVERAGED) and re.fullmatch(r"checkpoint-\d+", here.parent.name):
        above.append(here.parent.parent)
    return next((one for one in above if _has_schedule(one)), folder)


def _has_schedule(folder: Path) -> bool:
    return (folder / _INDEX).is_file() or _scheduler_file(folder) is not None


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
            f"{CONFIG}"
        )
    if variant is not None and variant not in found:
        known = ", ".join(show(key) for key in found if key) or "none"
        raise SettingError(f"{show(folder)} has no weights of the variant --key {variant}: it has {known}")
    # Without a variant first; of what else there is, that with more bits.
    key = variant if variant is not None else min(found, key=lambda key: (key != "", "16" in key, key))
    chosen = named if named is not None and variant is None else found[key]
    return folder / chosen, tuple(other for other, name in found.items() if other and name != chosen)


def _require_fetched(file: Path) -> None:
    """Refuse what git leaves in place of weights. Raises ArtefactError."""
    require_file(file)
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ArtefactError(
                f"{show(file)} is only a pointer of git-lfs to the weights: fetch them with git lfs pull"
            )


def word(text: object) -> str:
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
                f"{show(folder)} is a {word(index.get('_class_name', 'pipeline'))} that {what} (it has a "
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
            f"{configs.name} is of a {word(kind)}, which is another network: only UNet2DModel is supported"
        )
    if configs.network.get("cross_attention_dim") is not None:
        raise ArtefactError(f"{configs.name} has cross_attention_dim: conditioned networks are not supported")


S = TypeVar("S", bound=msgspec.Struct)


def convert(found: Mapping[str, Any], kind: type[S], where: str) -> S:
    """Its fields. Raises ArtefactError where one has no such value."""
    try:
        return msgspec.convert(dict(found), kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtefactError(f"{where} is not sound: {first_line(error)}") from error
