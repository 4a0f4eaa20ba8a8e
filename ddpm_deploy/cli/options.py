"""The options that several commands have, and the types of their values."""

import re
from pathlib import Path
from typing import Any, Final

import click

from ddpm_deploy import words

# --- types --------------------------------------------------------------------------------------------------


class _FilePath(click.Path):
    """A path: not empty, as an unset variable of a shell script would make it, nor "-", which elsewhere is a pipe."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check and convert."""
        if value == "":
            self.fail("the name is empty", param, ctx)
        if value == "-":
            self.fail(
                'files are read and written by name, and "-" is none: ./- is a file of that name', param, ctx
            )
        return super().convert(value, param, ctx)


class Words(click.Choice[str]):
    """A choice of words, which may be typed with a hyphen in place of an underscore."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Return the word as it is compared."""
        return super().normalize_choice(str(choice), ctx).replace("-", "_")


def sizes(text: str) -> tuple[int, ...]:
    """Read batch sizes that rise, as 1,8,64."""
    try:
        found = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not of the form 1,8,64") from error
    if list(found) != sorted(set(found)) or not 1 <= found[0] <= found[-1] <= words.MAX_BATCH:
        raise click.BadParameter(
            f"{text!r}: give sizes from 1 to {words.MAX_BATCH}, each larger than the one before"
        )
    return found


