"""What ddpm-export can make an .onnx of: a checkpoint of ddpm-train, another's, or a network of the user's own.

PyTorch is imported where a network is loaded, as building the engine of an .onnx needs none.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import click

from ddpm_deploy.dependencies import require
from ddpm_deploy.files import quoted, show
from ddpm_deploy.importers.told import read_flags
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Weights

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Source(Protocol):
    """Something with a network.

    name: for messages. stem: what the .onnx is called after, without a suffix. files: that are read, and so must not be
    replaced. spec: of the network. verify: the command line that proves its .onnx.
    """

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> Path: ...
    @property
    def files(self) -> list[Path]: ...
    @property
    def spec(self) -> ModelSpec: ...
    def load(self) -> tuple[Any, ModelSpec]:
        """The network, and the spec of those very weights."""

    def verify(self, onnx: Path) -> str: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ddpm-train."""

    model: ModelFile
    weights: Weights

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def stem(self) -> Path:
        return self.model.path.with_suffix("")

    @property
    def files(self) -> list[Path]:
        return [self.model.path]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def load(self) -> tuple[Any, ModelSpec]:
        from ddpm_deploy.train.checkpoint import load_network

        return load_network(self.model, self.weights)

    def verify(self, onnx: Path) -> str:
        raw = " --weights raw" * (self.weights == "raw")
        return f"ddpm-verify {quoted(self.model.path)} {quoted(onnx)}{raw}"


@dataclass(frozen=True)
class _Imported(ABC):
    """What the two kinds of foreign networks share: each is read once, and its .onnx judged by the proof beside it."""

    path: Path
    key: str | None

    @property
    def name(self) -> str:
        return show(self.path)

    @cached_property
    def imported(self) -> Any:
        """What an importer made of it."""
        return self._read()

    @abstractmethod
    def _read(self) -> Any:
        """Read it, and tell what was found."""

    @property
    def spec(self) -> ModelSpec:
        spec: ModelSpec = self.imported.spec
        return spec

    def load(self) -> tuple[Any, ModelSpec]:
        return self.imported.network, self.spec

    def verify(self, onnx: Path) -> str:
        return f"ddpm-verify {quoted(onnx)}"


@dataclass(frozen=True)
class Foreign(_Imported):
    """Another's checkpoint: a file or a folder, and what its own code is told beside it."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    check_images: Path | None = None

    @property
    def stem(self) -> Path:
        whole = self.path.resolve() if self.path.name in ("", "..") else self.path
        return whole if whole.is_dir() else whole.with_suffix("")

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else []  # no file of diffusers has a name that is written

    def _read(self) -> Any:
        from ddpm_deploy.cli.bodies.importing import read_and_tell

        return read_and_tell(self.path, self.flags, self.key, self.check_images)


@dataclass(frozen=True)
class OwnModule(_Imported):
    """A network of the user's own: path is their factory, as package.module:function."""

    weights: Path
    spec_file: Path
    check_images: Path | None

    @property
    def stem(self) -> Path:
        return self.weights.with_suffix("")

    @property
    def files(self) -> list[Path]:
        return [self.weights, self.spec_file]

    def _read(self) -> Any:
        from ddpm_deploy.cli.bodies.importing import build_and_tell

        return build_and_tell(str(self.path), self.weights, self.spec_file, self.key, self.check_images)


@dataclass(frozen=True)
class ImportOptions:
    """What was typed of --weights, --key, --spec, --flags, --check-images and the flags of the dialects."""

    weights: Weights | Path | None
    key: str | None
    spec: Path | None
    flags: Path | None
    check_images: Path | None
    told: Mapping[str, Any]

    def typed(self, *but: str) -> list[str]:
        """The options that were typed, other than `but`."""
        names = ("weights", "key", "spec", "flags", "check_images")
        options = [name for name in names if getattr(self, name) is not None and name not in but]
        told = () if "told" in but else self.told
        return [f"--{name.replace('_', '-')}" for name in options] + [f"--{name}" for name in told]

    def refuse_but(self, what: str, *kept: str) -> None:
        """Raise UsageError where another option than `kept` was typed. what: which cannot have it."""
        if typed := self.typed(*kept):
            raise click.UsageError(f"{', '.join(typed)} cannot be given with {what}")


def is_factory(model: Path) -> bool:
    """Whether MODEL names a function, as package.module:function, and no file."""
    return bool(_FACTORY.fullmatch(str(model))) and not model.exists()


def _require_spelling(model: Path, options: ImportOptions) -> None:
    """Raise UsageError where MODEL is meant to name a function, and names it otherwise."""
    path, colon, name = str(model).rpartition(":")
    if model.exists() or (is_factory(model) and not path.endswith(".py")):
        return
    place = Path(path.removesuffix(".py"))
    if colon and name.isidentifier() and place.name.replace(".", "_").isidentifier():
        outside = place.is_absolute() or ".." in place.parts
        named = f"{place.name if outside else '.'.join(place.parts)}:{name}"
        where = f", in the folder {show(place.parent)}" if outside else ""
        raise click.UsageError(f"a function is named by its module, not by its file: {named}{where}")
    if options.spec:
        raise click.UsageError(
            f"{show(model)} is neither a file nor a function: with --spec, name the function that makes the network, "
            "as my_package.models:build"
        )


def source_of(model: Path, options: ImportOptions) -> Source | ModelFile:
    """What MODEL is; a ModelFile where it is an .onnx, of which an engine alone can be built."""
    _require_spelling(model, options)
    if is_factory(model):
        options.refuse_but(
            "a function of your own: it knows its network", "weights", "key", "spec", "check_images"
        )
        if not isinstance(options.weights, Path) or options.spec is None:
            raise click.UsageError(
                f"{model} names a function: --weights FILE and --spec FILE are needed with it (ddpm-export "
                "--spec-template prints a spec to start from)"
            )
        require("torch", "export")
        return OwnModule(model, options.key, options.weights, options.spec, options.check_images)
    opened = open_model(model)
    opened.require_kind("checkpoint", "onnx", "foreign")
    if opened.kind == "onnx":
        options.refuse_but("an .onnx: only with a checkpoint")
        return opened
    if opened.kind == "checkpoint":
        options.refuse_but("a checkpoint of ddpm-train, which knows them", "weights")
        if isinstance(options.weights, Path):
            raise click.UsageError(
                f"--weights of a checkpoint of ddpm-train is ema or raw, not {options.weights}"
            )
        return Checkpoint(opened, options.weights or "ema")
    options.refuse_but("another's checkpoint", "key", "flags", "check_images", "told")
    require("torch", "export")
    told = {**(read_flags(options.flags) if options.flags else {}), **options.told}
    return Foreign(opened.path, options.key, told, options.check_images)
