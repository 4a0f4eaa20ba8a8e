"""A foreign file → tensors by name: read as data, never executed, and unwrapped from whatever is around them."""

import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.train.checkpoint import StateDict, require_intact, without_wrapper

SAFETENSORS: Final = ".safetensors"
Knows = Callable[[Collection[str]], bool]
_MOST_DEPTH: Final = 4  # of entries in entries
_MOST_FOUND: Final = 64  # sets of weights in one file
_MOST_AROUND: Final = 3  # names before the network's own, as in model.denoise_fn.conv_in.weight
_OPTIMIZERS: Final = ("opt", "optim", "optimizer", "optimizer_states", "scaler", "sched", "scheduler")
_AVERAGES: Final = {"ema", "average", "averaged", "avg", "shadow", "swa"}
_STEPS: Final = ("step", "global_step", "iteration", "iter", "steps")
_MAGIC: Final = b"\x8a\nl\xfc\x9c"  # that PyTorch's files began with before 1.6
_INTEGERS: Final = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Weights:
    """One network's tensors out of a file.

    name: the file's, for messages. key: which of its entries they are; "": the file itself. state: by name, without
    what stands before all names. others: the other entries that hold weights. content: all that the file holds.
    averaged: whether they are an average by the name of their entry, or of the file where that is none. step: of the
    training, 0 where the file has none. around: what stood before the names of the network, in a file that holds more.
    aside: what else its entry holds, by name. unnamed: what seems to hold an average that was not taken.
    """

    name: str
    key: str
    state: StateDict
    others: tuple[str, ...] = ()
    content: Any = None
    averaged: bool = False
    step: int = 0
    around: str = ""
    aside: StateDict = field(default_factory=dict)
    unnamed: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def shape(self, name: str, axes: int | None = None) -> tuple[int, ...]:
        """Of a tensor. Raises ArtefactError where it is missing, or has not so many axes."""
        if name not in self.state:
            raise ArtefactError(f"{self.name} is not whole: {show(name)} is missing from its weights")
        shape = tuple(self.state[name].shape)
        if axes is not None and len(shape) != axes:
            raise ArtefactError(f"{self.name}: {show(name)} is {shape}, and {axes} axes are needed")
        return shape

    def described(self) -> tuple[str, ...]:
        """Which of a file's tensors these are, where it has others, for people."""
        said = []
        if self.key:
            others = f" (others, by --key: {', '.join(map(show, self.others))})" if self.others else ""
            averaged = ", the averaged ones" if self.averaged else ""
            said.append(f"weights of the entry {show(self.key)}{averaged}{others}")
        if self.aside:
            more = f" and {len(self.aside) - 3} more" if len(self.aside) > 3 else ""
            said.append(
                f"weights under {show(self.around)}; left aside: {', '.join(map(show, list(self.aside)[:3]))}{more}"
            )
        if self.unnamed:
            said.append(
                f"not averaged: {show(self.unnamed)} seems to hold an average, by no names of a network; where it was "
                "trained, save that as a state_dict"
            )
        return tuple(said)


def read_weights(path: Path, key: str | None = None, knows: Knows | None = None) -> Weights:
    """The weights in a file of PyTorch's or a .safetensors.

    key: which entry of the file, as "ema" or "4" (None: the averaged weights where it has some by their name).
    knows: whether a network has such names. With it, of several entries the first that it knows is taken, and weights
    are found under the names of what is around the network (denoise_fn.conv_in.weight).

    Raises ArtefactError where the file is broken, unsafe, or holds no weights; SettingError where it has no such entry.
    """
    require_file(path)
    name, content = show(path), load_tensors(path)
    found = dict(islice(_candidates(content, "", _MOST_DEPTH, set()), _MOST_FOUND))
    if not found:
        raise ArtefactError(f"{name} holds no weights by name: the state_dict of a network is needed")
    if key is not None and key not in found:
        known = ", ".join(show(one) for one in found if one)
        choose = (
            f"choose from {known}"
            if known
            else "it is one set of weights without entries, so leave --key out"
        )
        raise SettingError(f"{name} has no weights under --key {show(key)}: {choose}")
    averages = _averages(content, list(found))
    order = [key] if key is not None else list(dict.fromkeys([*averages, *found]))
    chosen, around, state = _first_known(found, order, knows)
    _require_dense(state, path)
    averaged = chosen in averages or _is_average(
        around if around or chosen else path.stem
    )  # ema_0.9999_500000.pt
    aside = {n: t for n, t in found[chosen].items() if around and not n.startswith(around)}
    return Weights(
        name=name,
        key=chosen,
        state={n: _own(t) for n, t in state.items()},
        others=tuple(other for other in found if other != chosen),
        content=content,
        averaged=averaged,
        step=_step(content),
        around=around,
        aside=aside,
        unnamed="" if averaged or averages or key is not None else _unnamed_average(content, aside),
    )


