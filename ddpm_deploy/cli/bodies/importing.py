"""Reading a foreign network for ddpm-export, and telling what was recognised. This module imports PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import plural
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Assumption, Imported


def read_and_tell(
    path: Path, flags: Mapping[str, Any], key: str | None, check_images: Path | None
) -> Imported:
    """Read another's checkpoint, and say what it is and what was assumed."""
    imported = import_checkpoint(path, flags, key)
    _tell(imported)
    return imported


def build_and_tell(factory: str, weights: Path, spec: Path, key: str | None) -> Imported:
    """Make the user's own network, and say what was found of it."""
    raise NotImplementedError


def _tell(imported: Imported) -> None:
    """Say on stderr what was recognised, and which flag changes what was assumed."""
    count = sum(parameter.numel() for parameter in imported.network.parameters())
    logger.info("%s: %s", imported.dialect, plural(count, "parameter"))
    for line in imported.recognised:
        logger.info("  %s", line)
    if imported.assumed:
        logger.info("assumed, as nothing in it tells (%s changes it):", _flag(imported.assumed[0]))
    for assumption in imported.assumed:
        others = f"; others: {', '.join(map(str, assumption.others))}" if assumption.others else ""
        logger.info("  %s %s%s", _flag(assumption), assumption.value, others)


def _flag(assumption: Assumption) -> str:
    return f"--{assumption.flag}"
