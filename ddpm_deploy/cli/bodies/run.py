"""ddpm-run: sample a request."""

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import click

from ddpm_deploy.cli.bodies.chain import (
    ChainOptions,
    RequestOptions,
    Watch,
    checked_outputs,
    request_of,
    write_images,
)
from ddpm_deploy.cli.bodies.cluster import Cluster, run_on_ray
from ddpm_deploy.cli.bodies.models import open_sampler
from ddpm_deploy.cli.bodies.shards import Split, run_shards
from ddpm_deploy.cli.common import logger
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import SettingError
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.interpolate import COUNT as STRIP_COUNT
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import E, T
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Encoder


class Options(ChainOptions, RequestOptions):
    """The options of the place, of what is sampled, and of what is written."""


def run(
    model: Path,
    *,
    count: int | None,
    seed: int | None,
    first_index: int,
    batch: int | None,
    share_until: int | None,
    between: tuple[Path, Path] | None,
    depth: int | None,
    encoder: Encoder | None,
    snapshot: Path | None,
    shards: bool,
    shard_size: int | None,
    shard: tuple[int, int] | None,
    ray: str | None,
    workers: int | None,
    **options: Unpack[Options],
) -> None:
    """Sample images and write them."""
    of_shards = {"--shard-size": shard_size, "--shard": shard, "--ray": ray}
    _require_beside("--shards", shards or None, of_shards)
    _require_beside("--ray", ray, {"--workers": workers})
    _require_beside("--between", between, {"--depth": depth, "--encoder": encoder})
    if shards and snapshot:
        raise click.UsageError("--snapshot is not for --shards, which goes on with what is there: omit it")
    opened = open_model(model)
    count = count or (STRIP_COUNT if between else 16)
    asked = request_of(
        options, count=count, seed=seed, first_index=first_index, share_until=share_until, depth=depth
    )
    if between:
        _require_of_strip(shards=shards, snapshot=snapshot, request=asked)
        require("PIL.Image", "cpu")
        from ddpm_deploy.cli.bodies.between import run_between

        run_between(opened, asked, between, encoder or "noise", batch, options)
        return
    request = asked.checked(opened.spec)
    _tell_what_is_shared(request, opened.spec)
    split = Split(shard_size, shard or (1, 1), seed is not None)
    if ray is not None:
        run_on_ray(opened, request, split, Cluster(ray, workers), batch, options)
        return
    if shards:
        run_shards(opened, request, split, batch, options)
        return
    _run_here(opened, request, snapshot, batch, options)


def _run_here(
    opened: ModelFile, request: Request, snapshot: Path | None, batch: int | None, options: ChainOptions
) -> None:
    """Sample images in this process, and write them where the options say."""
    outputs = checked_outputs(opened, request, options, snapshot)
    with open_sampler(opened, request, batch, options) as sampler:
        most = sampler.max_batch(guided=bool(request.guidance))
        if snapshot and request.count > most:
            raise SettingError(
                f"a snapshot holds one batch, and {request.count} images take several: choose --batch {request.count}, "
                f"or a --count of at most {most}"
            )
        watch = Watch(sampler, opened, request, outputs)
        write_images(sampler.draw(request, watch), watch)


def _require_beside(name: str, value: object, others: Mapping[str, object]) -> None:
    """Refuse options that say more of another one, where that is not given."""
    for other, given in others.items():
        if value is None and given is not None:
            raise click.UsageError(f"{other} goes with {name}: pass {name} too, or omit {other}")


def _require_of_strip(*, shards: bool, snapshot: Path | None, request: Request) -> None:
    """Refuse options that a strip between two images does not have."""
    for name, given in (
        ("--shards", shards),
        ("--snapshot", snapshot is not None),
        ("--first-index", request.first_index > 0),
    ):
        if given:
            raise click.UsageError(f"{name} is not for --between: omit it")
    if len(request.labels) > 1:
        raise click.UsageError("a strip of --between has one --label, for all of its images")


def _tell_what_is_shared(request: Request, spec: ModelSpec) -> None:
    """Tell where images that share their noise are all the same, or are not one image that goes several ways."""
    if request.share_until is None or request.count == 1:
        return
    rows = request.table_for(spec).rows
    if not rows[rows[:, T] < request.share_until, E].any():
        logger.warning(
            "this chain adds no noise after --share-until %d: all images of a class are the same",
            request.share_until,
        )
    labels = request.label_numbers(spec)
    if labels is not None and len(set(labels.tolist())) > 1:
        logger.info(
            "images of several classes share their noise, and not what it becomes: --label chooses one"
        )
