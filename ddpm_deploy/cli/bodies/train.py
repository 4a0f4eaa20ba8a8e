"""ddpm-train: start a training or resume one, and run it. This module imports PyTorch."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

import click
import msgspec
import torch

from ddpm_deploy.cli.bodies.progress import progress, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import DataError, OutputError, SettingError, SpecError, first_line, plural
from ddpm_deploy.files import quoted, require_output, require_suffix, show
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import CHECKPOINT_SUFFIXES, open_model
from ddpm_deploy.schedule import SCHEDULES
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import Checkpoint, require_finite
from ddpm_deploy.train.data import DIGITS, DataRange, Dataset, Source, find_images, read_images
from ddpm_deploy.train.data.scale import pixel_type
from ddpm_deploy.train.diffusion import require_trainable
from ddpm_deploy.train.memory import require_memory
from ddpm_deploy.train.network import torch_device
from ddpm_deploy.train.session import Session
from ddpm_deploy.train.settings import PRESETS, Preset, Settings
from ddpm_deploy.train.trainer import Trainer
from ddpm_deploy.words import Loss, Prediction, Schedule, Variance
from ddpm_deploy.words import Preset as PresetName

_LABEL_DROPOUT: Final = 0.1
_CHANNELS: Final = {"grey": 1, "rgb": 3, "rgba": 4}
_PROVENANCE_BYTES: Final = 300  # what training and export may yet add to a spec


class NewTraining(TypedDict):
    """The options that a new training alone has; None where they were not typed."""

    preset: PresetName | None
    image_size: tuple[int, int] | None
    channels: Literal["grey", "rgb", "rgba"] | None
    data_range: tuple[float, float] | None
    batch_size: int | None
    learning_rate: float | None
    prediction: Prediction | None
    loss: Loss | None
    variance: Variance | None
    schedule: Schedule | None
    labels: bool | None
    label_dropout: float | None
    accumulate: int | None
    amp: bool | None
    flip: bool | None
    seed: int | None


_OF_THE_NETWORK: Final = {
    "preset",
    "image_size",
    "channels",
    "prediction",
    "variance",
    "schedule",
}


def train(
    data: str | None,
    *,
    output: Path | None,
    resume: Path | None,
    steps: int | None,
    device: str,
    compiled: bool,
    workers: int | None,
    save_every: int | None,
    sample_every: int | None,
    array: str | None,
    skip_broken: bool,
    as_json: bool,
    force: bool,
    **new: Unpack[NewTraining],
) -> None:
    """Train a network, from the start or from a checkpoint, and save it."""
    if data is None and not resume:
        raise click.UsageError(
            "DATA is missing: a folder or a .zip of images, an .npy, .npz or idx file, or the word digits"
        )
    if data in ("", "-"):
        raise click.UsageError("DATA is read from files, and not from standard input: name them")
    target = _checked_output(output, resume, force)
    changes = _typed(
        data=_lasting(data),
        array="" if data and array is None else array,  # other data have other arrays
        steps=steps,
        save_every=save_every,
        sample_every=sample_every,
        skip_broken=skip_broken or None,
    )
    place = torch_device(device)
    torch.set_num_threads(cpu_threads())
    if resume:
        if typed := sorted(f"--{name.replace('_', '-')}" for name in _typed(**new)):
            raise click.UsageError(
                f"{', '.join(typed)} cannot change on --resume: the checkpoint has its own"
            )
        checkpoint, source = _resumed(resume, changes)
        spec = checkpoint.spec
        images = _read(checkpoint.settings, source, spec, spec.data_range, place, workers)
        trainer = Trainer.resume(checkpoint, images, place, compiled=compiled)
    else:
        spec, settings, source = _new(data or "", changes, new)
        images = _read(settings, source, spec, None, place, workers)
        spec = msgspec.structs.replace(spec, data_range=images.data_range)
        trainer = Trainer(spec, settings, images, place, compiled=compiled)
    _run(trainer, target, as_json)


def _lasting(data: str | None) -> str | None:
    """The name of the data that a checkpoint keeps, so that training can go on from any working folder."""
    if data in (None, DIGITS):
        return data
    try:
        data.encode()
    except UnicodeEncodeError as error:  # a checkpoint names its data in JSON, which holds valid text alone
        raise SettingError("the name of DATA is not UTF-8: rename it, or reach it by a link") from error
    return str(Path(data).absolute())


def _typed(**options: Any) -> dict[str, Any]:
    """Those of the options that were typed."""
    return {name: value for name, value in options.items() if value is not None}


def _checked_output(output: Path | None, resume: Path | None, force: bool) -> Path:
    """The checkpoint to write. Refuses one that cannot be written, or that would be replaced unasked."""
    output = output or resume or Path("model.pt")
    require_suffix(output, "a checkpoint", *CHECKPOINT_SUFFIXES)
    require_output(output)
    if output.exists() and not resume and not force:
        raise OutputError(
            f"{show(output)} exists: to train it further, pass --resume {quoted(output)}; to train a new model, choose "
            "another --output, or pass --force"
        )
    return output


def _resumed(path: Path, changes: dict[str, Any]) -> tuple[Checkpoint, Source]:
    """A checkpoint with some of its settings changed, and the images that it is trained on."""
    checkpoint = Checkpoint.load(open_model(path))
    require_finite(checkpoint.raw, path)
    settings = msgspec.structs.replace(checkpoint.settings, **changes)
    if settings.steps <= checkpoint.step:
        raise SettingError(
            f"{show(path)} has its {plural(checkpoint.step, 'step')} already: pass a larger number of --steps"
        )
    spec = checkpoint.spec
    try:
        source = find_images(settings.data, labels=settings.labels, array=settings.array)
    except DataError as error:
        if "data" in changes:
            raise
        raise DataError(
            f"{error}; {show(path)} was trained on it: if it is elsewhere now, name it, as in ddpm-train DATA --resume "
            f"{quoted(path)}"
        ) from error
    if source.num_classes != spec.num_classes or spec.class_names not in ((), source.class_names):
        raise SettingError(
            f"the classes in {show(settings.data)} are not those that {show(path)} was trained on"
        )
    return replace(checkpoint, settings=settings), source


def _new(data: str, changes: dict[str, Any], new: NewTraining) -> tuple[ModelSpec, Settings, Source]:
    """The spec and the settings of a new training, and its images."""
    if new["data_range"] and not -math.inf < new["data_range"][0] < new["data_range"][1] < math.inf:
        raise click.UsageError("--data-range is two numbers, the smaller one first")
    preset = PRESETS[new["preset"] or ("digits" if data == DIGITS else "small")]
    labels, dropout, loss = bool(new["labels"]), new["label_dropout"], new["loss"] or "simple"
    if dropout is not None and not labels:
        raise click.UsageError("--label-dropout is for a model with --labels")
    if labels and dropout is None:
        dropout = _LABEL_DROPOUT
    source = find_images(data, labels=labels, array=changes["array"])
    spec = preset.spec(
        Path(data).name,
        _channels(new["channels"], preset, source),
        new["image_size"] or preset.image_size,
        prediction=new["prediction"] or "epsilon",
        schedule=SCHEDULES[new["schedule"] or "linear"],
        variance=new["variance"] or ("learned_range" if loss == "hybrid" else "fixed_large"),
    )
    require_trainable(spec, loss)
    of_training = {name: value for name, value in _typed(**new).items() if name not in _OF_THE_NETWORK}
    settings = preset.settings(**changes | of_training | _typed(label_dropout=dropout))
    return _with_classes(spec, source, null_class=bool(dropout)), settings, source


def _channels(typed: str | None, preset: Preset, source: Source) -> int:
    """Channels of the images: what was typed, else the preset's; images that are no colours keep their own."""
    if typed:
        return _CHANNELS[typed]
    own = source.channels()
    return preset.channels if preset.channels and own in (1, 3) else own


