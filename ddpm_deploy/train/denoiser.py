"""PyTorch as a Denoiser: the parity reference."""

from pathlib import Path

import torch

from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.runtime.denoiser import allocate, default_max_batch
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import load_network
from ddpm_deploy.train.unet import UNet


class TorchDenoiser:
    """A network in PyTorch eager, in full float32 (no TF32). Follows `runtime.denoiser.Denoiser`.

    network: in the spec's shape; put into evaluation mode. device: a torch device by name.
    threads: torch's own, for the whole process (None: as they are).
    """

    def __init__(
        self,
        network: UNet,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self.max_batch = max_batch or default_max_batch(spec)
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self._network = network.to(torch_device(device)).eval()
        self.x, self.temb, self.prediction = allocate(spec, self.max_batch)
        # The same memory as the arrays.
        self._x, self._temb, self._prediction = map(torch.from_numpy, (self.x, self.temb, self.prediction))

    @classmethod
    def load(
        cls, path: Path, *, device: str = "cpu", threads: int | None = None, max_batch: int | None = None
    ) -> "TorchDenoiser":
        """The averaged network of a checkpoint."""
        network, spec = load_network(path)
        return cls(network, spec, device=device, threads=threads, max_batch=max_batch)

    @torch.inference_mode()
    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        try:
            x, temb = self._x[:batch].to(self.device), self._temb[:batch].to(self.device)
            self._prediction[:batch] = self._network(x, temb)
        except RuntimeError as error:
            raise BackendError(
                f"PyTorch failed on a batch of {batch}: {str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Free the network."""
        del self._network


def torch_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one. Raises SettingError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
