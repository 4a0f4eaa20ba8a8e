"""A network on a device, and the same as a Denoiser: with its buffers mirrored on the host."""

from typing import Any, Protocol

from ddpm_deploy.errors import BackendError
from ddpm_deploy.runtime.denoiser import allocate
from ddpm_deploy.runtime.device import Device
from ddpm_deploy.spec import ModelSpec


class DeviceNetwork(Protocol):
    """A network that owns its input and output memory on a device, from the first call to the last.

    memory: "x" (B, C, H, W), "temb" (B, D), "y" (B,) int64 of a class-conditional model, "prediction"
    (B, *spec.prediction_shape), with B at least max_batch; all others float32. capturable: whether what `enqueue`
    starts can be captured and replayed.
    """

    spec: ModelSpec
    device: Device
    max_batch: int
    memory: dict[str, Any]
    capturable: bool

    def enqueue(self, batch: int) -> None:
        """Start to predict for the leading `batch` rows, on the device's stream."""

    def close(self) -> None:
        """Free what it holds. Nothing may be called afterwards; closing again does nothing."""


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
        self.network.enqueue(batch)
        device.download(memory["prediction"][:batch], self.prediction[:batch])
        device.synchronize()

    def close(self) -> None:
        """Free the network."""
        self._closed = True
        self.network.close()
