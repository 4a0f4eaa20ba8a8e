"""What the command lines share: one-line errors, logging, progress bars, and opening a model by its name."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.errors import DdpmDeployError
from ddpm_deploy.version import __version__

if TYPE_CHECKING:
    from ddpm_deploy.runtime.denoiser import Denoiser

logger = logging.getLogger("ddpm_deploy")

FilePath = click.Path(path_type=Path)

_LOG_SECONDS: Final = 15.0


class Refusal(click.ClickException):
    """An error as a user sees it: one line, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.split()))
        vars(self)["exit_code"] = exit_code  # click declares it on the class


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn what a user can cause into a Refusal: exit 1, or 2 for a mistake in the command line itself."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Refusal(f"{error.format_message()} (see {command} --help)", 2) from error
    except DdpmDeployError as error:
        raise Refusal(str(error), 1) from error
    except KeyboardInterrupt as error:
        raise Refusal("interrupted: nothing was left half-written", 130) from error
    except MemoryError as error:
        raise Refusal("out of memory: choose a smaller --batch or --batch-size", 1) from error


class Command(click.Command):
    """A click command whose errors are one line."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Parse the command line."""
        with one_line_errors(info_name or ""):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line_errors(ctx.command_path):
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A click group whose errors are one line."""


def command(epilog: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command with -v, -q and --version; `epilog` holds its examples."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        options = [
            click.option(
                "-v",
                "--verbose",
                is_flag=True,
                expose_value=False,
                callback=_verbosity(logging.DEBUG),
                help="Say more.",
            ),
            click.option(
                "-q",
                "--quiet",
                is_flag=True,
                expose_value=False,
                callback=_verbosity(logging.WARNING),
                help="Say less.",
            ),
            click.version_option(__version__, prog_name="ddpm-deploy"),
        ]
        for option in reversed(options):
            function = option(function)
        settings = {"show_default": True, "help_option_names": ["-h", "--help"]}
        return click.command(
            cls=Command, context_settings=settings, epilog=f"\b\nExamples:\n{epilog.strip(chr(10)).rstrip()}"
        )(function)

    return decorate


def _verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        if value:
            logger.setLevel(level)

    return set_level


class _Log:
    """Progress where there is no terminal: a line in the log now and then."""

    def __init__(self, label: str, length: int, done: int) -> None:
        self._label, self._length, self._done = label, length, done
        self._next = time.monotonic() + _LOG_SECONDS

    def update(self, steps: int, note: str | None) -> None:
        """Move on, and log it if it is time to."""
        self._done += steps
        if time.monotonic() > self._next:
            self._next = time.monotonic() + _LOG_SECONDS
            logger.info("%s: %d of %d%s", self._label, self._done, self._length, f" · {note}" if note else "")


@contextmanager
def progress(label: str, length: int, done: int = 0) -> Iterator[Callable[[int, str | None], None]]:
    """Give the function that tells how long work goes on: `advance(steps, note)`.

    A bar on a terminal, with the time left; elsewhere lines in the log; nothing under --quiet.
    """
    if not sys.stderr.isatty() or logger.level > logging.INFO:
        yield _Log(label, length, done).update
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, show_pos=True, item_show_func=lambda note: note
    ) as bar:
        bar.update(done)
        latest = ""

        def advance(steps: int, note: str | None) -> None:
            nonlocal latest
            latest = (
                note or latest
            )  # click shows what came with the last step, and not every step brings a note
            bar.update(steps, latest)

        yield advance


def open_denoiser(
    path: Path, *, device: str | None = None, threads: int | None = None, max_batch: int | None = None
) -> "Denoiser":
    """The backend for a model by its suffix: ONNX Runtime for .onnx, PyTorch for a checkpoint."""
    from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES
    from ddpm_deploy.files import require_file

    require_file(path)
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        from ddpm_deploy.artefact import read_spec
        from ddpm_deploy.dependencies import require

        read_spec(path)  # a broken or foreign file is refused before torch is loaded
        require("torch", "train")
        from ddpm_deploy.train.denoiser import TorchDenoiser

        return TorchDenoiser.load(path, device=device or "cpu", threads=threads, max_batch=max_batch)
    from ddpm_deploy.runtime.sampler import Sampler

    return Sampler.load(path, device=device, threads=threads, max_batch=max_batch).denoiser


def duration(seconds: float) -> str:
    """Seconds for people: 0.8 s, 71 s, 12 min, 3.4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def time_step(denoiser: "Denoiser", batch: int) -> float:
    """Seconds that the network takes for a batch: the second of two runs, as the first warms it up."""
    denoiser.run(batch)
    start = time.perf_counter()
    denoiser.run(batch)
    return time.perf_counter() - start


def resident_mb() -> float:
    """Memory of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return 0.0
