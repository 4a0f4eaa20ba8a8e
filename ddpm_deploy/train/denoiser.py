"""PyTorch as a Denoiser: the parity reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ddpm_deploy.errors import BackendError, SettingError, first_line
from ddpm_deploy.runtime.denoiser import allocate, default_max_batch
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import load_network


class TorchDenoiser:
    """A network in PyTorch eager, in full float32 (no TF32). Follows `runtime.denoiser.Denoiser`.

    network: in the spec's shape; put into evaluation mode. device: a torch device by name.
    threads: torch's own, for the whole process (None: as they are).
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
        self.spec = spec
        self.max_batch = max_batch or default_max_batch(spec)
        if threads:
            torch.set_num_threads(threads)
        self._device = torch_device(device)
        self.device = str(self._device)
        self._network: nn.Module | None = network.to(self._device).eval()
        self.x, self.temb, self.y, self.prediction = allocate(spec, self.max_batch)
        # The same memory as the arrays.
        self._inputs = [torch.from_numpy(array) for array in (self.x, self.temb)]
        if spec.num_classes:
            self._inputs.append(torch.from_numpy(self.y))
        self._prediction = torch.from_numpy(self.prediction)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> "TorchDenoiser":
        """A network of a checkpoint, by default the averaged one."""
        network, spec = load_network(path, weights)
        return cls(network, spec, device=device, threads=threads, max_batch=max_batch)

    @torch.no_grad()  # not inference_mode: `export.precision` watches the operators
    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        if self._network is None:
            raise BackendError("this model is closed: load it again")
        try:
            with _full_float32():
                inputs = [tensor[:batch].to(self._device) for tensor in self._inputs]
                self._prediction[:batch] = self._network(*inputs)
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed on a batch of {batch}: {first_line(error)}") from error

    def close(self) -> None:
        """Free the network. Closing again does nothing."""
        self._network = None


@contextmanager
def _full_float32() -> Iterator[None]:
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
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device
