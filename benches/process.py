"""Whole processes: how long they take to start, and how much memory they take."""

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
_CPU_ENVIRONMENT: Final = Path(__file__).parent.parent / ".venv-cpu"  # made by the tests

_BARE_SESSION = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shapes = {i.name: [1, *i.shape[1:]] for i in session.get_inputs()}
for _ in range(5):
    session.run(None, {name: numpy.zeros(shape, "f4") for name, shape in shapes.items()})
"""

_WATCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(models: dict[str, Model]) -> Iterator[Row]:
    """Rows for start-up and memory."""
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
    cifar = models["cifar10"].onnx
    chain = _peak_mb(
        [_BIN / "ddpm-run", "-q", cifar, "--steps", "5", "--count", "1", "-o", "/tmp/ddpm-bench.npz"]
    )
    bare = _peak_mb([sys.executable, "-c", _BARE_SESSION, cifar])
    ratio = f"{chain / bare:.2f} ({chain:.0f} ÷ {bare:.0f} MB)"
    yield Row("cifar10: peak memory of ddpm-run ÷ of a bare session", ratio, "≤ 1.2", chain / bare <= 1.2)
    if _CPU_ENVIRONMENT.is_dir():
        size = _installed_mb(_CPU_ENVIRONMENT)
        yield Row("base and cpu extra, installed, without pip", f"{size:.0f} MB", "≤ 250 MB", size <= 250)


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


def _peak_mb(command: Sequence[str | Path]) -> float:
    """The largest resident set of a process.

    A child's figure starts from its parent's size, so the parent is a small process of its own.
    """
    watched = [sys.executable, "-c", _WATCH, *command]
    return int(subprocess.run(watched, check=True, capture_output=True, text=True).stdout) / 1000


def _installed_mb(environment: Path) -> float:
    (packages,) = environment.glob("lib/python*/site-packages")
    files = (
        p
        for p in packages.rglob("*")
        if p.is_file() and p.relative_to(packages).parts[0] not in ("pip", "setuptools")
    )
    return sum(p.stat().st_blocks * 512 for p in files) / 1e6
