"""ddpm-train: images → a trained network."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, Words
from ddpm_deploy.words import LOSSES, PREDICTIONS, PRESETS, SCHEDULES, VARIANCES

_OF_ANY_TRAINING = [
    Option(
        ["-o", "--output"],
        type=FilePath,
        show_default="model.pt, or the checkpoint of --resume",
        help="The checkpoint to write.",
    ),
    Option(
        ["--resume"], type=FilePath, help="Continue the training of this checkpoint, with the settings in it."
    ),
    Option(
        ["--steps"],
        type=click.IntRange(1, 10**9),
        show_default="the preset's",
        help="Training steps in all.",
    ),
    Option(
        ["--device"],
        default="auto",
        help="Where to train: cpu, cuda, or any device of PyTorch; auto uses a GPU where there is one.",
    ),
    Option(
        ["--compile", "compiled"],
        is_flag=True,
        help="Compile the network (torch.compile): the first step takes longer, the others less.",
    ),
    Option(
        ["--workers"],
        type=click.IntRange(1, 256),
        show_default="one per core",
        help="Threads that read the images.",
    ),
    Option(
        ["--save-every"],
        type=click.IntRange(min=1),
        show_default="1000",
        help="Steps from one checkpoint to the next.",
    ),
    Option(
        ["--sample-every"],
        type=click.IntRange(min=0),
        show_default="1000",
        help="Steps from one picture of samples to the next; 0 for no pictures.",
    ),
    Option(["--skip-broken"], is_flag=True, help="Leave out images that cannot be read."),
    options.force("an output that exists"),
]
# None where they were not typed: the preset decides, or, with --resume, the checkpoint.
_OF_A_NEW_TRAINING = [
    Option(
        ["--preset"],
        type=click.Choice(PRESETS),
        show_default="digits for the digits, else small",
        help="Settings of the network and its training that go well together.",
    ),
    Option(
        ["--image-size"],
        type=click.IntRange(1, 4096),
        show_default="the preset's",
        help="Height and width to scale and crop the images to.",
    ),
    Option(
        ["--channels"],
        type=click.Choice(["grey", "rgb"]),
        show_default="the preset's, or the images' own",
        help="Colours of the images.",
    ),
    Option(
        ["--batch-size"],
        type=options.BatchSize,
        show_default="the preset's",
        help="Images in each training step.",
    ),
    Option(
        ["--learning-rate"],
        type=click.FloatRange(0, 1, min_open=True),
        show_default="the preset's",
        help="The largest learning rate of the training.",
    ),
    Option(
        ["--prediction"],
        type=Words(PREDICTIONS),
        show_default="epsilon",
        help="What the network predicts: the noise, v, the image, or the mean of the next step.",
    ),
    Option(
        ["--loss"],
        type=Words(LOSSES),
        show_default="simple",
        help="What training minimises: simple is the squared error, vlb the variational bound, hybrid both (it learns "
        "the variance too).",
    ),
    Option(
        ["--variance"],
        type=Words(VARIANCES),
        show_default="learned_range for the hybrid loss, else fixed_large",
        help="Variance of the reverse steps.",
    ),
    Option(["--schedule"], type=Words(SCHEDULES), show_default="linear", help="Noise schedule (β)."),
    Option(
        ["--labels"],
        is_flag=True,
        default=None,
        help="Train a class-conditional model: each folder in DATA is a class.",
    ),
    Option(
        ["--label-dropout"],
        type=click.FloatRange(0, 1, max_open=True),
        show_default="0.1 with --labels",
        help="Share of the images that are shown without their label, which guidance needs.",
    ),
    Option(
        ["--accumulate"],
        type=click.IntRange(1, 65_536),
        show_default="1",
        help="Compute each batch in this many parts, to save memory.",
    ),
    Option(
        ["--amp"],
        is_flag=True,
        default=None,
        help="Train in mixed precision (bfloat16), which new GPUs and CPUs do faster.",
    ),
    Option(
        ["--flip/--no-flip"],
        default=None,
        show_default="the preset's",
        help="Mirror half of the images, at random.",
    ),
    Option(
        ["--seed"],
        type=click.IntRange(0, 2**63 - 1),
        show_default="0",
        help="Seed of all random numbers: the same seed gives the same model.",
    ),
]

main = command(
    "train",
    "Train a network on images.",
    """Train a network on DATA: a folder of images, an .npy or .npz file of uint8 images, or the word "digits".

    \b
    Presets:
      digits   8×8 grey, 0.7 M parameters: minutes on a CPU
      small    32×32, 1.5 M parameters: an hour on a CPU
      cifar10  32×32 RGB, the paper's 35.7 M parameters: for a GPU
      256      256×256 RGB, the paper's 114 M parameters: for large GPUs
    """,
    examples="""
  ddpm-train digits -o digits.pt                 handwritten digits, minutes on a CPU
  ddpm-train photos/ -o model.pt --steps 20000   your own images, scaled and cropped to 32×32
  ddpm-train pets/ --labels -o pets.pt           class-conditional: pets/cat/*.jpg, pets/dog/*.jpg
  ddpm-train digits -o v.pt --prediction v --schedule cosine
  ddpm-train digits -o h.pt --loss hybrid        learns its variance too, for chains with few steps
  ddpm-train cifar.npz -o model.pt --preset cifar10 --device cuda --amp --compile
  ddpm-train --resume model.pt                   continue after Ctrl-C
  ddpm-train --resume model.pt --steps 40000     train a finished model further (its learning rate
                                                 follows the schedule of the longer training)
""",
    params=[click.Argument(["data"], required=False), *_OF_ANY_TRAINING, *_OF_A_NEW_TRAINING],
    needs={"torch": "train", "PIL.Image": "train"},
)
