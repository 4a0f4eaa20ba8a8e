"""Checkpoints: a network, its average, and all it takes to train on. Read as data, never executed."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn

from ddpm_deploy.errors import ArtefactError, OutputError, first_line, newer
from ddpm_deploy.files import atomic, show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.spec import SPEC_KEY, ModelSpec
from ddpm_deploy.train.settings import Settings
from ddpm_deploy.train.unet import UNet
from ddpm_deploy.words import Weights

FORMAT: Final = 1

# What torch.nn.DataParallel and torch.compile put before every name.
_WRAPPERS: Final = ("module.", "_orig_mod.")

_PARTS: Final = ("settings", "step", "ema", "raw", "optimizer")

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
        with atomic(path) as temporary:
            try:
                with temporary.open("wb") as file:
                    torch.save(content, file)
            except RuntimeError as error:  # what torch makes of a write that failed
                cause: BaseException | None = error
                while cause and not isinstance(cause, OSError):
                    cause = cause.__cause__ or cause.__context__
                if cause:
                    raise cause from None
                raise OutputError(f"{show(path)} cannot be written: {first_line(error)}") from error

    @classmethod
    def load(cls, model: ModelFile) -> "Checkpoint":
        """Read a checkpoint that ddpm-train wrote.

        Raises ArtefactError or SpecError where it is missing, broken, foreign, or newer than this.
        """
        spec, path, name = model.spec, model.path, model.name
        if model.kind != "checkpoint":
            raise ArtefactError(f"{name} is not a checkpoint by its name: a .pt of ddpm-train is needed")
        try:
            require_intact(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch's reader of a hostile file raises nearly anything
            raise ArtefactError(f"{name} is not a whole, safe checkpoint: {first_line(error)}") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ArtefactError(f"{name} is not a checkpoint of ddpm-train")
        if content["format"] > FORMAT:
            raise ArtefactError(newer(name, f"checkpoint format {content['format']}", str(FORMAT)))
        try:
            return cls._checked(content, spec)
        except Exception as error:
            raise ArtefactError(f"{name} does not fit its own ModelSpec: {first_line(error)}") from error

    @classmethod
    def _checked(cls, content: dict[str, Any], spec: ModelSpec) -> "Checkpoint":
        if missing := [name for name in _PARTS if name not in content]:
            raise ValueError(f"it has no {missing[0]}")
        settings = msgspec.json.decode(content["settings"], type=Settings)
        if not isinstance(content["step"], int) or content["step"] < 0:
            raise ValueError("its step is not a number")
        if settings.labels != bool(spec.num_classes) or bool(settings.label_dropout) != spec.null_class:
            raise ValueError("its settings and its ModelSpec differ on the labels")
        average, raw = (without_wrapper(content[kind]) for kind in ("ema", "raw"))
        build_network(spec, average)
        _require_sound(content["optimizer"], build_network(spec, raw))
        return cls(spec, average, raw, content["optimizer"], content["step"], settings)


def require_intact(path: Path) -> None:
    """Raise ValueError where a part of the file is not what its checksum says: torch does not look at these."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("a part of it is compressed, as PyTorch never does")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")


def without_wrapper(state: StateDict) -> StateDict:
    """The weights by their names in the network, also where something was around it."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("its weights are not tensors by name")
    for wrapper in _WRAPPERS * 2:  # one may be around the other, either way
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def misfits(missing: list[str], strays: list[str]) -> str:
    """The first tensor that is missing and the first that is left over, for a message; nothing where there is none."""
    return ", ".join(
        f"{show(names[0])} is {what}" + (f" (and {len(names) - 1} more)" if names[1:] else "")
        for what, names in (("missing", missing), ("not of the network", strays))
        if names
    )


def require_fit(state: StateDict, network: nn.Module) -> None:
    """Raise ValueError unless the weights are those of the network, by name and shape."""
    wanted = network.state_dict()
    if said := misfits(
        [name for name in wanted if name not in state], [name for name in state if name not in wanted]
    ):
        raise ValueError(said)
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, and {tuple(tensor.shape)} is needed")


def _require_sound(optimizer: dict[str, Any], network: UNet) -> None:
    """Raise an error unless an Adam of this network could have the state: its fused kernels trust the shapes."""
    shapes = [parameter.shape for parameter in network.parameters()]
    if sorted(optimizer["state"]) not in ([], list(range(len(shapes)))):
        raise ValueError("its optimizer is not of this network")
    for number, moments in optimizer["state"].items():
        wanted = {"step": torch.Size(), "exp_avg": shapes[number], "exp_avg_sq": shapes[number]}
        if {name: tensor.shape for name, tensor in moments.items()} != wanted:
            raise ValueError(f"its optimizer does not fit parameter {number}")
        for name, tensor in moments.items():
            _require_dense(name, tensor)


def _require_dense(name: str, tensor: Tensor) -> None:
    """A tensor that repeats a few numbers is small in the file, and may be of any size once it is used."""
    if tensor.dtype != torch.float32 or tensor.is_sparse or not tensor.is_contiguous():
        raise ValueError(f"{name} is not a dense float32 tensor")


def new_network(spec: ModelSpec) -> UNet:
    """The network of a spec, newly initialised.

    Raises ValueError where the spec makes no network.
    """
    if spec.network is None:
        raise ValueError("its ModelSpec has no network configuration")
    channels, out_channels = spec.image_shape[0], spec.prediction_shape[0]
    return UNet(spec.network, channels, spec.embedding.dim, out_channels, spec.num_labels)


def build_network(spec: ModelSpec, state: StateDict) -> UNet:
    """The network of a spec with the given weights, which it shares.

    Raises ValueError where they do not fit it.
    """
    with torch.device("meta"):  # allocates nothing, whatever size the spec claims
        network = new_network(spec)
    require_fit(state, network)
    network.load_state_dict(state, assign=True)
    for name, tensor in state.items():
        _require_dense(name, tensor)
    return network


def load_network(model: ModelFile, weights: Weights = "ema") -> tuple[UNet, ModelSpec]:
    """One of the two networks in a checkpoint, and the spec of those very weights.

    Raises ArtefactError as `Checkpoint.load`, and where the weights are not all finite.
    """
    checkpoint = Checkpoint.load(model)
    spec = checkpoint.spec
    state = checkpoint.ema if weights == "ema" else checkpoint.raw
    require_finite(state, model.path)
    if weights == "raw":
        provenance = msgspec.structs.replace(spec.provenance, digest=digest(state), weights="raw")
        spec = msgspec.structs.replace(spec, provenance=provenance)
    return build_network(spec, state), spec


def require_finite(state: StateDict, path: Path) -> None:
    """Raise ArtefactError where weights read from `path` are not finite, naming the tensor."""
    broken = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ArtefactError(f"{show(path)} has numbers that are not finite in {broken}: train again")


def digest(state: StateDict) -> str:
    """SHA-256 of the parameters, names and values: a model's identity, whatever file it is in."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
