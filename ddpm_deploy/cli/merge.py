"""ddpm-deploy merge: the shards of a run → one .npz."""

from pathlib import Path

import click

from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option

main = command(
    "merge",
    "Join the shards of a run.",
    """Join the shards in FOLDER, which ddpm-run --shards wrote, into one .npz: byte for byte the file that ddpm-run
    without --shards writes, `arr_0`, uint8 (N, H, W, C), and `arr_1`, the labels of a class-conditional model.

    Each shard is checked against its digest first. It takes a few megabytes of memory, however many images there
    are.""",
    examples="""
  ddpm-deploy merge shards/ -o samples.npz
""",
    params=[
        click.Argument(["folder"], type=FilePath),
        Option("-o --output", "The .npz to write.", FilePath, default=Path("samples.npz")),
    ],
)
