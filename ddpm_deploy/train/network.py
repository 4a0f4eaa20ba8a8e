"""PyTorch as a network of the runtime's: the parity reference."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn

from ddpm_deploy.errors import BackendError, SettingError, first_line
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings
from ddpm_deploy.runtime.network import HostNetwork
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import load_network


class TorchNetwork(HostNetwork):
    """A network in PyTorch eager, in full float32 (no TF32). Its memory is the host's, wherever it computes.

    network: in the spec's shape; put into evaluation mode. device: a torch device by name.
    threads: torch's own, for the whole process (None: as they are, and no more than it may use).
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        self._device = torch_device(device)
        super().__init__(spec, max_batch, place=str(self._device))
        torch.set_num_threads(threads or min(torch.get_num_threads(), cpu_threads()))
        self._network: nn.Module | None = network.to(self._device).eval()
        # The same memory as the arrays.
        self._inputs = [torch.from_numpy(self.memory[tensor.name]) for tensor in spec.inputs]
        self._prediction = torch.from_numpy(self.memory["prediction"])

    @classmethod
    def open(cls, model: ModelFile, settings: LoadSettings) -> Self:
        """Load a network of a checkpoint."""
        network, spec = load_network(model, settings.weights)
        device = settings.device or "cpu"
        return cls(network, spec, device=device, threads=settings.threads, max_batch=settings.max_batch)

    @torch.no_grad()  # not inference_mode: `export.precision` watches the operators
    def predict(self, batch: int) -> None:
        """Predict for the leading rows."""
        assert self._network is not None
        try:
            with full_float32():
                inputs = [tensor[:batch].to(self._device) for tensor in self._inputs]
                self._prediction[:batch] = self._network(*inputs)
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed on a batch of {batch}: {first_line(error)}") from error

    def close(self) -> None:
        """Free the network."""
        super().close()
        self._network = None


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off for a while: training in the same process may want it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def torch_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one. Raises SettingError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # it knows the names of many that it cannot compute on
    except Exception as error:  # each kind of device fails in its own way
        # Of a GPU there may be something to learn; what PyTorch says of others is long, and about itself.
        why = f" ({first_line(error).partition('. ')[0]})" if name.startswith("cuda") else ""
        choose = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise SettingError(f"PyTorch cannot use device {name!r} here{why}: choose {choose}") from error
    return device
