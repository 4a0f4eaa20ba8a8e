"""Shards, joined into the one file that a run without shards writes."""

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ddpm_deploy.arrays import array_in
from ddpm_deploy.bulk.manifest import Manifest
from ddpm_deploy.bulk.shards import ForeignError, OpenShard, opened_shard
from ddpm_deploy.errors import DataError, first_line, plural
from ddpm_deploy.files import atomic, show
from ddpm_deploy.runtime.images import LABELS


def digest_of(digests: Iterable[str]) -> str:
    """One digest of a run: the SHA-256 of those of its shards, in order, a line each."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def merge(folder: Path, manifest: Manifest, output: Path, advance: Callable[[int], None]) -> str:
    """Join all shards into an .npz, byte for byte what ddpm-run writes into one; give the digest of the run.

    It takes a few megabytes of memory, whatever the sizes. advance: called once a shard.

    Raises DataError where a shard is missing or not whole, OutputError where the file cannot be written.
    """
    require_all(folder, manifest)
    name, dtype, shape = manifest.array
    request, numbers, digests = manifest.request, manifest.numbers(), []
    with atomic(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with array_in(archive, name, dtype, (request.count, *shape)) as put:
            for number in numbers:
                digests.append(_copy(folder, manifest, number, put))
                advance(1)
        if manifest.spec.num_classes:
            with array_in(archive, LABELS, np.int64, (request.count,)) as put:
                for number in numbers:
                    labels = manifest.part(number).label_numbers(manifest.spec)
                    assert labels is not None
                    put(labels.tobytes())
    return digest_of(digests)


def require_all(folder: Path, manifest: Manifest) -> None:
    """Raise DataError where a shard is not there: before the others are copied."""
    missing = [n for n in manifest.numbers() if not (folder / manifest.shard_name(n)).exists()]
    if missing:
        first = manifest.shard_name(missing[0])
        raise DataError(
            f"{show(folder)} lacks {len(missing)} of {plural(manifest.count, 'shard')}, {first} first: run the same "
            "ddpm-run --shards again, which makes what is missing"
        )


def _copy(folder: Path, manifest: Manifest, number: int, put: Callable[[bytes], object]) -> str:
    """Give the images of a shard, once it was looked through, to a function; its digest."""
    with whole_shard(folder, manifest, number) as shard:
        for piece in shard.pieces():
            put(piece)
        return shard.digest


@contextmanager
def whole_shard(folder: Path, manifest: Manifest, number: int) -> Iterator[OpenShard]:
    """Open a shard once it was looked through. Raises DataError that says what helps, where it is not whole."""
    name = show(folder / manifest.shard_name(number))
    try:
        with opened_shard(folder, manifest, number) as shard:
            yield shard
    except ForeignError as error:
        raise DataError(
            f"{name} {first_line(error)}: move that file away, and the same ddpm-run --shards makes the one that "
            "belongs there"
        ) from error
    except (FileNotFoundError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} {first_line(error)}: the same ddpm-run --shards makes it again") from error
