"""A .ncnn file as bytes, without ncnn: the weights, and behind them a zip that says what they are.

    weights, as ncnn reads them from the start of a file
    zip      model.param  the layers
             spec.json    the ModelSpec
             sha256       of the weights, the .param and the spec

ncnn loads the weights by the file's name and reads no further than they go, and zipfile finds the zip at the end. So
the weights are in memory once, and one file is enough to run.
"""

import hashlib
import io
import itertools
import os
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.files import show
from ddpm_deploy.ncnn_layers import follow, parse
from ddpm_deploy.spec import MAX_SPEC_BYTES, ModelSpec

NCNN_SUFFIX: Final = ".ncnn"

_PARAM, _SPEC, _SEAL = _MEMBERS = ("model.param", "spec.json", "sha256")
_MOST: Final = {_PARAM: 4 << 20, _SPEC: MAX_SPEC_BYTES, _SEAL: 64}
_LARGEST_ZIP: Final = sum(_MOST.values()) + 4096
_PART: Final = 1 << 24  # bytes that are looked at together
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)  # so that the same model makes the same file


class NcnnFile:
    """What a .ncnn file says beside its weights.

    param: the layers. spec: the text of its ModelSpec. weights: bytes of the weights.

    Raises ValueError or OSError where it is no whole .ncnn file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            self._state, size = _state(status), status.st_size
            file.seek(max(0, size - _LARGEST_ZIP))
            end = file.read()
        with zipfile.ZipFile(io.BytesIO(end)) as archive:
            found = archive.infolist()
            if tuple(info.filename for info in found) != _MEMBERS:
                raise ValueError("it holds something other than a .param, a ModelSpec and a digest")
            for info in found:
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MOST[info.filename]:
                    raise ValueError(f"its {info.filename} is not stored as ddpm-export stores one")
            param, spec, self._seal = (archive.read(info) for info in found)
        self.weights = size - len(end) + min(info.header_offset for info in found)
        if self.weights % 4:
            raise ValueError("its weights are no whole float32 numbers")
        self.param, self.spec = param.decode("ascii"), spec

    @property
    def in_place(self) -> bool:
        """Whether the file by its name is still the one that was read: not replaced, and not written to."""
        try:
            return _state(self._path.stat()) == self._state
        except OSError:
            return False

    @cached_property
    def intact(self) -> bool:
        """Whether weights, layers and ModelSpec are what ddpm-export wrote.

        It tells accidents and edits; whoever means harm can seal a file anew.
        """
        return _digest(self._parts(), self.param.encode(), self.spec) == self._seal

    @cached_property
    def non_finite(self) -> str | None:
        """Says that the weights hold NaN or infinity; None where they do not."""
        broken = any(not np.isfinite(np.frombuffer(part, "<f4")).all() for part in self._parts())
        return "its weights" if broken else None

    def require_sound(self, spec: ModelSpec) -> None:
        """Raise ArtefactError where ncnn would read past its memory, or the layers do not fit the ModelSpec.

        ncnn checks none of that itself.
        """
        try:
            followed = follow(parse(self.param), input_shapes(spec), spec.output.name)
            if (made := followed.shapes[spec.output.name]) != spec.output.shape:
                raise ValueError(f"its prediction is {made}, unlike that of its ModelSpec")
            if followed.size != self.weights:
                raise ValueError(
                    f"its layers read {followed.size} bytes of weights, and it has {self.weights}"
                )
            with self._path.open("rb") as file:
                for place in followed.tags():
                    file.seek(place)
                    if file.read(4) != bytes(4):
                        raise ValueError("its weights are said to be other than float32")
        except ValueError as error:
            raise ArtefactError(
                f"{show(self._path)} has layers that cannot be run: {error}; export it again with ddpm-export"
            ) from error

    def _parts(self) -> Iterator[bytes]:
        """The weights, some megabytes at a time."""
        with self._path.open("rb") as file:
            for start in range(0, self.weights, _PART):
                yield file.read(min(_PART, self.weights - start))


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def input_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each input's blob: of an image, without the batch."""
    return {tensor.name: tensor.shape or (1,) for tensor in spec.inputs}


def describe(path: Path, spec: ModelSpec, param: str | None = None) -> None:
    """Write behind the weights in a file what they are; in place of what stands there.

    param: the layers (None: as they are in the file).
    """
    if param is None:
        there = NcnnFile(path)
        param = there.param
        with path.open("r+b") as file:
            file.truncate(there.weights)
    with path.open("rb") as file:
        parts = iter(lambda: file.read(_PART), b"")
        texts = [param.encode(), spec.to_json().encode()]
        texts.append(_digest(parts, *texts))
    end = io.BytesIO()
    with zipfile.ZipFile(end, "w") as archive:
        for name, text in zip(_MEMBERS, texts, strict=True):
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), text)
    with path.open("ab") as file:
        file.write(end.getvalue())


def _digest(weights: Iterator[bytes], *texts: bytes) -> bytes:
    made = hashlib.sha256()
    for part in itertools.chain(weights, texts):
        made.update(part)
    return made.hexdigest().encode()