def _with_classes(spec: ModelSpec, source: Source, *, null_class: bool) -> ModelSpec:
    """The spec with the classes of the images; without their names, where these do not fit into a spec."""
    if not source.num_classes:
        return spec
    spec = msgspec.structs.replace(spec, num_classes=source.num_classes, null_class=null_class)
    try:
        ModelSpec.from_json(spec.to_json(), "the new model")
    except SpecError as error:
        raise SettingError(f"{source.num_classes} classes are more than a model can have") from error
    named = msgspec.structs.replace(spec, class_names=source.class_names)
    try:
        return ModelSpec.from_json(named.to_json(room=_PROVENANCE_BYTES), "the new model")
    except (SpecError, UnicodeEncodeError) as error:
        logger.warning(
            "the model has numbers for its classes, as their names do not fit into it: %s", first_line(error)
        )
        return spec


def _read(
    settings: Settings,
    source: Source,
    spec: ModelSpec,
    known_range: DataRange | None,
    place: torch.device,
    workers: int | None,
) -> Dataset:
    """Read the images, if there is memory to train on them, and tell how many there are."""
    kept = pixel_type(source.depths(), settings.data_range)
    require_memory(spec, settings, place, source.count * math.prod(spec.image_shape) * kept.itemsize)
    channels, height, width = spec.image_shape
    with stage("reading images", source.count) as advance:
        data = read_images(
            source,
            (height, width),
            channels,
            data_range=settings.data_range,
            known_range=known_range,
            skip_broken=settings.skip_broken,
            workers=workers,
            progress=advance,
        )
    classes = f" in {plural(source.num_classes, 'class')}" if source.num_classes else ""
    logger.info("%s%s", plural(len(data.images), "image"), classes)
    return data


def _run(trainer: Trainer, output: Path, as_json: bool) -> None:
    """Train, and tell how it ended."""
    settings, shape = trainer.settings, trainer.spec.image_shape
    parameters = sum(p.numel() for p in trainer.network.parameters())
    to_go = settings.steps - trainer.steps_done
    logger.info(
        f"{plural(to_go, 'step')} of {plural(settings.batch_size, 'image')} {'×'.join(map(str, shape))} "
        f"on {trainer.device} · {parameters / 1e6:.1f} M parameters"
    )
    with progress("training", to_go) as advance:
        session = Session(trainer, output, advance)
        finished = session.run()
    if as_json:
        click.echo(json.dumps(_as_json(session), indent=2))
    elif not finished:
        click.echo(
            f"stopped at step {trainer.steps_done} of {settings.steps}; "
            f"continue with: ddpm-train --resume {quoted(output)}"
        )
    else:
        click.echo(
            f"wrote {show(output)} (step {trainer.steps_done}); {session.records} are in {show(session.folder)}"
        )
        click.echo(f"next: ddpm-export {quoted(output)}")
    if not finished:
        raise click.exceptions.Exit(130)


def _as_json(session: Session) -> dict[str, Any]:
    trainer = session.trainer
    return {
        "checkpoint": str(session.output),
        "metrics": str(session.folder / "metrics.csv"),
        "step": trainer.steps_done,
        "steps": trainer.settings.steps,
        "loss": session.loss,
        "images": len(trainer.data.images),
        "data_range": trainer.spec.data_range,
        "class_names": trainer.spec.class_names,
    }
