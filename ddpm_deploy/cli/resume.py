"""ddpm-deploy resume: finish an interrupted chain."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath

main = command(
    "resume",
    "Finish an interrupted chain from its snapshot.",
    """Finish the chain in SNAPSHOT, which ddpm-run --snapshot saved, and write its images.

    MODEL must have the same weights; its precision, backend and device may differ. SNAPSHOT is kept up to date, so
    that this command can be interrupted too.""",
    examples="""
  ddpm-deploy resume model.onnx chain.npz               here or on another machine
  ddpm-deploy resume engine.plan chain.npz -o x.png     the rest on a GPU
""",
    params=[
        options.MODEL,
        click.Argument(["snapshot"], type=FilePath),
        options.IMAGES,
        *options.WRITING,
        *options.PLACE,
    ],
)
