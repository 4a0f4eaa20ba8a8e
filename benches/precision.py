"""The precision ladder: `python -m benches.precision` writes docs/precision.md, from the model of `make demo`."""

import datetime
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benches.models import export_preset
from ddpm_deploy.export.graph import export_onnx
from ddpm_deploy.export.precision import Oracle, calibrate
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.network import time_call
from ddpm_deploy.runtime.parity import Comparison, Trajectory, judge, record, summarise
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import load_network
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.train.unet import UNet
from ddpm_deploy.words import GraphPrecision

_ROOT: Final = Path(__file__).parent.parent
_DOCS: Final = _ROOT / "docs" / "precision.md"
_MARK: Final = "<!-- made by python -m benches.precision -->"
_ROUNDS: Final = 5


def main() -> None:
    """Measure both networks, and write the part of the page that stands behind the mark."""
    tables = [f"Measured {datetime.date.today().isoformat()}, on a CPU.\n"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network, spec = load_network(open_model(_ROOT / "demo" / "digits.pt"))
        tables.append("### Digits, trained: 4 chains of 1000 steps, every timestep compared\n")
        tables.append(_ladder(network, spec, folder, count=4, steps=1000))
        random = export_preset("cifar10", folder)
        tables.append(
            "### The cifar10 network, random weights: a chain of 20 steps\n\n"
            "Nobody has trained it here (800,000 steps at batch 128). Random weights, with none of them zero, are the\n"
            "harder case: every branch counts fully, and rounding errors add up at every t.\n"
        )
        tables.append(_ladder(random.network, random.spec, folder, count=1, steps=20))
    text = _DOCS.read_text().split(_MARK)[0]
    _DOCS.write_text(text + _MARK + "\n\n" + "\n".join(tables))
    print(f"wrote {_DOCS}")


def _ladder(network: UNet, spec: ModelSpec, folder: Path, *, count: int, steps: int) -> str:
    trajectory = record(TorchNetwork(network, spec, max_batch=count), count=count, steps=steps, keep=steps)
    columns = [*_files(network, spec, folder, trajectory), *_oracles(network, trajectory)]
    names, comparisons, costs = zip(*columns, strict=True)
    rows = [("t", *names), ("---",) * (len(names) + 1)]
    rows += [
        (f"{ranges[0].top} … {ranges[0].bottom}", *(f"{r.relative_rms:.1e}" for r in ranges))
        for ranges in zip(*map(summarise, comparisons), strict=True)
    ]
    rows += [
        ("worst image", *(f"{c.psnr.min():.0f} dB" for c in comparisons)),
        ("within tolerance", *("yes" if c.within else "no" for c in comparisons)),
        ("ms a step, MB", *costs),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _files(
    network: UNet, spec: ModelSpec, folder: Path, trajectory: Trajectory
) -> Iterator[tuple[str, Comparison, str]]:
    """The exported files in ONNX Runtime."""
    precisions: Sequence[GraphPrecision] = ("fp32", "fp16")
    paths = [folder / f"ladder.{precision}.onnx" for precision in precisions]
    for precision, path in zip(precisions, paths, strict=True):
        export_onnx(network, spec, path, precision=precision)
    models: list[Network] = [OrtNetwork(open_model(path), max_batch=trajectory.count) for path in paths]
    rounds = [[time_call(model, trajectory.count) for model in models] for _ in range(_ROUNDS)]
    for precision, path, model, times in zip(
        precisions, paths, models, zip(*rounds, strict=True), strict=True
    ):
        cost = f"{statistics.median(times) * 1e3:.1f}, {path.stat().st_size / 1e6:.1f}"
        yield f"{precision} file, ONNX Runtime", judge(trajectory, model), cost
        model.close()


def _oracles(network: UNet, trajectory: Trajectory) -> Iterator[tuple[str, Comparison, str]]:
    """What hardware of each precision would compute."""
    precisions: Sequence[GraphPrecision] = ("fp16", "bf16")
    for precision in precisions:
        islands = calibrate(network, trajectory, precision).islands
        oracle = Oracle(network, trajectory.spec, precision, islands, max_batch=max(16, trajectory.count))
        yield f"{precision} oracle", judge(trajectory, oracle), "—"


if __name__ == "__main__":
    main()
