"""What an importer finds: a network, its ModelSpec, and what it could not know."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import torch
from torch import nn

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.importers.flags import Flags
from ddpm_deploy.spec import ModelSpec, Provenance
from ddpm_deploy.train.checkpoint import StateDict, digest
from ddpm_deploy.version import __version__

F = TypeVar("F", bound=Flags)


@dataclass(frozen=True)
class Assumption:
    """Something that neither the weights nor a flag tells.

    flag: that would change it. value: what was taken. others: further values that people use, which images may tell
    from it.
    """

    flag: str
    value: Any
    others: tuple[Any, ...] = ()


@dataclass
class Told(Generic[F]):
    """The flags of a dialect, and what was assumed in place of those that were not told."""

    flags: F
    assumed: list[Assumption] = field(default_factory=list)

    def get(self, name: str, assumed: Any, *others: Any) -> Any:
        """A flag's value; one that was not told is taken as `assumed`, and remembered with its `others`."""
        value = getattr(self.flags, name)
        if value is None:
            self.assumed.append(Assumption(name, assumed, others))
            return assumed
        return value

    def need(self, name: str, why: str) -> Any:
        """A flag without which there is no going on. Raises SettingError where it was not told."""
        value = getattr(self.flags, name)
        if value is None:
            raise SettingError(f"--{name} is needed: {why}")
        return value

    def image_size(self) -> tuple[int, int]:
        """Height and width. Raises SettingError where they were not told, or are none."""
        text = str(self.need("image_size", "nothing in the weights tells how large its images are"))
        sizes = [int(part) if part.isdecimal() else 0 for part in text.lower().split("x")]
        if len(sizes) > 2 or not all(1 <= size <= 4096 for size in sizes):
            raise SettingError(
                f"--image_size {text} is neither a size, as 32, nor a height and a width, as 48x64"
            )
        return sizes[0], sizes[-1]

    def agrees(self, name: str, found: Any, meaning: Callable[[Any], Any] = lambda value: value) -> Any:
        """What the weights say; raises SettingError where the flag was told, and its meaning is another."""
        value = getattr(self.flags, name)
        if value is not None and meaning(value) != found:
            raise SettingError(f"--{name} {value} is not what the weights say: they have {found}")
        return found


@dataclass(frozen=True)
class Imported:
    """A foreign model, read.

    network: forward(x, temb) and, of a class-conditional one, y. dialect: whose it is. recognised: what the file itself
    says, for people. assumed: what it does not say.
    """

    network: nn.Module
    spec: ModelSpec
    dialect: str
    recognised: tuple[str, ...] = ()
    assumed: tuple[Assumption, ...] = ()


def new_spec(**fields: Any) -> ModelSpec:
    """The spec of these fields, each of which may come from a flag.

    Raises SettingError where one is out of range, or where they make no network for such images.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(fields), ModelSpec)
    except msgspec.ValidationError as error:
        raise SettingError(f"what was told of the model makes none: {first_line(error)}") from error


def with_provenance(
    network: nn.Module, spec: ModelSpec, source: str, step: int = 0, averaged: bool = False
) -> ModelSpec:
    """The spec with the digest of the network's weights, and whose code they come from.

    step: of their training. averaged: whether they are an average over it.
    """
    state: StateDict = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    provenance = Provenance(
        digest=digest(state),
        weights="ema" if averaged else "raw",
        step=step,
        source=source,
        ddpm_deploy=__version__,
        torch=str(torch.__version__),
    )
    return msgspec.structs.replace(spec, provenance=provenance)
