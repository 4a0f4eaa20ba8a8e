"""What packages take on the disk, with all that they need."""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def megabytes_of(names: Iterable[str]) -> float | None:
    """The files of distributions and of all that these need, without extras; None where one named is not here."""
    try:
        found = _closure(names)
    except metadata.PackageNotFoundError:
        return None
    files = {Path(str(path.locate())) for each in found for path in each.files or ()}
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def _closure(names: Iterable[str]) -> list[metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    asked = [metadata.distribution(name) for name in names]
    while asked:
        each = asked.pop()
        name = _normal(each.metadata["Name"])
        if name in found:
            continue
        found[name] = each
        for line in each.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                try:
                    asked.append(metadata.distribution(requirement.name))
                except metadata.PackageNotFoundError:  # installed without, which then needs less
                    continue
    return list(found.values())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
