"""ddpm-run: a model → images, by the reverse chain."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, flag, part
from ddpm_deploy.words import ENCODERS

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
  ddpm-run model.onnx --between a.png b.png --depth 500 -o strip.png
                                               from one image to another, through the model
  ddpm-run model.onnx --share-until 500        images that are one until t = 500, and differ in what comes after
  ddpm-run model.onnx --snapshot chain.npz     can be interrupted; ddpm-deploy resume finishes it
  ddpm-run model.onnx --count 50000 --seed 0 -o shards/ --shards
                                               again: goes on; ddpm-deploy merge joins them
  ddpm-run model.onnx --count 50000 --seed 0 -o shards/ --shards --ray
                                               the same, by a worker of Ray for each core
  ddpm-run engine.plan                         an engine, on the GPU it was built for
  ddpm-run model.onnx --device cuda            builds the engine here the first time, and runs it
  ddpm-run model.ncnn                          in ncnn, on the CPU
  ddpm-run model.pt                            the checkpoint itself, in PyTorch: the reference
""",
    params=[
        options.MODEL,
        options.IMAGES,
        options.steps("the model's own: all, unless it was imported"),
        Option(
            "--count",
            "Number of images.",
            click.IntRange(1, 10_000_000),
            show_default="16; with --between, 9",
        ),
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
            "--share-until",
            "Give all images the same noise at the start and in the steps from timesteps t of at least this: at 0 they "
            "are the same, and at a large t they show what is decided early.",
            click.IntRange(min=0),
        ),
        Option(
            "--between",
            "Make a strip from one image to another: both are encoded by --depth timesteps of diffusion, blended, and "
            "decoded by the chain. Images of another size are scaled and cropped as ddpm-train does.",
            FilePath,
            nargs=2,
            metavar="IMAGE IMAGE",
        ),
        Option(
            "--depth",
            "Timesteps of diffusion of --between: the more, the less is kept of the two images.",
            click.IntRange(min=1),
            show_default="half of the model's",
        ),
        Option(
            "--encoder",
            "How --between encodes: by noise, as the paper does, or by ddim run the other way, which comes back to the "
            "images.",
            click.Choice(ENCODERS),
            show_default="noise",
        ),
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
        Option(
            "--ray",
            "With --shards: have workers of Ray make them, here, or in the cluster whose head has this address, as "
            "10.0.0.1:6379.",
            metavar="[ADDRESS]",
            is_flag=False,
            flag_value="",
            show_default="RAY_ADDRESS, or workers here",
        ),
        Option(
            "--workers",
            "Workers of Ray.",
            click.IntRange(1, 10_000),
            show_default="one a GPU; without GPUs one a core, or fewer with more threads where shards are few",
        ),
        *options.WRITING,
        *options.PLACE,
    ],
)
