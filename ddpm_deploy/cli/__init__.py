"""The command lines: each declared in a file of its own, and `ddpm-deploy`, the group that holds them all.

A declaration imports click and the vocabularies alone, so that --help is quick; what a command does is the function of
its name in `cli.bodies`, imported when the command is run.
"""

import importlib

import click

from ddpm_deploy.cli.common import Command
from ddpm_deploy.version import __version__

_COMMANDS = (
    "train",
    "export",
    "verify",
    "run",
    "serve",
    "resume",
    "merge",
    "check",
    "replay",
    "evaluate",
    "inspect",
    "doctor",
    "bench",
)


class _LazyGroup(Command, click.Group):
    """Imports the declaration of a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in the order in which the commands are used."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name, or None."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ddpm_deploy.cli.{cmd_name}").main
        return command


@click.group("ddpm-deploy", cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ddpm-deploy")
def main() -> None:
    """Take a trained DDPM to production: train, export, verify and run it."""
