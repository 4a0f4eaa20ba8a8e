"""An ONNX graph → ncnn's layers and their weights, without PyTorch.

ncnn takes one image a call, so the graph is read with a batch of one, whose axis falls away: every shape is then known,
and what only moves axes about is a Reshape or nothing at all. Nodes whose inputs are all constant are computed here.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, ParityError, first_line
from ddpm_deploy.export.bits import same_bits
from ddpm_deploy.files import atomic_together, show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.ncnn_file import describe
from ddpm_deploy.ncnn_layers import (
    BINARY,
    PERMUTATIONS,
    REDUCTIONS,
    UNARY,
    Layer,
    Shape,
    Value,
    as_text,
    outcome,
)
from ddpm_deploy.runtime.backends.ncnn import NcnnNetwork, require_ncnn
from ddpm_deploy.runtime.parity import Comparison, judge
from ddpm_deploy.runtime.proof import proof_of, proof_path, write_proof
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.stages import Stages, silent

logger = logging.getLogger(__name__)

_SWAPPED: Final = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min", "Sub": "RSub", "Div": "RDiv"}
_ALIASES: Final = ("Identity", "Dropout")
_MOVES: Final = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def convert(onnx: ModelFile, path: Path, *, stages: Stages = silent) -> Comparison:
    """Write an .onnx file as a .ncnn file, judged by the proof beside the .onnx, which is copied beside it.

    The file gets its name once it agrees with the proof in ncnn; its spec says whether bits hold there. Raises
    ArtefactError where there is no proof of this model, or the graph has an operator that is not known of ncnn,
    ParityError where the result does not agree, DependencyError or BackendError where ncnn cannot run here.
    """
    require_ncnn()
    onnx.require_intact()
    beside = proof_path(onnx.path)
    if not beside.exists():
        raise ArtefactError(
            f"{onnx.name} has no proof beside it ({show(beside)} does not exist), which its .ncnn is checked by: export "
            "its checkpoint to .ncnn, or copy the proof there"
        )
    proof = proof_of(onnx, beside)
    loaded = require("onnx", "export").load_model(onnx.path)
    spec = msgspec.structs.replace(onnx.spec, same_bits=None)
    with atomic_together(path, proof_path(path)) as (temporary, proof_file):
        write_ncnn(loaded, spec, temporary)
        write_proof(proof, proof_file)
        candidate = NcnnNetwork(open_model(temporary, spec), max_batch=proof.count)
        with stages("checking in ncnn", len(proof.timesteps) + proof.steps) as progress:
            comparison = judge(proof, candidate, progress)
        candidate.close()
        _require_within(comparison, spec, path)
        bits = same_bits(open_model(temporary, spec), NcnnNetwork, stages=stages)
        describe(temporary, msgspec.structs.replace(spec, same_bits=bits))
    return comparison


def _require_within(comparison: Comparison, spec: ModelSpec, path: Path) -> None:
    """Raise ParityError where predictions differ; images alone may, of a network that passes on its own rounding."""
    if comparison.within:
        return
    worst, psnr = comparison.worst, comparison.psnr.min()
    if comparison.first_past is not None or spec.prediction == "mean":
        raise ParityError(
            f"{show(path)} was not written: in ncnn the network differs from its proof, by up to "
            f"{worst.relative_rms:.1e} of its RMS at t = {worst.timestep} ({worst.limit:.0e} is allowed), the images "
            f"by {psnr:.0f} dB PSNR ({comparison.tolerance.psnr:.0f} is asked)"
        )
    logger.warning(
        "the images of this network's chains differ by %.0f dB PSNR (%.0f is asked), though its predictions agree to "
        "%.0e: its chains pass on what is rounded, as those of an untrained network do",
        psnr,
        comparison.tolerance.psnr,
        worst.relative_rms,
    )


def write_ncnn(model: Any, spec: ModelSpec, path: Path) -> None:
    """Write an onnx.ModelProto as a .ncnn file.

    Raises ArtefactError where it has an operator, or one of its settings, that is not known here, which it names.
    """
    if spec.precision != "fp32":
        raise ArtefactError(
            f"ncnn runs float32 alone here, and the graph is in {spec.precision}: export it in fp32"
        )
    with path.open("wb") as file:
        layers = _Converter(model, spec, file).convert()
    describe(path, spec, as_text(layers))


def _shapes(model: Any) -> dict[str, Shape]:
    """The shape of every tensor where the batch is one."""
    onnx = require("onnx", "export")
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in (*copied.graph.input, *copied.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del copied.graph.value_info[:]  # which have the batch as a letter
    for node in copied.graph.node:
        if node.op_type == "GroupNormalization":  # of which onnx infers nothing
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    try:
        graph = onnx.shape_inference.infer_shapes(copied, data_prop=True).graph
    except Exception as error:
        raise ArtefactError(f"the shapes of the graph cannot be followed: {first_line(error)}") from error
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


class _Unknown(Exception):
    """A setting of an operator that has no counterpart here."""


class _Converter:
    """Goes through the nodes in order, and writes the weights of each layer as it is made."""

    def __init__(self, model: Any, spec: ModelSpec, weights: BinaryIO) -> None:
        self._onnx = require("onnx", "export")
        self._graph, self._spec, self._file = model.graph, spec, weights
        self._opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        to_array = self._onnx.numpy_helper.to_array
        self._constants = {tensor.name: to_array(tensor) for tensor in self._graph.initializer}
        self._shapes = _shapes(model)
        self._readers = Counter(name for node in self._graph.node for name in node.input)
        self._blobs: dict[str, str] = {}  # of each tensor
        self._made: dict[str, Shape] = {}  # of each blob
        self._skipped: set[str] = set()  # nodes that went into another's layer
        self.layers: list[Layer] = []

    def convert(self) -> list[Layer]:
        """The layers, each blob read once."""
        for tensor in self._spec.inputs:
            shape = tensor.shape or (1,)
            self._blobs[tensor.name] = self._add("Input", (), _size_params(shape), output=tensor.name)
        for node in self._graph.node:
            if node.output[0] in self._skipped or self._folded(node):
                continue
            self._convert_node(node)
        self._finish()
        return _read_once(self.layers)

    def _convert_node(self, node: Any) -> None:
        method = _METHODS.get(node.op_type)
        try:
            if method is None or node.domain not in ("", "ai.onnx"):
                raise _Unknown(f"has the operator {show(node.op_type)}")
            method(self, node)
        except (_Unknown, ValueError, KeyError) as error:
            what = f"ncnn's layers as they are written here do not take ({first_line(error)})"
            if isinstance(error, _Unknown):
                what = f"{error}, which has no counterpart in ncnn here"
            raise ArtefactError(
                f"the network cannot be written for ncnn: {show(node.op_type)} {show(node.name)} {what}; "
                "run its .onnx instead"
            ) from error

    def _finish(self) -> None:
        name = self._spec.output.name
        blob = self._blobs[name]
        shape = self._spec.output.shape
        self._add("Reshape", (self._as(blob, shape),), _size_params(shape), output=name)

    # --- what layers are made with ----------------------------------------------------------------------------

    def _add(
        self,
        kind: str,
        inputs: Sequence[str],
        params: dict[int, Value],
        weights: Sequence[NDArray[Any]] = (),
        output: str | None = None,
    ) -> str:
        """Add a layer of one output, and write its weights; gives the name of the blob."""
        blob = output or f"b{len(self._made)}"
        layer = Layer(kind, f"{kind.lower()}{len(self.layers)}", tuple(inputs), (blob,), params)
        made = outcome(layer, [self._made[name] for name in inputs])
        (self._made[blob],) = made.shapes
        self._write(made.weights, weights)
        self.layers.append(layer)
        return blob

    def _write(self, wanted: Sequence[Any], weights: Sequence[NDArray[Any]]) -> None:
        for weight, numbers in zip(wanted, weights, strict=True):
            if numbers.size != weight.count:
                raise ValueError(f"{numbers.size} weights, and {weight.count} are needed")
            self._file.write(bytes(4) * weight.tagged)
            self._file.write(np.ascontiguousarray(numbers, "<f4").tobytes())

    def _as(self, blob: str, shape: Shape) -> str:
        """A blob in another shape."""
        if self._made[blob] == shape:
            return blob
        return self._add("Reshape", (blob,), _size_params(shape))

    def _blob(self, name: str) -> str:
        """The blob of a tensor; of a constant, one that holds it."""
        if name not in self._blobs:
            numbers = self._constants[name]
            shape = _without_batch(numbers.shape)
            self._blobs[name] = self._add("MemoryData", (), _size_params(shape), (numbers,))
        return self._blobs[name]

    def _give(self, node: Any, blob: str) -> None:
        """Say what a node's output is, in the shape that it has there."""
        self._blobs[node.output[0]] = self._as(blob, self._shape(node.output[0]))

    def _shape(self, name: str) -> Shape:
        """The shape of a tensor's blob."""
        return _without_batch(self._full_shape(name))

    def _full_shape(self, name: str) -> Shape:
        shape = self._constants[name].shape if name in self._constants else self._shapes.get(name, (0,))
        if 0 in shape:
            raise _Unknown("has a shape that hangs on the batch or on numbers")
        return tuple(shape)

    def _axis(self, name: str, axis: int) -> int:
        """The axis of a tensor, as one of its blob."""
        full = self._full_shape(name)
        axis = axis % len(full) - (len(full) - len(_without_batch(full)))
        if axis < 0:
            raise _Unknown("works along the batch")
        return axis

    def _attributes(self, node: Any) -> dict[str, Any]:
        return {
            attribute.name: self._onnx.helper.get_attribute_value(attribute) for attribute in node.attribute
        }

    def _scalar(self, name: str) -> float | None:
        """The one number of a constant; None of anything else."""
        numbers = self._constants.get(name)
        return float(numbers.reshape(())) if numbers is not None and numbers.size == 1 else None

    # --- constants --------------------------------------------------------------------------------------------

    def _folded(self, node: Any) -> bool:
        """Compute a node of constants alone."""
        if node.op_type == "Shape" and 0 not in self._shapes.get(node.input[0], (0,)):
            self._constants[node.output[0]] = self._sliced_shape(node)
            return True
        if not all(name in self._constants for name in node.input if name):
            return False
        from onnx.reference import ReferenceEvaluator

        helper = self._onnx.helper
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        given = [name for name in dict.fromkeys(node.input) if name]
        graph = helper.make_graph(
            [node], "constant", list(map(helper.make_empty_tensor_value_info, given)), outputs
        )
        opsets = [helper.make_opsetid("", self._opset)]
        model = helper.make_model(graph, opset_imports=opsets)
        try:
            results = ReferenceEvaluator(model).run(None, {name: self._constants[name] for name in given})
        except Exception as error:
            raise ArtefactError(
                f"{show(node.op_type)} of constants cannot be computed: {first_line(error)}"
            ) from error
        self._constants |= {name: np.asarray(made) for name, made in zip(node.output, results, strict=True)}
        return True

    def _sliced_shape(self, node: Any) -> NDArray[np.int64]:
        given = self._attributes(node)
        return np.array(self._shapes[node.input[0]][given.get("start", 0) : given.get("end")], np.int64)

    def _ints(self, node: Any, place: int, attribute: str) -> list[int] | None:
        """A list that is an input in newer opsets, and an attribute in older ones."""
        if len(node.input) > place and node.input[place]:
            if node.input[place] not in self._constants:
                raise _Unknown(f"has {attribute} that hang on the batch or on numbers")
            return [int(number) for number in self._constants[node.input[place]].reshape(-1)]
        found = self._attributes(node).get(attribute)
        return None if found is None else list(found)

    # --- operators --------------------------------------------------------------------------------------------

    def alias(self, node: Any) -> None:
        """What changes nothing."""
        self._give(node, self._blob(node.input[0]))

    def cast(self, node: Any) -> None:
        """Between types of numbers, float32 alone: a label may be cast as it likes."""
        wanted = self._attributes(node)["to"]
        proto = self._onnx.TensorProto
        if wanted not in (proto.FLOAT, proto.INT64, proto.INT32) or node.input[0] not in self._blobs:
            raise _Unknown("casts to a type other than float32")
        self._blobs[node.output[0]] = self._blobs[node.input[0]]

    def move(self, node: Any) -> None:
        """Another shape for the same numbers."""
        self._give(node, self._blob(node.input[0]))

    def expand(self, node: Any) -> None:
        """Copies along an axis: where they are only combined with others, that does it."""
        blob, wanted = self._blob(node.input[0]), self._shape(node.output[0])
        if self._shape(node.input[0]) == wanted:
            self._give(node, blob)
            return
        zeros = np.zeros(wanted, np.float32)
        other = self._add("MemoryData", (), _size_params(wanted), (zeros,))
        shape = self._full_shape(node.input[0])
        full = (1,) * (len(self._full_shape(node.output[0])) - len(shape)) + shape
        own = self._as(blob, full[len(full) - len(wanted) :])
        self._give(node, self._add("BinaryOp", (own, other), {0: BINARY["Add"], 1: 0}))

    def conv(self, node: Any) -> None:
        """A convolution of two axes."""
        given, weight = self._attributes(node), self._weight(node, 1)
        if weight.ndim != 4:
            raise _Unknown("is of other than two axes")
        if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise _Unknown("pads by itself")
        bias = [self._weight(node, 2)] if len(node.input) > 2 else []
        top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
        (sh, sw), (dh, dw) = given.get("strides", (1, 1)), given.get("dilations", (1, 1))
        out, _, kh, kw = weight.shape
        groups = given.get("group", 1)
        params: dict[int, Value] = {0: out, 1: kw, 11: kh, 2: dw, 12: dh, 3: sw, 13: sh}
        params |= {4: left, 14: top, 15: right, 16: bottom, 5: len(bias), 6: weight.size}
        kind = "Convolution" if groups == 1 else "ConvolutionDepthWise"
        params |= {} if groups == 1 else {7: groups}
        self._give(node, self._add(kind, (self._blob(node.input[0]),), params, [weight, *bias]))

    def gemm(self, node: Any) -> None:
        """x·W + b, of a constant W."""
        given, weight = self._attributes(node), self._weight(node, 1)
        bias = [self._weight(node, 2).reshape(-1)] if len(node.input) > 2 else []
        scales = given.get("alpha", 1.0), given.get("beta", 1.0) if bias else 1.0
        if given.get("transA") or scales != (1.0, 1.0):
            raise _Unknown("is scaled or transposed")
        self._linear(node, weight if given.get("transB") else weight.T, bias)

    def _linear(self, node: Any, weight: NDArray[Any], bias: Sequence[NDArray[Any]]) -> None:
        """weight: (out, in)."""
        out, width = weight.shape
        rows = math.prod(self._shape(node.input[0])) // width
        shape = (width,) if rows == 1 else (rows, width)
        own = self._as(self._blob(node.input[0]), shape)
        params: dict[int, Value] = {0: out, 1: len(bias), 2: weight.size}
        self._give(node, self._add("InnerProduct", (own,), params, [weight, *bias]))

    def matmul(self, node: Any) -> None:
        """A product of two tensors, or of one and a constant."""
        _one, other = node.input
        if other in self._constants and self._constants[other].ndim == 2:
            follower = self._bias_after(node)
            bias = [] if follower is None else [self._constants[follower[1]].reshape(-1)]
            self._linear(node, self._weight(node, 1).T, bias)
            if follower is not None:
                self._blobs[follower[0]] = self._blobs[node.output[0]]
            return
        shapes = [self._shape(name) for name in node.input]
        rank = max(map(len, shapes))
        blobs = [
            self._as(self._blob(n), (1,) * (rank - len(s)) + s)
            for n, s in zip(node.input, shapes, strict=True)
        ]
        self._give(node, self._add("MatMul", blobs, {0: 0}))

    def _bias_after(self, node: Any) -> tuple[str, str] | None:
        """The output and the constant of an addition that alone reads what a node makes, and adds a bias."""
        (made,) = node.output
        for after in self._graph.node:
            if after.op_type == "Add" and made in after.input and self._readers[made] == 1:
                (other,) = [name for name in after.input if name != made] or [made]
                width = self._full_shape(made)[-1]
                if other in self._constants and self._constants[other].shape == (width,):
                    self._skipped.add(after.output[0])
                    return after.output[0], other
        return None

    def _weight(self, node: Any, place: int) -> NDArray[Any]:
        name = node.input[place]
        if name not in self._constants:
            raise _Unknown("has a weight that is computed")
        return self._constants[name]

    def group_norm(self, node: Any) -> None:
        """Of opset 21: a scale and a shift for each channel."""
        given, scale, shift = self._attributes(node), self._weight(node, 1), self._weight(node, 2)
        shape = self._shape(node.input[0])
        own = self._as(self._blob(node.input[0]), (shape[0], math.prod(shape[1:-1]), shape[-1]))
        if scale.size != shape[0]:
            raise _Unknown("has a scale for each group (before opset 21)")
        params: dict[int, Value] = {
            0: given["num_groups"],
            1: scale.size,
            2: _real(given.get("epsilon", 1e-5)),
            3: 1,
        }
        self._give(node, self._add("GroupNorm", (own,), params, [scale, shift]))

    def instance_norm(self, node: Any) -> None:
        """Each channel by itself: as many groups as channels."""
        given, scale, shift = self._attributes(node), self._weight(node, 1), self._weight(node, 2)
        shape = self._shape(node.input[0])
        own = self._as(self._blob(node.input[0]), (shape[0], math.prod(shape[1:-1]), shape[-1]))
        params: dict[int, Value] = {0: scale.size, 1: scale.size, 2: _real(given.get("epsilon", 1e-5)), 3: 1}
        self._give(node, self._add("GroupNorm", (own,), params, [scale, shift]))

    def layer_norm(self, node: Any) -> None:
        """Over the last axis."""
        given, scale = self._attributes(node), self._weight(node, 1)
        shift = self._weight(node, 2) if len(node.input) > 2 else np.zeros_like(scale)
        if given.get("axis", -1) not in (-1, len(self._full_shape(node.input[0])) - 1):
            raise _Unknown("is over several axes")
        params: dict[int, Value] = {0: scale.size, 1: _real(given.get("epsilon", 1e-5)), 2: 1}
        self._give(node, self._add("LayerNorm", (self._blob(node.input[0]),), params, [scale, shift]))

    def sigmoid(self, node: Any) -> None:
        """x·sigmoid(x) is one layer, wherever that product comes."""
        (x,), (made,) = node.input, node.output
        for after in self._graph.node:
            if (
                after.op_type == "Mul"
                and sorted(after.input) == sorted((x, made))
                and self._readers[made] == 1
            ):
                self._skipped.add(after.output[0])
                self._blobs[after.output[0]] = self._add("Swish", (self._blob(x),), {})
                return
        self._give(node, self._add("Sigmoid", (self._blob(x),), {}))

    def swish(self, node: Any) -> None:
        """x·sigmoid(x), of opset 24."""
        if self._attributes(node).get("alpha", 1.0) != 1.0:
            raise _Unknown("is scaled")
        self._give(node, self._add("Swish", (self._blob(node.input[0]),), {}))

    def relu(self, node: Any) -> None:
        """With a slope below 0 where it has one."""
        slope = self._attributes(node).get("alpha", 0.01) if node.op_type == "LeakyRelu" else 0.0
        self._give(node, self._add("ReLU", (self._blob(node.input[0]),), {0: _real(slope)}))

    def gelu(self, node: Any) -> None:
        """By erf, or by tanh."""
        fast = int(self._attributes(node).get("approximate", b"none") == b"tanh")
        self._give(node, self._add("GELU", (self._blob(node.input[0]),), {0: fast}))

    def clip(self, node: Any) -> None:
        """Between two constants."""
        low, high = (self._bound(node, place) for place in (1, 2))
        params: dict[int, Value] = {0: -3.0e38 if low is None else low, 1: 3.0e38 if high is None else high}
        self._give(node, self._add("Clip", (self._blob(node.input[0]),), params))

    def _bound(self, node: Any, place: int) -> float | None:
        if len(node.input) <= place or not node.input[place]:
            return None
        number = self._scalar(node.input[place])
        if number is None:
            raise _Unknown("has bounds that are computed")
        return number

    def unary(self, node: Any) -> None:
        """A function of each number."""
        self._give(node, self._add("UnaryOp", (self._blob(node.input[0]),), {0: UNARY[node.op_type]}))

    def binary(self, node: Any) -> None:
        """Of two tensors of as many axes, or of one and a number."""
        one, other = node.input
        number = self._scalar(other)
        if number is not None:
            self._with_number(node, one, node.op_type, number)
            return
        number = self._scalar(one)
        if number is not None:
            if node.op_type not in _SWAPPED:
                raise _Unknown("has a number before a tensor")
            self._with_number(node, other, _SWAPPED[node.op_type], number)
            return
        rank = len(self._shape(node.output[0]))
        blobs = []
        for name in node.input:
            full = self._full_shape(name)
            shape = (1,) * (rank - len(full)) + full[max(0, len(full) - rank) :]
            blobs.append(self._as(self._blob(name), shape))
        if blobs[0] == blobs[1]:
            if node.op_type != "Mul":
                raise _Unknown("takes the same tensor twice")
            self._give(node, self._add("UnaryOp", blobs[:1], {0: UNARY["Square"]}))
            return
        self._give(node, self._add("BinaryOp", blobs, {0: BINARY[node.op_type], 1: 0}))

    def _with_number(self, node: Any, name: str, op: str, number: float) -> None:
        if op == "Pow" and number == 2.0:
            blob = self._add("UnaryOp", (self._blob(name),), {0: UNARY["Square"]})
        elif op == "Pow" and number != 0.5:
            raise _Unknown(f"has the exponent {number}")
        elif op == "Pow":
            blob = self._add("UnaryOp", (self._blob(name),), {0: UNARY["Sqrt"]})
        else:
            blob = self._add("BinaryOp", (self._blob(name),), {0: BINARY[op], 1: 1, 2: _real(number)})
        self._give(node, blob)

    def softmax(self, node: Any) -> None:
        """Along one axis."""
        axis = self._axis(node.input[0], self._attributes(node).get("axis", -1))
        self._give(node, self._add("Softmax", (self._blob(node.input[0]),), {0: axis, 1: 1}))

    def concat(self, node: Any) -> None:
        """Along one axis."""
        axis = self._axis(node.output[0], self._attributes(node)["axis"])
        self._give(node, self._add("Concat", [self._blob(name) for name in node.input], {0: axis}))

    def split(self, node: Any) -> None:
        """Along one axis: a layer of several outputs."""
        axis = self._attributes(node).get("axis", 0)
        sizes = [self._full_shape(name)[axis] for name in node.output]
        axis = self._axis(node.input[0], axis)
        source = self._blob(node.input[0])
        outputs = tuple(f"b{len(self._made) + place}" for place in range(len(sizes)))
        layer = Layer("Slice", f"slice{len(self.layers)}", (source,), outputs, {0: tuple(sizes), 1: axis})
        made = outcome(layer, [self._made[source]])
        self._made |= dict(zip(outputs, made.shapes, strict=True))
        self.layers.append(layer)
        for name, blob in zip(node.output, outputs, strict=True):
            self._blobs[name] = self._as(blob, self._shape(name))

    def slice(self, node: Any) -> None:
        """A part along some axes, in steps of one."""
        starts, ends = self._ints(node, 1, "starts"), self._ints(node, 2, "ends")
        axes, steps = self._ints(node, 3, "axes"), self._ints(node, 4, "steps")
        full = self._full_shape(node.input[0])
        if starts is None or ends is None or set(steps or [1]) != {1}:
            raise _Unknown("takes steps")
        parts = [
            slice(s, e).indices(full[a])
            for s, e, a in zip(starts, ends, axes or range(len(starts)), strict=True)
        ]
        self._crop(node, [(a, p[0], p[1]) for a, p in zip(axes or range(len(starts)), parts, strict=True)])

    def _crop(self, node: Any, parts: Sequence[tuple[int, int, int]]) -> None:
        """parts: axis, start and end."""
        name = node.input[0]
        full = self._full_shape(name)
        kept = [(self._axis(name, a), s, e) for a, s, e in parts if (s, e) != (0, full[a])]
        blob = self._blob(name)
        if kept:
            axes, starts, ends = zip(*kept, strict=True)
            blob = self._add("Crop", (blob,), {9: starts, 10: ends, 11: axes})
        self._give(node, blob)

    def gather(self, node: Any) -> None:
        """A row of an embedding for each label, or one place along an axis."""
        table, index = node.input
        axis = self._attributes(node).get("axis", 0)
        if table in self._constants and index in self._blobs:
            weight = self._constants[table]
            if weight.ndim != 2 or axis != 0:
                raise _Unknown("looks up something other than rows")
            params: dict[int, Value] = {0: weight.shape[1], 1: weight.shape[0], 2: 0, 3: weight.size}
            self._give(node, self._add("Embed", (self._blobs[index],), params, [weight]))
            return
        place = self._scalar(index)
        if place is None:
            raise _Unknown("takes several places of a tensor")
        start = int(place) % self._full_shape(table)[axis]
        self._crop(node, [(axis % len(self._full_shape(table)), start, start + 1)])

    def transpose(self, node: Any) -> None:
        """Another order of the axes; those of one number are left out of it."""
        full, order = self._full_shape(node.input[0]), list(self._attributes(node)["perm"])
        axes = [axis for axis, side in enumerate(full) if side > 1]
        wanted = tuple(axes.index(axis) for axis in order if axis in axes)
        blob = self._blob(node.input[0])
        if wanted != tuple(range(len(axes))):
            if wanted not in PERMUTATIONS:
                raise _Unknown(f"brings {len(axes)} axes into another order")
            own = self._as(blob, tuple(full[axis] for axis in axes))
            blob = self._add("Permute", (own,), {0: PERMUTATIONS[wanted]})
        self._give(node, blob)

    def resize(self, node: Any) -> None:
        """Each pixel repeated."""
        given = self._attributes(node)
        mode = given.get("mode"), given.get("coordinate_transformation_mode"), given.get("nearest_mode")
        full, made = self._full_shape(node.input[0]), self._full_shape(node.output[0])
        whole = len(full) == 4 and all(after % before == 0 for before, after in zip(full, made, strict=True))
        exact = mode[0] == b"nearest" and (mode[1:] == (b"asymmetric", b"floor") or mode[1] == b"half_pixel")
        if not (whole and exact):
            raise _Unknown("is other than nearest, by whole factors")
        scales = [_real(after / before) for before, after in zip(full[2:], made[2:], strict=True)]
        self._give(
            node, self._add("Interp", (self._blob(node.input[0]),), {0: 1, 1: scales[0], 2: scales[1]})
        )

    def average_pool(self, node: Any) -> None:
        """The mean of windows, without padding."""
        given = self._attributes(node)
        if any(given.get("pads", ())) or given.get("ceil_mode") or len(given["kernel_shape"]) != 2:
            raise _Unknown("pads")
        (kh, kw), (sh, sw) = given["kernel_shape"], given.get("strides", (1, 1))
        params: dict[int, Value] = {0: 1, 1: kw, 11: kh, 2: sw, 12: sh, 5: 1}
        self._give(node, self._add("Pooling", (self._blob(node.input[0]),), params))

    def reduce(self, node: Any) -> None:
        """Along some axes."""
        name = node.input[0]
        axes = self._ints(node, 1, "axes") or list(range(len(self._full_shape(name))))
        within = tuple(
            sorted(self._axis(name, axis) for axis in axes if self._full_shape(name)[axis] > 1 or axis)
        )
        params: dict[int, Value] = {0: REDUCTIONS[node.op_type], 1: 0, 3: within, 4: 1, 5: 1}
        self._give(node, self._add("Reduction", (self._blob(name),), params))


