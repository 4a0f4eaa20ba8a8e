"""A training session: the trainer's steps, and what a person keeps of them: checkpoints, metrics, pictures.

Beside `model.pt` stands the folder `model.train`, with metrics.csv and pictures of samples.
"""

import csv
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from ddpm_deploy.errors import BackendError
from ddpm_deploy.files import atomic, make_folder, show
from ddpm_deploy.signals import stop_on_repeated_signals, stop_on_signals
from ddpm_deploy.train.pictures import Pictures
from ddpm_deploy.train.trainer import Trainer, learning_rate

logger = logging.getLogger(__name__)

LOG_EVERY: Final = 25  # steps between rows of the metrics
_COLUMNS: Final = ("step", "loss", "learning_rate", "images_per_second")
_EVENTS: Final = "TensorBoard's events"

Report = Callable[[int, str | None], None]  # steps more that are done; the latest figures


class Session:
    """Trains to the settings' last step, or until it is told to stop.

    output: the checkpoint, written every `save_every` steps and at the end. report: told of progress.

    Of several processes, all take the steps and agree on when to stop, and the first alone writes.
    """

    def __init__(self, trainer: Trainer, output: Path, report: Report) -> None:
        self.trainer = trainer
        self.output = output
        self.folder = output.with_suffix(".train")
        self._report = report
        self.loss: float | None = None  # the mean since the row of the metrics before
        self._stopped = False
        self._saved: int | None = None  # the step that the checkpoint is of

    def run(self) -> bool:
        """Train and save. Returns whether the last step was reached: not so after SIGINT, SIGTERM or SIGHUP."""
        trainer, settings, world = self.trainer, self.trainer.settings, self.trainer.world
        metrics = _Metrics(self.folder, trainer.steps_done) if world.writes else None
        stopping = stop_on_repeated_signals if world.launched else stop_on_signals
        with stopping(self._stop, "with the checkpoint saved"):
            draws_any = settings.sample_every and world.writes
            pictures = Pictures(trainer, lambda: self._stopped) if draws_any else None
            losses: list[torch.Tensor] = []  # since `started`
            started = time.perf_counter()
            while trainer.steps_done < settings.steps and not world.any(self._stopped):
                losses.append(trainer.advance())
                step, note = trainer.steps_done, None
                saves, draws = self._is_due(settings.save_every), self._is_due(settings.sample_every)
                if self._is_due(LOG_EVERY) or saves or draws:
                    loss = self.loss = self._require_finite(losses)
                    speed = len(losses) * settings.batch_size / (time.perf_counter() - started)
                    if metrics:
                        metrics.add(step, loss, learning_rate(settings, step - 1), speed)
                    note = f"step {step} · loss {loss:.4f} · {speed:.0f} images/s"
                self._report(1, note)
                if saves:
                    self._save()
                if pictures and draws and not self._stopped:
                    pictures.draw(self.folder / f"samples-{step:06d}.png")
                if note:
                    losses, started = [], time.perf_counter()
            if self._saved != trainer.steps_done:
                self._require_finite(losses)
                self._save()
            world.any(False)  # a launcher ends those that still write when one of the others has ended
        if metrics:
            metrics.close()
        return trainer.steps_done >= settings.steps

    @property
    def records(self) -> str:
        """What there is in the folder."""
        return "metrics and samples" if any(self.folder.glob("samples-*.png")) else "metrics"

    def _save(self) -> None:
        """Raises BackendError where the weights are not finite: the loss that was checked is from before them."""
        if not all(parameter.isfinite().all() for parameter in self.trainer.network.parameters()):
            raise self._broken("weights are")
        if self.trainer.world.writes:
            self.trainer.checkpoint().save(self.output)
        self._saved = self.trainer.steps_done

    def _broken(self, what: str) -> BackendError:
        return BackendError(
            f"the {what} not finite by step {self.trainer.steps_done}: lower --learning-rate; "
            f"{show(self.output)}, if it was written, is from before"
        )

    def _stop(self) -> None:
        self._stopped = True

    def _is_due(self, every: int) -> bool:
        """Whether what is done every so many steps (0: never) is to be done now; always at the last."""
        step = self.trainer.steps_done
        return bool(every) and (step % every == 0 or step == self.trainer.settings.steps)

    def _require_finite(self, losses: list[torch.Tensor]) -> float:
        """The mean of the losses. Raises BackendError where it is not finite, before anything is saved."""
        if not losses:
            return 0.0
        loss = self.trainer.world.total(torch.stack(losses)).mean().item()
        if not math.isfinite(loss):
            raise self._broken("loss is")
        return loss


class _Metrics:
    """metrics.csv, and TensorBoard's events where it is installed and as long as they can be written.

    What an earlier session wrote past its last checkpoint is dropped.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        make_folder(folder)
        self._path = path = folder / "metrics.csv"
        self._board: Any = None
        with _not_worth_the_training(_EVENTS), suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder, purge_step=steps_done or None)
        kept: list[list[str]] = []
        if steps_done and path.is_file():
            with path.open(newline="", errors="replace") as file:
                rows = csv.reader(line.replace("\0", "") for line in file)
                kept = [row for row in rows if len(row) == len(_COLUMNS) and _step(row[0]) <= steps_done]
        with atomic(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])

    def add(self, step: int, loss: float, rate: float, speed: float) -> None:
        """One row."""
        with _not_worth_the_training(show(self._path)), self._path.open("a", newline="") as file:
            csv.writer(file).writerow([step, f"{loss:.6f}", f"{rate:.3e}", f"{speed:.1f}"])
        board, self._board = self._board, None  # unless this row can be written
        if board:
            with _not_worth_the_training(_EVENTS):
                for name, value in zip(_COLUMNS[1:], (loss, rate, speed), strict=True):
                    board.add_scalar(name, value, step)
                self._board = board

    def close(self) -> None:
        """Write what is waiting to be written."""
        if self._board:
            with _not_worth_the_training(_EVENTS):
                self._board.close()


def _step(text: str) -> float:
    return int(text) if text.isascii() and text.isdecimal() else math.inf


@contextmanager
def _not_worth_the_training(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written (%s); training goes on", what, error.strerror)
