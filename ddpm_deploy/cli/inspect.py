"""ddpm-deploy inspect: what a model's file says of itself."""

import json
from pathlib import Path

import click

from ddpm_deploy.cli.common import FilePath, command
from ddpm_deploy.files import show


@command(
    "What a model says of itself.",
    """
  ddpm-deploy inspect model.onnx           the ModelSpec, for people
  ddpm-deploy inspect model.pt --json      for programs
""",
)
@click.argument("file", type=FilePath)
@click.option("--json", "as_json", is_flag=True, help="Print the ModelSpec as JSON.")
def main(file: Path, as_json: bool) -> None:
    """Print the ModelSpec of FILE, a .pt or .onnx, without loading torch or the weights."""
    from ddpm_deploy.artefact import read_spec

    spec = read_spec(file).to_builtins()
    if as_json:
        click.echo(json.dumps(spec, indent=2))
        return
    click.echo(f"{show(file)} ({file.stat().st_size / 1e6:.1f} MB)")
    for name, value in spec.items():
        if isinstance(value, dict):
            click.echo(f"  {name}")
            for key, item in value.items():
                click.echo(f"    {key:<18} {_text(item)}")
        else:
            click.echo(f"  {name:<20} {_text(value)}")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if value else "none"
    return "none" if value is None else show(str(value))