_METHODS: Final[dict[str, Callable[[_Converter, Any], None]]] = {
    **dict.fromkeys(_ALIASES, _Converter.alias),
    **dict.fromkeys(_MOVES, _Converter.move),
    **dict.fromkeys(UNARY.keys() - {"Square"}, _Converter.unary),
    **dict.fromkeys(BINARY.keys() - {"RSub", "RDiv"}, _Converter.binary),
    **dict.fromkeys(REDUCTIONS, _Converter.reduce),
    "Cast": _Converter.cast,
    "Expand": _Converter.expand,
    "Conv": _Converter.conv,
    "Gemm": _Converter.gemm,
    "MatMul": _Converter.matmul,
    "GroupNormalization": _Converter.group_norm,
    "InstanceNormalization": _Converter.instance_norm,
    "LayerNormalization": _Converter.layer_norm,
    "Sigmoid": _Converter.sigmoid,
    "Swish": _Converter.swish,
    "Relu": _Converter.relu,
    "LeakyRelu": _Converter.relu,
    "Gelu": _Converter.gelu,
    "Clip": _Converter.clip,
    "Softmax": _Converter.softmax,
    "Concat": _Converter.concat,
    "Split": _Converter.split,
    "Slice": _Converter.slice,
    "Gather": _Converter.gather,
    "Transpose": _Converter.transpose,
    "Resize": _Converter.resize,
    "AveragePool": _Converter.average_pool,
}


def _real(number: float) -> float:
    return float(np.float32(number))


def _without_batch(shape: Sequence[int]) -> Shape:
    """The shape of a blob: ONNX's without the batch of one in front."""
    shape = tuple(shape)
    return (shape[1:] if shape[:1] == (1,) and len(shape) > 1 else shape) or (1,)


def _size_params(shape: Shape) -> dict[int, Value]:
    """A shape as layers say it: w, h, d and c by the numbers 0, 1, 11 and 2."""
    keys = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}.get(len(shape))
    if keys is None:
        raise _Unknown(f"has {len(shape)} axes, and ncnn at most four")
    return dict(reversed(list(zip(keys, shape, strict=True))))


def _read_once(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers with a Split where several read one blob."""
    readers = Counter(name for layer in layers for name in layer.inputs)
    copies: dict[str, list[str]] = {}
    result: list[Layer] = []
    for layer in layers:
        inputs = tuple(copies[name].pop() if name in copies else name for name in layer.inputs)
        result.append(replace(layer, inputs=inputs))
        for name in layer.outputs:
            if readers[name] > 1:
                copies[name] = [f"{name}.{number}" for number in range(readers[name])]
                result.append(Layer("Split", f"split.{name}", (name,), tuple(copies[name])))
    return result
