"""The command lines: one thin click command a file, and `ddpm-deploy`, the group that holds them all."""

import importlib

import click

from ddpm_deploy.cli.common import Group
from ddpm_deploy.version import __version__

_COMMANDS = ("train", "export", "verify", "run", "inspect", "doctor")


class _LazyGroup(Group):
    """Imports a command when it is asked for, so that none pays for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ddpm_deploy.cli.{cmd_name}").main
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ddpm-deploy")
def main() -> None:
    """Take a trained DDPM to production: train, export, verify, run."""
