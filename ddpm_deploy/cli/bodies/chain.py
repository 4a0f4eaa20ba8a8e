"""What ddpm-run and ddpm-deploy resume share: a chain whose images are written, and what goes on while it runs."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click

from ddpm_deploy.cli.bodies.outputs import check_outputs, require_apart
from ddpm_deploy.cli.bodies.progress import duration, peak_memory, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import ArtefactError, OutputError, SettingError, plural
from ddpm_deploy.files import quoted, require_suffix, show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.images import Destination
from ddpm_deploy.runtime.network import time_call
from ddpm_deploy.runtime.preview import Preview
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.runtime.snapshot import Snapshot
from ddpm_deploy.signals import stop_on_signals

_SNAPSHOT_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Outputs:
    """The files that a chain writes: its images, a picture of its progress, its snapshot."""

    destination: Destination
    preview: Preview | None
    snapshot: Path | None


def checked_outputs(
    model: ModelFile,
    request: Request,
    *,
    output: Path,
    as_float: bool,
    progress: Path | None,
    snapshot: Path | None,
    first: int = 0,
) -> Outputs:
    """Refuse outputs that cannot be written, or that would replace one another or a file that is read.

    first: the step that the chain starts at.
    """
    read = [model.path, proof_path(model.path)]
    if progress and os.path.realpath(progress.parent) == os.path.realpath(output):
        raise SettingError(f"{show(progress)} is among the images of this run: choose another folder for it")
    beside = [path for path in (snapshot, progress) if path]
    check_outputs(beside, read)
    require_apart(output, [*read, *beside])
    if snapshot:
        _require_snapshot(snapshot)
    preview = None
    if progress:
        preview = Preview(progress, model.spec, len(request.table_for(model.spec)), first)
        preview.check()
    destination = Destination(output, request, model.spec, as_float)
    destination.check()
    return Outputs(destination, preview, snapshot)


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
        command += " --float" * output.as_float + " --weights raw" * raw
        click.echo(f"stopped after step {snapshot.step} of {self.steps}; finish it with: {command}")
        raise click.exceptions.Exit(130)


def write_images(images: Iterable[Array], watch: Watch) -> None:
    """Write the images as they come, with a message before and after."""
    request, sampler, preview = watch.request, watch.sampler, watch.outputs.preview
    # The raw weights of a checkpoint are another model than its file says, and a picture names the model.
    destination = replace(watch.outputs.destination, spec=sampler.spec)
    together = min(request.count, sampler.max_batch(guided=bool(request.guidance)))
    batches, steps = -(-request.count // together), watch.steps - watch.first
    forecast = time_call(sampler.network, request[:together].rows) * steps * request.count / together
    count, chain = plural(request.count, "image"), plural(watch.steps, "step")
    from_step = f" from step {watch.first}" if watch.first else ""
    logger.info(f"{count} · {chain}{from_step} · about {duration(forecast)}{peak_memory()}")
    if request.guidance:
        at_once = plural(together, "image")
        logger.info("guidance takes two rows of the batch for each image: %s at a time", at_once)
    start = time.perf_counter()
    # Ctrl-C ends the chain after the current step, where a snapshot keeps it.
    kept = watch.outputs.snapshot
    signals = stop_on_signals(watch.stop, "with the chain saved") if kept else nullcontext()
    with signals, stage("sampling", batches * steps) as watch.advance, destination.open() as write:
        for samples in images:
            write(samples)
    if preview:
        preview.save()
    took = duration(time.perf_counter() - start)
    click.echo(f"{show(destination.path)}: {count}, {chain}, seed {request.seed}, in {took}")
