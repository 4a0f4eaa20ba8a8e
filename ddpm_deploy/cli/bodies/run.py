"""ddpm-run: sample a request."""

from pathlib import Path
from typing import Unpack

import click

from ddpm_deploy.cli.bodies.chain import ChainOptions, Watch, checked_outputs, write_images
from ddpm_deploy.cli.bodies.cluster import Cluster, run_on_ray
from ddpm_deploy.cli.bodies.models import open_sampler
from ddpm_deploy.cli.bodies.shards import Split, run_shards
from ddpm_deploy.errors import SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.words import AskedSolver, Spacing


def run(
    model: Path,
    *,
    steps: int | None,
    count: int,
    seed: int | None,
    first_index: int,
    batch: int | None,
    labels: tuple[str, ...],
    solver: AskedSolver | None,
    eta: float | None,
    spacing: Spacing | None,
    timesteps: tuple[int, ...] | None,
    guidance: float | None,
    snapshot: Path | None,
    shards: bool,
    shard_size: int | None,
    shard: tuple[int, int] | None,
    ray: str | None,
    workers: int | None,
    **options: Unpack[ChainOptions],
) -> None:
    """Sample images and write them."""
    _require_one_way(
        shards=shards, of_shards=bool(shard_size or shard or ray is not None), snapshot=snapshot is not None
    )
    if workers and ray is None:
        raise click.UsageError("--workers are Ray's: pass --ray too, or omit it")
    opened = open_model(model)
    request = Request(
        count=count,
        steps=steps,
        solver=solver,
        eta=eta,
        spacing=spacing,
        timesteps=timesteps,
        seed=seed,
        first_index=first_index,
        labels=labels,
        guidance=() if guidance is None else (guidance,),
    ).checked(opened.spec)
    split = Split(shard_size, shard or (1, 1), seed is not None)
    if ray is not None:
        run_on_ray(opened, request, split, Cluster(ray, workers), batch, options)
        return
    if shards:
        run_shards(opened, request, split, batch, options)
        return
    outputs = checked_outputs(opened, request, options, snapshot)
    with open_sampler(opened, request, batch, options) as sampler:
        most = sampler.max_batch(guided=guidance is not None)
        if snapshot and count > most:
            raise SettingError(
                f"a snapshot holds one batch, and {count} images take several: choose --batch {count}, or a --count "
                f"of at most {most}"
            )
        watch = Watch(sampler, opened, request, outputs)
        write_images(sampler.draw(request, watch), watch)


def _require_one_way(*, shards: bool, of_shards: bool, snapshot: bool) -> None:
    """Refuse options of a run in shards without one, and a snapshot of one."""
    if of_shards and not shards:
        raise click.UsageError("--shard-size, --shard and --ray are of a run in shards: pass --shards too")
    if shards and snapshot:
        raise click.UsageError("--snapshot is not for --shards, which goes on with what is there: omit it")
