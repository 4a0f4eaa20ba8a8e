"""ddpm-deploy inspect: what a model's file says of itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ddpm_deploy.cli.common import FilePath, command
from ddpm_deploy.files import show


@command(
    "What a model says of itself.",
    """
  ddpm-deploy inspect model.onnx           the ModelSpec, for people
  ddpm-deploy inspect model.pt --json      for programs
  ddpm-deploy inspect engine.plan          and what the engine was built for; no GPU is needed
""",
)
@click.argument("file", type=FilePath)
@click.option("--json", "as_json", is_flag=True, help="Print the ModelSpec as JSON.")
def main(file: Path, as_json: bool) -> None:
    """Print the ModelSpec of FILE, a .pt, .onnx or .plan, without loading torch, TensorRT or the weights."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.cli.engine import built_for
    from ddpm_deploy.plan import PLAN_SUFFIX

    plan = file.suffix.lower() == PLAN_SUFFIX
    content = _plan(file) if plan else read_spec(file).to_builtins()
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    click.echo(f"{show(file)} ({file.stat().st_size / 1e6:.1f} MB)")
    if plan and content.get("engine"):
        content["engine"] = built_for(read_spec(file).engine)
    for name, value in content.items():
        if isinstance(value, dict):
            click.echo(f"  {name}")
            for key, item in value.items():
                click.echo(f"    {key:<18} {_text(item)}")
        else:
            click.echo(f"  {name:<20} {_text(value)}")


def _plan(file: Path) -> dict[str, Any]:
    """What can be read of an engine: one that another tool built has no ModelSpec."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.errors import ArtefactError
    from ddpm_deploy.plan import digest_path, read_plan_head, trusted

    head = asdict(read_plan_head(file))
    try:
        trusted(file)
        head["digest"] = "right"
    except ArtefactError:
        head["digest"] = "wrong" if digest_path(file).exists() else "missing"
    try:
        return {**read_spec(file).to_builtins(), "plan": head}
    except ArtefactError as error:
        return {"spec": f"none: {error}", "plan": head}


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return show(", ".join(map(str, value))) if value else "none"
    return "none" if value in (None, "") else show(str(value))
