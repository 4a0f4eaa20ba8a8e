"""What a training will take of memory, found before its first step: one step is run on tensors that hold no numbers."""

import logging
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_deploy.errors import SettingError
from ddpm_deploy.machine import memory_available, memory_limit
from ddpm_deploy.runtime.network import default_max_batch
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import new_network
from ddpm_deploy.train.diffusion import Diffusion
from ddpm_deploy.train.pictures import IMAGES
from ddpm_deploy.train.settings import Settings
from ddpm_deploy.train.world import ALONE, World

logger = logging.getLogger(__name__)

_LARGE: Final = 1 << 25  # bytes: glibc maps blocks of this size one by one, and returns them at once
_GROWS: Final = 50_000_000  # bytes: of PyTorch's threads and kernels, once they are at work
_CONVOLUTIONS: Final = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


@dataclass(frozen=True)
class Estimate:
    """Bytes that a training will take at its peak. step: of them, for a step's activations alone."""

    total: int
    step: int


def require_memory(
    spec: ModelSpec, settings: Settings, device: torch.device, images: int, world: World = ALONE
) -> None:
    """Refuse a training that takes more memory than there is, before its images are read.

    images: bytes of theirs. world: the processes that share each batch; those of this machine share its memory, and
    have a GPU each. Warns where it takes more than is free now. Raises SettingError.
    """
    settings = _of_one(settings, world)
    takes = estimate(spec, settings, device, images)
    if device.type == "cuda":
        processes = 1
        free, most = torch.cuda.mem_get_info(device)
    else:
        processes = world.local_size
        free, most = memory_available(), memory_limit()
    part, shape = _part(settings), "×".join(map(str, spec.image_shape))
    of_each = f", in each of {processes} processes" if processes > 1 else ""
    says = (
        f"training takes about {_about(takes.total)} of memory ({_about(takes.step)} of it for a step's "
        f"{'image' if part == 1 else f'{part} images'} of {shape}){of_each}"
    )
    if processes * takes.total > most:
        smaller = ["a smaller --batch-size", "--accumulate (in more parts)"] if part > 1 else []
        fewer = ["fewer processes"] if processes > 1 else []
        amp = ["--amp"] if device.type == "cuda" and not settings.amp else []  # a CPU copies more with it
        options = ", ".join([*smaller, "a smaller --image-size", "another --preset", *fewer, *amp])
        raise SettingError(f"{says}, and {_about(most)} can be used here: try {options}")
    if processes * takes.total > free:
        logger.warning("%s, and %s is free now", says, _about(free))


def _of_one(settings: Settings, world: World) -> Settings:
    """The settings as a process that has the most rows of each batch sees them."""
    rows = world.most_rows(settings.batch_size)
    return msgspec.structs.replace(settings, batch_size=rows, accumulate=min(settings.accumulate, rows))


def estimate(spec: ModelSpec, settings: Settings, device: torch.device, images: int) -> Estimate:
    """What a training takes on a device: of the GPU's own memory, or all that the process does.

    images: bytes of theirs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live, device:
        network = new_network(spec)
        weights = sum(parameter.nbytes for parameter in network.parameters())
        diffusion = Diffusion(spec, settings.loss).to(device)
        batch, part = settings.batch_size, _part(settings)
        x0, epsilon = (torch.zeros(batch, *spec.image_shape) for _ in range(2))
        y = t = torch.zeros(batch, dtype=torch.int64)
        for _ in range(min(2, settings.accumulate)):  # the second has the gradients of the first beside it
            some = x0[:part], t[:part], epsilon[:part], y[:part] if spec.num_classes else None
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                loss = diffusion.loss(network.train(), *some)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        lasting, highest = live.bytes, live.most
        live.most = 0
        if settings.sample_every:
            shown = min(IMAGES, default_max_batch(spec))
            x, y = torch.zeros(shown, *spec.image_shape), torch.zeros(shown, dtype=torch.int64)
            with torch.no_grad():
                network.eval()(x, diffusion.embedding[y], y if spec.num_classes else None)
        picture = live.most
    beside = 3 * weights  # the average, and Adam's two moments
    if device.type == "cuda":
        return Estimate(beside + max(highest, picture), highest - lasting)
    saved = lasting + 2 * weights  # a checkpoint is of copies
    return Estimate(
        _resident() + _GROWS + images + beside + max(highest, picture, saved),
        highest - lasting,
    )


def _part(settings: Settings) -> int:
    """Images that go through the network at once."""
    return -(-settings.batch_size // settings.accumulate)


class _Live(TorchDispatchMode):
    """Counts the bytes of what operators gave and somebody still holds: `bytes` now, and `most` of all.

    Of small blocks an allocator keeps a third more than is in use, as measured: it gives back large ones alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for storage in (tensor.untyped_storage() for tensor in given):
            if storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes() if storage.nbytes() >= _LARGE else storage.nbytes() * 4 // 3
                self.bytes += size
                weakref.finalize(storage, self._freed, size)
        read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        # A convolution works on copies: in an order of its own, and in float32 where a CPU has nothing narrower.
        scratch = sum(4 * tensor.numel() for tensor in (*read, *given)) if func in _CONVOLUTIONS else 0
        self.most = max(self.most, self.bytes + scratch)
        return result

    def _freed(self, size: int) -> None:
        self.bytes -= size


def _resident() -> int:
    """Bytes that this process has in memory already, PyTorch above all; where the system does not say, as measured."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 350_000_000


def _about(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"
