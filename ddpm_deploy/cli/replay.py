"""ddpm-deploy replay: make a picture again, and compare."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath

main = command(
    "replay",
    "Make a picture again, and compare.",
    """Make PICTURE, a PNG of ddpm-run, again from the request that is written in it, and compare the pixels.

    Exits with 1 where a pixel differs by more than one of its 256 levels.""",
    examples="""
  ddpm-deploy replay model.onnx samples.png             a grid
  ddpm-deploy replay model.onnx images/000007.png       one image of a folder
""",
    params=[
        options.MODEL,
        click.Argument(["picture"], type=FilePath),
        options.BATCH,
        *options.PLACE,
    ],
)
