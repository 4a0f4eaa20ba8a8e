"""ddpm-export: a checkpoint → an ONNX file that has been checked against PyTorch → a TensorRT engine."""

from pathlib import Path
from typing import Any

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import BatchSize, FilePath, Option, flag, sizes
from ddpm_deploy.importers.flags import all_names
from ddpm_deploy.words import CAPABILITIES, PRECISIONS, WEIGHTS

# None or False where they were not typed: `cli.bodies.engine` has the defaults.
_OF_ENGINES = [
    flag("--rtx", "Build an engine of TensorRT-RTX: for GeForce and RTX GPUs, and built without a GPU."),
    Option(
        "--compute-capability",
        "A kind of GPU that an --rtx engine is built for; give several for several kinds.",
        click.Choice(CAPABILITIES),
        multiple=True,
        show_default="all, compiled when first loaded",
    ),
    Option(
        "--max-batch",
        "The most images that the engine runs at the same time.",
        BatchSize,
        show_default="64, fewer for images over 64×64",
    ),
    Option(
        "--opt-batch",
        "The number of images that the engine is fastest for.",
        BatchSize,
        show_default="--max-batch",
    ),
    Option(
        "--batch-buckets",
        "Make the engine fast for each of several batch sizes, as 1,8,64, in place of --max-batch and "
        "--opt-batch.",
        sizes,
    ),
    Option(
        "--workspace",
        "GiB of GPU memory that TensorRT may use while it builds.",
        float,
        show_default="all there is",
    ),
    Option(
        "--optimization-level",
        "How hard TensorRT tries: higher levels build longer.",
        click.IntRange(0, 5),
        show_default="3",
    ),
    Option(
        "--timing-cache",
        "The .cache file that keeps TensorRT's measurements from build to build.",
        FilePath,
        show_default="in the user's cache folder",
    ),
    flag("--hardware-compatible", "Build an engine for every GPU from Ampere on, which costs some speed."),
]


class _WeightsOrFile(click.ParamType[str | Path]):
    """One of a checkpoint's two sets of weights, or the file with those of the user's own network."""

    name = "ema|raw|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """Check and convert."""
        return str(value) if value in WEIGHTS else Path(FilePath.convert(value, param, ctx))


def _collect(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Gather the flags of the dialects that were typed in one parameter of the body."""
    told = ctx.params.setdefault("told", {})
    if value is not None:
        told[param.name] = value


def _print_template(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ddpm_deploy.importers.template import TEMPLATE

        click.echo(TEMPLATE, nl=False)
        ctx.exit()


_OF_IMPORTS = [
    Option(
        "--weights",
        "Of a checkpoint of ddpm-train: averaged (ema) or as trained (raw). Of a function of your own: the file.",
        _WeightsOrFile(),
        show_default="ema",
    ),
    Option(
        "--key", "The entry of a file with several that holds the weights.", show_default="the averaged ones"
    ),
    Option("--spec", "The .toml file that describes a network of your own.", FilePath),
    flag(
        "--spec-template",
        "Print a file for --spec to start from, and exit.",
        is_eager=True,
        expose_value=False,
        callback=_print_template,
    ),
    Option(
        "--flags",
        "A file of flags of the code that a checkpoint was trained with: a .json, a .toml, or the text of its command "
        "line. Each may be typed here too, as --image_size 64.",
        FilePath,
    ),
    Option(
        "--check-images",
        "Images that the network was trained on: compares by them what was read or assumed with what else it may be.",
        FilePath,
    ),
    *(
        click.Option(
            [f"--{name}", *{f"--{name.replace('_', '-')}"} - {f"--{name}"}],
            hidden=True,
            expose_value=False,
            callback=_collect,
        )
        for name in all_names()
    ),
]

main = command(
    "export",
    "Export a checkpoint to a checked ONNX file and a TensorRT engine.",
    """Export MODEL to ONNX, check that against PyTorch, and build its TensorRT engine; or build the engine of MODEL,
    an .onnx file. MODEL is a checkpoint of ddpm-train (.pt), another's (a folder of diffusers, or a file of OpenAI's,
    Ho's, lucidrains' or MONAI's code), or a function of your own that makes the network, as package.module:function.

    Another's checkpoint is told what its own code was told by the names there, as --image_size 64 --num_heads 4. What
    was recognised is printed, and what was assumed with the flag that changes it; docs/importing.md lists them.

    In half precision, some layers must stay in float32. They are found by running whole chains with the rounding of
    half-precision hardware; the report names them, and says why. Without a GPU, only an --rtx engine can be built.""",
    examples="""
  ddpm-export model.pt                          model.onnx, with the averaged (EMA) weights
  ddpm-export model.pt --fp16                   model.fp16.onnx; where there is a GPU, model.fp16.plan
  ddpm-export my-ddpm/                          a folder of diffusers: my-ddpm.onnx
  ddpm-export ema.pt --image_size 32            another's checkpoint, by the names of its weights
  ddpm-export ema.pt --flags flags.txt --check-images photos/
  ddpm-export my.models:build --weights ckpt.pt --spec spec.toml    a network of your own
  ddpm-export model.pt --fp16 -o engine.plan    engine.onnx and engine.plan, or exit 1
  ddpm-export model.fp16.onnx -o engine.plan    the engine alone: PyTorch is not needed
  ddpm-export model.fp16.onnx --batch-buckets 1,8,64
  ddpm-export model.pt --fp16 --rtx             model.fp16.rtx.plan, for RTX GPUs; needs no GPU
  ddpm-export model.fp16.onnx --rtx --compute-capability 8.6 --compute-capability 8.9
  ddpm-export model.pt --ncnn                   model.ncnn, the fastest on a CPU where the model is large
  ddpm-export model.onnx --ncnn                 the same of an .onnx: PyTorch is not needed
  ddpm-export model.pt -o net.onnx              under another name, and no engine
  ddpm-export model.pt --weights raw            the weights as trained, without averaging
""",
    params=[
        options.MODEL,
        Option(
            "-o --output",
            "The .onnx, .plan or .ncnn file to write; a proof for ddpm-verify is written beside it.",
            FilePath,
            show_default="MODEL with .onnx, .fp16.onnx, … and with .plan; with --ncnn, .ncnn",
        ),
        *_OF_IMPORTS,
        Option(
            "--precision",
            "Precision inside the network; its inputs and outputs are always float32. tf32 is for engines.",
            click.Choice(PRECISIONS),
            show_default="fp32",
        ),
        flag("--fp16", "The same as --precision fp16."),
        flag(
            "--all every",
            "For bf16 and fp16: check a large network at every timestep, which takes minutes to hours.",
        ),
        options.report("what was found"),
        flag("--ncnn", "Write a .ncnn file for fast CPUs, in float32, in place of the .onnx and the engine."),
        flag("--engine", "Require the engine: exit with 1 where it cannot be built here."),
        *_OF_ENGINES,
        options.force("files that hold another model"),
    ],
)
