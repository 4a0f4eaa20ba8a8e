"""ddpm-deploy bench: which backend is the fastest for a model, on this machine?"""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option

main = command(
    "bench",
    "Measure which backend runs a model fastest here.",
    """Time MODELS, each a .pt, an .onnx, a .ncnn or an engine (.plan), in every backend that is installed and takes
    the file: milliseconds a step, as the chain runs it, images a second by the solver "fast", memory, and the error
    against the proof that ddpm-export wrote beside the model. The last line says which to use.

    Each backend has a process of its own, and they take turns. Under a minute for a small model, some minutes for a
    large one: how long is said first. A backend that fails is told in its row. Exits with 1 where none ran within
    tolerance.""",
    examples="""
  ddpm-deploy bench model.onnx               every backend that takes it
  ddpm-deploy bench model.onnx model.ncnn    and ncnn, which has a file of its own
  ddpm-deploy bench model.onnx --batch 8     for a service that draws 8 images at once
  ddpm-deploy bench model.onnx --json        for programs
""",
    params=[
        click.Argument(["models"], type=FilePath, nargs=-1, required=True),
        Option(
            "--batch batches",
            "Batch sizes to time.",
            options.sizes,
            metavar="SIZES",
            show_default="1,4,16, without those that would take minutes",
        ),
        options.THREADS,
        options.as_json("every figure"),
    ],
)
