"""A network of the user's own: their function that makes it, their weights, and their spec file.

The function is imported because the user names it, and it is as theirs as any program that they run; the weights are
read as data all the same.
"""

import difflib
import importlib
import inspect
import sys
import sysconfig
import tomllib
import traceback
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddpm_deploy.embedding import Embedding
from ddpm_deploy.errors import ArtefactError, SettingError, first_line
from ddpm_deploy.files import require_file, require_suffix, show
from ddpm_deploy.importers.weights import Weights, read_weights
from ddpm_deploy.schedule import BetaSchedule
from ddpm_deploy.spec import ModelSpec, Sampling
from ddpm_deploy.train.checkpoint import misfits, require_finite
from ddpm_deploy.words import PREDICTIONS, SCHEDULES, SOLVERS, SPACINGS, VARIANCES

_SUFFIXES: Final = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_MOST_BYTES: Final = 1 << 20  # of a spec file
_LIBRARIES: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_TEMPLATE: Final = "ddpm-export --spec-template prints one to start from"

# The keys of a spec file that must be told, as nothing in a network tells them, and those that need not be.
_NEEDED: Final = (
    "image_shape",
    "timesteps",
    "schedule",
    "prediction",
    "variance",
    "value_range",
    "embedding",
)
_FREE: Final = ("num_classes", "class_names", "null_class", "clip", "data_range", "sampling")


def load_module(factory: str, path: Path, key: str | None = None) -> tuple[nn.Module, Weights]:
    """The network that the function package.module:function makes, with the weights in a file, and which these are.

    Raises SettingError where there is no such function, ArtefactError where it makes no network, or the weights are
    of another.
    """
    require_suffix(path, "a file of weights", *_SUFFIXES)
    network = make_network(factory)
    weights = _find_weights(path, key, network.state_dict())
    _put(weights, path, network, factory)
    return network, weights


