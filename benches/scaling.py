"""How long a run in shards takes on M workers of Ray: a small model, its numbers measured here, and held against runs.

    python -m benches.scaling model MODEL     the numbers, runs on 1, 2 and 4 workers, and the projection
    python -m benches.scaling pair MODEL      one process, two processes and two workers, in turn
    python -m benches.scaling merge           ddpm-deploy merge

Each takes under two and a half minutes on two quiet cores.

The model: N images in shards of k are S = ⌈N/k⌉; a worker makes r images a second, and each of M workers makes one
shard after another:

    T = start + max(⌈S/M⌉ · k/r, S · d, N · b / B)

start: of Ray, its workers and their models. d: the driver's own time for a shard. b: bytes of an image. B: bytes a
second that the driver takes in, where shards come back to it; where workers write them, that term is nothing.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benches.table import HEAD, Row
from ddpm_deploy.bulk.manifest import Manifest
from ddpm_deploy.bulk.merge import merge
from ddpm_deploy.bulk.ray import Crew, Plan, connected
from ddpm_deploy.bulk.shards import put_shard, write_shard
from ddpm_deploy.bulk.worker import Folder, Job
from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import ModelSpec, Provenance
from ddpm_deploy.version import __version__

_STEPS: Final = 50
_PROJECTED: Final = 8, 64, 1000
_LONG: Final = 50_000  # images of the projection


@dataclass(frozen=True)
class Pace:
    """The numbers of the model; rate: images a second of a worker that has a core to itself."""

    start: float
    rate: float
    shard: float
    image: float
    taken: float

    def seconds(self, images: int, size: int, workers: int, cores: int, *, returned: bool = False) -> float:
        """T. cores: that there are; workers beyond them share."""
        shards = math.ceil(images / size)
        rate = self.rate * min(1, cores / workers)
        made = math.ceil(shards / workers) * min(size, images) / rate
        back = images * self.image / self.taken if returned else 0.0
        return self.start + max(made, shards * self.shard, back)

    def most_workers(self, size: int, *, returned: bool) -> float:
        """How many workers one driver keeps busy."""
        shared = size / (self.rate * self.shard)
        return min(shared, self.taken / (self.rate * self.image)) if returned else shared


def _run(model: str, folder: Path, *options: object) -> tuple[float, dict[str, Any]]:
    """A run as a process: the seconds of all of it, and what it says."""
    code = "from ddpm_deploy.cli.run import main; main()"
    common = ("--steps", _STEPS, "--seed", 0, "--shards", "--json", "-q", "-o", folder)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, model, *map(str, (*common, *options))],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, json.loads(done.stdout)


def model_rows(model: str, images: int = 400, size: int = 25) -> Iterator[Row]:
    """The numbers of the model, runs beside what it says of them, and what it says of many workers."""
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), {}
        for workers in (1, 2, 4):
            options = ("--count", images, "--shard-size", size, "--threads", 1, "--ray", "--workers", workers)
            made[workers] = _run(model, folder / str(workers), *options)
        whole, one = made[1]
        shard = folder / "1" / Manifest.load(folder / "1").shard_name(0)
        pace = Pace(
            start=whole - one["seconds"],
            rate=one["images_per_second"],
            image=shard.stat().st_size / size,
            **_driver(open_model(model), folder),
        )
    cores = cpu_threads()
    yield Row("start: Ray, its workers, the model", f"{pace.start:.1f} s")
    yield Row("r: a worker of one thread", f"{pace.rate:.1f} images/s")
    yield Row(
        "d: the driver's processor, for a shard",
        f"{pace.shard * 1e3:.2f} ms",
    )
    yield Row("b: an image", f"{pace.image:.0f} bytes")
    yield Row("B: the driver takes in", f"{pace.taken / 1e6:.0f} MB/s")
    for workers, (seconds, _) in made.items():
        told = pace.seconds(images, size, workers, cores)
        yield Row(
            f"{images} images on {workers} of one thread, {cores} cores",
            f"{seconds:.1f} s; the model says {told:.1f} s ({told / seconds - 1:+.0%})",
        )
    yield from _projected(pace)


def _projected(pace: Pace) -> Iterator[Row]:
    """What the model says of many workers, each with a core of its own, and where the driver ends them."""
    for workers in _PROJECTED:
        times = [pace.seconds(_LONG, 256, workers, workers, returned=returned) for returned in (False, True)]
        yield Row(
            f"projected, not run: {_LONG} images in shards of 256 on {workers}",
            f"{times[0]:.0f} s; with all shards returned {times[1]:.0f} s",
        )
    shared, returned = (pace.most_workers(256, returned=returned) for returned in (False, True))
    yield Row(
        "projected, not run: workers that one driver keeps busy",
        f"{shared:.0f}; with shards returned {returned:.0f}",
    )


def _big(folder: Path, shards: int, images: int = 64) -> Manifest:
    """Shards of some 50 MB each; what is in them does not matter."""
    spec = ModelSpec(
        image_shape=(3, 512, 512),
        embedding=SinusoidalEmbedding(dim=8),
        provenance=Provenance(digest="0" * 64),
    )
    request = Request(count=shards * images, seed=0, steps=1).checked(spec)
    manifest = Manifest(spec=spec, request=request, shard_size=images)
    batch = np.random.default_rng(0).uniform(-1, 1, (8, 3, 512, 512)).astype(np.float32)
    for number in manifest.numbers():
        write_shard(folder, manifest, number, [batch] * (images // 8))
    return manifest


def _driver(model: ModelFile, folder: Path, shards: int = 300) -> dict[str, float]:
    """What a driver can do: the seconds of its processor for a shard, and the bytes a second that it gets out of Ray's
    memory for objects, looks through and writes."""
    with connected(None, 2) as ray:
        request = Request(count=shards, seed=0, steps=1).checked(model.spec)
        manifest = Manifest(spec=model.spec, request=request, shard_size=1)
        job = Job(__version__, str(model.path.absolute()), model.digest, 1, None, None, None, "ema", 1)
        crew = Crew(ray, Plan(2, 1, gpu=False), model, job)
        crew.first()
        (folder / "many").mkdir()
        with Folder.marked(folder / "many") as marked:
            start = time.process_time()
            crew.make(marked, manifest, manifest.numbers(), lambda _: None, lambda _: None)
            seconds = (time.process_time() - start) / shards
        crew.close()
        manifest, times = _big(folder, 1), []
        data = (folder / manifest.shard_name(0)).read_bytes()
        for ref in [ray.put(data)] * 5:
            start = time.perf_counter()
            put_shard(folder, manifest, 0, ray.get(ref))
            times.append(time.perf_counter() - start)
    return {"shard": seconds, "taken": len(data) / statistics.median(times)}


def pair_rows(model: str, images: int = 2000, rounds: int = 3) -> Iterator[Row]:
    """One process, two that share the shards, and two workers of Ray, in turn."""
    threads = cpu_threads()
    one, two, ray = (
        f"one process, {threads} threads",
        "two processes of one thread",
        "two workers of one thread",
    )
    rates: dict[str, list[float]] = {one: [], two: [], ray: []}
    common = ("--count", images, "--shard-size", images // 8)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        for round_ in range(rounds):
            folder = Path(name) / str(round_)
            folder.mkdir()
            alone = _run(model, folder / "1", *common, "--threads", threads)
            parts = [(*common, "--threads", 1, "--shard", f"{part}/2") for part in (1, 2)]
            both = list(pool.map(lambda part, to=folder / "2": _run(model, to, *part), parts))
            workers = _run(model, folder / "3", *common, "--threads", 1, "--ray", "--workers", 2)
            rates[one].append(alone[1]["images_per_second"])
            rates[two].append(images / max(said["seconds"] for _, said in both))
            rates[ray].append(workers[1]["images_per_second"])
    for what, each in rates.items():
        yield Row(what, f"{statistics.median(each):.1f} images/s ({min(each):.1f} … {max(each):.1f})")
    for other in (one, two):
        ratios = [a / b for a, b in zip(rates[ray], rates[other], strict=True)]
        got = statistics.median(ratios)
        yield Row(
            f"{ray} ÷ {other}", f"{got:.2f} ({min(ratios):.2f} … {max(ratios):.2f})", "≥ 0.95", got >= 0.95
        )


def merge_rows(shards: int = 6) -> Iterator[Row]:
    """How fast shards are joined: read, looked through and written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, times = _big(folder, shards), []
        size = sum((folder / manifest.shard_name(number)).stat().st_size for number in manifest.numbers())
        for _ in range(3):
            start = time.perf_counter()
            merge(folder, manifest, folder / "all.npz", lambda _: None)
            times.append(time.perf_counter() - start)
    rates = sorted(size / 1e6 / seconds for seconds in times)
    yield Row(
        f"merge, {size / 1e6:.0f} MB in {shards} shards",
        f"{rates[1]:.0f} MB/s ({rates[0]:.0f} … {rates[2]:.0f})",
        "≥ 200 MB/s",
        rates[1] >= 200,
    )


def main() -> None:
    """One part, as rows of a table."""
    part, *rest = sys.argv[1:]
    parts: dict[str, Callable[..., Iterator[Row]]] = {
        "model": model_rows,
        "pair": pair_rows,
        "merge": merge_rows,
    }
    print(HEAD, end="")
    for row in parts[part](*rest):
        print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
