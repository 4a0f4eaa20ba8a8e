"""ddpm-export: a checkpoint → an ONNX file that has been checked against PyTorch → a TensorRT engine."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import BatchSize, FilePath, Option, Sizes
from ddpm_deploy.words import CAPABILITIES, PRECISIONS

# None or False where they were not typed: `cli.bodies.engine` has the defaults.
_OF_ENGINES = [
    Option(
        ["--rtx"],
        is_flag=True,
        help="Build an engine of TensorRT-RTX: for GeForce and RTX GPUs, and built without a GPU.",
    ),
    Option(
        ["--compute-capability"],
        multiple=True,
        type=click.Choice(CAPABILITIES),
        show_default="all, compiled when first loaded",
        help="A kind of GPU that an --rtx engine is built for; give several for several kinds.",
    ),
    Option(
        ["--max-batch"],
        type=BatchSize,
        show_default="64, fewer for images over 64×64",
        help="The most images that the engine runs at the same time.",
    ),
    Option(
        ["--opt-batch"],
        type=BatchSize,
        show_default="--max-batch",
        help="The number of images that the engine is fastest for.",
    ),
    Option(
        ["--batch-buckets"],
        type=Sizes(),
        help="Make the engine fast for each of several batch sizes, as 1,8,64, in place of --max-batch and "
        "--opt-batch.",
    ),
    Option(
        ["--workspace"],
        type=float,
        show_default="all there is",
        help="GiB of GPU memory that TensorRT may use while it builds.",
    ),
    Option(
        ["--optimization-level"],
        type=click.IntRange(0, 5),
        show_default="3",
        help="How hard TensorRT tries: higher levels build longer.",
    ),
    Option(
        ["--timing-cache"],
        type=FilePath,
        show_default="in the user's cache folder",
        help="The .cache file that keeps TensorRT's measurements from build to build.",
    ),
    Option(
        ["--hardware-compatible"],
        is_flag=True,
        help="Build an engine for every GPU from Ampere on, which costs some speed.",
    ),
]

main = command(
    "export",
    "Export a checkpoint to a checked ONNX file and a TensorRT engine.",
    """Export MODEL, a checkpoint (.pt), to ONNX, check that against PyTorch, and build its TensorRT engine; or build
    the engine of MODEL, an .onnx file.

    In half precision, some layers must stay in float32. They are found by running whole chains with the rounding of
    half-precision hardware; the report names them, and says why. Without a GPU, only an --rtx engine can be built.""",
    examples="""
  ddpm-export model.pt                          model.onnx, with the averaged (EMA) weights
  ddpm-export model.pt --fp16                   model.fp16.onnx; where there is a GPU, model.fp16.plan
  ddpm-export model.pt --fp16 -o engine.plan    engine.onnx and engine.plan, or exit 1
  ddpm-export model.fp16.onnx -o engine.plan    the engine alone: PyTorch is not needed
  ddpm-export model.fp16.onnx --batch-buckets 1,8,64
  ddpm-export model.pt --fp16 --rtx             model.fp16.rtx.plan, for RTX GPUs; needs no GPU
  ddpm-export model.fp16.onnx --rtx --compute-capability 8.6 --compute-capability 8.9
  ddpm-export model.pt -o net.onnx              under another name, and no engine
  ddpm-export model.pt --weights raw            the weights as trained, without averaging
""",
    params=[
        options.MODEL,
        Option(
            ["-o", "--output"],
            type=FilePath,
            show_default="MODEL with .onnx, .fp16.onnx, … and with .plan",
            help="The .onnx or .plan file to write; a proof for ddpm-verify is written beside it.",
        ),
        options.weights(default=None),
        Option(
            ["--precision"],
            type=click.Choice(PRECISIONS),
            show_default="fp32",
            help="Precision inside the network; its inputs and outputs are always float32. tf32 is for engines.",
        ),
        Option(["--fp16"], is_flag=True, help="The same as --precision fp16."),
        Option(
            ["--all", "every"],
            is_flag=True,
            help="For bf16 and fp16: check a large network at every timestep, which takes minutes to hours.",
        ),
        options.report("what was found"),
        Option(
            ["--engine"], is_flag=True, help="Require the engine: exit with 1 where it cannot be built here."
        ),
        *_OF_ENGINES,
        options.force("files that hold another model"),
    ],
)
