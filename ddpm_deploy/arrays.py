"""Array files as data: an .npz is looked through before anything that it claims is allocated."""

import math
import zipfile
from pathlib import Path

import numpy as np


def require_honest(path: Path, largest: int) -> None:
    """Raise ValueError unless each array of an .npz is of at most `largest` bytes, and as long as it claims.

    NumPy allocates what a header claims before it reads what there is.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > largest:
                raise ValueError(f"{info.filename} unpacks to {info.file_size / 2**30:.1f} GiB")
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
