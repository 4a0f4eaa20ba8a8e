"""The ModelSpec in a model's file, read without torch, ONNX, a GPU, or the weights.

A checkpoint is a zip archive whose pickle is only scanned for the text, never run; an ONNX file is
walked field by field past its graph; an engine is searched for its network's name.
"""

import hashlib
import json
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from ddpm_deploy.errors import ArtefactError, SpecError
from ddpm_deploy.files import require_file, show
from ddpm_deploy.plan import PLAN_SUFFIX, spec_in_plan
from ddpm_deploy.spec import ISLANDS_KEY, SEAL_KEY, SPEC_KEY, ModelSpec

CHECKPOINT_SUFFIXES: Final = (".pt", ".pth")
ONNX_SUFFIX: Final = ".onnx"

# Far above what our files hold; a file that asks for more is lying.
_MAX_PICKLE_BYTES: Final = 4 << 20
_MAX_PROPERTY_BYTES: Final = 1 << 20
_FLOATS: Final = {1: "<f4", 10: "<f2", 11: "<f8"}  # of TensorProto.DataType, as NumPy has them
_MAX_FIELDS: Final = 100_000


def read_spec(path: Path) -> ModelSpec:
    """Read the ModelSpec of a .pt, .onnx or .plan file.

    Raises ArtefactError where the file is missing, broken or of another kind, and SpecError where it
    carries no ModelSpec or one that is not valid.
    """
    require_file(path)
    find = _finder(path)
    try:
        text = find(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ArtefactError(
            f"{show(path)} is not a whole {path.suffix} file ({error}): it may be truncated or of another kind"
        ) from error
    if text is None:
        raise SpecError(
            f"{show(path)} carries no ModelSpec: it was not made by ddpm-deploy; "
            "train with ddpm-train and export with ddpm-export"
        )
    return ModelSpec.from_json(text, show(path))


def seal(path: Path) -> bytes:
    """What to append to an ONNX file so that `is_intact` can tell: one more entry of its metadata, its digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = protobuf_field(1, SEAL_KEY.encode()) + protobuf_field(2, digest.encode())
    return protobuf_field(14, entry)


def require_intact(path: Path) -> None:
    """Raise ArtefactError where an ONNX file is damaged or was edited: its images would be wrong, and nobody told."""
    require_file(path)
    if not is_intact(path):
        raise ArtefactError(
            f"{show(path)} is not what ddpm-export wrote: damaged, or edited since. Export it again; or, if it was "
            f"edited on purpose, see what ddpm-verify says of it, and drop {SEAL_KEY} from its metadata"
        )


def is_intact(path: Path) -> bool:
    """Whether an ONNX file is, to the bit, what ddpm-export wrote; True where it carries no seal, as a checkpoint.

    It tells accidents and edits; whoever means harm can seal a file anew.

    Raises ArtefactError where it is no whole ONNX file.
    """
    if path.suffix.lower() != ONNX_SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for start, key, value in _metadata(mapped):
            if key == SEAL_KEY.encode():
                if len(value) != 64:
                    return False
                end = start + len(protobuf_field(14, protobuf_field(1, key) + protobuf_field(2, value)))
                return end == len(mapped) and hashlib.sha256(mapped[:start]).hexdigest().encode() == value
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{show(path)} is not a whole .onnx file ({error})") from error
    return True


def non_finite_tensor(path: Path) -> str | None:
    """The name of a tensor in an ONNX file that holds NaN or infinity; None where there is none, or no ONNX file.

    ModelProto.graph is field 7, its initializers field 5; of each, data_type is 2, name 8 and raw_data 9.
    """
    if path.suffix.lower() != ONNX_SUFFIX:
        return None
    try:
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        graphs = (payload for field, _, payload in _fields(mapped) if field == 7)
        tensors = (payload for graph in graphs for field, _, payload in _fields(graph) if field == 5)
        for tensor in tensors:
            parts = {field: payload for field, _, payload in _fields(tensor)}
            dtype = _FLOATS.get(_varint(parts[2], 0)[0]) if 2 in parts else None
            if dtype and 9 in parts and not np.isfinite(np.frombuffer(parts[9], dtype)).all():
                return bytes(parts.get(8, b"?")).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{show(path)} is not a whole .onnx file ({error})") from error
    return None


def _finder(path: Path) -> Callable[[Path], str | bytes | None]:
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        return _spec_in_checkpoint
    if suffix == ONNX_SUFFIX:
        return _spec_in_onnx
    if suffix == PLAN_SUFFIX:
        return spec_in_plan
    raise ArtefactError(f"{show(path)} is not a model file by its name: a .pt, .onnx or .plan file is needed")


def _spec_in_checkpoint(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        pickles = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no PyTorch pickle")
        info = pickles[0]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is not stored as PyTorch stores one")
        data = archive.read(info)
    strings = (arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str))
    for string in strings:
        if string == SPEC_KEY:
            return next(strings, None)
    return None


def read_meant_float32(path: Path) -> list[str] | None:
    """The nodes of an .onnx file in reduced precision that were meant to stay in float32; None where it does not say.

    Raises ArtefactError where it is no whole ONNX file, or what it says is no list of names.
    """
    try:
        text = _property(path, ISLANDS_KEY)
        names = None if text is None else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{show(path)} is not a whole .onnx file ({error})") from error
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ArtefactError(
            f"{show(path)}: its {ISLANDS_KEY} is no list of names: export it again with ddpm-export"
        )
    return names


def _spec_in_onnx(path: Path) -> bytes | None:
    return _property(path, SPEC_KEY)


def _property(path: Path, wanted: str) -> bytes | None:
    """An entry of an .onnx file's metadata."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # To the end, so that a file that was cut is told as such.
    found = {key: value for _, key, value in _metadata(memoryview(mapped))}
    return found.get(wanted.encode())


def _metadata(model: memoryview) -> Iterator[tuple[int, bytes, bytes]]:
    """Where each entry of ModelProto.metadata_props (field 14) starts, its key (1) and its value (2)."""
    for field, start, payload in _fields(model):
        if field == 14:
            if len(payload) > _MAX_PROPERTY_BYTES:  # a stranger's: neither of ours is as long
                continue
            entry = {number: bytes(value) for number, _, value in _fields(payload)}
            yield start, entry.get(1, b""), entry.get(2, b"")


def protobuf_field(number: int, payload: bytes) -> bytes:
    """A protobuf field of bytes, of fewer than 2¹⁴."""
    size = len(payload)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + payload


def _fields(buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Walk a protobuf message: number, place and payload of each of its fields, none of them parsed."""
    position = 0
    for _ in range(_MAX_FIELDS):
        if position == len(buffer):
            return
        place = position
        tag, position = _varint(buffer, position)
        start = position
        match tag & 7:
            case 0:
                _, position = _varint(buffer, position)
            case 1:
                position += 8
            case 2:
                length, start = _varint(buffer, position)
                position = start + length
            case 5:
                position += 4
            case kind:
                raise ValueError(f"field type {kind} at byte {start} does not exist")
        if position > len(buffer):
            raise ValueError(f"a field at byte {start} runs past the end")
        yield tag >> 3, place, buffer[start:position]
    raise ValueError("it has too many fields")


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    """The variable-length number at `position`, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(buffer):
            break
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number at byte {position} is malformed")
