"""What an importer finds: a network, its ModelSpec, and what it could not know."""

from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.importers.told import Assumption
from ddpm_deploy.spec import ModelSpec, Provenance
from ddpm_deploy.train.checkpoint import StateDict, digest
from ddpm_deploy.version import __version__


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
