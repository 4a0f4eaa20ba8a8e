"""Array files as data: an .npz is looked through before anything that it claims is allocated."""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.errors import ArtefactError, first_line
from ddpm_deploy.files import require_file, show


def require_honest(path: Path, largest: int) -> None:
    """Raise ValueError unless the arrays of an .npz take at most `largest` bytes, and none claims more than it has.

    NumPy allocates what an array's header claims before it reads what there is. What the archive's own
    directory claims is trusted, as nothing is allocated by that.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > largest:
            raise ValueError(f"it unpacks to over {largest / 2**30:.1f} GiB")
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                if math.prod(shape) * dtype.itemsize > info.file_size:
                    raise ValueError(f"{info.filename} claims the shape {shape}, and is too short for it")


def load_arrays(path: Path, largest: int, what: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz of ours, by name. Raises ArtefactError where it is missing, broken or not honest."""
    require_file(path)
    try:
        require_honest(path, largest)
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
        raise ArtefactError(f"{show(path)} is not a whole {what}: {first_line(error)}") from error


@contextmanager
def array_in(
    archive: zipfile.ZipFile, name: str, dtype: DTypeLike, shape: tuple[int, ...]
) -> Iterator[Callable[[bytes], object]]:
    """Write an array into an .npz, of any size, as its numbers come: gives the function that takes their bytes.

    The same numbers make the same file, however they are split: an archive that is written so names no time.
    """
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file.write
