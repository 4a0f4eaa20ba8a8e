"""Checkpoints: a network, its average, and all it takes to train on. Read as data, never executed."""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch
from torch import Tensor

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.files import atomic, show
from ddpm_deploy.spec import SPEC_KEY, ModelSpec
from ddpm_deploy.train.settings import Settings
from ddpm_deploy.train.unet import UNet

FORMAT: Final = 1

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a .pt file holds.

    spec: of the averaged network, `ema`. raw: the network as trained, without averaging.
    optimizer: its state. step: training steps done. settings: of the training.
    """

    spec: ModelSpec
    ema: StateDict
    raw: StateDict
    optimizer: dict[str, Any]
    step: int
    settings: Settings

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        content = {
            SPEC_KEY: self.spec.to_json(),
            "format": FORMAT,
            "step": self.step,
            "settings": msgspec.json.encode(self.settings).decode(),
            "ema": self.ema,
            "raw": self.raw,
            "optimizer": self.optimizer,
        }
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint that ddpm-train wrote.

        Raises ArtefactError or SpecError where it is missing, broken, foreign, or newer than this.
        """
        spec = read_spec(path)
        name = show(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            AttributeError,
        ) as error:
            first = str(error).strip().split("\n")[0]
            raise ArtefactError(f"{name} is not a whole, safe checkpoint: {first}") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ArtefactError(f"{name} is not a checkpoint of ddpm-train")
        if content["format"] > FORMAT:
            raise ArtefactError(
                f"{name} has checkpoint format {content['format']}, written by a newer ddpm-deploy (this one knows "
                f"{FORMAT}): upgrade with pip install -U ddpm-deploy"
            )
        try:
            settings = msgspec.json.decode(content["settings"], type=Settings)
            checkpoint = cls(
                spec, content["ema"], content["raw"], content["optimizer"], content["step"], settings
            )
            for state in (checkpoint.ema, checkpoint.raw):
                build_network(spec, state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, msgspec.MsgspecError) as error:
            raise ArtefactError(
                f"{name} does not fit its own ModelSpec: {str(error).strip().split(chr(10))[0]}"
            ) from error
        return checkpoint


def build_network(spec: ModelSpec, state: StateDict | None = None) -> UNet:
    """The network of a spec, with the given weights, or newly initialised.

    Raises ValueError or RuntimeError where the spec makes no network or the weights do not fit it.
    """
    if spec.network is None:
        raise ValueError("its ModelSpec has no network configuration")
    channels = spec.image_shape[0]
    # With weights to come, nothing is allocated: a spec that lies about its size costs no memory.
    with torch.device("cpu" if state is None else "meta"):
        network = UNet(spec.network, channels, spec.embedding.dim, channels)
    if state is not None:
        network.load_state_dict(state, assign=True)
        wrong = [name for name, tensor in state.items() if tensor.dtype != torch.float32 or tensor.is_sparse]
        if wrong:
            raise ValueError(f"{wrong[0]} is not a dense float32 tensor")
    return network


def load_network(path: Path, weights: Literal["ema", "raw"] = "ema") -> tuple[UNet, ModelSpec]:
    """One of the two networks in a checkpoint, and the spec of those very weights."""
    checkpoint = Checkpoint.load(path)
    spec = checkpoint.spec
    if weights == "ema":
        return build_network(spec, checkpoint.ema), spec
    provenance = msgspec.structs.replace(spec.provenance, digest=digest(checkpoint.raw), weights="raw")
    return build_network(spec, checkpoint.raw), msgspec.structs.replace(spec, provenance=provenance)


def digest(state: StateDict) -> str:
    """SHA-256 of the parameters, names and values: a model's identity, whatever file it is in."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()
