"""ddpm-train: images → a trained ε-network."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.cli.common import FilePath, Words, command, logger, refuse_given
from ddpm_deploy.cli.progress import progress
from ddpm_deploy.errors import OutputError, SettingError

if TYPE_CHECKING:
    from ddpm_deploy.spec import ModelSpec
    from ddpm_deploy.train.data import Dataset, Source
    from ddpm_deploy.train.settings import Settings
    from ddpm_deploy.train.trainer import Trainer

_PRESETS: Final = ("digits", "small", "cifar10", "256")  # of train.settings.PRESETS, named here without torch
# Of solvers, train.settings and schedule, likewise.
_PREDICTIONS: Final = ("epsilon", "v", "x0", "mean")
_LOSSES: Final = ("simple", "vlb", "hybrid")
_VARIANCES: Final = ("fixed_small", "fixed_large", "learned_range")
_SCHEDULES: Final = ("linear", "cosine", "sigmoid", "scaled_linear")
_LABEL_DROPOUT: Final = 0.1
_PROVENANCE_BYTES: Final = 300  # what training and export may yet add to a spec
_SETTINGS: Final = (
    "loss",
    "steps",
    "batch_size",
    "learning_rate",
    "flip",
    "seed",
    "save_every",
    "sample_every",
    "skip_broken",
    "accumulate",
    "amp",
    "labels",
    "label_dropout",
)
_NEW_ON_RESUME: Final = {
    "data",
    "output",
    "resume",
    "steps",
    "device",
    "save_every",
    "sample_every",
    "skip_broken",
    "force",
    "workers",
    "compiled",
}


@command(
    "Images → a trained network.",
    """
  ddpm-train digits -o digits.pt                 handwritten digits, minutes on a CPU
  ddpm-train photos/ -o model.pt --steps 20000   your own images, scaled and cropped to 32×32
  ddpm-train pets/ --labels -o pets.pt           class-conditional: pets/cat/*.jpg, pets/dog/*.jpg
  ddpm-train digits -o v.pt --prediction v --schedule cosine
  ddpm-train digits -o h.pt --loss hybrid        learns its variance too, for chains of few steps
  ddpm-train cifar.npz -o model.pt --preset cifar10 --device cuda --amp --compile
  ddpm-train --resume model.pt                   go on after Ctrl-C
  ddpm-train --resume model.pt --steps 40000     train a finished model further (its learning rate
                                                 follows the schedule of the longer training)
""",
)
@click.argument("data", required=False)
@click.option(
    "-o",
    "--output",
    type=FilePath,
    show_default="model.pt, or the resumed file",
    help="The checkpoint to write.",
)
@click.option("--resume", type=FilePath, help="Go on from this checkpoint, with its settings.")
@click.option(
    "--preset",
    type=click.Choice(_PRESETS),
    show_default="digits for digits, else small",
    help="Network and training settings.",
)
@click.option("--image-size", type=click.IntRange(1, 4096), help="Height and width.  [default: the preset's]")
@click.option(
    "--channels",
    type=click.Choice(["grey", "rgb"]),
    help="Of the images.  [default: the preset's, or as they are]",
)
@click.option("--steps", type=click.IntRange(1, 10**9), help="Training steps.  [default: the preset's]")
@click.option("--batch-size", type=click.IntRange(1, 65_536), help="Images a step.  [default: the preset's]")
@click.option("--learning-rate", type=click.FloatRange(0, 1, min_open=True), help="[default: the preset's]")
@click.option("--prediction", type=Words(_PREDICTIONS), default="epsilon", help="What the network predicts.")
@click.option(
    "--loss",
    type=Words(_LOSSES),
    default="simple",
    help="simple: squared error; vlb: the variational bound; hybrid: both, with a learned variance.",
)
@click.option(
    "--variance",
    type=Words(_VARIANCES),
    help="Of the reverse steps.  [default: fixed_large; learned_range with hybrid]",
)
@click.option("--schedule", type=Words(_SCHEDULES), default="linear", help="Of β, the noise.")
@click.option("--labels", is_flag=True, help="A class-conditional model: a class for each folder in DATA.")
@click.option(
    "--label-dropout",
    type=click.FloatRange(0, 1, max_open=True),
    help="With --labels: share of the images shown without theirs, for guidance.  [default: 0.1]",
)
@click.option(
    "--accumulate", type=click.IntRange(1, 65_536), help="Take a batch in so many parts, to save memory."
)
@click.option(
    "--amp", is_flag=True, help="Mixed precision (bfloat16): for GPUs and CPUs that are built for it."
)
@click.option(
    "--compile", "compiled", is_flag=True, help="torch.compile: a slow first step, faster ones after it."
)
@click.option(
    "--workers", type=click.IntRange(1, 256), help="Threads that read images.  [default: one a core]"
)
@click.option("--flip/--no-flip", default=None, help="Mirror images at random.  [default: the preset's]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of everything random.")
@click.option("--device", default="auto", help="cpu, cuda, …; auto: a GPU where there is one.")
@click.option("--save-every", type=click.IntRange(min=1), help="Steps between checkpoints.  [default: 1000]")
@click.option(
    "--sample-every",
    type=click.IntRange(min=0),
    help="Steps between pictures of samples; 0: none.  [default: 1000]",
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read.")
@click.pass_context
def main(
    ctx: click.Context, /, data: str | None, output: Path | None, resume: Path | None, **options: Any
) -> None:
    """Train on DATA: a folder of images, an .npy or .npz of uint8 images, or the word "digits".

    \b
    Presets:
      digits   8×8 grey, 0.7 M parameters: minutes on a CPU
      small    32×32, 1.5 M parameters: an hour on a CPU
      cifar10  32×32 RGB, the paper's 35.7 M parameters: for a GPU
      256      256×256 RGB, the paper's 114 M parameters: for large GPUs
    """
    from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES
    from ddpm_deploy.dependencies import require
    from ddpm_deploy.files import quoted, require_output, show

    if not resume and data is None:
        raise click.UsageError(
            "DATA is missing: a folder of images, an .npy or .npz file, or the word digits"
        )
    output = output or resume or Path("model.pt")
    if output.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise SettingError(f"{show(output)}: the output's name must end in .pt")
    require_output(output)
    if output.exists() and not resume and not options["force"]:
        raise OutputError(
            f"{show(output)} exists: to train on, say --resume {quoted(output)}; to begin anew, name another "
            "--output, or pass --force"
        )
    _require_text(data)
    require("torch", "train")
    require("PIL.Image", "train")
    if resume:
        refuse_given(ctx, _NEW_ON_RESUME, "cannot change on --resume: the checkpoint holds the settings")
        trainer = _resumed(resume, data, options)
    else:
        assert data is not None
        trainer = _new(data, options)
    _train(trainer, output)


def _require_text(data: str | None) -> None:
    """A checkpoint names its data in JSON, which holds no broken text."""
    try:
        (data or "").encode()
    except UnicodeEncodeError as error:
        raise SettingError("the name of DATA is not UTF-8: reach it by a link with another name") from error


def _train(trainer: "Trainer", output: Path) -> None:
    from ddpm_deploy.files import quoted, show
    from ddpm_deploy.train.session import Session

    settings, shape = trainer.settings, trainer.spec.image_shape
    parameters = sum(p.numel() for p in trainer.network.parameters())
    logger.info(
        "%d steps of %d images %s on %s · %.1f M parameters",
        settings.steps - trainer.steps_done,
        settings.batch_size,
        "×".join(map(str, shape)),
        trainer.device,
        parameters / 1e6,
    )
    with progress("training", length=settings.steps - trainer.steps_done) as advance:
        session = Session(trainer, output, advance)
        finished = session.run()
    if not finished:
        click.echo(
            f"stopped at step {trainer.steps_done} of {settings.steps}; "
            f"go on with: ddpm-train --resume {quoted(output)}"
        )
        raise click.exceptions.Exit(130)
    click.echo(
        f"wrote {show(output)} (step {trainer.steps_done}); metrics and samples are in {show(session.folder)}"
    )
    click.echo(f"next: ddpm-export {quoted(output)}")


def _resumed(path: Path, data: str | None, options: dict[str, Any]) -> "Trainer":
    import msgspec

    from ddpm_deploy.files import show
    from ddpm_deploy.train.checkpoint import Checkpoint, require_finite
    from ddpm_deploy.train.data import find_images
    from ddpm_deploy.train.denoiser import torch_device
    from ddpm_deploy.train.trainer import Trainer

    checkpoint = Checkpoint.load(path)
    require_finite(checkpoint.raw, path)
    settings = msgspec.structs.replace(
        checkpoint.settings,
        data=data or checkpoint.settings.data,
        steps=options["steps"] or checkpoint.settings.steps,
        skip_broken=options["skip_broken"] or checkpoint.settings.skip_broken,
        **{name: options[name] for name in ("save_every", "sample_every") if options[name] is not None},
    )
    if settings.steps <= checkpoint.step:
        raise SettingError(
            f"{show(path)} has its {checkpoint.step} steps already: say how far to go with --steps"
        )
    checkpoint = dataclasses.replace(checkpoint, settings=settings)
    spec = checkpoint.spec
    device = torch_device(options["device"])
    source = find_images(settings.data, labels=settings.labels)
    if source.num_classes != spec.num_classes or spec.class_names not in ((), source.class_names):
        raise SettingError(
            f"the classes in {show(settings.data)} are not those that {show(path)} was trained on"
        )
    images = _read(settings, source, spec, options["workers"])
    return Trainer.resume(checkpoint, images, device, compiled=options["compiled"])


def _new(data: str, options: dict[str, Any]) -> "Trainer":
    from ddpm_deploy.schedule import SCHEDULES
    from ddpm_deploy.train.data import DIGITS, find_images
    from ddpm_deploy.train.denoiser import torch_device
    from ddpm_deploy.train.diffusion import require_trainable
    from ddpm_deploy.train.settings import PRESETS
    from ddpm_deploy.train.trainer import Trainer

    device = torch_device(options["device"])
    preset = PRESETS[options["preset"] or ("digits" if data == DIGITS else "small")]
    if options["label_dropout"] is not None and not options["labels"]:
        raise click.UsageError("--label-dropout is for a model with --labels")
    if options["labels"] and options["label_dropout"] is None:
        options["label_dropout"] = _LABEL_DROPOUT
    source = find_images(data, labels=options["labels"])
    channels = (
        {"grey": 1, "rgb": 3}.get(options["channels"]) or preset.channels or (1 if source.grey() else 3)
    )
    spec = preset.spec(
        Path(data).name,
        channels,
        options["image_size"] or preset.image_size,
        prediction=options["prediction"],
        schedule=SCHEDULES[options["schedule"]],
        variance=options["variance"] or ("learned_range" if options["loss"] == "hybrid" else "fixed_large"),
    )
    require_trainable(spec, options["loss"])
    spec = _with_classes(spec, source, bool(options["label_dropout"]))
    settings = preset.settings(
        data=data,
        **{name: options[name] for name in _SETTINGS if options[name] is not None},
    )
    images = _read(settings, source, spec, options["workers"])
    return Trainer(spec, settings, images, device, compiled=options["compiled"])


def _with_classes(spec: "ModelSpec", source: "Source", null_class: bool) -> "ModelSpec":
    """The spec with the classes of the source; without their names, where these are too many to ride in a file."""
    import msgspec

    from ddpm_deploy.errors import SpecError, first_line
    from ddpm_deploy.spec import ModelSpec

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
            "the model knows its classes by number, as their names cannot be in it: %s", first_line(error)
        )
        return spec


def _read(settings: "Settings", source: "Source", spec: "ModelSpec", workers: int | None) -> "Dataset":
    from ddpm_deploy.train.data import read_images

    channels, size, _ = spec.image_shape
    with progress("reading images", length=source.count) as advance:
        data = read_images(
            source,
            size,
            channels,
            skip_broken=settings.skip_broken,
            workers=workers,
            progress=lambda done: advance(done, None),
        )
    count, classes = len(data.images), f" of {source.num_classes} classes" if source.num_classes else ""
    left_out = f" ({source.count - count} broken ones left out)" if source.count > count else ""
    logger.info("%d images%s%s", count, classes, left_out)
    return data
