"""ncnn's layers as far as we write them: their text (.param), the shapes they make, and the weights they read.

ncnn believes what a .param says: a convolution with other channels than it gets reads past its memory. So a text is
followed here layer by layer, from the shapes of the inputs to that of the prediction, before ncnn sees it, and what
is not on the list is refused. The exporter writes through the same list.

Shapes are as NumPy has them, without the batch: (C, H, W), (H, W) or (W,); ncnn takes one image a call.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

Shape = tuple[int, ...]
Value = int | float | tuple[int, ...]  # of a parameter

_MAGIC: Final = "7767517"
_NAME: Final = re.compile(r"[\w./:-]{1,200}", re.ASCII)
_MOST_LAYERS: Final = 20_000
_MOST_NUMBERS: Final = 1 << 28  # of one blob, or one weight
_LARGEST_SIDE: Final = 1 << 20
_ARRAY: Final = -23300  # minus its number is the key of a parameter that is a list
_MOST_AXES: Final = 4
_SIZES: Final = ((0,), (1, 0), (2, 1, 0), (2, 11, 1, 0))  # the keys of a shape of so many axes
DIRECT: Final = 64  # parameter 31 of a convolution: not by Winograd's algorithm

# What BinaryOp and UnaryOp compute, by number.
BINARY: Final = {"Add": 0, "Sub": 1, "Mul": 2, "Div": 3, "Max": 4, "Min": 5, "Pow": 6, "RSub": 7, "RDiv": 8}
UNARY: Final = {
    "Abs": 0,
    "Neg": 1,
    "Square": 4,
    "Sqrt": 5,
    "Exp": 7,
    "Log": 8,
    "Sin": 9,
    "Cos": 10,
    "Reciprocal": 15,
    "Tanh": 16,
}
REDUCTIONS: Final = {"ReduceSum": 0, "ReduceSumSquare": 2, "ReduceMean": 3, "ReduceMax": 4, "ReduceL2": 8}
# The order_type of Permute: of the axes of the input, outermost first, in the order of the output's.
PERMUTATIONS: Final = {
    (0, 1): 0,
    (1, 0): 1,
    (0, 1, 2): 0,
    (0, 2, 1): 1,
    (1, 0, 2): 2,
    (1, 2, 0): 3,
    (2, 0, 1): 4,
    (2, 1, 0): 5,
}


@dataclass(frozen=True)
class Layer:
    """One line of a .param. params: by their numbers."""

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[int, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{len(self.inputs)} {len(self.outputs)}"
        given = [_written(key, value) for key, value in self.params.items()]
        return " ".join([self.type, self.name, counts, *self.inputs, *self.outputs, *given])


def _written(key: int, value: Value) -> str:
    if isinstance(value, tuple):
        return f"{_ARRAY - key}={','.join(map(str, [len(value), *value]))}"
    return f"{key}={value:.8e}" if isinstance(value, float) else f"{key}={value}"  # 15 characters are read


def as_text(layers: Sequence[Layer]) -> str:
    """The .param of layers."""
    blobs = sum(len(layer.outputs) for layer in layers)
    return "\n".join([_MAGIC, f"{len(layers)} {blobs}", *map(str, layers)]) + "\n"


def parse(text: str) -> list[Layer]:
    """The layers of a .param. Raises ValueError where it is none, or has what we do not write."""
    lines = text.removesuffix("\n").split("\n")  # no other character ends a line of ncnn's
    if len(lines) < 3 or lines[0] != _MAGIC:
        raise ValueError("it does not begin as a .param does")
    layers = [_parsed(line) for line in lines[2:]]
    blobs = sum(len(layer.outputs) for layer in layers)
    if lines[1] != f"{len(layers)} {blobs}" or len(layers) > _MOST_LAYERS:
        raise ValueError(f"it has {len(layers)} layers and {blobs} blobs, and says otherwise")
    return layers


def _parsed(line: str) -> Layer:
    words = line.split(" ")
    if len(words) < 4 or words[0] not in _RULES:
        raise ValueError(f"{words[0][:40]!r} is no layer that ddpm-export writes")
    kind, name, *counts = words[:4]
    inputs, outputs = (_whole(count) for count in counts)
    names = words[4 : 4 + inputs + outputs]
    if len(names) < inputs + outputs or not all(_NAME.fullmatch(word) for word in (name, *names)):
        raise ValueError(f"the names of a {kind} are malformed")
    params = dict(_param(word) for word in words[4 + inputs + outputs :])
    return Layer(kind, name, tuple(names[:inputs]), tuple(names[inputs:]), params)


def _param(word: str) -> tuple[int, Value]:
    key, _, value = word.partition("=")
    number = int(key) if re.fullmatch(r"-?\d{1,5}", key, re.ASCII) else -1
    if number <= _ARRAY:
        count, *items = map(_whole, value.split(","))
        if count != len(items):
            raise ValueError(f"the list {word[:40]!r} has another length than it says")
        return _ARRAY - number, tuple(items)
    if not 0 <= number < 32:
        raise ValueError(f"{word[:40]!r} is no parameter")
    if re.fullmatch(r"-?\d\.\d{8}e[+-]\d\d", value, re.ASCII):
        return number, float(value)
    return number, _whole(value)


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text)


@dataclass(frozen=True)
class Weight:
    """Numbers in the file of weights. tagged: whether four bytes that say their type, 0 for float32, stand before."""

    count: int
    tagged: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return 4 * (self.count + self.tagged)


@dataclass(frozen=True)
class Followed:
    """What a text comes to. weights: that it reads, in order. shapes: of each blob."""

    weights: tuple[Weight, ...]
    shapes: Mapping[str, Shape]

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(weight.size for weight in self.weights)

    def tags(self) -> Iterator[int]:
        """Where in the weights a type is said."""
        place = 0
        for weight in self.weights:
            if weight.tagged:
                yield place
            place += weight.size


def follow(layers: Sequence[Layer], inputs: Mapping[str, Shape], output: str) -> Followed:
    """Follow the shapes through layers, from `inputs` to `output`.

    Raises ValueError where a layer does not take what it gets, or a blob is not made exactly once, before it is read,
    and read at most once.
    """
    shapes: dict[str, Shape] = {}
    unread: set[str] = set()
    weights: list[Weight] = []
    for layer in layers:
        if not unread.issuperset(layer.inputs) or len(set(layer.inputs)) < len(layer.inputs):
            raise ValueError(f"{layer.name} reads what is not there, or was read before")
        made = outcome(layer, [shapes[name] for name in layer.inputs])
        if layer.type == "Input" and inputs.get(layer.outputs[0]) != made.shapes[0]:
            raise ValueError(
                f"its input {layer.outputs[0]} is {made.shapes[0]}, unlike that of its ModelSpec"
            )
        unread.difference_update(layer.inputs)
        for name, shape in zip(layer.outputs, made.shapes, strict=True):
            if name in shapes:
                raise ValueError(f"{layer.name} makes {name} a second time")
            shapes[name] = shape
        unread.update(layer.outputs)
        weights += made.weights
    if output not in unread or not shapes.keys() >= inputs.keys():
        raise ValueError(f"it does not lead from {', '.join(inputs)} to {output}")
    return Followed(tuple(weights), shapes)


@dataclass(frozen=True)
class Outcome:
    """What one layer comes to."""

    shapes: list[Shape]
    weights: tuple[Weight, ...] = ()


def outcome(layer: Layer, shapes: Sequence[Shape]) -> Outcome:
    """The shapes that a layer makes of those it gets, and its weights. Raises ValueError where it cannot take them."""
    given = _Given(layer, list(shapes))
    try:
        made = _RULES[layer.type](given)
    except (IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{layer.type} {layer.name} lacks an input or a parameter ({error})") from error
    given.require(not given.params and not given.shapes)
    given.require(len(made.shapes) == len(layer.outputs))
    for shape in made.shapes:
        sound = 1 <= len(shape) <= _MOST_AXES and all(1 <= side <= _LARGEST_SIDE for side in shape)
        given.require(sound and math.prod(shape) <= _MOST_NUMBERS)
    given.require(all(1 <= weight.count <= _MOST_NUMBERS for weight in made.weights))
    return made


class _Given:
    """The inputs and parameters of a layer, each taken once."""

    def __init__(self, layer: Layer, shapes: list[Shape]) -> None:
        self.layer, self.shapes, self.params = layer, shapes, dict(layer.params)

    def require(self, holds: bool) -> None:
        if not holds:
            raise ValueError(
                f"{self.layer.type} {self.layer.name} does not take what it gets, or has a parameter out of its range"
            )

    def shape(self, *axes: int) -> Shape:
        """The next input, of so many axes."""
        shape = self.shapes.pop(0)
        self.require(not axes or len(shape) in axes)
        return shape

    def whole(self, key: int, low: int = 0, high: int = _MOST_NUMBERS) -> int:
        value = self.params.pop(key)
        self.require(isinstance(value, int) and low <= value <= high)
        return int(value)  # type: ignore[arg-type]

    def real(self, key: int) -> float:
        value = self.params.pop(key)
        self.require(isinstance(value, float))
        return float(value)  # type: ignore[arg-type]

    def many(self, key: int) -> tuple[int, ...]:
        value = self.params.pop(key)
        self.require(isinstance(value, tuple))
        return value  # type: ignore[return-value]


def _same(given: _Given) -> Outcome:
    return Outcome([given.shape()])


def _sized(given: _Given) -> Shape:
    """The shape that 2, 11, 1 and 0 say: c, d, h and w. Of another choice of them ncnn makes another shape."""
    keys = tuple(key for key in (2, 11, 1, 0) if key in given.params)
    given.require(keys in _SIZES)
    return tuple(given.whole(key, 1) for key in keys)


def _memory(given: _Given) -> Outcome:
    shape = _sized(given)
    return Outcome([shape], (Weight(math.prod(shape), False),))


def _split(given: _Given) -> Outcome:
    return Outcome([given.shape()] * len(given.layer.outputs))


def _reshape(given: _Given) -> Outcome:
    shape, wanted = given.shape(), _sized(given)
    given.require(math.prod(shape) == math.prod(wanted))
    return Outcome([wanted])


def _permute(given: _Given) -> Outcome:
    shape, order = given.shape(2, 3), given.whole(0)
    found = [axes for axes, number in PERMUTATIONS.items() if number == order and len(axes) == len(shape)]
    given.require(bool(found))
    return Outcome([tuple(shape[axis] for axis in found[0])])


def _convolved(given: _Given, groups: int) -> Outcome:
    channels, height, width = given.shape(3)
    out, bias, count = given.whole(0, 1), given.whole(5, 0, 1), given.whole(6, 1)
    kernel = given.whole(11, 1, 64), given.whole(1, 1, 64)
    dilation = given.whole(12, 1, 64), given.whole(2, 1, 64)
    stride = given.whole(13, 1, 64), given.whole(3, 1, 64)
    given.require(given.params.pop(31, DIRECT) == DIRECT)
    pads = (given.whole(14, 0, 64) + given.whole(16, 0, 64), given.whole(4, 0, 64) + given.whole(15, 0, 64))
    given.require(channels % groups == 0 == out % groups)
    given.require(count == out * (channels // groups) * math.prod(kernel))
    sides = [
        (side + pad - (d * (k - 1) + 1)) // s + 1
        for side, pad, k, d, s in zip((height, width), pads, kernel, dilation, stride, strict=True)
    ]
    weights = (Weight(count, True), *[Weight(out, False)] * bias)
    return Outcome([(out, *sides)], weights)


def _inner_product(given: _Given) -> Outcome:
    *rows, width = given.shape(1, 2)
    out, bias, count = given.whole(0, 1), given.whole(1, 0, 1), given.whole(2, 1)
    given.require(count == out * width)
    return Outcome([(*rows, out)], (Weight(count, True), *[Weight(out, False)] * bias))


def _embed(given: _Given) -> Outcome:
    (words,) = given.shape(1)
    out, rows, bias, count = given.whole(0, 1), given.whole(1, 1), given.whole(2, 0, 0), given.whole(3, 1)
    given.require(count == out * rows and not bias)
    return Outcome([(words, out)], (Weight(count, True),))


def _group_norm(given: _Given) -> Outcome:
    shape = given.shape(2, 3)
    groups, channels, affine = given.whole(0, 1), given.whole(1, 1), given.whole(3, 0, 1)
    given.real(2)
    given.require(channels == shape[0] and channels % groups == 0)
    return Outcome([shape], (Weight(channels, False),) * 2 * affine)


def _layer_norm(given: _Given) -> Outcome:
    shape, size, affine = given.shape(), given.whole(0, 1), given.whole(2, 0, 1)
    given.real(1)
    given.require(size == shape[-1])
    return Outcome([shape], (Weight(size, False),) * 2 * affine)


def _unary(given: _Given) -> Outcome:
    given.require(given.whole(0) in UNARY.values())
    return _same(given)


def _relu(given: _Given) -> Outcome:
    given.real(0)
    return _same(given)


def _clip(given: _Given) -> Outcome:
    given.real(0), given.real(1)
    return _same(given)


def _gelu(given: _Given) -> Outcome:
    given.whole(0, 0, 1)
    return _same(given)


def _binary(given: _Given) -> Outcome:
    given.require(given.whole(0) in BINARY.values())
    if given.whole(1, 0, 1):
        given.real(2)
        return _same(given)
    one, other = given.shape(), given.shape()
    given.require(len(one) == len(other))  # of others, ncnn guesses which axes are meant
    given.require(all(a == b or 1 in (a, b) for a, b in zip(one, other, strict=True)))
    return Outcome([tuple(map(max, zip(one, other, strict=True)))])


def _softmax(given: _Given) -> Outcome:
    shape = given.shape()
    given.require(given.whole(0) < len(shape) and given.whole(1) == 1)
    return Outcome([shape])


def _matmul(given: _Given) -> Outcome:
    one, other, transposed = given.shape(2, 3), given.shape(2, 3), given.whole(0, 0, 1)
    *batch, rows, inner = one
    *others, first, second = other
    given.require(batch == others and inner == (second if transposed else first))
    return Outcome([(*batch, rows, first if transposed else second)])


def _concat(given: _Given) -> Outcome:
    shapes, axis = [given.shape() for _ in given.layer.inputs], given.whole(0)
    first = list(shapes[0])
    first[axis] = sum(shape[axis] for shape in shapes)
    given.require(
        all((*shape[:axis], *shape[axis + 1 :]) == (*first[:axis], *first[axis + 1 :]) for shape in shapes)
    )
    return Outcome([tuple(first)])


def _slice(given: _Given) -> Outcome:
    shape, sizes, axis = given.shape(), given.many(0), given.whole(1)
    given.require(sum(sizes) == shape[axis])
    return Outcome([(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes])


def _crop(given: _Given) -> Outcome:
    shape, starts, ends, axes = list(given.shape()), given.many(9), given.many(10), given.many(11)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        given.require(0 <= start < end <= shape[axis] and axis >= 0)
        shape[axis] = end - start
    given.require(0 < len(set(axes)) == len(axes))
    return Outcome([tuple(shape)])


def _interp(given: _Given) -> Outcome:
    channels, height, width = given.shape(3)
    given.require(given.whole(0) == 1)  # nearest
    scales = given.real(1), given.real(2)
    given.require(all(scale in (2.0, 3.0, 4.0) for scale in scales))
    return Outcome([(channels, height * int(scales[0]), width * int(scales[1]))])


def _pooling(given: _Given) -> Outcome:
    channels, height, width = given.shape(3)
    given.require(given.whole(0) == 1)  # the mean, of
    kernel, stride = (
        (given.whole(11, 1, 64), given.whole(1, 1, 64)),
        (given.whole(12, 1, 64), given.whole(2, 1, 64)),
    )
    given.require(given.whole(5) == 1)  # whole windows
    sides = [(side - k) // s + 1 for side, k, s in zip((height, width), kernel, stride, strict=True)]
    return Outcome([(channels, *sides)])


def _reduction(given: _Given) -> Outcome:
    shape, axes = given.shape(), given.many(3)
    given.require(given.whole(0) in REDUCTIONS.values() and given.whole(1) == 0)
    given.require(given.whole(4) == 1 == given.whole(5))  # dimensions are kept; the axes do not count a batch
    # Of no axes, ncnn sums one axis up all the same.
    given.require(0 < len(set(axes)) == len(axes) and all(0 <= axis < len(shape) for axis in axes))
    return Outcome([tuple(1 if axis in axes else side for axis, side in enumerate(shape))])


def _input(given: _Given) -> Outcome:
    return Outcome([_sized(given)])


_RULES: Final[dict[str, Callable[[_Given], Outcome]]] = {
    "Input": _input,
    "MemoryData": _memory,
    "Split": _split,
    "Reshape": _reshape,
    "Permute": _permute,
    "Convolution": lambda given: _convolved(given, 1),
    "ConvolutionDepthWise": lambda given: _convolved(given, given.whole(7, 1)),
    "InnerProduct": _inner_product,
    "Embed": _embed,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "Swish": _same,
    "Sigmoid": _same,
    "ReLU": _relu,
    "GELU": _gelu,
    "Clip": _clip,
    "UnaryOp": _unary,
    "BinaryOp": _binary,
    "Softmax": _softmax,
    "MatMul": _matmul,
    "Concat": _concat,
    "Slice": _slice,
    "Crop": _crop,
    "Interp": _interp,
    "Pooling": _pooling,
    "Reduction": _reduction,
}
