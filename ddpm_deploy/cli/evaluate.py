"""ddpm-deploy evaluate: how good a model is, in numbers."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, flag

main = command(
    "evaluate",
    "Measure how good a model is, on images.",
    """Measure how good MODEL is on the images of DATA: a folder or a .zip of images, an .npy, .npz or idx file, a
    folder of ddpm-run --shards, or the word "digits".

    --nll is the variational bound of the negative log-likelihood in bits per dimension, which is what the training of a
    diffusion model is about, with its parts and the rate-distortion curve (Ho et al. 2020, sections 2 and 4.3). Images
    that the model was not trained on tell more. The images must be of 8 bits, as the bound counts their 256 values.

    --fid is how far samples are from the images, in the features of a network: the Fréchet distance and the kernel
    distance, which are called FID and KID where that network is Inception with the weights that these are defined by.
    Samples are drawn from MODEL, or MODEL is a folder, a .zip, an .npz or shards of samples. It takes PyTorch.""",
    examples="""
  ddpm-deploy evaluate model.onnx photos/ --nll              bits per dimension, of up to 1000 images
  ddpm-deploy evaluate model.onnx photos/ --nll --all        every term, not a sample: 1000 steps for each image
  ddpm-deploy evaluate model.onnx mnist.npz --array x_test --nll --count 200
  ddpm-deploy evaluate model.onnx photos/ --nll --plot curve.png
  ddpm-deploy evaluate model.onnx photos/ --nll --steps 50   the bound of the chain of 50 steps
  ddpm-deploy evaluate model.pt digits --nll --json          every figure, for programs
  ddpm-deploy evaluate model.onnx photos/ --fid --samples 10000 --solver fast
                                                             FID and KID, by the weights that torch-fidelity keeps
  ddpm-deploy evaluate samples.npz photos/ --fid --features efficientnet
                                                             without a download, and not FID
  ddpm-deploy evaluate shards/ --fid --statistics cifar10.npz
""",
    params=[
        options.MODEL,
        click.Argument(["data"], required=False, default=""),
        flag("--nll", "The bound of the negative log-likelihood, in bits per dimension."),
        flag("--fid", "The Fréchet distance and the kernel distance of samples to the images."),
        Option(
            "--count",
            "Images to evaluate, evenly taken from all.",
            click.IntRange(1, 10_000_000),
            show_default="1000, or all where there are fewer; with --fid, all",
        ),
        Option(
            "--features",
            "With --fid, whose features: inception, efficientnet, or a file of the weights of either.",
            show_default="inception",
        ),
        Option(
            "--samples",
            "With --fid, samples to draw, or to take evenly from all that there are.",
            click.IntRange(2, 10_000_000),
            show_default="as many as images, at most 5000; all that there are",
        ),
        Option(
            "--statistics",
            "With --fid, an .npz of reference statistics (mu, sigma) in place of DATA.",
            FilePath,
        ),
        Option(
            "--terms",
            "Steps of the chain to evaluate for each image, drawn evenly from as many parts of it.",
            click.IntRange(1, 1_000_000),
            show_default="20",
        ),
        flag("--all every", "Evaluate every step of the chain, for each image."),
        options.steps("all the model's; with --fid, its own"),
        options.SOLVER,
        options.ETA,
        options.SPACING,
        options.TIMESTEPS,
        options.LABEL,
        options.GUIDANCE,
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
