"""A foreign file → tensors by name: read as data, never executed, and unwrapped from whatever is around them."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.train.checkpoint import StateDict, require_intact, without_wrapper

SAFETENSORS: Final = ".safetensors"
_MOST_DEPTH: Final = 3  # of entries in entries
_OPTIMIZERS: Final = ("opt", "optim", "optimizer", "scaler", "sched", "scheduler")


@dataclass(frozen=True)
class Weights:
    """One network's tensors out of a file.

    name: the file's, for messages. key: which of its entries they are; "": the file itself. state: by name, without
    what wrappers put before the names. others: the other entries that hold weights.
    """

    name: str
    key: str
    state: StateDict
    others: tuple[str, ...] = ()
    content: Any = None  # all that the file holds beside them

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor. Raises ArtefactError where it is missing."""
        if name not in self.state:
            raise ArtefactError(f"{self.name} is not whole: {show(name)} is missing from its weights")
        return tuple(self.state[name].shape)


def read_weights(path: Path, key: str | None = None) -> Weights:
    """The weights in a file of PyTorch's or a .safetensors.

    key: which entry of the file, as "ema" or "4" (None: the averaged weights where it has some by their name).

    Raises ArtefactError where the file is broken, unsafe, or holds no weights; SettingError where it has no such entry.
    """
    require_file(path)
    name, content = show(path), load_tensors(path)
    found = dict(_candidates(content, ""))
    if not found:
        raise ArtefactError(f"{name} holds no weights by name: the state_dict of a network is needed")
    chosen = key if key is not None else _average(list(found))
    if chosen not in found:
        known = ", ".join(map(show, found)) or "the file itself"
        raise SettingError(f"{name} has no weights under --key {chosen}: choose from {known}")
    state = {name: _dense(name, tensor, path) for name, tensor in without_wrapper(found[chosen]).items()}
    others = tuple(other for other in found if other != chosen)
    return Weights(name, chosen, state, others, content)


def load_tensors(path: Path) -> Any:
    """All that a file holds. Raises ArtefactError where it is broken, or holds anything but data."""
    name = show(path)
    try:
        if path.suffix.lower() == SAFETENSORS:
            return require("safetensors.torch", "export").load_file(path)
        if zipfile.is_zipfile(path):
            require_intact(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)  # of PyTorch before 1.6
    except Exception as error:  # torch's reader of a hostile file raises nearly anything
        raise ArtefactError(
            f"{name} is not a whole, safe file of weights: {first_line(error)}. Nothing in it was executed; where it "
            "holds objects beside tensors, save its state_dict alone"
        ) from error


def _candidates(content: Any, key: str) -> Iterator[tuple[str, StateDict]]:
    """The state dicts in what a file holds, by the entries that lead to each."""
    if key.count(".") >= _MOST_DEPTH:
        return
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if any(str(name).endswith(".weight") for name in tensors) and all(
            isinstance(n, str) for n in tensors
        ):
            yield key, tensors
            return
        entries = [(str(name), value) for name, value in content.items()]
    elif isinstance(content, list | tuple):
        entries = [(str(number), value) for number, value in enumerate(content)]
    else:
        return
    for name, value in entries:
        if name not in _OPTIMIZERS:
            yield from _candidates(value, f"{key}.{name}" if key else name)


def _average(keys: list[str]) -> str:
    """The entry with the averaged weights, by its name; without one, the first."""
    return next((key for key in keys if "ema" in key.lower().replace(".", "_").split("_")), keys[0])


def _dense(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor in float32. One that repeats a few numbers is small in the file, and may be of any size in use."""
    if tensor.is_sparse or tensor.is_quantized or tensor.is_complex():
        raise ArtefactError(f"{show(path)}: {show(name)} is not a dense tensor of real numbers")
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise ArtefactError(f"{show(path)}: {show(name)} is larger than the file that it is in")
    return tensor.float() if tensor.is_floating_point() else tensor
