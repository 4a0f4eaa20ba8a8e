"""What all command lines share: how one is declared, its one-line errors, and its log."""

import importlib
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import click

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DdpmDeployError
from ddpm_deploy.signals import handled, interrupts_kept
from ddpm_deploy.version import __version__

logger = logging.getLogger("ddpm_deploy")


def command(
    name: str,
    summary: str,
    about: str,
    *,
    examples: str,
    params: Sequence[click.Parameter],
    needs: Sequence[str] = (),
    extra: str = "",
    interrupted: str = "no file was left half-written",
    kind: "type[Command] | None" = None,
) -> click.Command:
    """Declare a command, with -v, -q and --version; what it does is the function of its name in `cli.bodies`.

    summary: its line in the help of the group. about: the first paragraphs of its own help. needs: packages without
    which the body cannot be imported; extra: brings them. interrupted: what is said where a signal ends it.
    kind: of command, where it has its own ways.
    """

    def run_body(**values: Any) -> Any:
        for module in needs:
            require(module, extra)
        return getattr(importlib.import_module(f"ddpm_deploy.cli.bodies.{name}"), name)(**values)

    made = (kind or Command)(
        name,
        interrupted=interrupted,
        callback=run_body,
        params=[*params, *_LOGGING],
        help=about,
        short_help=summary,
        epilog="\b\nExamples:\n" + examples.strip("\n"),
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, prog_name="ddpm-deploy")(made)


class Command(click.Command):
    """A click command whose errors are one line. interrupted: as of `command`."""

    def __init__(self, *arguments: Any, interrupted: str = "", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.interrupted = interrupted

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Parse the command line."""
        parent = extra.get("parent")
        path = f"{parent.command_path} {info_name}" if parent else info_name
        with one_line_errors(path or "", self.interrupted):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""

        def interrupt(number: int, frame: object) -> None:
            if number == signal.SIGHUP:
                signal.signal(number, signal.SIG_IGN)  # a terminal that closes may send several
            raise KeyboardInterrupt

        # SIGTERM and SIGHUP end the work as Ctrl-C does, so that no temporary file stays behind.
        ends = handled([signal.SIGTERM, signal.SIGHUP], interrupt)
        with one_line_errors(ctx.command_path, self.interrupted), ends, interrupts_kept():
            return super().invoke(ctx)


class Refusal(click.ClickException):
    """An error as a user sees it: one line, and an exit code."""

    exit_code: int  # type: ignore[misc]  # click declares it of the class, and reads it of the instance

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextmanager
def one_line_errors(command: str, interrupted: str = "") -> Iterator[None]:
    """Turn an error that a user can cause into a Refusal: exit 2 for the command line itself, 1 for all else."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Refusal(f"{error.format_message()} (see {command} --help)", 2) from error
    except KeyboardInterrupt as error:
        raise Refusal(f"interrupted: {interrupted}" if interrupted else "interrupted", 130) from error
    except BrokenPipeError:  # `| head` closed our output: click ends quietly
        raise
    except (DdpmDeployError, OSError) as error:
        raise Refusal(str(error), 1) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # PyTorch's own error says it so
            raise
        raise Refusal("out of memory: choose a smaller --batch, --batch-size or --count", 1) from error


class _Echo(logging.Handler):
    """Writes messages to standard error as it is at the time, closed or not."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, unless the terminal has gone: the work matters more."""
        with suppress(OSError):
            click.echo(self.format(record), err=True)


def _verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if not logger.handlers:
            logger.addHandler(_Echo())
            logger.setLevel(logging.INFO)
        if value:
            logger.setLevel(level)

    return set_level


_LOGGING: Final = [
    click.Option(names, is_flag=True, expose_value=False, callback=_verbosity(level), help=text)
    for names, level, text in (
        (["-v", "--verbose"], logging.DEBUG, "Show more messages."),
        (["-q", "--quiet"], logging.WARNING, "Show warnings and results only."),
    )
]
