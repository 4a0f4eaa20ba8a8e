"""A network on a device, and the same as a Denoiser: with its buffers mirrored on the host."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ddpm_deploy.errors import BackendError
from ddpm_deploy.runtime.denoiser import allocate
from ddpm_deploy.runtime.device import Device
from ddpm_deploy.spec import ModelSpec


class DeviceNetwork(Protocol):
    """A network that owns its input and output memory on a device, from the first call to the last.

    buckets: the batch sizes that it runs, ascending; the last is max_batch or more. memory: "x" (B, C, H, W), "temb"
    (B, D), "y" (B,) int64 of a class-conditional model, "prediction" (B, *spec.prediction_shape), with B the last
    bucket; all others float32. capturable: whether what `enqueue` starts can be captured and replayed.
    """

    spec: ModelSpec
    device: Device
    max_batch: int
    buckets: Sequence[int]
    memory: dict[str, Any]
    capturable: bool

    def enqueue(self, bucket: int) -> None:
        """Start to predict for the leading rows, as many as the bucket has, on the device's stream."""

    def close(self) -> None:
        """Free what it holds. Nothing may be called afterwards; closing again does nothing."""


def bucket_of(network: DeviceNetwork, batch: int) -> int:
    """The smallest bucket that holds a batch."""
    return network.buckets[bisect_left(network.buckets, batch)]


def allocate_on(device: Device, spec: ModelSpec, rows: int) -> dict[str, Any]:
    """The memory of a DeviceNetwork, zeroed, as labels of idle rows are looked up too."""
    shapes: dict[str, tuple[int, ...]] = {"x": spec.image_shape, "temb": (spec.embedding.dim,)}
    if spec.num_classes:
        shapes["y"] = ()
    shapes["prediction"] = spec.prediction_shape
    memory = {}
    for name, shape in shapes.items():
        zeros = np.zeros((rows, *shape), np.int64 if name == "y" else np.float32)
        memory[name] = device.empty(zeros.shape, zeros.dtype)
        device.upload(zeros, memory[name])
    return memory


class Mirrored:
    """A DeviceNetwork for whoever works on the host: parity, guidance, noise of a caller's own. Follows
    `denoiser.Denoiser`, at the cost of a copy each way."""

    def __init__(self, network: DeviceNetwork) -> None:
        self.network = network
        self.spec, self.max_batch, self.device = network.spec, network.max_batch, network.device.name
        self.x, self.temb, self.y, self.prediction = allocate(self.spec, self.max_batch)
        self._inputs = {"x": self.x, "temb": self.temb} | ({"y": self.y} if self.spec.num_classes else {})
        self._closed = False

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        if self._closed:
            raise BackendError("this model is closed: load it again")
        device, memory = self.network.device, self.network.memory
        for name, array in self._inputs.items():
            device.upload(array[:batch], memory[name][:batch])
        self.network.enqueue(bucket_of(self.network, batch))
        device.download(memory["prediction"][:batch], self.prediction[:batch])
        device.synchronize()

    def close(self) -> None:
        """Free the network."""
        self._closed = True
        self.network.close()
