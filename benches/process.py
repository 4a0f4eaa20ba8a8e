"""Whole processes: how long they take to start."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benches.models import Model
from benches.table import Row

_BIN: Final = Path(sys.executable).parent
_RUNS: Final = 7


def measure(models: dict[str, Model]) -> Iterator[Row]:
    """Rows for start-up."""
    ours, numpy = _interleaved(
        [sys.executable, "-c", "import numpy, ddpm_deploy"], [sys.executable, "-c", "import numpy"]
    )
    yield _seconds("import ddpm_deploy, beyond numpy", max(0.0, ours - numpy), 0.15)
    yield _seconds("ddpm-run --help", _interleaved([_BIN / "ddpm-run", "--help"])[0], 0.35)
    run: list[str | Path] = [
        _BIN / "ddpm-run",
        "-q",
        "--count",
        "16",
        "--seed",
        "0",
        "-o",
        "/tmp/ddpm-bench.npz",
    ]
    first = _interleaved([*run, models["digits"].onnx, "--steps", "1"])[0]
    yield _seconds("ddpm-run digits: the whole process, for one step", first, 1.0)


def _seconds(what: str, seconds: float, limit: float) -> Row:
    return Row(what, f"{seconds:.2f} s", f"≤ {limit} s", seconds <= limit)


def _interleaved(*commands: Sequence[str | Path]) -> list[float]:
    """The median wall time of each command, run in turn, after a warm-up."""
    times: list[list[float]] = [[] for _ in commands]
    for run in range(_RUNS + 1):
        for command, list_ in zip(commands, times, strict=True):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if run:
                list_.append(time.perf_counter() - start)
    return [statistics.median(list_) for list_ in times]
