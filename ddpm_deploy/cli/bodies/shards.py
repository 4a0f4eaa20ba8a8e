"""ddpm-run --shards: many images, in shards that any number of processes make."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from ddpm_deploy.bulk.manifest import Manifest, default_shard_size, require_shard_folder
from ddpm_deploy.bulk.shards import state, write_shard
from ddpm_deploy.bulk.versions import differences, versions_of
from ddpm_deploy.cli.bodies.chain import ChainOptions, chosen_form, forecast
from ddpm_deploy.cli.bodies.models import open_sampler
from ddpm_deploy.cli.bodies.progress import Advance, duration, peak_memory, progress, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import OutputError, plural
from ddpm_deploy.files import quoted, show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import EachStep, Sampler
from ddpm_deploy.version import __version__


@dataclass(frozen=True)
class Split:
    """How a run is split: images of a shard (None: not typed), the part that is to be made, as (3, 16), and whether
    the seed was typed, or may be that of the run that is there."""

    size: int | None
    part: tuple[int, int]
    own_seed: bool


@dataclass(frozen=True)
class Made:
    """What a process did: the shards that were its part, those of them that it made, and in what time.

    more: what there is to say of it beside, to programs.
    """

    numbers: Sequence[int]
    new: Sequence[int]
    seconds: float
    more: Mapping[str, Any] = field(default_factory=dict)


def run_shards(
    model: ModelFile, request: Request, split: Split, batch: int | None, options: ChainOptions
) -> None:
    """Make the shards of a run, or of a part of it, that are not there."""
    folder, planned = options["output"], planned_run(model, request, split, options)
    with open_sampler(model, request, batch, options) as sampler:
        # The raw weights of a checkpoint are another model than its file says.
        mine = replace(planned, spec=sampler.spec, versions=versions_of(sampler.network))
        manifest = mine.joined(folder, own_seed=split.own_seed)
        tell_of_versions(manifest.versions, mine.versions)
        made = _make(sampler, folder, manifest, manifest.numbers(split.part))
    tell_of_run(folder, manifest, split.part, made, options["as_json"])


def planned_run(model: ModelFile, request: Request, split: Split, options: ChainOptions) -> Manifest:
    """The run as it is asked for, before anything is loaded. Refuses what cannot be."""
    if options["progress"] or options["force"]:
        raise click.UsageError("--progress and --force are not for --shards: omit them")
    require_shard_folder(options["output"])
    size = min(split.size or default_shard_size(model.spec), request.count)
    planned = Manifest(spec=model.spec, request=request, shard_size=size, form=chosen_form(options))
    planned.numbers(split.part)  # or is refused
    return planned


def tell_of_versions(begun: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Tell what may change the last bit of an image."""
    if other := differences(begun, here):
        logger.warning(
            "this run was begun with %s: pixels may differ by a level between the shards of the two", other
        )


