"""ddpm-run --shards --ray: the shards of a run, made by the workers of a Ray cluster."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ddpm_deploy.bulk.manifest import NAME, Manifest
from ddpm_deploy.bulk.ray import Crew, Plan, connected, nodes_of, planned
from ddpm_deploy.bulk.versions import differences
from ddpm_deploy.bulk.worker import Folder, Job, Opened
from ddpm_deploy.cli.bodies.chain import ChainOptions
from ddpm_deploy.cli.bodies.models import Place, require_runnable, rows_for
from ddpm_deploy.cli.bodies.progress import progress
from ddpm_deploy.cli.bodies.shards import (
    Made,
    Split,
    described,
    images_of,
    missing,
    pace,
    planned_run,
    tell_of_interrupt,
    tell_of_run,
    tell_of_versions,
)
from ddpm_deploy.cli.common import logger
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import SettingError, plural
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.version import __version__

_ADDRESS: Final = "RAY_ADDRESS"  # which Ray sets for the jobs of a cluster
_ON_CPUS: Final = ("openvino", "ncnn")  # backends


@dataclass(frozen=True)
class Cluster:
    """Where a run is made: the address of a cluster ("": that in RAY_ADDRESS, or one of our own), and by how many
    workers (None: not typed)."""

    address: str
    workers: int | None

    @property
    def known(self) -> str | None:
        """The address of a cluster that is there; None for one of our own."""
        address = self.address or os.environ.get(_ADDRESS, "")
        return None if address in ("", "local") else address


def run_on_ray(
    model: ModelFile,
    request: Request,
    split: Split,
    cluster: Cluster,
    batch: int | None,
    options: ChainOptions,
) -> None:
    """Make the shards of a run, or of a part of it, that are not there."""
    require_runnable(model, options)
    gpu = _wants_gpu(model, options)
    folder, asked = options["output"], _planned(model, request, split, options)
    numbers = asked.numbers(split.part)
    # What is there is looked at first: a run that is done, or another's folder, needs no cluster.
    there = asked.joined(folder, own_seed=split.own_seed) if (folder / NAME).exists() else None
    to_do = missing(folder, there, numbers) if there else list(numbers)
    if there and not to_do:
        logger.info("%s", described(there, numbers, to_do))
        tell_of_run(folder, there, split.part, Made(numbers, [], 0.0), options["as_json"])
        return
    cores = max(cpu_threads(), (cluster.workers or 1) * (options["threads"] or 1))
    with connected(cluster.known, cores) as ray:
        plan = planned(nodes_of(ray), len(to_do), cluster.workers, options["threads"], gpu)
        crew = Crew(ray, plan, model, _job(model, request, plan, batch, options))
        try:
            opened = crew.first()
            manifest = there or replace(asked, versions=opened.versions).joined(
                folder, own_seed=split.own_seed
            )
            seconds = _make(crew, folder, manifest, numbers, to_do, plan)
        finally:
            crew.close()
    more = {"workers": plan.workers, "threads": plan.threads, "gpus": plan.gpu}
    tell_of_run(folder, manifest, split.part, Made(numbers, to_do, seconds, more), options["as_json"])


def _planned(model: ModelFile, request: Request, split: Split, options: ChainOptions) -> Manifest:
    """The run as it is asked for; the raw weights of a checkpoint are another model than its file says."""
    asked = planned_run(model, request, split, options)
    if options["weights"] != "raw":
        return asked
    require("torch", "train")
    from ddpm_deploy.train.checkpoint import load_network

    return replace(asked, spec=load_network(model, "raw")[1])


def _wants_gpu(model: ModelFile, place: Place) -> bool | None:
    """Whether each worker is to have a GPU; None where that is for the cluster to say."""
    device, backend = place["device"], place["backend"]
    if device is not None:
        if device.startswith("cuda:"):
            raise SettingError(
                f"--device {device}: Ray gives each worker a GPU of its own, so say --device cuda"
            )
        return device == "cuda"
    if model.kind == "plan" or backend == "tensorrt":
        return True
    return False if model.kind == "ncnn" or backend in _ON_CPUS else None


def _job(model: ModelFile, request: Request, plan: Plan, batch: int | None, place: Place) -> Job:
    return Job(
        version=__version__,
        model=os.fspath(model.path.absolute()),
        digest=model.digest,
        rows=rows_for(request, batch),
        device="cuda" if plan.gpu else place["device"],
        backend=place["backend"],
        precision=place["precision"],
        weights=place["weights"] or "ema",
        threads=plan.threads,
    )


def _make(
    crew: Crew, folder: Path, manifest: Manifest, numbers: Sequence[int], to_do: Sequence[int], plan: Plan
) -> float:
    """Have the shards made; the seconds that it took."""
    each = "a GPU" if plan.gpu else plural(plan.threads, "thread")
    logger.info(f"{described(manifest, numbers, to_do)} · {plural(plan.workers, 'worker')} of {each}")
    met: set[str] = set()

    def meet(opened: Opened) -> None:
        if (other := differences(manifest.versions, opened.versions)) not in met:
            met.add(other)
            tell_of_versions(manifest.versions, opened.versions)

    start = time.perf_counter()
    try:
        with Folder.marked(folder) as marked, progress("sampling", images_of(manifest, to_do)) as advance:
            shown = 0

            def tell(images: float) -> None:
                nonlocal shown
                if (more := int(images) - shown) > 0:
                    shown += more
                    advance(more, pace(images, time.perf_counter() - start))

            crew.make(marked, manifest, to_do, meet, tell)
    except KeyboardInterrupt:
        tell_of_interrupt(len(numbers), len(numbers) - len(to_do) + crew.made)
        raise
    return time.perf_counter() - start
