"""Which layers of an engine work in which precision, and whether that is what was meant.

TensorRT builds what the types of the graph say. They are looked at all the same: an engine that was asked to be half
precision and is not would be slow and nobody told, and one that is so in the wrong place gives black images.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from ddpm_deploy.engine.bindings import name_of
from ddpm_deploy.errors import ParityError, plural
from ddpm_deploy.files import show
from ddpm_deploy.words import Precision

_NARROW: Final[dict[Precision, str]] = {"fp16": "HALF", "bf16": "BF16"}
_FULL: Final = "FLOAT"
# As the inspector spells them.
_INSPECTED: Final[dict[Precision, tuple[str, ...]]] = {"fp16": ("Half", "FP16"), "bf16": ("BFloat16", "BF16")}


@dataclass(frozen=True)
class Layers:
    """The layers that precision is about, by name, each with the type that it reads ("FLOAT", "HALF", "BF16").

    products: convolutions and matrix products. norms: softmaxes and normalisations.
    """

    products: dict[str, str]
    norms: dict[str, str]

    @property
    def in_float32(self) -> list[str]:
        """The products that are in float32."""
        return [name for name, kind in self.products.items() if kind == _FULL]


def layers_of(trt: Any, network: Any) -> Layers:
    """The layers of a parsed INetworkDefinition."""
    kinds, found = trt.LayerType, Layers({}, {})
    groups = {
        **dict.fromkeys((kinds.CONVOLUTION, kinds.MATRIX_MULTIPLY), found.products),
        **dict.fromkeys((kinds.SOFTMAX, kinds.NORMALIZATION), found.norms),
    }
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in groups:
            groups[layer.type][name_of(layer)] = layer.get_input(0).dtype.name
    return found


def require_precision(layers: Layers, precision: Precision, meant: Collection[str] | None) -> None:
    """Raise ParityError unless the products are in `precision`, but for those `meant` to stay in float32, and the
    norms in float32.

    meant: names; None where the graph does not say.
    """
    if narrow := [name for name, kind in layers.norms.items() if kind != _FULL]:
        raise ParityError(
            f"{_named(narrow)} would normalise in half precision, where squares above 256 overflow: export the "
            "model again with ddpm-export"
        )
    wanted = _NARROW.get(precision, _FULL)
    wrong = [name for name, kind in layers.products.items() if kind not in (wanted, _FULL)]
    if wanted != _FULL:
        wrong += [name for name in layers.in_float32 if name not in (meant or ())]
        if wanted not in layers.products.values():
            wrong = list(layers.products)  # whatever was meant
    if wrong:
        raise ParityError(
            f"{len(wrong)} of {plural(len(layers.products), 'convolution')} and matrix products are not in "
            f"{precision}, which was asked for: {_named(wrong)}; export the model again with ddpm-export"
        )


def inspected(information: str, precision: Precision) -> tuple[int, int]:
    """What the inspector says of a built engine: how many of its kernels touch the narrow type, and how many there are.

    information: its JSON, of an engine built with detailed profiling. Raises ParityError where a reduced precision
    was asked for and no kernel touches it.
    """
    try:
        entries = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        entries = []
    kernels = [text for text in map(json.dumps, entries) if "Format/Datatype" in text]
    spellings = _INSPECTED.get(precision, ())
    narrow = sum(any(word in text for word in spellings) for text in kernels)
    if spellings and kernels and not narrow:
        raise ParityError(
            f"TensorRT built an engine without one kernel in {precision}, which was asked for: this GPU or this "
            "TensorRT does not do it"
        )
    return narrow, len(kernels)


def _named(names: list[str]) -> str:
    return ", ".join(map(show, names[:5])) + f" and {len(names) - 5} more" * (len(names) > 5)
