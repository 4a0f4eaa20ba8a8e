"""Reading a foreign network for ddpm-export, and telling what was recognised. This module imports PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import SettingError, plural
from ddpm_deploy.files import show
from ddpm_deploy.importers.check import Fit, compare
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Imported, with_provenance
from ddpm_deploy.importers.module import load_module, read_spec
from ddpm_deploy.importers.own import FORMS, adapt
from ddpm_deploy.importers.told import Assumption
from ddpm_deploy.schedule import SCHEDULES
from ddpm_deploy.words import PREDICTIONS


def read_and_tell(
    path: Path, flags: Mapping[str, Any], key: str | None, check_images: Path | None
) -> Imported:
    """Read another's checkpoint, and say what it is and what was assumed."""
    imported = import_checkpoint(path, flags, key)
    _tell(imported)
    if check_images:

        def read(told: Mapping[str, Any]) -> Imported:
            as_assumed = {one.flag: one.value for one in imported.assumed}  # so that one thing changes
            return import_checkpoint(path, {**as_assumed, **flags, **told}, key)

        _require_best(compare(imported, read, str(check_images), stages=stage), check_images, "--{} {}")
    return imported


def _require_best(fits: Sequence[Fit], images: Path, form: str) -> None:
    """Tell how each reading fits the images. Raises SettingError where one fits them better than the assumed one.

    form: how what a reading takes is told to ddpm-export.
    """
    logger.info("L_simple on %s: %.4f as it was read", show(images), fits[0].loss)
    for fit in fits[1:]:
        if fit.loss is None:
            logger.info("  %s: no such network (%s)", form.format(fit.flag, fit.value), fit.why)
        else:
            verdict = "better" if fit.better else "worse" if fit.worse else "not told apart by these images"
            logger.info("  %s: %.4f, %s", form.format(fit.flag, fit.value), fit.loss, verdict)
    if better := [fit for fit in fits if fit.better]:
        best = min(better, key=lambda fit: fit.loss or 0.0)
        raise SettingError(
            f"{form.format(best.flag, best.value)} fits {show(images)} better than what was read (L_simple "
            f"{best.loss:.4f}, not {fits[0].loss:.4f}): tell it, or omit --check-images"
        )


def build_and_tell(
    factory: str, weights: Path, spec: Path, key: str | None, check_images: Path | None
) -> Imported:
    """Make the user's own network, and say what was found of it."""
    described = read_spec(spec)
    # The source is in the spec, which has room for so much of it.
    network, found = load_module(factory, weights, key)
    described = with_provenance(network, described, factory[:200], found.step, found.averaged)
    own, described = adapt(network, described)
    given = "x, " + FORMS[own.form] + (", and y (B,) in int64" if described.num_classes else "")
    unchecked = f"T, schedule, prediction and ranges are as {show(spec)} says: --check-images holds them against images"
    imported = Imported(own, described, factory, (*found.described(), f"takes {given}", unchecked))
    _tell(imported)
    if check_images:
        _check_spec(imported, check_images)
    return imported


def _check_spec(imported: Imported, images: Path) -> None:
    """Hold what the spec file says of the prediction and the schedule against images, beside what else it might say."""
    spec = imported.spec
    predictions = tuple(one for one in PREDICTIONS if one != spec.prediction)
    schedules = tuple(name for name, schedule in SCHEDULES.items() if schedule != spec.schedule)
    others = (Assumption("prediction", None, predictions), Assumption("schedule", None, schedules))

    def read(told: Mapping[str, Any]) -> Imported:
        changed = {name: SCHEDULES.get(value, value) for name, value in told.items()}
        return replace(imported, spec=msgspec.structs.replace(spec, **changed))

    fits = compare(replace(imported, assumed=others), read, str(images), stages=stage)
    _require_best(fits, images, 'in the spec, {} = "{}"')


def _tell(imported: Imported) -> None:
    """Say on stderr what was recognised, and which flag changes what was assumed."""
    count = sum(parameter.numel() for parameter in imported.network.parameters())
    logger.info("%s: %s", imported.dialect, plural(count, "parameter"))
    for line in imported.recognised:
        logger.info("  %s", line)
    if imported.assumed:
        logger.info("assumed, as nothing in it tells (each flag changes it):")
    for assumption in imported.assumed:
        others = f"; others: {', '.join(map(str, assumption.others))}" if assumption.others else ""
        logger.info("  --%s %s%s", assumption.flag, assumption.value, others)