def timesteps(text: str) -> tuple[int, ...]:
    """Read timesteps, as 999,500,0; whether they fall within the model's is asked of that."""
    try:
        return tuple(int(t) for t in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not of the form 999,500,0") from error


def part(text: str) -> tuple[int, int]:
    """Read one part of some, as 3/16."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text!r} is not of the form 3/16")
    number, parts = int(match[1]), int(match[2])
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{text!r}: parts are numbered from 1 to the last, as 1/16 to 16/16")
    return number, parts


class _ImageSize(click.ParamType[tuple[int, int]]):
    """Height and width: 48x64, or 32 for both."""

    name = "size"
    _PATTERN = re.compile(r"(\d{1,4})(?:[x×](\d{1,4}))?", re.ASCII)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Check and convert."""
        if match := self._PATTERN.fullmatch(str(value).lower()):
            height, width = int(match[1]), int(match[2] or match[1])
            if 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIZE:
                return height, width
        return self.fail(
            f"{value!r} is neither a size, as 32, nor a height and a width, as 48x64, of at most {_LARGEST_SIZE}"
        )


_LARGEST_SIZE: Final = 4096
FilePath: Final = _FilePath(path_type=Path)
IMAGE_SIZE: Final = _ImageSize()
BatchSize: Final = click.IntRange(1, words.MAX_BATCH)


class Option(click.Option):
    """A click option whose help is for people.

    names: as "--all every": what is typed, then the parameter of the body where that has another name.
    show_default: may be a text, for a default that only the command's body knows.
    """

    def __init__(self, names: str, text: str, type: Any = None, **attributes: Any) -> None:
        super().__init__(names.split(), help=text, type=type, **attributes)

    def make_metavar(self, ctx: click.Context) -> str:
        """Return the word for its value: INTEGER, and not INTEGER RANGE."""
        return super().make_metavar(ctx).removesuffix(" RANGE")

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what stands in brackets behind the help: the default, and a range that a user may meet."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default  # click would put it in parentheses
        bounds: Any = self.type
        if "range" in extra and (bounds.max is None or bounds.max > _LARGEST_SHOWN):
            del extra["range"]
        elif "range" in extra:
            low, high = "above " * bounds.min_open, "below " * bounds.max_open
            extra["range"] = f"{low}{bounds.min} to {high}{bounds.max}"
        return extra


_LARGEST_SHOWN: Final = 100


def flag(names: str, text: str, **attributes: Any) -> Option:
    """Make an option without a value."""
    return Option(names, text, is_flag=True, **attributes)


# --- options of one form ------------------------------------------------------------------------------------

MODEL: Final = click.Argument(["model"], type=FilePath)
DEVICE: Final = Option(
    "--device",
    "Where to run: cpu, cuda, or cuda:1 for the second GPU; a checkpoint runs on any device of PyTorch.",
    show_default="cpu; for an engine, cuda",
)
BACKEND: Final = Option(
    "--backend",
    "The library that runs the network.",
    click.Choice(words.BACKENDS),
    show_default="by the file and the device",
)
PRECISION: Final = Option(
    "--precision",
    "What --backend openvino computes in: bf16 where the processor has it.",
    click.Choice(words.RUN_PRECISIONS),
    show_default="fp32; for other backends, the file's",
)
THREADS: Final = Option(
    "--threads",
    "CPU threads to use.",
    click.IntRange(1, 1024),
    show_default="OMP_NUM_THREADS, or the cores it may use",
)
WEIGHTS: Final = Option(
    "--weights",
    "The weights of a checkpoint to use: averaged (ema) or as trained (raw).",
    click.Choice(words.WEIGHTS),
    show_default="ema",
)
PLACE: Final = (DEVICE, BACKEND, PRECISION, WEIGHTS, THREADS)
SPACING: Final = Option(
    "--spacing",
    "Which timesteps a chain with fewer steps visits.",
    click.Choice(words.SPACINGS),
    show_default="the model's own: leading, unless it was imported",
)
TIMESTEPS: Final = Option(
    "--timesteps",
    "The timesteps to visit, falling, as 999,850,600,300,0: in place of --steps and --spacing.",
    timesteps,
)
SOLVER: Final = Option(
    "--solver",
    "Method of sampling: ddpm for the full chain, fast for the best that is known of 20 steps; or one by name.",
    click.Choice(words.ASKED_SOLVERS),
    show_default="the model's own: ddpm, unless it was imported",
)
ETA: Final = Option(
    "--eta", "Amount of noise that ddim adds at each step.", click.FloatRange(0, 1), show_default="0"
)
LABEL: Final = Option(
    "--label labels",
    "Class to sample, by name or number; give several to take them in turn.",
    multiple=True,
    show_default="each class in turn",
)
GUIDANCE: Final = Option(
    "--guidance",
    "Scale of classifier-free guidance: 1 changes nothing, 3 follows the class more closely. It needs a "
    "model trained with --labels, and takes two rows of the batch for each image.",
    float,
)
BATCH: Final = Option(
    "--batch",
    "Images to sample at the same time.",
    BatchSize,
    show_default="64, fewer for images over 16×16; for an engine, its largest",
)
IMAGES: Final = Option(
    "-o --output",
    "Where to write the images: a .png (one grid), an .npz, or a folder (one PNG for each).",
    FilePath,
    default=Path("samples.png"),
)

# --- options whose default or meaning is each command's own -------------------------------------------------


def steps(default: str) -> Option:
    """Make --steps, of a chain."""
    return Option("--steps", "Steps of the reverse chain.", click.IntRange(min=1), show_default=default)


def seed(default: str) -> Option:
    """Make --seed, of the noise."""
    return Option(
        "--seed",
        "Seed of the noise: the same seed gives the same images.",
        click.IntRange(0, 2**64 - 1),
        show_default=default,
    )


def report(content: str) -> Option:
    """Make --report; content: what it writes."""
    return Option("--report", f"Write {content} to this .json file.", FilePath)


def force(target: str) -> Option:
    """Make --force; target: what it replaces."""
    return flag("--force", f"Replace {target}.")


def as_json(content: str) -> Option:
    """Make --json; content: what it prints."""
    return flag("--json as_json", f"Print {content} as JSON.")


# --- how a chain writes its images --------------------------------------------------------------------------

WRITING: Final = (
    flag("--float as_float", "Write unrounded images to the .npz: `samples`, float32 (N, C, H, W)."),
    flag("--in-data-range", "With --float: in the units of the data that the model was trained on."),
    flag("--rgb", "Write grey images to the .npz with three equal channels."),
    Option(
        "--progress",
        "Show how the first images appear, in a .gif (animated) or a .png (a film strip).",
        FilePath,
    ),
    force("pictures of the same names in a folder that is not of this model, seed and settings"),
    as_json("what was made"),
)
