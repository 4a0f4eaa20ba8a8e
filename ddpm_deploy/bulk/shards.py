"""One shard: some samples of a run in a file of their own, whole or not there, that says which they are.

A shard is an .npz as ddpm-run writes it, and in the comment of its archive the run, the samples, and its seal: the
SHA-256 of all bytes before it. So a shard and its digest come into being together, in one rename, and two processes
that make the same one have nothing else to write.
"""

import hashlib
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Literal

import numpy as np

from ddpm_deploy.bulk.manifest import ArrayType, Manifest
from ddpm_deploy.errors import BackendError, first_line
from ddpm_deploy.files import atomic
from ddpm_deploy.runtime.images import LABELS, Destination
from ddpm_deploy.runtime.protocols import Array, Labels
from ddpm_deploy.runtime.request import Request

_SEAL: Final = 64  # hexadecimal digits, the last bytes of a file
_COMMENT: Final = re.compile(rb"ddpm-deploy ([0-9a-f]{64}) (\d{1,20}) \+(\d{1,20}) ([0-9a-f]{64})\Z")
_LONGEST_COMMENT: Final = 256
_BESIDE: Final = 4096  # bytes of a shard beside its numbers: at most
_PIECE: Final = 1 << 20  # bytes read at once

Condition = Literal["whole", "missing", "altered", "foreign"]


@dataclass(frozen=True)
class State:
    """How a shard was found: whole, not there, altered since it was written, or whole and of another run.

    says: why it is not whole. digest: its seal, where it is whole.
    """

    condition: Condition
    says: str = ""
    digest: str = ""


class ForeignError(ValueError):
    """A whole shard, and of another run."""


def write_shard(folder: Path, manifest: Manifest, number: int, samples: Iterable[Array]) -> Path:
    """Write the shard of a number, from its samples (k, C, H, W) in order; they are kept in memory until all are there.

    So its file is there for a moment only before it is whole, and a killed process leaves nothing behind but in that.
    Raises OutputError.
    """
    part, path = manifest.part(number), folder / manifest.shard_name(number)
    batches = list(samples)
    with atomic(path) as temporary:
        with Destination(temporary, part, manifest.spec, manifest.form).open() as write:
            for batch in batches:
                write(batch)
        _seal(temporary, f"ddpm-deploy {manifest.run} {part.first_index} +{part.count} ".encode())
    return path


def put_shard(folder: Path, manifest: Manifest, number: int, data: bytes) -> None:
    """Write the shard of a number that was made elsewhere, once it was seen to be whole.

    Raises BackendError where it is not, OutputError where it cannot be written.
    """
    path = folder / manifest.shard_name(number)
    with atomic(path) as temporary:
        temporary.write_bytes(data)
        try:
            with _opened(temporary, manifest, number):
                pass
        except ValueError as error:
            raise BackendError(f"{path.name} came from its worker and {first_line(error)}") from error


