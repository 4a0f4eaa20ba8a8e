"""ddpm-train: start a training or resume one, and run it. This module imports PyTorch."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

import click
import msgspec

from ddpm_deploy.cli.bodies.progress import progress, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import OutputError, SettingError, SpecError, first_line
from ddpm_deploy.files import quoted, require_output, require_suffix, show
from ddpm_deploy.model_file import CHECKPOINT_SUFFIXES, open_model
from ddpm_deploy.schedule import SCHEDULES
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import Checkpoint, require_finite
from ddpm_deploy.train.data import DIGITS, Dataset, Source, find_images, read_images
from ddpm_deploy.train.diffusion import require_trainable
from ddpm_deploy.train.memory import require_memory
from ddpm_deploy.train.network import torch_device
from ddpm_deploy.train.session import Session
from ddpm_deploy.train.settings import PRESETS, Settings
from ddpm_deploy.train.trainer import Trainer
from ddpm_deploy.words import Loss, Prediction, Schedule, Variance
from ddpm_deploy.words import Preset as PresetName

_LABEL_DROPOUT: Final = 0.1
_CHANNELS: Final[dict[str | None, int]] = {"grey": 1, "rgb": 3}
_PROVENANCE_BYTES: Final = 300  # what training and export may yet add to a spec


class NewTraining(TypedDict):
    """The options that a new training alone has; None where they were not typed."""

    preset: PresetName | None
    image_size: int | None
    channels: Literal["grey", "rgb"] | None
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


_OF_THE_NETWORK: Final = {"preset", "image_size", "channels", "prediction", "variance", "schedule"}


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
    skip_broken: bool,
    force: bool,
    **new: Unpack[NewTraining],
) -> None:
    """Train a network, from the start or from a checkpoint, and save it."""
    if data is None and not resume:
        raise click.UsageError(
            "DATA is missing: a folder of images, an .npy or .npz file, or the word digits"
        )
    try:
        (data or "").encode()
    except UnicodeEncodeError as error:  # a checkpoint names its data in JSON, which holds valid text alone
        raise SettingError("the name of DATA is not UTF-8: rename it, or reach it by a link") from error
    target = _checked_output(output, resume, force)
    changes = _typed(
        data=data,
        steps=steps,
        save_every=save_every,
        sample_every=sample_every,
        skip_broken=skip_broken or None,
    )
    place = torch_device(device)
    if resume:
        if typed := sorted(f"--{name.replace('_', '-')}" for name in _typed(**new)):
            raise click.UsageError(
                f"{', '.join(typed)} cannot change on --resume: the checkpoint has its own"
            )
        checkpoint, source = _resumed(resume, changes)
        require_memory(checkpoint.spec, checkpoint.settings, place, source.count)
        images = _read(checkpoint.settings, source, checkpoint.spec, workers)
        trainer = Trainer.resume(checkpoint, images, place, compiled=compiled)
    else:
        spec, settings, source = _new(changes, new)
        require_memory(spec, settings, place, source.count)
        images = _read(settings, source, spec, workers)
        trainer = Trainer(spec, settings, images, place, compiled=compiled)
    _run(trainer, target)


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
            f"{show(path)} has its {checkpoint.step} steps already: pass a larger number of --steps"
        )
    source, spec = find_images(settings.data, labels=settings.labels), checkpoint.spec
    if source.num_classes != spec.num_classes or spec.class_names not in ((), source.class_names):
        raise SettingError(
            f"the classes in {show(settings.data)} are not those that {show(path)} was trained on"
        )
    return replace(checkpoint, settings=settings), source


def _new(changes: dict[str, Any], new: NewTraining) -> tuple[ModelSpec, Settings, Source]:
    """The spec and the settings of a new training, and its images."""
    data = changes["data"]
    preset = PRESETS[new["preset"] or ("digits" if data == DIGITS else "small")]
    labels, dropout, loss = bool(new["labels"]), new["label_dropout"], new["loss"] or "simple"
    if dropout is not None and not labels:
        raise click.UsageError("--label-dropout is for a model with --labels")
    if labels and dropout is None:
        dropout = _LABEL_DROPOUT
    source = find_images(data, labels=labels)
    spec = preset.spec(
        Path(data).name,
        _CHANNELS.get(new["channels"]) or preset.channels or (1 if source.grey() else 3),
        new["image_size"] or preset.image_size,
        prediction=new["prediction"] or "epsilon",
        schedule=SCHEDULES[new["schedule"] or "linear"],
        variance=new["variance"] or ("learned_range" if loss == "hybrid" else "fixed_large"),
    )
    require_trainable(spec, loss)
    of_training = {name: value for name, value in _typed(**new).items() if name not in _OF_THE_NETWORK}
    settings = preset.settings(**changes | of_training | _typed(label_dropout=dropout))
    return _with_classes(spec, source, null_class=bool(dropout)), settings, source


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


def _read(settings: Settings, source: Source, spec: ModelSpec, workers: int | None) -> Dataset:
    """Read the images, and tell how many there are."""
    (channels, size, _), skip = spec.image_shape, settings.skip_broken
    with stage("reading images", source.count) as advance:
        data = read_images(source, size, channels, skip_broken=skip, workers=workers, progress=advance)
    count, classes = len(data.images), f" in {source.num_classes} classes" if source.num_classes else ""
    left_out = f" ({source.count - count} broken ones left out)" if source.count > count else ""
    logger.info("%d images%s%s", count, classes, left_out)
    return data


def _run(trainer: Trainer, output: Path) -> None:
    """Train, and tell how it ended."""
    settings, shape = trainer.settings, trainer.spec.image_shape
    parameters = sum(p.numel() for p in trainer.network.parameters())
    to_go = settings.steps - trainer.steps_done
    logger.info(
        f"{to_go} steps of {settings.batch_size} images {'×'.join(map(str, shape))} on {trainer.device} · "
        f"{parameters / 1e6:.1f} M parameters"
    )
    with progress("training", to_go) as advance:
        session = Session(trainer, output, advance)
        finished = session.run()
    if not finished:
        click.echo(
            f"stopped at step {trainer.steps_done} of {settings.steps}; "
            f"continue with: ddpm-train --resume {quoted(output)}"
        )
        raise click.exceptions.Exit(130)
    click.echo(
        f"wrote {show(output)} (step {trainer.steps_done}); metrics and samples are in {show(session.folder)}"
    )
    click.echo(f"next: ddpm-export {quoted(output)}")
