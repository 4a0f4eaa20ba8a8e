"""ddpm-verify: do the candidates compute what the reference computes?"""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import FilePath, Option, flag

main = command(
    "verify",
    "Compare models, in numbers.",
    """Compare one or more models with a reference, which is the first of MODELS; each is a .pt, an .onnx or an engine
    (.plan). A single model is compared with the proof that ddpm-export wrote beside it.

    There are two comparisons: of single predictions, where both models get the reference's x_t, and of the final
    images of whole chains on the same noise. --device, --backend and --precision are for the models that are compared;
    the reference runs as it does by default. Exits with 0 where all are within tolerance, with 1 where not.""",
    examples="""
  ddpm-verify model.pt model.onnx                     the exported network against PyTorch
  ddpm-verify model.pt model.onnx --all               at every timestep
  ddpm-verify model.pt model.onnx model.fp16.onnx     two candidates, and which of them to choose
  ddpm-verify model.onnx                              against its proof, without the checkpoint
  ddpm-verify engine.plan                             an engine, where it runs, against its proof
  ddpm-verify a.onnx b.onnx --report r.json --plot r.png
""",
    params=[
        click.Argument(["models"], type=FilePath, nargs=-1, required=True),
        Option(
            "--count", "Number of images to compare.", click.IntRange(1, 64), show_default="4, or the proof's"
        ),
        options.steps("all the model's, or the proof's"),
        options.seed("0, or the proof's"),
        flag("--all every", "Compare predictions at every timestep of the chain, and not at 50 of them."),
        Option(
            "--proof", "The proof to compare a single model with.", FilePath, show_default="MODEL.proof.npz"
        ),
        options.report("every figure"),
        options.as_json("every figure"),
        Option(
            "--plot",
            "Plot the error and the tolerance against the timestep in this .png, .svg or .pdf.",
            FilePath,
        ),
        *options.PLACE,
    ],
)
