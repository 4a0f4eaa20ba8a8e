"""ddpm-run: a model → images, by the full reverse chain."""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.cli.common import (
    FilePath,
    check_outputs,
    command,
    logger,
    open_denoiser,
    refuse_given,
    require_apart,
    weights_option,
)
from ddpm_deploy.cli.progress import duration, peak_memory, plural, stage, time_step
from ddpm_deploy.errors import OutputError, SettingError
from ddpm_deploy.version import __version__

if TYPE_CHECKING:
    from ddpm_deploy.runtime.denoiser import Array, Labels
    from ddpm_deploy.runtime.sampler import Sampler, SampleSettings
    from ddpm_deploy.runtime.snapshot import Snapshot
    from ddpm_deploy.spec import ChainSettings

# Of solvers.Solver and spacings.Spacing, named here without NumPy, so that --help is quick.
_SOLVERS: Final = ("ddpm", "ddim", "dpmpp-2m")
_SPACINGS: Final = ("leading", "trailing", "linspace", "openai")
_ANY_WAY: Final = {"model", "weights", "device", "threads"}
_WITH_REPLAY: Final = {*_ANY_WAY, "replay", "batch"}
_WITH_RESUME: Final = {*_ANY_WAY, "resume", "output", "as_float", "progress", "snapshot"}
_SNAPSHOT_SECONDS: Final = 60.0


@command(
    "A model → new images.",
    """
  ddpm-run model.onnx                          16 images, the full chain, in samples.png
  ddpm-run model.onnx --steps 50 --seed 7      a strided chain of 50 steps, and a seed to repeat it
  ddpm-run model.onnx --solver dpmpp-2m --steps 20 --spacing linspace
  ddpm-run model.onnx --count 5000 -o s.npz    uint8 (5000, H, W, C), as evaluators read it
  ddpm-run model.onnx --count 100 -o images/   a folder, one PNG an image
  ddpm-run pets.onnx --label cat --label dog   of these classes in turn; without it, of each class
  ddpm-run pets.onnx --label cat --guidance 3  more like a cat, and less like any other
  ddpm-run model.onnx --progress chain.gif     see the images appear; a .png is a film strip
  ddpm-run model.onnx --snapshot chain.npz     can be interrupted, and goes on with
  ddpm-run model.onnx --resume chain.npz       here or on another machine
  ddpm-run model.onnx --replay samples.png     make a picture again, and compare
  ddpm-run engine.plan                         an engine, on the GPU it was built for
  ddpm-run model.onnx --device cuda            builds its engine here, once, and runs that
  ddpm-run model.pt                            the checkpoint itself, in PyTorch: the reference
""",
)
@click.argument("model", type=FilePath)
@click.option(
    "-o",
    "--output",
    type=FilePath,
    default=Path("samples.png"),
    help="A .png (one grid), an .npz, or a folder.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), show_default="all of the model's", help="Steps of the chain."
)
@click.option("--count", type=click.IntRange(1, 10_000_000), default=16, help="Images.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    show_default="a fresh one",
    help="Of the noise; each image depends on it and its index alone.",
)
@click.option(
    "--first-index", type=click.IntRange(0, 2**64 - 1), default=0, help="Sample index of the first image."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 65_536),
    show_default="64, fewer for images over 16×16; of an engine, its largest",
    help="Images in flight at once.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    show_default="each class in turn",
    help="Class of a conditional model, by its name, else its number; several: in turn.",
)
@click.option(
    "--solver",
    type=click.Choice(_SOLVERS),
    default="ddpm",
    help="ddpm: ancestral sampling; ddim: some 50 steps; dpmpp-2m: some 20.",
)
@click.option("--eta", type=click.FloatRange(0, 1), help="Of ddim: 0, no noise, to 1.  [default: 0]")
@click.option(
    "--spacing",
    type=click.Choice(_SPACINGS),
    default="leading",
    help="Of the timesteps, where --steps are fewer than all.",
)
@click.option(
    "--guidance",
    type=float,
    help="Scale of classifier-free guidance, for a model with a null class; 1: plain. Halves the largest batch.",
)
@click.option(
    "--progress", type=FilePath, help="A .gif of how the first images appear, or a .png (film strip)."
)
@click.option(
    "--snapshot", type=FilePath, help="Save the chain, of one batch, here every minute and when interrupted."
)
@click.option("--resume", type=FilePath, help="Go on with a chain from its snapshot, and keep it up to date.")
@weights_option
@click.option(
    "--device", help="cpu, or cuda: an .onnx is built into an engine here, once. For a .pt any torch device."
)
@click.option("--threads", type=click.IntRange(1, 1024), show_default="one a core", help="Of the CPU.")
@click.option(
    "--replay", type=FilePath, help="Make this PNG again, from what it says of itself, and compare."
)
@click.option(
    "--float", "as_float", is_flag=True, help="In an .npz: `samples`, float32 (N, C, H, W), unrounded."
)
@click.pass_context
def main(ctx: click.Context, /, model: Path, **options: Any) -> None:
    """Draw images from MODEL: an .onnx file, an engine (.plan), or a checkpoint (.pt), run in PyTorch."""
    from ddpm_deploy.artefact import read_spec, require_intact

    read_spec(model)
    require_intact(model)
    if options["replay"] and options["resume"]:
        raise click.UsageError("--replay and --resume are two things to do: choose one")
    if options["replay"]:
        refuse_given(ctx, _WITH_REPLAY, "cannot be given with --replay: the picture has its own settings")
        _replay(model, options)
    elif options["resume"]:
        refuse_given(ctx, _WITH_RESUME, "cannot be given with --resume: the snapshot has its own settings")
        _resume(model, options)
    else:
        _draw(model, options)


