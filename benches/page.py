"""docs/benchmarks.md, which two commands write: what stands before its mark, and what stands behind it."""

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Final

from ddpm_deploy.machine import cpu_threads

DOCS: Final = Path(__file__).parent.parent / "docs"
PAGE: Final = DOCS / "benchmarks.md"
_MARK: Final = "<!-- made by python -m benches.peers_speed -->\n"


def write_head(text: str) -> None:
    """Write what `python -m benches` measured."""
    _, mark, section = PAGE.read_text().partition(_MARK)
    PAGE.write_text(text + ("\n" + mark + section if mark else ""))


def write_section(text: str) -> None:
    """Write what `python -m benches.peers_speed` measured."""
    head = PAGE.read_text().partition(_MARK)[0].rstrip("\n")
    PAGE.write_text(f"{head}\n\n{_MARK}\n{text}")


def machine(packages: Iterable[str]) -> str:
    """What was measured on, and the versions of packages that are here."""
    versions = []
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return f"{cpu_threads()} cores of {_cpu()}, Python {platform.python_version()}, {', '.join(versions)}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
