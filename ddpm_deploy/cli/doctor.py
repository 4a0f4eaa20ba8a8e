"""ddpm-deploy doctor: what works on this machine, shown by running it."""

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command

main = command(
    "doctor",
    "Show what works on this machine, and how to repair the rest.",
    """List the packages, the driver and the GPUs, and run a small chain whose answer is known on every backend.

    Exits with 1 where something is broken, or no backend works. Takes seconds, and leaves no files behind.""",
    examples="""
  ddpm-deploy doctor             what was found, and a verdict
  ddpm-deploy doctor --json      for programs, and for bug reports
""",
    params=[options.as_json("what was found")],
)
