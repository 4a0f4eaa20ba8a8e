"""What the command lines share: one-line errors, logging, and opening a model by its name."""

import errno
import logging
import os
import signal
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ddpm_deploy.errors import DdpmDeployError, SettingError
from ddpm_deploy.signals import handled
from ddpm_deploy.version import __version__

if TYPE_CHECKING:
    from ddpm_deploy.runtime.denoiser import Denoiser

logger = logging.getLogger("ddpm_deploy")


class _FilePath(click.Path):
    """A path that is not empty, as an unset variable of a shell script is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check and convert."""
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


FilePath = _FilePath(path_type=Path)


class Words(click.Choice[str]):
    """A choice whose words may be typed with a hyphen for an underscore."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """As it is compared."""
        return super().normalize_choice(str(choice), ctx).replace("-", "_")


class Refusal(click.ClickException):
    """An error as a user sees it: one line, and an exit code."""

    exit_code: int  # type: ignore[misc]  # click declares it of the class, and reads it of the instance

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


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
    except OSError as error:
        if error.errno == errno.EPIPE:  # as of `| head`: click ends quietly
            raise
        raise Refusal(str(error), 1) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # as torch says it
            raise
        raise Refusal("out of memory: choose a smaller --batch, --batch-size or --count", 1) from error


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that no temporary file stays behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with handled([signal.SIGTERM], interrupt):
        yield


class Command(click.Command):
    """A click command whose errors are one line."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Parse the command line."""
        parent = extra.get("parent")
        path = f"{parent.command_path} {info_name}" if parent else info_name
        with one_line_errors(path or ""):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line_errors(ctx.command_path), _terminated():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A click group whose errors are one line."""


def command(summary: str, epilog: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command with -v, -q and --version: its line in the group's help, and its examples."""

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
            cls=Command,
            short_help=summary,
            context_settings=settings,
            epilog=f"\b\nExamples:\n{epilog.strip(chr(10)).rstrip()}",
        )(function)

    return decorate


class _Echo(logging.Handler):
    """Writes messages to standard error as it is at the time, closed or not."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        click.echo(self.format(record), err=True)


def _verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if not logger.handlers:
            logger.addHandler(_Echo())
            logger.setLevel(logging.INFO)
        if value:
            logger.setLevel(level)

    return set_level


def open_denoiser(
    path: Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    device: str | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
) -> "Denoiser":
    """The backend for a model by its suffix: ONNX Runtime for .onnx, PyTorch for a checkpoint.

    weights: which of a checkpoint's two networks.
    """
    from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES, read_spec
    from ddpm_deploy.cli.progress import stage
    from ddpm_deploy.dependencies import require
    from ddpm_deploy.runtime.backend import load_denoiser, runs_on_gpu

    read_spec(path)  # a broken or foreign file is refused before a backend is loaded
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        own = None if runs_on_gpu(path, device) else threads  # which are of the CPU
        return load_denoiser(path, device=device, threads=own, max_batch=max_batch, stages=stage)
    require("torch", "train")
    from ddpm_deploy.train.denoiser import TorchDenoiser

    return TorchDenoiser.load(
        path, weights=weights, device=device or "cpu", threads=threads, max_batch=max_batch
    )


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse files that cannot be written, or that would replace one another or what is read."""
    from ddpm_deploy.files import require_output

    taken = list(inputs)
    for path in filter(None, outputs):
        require_output(path)
        require_apart(path, taken)
        taken.append(path)


def require_apart(output: Path, others: Iterable[Path]) -> None:
    """Refuse an output, a file or a folder, that is one of the other files of a command."""
    from ddpm_deploy.files import show

    if os.path.realpath(output) in {os.path.realpath(path) for path in others}:  # which bears loops of links
        raise SettingError(f"{show(output)} is another file of this command: name the output otherwise")


def require_report(path: Path | None) -> None:
    """Refuse a report that would not be called one: it replaces what is there."""
    from ddpm_deploy.files import show

    if path and path.suffix.lower() != ".json":
        raise SettingError(f"{show(path)}: the name of a report must end in .json")


def refuse_given(ctx: click.Context, allowed: Container[str], why: str) -> None:
    """A mistake in the command line where options were typed other than the allowed ones."""
    given = [
        max(parameter.opts, key=len) for parameter in typed_options(ctx) if parameter.name not in allowed
    ]
    if given:
        raise click.UsageError(f"{', '.join(sorted(given))} {why}")


def typed_options(ctx: click.Context) -> list[click.Parameter]:
    """What was typed on the command line, and not left to its default."""
    typed = click.core.ParameterSource.COMMANDLINE
    return [
        p for p in ctx.command.params if p.name in ctx.params and ctx.get_parameter_source(p.name) == typed
    ]


weights_option = click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    help="Of a checkpoint: averaged, or as trained.",
)
