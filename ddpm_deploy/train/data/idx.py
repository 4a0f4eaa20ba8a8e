"""idx files, the form of MNIST and its kin: big-endian arrays behind a header of a few bytes, often in gzip."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.machine import memory_limit
from ddpm_deploy.train.data.arrays import array_source
from ddpm_deploy.train.data.source import Source, checked_labels

# Types of the numbers, by the third byte (Y. LeCun, "The MNIST database", file formats).
_TYPES: Final = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP: Final = b"\x1f\x8b"


def is_idx(path: Path) -> bool:
    """Whether a file begins as an idx file does, in gzip or not."""
    try:
        with _opened(path) as file:
            head = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 4


def idx_file(path: Path, labels: bool) -> Source:
    """The images of an idx file; labels: of the file beside it, whose name has them in place of images."""
    source = array_source(_read(path), show(path))
    if not labels:
        return source
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    packed = name if name.endswith(".gz") else f"{name}.gz"
    beside = (
        path.with_name(label) for label in (name, packed, packed.removesuffix(".gz")) if label != path.name
    )
    found = next((label for label in beside if label.exists()), None)
    if found is None:
        raise DataError(
            f"{show(path)} has no labels: they are in a file beside it, as train-labels-idx1-ubyte is beside "
            "train-images-idx3-ubyte"
        )
    require_file(found, DataError)
    return replace(source, labels=checked_labels(_read(found), source.count, show(found)))


def _read(path: Path) -> NDArray[Any]:
    """The array of an idx file, of which no more is read than its header says."""
    try:
        with _opened(path) as file:
            _, _, kind, dimensions = file.read(4)
            sizes = file.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise ValueError("it ends within its header")
            shape = struct.unpack(f">{dimensions}I", sizes)
            dtype = np.dtype(_TYPES[kind])
            size = math.prod(shape) * dtype.itemsize
            if size > memory_limit():
                raise ValueError(f"its shape {shape} does not fit in memory")
            content = file.read(size + 1)
        if len(content) != size:
            raise ValueError(f"it is not as long as its shape {shape} says")
    except Exception as error:  # gzip and zlib raise several things
        raise DataError(f"{show(path)} is not a whole idx file: {first_line(error)}") from error
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    with gzip.open(path) if packed else path.open("rb") as content:
        yield content  # type: ignore[misc]