@dataclass(frozen=True)
class _Job:
    """What to draw. cycle: labels, in turn by sample index."""

    settings: "ChainSettings"
    seed: int
    first_index: int
    count: int
    cycle: tuple[int, ...]
    guidance: float | None

    def arguments(self) -> "SampleSettings":
        """As `Sampler.sample` takes them."""
        return {
            "steps": self.settings.steps,
            "solver": self.settings.solver,
            "eta": self.settings.eta,
            "spacing": self.settings.spacing,
            "seed": self.seed,
            "first_index": self.first_index,
            "labels": _in_turn(self.cycle, self.first_index, self.count),
            "guidance": self.guidance,
        }

    def origin(self, sampler: "Sampler") -> dict[str, Any]:
        """What a picture says of where it came from."""
        return {
            "model": sampler.spec.provenance.digest,
            "seed": self.seed,
            "solver": self.settings.solver,
            "steps": len(sampler.table(self.settings)),
            "spacing": self.settings.spacing,
            "eta": self.settings.eta,
            "guidance": self.guidance,
            "labels": self.cycle,
            "ddpm_deploy": __version__,
        }


def _in_turn(cycle: Sequence[int], first_index: int, count: int) -> "Labels | None":
    """The label of each sample: it depends on its index alone."""
    import numpy as np

    if not cycle:
        return None
    return np.resize(np.roll(cycle, -(first_index % len(cycle))), count)


