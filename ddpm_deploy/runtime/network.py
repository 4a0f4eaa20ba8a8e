"""What networks share: their memory, the base of those on the host, and one question asked of any of them."""

import os
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from ddpm_deploy.errors import ArtefactError, BackendError, OwnershipError
from ddpm_deploy.files import show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.device.host import Host
from ddpm_deploy.runtime.protocols import Array, Device, Labels, Network
from ddpm_deploy.spec import ModelSpec


def allocate(device: Device, spec: ModelSpec, rows: int) -> dict[str, Any]:
    """The memory of a Network: zeros, as labels of idle rows are looked up too."""
    return {
        tensor.name: device.zeros((rows, *tensor.shape), tensor.dtype)
        for tensor in (*spec.inputs, spec.output)
    }


def default_max_batch(spec: ModelSpec) -> int:
    """The largest batch on a CPU, where nothing else is said: 64, and fewer for images over 16×16.

    Throughput on a CPU stops growing there, while the memory of the activations goes on. A model that can be guided
    has room for the two rows of an image.
    """
    _, height, width = spec.image_shape
    return max(2 if spec.null_class else 1, min(64, 128 * 128 // (height * width)))


def bucket_sizes(low: int, high: int) -> list[int]:
    """The batch sizes that stand for those from low to high: powers of two, and the largest."""
    return [*(size for size in (1 << bit for bit in range(high.bit_length())) if low <= size < high), high]


def bucket_of(network: Network, batch: int) -> int:
    """The smallest bucket that holds a batch."""
    return network.buckets[bisect_left(network.buckets, batch)]


class HostNetwork(ABC):
    """A network whose memory is the host's. Follows `protocols.Network`; a backend adds `predict`.

    max_batch: rows (None: `default_max_batch`). place: where it computes, for people.
    """

    capturable = False

    def __init__(self, spec: ModelSpec, max_batch: int | None = None, place: str = "cpu") -> None:
        self.spec = spec
        self.device: Device = Host(place)
        self.max_batch = max_batch or default_max_batch(spec)
        self.buckets: Sequence[int] = range(1, self.max_batch + 1)
        self.memory: dict[str, Any] = allocate(self.device, spec, self.max_batch)
        self._closed = False

    def enqueue(self, bucket: int) -> None:
        """Predict for the leading rows."""
        require_open(not self._closed)
        self.predict(bucket)

    @abstractmethod
    def predict(self, batch: int) -> None:
        """The leading rows of x, temb (and y) → those of prediction, in `memory`."""

    def close(self) -> None:
        """Free what the backend holds."""
        self._closed = True


def require_open(is_open: bool) -> None:
    """Raise BackendError where a model was closed."""
    if not is_open:
        raise BackendError("this model is closed: load it again")


def require_process(process: int) -> None:
    """Raise OwnershipError in another process than that in which something was loaded: a fork of it."""
    if os.getpid() != process:
        raise OwnershipError(
            "this process was forked after the model was loaded, and a backend does not live on in a fork: load "
            'the model in the child, or start it with multiprocessing\'s "spawn"'
        )


def not_finite() -> BackendError:
    """The error of a slot that is broken."""
    return BackendError(
        "the network gave numbers that are not finite, so the images are worthless: check the model with ddpm-verify"
    )


# An input or output of a graph: its name, the name of its type, and its shape, None where a size is not fixed.
Argument = tuple[str, str, Sequence[int | None]]


def require_interface(model: ModelFile, inputs: Sequence[Argument], outputs: Sequence[Argument]) -> None:
    """Raise ArtefactError unless a graph has the inputs and the output that its spec says, and any batch."""
    wanted = [
        [(tensor.name, tensor.dtype, (None, *tensor.shape)) for tensor in side]
        for side in (model.spec.inputs, [model.spec.output])
    ]
    got = [
        [(name, dtype, (None, *shape[1:]) if shape else ()) for name, dtype, shape in side]
        for side in (inputs, outputs)
    ]
    by_name = itemgetter(0)
    if any(
        sorted(one, key=by_name) != sorted(other, key=by_name) for one, other in zip(got, wanted, strict=True)
    ):
        raise ArtefactError(
            f"{model.name} does not fit its ModelSpec: it has {show(_interface(got))}, and {_interface(wanted)} is "
            "needed: export it again with ddpm-export"
        )
    if any(shape[0] is not None for _, _, shape in (*inputs, *outputs)):
        raise ArtefactError(f"{model.name} has a fixed batch dimension: export it again with ddpm-export")


def _interface(sides: Sequence[Sequence[Argument]]) -> str:
    texts = [
        ", ".join(
            f"{name} {dtype} ({', '.join('B' if size is None else str(size) for size in shape)})"
            for name, dtype, shape in side
        )
        for side in sides
    ]
    return " → ".join(text or "nothing" for text in texts)


def time_call(network: Network, batch: int) -> float:
    """Seconds that the network takes for a batch: the second of two calls, as the first warms it up."""
    bucket, device = bucket_of(network, batch), network.device
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        network.enqueue(bucket)
        device.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def ask(network: Network, x: Array, temb: Array, y: Labels | None = None) -> Array:
    """What a network predicts for x (B, C, H, W), temb (B, D) and, of a conditional one, labels y (B,)."""
    require_open(bool(network.memory))
    batch, device = len(x), network.device
    given = {"x": x, "temb": temb} | ({"y": y} if "y" in network.memory else {})
    for name, array in given.items():
        device.upload(np.ascontiguousarray(array), network.memory[name][:batch])
    network.enqueue(bucket_of(network, batch))
    prediction: Array = device.fetch(network.memory["prediction"][:batch])
    return prediction
