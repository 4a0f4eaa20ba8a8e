"""A Comparison for people and programs: a table, a JSON file, a plot."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import OutputError
from ddpm_deploy.files import atomic, show
from ddpm_deploy.runtime.parity import Comparison, summarise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def as_table(result: Comparison, reference: str, candidate: str, timesteps: int) -> str:
    """What `ddpm-verify` prints."""
    limit = result.tolerance
    lines = [
        f"prediction of {candidate} at the x_t of {reference} ({len(result.steps)} timesteps)",
        "        t        max error   RMS error ÷ RMS",
    ]
    lines += [
        f"{row['from']:>5} … {row['to']:<5} {row['max']:>9.1e}   {row['relative_rms']:>9.1e}"
        f"{'' if row['relative_rms'] <= limit.prediction else '   past tolerance'}"
        for row in summarise(result.steps, timesteps)
    ]
    past = result.first_past
    lines += [
        f"  tolerance             {limit.prediction:>9.1e}",
        f"  first t past tolerance: {'none' if past is None else past}",
        f"final images of whole chains on the same noise ({len(result.psnr)})",
        f"  PSNR: worst image {_decibels(result.psnr.min())}, mean {_decibels(result.psnr.mean())}"
        f" (at least {limit.psnr:.0f} dB allowed)",
        "within tolerance" if result.within else "PAST TOLERANCE",
    ]
    return "\n".join(lines)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def write_json(result: Comparison, reference: ModelSpec, candidate: ModelSpec, path: Path) -> None:
    """Every figure; those that are not finite as null, which JSON has in their place."""
    content: dict[str, Any] = {
        "ddpm_deploy": __version__,
        "within_tolerance": result.within,
        "tolerance": asdict(result.tolerance),
        "first_t_past_tolerance": result.first_past,
        "psnr": [_finite(value) for value in result.psnr],
        "steps": [
            {
                name: _finite(value)
                for name, value in (asdict(step) | {"relative_rms": step.relative_rms}).items()
            }
            for step in result.steps
        ],
        "reference": reference.to_builtins(),
        "candidate": candidate.to_builtins(),
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def require_plotting(path: Path) -> None:
    """Raise an error where `write_plot` could not draw there: ask this before long work."""
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise OutputError(f"{show(path)}: a plot is written as {', '.join(_PLOT_SUFFIXES)}")
    require("matplotlib", "plot")


def write_plot(result: Comparison, candidate: str, path: Path) -> None:
    """The relative RMS error of the prediction against t, with the tolerance."""
    figure_module = require("matplotlib.figure", "plot")
    figure = figure_module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    timesteps = [step.timestep for step in result.steps]
    axes.semilogy(timesteps, [step.relative_rms for step in result.steps], ".-", label=candidate)
    axes.axhline(result.tolerance.prediction, color="tab:red", linestyle="--", label="tolerance")
    axes.set(xlabel="t", ylabel="RMS error of the prediction ÷ its RMS", title="Error against the reference")
    axes.invert_xaxis()  # as the chain runs
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
