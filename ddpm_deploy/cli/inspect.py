"""ddpm-deploy inspect: what a model's file says of itself."""

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command

main = command(
    "inspect",
    "Show what a model file says of itself.",
    """Print the ModelSpec of MODEL, a .pt, .onnx or .plan file, without loading its weights; neither PyTorch,
    TensorRT nor a GPU is needed.""",
    examples="""
  ddpm-deploy inspect model.onnx           for people
  ddpm-deploy inspect model.pt --json      for programs
  ddpm-deploy inspect engine.plan          also what the engine was built for
""",
    params=[options.MODEL, options.as_json("the ModelSpec")],
)
