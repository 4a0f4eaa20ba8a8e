"""The exported network against PyTorch, on the model that `make demo` trained."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benches.table import Row
from ddpm_deploy.export.graph import export_onnx
from ddpm_deploy.export.precision import calibrate
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.parity import StepErrors, Trajectory, judge, record
from ddpm_deploy.train.checkpoint import load_network
from ddpm_deploy.train.network import TorchNetwork

_DEMO: Final = Path(__file__).parent.parent / "demo"
_IMAGES: Final = 16


def measure() -> Iterator[Row]:
    """Rows for every t and whole chains; none where there is no demo yet."""
    checkpoint, onnx = _DEMO / "digits.pt", _DEMO / "digits.onnx"
    if not (checkpoint.exists() and onnx.exists()):
        return
    trajectory = record(TorchNetwork(*load_network(open_model(checkpoint))), count=_IMAGES, keep=1000)
    result = judge(trajectory, OrtNetwork(open_model(onnx)))
    worst = result.worst
    limit = worst.limit
    measured = f"{worst.relative_rms:.1e} (t = {worst.timestep})"
    met = worst.relative_rms <= limit
    yield Row(
        "trained digits, every t: RMS error of ε ÷ RMS of ε, the largest",
        measured,
        f"≤ {limit:.0e}",
        met,
    )
    psnr = float(result.psnr.min())
    label = f"trained digits, full chain: PSNR of the worst of {_IMAGES} images"
    yield Row(label, f"{psnr:.0f} dB", f"≥ {result.tolerance.psnr:.0f} dB", psnr >= result.tolerance.psnr)
    yield from _half(checkpoint, trajectory)


def _half(checkpoint: Path, trajectory: Trajectory) -> Iterator[Row]:
    """Rows for float16: as the oracle of its hardware computes, and the exported file in ONNX Runtime."""
    network, spec = load_network(open_model(checkpoint))
    calibration = calibrate(network, trajectory, "fp16")
    yield from _by_range("oracle", calibration.steps, low=1e-2, high=2e-3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.fp16.onnx"
        export_onnx(network, spec, path, precision="fp16")
        result = judge(trajectory, OrtNetwork(open_model(path)))
    yield from _by_range("file in ONNX Runtime", result.steps, low=3e-3, high=1e-3)
    psnr = float(result.psnr.min())
    label = f"trained digits, fp16 file, full chain: PSNR of the worst of {_IMAGES} images"
    yield Row(label, f"{psnr:.0f} dB", "≥ 60 dB", psnr >= 60)


def _by_range(what: str, steps: Sequence[StepErrors], *, low: float, high: float) -> Iterator[Row]:
    for label, limit, inside in (
        ("t < 10", low, [s for s in steps if s.timestep < 10]),
        ("t ≥ 100", high, [s for s in steps if s.timestep >= 100]),
    ):
        error = max(step.relative_rms for step in inside)
        name = f"trained digits, fp16 {what}, {label}: RMS error of ε ÷ RMS of ε"
        yield Row(name, f"{error:.1e}", f"≤ {limit:.0e}", error <= limit)
