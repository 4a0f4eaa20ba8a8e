"""GroupNormalization in ONNX Runtime on a CPU, which has no kernel of it, by operators that it has fast ones of.

Left alone, it takes the node apart as the standard writes it down: a dozen passes over memory. The copy of the graph
that it is given instead has a function of the model in the node's place: InstanceNormalization over each group, then
BatchNormalization with mean 0 and variance 1, which is a scale and a shift by channel. That is as exact, and its bits
depend on neither batch nor threads, as each kernel is of one thread. The file itself stays as it is: engines, and other
runtimes, have GroupNormalization whole. The weights are copied: were they left in the file for ONNX Runtime to map,
whoever wrote over that file would end the process.
"""

import struct
from collections.abc import Sequence
from typing import Final

from ddpm_deploy.onnx_file import OnnxFile, protobuf_field, protobuf_fields, protobuf_head, protobuf_number

_OPSET: Final = 21  # before it, scale and bias were by group
_STANDARD: Final = b"GroupNormalization"
_NAME, _DOMAIN = b"GroupNorm", b"ddpm_deploy"
_FLOAT, _INT, _TENSOR, _INTS = 1, 2, 4, 7  # of AttributeProto.AttributeType
_FLOAT32: Final = 1  # of TensorProto.DataType
_MOST: Final = 2**31 - 2**16  # bytes: protobuf takes no 2 GiB from memory


def without_group_norm(file: OnnxFile) -> bytes | None:
    """An ONNX model with such a function for GroupNormalization; None where the file has none that it is right for.

    Raises ValueError where the file is broken.
    """
    content = file.mapped()
    fields = list(protobuf_fields(content))
    graphs = [at for at, (number, _, _) in enumerate(fields) if number == 7]
    if file.opset < _OPSET or len(graphs) != 1 or len(content) > _MOST:
        return None
    (at,) = graphs
    ends = [place for _, place, _ in fields[1:]] + [len(content)]
    graph = [
        piece
        for number, _, part in protobuf_fields(fields[at][2])
        for piece in _pieces(number, _renamed(part) if number == 1 else part)
    ]
    return b"".join(
        [
            content[: fields[at][1]],
            protobuf_head(7, sum(map(len, graph))),
            *graph,
            content[ends[at] :],
            protobuf_field(8, _opset(_DOMAIN, 1)),
            protobuf_field(25, _function(file.opset)),
        ]
    )


def _pieces(number: int, payload: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
    """A field, without a copy of what it holds."""
    return protobuf_head(number, len(payload)), payload


def _renamed(node: memoryview) -> bytes | memoryview:
    """A NodeProto; where its op_type (4) is GroupNormalization, ours with its domain (7)."""
    parts = [(number, bytes(part)) for number, _, part in protobuf_fields(node)]
    if (4, _STANDARD) not in parts or any(number == 7 and part for number, part in parts):
        return node
    kept = [protobuf_field(number, part) for number, part in parts if number not in (4, 7)]
    return b"".join([*kept, protobuf_field(4, _NAME), protobuf_field(7, _DOMAIN)])


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
