"""A TensorRT engine's file (a plan) as bytes: what it tells without a GPU, and the digest that it is trusted by.

TensorRT does not document the format. What is read here was read off plans of TensorRT-RTX 1.7 and, where noted, is
what NVIDIA says of TensorRT's own (issue 3073 of NVIDIA/TensorRT): four letters for the flavour, the version as
four bytes at byte 24, and the network's name verbatim.
"""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddpm_deploy.errors import ArtefactError, plural
from ddpm_deploy.files import atomic_together, quoted, require_file, show
from ddpm_deploy.spec import MAX_SPEC_BYTES
from ddpm_deploy.words import Flavour

PLAN_SUFFIX: Final = ".plan"

_FLAVOURS: Final[dict[bytes, Flavour]] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
_HEAD: Final = 32  # bytes that are read of it
_SPEC_START: Final = b'{"spec_version":'


@dataclass(frozen=True)
class PlanHead:
    """flavour: which TensorRT wrote it. version: of that, as "11.1.0.106"; "" where the head does not tell."""

    flavour: Flavour
    version: str


def read_plan_head(path: Path) -> PlanHead:
    """What the first bytes of an engine tell.

    Raises ArtefactError where it is missing, is no engine, or is shorter than it says of itself.
    """
    require_file(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    flavour = _FLAVOURS.get(head[:4])
    if flavour is None:
        raise ArtefactError(
            f"{show(path)} is not a TensorRT engine by its first bytes: build it with ddpm-export"
        )
    if len(head) < _HEAD:
        raise ArtefactError(
            f"{show(path)} is truncated: it has {plural(len(head), 'byte')}; copy or build it again"
        )
    says, has = int.from_bytes(head[16:24], "little"), path.stat().st_size
    if flavour == "tensorrt-rtx" and says != has:
        raise ArtefactError(
            f"{show(path)} is not whole: it has {plural(has, 'byte')}, and says that it has {says}; copy or "
            "build it again"
        )
    # Of another serialization the rest of the head may mean something else.
    return PlanHead(flavour, ".".join(map(str, head[24:28])) if head[4:8] == bytes(4) else "")


def spec_in_plan(path: Path) -> str | None:
    """The text of the ModelSpec in an engine, which is its network's name; None where it has none."""
    read_plan_head(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        place = spec_place(plan)
        return None if place is None else plan[place].decode()


def spec_place(plan: bytes | mmap.mmap) -> slice | None:
    """Where the ModelSpec stands in an engine's bytes; None where it has none.

    Raises ValueError where what stands there is no JSON.
    """
    start = plan.find(_SPEC_START)
    if start < 0:
        return None
    # A character a byte, whatever follows the name.
    text = plan[start : start + MAX_SPEC_BYTES + 1].decode("latin-1")
    _, end = json.JSONDecoder().raw_decode(text)  # the name has no end of its own in the bytes
    return slice(start, start + end)


def digest_path(plan: Path) -> Path:
    """Where the digest of an engine stands: engine.plan → engine.plan.sha256."""
    return plan.with_name(plan.name + ".sha256")


def digest_beside(plan: Path) -> str:
    """What is written there: of a digest, its 64 digits."""
    with digest_path(plan).open("rb") as file:
        return file.read(64).decode(errors="replace")


def write_plan(path: Path, plan: bytes | memoryview) -> None:
    """Write an engine with its digest beside it. Raises OutputError where it cannot be written."""
    with atomic_together(path, digest_path(path)) as (temporary, digest):
        temporary.write_bytes(plan)
        digest.write_text(f"{hashlib.sha256(plan).hexdigest()}  {path.name}\n")  # as sha256sum writes it


def trusted(plan: Path) -> bytes:
    """The bytes of an engine, which is native code: ArtefactError is raised unless the digest beside it is theirs."""
    require_file(plan)
    beside = digest_path(plan)
    if not beside.exists():
        raise ArtefactError(
            f"{show(beside)} is missing: an engine is native code, and is loaded only with its digest beside it. If "
            f"you built it yourself: sha256sum {quoted(plan)} > {quoted(beside)}"
        )
    require_file(beside)
    content = plan.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest_beside(plan):
        raise ArtefactError(
            f"{show(plan)} is not the engine that {show(beside.name)} is of: it was damaged, edited or replaced; copy "
            "both again, or build it again with ddpm-export"
        )
    return content