def _open(model: Path, options: dict[str, Any], images: int | None, guidance: float | None) -> "Sampler":
    """The model, to run so many images at once (None: as many as are best)."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.runtime.backend import runs_on_gpu
    from ddpm_deploy.runtime.denoiser import default_max_batch
    from ddpm_deploy.runtime.sampler import Sampler

    rows = images
    if guidance is not None and images is not None:
        rows = 2 * images
    elif guidance is not None and not runs_on_gpu(model, options["device"]):
        rows = max(2, default_max_batch(read_spec(model)))
    where = {name: options[name] for name in ("weights", "device", "threads")}
    return Sampler(open_denoiser(model, max_batch=rows, **where))


def _draw(model: Path, options: dict[str, Any]) -> None:
    from ddpm_deploy.spec import ChainSettings

    count, batch, guidance = options["count"], options["batch"], options["guidance"]
    seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
    settings = ChainSettings(**{name: options[name] for name in ("steps", "solver", "eta", "spacing")})
    _check_outputs(model, options)
    with _open(model, options, batch and min(batch, count), guidance) as sampler:
        cycle = tuple(sampler.spec.label(label) for label in options["labels"])
        job = _Job(settings, seed, options["first_index"], count, cycle, guidance)
        most = sampler.max_batch(guidance)
        if options["snapshot"] and count > most:
            raise SettingError(
                f"a snapshot holds one batch, and {count} images take several: --batch {count}, or a --count of at "
                f"most {most}"
            )
        watch = _Watch(sampler, job, model, options)
        parts = sampler.iter_samples(count, callback=watch, **job.arguments())
        _write(sampler, job, lambda: parts, watch, options)


def _resume(model: Path, options: dict[str, Any]) -> None:
    from ddpm_deploy.runtime.snapshot import Snapshot

    snapshot = Snapshot.load(options["resume"])
    options["snapshot"] = options["snapshot"] or options["resume"]
    _check_outputs(model, options)
    job = _job_of(snapshot)
    if options["progress"] and snapshot.step == len(snapshot.batch.table):
        raise SettingError("this chain is at its end, and there is no progress to show: leave out --progress")
    with _open(model, options, job.count, job.guidance) as sampler:
        sampler.require_fits(snapshot)
        watch = _Watch(sampler, job, model, options, snapshot.step)
        _write(sampler, job, lambda: [sampler.resume(snapshot, callback=watch)], watch, options)


def _job_of(snapshot: "Snapshot") -> _Job:
    """What the command line was that a snapshot was taken of."""
    import numpy as np

    batch = snapshot.batch
    scales = None if batch.guidance is None else np.unique(batch.guidance)
    if batch.settings is None or (scales is not None and len(scales) > 1):
        raise SettingError(
            "no command line says what this snapshot, taken in Python, is of: go on with Sampler.resume"
        )
    cycle = () if batch.labels is None else np.roll(batch.labels, batch.first_index % batch.count).tolist()
    guidance = None if scales is None else float(scales[0])
    return _Job(batch.settings, batch.seed, batch.first_index, batch.count, tuple(cycle), guidance)


def _require_snapshot(path: Path) -> None:
    """Refuse to replace what is no snapshot."""
    from ddpm_deploy.errors import ArtefactError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.snapshot import Snapshot

    if path.suffix.lower() != ".npz":
        raise SettingError(f"{show(path)}: the snapshot's name must end in .npz")
    if path.exists():
        try:
            Snapshot.load(path)
        except ArtefactError as error:
            raise OutputError(f"{error}: name another file for --snapshot, which would replace it") from error


def _check_outputs(model: Path, options: dict[str, Any]) -> None:
    """Refuse outputs that would replace one another or what is read, before anything is loaded."""
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.proof import proof_path

    read = [model, proof_path(model)]
    if options["snapshot"]:
        check_outputs([options["snapshot"]], read)
        _require_snapshot(options["snapshot"])
    folder = os.path.realpath(options["output"])  # which bears loops of links
    if options["progress"] and os.path.realpath(options["progress"].parent) == folder:
        raise SettingError(
            f"{show(options['progress'])} is among the images of this run: name a file elsewhere"
        )
    check_outputs([options["progress"]], [*read, *filter(None, [options["snapshot"], options["resume"]])])
    written = [options["progress"], options["snapshot"], options["resume"]]
    require_apart(options["output"], [*read, *filter(None, written)])


class _Watch:
    """What goes on while a chain runs: the bar, the preview, snapshots."""

    def __init__(
        self, sampler: "Sampler", job: _Job, model: Path, options: dict[str, Any], first: int = 0
    ) -> None:
        from ddpm_deploy.runtime.preview import Preview

        self.steps, self.first = len(sampler.table(job.settings)), first
        self._sampler, self._model = sampler, model
        self._snapshot: Path | None = options["snapshot"]
        self._saved = time.monotonic()
        self._stopped = False
        self.preview = options["progress"] and Preview(options["progress"], sampler.spec, self.steps, first)
        if self.preview:
            self.preview.check()
        self.advance: Callable[[int], None] = lambda steps: None

    def stop(self) -> None:
        """End after the step at hand."""
        self._stopped = True

    def signals(self) -> AbstractContextManager[None]:
        """Take Ctrl-C as `stop` where that saves something."""
        from ddpm_deploy.signals import stop_on_signals

        return stop_on_signals(self.stop, "with the snapshot saved") if self._snapshot else nullcontext()

    def wants(self, step: int) -> bool:
        """Whether a Sampler is to call this after a step; it is asked after each."""
        self.advance(1)
        return bool(self.preview and self.preview.wants(step)) or self._saves(step)

    def _saves(self, step: int) -> bool:
        due = self._stopped or time.monotonic() - self._saved >= _SNAPSHOT_SECONDS
        return (
            bool(self._snapshot) and due and step + 1 < self.steps
        )  # at the last one there is nothing to go on with

    def __call__(self, step: int, x: "Array", x0: "Array") -> None:
        """The callback of a Sampler."""
        if self.preview:
            self.preview.see(step, x, x0)
        if self._snapshot and self._saves(step):
            if self._stopped:
                self._end(self._snapshot)
            else:
                self._save(self._snapshot)

    def _save(self, path: Path) -> None:
        """From time to time: one that fails is not worth the chain."""
        try:
            self._sampler.snapshot().save(path)
        except OutputError as error:
            logger.warning("%s; the chain goes on", error)
        self._saved = time.monotonic()

    def _end(self, path: Path) -> None:
        """Keep what is done and stop; but a chain that is at its end, as a device is a step ahead, is to be written."""
        from ddpm_deploy.files import quoted

        snapshot = self._sampler.snapshot()
        if snapshot.step == self.steps:
            return
        snapshot.save(path)
        click.echo(
            f"stopped after step {snapshot.step} of {self.steps}; go on with: "
            f"ddpm-run {quoted(self._model)} --resume {quoted(path)}"
        )
        raise click.exceptions.Exit(130)


def _write(
    sampler: "Sampler",
    job: _Job,
    draw: Callable[[], Iterable["Array"]],
    watch: _Watch,
    options: dict[str, Any],
) -> None:
    """Draw what the destination takes, with a word before and after."""
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.images import Destination

    destination = Destination(
        options["output"], job.count, job.first_index, sampler.spec, job.origin(sampler), options["as_float"]
    )
    destination.check()
    in_flight = min(job.count, sampler.max_batch(job.guidance))
    batches, steps = -(-job.count // in_flight), watch.steps - watch.first
    rows = in_flight if job.guidance is None else 2 * in_flight
    forecast = time_step(sampler.denoiser, rows) * steps * job.count / in_flight
    images, chain = plural(job.count, "image"), plural(watch.steps, "step")
    going_on = f" from step {watch.first}" if watch.first else ""
    logger.info("%s · %s%s · about %s%s", images, chain, going_on, duration(forecast), peak_memory())
    if job.guidance is not None:
        logger.info(
            "guidance %g takes two rows of the batch: at most %d images at once",
            job.guidance,
            sampler.max_batch(job.guidance),
        )
    start = time.perf_counter()
    with watch.signals(), stage("sampling", batches * steps) as watch.advance, destination.open() as write:
        for samples in draw():
            write(samples)
    if watch.preview:
        watch.preview.save()
    took = duration(time.perf_counter() - start)
    click.echo(f"{show(destination.path)}: {images}, {chain}, seed {job.seed}, in {took}")


def _replay(model: Path, options: dict[str, Any]) -> None:
    """Make a picture again and compare; exits 1 where any pixel is off by more than one level."""
    from ddpm_deploy.errors import DataError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.images import grid, read_origin, to_uint8
    from ddpm_deploy.spec import ChainSettings

    picture = options["replay"]
    origin, pixels = read_origin(picture)
    settings = ChainSettings(steps=origin.steps, solver=origin.solver, eta=origin.eta, spacing=origin.spacing)
    first = origin.first_index if origin.index is None else origin.index
    job = _Job(settings, origin.seed, first, origin.count, origin.labels, origin.guidance)
    batch = options["batch"]
    with _open(model, options, batch and min(batch, job.count), job.guidance) as sampler:
        digest = sampler.spec.provenance.digest
        if origin.model != digest:
            raise DataError(
                f"{show(picture)} was drawn by the model {show(origin.model[:12])}…, and this is {digest[:12]}…"
            )
        again = to_uint8(sampler.sample(job.count, **job.arguments()), sampler.spec.value_range)
    made = grid(again) if origin.index is None else again[0]
    if made.shape != pixels.shape:
        raise DataError(
            f"{show(picture)} was edited: its shape is {pixels.shape}, and {made.shape} was made again"
        )
    difference = abs(made.astype(int) - pixels)
    differing = int((difference > 0).any(axis=2).sum())
    verdict = (
        f"{differing} pixels differ, by up to {difference.max()} of 255" if differing else "the same again"
    )
    images, chain = plural(job.count, "image"), plural(origin.steps, "step")
    click.echo(f"{show(picture)}: {images}, {chain}, seed {job.seed}: {verdict}")
    if difference.max() > 1:
        raise click.exceptions.Exit(1)