def make_network(factory: str) -> nn.Module:
    """What the function package.module:function makes, in float32 on the CPU, without what wraps it."""
    function = _find(factory)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise SettingError(
            f"{factory} needs arguments ({first_line(error)}), and is called with none: write a function of no "
            "arguments that makes the network with yours"
        ) from error
    except ValueError:  # Python does not know what it takes
        pass
    try:
        with _own_command_line(factory):
            network = function()
    except (Exception, SystemExit) as error:
        raise ArtefactError(f"{factory} failed{_where(error)}: {_said(error)}") from error
    if not isinstance(network, nn.Module):
        raise ArtefactError(
            f"{factory} gives a {type(network).__name__}, and a torch.nn.Module is needed: return the network itself"
        )
    return unwrapped(network).cpu().float()


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, without DataParallel or torch.compile around it.

    Raises ArtefactError where it was compiled by TorchScript, which no copy, cast or export goes through.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ArtefactError(
            "the network was compiled by TorchScript: give the module that it was compiled from"
        )
    parallel = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = network.module if parallel else getattr(network, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else network


def _find(factory: str) -> Any:
    """The function itself; its module is imported, from the current folder too, as `python -m` does."""
    place, _, name = factory.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with _own_command_line(factory):
            module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise SettingError(f"importing {place} failed{_where(error)}: {_said(error)}") from error
        raise SettingError(
            f"there is no module {error.name}: {factory} is looked for in {show(here)} and where packages are "
            "installed; run this in the folder that your package is in"
        ) from error
    except (Exception, SystemExit) as error:
        raise SettingError(f"importing {place} failed{_where(error)}: {_said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, nn.Module):
        is_there = f"{name} in {place} is no function" if hasattr(module, name) else f"{place} has no {name}"
        mine = [
            known
            for known, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == place
        ]
        near = difflib.get_close_matches(name, mine, 3, 0.4)
        raise SettingError(
            f"{is_there}: name a function that makes the network"
            + (f", as {', '.join(near)}" if near else "")
        )
    return function


@contextmanager
def _own_command_line(factory: str) -> Iterator[None]:
    """Hide this program's command line from their code, which may parse what it takes for its own."""
    before = sys.argv
    sys.argv = [factory]
    try:
        yield
    finally:
        sys.argv = before


def _where(error: BaseException) -> str:
    """The line of the user's own code that an error came out of."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    if isinstance(error, SyntaxError) and error.filename:
        return f" in {show(error.filename)}, line {error.lineno}"
    frames = [frame for frame in frames[1:] if not frame.filename.startswith(_LIBRARIES)] or frames[1:]
    return f" in {show(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return (
            f"SystemExit: {first_line(error)}; where it reads a command line or trains, put that under "
            'if __name__ == "__main__"'
        )
    return f"{type(error).__name__}: {first_line(error)}"


def _find_weights(path: Path, key: str | None, wanted: Collection[str]) -> Weights:
    """The weights in a file by their names in a network; also where one of the two is a part of something larger.

    So are those of Lightning ("model." and buffers beside it) or of an average with its counter, and a network in a
    module of the user's own that calls it.
    """
    weights = read_weights(path, key)
    around = _around(wanted)
    if around and {around + name for name in weights.state} == set(wanted):
        return replace(weights, state={around + name: tensor for name, tensor in weights.state.items()})
    if set(weights.state) == set(wanted):
        return weights
    # In the same entry, as another may not be averaged.
    return read_weights(path, weights.key, lambda names: set(names) == set(wanted))


def _around(names: Collection[str]) -> str:
    """What stands before all names of a network, as net. where it is the net of another module; or ""."""
    first = {name.partition(".")[0] for name in names if "." in name}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""


def _put(weights: Weights, path: Path, network: nn.Module, factory: str) -> None:
    """Load the weights into the network. Raises ArtefactError unless they are those of it, each and no more."""
    wanted, state = network.state_dict(), weights.state
    said = misfits(
        [name for name in wanted if name not in state], [name for name in state if name not in wanted]
    )
    others = (
        f"; other entries of the file, for --key: {', '.join(map(show, weights.others))}"
        if weights.others
        else ""
    )
    if said:
        raise ArtefactError(
            f"the weights in {weights.name}{f' ({show(weights.key)})' if weights.key else ''} are not of the network "
            f"that {factory} makes: {said}{others}"
        )
    for name, tensor in wanted.items():
        if not is_lazy(tensor) and state[name].shape != tensor.shape:
            raise ArtefactError(
                f"{weights.name}: {show(name)} is {tuple(state[name].shape)}, and {tuple(tensor.shape)} is needed by "
                f"the network that {factory} makes{others}"
            )
    require_finite(state, path)
    try:
        network.load_state_dict(state)
    except Exception as error:  # a network may have a load_state_dict of its own
        raise ArtefactError(
            f"{factory}'s network does not load {weights.name}: {first_line(error)}"
        ) from error


def read_spec(path: Path) -> ModelSpec:
    """The spec in a .toml file. Raises SettingError where it is none, with what is allowed."""
    require_file(path, SettingError)
    require_suffix(path, "a spec", ".toml")
    if path.stat().st_size > _MOST_BYTES:
        raise SettingError(f"{show(path)} is too large for a spec")
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{show(path)} is not TOML: {first_line(error)}; {_TEMPLATE}") from error
    for name in told:
        if name not in (*_NEEDED, *_FREE):
            near = difflib.get_close_matches(name, (*_NEEDED, *_FREE), 1)
            raise SettingError(
                f"{show(path)}: {show(name)} is not known"
                + (f", did you mean {near[0]}?" if near else f": choose from {', '.join((*_NEEDED, *_FREE))}")
            )
    if missing := [name for name in _NEEDED if name not in told]:
        raise SettingError(f"{show(path)} does not tell {', '.join(missing)}: {_TEMPLATE}")
    if isinstance(told["schedule"], str):
        told["schedule"] = {"kind": told["schedule"]}
    try:
        spec = msgspec.convert(told, ModelSpec)
    except msgspec.ValidationError as error:
        raise SettingError(f"{show(path)}: {_explained(str(error), told)}") from error
    names = tuple(unicodedata.normalize("NFC", name) for name in spec.class_names)
    return msgspec.structs.replace(spec, class_names=names)


# What each key may be, for messages.
_ALLOWED: Final = {
    "image_shape": "channels, height, width, as [3, 32, 32]",
    "timesteps": "a whole number from 1 to 100000",
    "schedule": f'{", ".join(SCHEDULES)}, or a table as {{ kind = "linear", beta_start = 0.0001, beta_end = 0.02 }}',
    "schedule.kind": ", ".join(SCHEDULES),
    "prediction": ", ".join(PREDICTIONS),
    "variance": ", ".join(VARIANCES),
    "value_range": "two numbers, as [-1.0, 1.0]",
    "data_range": "two numbers, as [0.0, 255.0]",
    "clip": "true, false, or two numbers, as [-1.0, 1.0]",
    "num_classes": "a whole number from 0 to 100000",
    "class_names": "a name for each class, in a list",
    "null_class": "true or false",
    "embedding": 'a table, as { kind = "timestep", scale = 1.0, offset = 0.0 } or { kind = "sinusoidal", dim = 128 }',
    "embedding.kind": "timestep, sinusoidal",
    "embedding.spacing": "half-1, half",
    "embedding.order": "sin-cos, cos-sin",
    "sampling": 'a table, as { solver = "ddim", steps = 50 }',
    "sampling.solver": ", ".join(SOLVERS),
    "sampling.spacing": ", ".join(SPACINGS),
}


def _explained(problem: str, told: Mapping[str, Any]) -> str:
    """What msgspec says of a spec, with what is allowed there."""
    said, _, place = problem.partition(" - at `$")
    where = place.rstrip("`").lstrip(".")
    key = where.split("[")[0]
    if "unknown field" in said or "missing required field" in said:
        allowed = ", ".join(_fields(key, told))
    else:
        allowed = _ALLOWED.get(key, "")
    return f"{where}: {said}"[0 if where else 2 :] + (f"; allowed: {allowed}" if allowed else "")


_TABLES: Final[dict[str, tuple[Any, ...]]] = {
    "schedule": get_args(BetaSchedule),
    "embedding": get_args(Embedding),
    "sampling": (Sampling,),
}


def _fields(key: str, told: Mapping[str, Any]) -> list[str]:
    """The keys of a table of a spec."""
    tag = told[key].get("kind")
    fields = next(kind.__struct_fields__ for kind in _TABLES[key] if kind.__struct_config__.tag == tag)
    return ["kind", *fields] if tag else list(fields)
