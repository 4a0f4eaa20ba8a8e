"""What ddpm-run and ddpm-deploy resume share: a chain whose images are written, and what goes on while it runs."""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypedDict

import click

from ddpm_deploy.cli.bodies.models import Place
from ddpm_deploy.cli.bodies.outputs import check_outputs, require_apart
from ddpm_deploy.cli.bodies.progress import duration, peak_memory, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import ArtefactError, OutputError, SettingError, plural
from ddpm_deploy.files import quoted, require_suffix, show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.chain import time_step
from ddpm_deploy.runtime.images import Destination, Form
from ddpm_deploy.runtime.preview import Preview
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.runtime.snapshot import Snapshot
from ddpm_deploy.signals import stop_on_signals
from ddpm_deploy.version import __version__
from ddpm_deploy.words import AskedSolver, Spacing

_SNAPSHOT_SECONDS: Final = 60.0
_FORM_OPTIONS: Final[dict[Form, str]] = {
    "uint8": "",
    "rgb": " --rgb",
    "float": " --float",
    "data": " --float --in-data-range",
}


class RequestOptions(TypedDict):
    """The options of a chain, of ddpm-run and of ddpm-deploy evaluate."""

    steps: int | None
    solver: AskedSolver | None
    eta: float | None
    spacing: Spacing | None
    timesteps: tuple[int, ...] | None
    labels: tuple[str, ...]
    guidance: float | None


def request_of(options: RequestOptions, **more: Any) -> Request:
    """What they ask for, not yet checked. more: other fields of the Request."""
    guidance = options["guidance"]
    return Request(
        steps=options["steps"],
        solver=options["solver"],
        eta=options["eta"],
        spacing=options["spacing"],
        timesteps=options["timesteps"],
        labels=options["labels"],
        guidance=() if guidance is None else (guidance,),
        **more,
    )


class ChainOptions(Place):
    """The options of the place, and those of what is written."""

    output: Path
    as_float: bool
    in_data_range: bool
    rgb: bool
    progress: Path | None
    force: bool
    as_json: bool


@dataclass(frozen=True)
class Outputs:
    """The files that a chain writes: its images, a picture of its progress, its snapshot.

    as_json: whether what was made is told to programs.
    """

    destination: Destination
    preview: Preview | None
    snapshot: Path | None
    as_json: bool


def checked_outputs(
    model: ModelFile,
    request: Request,
    options: ChainOptions,
    snapshot: Path | None,
    first: int = 0,
) -> Outputs:
    """Refuse outputs that cannot be written, or that would replace one another or a file that is read.

    first: the step that the chain starts at.
    """
    form, output, progress = chosen_form(options), options["output"], options["progress"]
    read = [model.path, proof_path(model.path)]
    beside = [path for path in (snapshot, progress) if path]
    for path in beside:
        if os.path.realpath(path.parent) == os.path.realpath(output):
            raise SettingError(f"{show(path)} is among the images of this run: choose another folder for it")
    check_outputs(beside, read)
    require_apart(output, [*read, *beside])
    if snapshot:
        _require_snapshot(snapshot)
    preview = None
    if progress:
        preview = Preview(progress, model.spec, len(request.table_for(model.spec)), first)
        preview.check()
    destination = Destination(output, request, model.spec, form, options["force"])
    destination.check()
    return Outputs(destination, preview, snapshot, options["as_json"])


def chosen_form(options: ChainOptions) -> Form:
    """What the .npz is to hold. Refuses options that exclude each other."""
    if options["in_data_range"] and not options["as_float"]:
        raise click.UsageError("--in-data-range is for unrounded images: pass --float too")
    if options["rgb"] and options["as_float"]:
        raise click.UsageError("--rgb is for uint8 images: omit it, or omit --float")
    if options["rgb"]:
        return "rgb"
    if options["as_float"]:
        return "data" if options["in_data_range"] else "float"
    return "uint8"


def _require_snapshot(path: Path) -> None:
    """Refuse to replace a file that is no snapshot."""
    require_suffix(path, "a snapshot", ".npz")
    if path.exists():
        try:
            Snapshot.load(path)
        except ArtefactError as error:
            raise OutputError(f"{error}: --snapshot would replace it; choose another name") from error


