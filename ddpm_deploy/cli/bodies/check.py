"""ddpm-deploy check: look through the shards of a run."""

import json
import os
from pathlib import Path
from typing import Any, Final

import click

from ddpm_deploy.bulk.manifest import Manifest
from ddpm_deploy.bulk.merge import digest_of
from ddpm_deploy.bulk.shards import State, state
from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.errors import plural
from ddpm_deploy.files import show

_LISTED: Final = 20  # shards that people are told by name


def check(folder: Path, as_json: bool) -> None:
    """Look through all shards; exit with 1 where one is not whole."""
    manifest = Manifest.load(folder)
    faults: dict[str, State] = {}
    digests = []
    with stage("checking", manifest.count) as advance:
        for number in manifest.numbers():
            found = state(folder, manifest, number)
            digests.append(found.digest)
            if found.condition != "whole":
                faults[manifest.shard_name(number)] = found
            advance(1)
    digest = None if faults else digest_of(digests)
    if as_json:
        click.echo(json.dumps(_report(folder, manifest, faults, digest), indent=2))
    else:
        _tell(folder, manifest, faults, digest)
    if faults:
        raise click.exceptions.Exit(1)


def _report(folder: Path, manifest: Manifest, faults: dict[str, State], digest: str | None) -> dict[str, Any]:
    """What was found, for programs."""
    of = {
        condition: [name for name, found in faults.items() if found.condition == condition]
        for condition in ("missing", "altered", "foreign")
    }
    return {
        "folder": os.fspath(folder),
        "model": manifest.spec.provenance.digest,
        "request": manifest.request.to_builtins(),
        "versions": manifest.versions,
        "shard_size": manifest.shard_size,
        "shards": manifest.count,
        "whole": manifest.count - len(faults),
        **of,
        "digest": digest,
    }


def _tell(folder: Path, manifest: Manifest, faults: dict[str, State], digest: str | None) -> None:
    """What was found, for people."""
    for name, found in list(faults.items())[:_LISTED]:
        click.echo(f"{name} {found.says}")
    if len(faults) > _LISTED:
        click.echo(f"… and {len(faults) - _LISTED} more")
    count, shards = plural(manifest.request.count, "image"), plural(manifest.count, "shard")
    whole = (
        f"{manifest.count - len(faults)} of {shards} are whole" if faults else f"all of {shards} are whole"
    )
    click.echo(
        f"{show(folder)}: {count}, seed {manifest.request.seed}: {whole}{f', digest {digest}' if digest else ''}"
    )
