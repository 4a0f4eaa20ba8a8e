"""GroupNormalization in ONNX Runtime on a CPU, which has no kernel of it, by operators that it has fast ones of.

Left alone, it takes the node apart as the standard writes it down: a dozen passes over memory. The copy of the graph
that it is given instead has a function of the model in the node's place: InstanceNormalization over each group, then
BatchNormalization with mean 0 and variance 1, which is a scale and a shift by channel. That is as exact, and its bits
depend on neither batch nor threads, as each kernel is of one thread. The file itself stays as it is: engines, and other
runtimes, have GroupNormalization whole. The weights stay in the file too, and are read from there.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ddpm_deploy.onnx_file import OnnxFile, protobuf_field, protobuf_fields, protobuf_number

_OPSET: Final = 21  # before it, scale and bias were by group
_STANDARD: Final = b"GroupNormalization"
_NAME, _DOMAIN = b"GroupNorm", b"ddpm_deploy"
_FLOAT, _INT, _TENSOR, _INTS = 1, 2, 4, 7  # of AttributeProto.AttributeType
_FLOAT32, _EXTERNAL = 1, 1  # of TensorProto.DataType, TensorProto.DataLocation
_LARGE: Final = 1 << 12  # bytes of a tensor that stays in the file


def without_group_norm(file: OnnxFile, path: Path) -> bytes | None:
    """An ONNX model with such a function for GroupNormalization; None where the file has none that it is right for.

    path: of the file; its name is where the large tensors of the model are.

    Raises ValueError where the file is broken.
    """
    content = file.mapped()
    found = [(place, payload) for field, place, payload in protobuf_fields(content) if field == 7]
    if file.opset < _OPSET or len(found) != 1:
        return None
    place, graph = found[0]
    parts = [protobuf_field(number, part) for number, part in _graph(graph, content, path.name)]
    return b"".join(
        [
            content[:place],
            protobuf_field(7, b"".join(parts)),
            content[_offset(graph, content) + len(graph) :],
            protobuf_field(8, _opset(_DOMAIN, 1)),
            protobuf_field(25, _function(file.opset)),
        ]
    )


def _graph(graph: memoryview, content: memoryview, name: str) -> Iterator[tuple[int, bytes]]:
    """The fields of a GraphProto: its nodes (1) with ours among them, its initializers (5) without their bytes."""
    for number, _, part in protobuf_fields(graph):
        match number:
            case 1:
                yield number, _renamed(part)
            case 5:
                yield number, _left_in_file(part, content, name)
            case _:
                yield number, bytes(part)


def _renamed(node: memoryview) -> bytes:
    """A NodeProto; where its op_type (4) is GroupNormalization, ours with its domain (7)."""
    parts = [(number, bytes(part)) for number, _, part in protobuf_fields(node)]
    if (4, _STANDARD) not in parts or any(number == 7 and part for number, part in parts):
        return bytes(node)
    kept = [protobuf_field(number, part) for number, part in parts if number not in (4, 7)]
    return b"".join([*kept, protobuf_field(4, _NAME), protobuf_field(7, _DOMAIN)])


def _left_in_file(tensor: memoryview, content: memoryview, name: str) -> bytes:
    """A TensorProto; where its raw_data (9) is large, what says where in the file that is (13, 14)."""
    for number, place, raw in protobuf_fields(tensor):
        if number == 9 and len(raw) >= _LARGE:
            where = {"location": name, "offset": str(_offset(raw, content)), "length": str(len(raw))}
            entries = (
                protobuf_field(1, key.encode()) + protobuf_field(2, value.encode())
                for key, value in where.items()
            )
            return b"".join(
                [
                    tensor[:place],
                    tensor[_offset(raw, tensor) + len(raw) :],
                    *(protobuf_field(13, each) for each in entries),
                    protobuf_number(14, _EXTERNAL),
                ]
            )
    return bytes(tensor)


def _offset(part: memoryview, whole: memoryview) -> int:
    """Where in the memory of `whole` that of `part`, which is in it, begins."""
    first, other = (np.frombuffer(view, np.uint8).ctypes.data for view in (whole, part))
    return other - first


def _function(opset: int) -> bytes:
    """A FunctionProto: of any float type, worked in float32, and any number of axes."""
    one = protobuf_field(5, _ones())
    body = [
        _node("Cast", ["X"], "x", _number("to", _FLOAT32)),
        _node("Cast", ["scale"], "s", _number("to", _FLOAT32)),
        _node("Cast", ["bias"], "b", _number("to", _FLOAT32)),
        _node("Constant", [], "same", _attribute("value_ints", _INTS, protobuf_number(8, 0))),
        _node("Constant", [], "rest", _attribute("value_ints", _INTS, protobuf_number(8, 2**64 - 1))),
        _node("Constant", [], "number", _given("value_int", "num_groups", _INT)),
        _node("Reshape", ["number", "rest"], "groups"),
        _node("Concat", ["same", "groups", "rest"], "flat", _number("axis", 0)),
        _node("ConstantOfShape", ["groups"], "ones", _attribute("value", _TENSOR, one)),
        _node("ConstantOfShape", ["groups"], "zeros"),
        _node("Reshape", ["x", "flat"], "x_flat"),  # (B, groups, the rest)
        _node("InstanceNormalization", ["x_flat", "ones", "zeros"], "n_flat", _given("epsilon", "epsilon", _FLOAT)),
        _node("Shape", ["X"], "shape"),
        _node("Reshape", ["n_flat", "shape"], "n"),  # (B, C, H, W)
        _node("Shape", ["s"], "channels"),
        _node("ConstantOfShape", ["channels"], "mean"),
        _node("ConstantOfShape", ["channels"], "variance", _attribute("value", _TENSOR, one)),
        _node(
            "BatchNormalization",
            ["n", "s", "b", "mean", "variance"],
            "y",
            _attribute("epsilon", _FLOAT, b"\x15" + struct.pack("<f", 0.0)),
        ),
        _node("CastLike", ["y", "X"], "Y"),
    ]  # fmt: skip
    return b"".join(
        [
            protobuf_field(1, _NAME),
            *(protobuf_field(4, name) for name in (b"X", b"scale", b"bias")),
            protobuf_field(5, b"Y"),
            *(protobuf_field(6, name) for name in (b"num_groups", b"epsilon")),
            *(protobuf_field(7, node) for node in body),
            protobuf_field(9, _opset(b"", opset)),
            protobuf_field(10, _DOMAIN),
        ]
    )


def _node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    """A NodeProto."""
    return b"".join(
        [
            *(protobuf_field(1, name.encode()) for name in inputs),
            protobuf_field(2, output.encode()),
            protobuf_field(4, kind.encode()),
            *(protobuf_field(5, attribute) for attribute in attributes),
        ]
    )


def _attribute(name: str, kind: int, value: bytes) -> bytes:
    """An AttributeProto; value: the field that holds it."""
    return protobuf_field(1, name.encode()) + value + protobuf_number(20, kind)


def _number(name: str, value: int) -> bytes:
    return _attribute(name, _INT, protobuf_number(3, value))


def _given(name: str, of_node: str, kind: int) -> bytes:
    """The value that the node has for its attribute `of_node`; the operator's own default where it has none."""
    return _attribute(name, kind, protobuf_field(21, of_node.encode()))


def _ones() -> bytes:
    """A TensorProto: float32 (1,), 1."""
    return protobuf_number(1, 1) + protobuf_number(2, _FLOAT32) + protobuf_field(9, struct.pack("<f", 1.0))


def _opset(domain: bytes, version: int) -> bytes:
    """An OperatorSetIdProto."""
    return protobuf_field(1, domain) + protobuf_number(2, version)