class Watch:
    """The callback of a Sampler: moves the bar, keeps looks for the preview, saves snapshots.

    first: the step that the chain starts at.
    """

    def __init__(
        self, sampler: Sampler, model: ModelFile, request: Request, outputs: Outputs, first: int = 0
    ) -> None:
        self.sampler, self.request, self.outputs, self.first = sampler, request, outputs, first
        self.steps = len(request.table_for(model.spec))
        self._model, self._saved, self._stopped = model, time.monotonic(), False
        self.advance: Callable[[int], None] = lambda steps: None

    def stop(self) -> None:
        """End the chain after the current step."""
        self._stopped = True

    def passed(self, step: int) -> None:
        """Move the bar: a step was taken."""
        self.advance(1)

    def wants(self, step: int) -> bool:
        """Return whether this is to be called after a step: to show it, or to save a snapshot."""
        preview = self.outputs.preview
        return bool(preview and preview.wants(step)) or self._is_saved(step)

    def _is_saved(self, step: int) -> bool:
        due = self._stopped or time.monotonic() - self._saved >= _SNAPSHOT_SECONDS
        return bool(self.outputs.snapshot) and due and step + 1 < self.steps

    def __call__(self, step: int, x: Array, x0: Array) -> None:
        """See x and x̂0 after a step."""
        if self.outputs.preview:
            self.outputs.preview.see(step, x, x0)
        if self.outputs.snapshot and self._is_saved(step):
            self._save(self.outputs.snapshot)

    def _save(self, path: Path) -> None:
        """Save the chain; end it where it was stopped. A chain that is done needs neither: its images are next.

        It may be done although `step` was not the last: a GPU takes further steps before one is seen.
        """
        snapshot = self.sampler.snapshot()
        if snapshot.step == self.steps:
            return
        try:
            snapshot.save(path)
        except OutputError as error:
            if self._stopped:
                raise
            logger.warning(f"{error}; the chain goes on without a snapshot")
        self._saved = time.monotonic()
        if not self._stopped:
            return
        model, output = self._model, self.outputs.destination
        raw = model.kind == "checkpoint" and self.sampler.spec.provenance.weights == "raw"
        command = f"ddpm-deploy resume {quoted(model.path)} {quoted(path)} -o {quoted(output.path)}"
        command += _FORM_OPTIONS[output.form] + " --weights raw" * raw + " --force" * output.force
        told = f"stopped after step {snapshot.step} of {self.steps}; finish it with: {command}"
        click.echo(told, err=self.outputs.as_json)
        raise click.exceptions.Exit(130)


def write_images(
    images: Iterable[Array], watch: Watch, more: Callable[[], dict[str, Any]] | None = None
) -> None:
    """Write the images as they come, with a message before and after. more: what else programs are told of them."""
    request, sampler, outputs, preview = watch.request, watch.sampler, watch.outputs, watch.outputs.preview
    # The raw weights of a checkpoint are another model than its file says, and a picture names the model.
    destination = replace(outputs.destination, spec=sampler.spec)
    destination.require_own()
    together = min(request.count, sampler.max_batch(guided=bool(request.guidance)))
    batches, steps = -(-request.count // together), watch.steps - watch.first
    by = f" of {request.solver}" if request.solver != "ddpm" else ""
    count, chain = plural(request.count, "image"), f"{plural(watch.steps, 'step')}{by}"
    from_step = f" from step {watch.first}" if watch.first else ""
    logger.info(
        f"{count} · {chain}{from_step} · about {duration(forecast(sampler, request, steps))}{peak_memory()}"
    )
    if request.guidance:
        at_once = plural(together, "image")
        logger.info("guidance takes two rows of the batch for each image: %s at a time", at_once)
    start = time.perf_counter()
    # Ctrl-C ends the chain after the current step, where a snapshot keeps it.
    kept = outputs.snapshot
    signals = stop_on_signals(watch.stop, "with the chain saved") if kept else nullcontext()
    with signals, stage("sampling", batches * steps) as watch.advance, destination.open() as write:
        for samples in images:
            write(samples)
    if preview:
        preview.save()
    seconds = time.perf_counter() - start
    if outputs.as_json:
        click.echo(json.dumps(_made(destination, seconds) | (more() if more else {}), indent=2))
    else:
        click.echo(f"{show(destination.path)}: {count}, {chain}, seed {request.seed}, in {duration(seconds)}")


def forecast(sampler: Sampler, request: Request, steps: int) -> float:
    """The seconds that so many steps of each image of a request will take."""
    together = min(request.count, sampler.max_batch(guided=bool(request.guidance)))
    with sampler.lent() as chain:
        return time_step(chain, request[:together].rows) * steps * request.count / together


def _made(destination: Destination, seconds: float) -> dict[str, Any]:
    """Return what was made, and in what time."""
    request, spec = destination.request, destination.spec
    return {
        "ddpm_deploy": __version__,
        "output": os.fspath(destination.path),
        "model": spec.provenance.digest,
        **request.to_builtins(),
        "labels": request.labels or tuple(range(spec.num_classes)),  # which the images have in turn
        "seconds": seconds,
        "images_per_second": request.count / seconds,
    }
