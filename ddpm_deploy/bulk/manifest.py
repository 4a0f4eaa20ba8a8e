"""What a run in shards is: written once into its folder, and compared by every process that comes to work there."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from ddpm_deploy.errors import (
    ArtefactError,
    DdpmDeployError,
    OutputError,
    SettingError,
    first_line,
    newer,
    plural,
)
from ddpm_deploy.files import create_once, make_folder, require_file, require_output, show
from ddpm_deploy.runtime.images import LABELS, Form, stored_as
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import ModelSpec, Provenance

ArrayType = tuple[np.dtype[Any], tuple[int, ...]]  # type and shape

NAME: Final = "manifest.json"
FORMAT: Final = 1
MOST_SHARDS: Final = 100_000  # files of one folder
LARGEST_SHARD: Final = 1 << 30  # bytes of its samples in float32, which are in memory together
_DEFAULT_SHARD: Final = (256, 1 << 28)  # images, and bytes as above, at most
_LARGEST_MANIFEST: Final = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A run in shards of `shard_size` samples, the last of what is left.

    spec: of the model. request: all samples, checked. form: what a shard holds. versions: of what the process that
    wrote the manifest ran: no part of what the run is, but of what may change the last bit of an image.

    Raises SettingError where it is not one that can be.
    """

    spec: ModelSpec
    request: Request
    shard_size: int
    form: Form = "uint8"
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.request != self.request.checked(self.spec):
            raise SettingError("the request is not complete")
        if not 1 <= self.shard_size <= self.request.count:
            raise SettingError(
                f"the shard size must be from 1 to {self.request.count}, the number of images, not {self.shard_size}"
            )
        if self.count > MOST_SHARDS:
            raise SettingError(
                f"{self.request.count} images in shards of {self.shard_size} are {self.count} files, and at most "
                f"{MOST_SHARDS} are made: choose a larger --shard-size"
            )
        if (most := LARGEST_SHARD // _image_bytes(self.spec)) < self.shard_size:
            raise SettingError(
                f"a shard of {self.shard_size} images is more than is kept in memory: choose a --shard-size of at most "
                f"{most}"
            )
        _ = self.array, self.run  # or are refused

    @property
    def count(self) -> int:
        """How many shards it has."""
        return -(-self.request.count // self.shard_size)

    def part(self, number: int) -> Request:
        """The samples of a shard, by its number, from 0."""
        assert 0 <= number < self.count
        return self.request[number * self.shard_size : (number + 1) * self.shard_size]

    def shard_name(self, number: int) -> str:
        """The name of a shard: its first and last sample index, so that names sort as samples do."""
        part = self.part(number)
        width = max(6, len(str(self.request.first_index + self.request.count - 1)))
        return f"{part.first_index:0{width}d}-{part.first_index + part.count - 1:0{width}d}.npz"

    def numbers(self, of: tuple[int, int] = (1, 1)) -> range:
        """The numbers of the shards of one part of some, as (3, 16): every 16th, from the third on.

        Raises SettingError where a part would have none.
        """
        part, parts = of
        if not 1 <= part <= parts:
            raise SettingError(f"--shard {part}/{parts}: parts are numbered from 1 to {parts}")
        if parts > self.count:
            raise SettingError(
                f"--shard {part}/{parts}: the run has {plural(self.count, 'shard')}: choose at most that many parts, "
                "or a smaller --shard-size"
            )
        return range(part - 1, self.count, parts)

    @cached_property
    def array(self) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
        """Of a shard's images: the name of their array, its type, and the shape of one."""
        return stored_as(self.form, self.spec.image_shape)

    def arrays(self, count: int) -> dict[str, ArrayType]:
        """The type and shape of each array of so many samples, by name."""
        name, dtype, shape = self.array
        labels = {LABELS: (np.dtype(np.int64), (count,))} if self.spec.num_classes else {}
        return {name: (dtype, (count, *shape)), **labels}

    @cached_property
    def run(self) -> str:
        """SHA-256 of everything that decides the images and how they are split: two runs with the same are one."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What decides the images and how they are split, by name.

        Of the spec not what is only told of the model, nor what ONNX Runtime was seen to do with its file.
        """
        meant = msgspec.structs.replace(
            self.spec,
            provenance=Provenance(digest=self.spec.provenance.digest),
            class_names=(),
            same_bits=None,
            engine=None,
        )
        spec = msgspec.to_builtins(meant)
        return {
            "model": self.spec.provenance.digest,
            "precision": self.spec.precision,
            **self.request.to_builtins(),
            "shard size": self.shard_size,
            "form": self.form,
            "model's settings": spec,
        }

    def to_json(self) -> bytes:
        """The content of its file, for people to read too."""
        fields = {
            "format": FORMAT,
            "versions": self.versions,
            "shard_size": self.shard_size,
            "shards": self.count,
            "form": self.form,
            "request": self.request.to_builtins(),
            "spec": msgspec.to_builtins(self.spec),
        }
        return (json.dumps(fields, indent=2) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read that of a folder. Raises ArtefactError where it is missing, broken, or of a newer version."""
        path, name = folder / NAME, show(folder / NAME)
        if folder.is_dir() and not path.exists():
            raise ArtefactError(f"{show(folder)} holds no {NAME}: it is no folder of ddpm-run --shards")
        require_file(path)
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ArtefactError(f"{name} is larger than a manifest of ddpm-run --shards: it is none")
        try:
            text = path.read_bytes()
            version = msgspec.json.decode(text, type=_Version).format
            if version > FORMAT:
                raise ArtefactError(newer(name, f"manifest format {version}", str(FORMAT)))
            content = msgspec.json.decode(text, type=_Content)
            made = cls(
                spec=ModelSpec.from_json(bytes(content.spec), name),
                request=content.request,
                shard_size=content.shard_size,
                form=content.form,
                versions=content.versions,
            )
            if content.shards != made.count:
                raise ValueError(f"{made.count} shards, not {content.shards}")
        except ArtefactError:
            raise
        except (
            ValueError,
            TypeError,
            OverflowError,
            RecursionError,
            DdpmDeployError,
            msgspec.MsgspecError,
        ) as error:
            raise ArtefactError(
                f"{name} is not a whole manifest of ddpm-run --shards ({first_line(error)}): it was cut short or edited"
            ) from error
        return made

    def joined(self, folder: Path, *, own_seed: bool) -> "Manifest":
        """Enter a folder: write this there, unless another process did; give what stands there.

        own_seed: whether the seed was chosen; otherwise that of the run which is there is taken.

        Raises OutputError where the folder is another run's or holds other files, ArtefactError where its manifest is
        broken.
        """
        make_folder(folder)
        if _is_new(folder):
            create_once(folder / NAME, self.to_json())
        there = Manifest.load(folder)
        mine = self if own_seed else replace(self, request=_reseeded(self.request, there.request))
        if mine.run != there.run:
            raise OutputError(
                f"{show(folder)} is of another run ({mine._difference(there)}): choose another folder, or give the "
                "settings of what is there"
            )
        return there

    def _difference(self, there: "Manifest") -> str:
        """What another run has otherwise, for people."""
        here, other = self._identity, there._identity
        named = {
            name: f"{name} {_short(other.get(name))}, not {_short(here.get(name))}"
            for name in {**other, **here}  # share_until is in those alone that have it
            if other.get(name) != here.get(name)
        }
        if len(named) > 1:  # which the others explain
            named.pop("model's settings", None)
        if set(named) == {"model's settings"}:
            return "the same weights, and other settings of the model"
        return "; ".join(named.values())


def default_shard_size(spec: ModelSpec) -> int:
    """Images of a shard where nothing is said: 256, or as many as 256 MiB hold, the same on every machine."""
    images, size = _DEFAULT_SHARD
    return min(images, max(1, size // _image_bytes(spec)))


def require_shard_folder(folder: Path) -> None:
    """Raise OutputError unless shards can be written there: ask this before a model is loaded."""
    if folder.is_file() or (folder.suffix.lower() in (".png", ".npz") and not folder.is_dir()):
        raise OutputError(f"{show(folder)}: shards go to a folder, as -o shards/")
    require_output(folder / "x" if folder.is_dir() else folder)
    if folder.is_dir():
        _is_new(folder)  # or is refused


def _is_new(folder: Path) -> bool:
    """Whether there is nothing in a folder. Raises OutputError where there is, and no manifest."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise OutputError(f"{show(folder)} cannot be read: {error.strerror}") from error
    if names and NAME not in names:
        raise OutputError(
            f"{show(folder)} holds {show(names[0])}, and no {NAME}: choose a folder that is new or empty, or that of "
            "this run"
        )
    return not names


def _reseeded(request: Request, other: Request) -> Request:
    return msgspec.structs.replace(request, seed=other.seed)


def _image_bytes(spec: ModelSpec) -> int:
    return 4 * math.prod(spec.image_shape)


def _short(value: object) -> str:
    text = "none" if value in (None, (), []) else show(str(value))
    return text if len(text) <= 24 else f"{text[:12]}…"


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    format: int


class _Content(_Version, frozen=True, kw_only=True, forbid_unknown_fields=True):
    versions: dict[str, str]
    shard_size: int
    shards: int
    form: Form
    request: Request
    spec: msgspec.Raw