def _own(tensor: Tensor) -> Tensor:
    """In memory of its own, as the file that it is mapped from may change; numbers with a point in float32."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def load_tensors(path: Path) -> Any:
    """All that a file holds, by what it begins with and not by its name.

    Raises ArtefactError where it is broken, or holds anything but data.
    """
    name = show(path)
    try:
        if _is_safetensors(path):
            return require("safetensors.torch", "export").load_file(path)
        _refuse_others(path)
        if path.suffix.lower() == SAFETENSORS:
            raise ArtefactError(
                f"{name} is not a whole, safe file of weights of its kind: where torch.save wrote it, name it .pt"
            )
        with warnings.catch_warnings():  # of layouts that are refused below
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(path):
                require_intact(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(path, map_location="cpu", weights_only=True)  # of PyTorch before 1.6
    except ArtefactError:
        raise
    except Exception as error:  # torch's reader of a hostile file raises nearly anything
        if held := re.search(r"GLOBAL ([^\s]{1,100}) was not an allowed global", str(error)):
            raise ArtefactError(
                f"{name} holds an object of {show(held[1])}, and code would run to read it, so it was not read: where "
                "it was trained, save the weights alone, as torch.save(model.state_dict(), FILE)"
            ) from error
        told = first_line(error)
        if of_torch := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
            told = of_torch[1]
        elif told.startswith("Weights only load failed"):  # and goes on with advice to load it all the same
            told = "it holds more than weights"
        reason = show(told[:200]).rstrip(". ")
        raise ArtefactError(
            f"{name} is not a whole, safe file of weights: {reason}. Nothing in it was executed; save its state_dict "
            "alone, or copy it again"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Eight bytes with the length of a header, and the header; by its name too, where that length is wrong."""
    with path.open("rb") as file:
        begins = file.read(9)
    whole = int.from_bytes(begins[:8], "little") <= path.stat().st_size - 8
    return begins[8:] == b"{" and (whole or path.suffix.lower() == SAFETENSORS)


