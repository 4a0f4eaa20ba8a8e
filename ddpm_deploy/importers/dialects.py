"""Every dialect, and which of them a file is in."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.files import show
from ddpm_deploy.importers import diffusers, ho, lucidrains, monai, openai
from ddpm_deploy.importers.flags import FLAGS
from ddpm_deploy.importers.imported import Imported, with_provenance
from ddpm_deploy.importers.told import Told, parse
from ddpm_deploy.importers.weights import Weights, read_weights
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import require_finite


class Dialect(Protocol):
    """A file of this folder that reads the checkpoints of one code base, or of several with the same names.

    NAME: as in `flags.FLAGS`.
    """

    NAME: str

    def recognises(self, names: Collection[str]) -> bool:
        """Whether weights of these names are of this dialect."""

    def read(self, weights: Weights, told: Told[Any]) -> Imported:
        """The network and the spec of such weights; its provenance is added later."""


DIALECTS: Final[tuple[Dialect, ...]] = (diffusers, openai, ho, monai, lucidrains)
_AUTOENCODER: Final = re.compile(r"(^|[._])(first_stage|vae|vqvae|vqgan|autoencoder)[._]", re.IGNORECASE)
_SAME_BETA: Final = 1e-5  # they may be stored in float32 or less


def import_checkpoint(path: Path, flags: Mapping[str, Any], key: str | None = None) -> Imported:
    """Read another's checkpoint: the network, its spec, and what was assumed.

    path: a file, or of diffusers the folder. flags: what its own code is told beside the weights, by the names there.
    key: which entry of the file holds the weights (None: the averaged ones where it has some by their name); of a
    folder, which variant of them.

    Raises ArtefactError where it is of no dialect that is known, or is not whole; SettingError where a flag is needed.
    """
    folder = diffusers.folder_of(path)
    weights = diffusers.read_folder(path, key) if folder else read_weights(path, key, _known)
    found = (diffusers,) if folder else (one for one in DIALECTS if one.recognises(weights.state))
    dialect: Dialect | None = next(iter(found), None)
    if dialect is None:
        raise ArtefactError(
            f"{show(path)} is of no dialect that is known by the names of its weights ({_some(weights)}): name the "
            "function that makes the network, as in ddpm-export my_package.models:build --weights FILE --spec FILE"
        )
    require_finite(weights.state, path)
    _refuse_latents(weights)
    told = Told(parse(FLAGS[dialect.NAME], flags, dialect.NAME))
    imported = dialect.read(weights, told)
    if told.flags.null_class:
        imported = replace(imported, spec=_with_null_class(imported.spec))
    _require_betas(weights, imported.spec)
    spec = with_provenance(
        imported.network, imported.spec, imported.dialect, weights.step, averaged=weights.averaged
    )
    recognised = (*weights.described(), *imported.recognised)
    return Imported(imported.network, spec, imported.dialect, recognised, imported.assumed)


def _refuse_latents(weights: Weights) -> None:
    """Raise ArtefactError where what stands beside the network decodes images out of what that makes."""
    if strays := [name for name in weights.aside if _AUTOENCODER.search(name)]:
        raise ArtefactError(
            f"{weights.name} has an autoencoder beside its network ({show(strays[0])}): such a network makes latents "
            "and not images, which is not supported"
        )


def _require_betas(weights: Weights, spec: ModelSpec) -> None:
    """Raise ArtefactError where betas stand beside the network, and the schedule told or assumed has others."""
    betas = next((t for name, t in weights.aside.items() if name.rpartition(".")[2] == "betas"), None)
    if betas is None or betas.ndim != 1 or not betas.is_floating_point():
        return
    if len(betas) != spec.timesteps:
        raise ArtefactError(
            f"{weights.name} has {len(betas)} betas beside its network, and {spec.timesteps} timesteps were told or "
            "assumed: tell it their number"
        )
    if (by := np.abs(betas.double().numpy() - spec.schedule.betas(spec.timesteps)).max()) > _SAME_BETA:
        raise ArtefactError(
            f"the betas in {weights.name} are not those of the schedule that was told or assumed (they differ by up to "
            f"{by:.1g}): tell it the schedule; where no flag names it, name the function that makes the network, as in "
            "ddpm-export my_package.models:build --weights FILE --spec FILE"
        )


def _with_null_class(spec: ModelSpec) -> ModelSpec:
    """The same network, whose last class stands for none."""
    if spec.num_classes < 2:
        raise SettingError(
            f"--null_class needs classes, one of which may be none: this network has {spec.num_classes}"
        )
    return msgspec.structs.replace(spec, num_classes=spec.num_classes - 1, null_class=True)


def _known(names: Collection[str]) -> bool:
    return any(one.recognises(names) for one in DIALECTS)


def _some(weights: Weights) -> str:
    return ", ".join(map(show, list(weights.state)[:3]))