def _make(sampler: Sampler, folder: Path, manifest: Manifest, numbers: Sequence[int]) -> Made:
    """Make those of the shards that are not there."""
    to_do = missing(folder, manifest, numbers)
    most = sampler.max_batch(guided=bool(manifest.request.guidance))
    steps = len(manifest.request.table_for(manifest.spec))
    work = {number: steps * -(-manifest.part(number).count // most) for number in to_do}
    _announce(sampler, manifest, numbers, to_do)
    start = time.perf_counter()
    new: list[int] = []
    try:
        with progress("sampling", sum(work.values())) as advance:
            pace = _Pace(advance)
            for number in to_do:
                # Another process may have made it since.
                if state(folder, manifest, number).condition == "whole":
                    advance(work[number], None)
                    continue
                part = manifest.part(number)
                pace.begin(part.count / work[number])
                write_shard(folder, manifest, number, sampler.draw(part, EachStep(pace.passed)))
                new.append(number)
    except KeyboardInterrupt:
        tell_of_interrupt(len(numbers), len(numbers) - len(to_do) + len(new))
        raise
    return Made(numbers, new, time.perf_counter() - start)


def missing(folder: Path, manifest: Manifest, numbers: Sequence[int]) -> list[int]:
    """Those of some shards that are to be made. Refuses one of another run."""
    with stage("checking", len(numbers)) as checked:
        return [number for number in numbers if not _is_there(folder, manifest, number, checked)]


def tell_of_interrupt(shards: int, there: int) -> None:
    """Say what a run leaves behind that ends early."""
    logger.info("%d of %s are there: the same command goes on", there, plural(shards, "shard"))


def _is_there(folder: Path, manifest: Manifest, number: int, checked: Any) -> bool:
    """Whether a shard is whole; tells of one that is to be made again. Refuses one of another run."""
    found, name = state(folder, manifest, number), manifest.shard_name(number)
    if found.condition == "foreign":
        raise OutputError(
            f"{show(folder / name)} {found.says}: choose another folder, or move that file away"
        )
    if found.condition == "altered":
        logger.warning("%s %s: it is made again", show(folder / name), found.says)
    checked(1)
    return found.condition == "whole"


def _announce(sampler: Sampler, manifest: Manifest, numbers: Sequence[int], to_do: Sequence[int]) -> None:
    """Say first what the work will cost."""
    if not to_do:
        logger.info("%s", described(manifest, numbers, to_do))
        return
    first = manifest.part(to_do[0])
    steps = len(manifest.request.table_for(manifest.spec))
    seconds = forecast(sampler, first, steps) * images_of(manifest, to_do) / first.count
    logger.info(f"{described(manifest, numbers, to_do)} · about {duration(seconds)}{peak_memory()}")
    if not manifest.spec.same_bits:
        logger.info(
            "this model's images may differ in the last bit with another --batch: give every process the same"
        )


def described(manifest: Manifest, numbers: Sequence[int], to_do: Sequence[int]) -> str:
    """What is to be made, for people."""
    shards, there = plural(len(numbers), "shard"), len(numbers) - len(to_do)
    if not to_do:
        return f"{shards}, all of them there"
    images, steps = images_of(manifest, to_do), len(manifest.request.table_for(manifest.spec))
    found = f", {there} of them there" if there else ""
    return f"{plural(images, 'image')} in {shards}{found} · {plural(steps, 'step')}"


def pace(images: float, seconds: float) -> str:
    """How fast images come, for people."""
    rate = images / max(seconds, 1e-6)
    return f"{rate:.1f} images/s" if rate > 1 else f"{rate * 60:.1f} images/min"


class _Pace:
    """Moves the bar by steps, and says how many images a second are made."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._start = advance, time.monotonic()
        self._images, self._a_step = 0.0, 0.0

    def begin(self, images_a_step: float) -> None:
        """Go on to a shard, of which each step makes so much."""
        self._a_step = images_a_step

    def passed(self) -> None:
        """A step was taken."""
        self._images += self._a_step
        self._advance(1, pace(self._images, time.monotonic() - self._start))


def images_of(manifest: Manifest, numbers: Iterable[int]) -> int:
    """How many images some shards hold."""
    return sum(manifest.part(number).count for number in numbers)


def tell_of_run(folder: Path, manifest: Manifest, part: tuple[int, int], made: Made, as_json: bool) -> None:
    """Say what was made, and how to go on."""
    request, new = manifest.request, images_of(manifest, made.new)
    if as_json:
        content = {
            "ddpm_deploy": __version__,
            "output": os.fspath(folder),
            "model": manifest.spec.provenance.digest,
            **request.to_builtins(),
            "shard_size": manifest.shard_size,
            "shards": manifest.count,
            "part": part,
            "shards_made": len(made.new),
            "shards_found": len(made.numbers) - len(made.new),
            "seconds": made.seconds,
            "images_per_second": new / max(made.seconds, 1e-6),
            **made.more,
        }
        click.echo(json.dumps(content, indent=2))
        return
    of = f"part {part[0]} of {part[1]}, " if part != (1, 1) else ""
    found = len(made.numbers) - len(made.new)
    there = f" ({found} were there)" if found else ""
    click.echo(
        f"{show(folder)}: {of}{plural(images_of(manifest, made.numbers), 'image')} in "
        f"{plural(len(made.numbers), 'shard')}{there}, seed {request.seed}, in {duration(made.seconds)}"
    )
    others = sum(not (folder / manifest.shard_name(number)).exists() for number in manifest.numbers())
    if others:
        logger.info(
            "%s of other parts %s yet to come", plural(others, "shard"), "is" if others == 1 else "are"
        )
    else:
        logger.info("join them with: ddpm-deploy merge %s", quoted(folder))