def _seal(path: Path, text: bytes) -> None:
    """Write the comment of an archive: `text`, and the SHA-256 of all that stands before it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = text + bytes(_SEAL)
    with path.open("r+b") as file:
        digest = _sha256(file, path.stat().st_size - _SEAL)
        file.seek(-_SEAL, 2)
        file.write(digest.encode())


def state(folder: Path, manifest: Manifest, number: int) -> State:
    """Look a shard through, all its bytes. It needs a megabyte of memory, whatever its size."""
    try:
        with opened_shard(folder, manifest, number) as shard:
            return State("whole", digest=shard.digest)
    except FileNotFoundError:
        return State("missing", "is not there")
    except ForeignError as error:
        return State("foreign", str(error))
    except (ValueError, OSError) as error:
        return State("altered", first_line(error))


@dataclass(frozen=True)
class OpenShard:
    """A whole shard, open for reading. digest: its seal."""

    digest: str
    _archive: zipfile.ZipFile
    _member: str

    def pieces(self) -> Iterator[bytes]:
        """The bytes of its images, in order."""
        with self._archive.open(self._member) as file:
            _header(file)
            while piece := file.read(_PIECE):
                yield piece


@contextmanager
def opened_shard(folder: Path, manifest: Manifest, number: int) -> Iterator[OpenShard]:
    """Open the shard of a number once every byte was looked at.

    Raises FileNotFoundError where there is none, and ValueError or OSError, which say why, where it is not whole.
    """
    with _opened(folder / manifest.shard_name(number), manifest, number) as shard:
        yield shard


@contextmanager
def _opened(path: Path, manifest: Manifest, number: int) -> Iterator[OpenShard]:
    """Open the shard of a number under any name, as `opened_shard` does."""
    part = manifest.part(number)
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        most = sum(map(_bytes, manifest.arrays(part.count).values())) + _BESIDE
        digest = _unsealed(file, (manifest.run, part.first_index, part.count), most)
        with _checked_archive(file, manifest, part) as archive:
            yield OpenShard(digest, archive, f"{manifest.array[0]}.npy")


def _checked_archive(file: BinaryIO, manifest: Manifest, part: Request) -> zipfile.ZipFile:
    """The archive that a file is, once it was seen to hold the arrays of these samples. Raises ValueError."""
    try:
        archive = zipfile.ZipFile(file)
        _require_arrays(archive, manifest.arrays(part.count))
        _require_labels(archive, part.label_numbers(manifest.spec))
    except Exception as error:  # the parsers of a hostile file raise nearly anything
        raise ValueError(f"does not hold what it says: {first_line(error)}") from error
    return archive


def _bytes(array: ArrayType) -> int:
    dtype, shape = array
    return math.prod(shape) * dtype.itemsize


def _unsealed(file: BinaryIO, wanted: tuple[str, int, int], most: int) -> str:
    """The digest of a shard whose seal is right, and which is of this run and these samples. Raises ValueError."""
    size = file.seek(0, 2)
    if size > most:
        raise ValueError(f"has {size} bytes, and at most {most} are right")
    file.seek(max(0, size - _LONGEST_COMMENT))
    comment = _COMMENT.search(file.read())
    if comment is None:
        raise ValueError("is cut short, or no shard")
    run, first, count, seal = (text.decode() for text in comment.groups())
    if seal != _sha256(file, size - _SEAL):
        raise ValueError("was altered: its SHA-256 is not what it was sealed with")
    if run != wanted[0]:
        raise ForeignError("is of another run")
    if (int(first), int(count)) != wanted[1:]:
        raise ForeignError(f"holds other samples: {count} from {first} on")
    return seal


def _sha256(file: IO[bytes], size: int) -> str:
    """The digest of the first bytes of a file."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(min(_PIECE, size)):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def _require_arrays(archive: zipfile.ZipFile, arrays: Mapping[str, ArrayType]) -> None:
    """Raise an error unless an archive holds these arrays and no other, uncompressed and as long as they say."""
    names = [info.filename for info in archive.infolist()]
    if names != [f"{name}.npy" for name in arrays]:
        raise ValueError(f"its arrays are {', '.join(names) or 'none'}")
    for info, array in zip(archive.infolist(), arrays.values(), strict=True):
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(file)
            rest = info.file_size - file.tell()
        if (dtype, shape) != array or fortran_order:
            raise ValueError(f"{info.filename} is {dtype} {shape}, not {array[0]} {array[1]}")
        if rest != _bytes(array):
            raise ValueError(f"{info.filename} holds {rest} bytes for the shape {shape}")


def _require_labels(archive: zipfile.ZipFile, labels: Labels | None) -> None:
    if labels is None:
        return
    with archive.open(f"{LABELS}.npy") as file:
        _header(file)
        if file.read() != labels.tobytes():
            raise ValueError("its labels are not those of the run")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, order and type that an array of ours begins with."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its arrays are not of NumPy's format 1.0")
    return np.lib.format.read_array_header_1_0(file)
