"""Chains under way, kept in a file: on any backend and machine they go on to the same images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from ddpm_deploy.arrays import load_arrays
from ddpm_deploy.errors import ArtefactError, DataError, SettingError, first_line, newer, plural
from ddpm_deploy.files import atomic, show
from ddpm_deploy.noise import NOISE_VERSION
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import ModelSpec

FORMAT: Final = 1
_LARGEST: Final = 1 << 32


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The samples of a request after `step` steps of their chain.

    table: the rows themselves, so that no other machine's logarithm has a say. model: digest of the weights.
    x, x0: (k, C, H, W), x_t and the last x̂0.
    """

    request: Request
    table: StepTable
    model: str
    step: int
    x: Array
    x0: Array

    def save(self, path: str | Path) -> None:
        """Write it to an .npz, whole or not at all."""
        settings = msgspec.structs.replace(self.request, table=None)
        about = _About(
            format=FORMAT,
            noise_version=NOISE_VERSION,
            model=self.model,
            table=digest(self.table),
            own_table=self.request.table is not None,
            step=self.step,
            request=settings.to_builtins(),
        )
        with atomic(Path(path)) as temporary, temporary.open("wb") as file:
            text = np.frombuffer(msgspec.json.encode(about), np.uint8)
            np.savez(file, about=text, rows=self.table.rows, x=self.x, x0=self.x0)

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Read one. Raises ArtefactError where it is missing, broken, or of a newer version."""
        path = Path(path)
        content, name = load_arrays(path, _LARGEST, "snapshot"), show(path)
        try:
            text = content.pop("about").tobytes()
            versions = msgspec.json.decode(text, type=_Versions)
            if versions.format > FORMAT or versions.noise_version > NOISE_VERSION:
                got = f"snapshot format {versions.format}, noise version {versions.noise_version}"
                raise ArtefactError(newer(name, got, f"{FORMAT} and {NOISE_VERSION}"))
            return cls._checked(msgspec.json.decode(text, type=_About), content)
        except KeyError as error:
            raise ArtefactError(f"{name} is not a snapshot of ddpm-run: it has no {error}") from error
        except (ValueError, TypeError, RecursionError, DataError, msgspec.MsgspecError) as error:
            raise ArtefactError(f"{name} is not a snapshot of ddpm-run: {first_line(error)}") from error

    @classmethod
    def _checked(cls, about: "_About", content: dict[str, Any]) -> "Snapshot":
        """Raise ValueError or KeyError unless the parts are what `save` writes, and go together."""
        x, x0, table = content["x"], content["x0"], StepTable(content["rows"])
        request = Request.from_builtins(about.request, "what it says that it is of")
        if about.own_table:
            request = msgspec.structs.replace(request, table=table)
        if x.ndim != 4 or len(x) != request.count or request.seed is None:
            raise ValueError(f"x has the shape {x.shape}, for {plural(request.count, 'image')} under way")
        for array in (x, x0):
            if array.dtype != np.float32 or array.shape != x.shape or not np.isfinite(array).all():
                raise ValueError(f"x or x0 is not float32 {x.shape}, or not finite")
        if not 0 <= about.step <= len(table):
            raise ValueError(f"step {about.step} of {len(table)}")
        if digest(table) != about.table:
            raise ValueError("its table is not the one that it was saved with")
        return cls(request, table, about.model, about.step, x, x0)

    def require_fits(self, spec: ModelSpec) -> None:
        """Raise SettingError unless it is of this model, in whatever precision and backend, and of a table of it."""
        if self.model != spec.provenance.digest:
            raise SettingError(
                f"this snapshot is of the model {show(self.model[:12])}…, and this is {spec.provenance.digest[:12]}… "
                "(a checkpoint's ema and raw weights are two models)"
            )
        if self.x.shape[1:] != spec.image_shape:
            raise SettingError(f"this snapshot is of images {self.x.shape[1:]}, not {spec.image_shape}")
        mine, rows = self.request.checked(spec).table_for(spec).rows, self.table.rows
        # Another machine's logarithms may differ in the last place.
        if mine.shape != rows.shape or not np.allclose(mine, rows, rtol=1e-6, atol=1e-12):
            raise SettingError(
                "this snapshot is of another table: its rows are not those of its settings on this model's schedule"
            )


def digest(table: StepTable) -> str:
    """SHA-256 of the rows as a chain runs them."""
    return hashlib.sha256(table.float32_rows().tobytes()).hexdigest()


class _Versions(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    noise_version: int


class _About(_Versions, frozen=True, kw_only=True):
    model: str
    table: str
    own_table: bool
    step: int
    request: dict[str, Any]
