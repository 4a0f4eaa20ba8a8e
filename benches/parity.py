"""The exported network against PyTorch, on the model that `make demo` trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benches.table import Row
from ddpm_deploy.runtime.ort import OrtDenoiser
from ddpm_deploy.runtime.parity import judge, record
from ddpm_deploy.train.denoiser import TorchDenoiser

_DEMO: Final = Path(__file__).parent.parent / "demo"
_IMAGES: Final = 16


def measure() -> Iterator[Row]:
    """Rows for every t and whole chains; none where there is no demo yet."""
    checkpoint, onnx = _DEMO / "digits.pt", _DEMO / "digits.onnx"
    if not (checkpoint.exists() and onnx.exists()):
        return
    trajectory = record(TorchDenoiser.load(checkpoint), count=_IMAGES, keep=1000)
    result = judge(trajectory, OrtDenoiser(onnx))
    worst = result.worst
    limit = result.limit(worst)
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
