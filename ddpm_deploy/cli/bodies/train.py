"""ddpm-train: start a training or resume one, and run it. This module imports PyTorch."""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

import click
import msgspec
import torch

from ddpm_deploy.cli.bodies.progress import progress, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import DataError, OutputError, SettingError, SpecError, first_line, plural
from ddpm_deploy.files import quoted, require_output, require_suffix, show
from ddpm_deploy.machine import cpu_cores, cpu_threads
from ddpm_deploy.model_file import CHECKPOINT_SUFFIXES, open_model
from ddpm_deploy.schedule import SCHEDULES
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import Checkpoint, require_finite
from ddpm_deploy.train.data import DIGITS, DataRange, Dataset, Source, find_images, read_images
from ddpm_deploy.train.data.scale import pixel_type
from ddpm_deploy.train.diffusion import require_trainable
from ddpm_deploy.train.memory import require_memory
from ddpm_deploy.train.session import Session
from ddpm_deploy.train.settings import PRESETS, Preset, Settings
from ddpm_deploy.train.trainer import Trainer
from ddpm_deploy.train.world import ToldElsewhereError, World
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
    world = World.of_environment()
    if not world.writes:
        logger.setLevel(logging.ERROR)
    target = output or resume or Path("model.pt")

    def make() -> Trainer:
        _require_data(data, resume)
        if world.writes:
            _require_output(target, resume, force)
        changes = _typed(
            data=_lasting(data),
            array="" if data and array is None else array,  # other data have other arrays
            steps=steps,
            save_every=save_every,
            sample_every=sample_every,
            skip_broken=skip_broken or None,
        )
        place = _Place(world, world.device(device), compiled, workers)
        _use_threads(world, place.device)
        return _resumed(resume, changes, new, place) if resume else _new(data or "", changes, new, place)

    try:
        with world.joined():
            trainer = world.alike(make, _identity)
            finished = _run(trainer, target, as_json)
    except ToldElsewhereError as error:
        raise click.exceptions.Exit(130 if isinstance(error.__cause__, KeyboardInterrupt) else 1) from error
    if not finished:
        raise click.exceptions.Exit(130)


@dataclass(frozen=True)
class _Place:
    """Where and by whom a training is done. workers: threads that read the images (None: as many as compute)."""

    world: World
    device: torch.device
    compiled: bool
    workers: int | None


def _use_threads(world: World, device: torch.device) -> None:
    """Have PyTorch compute on this process's part of the cores, and say so where a launcher leaves some idle."""
    threads, cores = cpu_threads(world.local_size), cpu_cores()
    torch.set_num_threads(threads)
    if world.size > 1 and device.type == "cpu" and cores >= 2 * threads * world.local_size:
        logger.info(
            f"{plural(world.local_size, 'process')} with {plural(threads, 'thread')} each leave some of the {cores} "
            f"cores idle: set OMP_NUM_THREADS={cores // world.local_size} before torchrun"
        )


def _identity(trainer: Trainer) -> str:
    """What all processes of a training must have alike."""
    kind, compiled = trainer.device.type, trainer.compiled
    settings = msgspec.structs.replace(
        trainer.settings, data=""
    )  # the images may be elsewhere, and have a digest
    of_settings = msgspec.json.encode(settings).decode()
    return "\n".join(
        [trainer.spec.to_json(), of_settings, str(trainer.steps_done), kind, str(compiled), torch.__version__]
    )


def _require_data(data: str | None, resume: Path | None) -> None:
    """Refuse a command line that names no data, or data that are no files."""
    if data is None and not resume:
        raise click.UsageError(
            "DATA is missing: a folder or a .zip of images, an .npy, .npz or idx file, or the word digits"
        )
    if data in ("", "-"):
        raise click.UsageError("DATA is read from files, and not from standard input: name them")


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


def _require_output(output: Path, resume: Path | None, force: bool) -> None:
    """Refuse a checkpoint that cannot be written, or that would be replaced unasked."""
    require_suffix(output, "a checkpoint", *CHECKPOINT_SUFFIXES)
    require_output(output)
    if output.exists() and not resume and not force:
        raise OutputError(
            f"{show(output)} exists: to train it further, pass --resume {quoted(output)}; to train a new model, choose "
            "another --output, or pass --force"
        )


def _resumed(path: Path, changes: dict[str, Any], new: NewTraining, place: _Place) -> Trainer:
    """The training that a checkpoint is of."""
    if typed := sorted(f"--{name.replace('_', '-')}" for name in _typed(**new)):
        raise click.UsageError(f"{', '.join(typed)} cannot change on --resume: the checkpoint has its own")
    checkpoint, source = _loaded(path, changes)
    spec = checkpoint.spec
    images = _read(checkpoint.settings, source, spec, spec.data_range, place)
    return Trainer.resume(checkpoint, images, place.device, compiled=place.compiled, world=place.world)


def _loaded(path: Path, changes: dict[str, Any]) -> tuple[Checkpoint, Source]:
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


def _new(data: str, changes: dict[str, Any], new: NewTraining, place: _Place) -> Trainer:
    """A new training."""
    spec, settings, source = _begun(data, changes, new)
    images = _read(settings, source, spec, None, place)
    spec = msgspec.structs.replace(spec, data_range=images.data_range)
    return Trainer(spec, settings, images, place.device, compiled=place.compiled, world=place.world)


def _begun(data: str, changes: dict[str, Any], new: NewTraining) -> tuple[ModelSpec, Settings, Source]:
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
    place: _Place,
) -> Dataset:
    """Read the images, if there is memory to train on them, and tell how many there are."""
    kept = pixel_type(source.depths(), settings.data_range)
    takes = source.count * math.prod(spec.image_shape) * kept.itemsize
    require_memory(spec, settings, place.device, takes, place.world)
    channels, height, width = spec.image_shape
    with stage("reading images", source.count) as advance:
        data = read_images(
            source,
            (height, width),
            channels,
            data_range=settings.data_range,
            known_range=known_range,
            skip_broken=settings.skip_broken,
            workers=place.workers or torch.get_num_threads(),
            progress=advance,
        )
    classes = f" in {plural(source.num_classes, 'class')}" if source.num_classes else ""
    logger.info("%s%s", plural(len(data.images), "image"), classes)
    return data


def _run(trainer: Trainer, output: Path, as_json: bool) -> bool:
    """Train, and tell how it ended; returns whether the last step was reached."""
    settings, shape = trainer.settings, trainer.spec.image_shape
    parameters = sum(p.numel() for p in trainer.network.parameters())
    to_go = settings.steps - trainer.steps_done
    logger.info(
        f"{plural(to_go, 'step')} of {plural(settings.batch_size, 'image')} {'×'.join(map(str, shape))} "
        f"on {_where(trainer)} · {parameters / 1e6:.1f} M parameters"
    )
    with progress("training", to_go) as advance:
        session = Session(trainer, output, advance)
        finished = session.run()
    if not trainer.world.writes:
        return finished
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
    return finished


def _where(trainer: Trainer) -> str:
    """What trains."""
    processes = trainer.world.size
    return f"{processes} × {trainer.device.type}" if processes > 1 else str(trainer.device)


def _as_json(session: Session) -> dict[str, Any]:
    trainer = session.trainer
    return {
        "checkpoint": str(session.output),
        "metrics": str(session.folder / "metrics.csv"),
        "step": trainer.steps_done,
        "steps": trainer.settings.steps,
        "loss": session.loss,
        "images": len(trainer.data.images),
        "processes": trainer.world.size,
        "data_range": trainer.spec.data_range,
        "class_names": trainer.spec.class_names,
    }
