"""ddpm-deploy check: are the shards of a run whole?"""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath

main = command(
    "check",
    "Look through the shards of a run.",
    """Look through all shards in FOLDER, which ddpm-run --shards wrote: which are missing, which were altered since.

    Prints one digest of all where they are whole. Exits with 0 where all are whole, with 1 where not.""",
    examples="""
  ddpm-deploy check shards/
  ddpm-deploy check shards/ --json       for programs: every shard that is not whole
""",
    params=[click.Argument(["folder"], type=FilePath), options.as_json("what was found")],
)
