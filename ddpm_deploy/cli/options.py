"""The options that several commands have, and the types of their values."""

from pathlib import Path
from typing import Any, Final

import click

from ddpm_deploy.words import BACKENDS, MAX_BATCH, WEIGHTS

# --- types --------------------------------------------------------------------------------------------------


class _FilePath(click.Path):
    """A path that is not empty, as an unset variable of a shell script would make it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check and convert."""
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class Words(click.Choice[str]):
    """A choice of words, which may be typed with a hyphen in place of an underscore."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Return the word as it is compared."""
        return super().normalize_choice(str(choice), ctx).replace("-", "_")


class Sizes(click.ParamType[tuple[int, ...]]):
    """Batch sizes that rise, as 1,8,64."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Check and convert."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(size) for size in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not of the form 1,8,64", param, ctx)
        if list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= MAX_BATCH:
            self.fail(
                f"{value!r}: give sizes from 1 to {MAX_BATCH}, each larger than the one before", param, ctx
            )
        return sizes


FilePath: Final = _FilePath(path_type=Path)
BatchSize: Final = click.IntRange(1, MAX_BATCH)


class Option(click.Option):
    """A click option whose help is for people.

    show_default: may be a text, for a default that only the command's body knows.
    """

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

# --- options of one form ------------------------------------------------------------------------------------

MODEL: Final = click.Argument(["model"], type=FilePath)
DEVICE: Final = Option(
    ["--device"],
    show_default="cpu; for an engine, cuda",
    help="Where to run: cpu, cuda, or cuda:1 for the second GPU; a checkpoint runs on any device of PyTorch.",
)
BACKEND: Final = Option(
    ["--backend"],
    type=click.Choice(BACKENDS),
    show_default="by the file and the device",
    help="The library that runs the network.",
)
THREADS: Final = Option(
    ["--threads"], type=click.IntRange(1, 1024), show_default="one per core", help="CPU threads to use."
)
BATCH: Final = Option(
    ["--batch"],
    type=BatchSize,
    show_default="64, fewer for images over 16×16; for an engine, its largest",
    help="Images to sample at the same time.",
)
IMAGES: Final = Option(
    ["-o", "--output"],
    type=FilePath,
    default=Path("samples.png"),
    help="Where to write the images: a .png (one grid), an .npz, or a folder (one PNG for each).",
)
AS_FLOAT: Final = Option(
    ["--float", "as_float"],
    is_flag=True,
    help="Write unrounded images to the .npz: `samples`, float32 (N, C, H, W).",
)
PROGRESS: Final = Option(
    ["--progress"],
    type=FilePath,
    help="Show how the first images appear, in a .gif (animated) or a .png (a film strip).",
)

# --- options whose default or meaning is each command's own -------------------------------------------------


def weights(default: str | None = "ema") -> click.Option:
    """Make --weights; default: None for a body that must know whether it was typed."""
    return Option(
        ["--weights"],
        type=click.Choice(WEIGHTS),
        default=default,
        show_default="ema",
        help="The weights of a checkpoint to use: averaged (ema) or as trained (raw).",
    )


def steps(default: str) -> click.Option:
    """Make --steps, of a chain."""
    return Option(
        ["--steps"], type=click.IntRange(min=1), show_default=default, help="Steps of the reverse chain."
    )


def seed(default: str) -> click.Option:
    """Make --seed, of the noise."""
    return Option(
        ["--seed"],
        type=click.IntRange(0, 2**64 - 1),
        show_default=default,
        help="Seed of the noise: the same seed gives the same images.",
    )


def report(content: str) -> click.Option:
    """Make --report; content: what it writes."""
    return Option(["--report"], type=FilePath, help=f"Write {content} to this .json file.")


def force(target: str) -> click.Option:
    """Make --force; target: what it replaces."""
    return Option(["--force"], is_flag=True, help=f"Replace {target}.")


def as_json(content: str) -> click.Option:
    """Make --json; content: what it prints."""
    return Option(["--json", "as_json"], is_flag=True, help=f"Print {content} as JSON.")