def _refuse_others(path: Path) -> None:
    """Raise ArtefactError where a file is of another kind by what it begins with, or holds."""
    with path.open("rb") as file:
        begins = file.read(512)
    name, text = show(path), begins.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise ArtefactError(f"{name} is a pointer of git-lfs, in place of the file: run git lfs pull there")
    if text.startswith((b"<", b"{")):
        raise ArtefactError(
            f"{name} is a page of text ({show(begins[:60].decode(errors='replace'))}…), as a server sends in place of "
            "a file: download it again, and look at the page where that fails"
        )
    if begins[257:262] == b"ustar" or begins.startswith(
        (b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
    ):
        raise ArtefactError(
            f"{name} is an archive of files: unpack it, and name the file with the weights in it"
        )
    if re.match(rb"\x80[\x02-\x05]", begins) and _MAGIC not in begins[:32]:
        raise ArtefactError(
            f"{name} is a pickle of Python objects, as EDM's and StyleGAN's are, and code would run to read it, so it "
            "was not read: where it was trained, save the weights alone, as torch.save(model.state_dict(), FILE)"
        )
    if begins.startswith(b"PK"):
        _refuse_archives(path)


def _refuse_archives(path: Path) -> None:
    """Raise ArtefactError where a zip archive is cut short, or is none of weights."""
    name = show(path)
    if not zipfile.is_zipfile(path):
        raise ArtefactError(f"{name} is cut short, as by a download that broke off: copy it again")
    with zipfile.ZipFile(path) as archive:
        inside = archive.namelist()
    parts = {one.partition("/")[2] for one in inside}
    if "constants.pkl" in parts:
        raise ArtefactError(
            f"{name} is a program of TorchScript, and not weights: save them alone, as "
            "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if "data.pkl" not in parts:
        raise ArtefactError(
            f"{name} is an archive of files ({show(', '.join(inside[:3])[:100])}) and none of PyTorch's: unpack it, "
            "and name the file with the weights in it"
        )


def _candidates(content: Any, key: str, depth: int, seen: set[int]) -> Iterator[tuple[str, StateDict]]:
    """The state dicts in what a file holds, by the entries that lead to each; entries may lead in circles."""
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if all(isinstance(name, str) for name in tensors) and any(
            name.endswith(".weight") for name in tensors
        ):
            yield key, tensors
            return
        entries = [(str(name), value) for name, value in content.items() if isinstance(name, str | int)]
    elif isinstance(content, list | tuple):
        entries = [(str(number), value) for number, value in enumerate(content)]
    else:
        return
    if depth == 0 or id(content) in seen:
        return
    seen.add(id(content))
    for name, value in entries:
        if name not in _OPTIMIZERS:
            yield from _candidates(value, f"{key}.{name}" if key else name, depth - 1, seen)


def _averages(content: Any, keys: list[str]) -> list[str]:
    """The entries with averaged weights: by their last name first, as ema.online_model is not averaged."""
    if isinstance(content, list) and len(content) == 5 and keys == ["0", "4"]:
        return ["4"]  # ermongroup's [network, optimiser, epoch, step, average]
    last = [key for key in keys if _is_average(key.rpartition(".")[2])]
    return [*last, *(key for key in keys if _is_average(key) and key not in last)]


def _unnamed_average(content: Any, aside: StateDict) -> str:
    """What holds tensors and is an average by its name, as torch_ema's list of them; "": there is none."""
    entries = content.items() if isinstance(content, dict) else ()
    held = [str(name) for name, value in entries if isinstance(value, dict | list)]
    return next((name for name in (*held, *aside) if _is_average(name)), "")


def _is_average(key: str) -> bool:
    return not _AVERAGES.isdisjoint(re.split(r"[^a-z]+", key.lower()))


def _first_known(
    found: dict[str, StateDict], order: list[str], knows: Knows | None
) -> tuple[str, str, StateDict]:
    """(entry, what stands before its names, weights) of the first entry that is known; else of the first."""
    for key in order if knows else ():
        state = without_wrapper(found[key])
        if knows and knows(state):
            return key, "", state
        around = _around(found[key], knows) if knows else None
        if around:
            return (
                key,
                around,
                {n.removeprefix(around): t for n, t in found[key].items() if n.startswith(around)},
            )
    return order[0], "", without_wrapper(found[order[0]])


def _around(state: StateDict, knows: Knows) -> str | None:
    """What stands before the names of a network that is known, the averaged one first; None: there is none."""
    inside: dict[str, set[str]] = {}
    for name in state:
        parts = name.split(".", _MOST_AROUND)
        for depth in range(1, len(parts)):
            inside.setdefault(".".join(parts[:depth]) + ".", set()).add(".".join(parts[depth:]))
    known = [around for around, names in inside.items() if knows(names)]
    return next((around for around in known if _is_average(around)), known[0] if known else None)


def _step(content: Any) -> int:
    """The training's steps, where the file says them."""
    if isinstance(content, dict):
        said = [content[name] for name in _STEPS if name in content]
    else:
        said = content[3:4] if isinstance(content, list) else []
    step = said[0] if said else 0
    return step if type(step) is int and 0 <= step < 2**53 else 0


def _require_dense(state: StateDict, path: Path) -> None:
    """Raise ArtefactError where a tensor is anything but numbers in the file.

    One that repeats a few numbers is small in the file, and may be of any size in use; so may many of the same numbers.
    """
    name, size, total = show(path), path.stat().st_size, 0
    for key, tensor in state.items():
        dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not dense or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
            raise ArtefactError(f"{name}: {show(key)} is not a dense tensor")
        if not tensor.is_floating_point() and tensor.dtype not in _INTEGERS:
            raise ArtefactError(f"{name}: {show(key)} is of {tensor.dtype}, and not of real numbers")
        total += (bytes_of := tensor.numel() * tensor.element_size())
        if bytes_of > size:
            raise ArtefactError(f"{name}: {show(key)} is larger than the file that it is in")
    if total > 2 * size:  # weights that are tied are twice in it
        raise ArtefactError(f"{name}: its weights are together larger than the file that they are in")
