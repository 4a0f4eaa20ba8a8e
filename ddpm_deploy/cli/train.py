"""ddpm-train: images → a trained network."""

import os
from typing import Any

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import Command, Refusal, command
from ddpm_deploy.cli.options import IMAGE_SIZE, FilePath, Option, Words, flag
from ddpm_deploy.words import LOSSES, PREDICTIONS, PRESETS, SCHEDULES, VARIANCES

_OF_ANY_TRAINING = [
    Option(
        "-o --output",
        "The checkpoint to write.",
        FilePath,
        show_default="model.pt, or the checkpoint of --resume",
    ),
    Option("--resume", "Continue the training of this checkpoint, with the settings in it.", FilePath),
    Option("--steps", "Training steps in all.", click.IntRange(1, 10**9), show_default="the preset's"),
    Option(
        "--device",
        "Where to train: cpu, cuda, or any device of PyTorch; auto uses a GPU where there is one.",
        default="auto",
    ),
    flag(
        "--compile compiled",
        "Compile the network (torch.compile): the first step takes longer, the others less.",
    ),
    Option(
        "--workers",
        "Threads that read the images.",
        click.IntRange(1, 256),
        show_default="OMP_NUM_THREADS, or the cores it may use",
    ),
    Option(
        "--save-every", "Steps from one checkpoint to the next.", click.IntRange(min=1), show_default="1000"
    ),
    Option(
        "--sample-every",
        "Steps from one picture of samples to the next; 0 for no pictures.",
        click.IntRange(min=0),
        show_default="1000",
    ),
    Option(
        "--array",
        "The array of an .npz that the images are, as x_train.",
        show_default="images, arr_0, or the only one",
    ),
    flag("--skip-broken", "Leave out images that cannot be read, and name them."),
    options.as_json("what was trained"),
    options.force("an output that exists"),
]
# None where they were not typed: the preset decides, or, with --resume, the checkpoint.
_OF_A_NEW_TRAINING = [
    Option(
        "--preset",
        "Settings of the network and its training that go well together.",
        click.Choice(PRESETS),
        show_default="digits for the digits, else small",
    ),
    Option(
        "--image-size",
        "Height and width to scale and crop the images to: 32, or 48x64.",
        IMAGE_SIZE,
        show_default="the preset's",
    ),
    Option(
        "--channels",
        "Colours of the images; rgba keeps transparency, which is else laid on white.",
        click.Choice(["grey", "rgb", "rgba"]),
        show_default="the preset's, or the images' own",
    ),
    Option(
        "--data-range",
        "The darkest and the brightest value that the images can have, of all of them.",
        (float, float),
        show_default="0 and 255 of 8-bit images, else found",
    ),
    Option("--batch-size", "Images in each training step.", options.BatchSize, show_default="the preset's"),
    Option(
        "--learning-rate",
        "The largest learning rate of the training.",
        click.FloatRange(0, 1, min_open=True),
        show_default="the preset's",
    ),
    Option(
        "--prediction",
        "What the network predicts: the noise, v, the image, or the mean of the next step.",
        Words(PREDICTIONS),
        show_default="epsilon",
    ),
    Option(
        "--loss",
        "What training minimises: simple is the squared error, vlb the variational bound, hybrid both (it learns "
        "the variance too).",
        Words(LOSSES),
        show_default="simple",
    ),
    Option(
        "--variance",
        "Variance of the reverse steps.",
        Words(VARIANCES),
        show_default="learned_range for the hybrid loss, else fixed_large",
    ),
    Option("--schedule", "Noise schedule (β).", Words(SCHEDULES), show_default="linear"),
    flag("--labels", "Train a class-conditional model: each folder in DATA is a class.", default=None),
    Option(
        "--label-dropout",
        "Share of the images that are shown without their label, which guidance needs.",
        click.FloatRange(0, 1, max_open=True),
        show_default="0.1 with --labels",
    ),
    Option(
        "--accumulate",
        "Compute each batch in this many parts, to save memory.",
        click.IntRange(1, 65_536),
        show_default="1",
    ),
    flag("--amp", "Train in mixed precision (bfloat16), which new GPUs and CPUs do faster.", default=None),
    Option(
        "--flip/--no-flip", "Mirror half of the images, at random.", default=None, show_default="the preset's"
    ),
    Option(
        "--seed",
        "Seed of all random numbers: the same seed gives the same model.",
        click.IntRange(0, 2**63 - 1),
        show_default="0",
    ),
]


class _OneOfSeveral(Command):
    """A command that a launcher may start in several processes: the first alone tells what is wrong with its line."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Parse the command line."""
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except Refusal as error:
            if "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0":
                raise
            raise click.exceptions.Exit(error.exit_code) from error


main = command(
    "train",
    "Train a network on images.",
    """Train a network on DATA: a folder or a .zip of images, an .npy, .npz or idx file, or the word "digits".

    \b
    Presets:
      digits   8×8 grey, 0.7 M parameters: minutes on a CPU
      mnist    32×32 grey, 1.1 M parameters: an hour on a CPU
      small    32×32, 1.5 M parameters: an hour on a CPU
      cifar10  32×32 RGB, the paper's 35.7 M parameters: for a GPU
      256      256×256 RGB, the paper's 114 M parameters: for large GPUs
    """,
    examples="""
  ddpm-train digits -o digits.pt                 handwritten digits, minutes on a CPU
  ddpm-train photos/ -o model.pt --steps 20000   your own images, scaled and cropped to 32×32
  ddpm-train pets/ --labels -o pets.pt           class-conditional: pets/cat/*.jpg, pets/dog/*.jpg
  ddpm-train mnist.npz --array x_train --labels  one array of several, and the labels that go with it
  ddpm-train scans/ --data-range 0 4095          16-bit images of 12 bits
  ddpm-train wide/ --image-size 48x64            images of 48 rows and 64 columns
  ddpm-train digits -o v.pt --prediction v --schedule cosine
  ddpm-train digits -o h.pt --loss hybrid        learns its variance too, for chains with few steps
  ddpm-train cifar.npz -o model.pt --preset cifar10 --device cuda --amp --compile
  torchrun --nproc-per-node 8 -m ddpm_deploy.train cifar.npz -o model.pt --preset cifar10
                                                 the same steps, each batch shared by eight GPUs
  ddpm-train --resume model.pt                   continue after Ctrl-C
  ddpm-train --resume model.pt --steps 40000     train a finished model further (its learning rate
                                                 follows the schedule of the longer training)
""",
    params=[click.Argument(["data"], required=False), *_OF_ANY_TRAINING, *_OF_A_NEW_TRAINING],
    needs=["torch", "PIL.Image"],
    extra="train",
    kind=_OneOfSeveral,
)
