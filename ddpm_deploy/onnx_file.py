"""An .onnx file as bytes: its metadata, its seal and its tensors, found field by field without onnx or the weights."""

import hashlib
import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.files import sha256_of, show
from ddpm_deploy.spec import ISLANDS_KEY, SEAL_KEY

_MAX_PROPERTY_BYTES: Final = 1 << 20  # far above what ours take
_MAX_FIELDS: Final = 100_000
_FLOATS: Final = {1: "<f4", 10: "<f2", 11: "<f8"}  # of TensorProto.DataType, as NumPy has them


class OnnxFile:
    """What an ONNX file says beside its graph.

    properties: the entries of its metadata, each by its key.

    Raises ValueError or OSError where it is no whole ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.properties: dict[str, bytes] = {}
        self._seal: int | None = None  # where its entry starts
        # To the end, so that a file that was cut is told as such. Of ModelProto, metadata_props is field 14: a key (1)
        # and a value (2). An entry that is far too long is a stranger's.
        for field, start, payload in protobuf_fields(self.mapped()):
            if field == 14 and len(payload) <= _MAX_PROPERTY_BYTES:
                entry = {number: bytes(value) for number, _, value in protobuf_fields(payload)}
                key = entry.get(1, b"").decode(errors="replace")
                self.properties[key] = entry.get(2, b"")
                if key == SEAL_KEY:
                    self._seal = start

    def mapped(self) -> memoryview:
        """Its bytes, for as long as they are looked at: a mapped file that somebody cuts ends the process."""
        with self._path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @cached_property
    def intact(self) -> bool:
        """Whether it is, to the bit, what ddpm-export wrote; True where it carries no seal.

        It tells accidents and edits; whoever means harm can seal a file anew.
        """
        if self._seal is None:
            return True
        content, says = self.mapped(), self.properties[SEAL_KEY]
        digest = hashlib.sha256(content[: self._seal]).hexdigest().encode()
        return digest == says and content[self._seal :] == entry(SEAL_KEY, says)

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operators that the graph is written in; 0 where it does not say.

        ModelProto.opset_import is field 8: a domain (1), empty for ONNX's own, and a version (2).
        """
        for payload in _payloads(self.mapped(), 8):
            parts = {field: value for field, _, value in protobuf_fields(payload)}
            if not parts.get(1) and 2 in parts:
                return _varint(parts[2], 0)[0]
        return 0

    @cached_property
    def meant_float32(self) -> list[str] | None:
        """The nodes of a graph in reduced precision that were meant to stay in float32; None where it does not say.

        Raises ArtefactError where what it says is no list of names.
        """
        text = self.properties.get(ISLANDS_KEY)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text, type=list[str])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ArtefactError(
                f"{show(self._path)}: its {ISLANDS_KEY} is no list of names: export it again with ddpm-export"
            ) from error

    @cached_property
    def non_finite(self) -> str | None:
        """The name of a tensor that holds NaN or infinity; None where there is none.

        ModelProto.graph is field 7, its initializers field 5; of each, data_type is 2, name 8 and raw_data 9.

        Raises ArtefactError where the graph is broken.
        """
        try:
            tensors = (t for graph in _payloads(self.mapped(), 7) for t in _payloads(graph, 5))
            for tensor in tensors:
                parts = {field: payload for field, _, payload in protobuf_fields(tensor)}
                if 2 in parts and 9 in parts and not _is_finite(parts[2], parts[9]):
                    return bytes(parts.get(8, b"")).decode(errors="replace")
        except ValueError as error:
            raise ArtefactError(f"{show(self._path)} is not a whole .onnx file ({error})") from error
        return None


def seal(path: Path) -> bytes:
    """What to append to an ONNX file so that `OnnxFile.intact` can tell: one more entry of its metadata, its digest."""
    return entry(SEAL_KEY, sha256_of(path).encode())


def entry(key: str, value: bytes) -> bytes:
    """What to append to an ONNX file for one more entry of its metadata."""
    return protobuf_field(14, protobuf_field(1, key.encode()) + protobuf_field(2, value))


def _is_finite(data_type: memoryview, raw: memoryview) -> bool:
    """Whether the numbers of a tensor are; those of a type that has no infinity are."""
    number, _ = _varint(data_type, 0)
    dtype = _FLOATS.get(number)
    return dtype is None or bool(np.isfinite(np.frombuffer(raw, dtype)).all())


def _payloads(message: memoryview, number: int) -> Iterator[memoryview]:
    """Of the fields of one number."""
    return (payload for field, _, payload in protobuf_fields(message) if field == number)


def protobuf_field(number: int, payload: bytes) -> bytes:
    """A protobuf field of bytes."""
    return protobuf_head(number, len(payload)) + payload


def protobuf_head(number: int, size: int) -> bytes:
    """What stands before the bytes of a protobuf field."""
    return _as_varint(number << 3 | 2) + _as_varint(size)


def protobuf_number(number: int, value: int) -> bytes:
    """A protobuf field of a number, 0 .. 2⁶⁴ - 1."""
    return _as_varint(number << 3) + _as_varint(value)


def protobuf_fields(buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
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


def _as_varint(value: int) -> bytes:
    """A number as protobuf writes it, seven bits a byte."""
    parts = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


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
