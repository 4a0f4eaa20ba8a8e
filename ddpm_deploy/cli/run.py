"""ddpm-run: a model → images, by the reverse chain."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, flag, part

main = command(
    "run",
    "Sample images from a model.",
    """Sample images from MODEL: an .onnx file, an engine (.plan), a .ncnn file, or a checkpoint (.pt), which runs in
    PyTorch.""",
    examples="""
  ddpm-run model.onnx                          16 images, the full chain, in samples.png
  ddpm-run model.onnx --steps 50 --seed 7      a chain of 50 steps, and a seed to repeat it
  ddpm-run model.onnx --solver fast            20 steps, of the best solver that is known for so few
  ddpm-run model.onnx --count 5000 -o s.npz    uint8 (5000, H, W, C), as evaluators read it
  ddpm-run model.onnx --count 100 -o images/   a folder, one PNG for each image
  ddpm-run model.onnx --float --in-data-range -o s.npz
  ddpm-run pets.onnx --label cat --label dog   these two classes in turn; by default, every class
  ddpm-run pets.onnx --label cat --guidance 3  more like a cat, and less like any other class
  ddpm-run model.onnx --progress chain.gif     show how the images appear
  ddpm-run model.onnx --snapshot chain.npz     can be interrupted; ddpm-deploy resume finishes it
  ddpm-run model.onnx --count 50000 --seed 0 -o shards/ --shards
                                               again: goes on; ddpm-deploy merge joins them
  ddpm-run engine.plan                         an engine, on the GPU it was built for
  ddpm-run model.onnx --device cuda            builds the engine here the first time, and runs it
  ddpm-run model.ncnn                          in ncnn, on the CPU
  ddpm-run model.pt                            the checkpoint itself, in PyTorch: the reference
""",
    params=[
        options.MODEL,
        options.IMAGES,
        options.steps("the model's own: all, unless it was imported"),
        Option("--count", "Number of images.", click.IntRange(1, 10_000_000), default=16),
        options.seed("a new one"),
        Option(
            "--first-index",
            "Sample index of the first image: an image is determined by the seed and its index.",
            click.IntRange(0, 2**64 - 1),
            default=0,
        ),
        options.BATCH,
        options.LABEL,
        options.SOLVER,
        options.ETA,
        options.SPACING,
        options.TIMESTEPS,
        options.GUIDANCE,
        Option(
            "--snapshot",
            "Save the unfinished chain to this .npz every minute and on Ctrl-C. All images must fit in one batch.",
            FilePath,
        ),
        flag(
            "--shards",
            "Write the images in shards, .npz files in the folder --output, by as many processes as work there: a run "
            "that was stopped goes on where it was. ddpm-deploy merge joins them, ddpm-deploy check looks for faults.",
        ),
        Option(
            "--shard-size",
            "Images of a shard.",
            click.IntRange(min=1),
            show_default="256, fewer for images over 256×256",
        ),
        Option("--shard", "Make one part of the shards only, as 3/16.", part),
        *options.WRITING,
        *options.PLACE,
    ],
)
