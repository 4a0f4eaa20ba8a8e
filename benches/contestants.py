"""What our backends are timed against, each in a process of its own (`ddpm_deploy.bench.worker`)."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from ddpm_deploy.bench.worker import Backend, Contestant, serve
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import open_model
from ddpm_deploy.noise import AddressedNoise
from ddpm_deploy.runtime.device.host import HostStepper
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request

Feeds = dict[str, Array]
BLOCK: Final = 64  # steps: noise is made for so many at once, at the most
PEAK: Final = 2048  # rows and columns of the matrices that the machine's peak is measured by


class Ours(Backend):
    """A backend of ours, which also says where its time goes."""

    def parts(self, batch: int, blocks: int) -> dict[str, list[float]]:
        """Seconds a step in the network, in making noise, in the update, and in all, for each block of steps, of
        ancestral sampling: the chain of all timesteps."""
        chain, slots = self.chain, np.arange(batch)
        chain.clear()
        chain.start(slots, Request(count=batch, seed=0).checked(self.network.spec))
        spent = dict.fromkeys(("network", "noise", "update", "all"), 0.0)
        found: dict[str, list[float]] = {name: [] for name in spent}
        with (
            _timed(self.network, "enqueue", spent, "network"),
            _timed(AddressedNoise, "fill", spent, "noise"),
            _timed(HostStepper, "_update", spent, "update"),
            _timed(chain, "step", spent, "all"),
        ):
            for block in range(blocks + 1):
                spent.update(dict.fromkeys(spent, 0.0))
                for _ in range(BLOCK):
                    chain.step()
                spent["update"] -= spent["noise"]
                for name, seconds in spent.items() if block else ():  # the first is not counted
                    found[name].append(seconds / BLOCK)
        return found


@contextmanager
def _timed(owner: Any, method: str, spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that a method takes to what was spent under a name."""
    original = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments)
        spent[name] += time.perf_counter() - start
        return result

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, original)


class Eager(Backend):
    """PyTorch eager under our chain. channels_last: the memory format of its weights."""

    def __init__(self, path: str, batches: list[int], channels_last: bool = False) -> None:
        import torch

        super().__init__(path, "torch", None, None, batches)
        if channels_last:
            for parameter in self.network._network.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class Compiled(Eager):
    """torch.compile, for each batch size anew."""

    def __init__(self, path: str, batches: list[int]) -> None:
        import torch

        super().__init__(path, batches)
        self.network._network = torch.compile(self.network._network, dynamic=False)


class Pipeline:
    """diffusers' DDPMPipeline, from its folder: what a user of it waits for."""

    def __init__(self, path: str) -> None:
        from diffusers import DDPMPipeline

        self._pipeline: Any = DDPMPipeline.from_pretrained(path)
        self._pipeline.set_progress_bar_config(disable=True)

    def turn(self, batch: int, steps: int) -> float:
        """Whole calls."""
        call = self._pipeline
        call(batch_size=batch, num_inference_steps=1, output_type="np")
        start = time.perf_counter()
        if steps:
            call(batch_size=batch, num_inference_steps=steps, output_type="np")
        return (time.perf_counter() - start) / max(steps, 1)


class _Bare(ABC):
    """An engine called with the same inputs again and again, with no chain around it."""

    def __init__(self, path: str) -> None:
        self.spec = open_model(path).spec

    @abstractmethod
    def call(self, batch: int) -> Callable[[Feeds], object]:
        """What takes inputs of a batch."""

    def turn(self, batch: int, steps: int) -> float:
        """Calls."""
        noise = np.random.default_rng(0).standard_normal((batch, *self.spec.image_shape), np.float32)
        feeds = {"x": noise, "temb": self.spec.embedding.table(1)[[0] * batch]}
        call = self.call(batch)
        call(feeds)
        start = time.perf_counter()
        for _ in range(steps):
            call(feeds)
        return (time.perf_counter() - start) / max(steps, 1)


class BareOnnxRuntime(_Bare):
    """InferenceSession.run."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        # As ours: threads that spin on after their turn would slow down whoever comes next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(self, batch: int) -> Callable[[Feeds], object]:
        """It takes any batch."""
        return lambda feeds: self._session.run(None, feeds)


class BareOpenvino(_Bare):
    """A model compiled for each batch, and one request of it. hint: the precision that is asked for."""

    def __init__(self, path: str, hint: str) -> None:
        super().__init__(path)
        import openvino

        self._core, self._path, self._hint = openvino.Core(), path, hint
        self._requests: dict[int, Any] = {}

    def call(self, batch: int) -> Callable[[Feeds], object]:
        """Compile it for a new batch."""
        if batch not in self._requests:
            model = self._core.read_model(self._path)
            model.reshape({tensor.name: [batch, *tensor.shape] for tensor in self.spec.inputs})
            options = {"INFERENCE_PRECISION_HINT": self._hint, "INFERENCE_NUM_THREADS": cpu_threads()}
            self._requests[batch] = self._core.compile_model(model, "CPU", options).create_infer_request()
        request = self._requests[batch]
        return lambda feeds: request.infer(feeds)


class Peak:
    """torch.mm of two square matrices, as a measure of the machine. dtype: by name."""

    def __init__(self, dtype: str) -> None:
        import torch

        torch.set_num_threads(cpu_threads())
        self._matrix = torch.randn(PEAK, PEAK).to(getattr(torch, dtype))

    def turn(self, batch: int, steps: int) -> float:
        """Products."""
        import torch

        torch.mm(self._matrix, self._matrix)
        start = time.perf_counter()
        for _ in range(steps):
            torch.mm(self._matrix, self._matrix)
        return (time.perf_counter() - start) / max(steps, 1)


_KINDS: Final[dict[str, Callable[..., Contestant]]] = {
    kind.__name__: kind for kind in (Ours, Eager, Compiled, Pipeline, BareOnnxRuntime, BareOpenvino, Peak)
}


def _make(kind: str, **given: Any) -> Contestant:
    return _KINDS[kind](**given)


if __name__ == "__main__":
    serve(_make)
