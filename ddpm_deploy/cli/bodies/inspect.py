"""ddpm-deploy inspect: print what a model's file says of itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ddpm_deploy.cli.bodies.engine import built_for
from ddpm_deploy.errors import ArtefactError, SpecError
from ddpm_deploy.files import show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.plan import digest_path, trusted


def inspect(model: Path, as_json: bool) -> None:
    """Print the ModelSpec of a file and, for an engine, what its bytes tell."""
    opened = open_model(model)
    content = _of_plan(opened) if opened.head else opened.spec.to_builtins()
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    click.echo(f"{opened.name} ({model.stat().st_size / 1e6:.1f} MB)")
    if opened.head and content.get("engine"):
        content["engine"] = built_for(opened.spec.engine)
    for name, value in content.items():
        if isinstance(value, dict):
            click.echo(f"  {name}")
            for key, item in value.items():
                click.echo(f"    {key:<18} {_text(item)}")
        else:
            said = "not tried" if name == "same_bits" and value is None else _text(value)
            click.echo(f"  {name:<20} {said}")


def _of_plan(model: ModelFile) -> dict[str, Any]:
    """What can be read of an engine; one that another tool built has no ModelSpec."""
    assert model.head is not None
    state = "right"
    try:
        trusted(model.path)
    except ArtefactError:
        state = "wrong" if digest_path(model.path).exists() else "missing"
    try:
        spec = model.spec.to_builtins()
    except SpecError as error:
        spec = {"spec": f"none: {error}"}
    return {**spec, "plan": {**asdict(model.head), "digest": state}}


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return show(", ".join(map(str, value))) if value else "none"
    return "none" if value in (None, "") else show(str(value))
