"""A network in PyTorch on a GPU, in the memory and on the stream of the chain, so that one graph holds both."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.network import allocate
from ddpm_deploy.runtime.protocols import Device
from ddpm_deploy.spec import ModelSpec


class CapturedNetwork:
    """Follows `protocols.Network`. network: as of `TorchNetwork`; it is copied to the GPU.

    PyTorch keeps what a graph's temporaries were made of for this stream alone; so nothing but `enqueue` may make
    tensors there, and that memory goes back when it is closed, after the graphs.
    """

    capturable = True

    def __init__(self, network: nn.Module, spec: ModelSpec, max_batch: int) -> None:
        cuda = Cuda()
        self.spec, self.max_batch = spec, max_batch
        self.device: Device = cuda
        self.buckets: Sequence[int] = (max_batch,)
        self.memory: dict[str, Any] = allocate(self.device, spec, max_batch)
        self.device.synchronize()  # before another's stream reads it
        self._network: nn.Module | None = copy.deepcopy(network).requires_grad_(False).eval().cuda()
        torch.cuda.synchronize()
        self._inputs = [from_dlpack(self.memory[tensor.name]) for tensor in spec.inputs]
        self._output = from_dlpack(self.memory[spec.output.name])
        self._stream = torch.cuda.ExternalStream(cuda.stream)  # type: ignore[no-untyped-call]

    def enqueue(self, bucket: int) -> None:
        """Start to predict for the leading rows."""
        self.device.start(lambda: self._predict(bucket))

    @torch.no_grad()
    def _predict(self, bucket: int) -> None:
        assert self._network is not None
        with torch.cuda.stream(self._stream):
            self._output[:bucket].copy_(self._network(*(tensor[:bucket] for tensor in self._inputs)))

    def close(self) -> None:
        """Free the memory, CuPy's and PyTorch's."""
        self.device.synchronize()
        self.memory, self._inputs, self._network = {}, [], None
        self._output = torch.empty(0)
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that there ever was
        torch.cuda.empty_cache()
        self.device.release()
