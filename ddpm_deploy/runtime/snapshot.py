"""Chains under way, kept in a file: on any backend and machine they go on to the same images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.errors import ArtefactError, SettingError, first_line, newer
from ddpm_deploy.files import atomic, require_file, show
from ddpm_deploy.noise import NOISE_VERSION
from ddpm_deploy.runtime.denoiser import Array, Labels
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import ChainSettings, ModelSpec

FORMAT: Final = 1
_LARGEST: Final = 1 << 32
_NAMES: Final = ("about", "rows", "x", "x0", "labels", "guidance")


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are drawn together.

    table: of their chain. settings: what the table follows from; None: a caller made it.
    seed, first_index: sample i of the k has index first_index + i. labels: (k,), of a conditional model.
    guidance: (k,) float32, the scales; None: without.
    """

    count: int
    table: StepTable
    settings: ChainSettings | None
    seed: int
    first_index: int
    labels: Labels | None = None
    guidance: Array | None = None

    def addresses(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The seed and index of each sample's noise, (k,) each."""
        indices = np.uint64(self.first_index) + np.arange(self.count, dtype=np.uint64)
        return np.full(self.count, self.seed, np.uint64), indices


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A batch after `step` steps of its chain.

    model: digest of the weights. x, x0: (k, C, H, W), x_t and the last x̂0.
    """

    batch: Batch
    model: str
    step: int
    x: Array
    x0: Array

    def save(self, path: str | Path) -> None:
        """Write it to an .npz, whole or not at all."""
        batch = self.batch
        about = _About(
            format=FORMAT,
            noise_version=NOISE_VERSION,
            model=self.model,
            table=digest(batch.table),
            settings=batch.settings,
            step=self.step,
            seed=batch.seed,
            first_index=batch.first_index,
        )
        arrays: dict[str, Any] = {"rows": batch.table.rows, "x": self.x, "x0": self.x0}
        for name in ("labels", "guidance"):
            if getattr(batch, name) is not None:
                arrays[name] = getattr(batch, name)
        with atomic(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, about=np.frombuffer(msgspec.json.encode(about), np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Read one. Raises ArtefactError where it is missing, broken, or of a newer version."""
        path = Path(path)
        require_file(path)
        name = show(path)
        try:
            require_honest(path, _LARGEST)
            with np.load(path, allow_pickle=False) as archive:
                content = {name: archive[name] for name in _NAMES if name in archive.files}
        except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
            raise ArtefactError(f"{name} is not a whole snapshot: {first_line(error)}") from error
        try:
            text = content.pop("about").tobytes()
            versions = msgspec.json.decode(text, type=_Versions)
            if versions.format > FORMAT or versions.noise_version > NOISE_VERSION:
                got = f"snapshot format {versions.format}, noise version {versions.noise_version}"
                raise ArtefactError(newer(name, got, f"{FORMAT} and {NOISE_VERSION}"))
            return cls._checked(msgspec.json.decode(text, type=_About), content)
        except KeyError as error:
            raise ArtefactError(f"{name} is not a snapshot of ddpm-run: it has no {error}") from error
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise ArtefactError(f"{name} is not a snapshot of ddpm-run: {first_line(error)}") from error

    @classmethod
    def _checked(cls, about: "_About", content: dict[str, Any]) -> "Snapshot":
        """Raise ValueError or KeyError unless the parts are what `save` writes, and go together."""
        x, x0, table = content["x"], content["x0"], StepTable(content["rows"])
        if x.ndim != 4 or not len(x):
            raise ValueError(f"x has the shape {x.shape}")
        for name, dtype, shape in (
            ("x", np.float32, x.shape),
            ("x0", np.float32, x.shape),
            ("labels", np.int64, (len(x),)),
            ("guidance", np.float32, (len(x),)),
        ):
            array = content.get(name)
            if array is None:
                continue
            if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name} is not {np.dtype(dtype)} {shape}, or not finite")
        if not 0 <= about.step <= len(table):
            raise ValueError(f"step {about.step} of {len(table)}")
        if digest(table) != about.table:
            raise ValueError("its table is not the one that it was saved with")
        if not 0 <= about.seed < 2**64 or not 0 <= about.first_index <= 2**64 - len(x):
            raise ValueError("its seed or index is out of range")
        batch = Batch(
            len(x),
            table,
            about.settings,
            about.seed,
            about.first_index,
            content.get("labels"),
            content.get("guidance"),
        )
        return cls(batch, about.model, about.step, x, x0)

    def require_fits(self, spec: ModelSpec) -> None:
        """Raise SettingError unless it is of this model, in whatever precision and backend."""
        if self.model != spec.provenance.digest:
            raise SettingError(
                f"this snapshot is of the model {show(self.model[:12])}…, and this is {spec.provenance.digest[:12]}… "
                "(a checkpoint's ema and raw weights are two models)"
            )
        if self.x.shape[1:] != spec.image_shape:
            raise SettingError(f"this snapshot is of images {self.x.shape[1:]}, not {spec.image_shape}")
        labels = self.batch.labels
        if (labels is None) != (not spec.num_classes) or (
            labels is not None and not 0 <= labels.min() <= labels.max() < spec.num_labels
        ):
            raise SettingError("the labels of this snapshot are not those of the model")


def digest(table: StepTable) -> str:
    """SHA-256 of the rows as a chain runs them."""
    return hashlib.sha256(table.float32_rows().tobytes()).hexdigest()


class _Versions(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    noise_version: int


class _About(_Versions, frozen=True, kw_only=True):
    model: str
    table: str
    settings: ChainSettings | None
    step: int
    seed: int
    first_index: int
