"""ddpm-deploy merge: join the shards of a run."""

import os
import time
from pathlib import Path

import click

from ddpm_deploy.bulk.manifest import NAME, Manifest
from ddpm_deploy.bulk.merge import merge as join
from ddpm_deploy.cli.bodies.outputs import check_outputs
from ddpm_deploy.cli.bodies.progress import duration, stage
from ddpm_deploy.errors import SettingError, plural
from ddpm_deploy.files import require_suffix, show


def merge(folder: Path, output: Path) -> None:
    """Join the shards of a folder into one .npz."""
    require_suffix(output, "the joined images", ".npz")
    manifest = Manifest.load(folder)
    check_outputs([output], [folder / NAME])
    names = {manifest.shard_name(number) for number in manifest.numbers()}
    if os.path.realpath(output.parent) == os.path.realpath(folder) and output.name in names:
        raise SettingError(f"{show(output)} is one of the shards: choose another name for the output")
    start = time.perf_counter()
    with stage("merging", manifest.count) as advance:
        digest = join(folder, manifest, output, advance)
    seconds = time.perf_counter() - start
    count, shards = plural(manifest.request.count, "image"), plural(manifest.count, "shard")
    click.echo(f"{show(output)}: {count} of {shards} in {duration(seconds)}, digest {digest}")
