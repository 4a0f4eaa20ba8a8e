"""ddpm-deploy evaluate: how good a model is, in numbers."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, flag

main = command(
    "evaluate",
    "Measure how good a model is, on images.",
    """Measure how good MODEL is on the images of DATA: a folder or a .zip of images, an .npy, .npz or idx file, or the
    word "digits".

    --nll is the variational bound of the negative log-likelihood in bits per dimension, which is what the training of a
    diffusion model is about, with its parts and the rate-distortion curve (Ho et al. 2020, sections 2 and 4.3). Images
    that the model was not trained on tell more. The images must be of 8 bits, as the bound counts their 256 values.""",
    examples="""
  ddpm-deploy evaluate model.onnx photos/ --nll              bits per dimension, of up to 1000 images
  ddpm-deploy evaluate model.onnx photos/ --nll --all        every term, not a sample: 1000 steps for each image
  ddpm-deploy evaluate model.onnx mnist.npz --array x_test --nll --count 200
  ddpm-deploy evaluate model.onnx photos/ --nll --plot curve.png
  ddpm-deploy evaluate model.onnx photos/ --nll --steps 50   the bound of the chain of 50 steps
  ddpm-deploy evaluate model.pt digits --nll --json          every figure, for programs
""",
    params=[
        options.MODEL,
        click.Argument(["data"]),
        flag("--nll", "The bound of the negative log-likelihood, in bits per dimension."),
        Option(
            "--count",
            "Images to evaluate, evenly taken from all.",
            click.IntRange(1, 10_000_000),
            show_default="1000, or all where there are fewer",
        ),
        Option(
            "--terms",
            "Steps of the chain to evaluate for each image, drawn evenly from as many parts of it.",
            click.IntRange(1, 1_000_000),
            show_default="20",
        ),
        flag("--all every", "Evaluate every step of the chain, for each image."),
        options.steps("all the model's"),
        options.SPACING,
        options.TIMESTEPS,
        Option(
            "--seed",
            "Seed of the noise and of the steps that are drawn: the same seed gives the same figures.",
            click.IntRange(0, 2**64 - 1),
            default=0,
        ),
        Option(
            "--batch",
            "Rows that the network computes at the same time.",
            options.BatchSize,
            show_default="64, fewer for images over 16×16; for an engine, its largest",
        ),
        Option(
            "--array",
            "The array of an .npz that the images are, as x_test.",
            default="",
            show_default="images, arr_0, or the only one",
        ),
        flag("--resize", "Scale and crop images of another size, as ddpm-train does."),
        Option(
            "--plot",
            "Plot distortion against rate, and the terms by timestep, in this .png, .svg or .pdf.",
            FilePath,
        ),
        options.as_json("every figure"),
        *options.PLACE,
    ],
    needs=["PIL.Image"],
    extra="cpu",
)
