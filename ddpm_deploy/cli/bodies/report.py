"""Comparisons for people and programs: a table, a JSON file, a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.cli.bodies.progress import plural
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import OutputError
from ddpm_deploy.files import atomic, show
from ddpm_deploy.runtime.parity import Comparison, StepErrors, Trajectory, summarise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

_PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")
_AS_FAST: Final = 1.05  # timings differ by more than this from run to run


@dataclass(frozen=True)
class Rung:
    """A candidate: what it is, and what was measured of it.

    milliseconds: a call of the network takes on this machine. megabytes: the size of its file.
    """

    name: str
    spec: ModelSpec
    comparison: Comparison
    milliseconds: float
    megabytes: float


def as_table(rungs: Sequence[Rung], trajectory: Trajectory, reference: str) -> str:
    """Write the table that `ddpm-verify` prints, with a column for each candidate."""
    comparisons = [rung.comparison for rung in rungs]
    rows: list[tuple[str, list[str]]] = [("t", [rung.name for rung in rungs])]
    for ranges in zip(*map(summarise, comparisons), strict=True):
        label = f"{ranges[0].top:>5} … {ranges[0].bottom:<5}"
        rows.append((label, [f"{r.relative_rms:.1e}" + ("" if r.within else " !") for r in ranges]))
    rows += [
        ("  tolerance", [_limits(c) for c in comparisons]),
        (
            "  first t past tolerance",
            ["none" if c.first_past is None else str(c.first_past) for c in comparisons],
        ),
        ("  largest error of one number", [f"{max(step.max for step in c.steps):.1e}" for c in comparisons]),
        ("final images, worst PSNR", [_decibels(float(c.psnr.min())) for c in comparisons]),
        ("  mean PSNR", [_decibels(float(c.psnr.mean())) for c in comparisons]),
        ("  tolerance", [f"{c.tolerance.psnr:.0f} dB" for c in comparisons]),
        (f"ms per step, batch {trajectory.count}, here", [f"{rung.milliseconds:.1f}" for rung in rungs]),
        ("MB", [f"{rung.megabytes:.1f}" for rung in rungs]),
        ("", ["within tolerance" if c.within else "PAST TOLERANCE" for c in comparisons]),
    ]
    width = max(len(cell) for _, cells in rows for cell in cells) + 2
    head = max(len(label) for label, _ in rows)
    lines = [
        f"RMS error of the prediction ÷ its RMS, at the x_t of {reference} ({len(trajectory.timesteps)} timesteps, "
        f"{plural(trajectory.count, 'chain')} of {plural(trajectory.steps, 'step')})"
    ]
    lines += [f"{label:<{head}}" + "".join(f"{cell:>{width}}" for cell in cells) for label, cells in rows]
    return "\n".join([*lines, *_advice(rungs)])


def _advice(rungs: Sequence[Rung]) -> list[str]:
    """Which of several candidates to choose."""
    if len(rungs) == 1:
        return []
    sound = [rung for rung in rungs if rung.comparison.within]
    if not sound:
        return ["choose none of them: all are past tolerance"]
    fastest = min(rung.milliseconds for rung in sound)
    near = [rung for rung in sound if rung.milliseconds <= fastest * _AS_FAST]
    best = min(near, key=lambda rung: rung.comparison.worst.relative_rms)
    lines = [f"choose {best.name}: within tolerance, and none is clearly faster here"]
    lines += [
        f"{rung.name} is for building an engine: a CPU computes {rung.spec.precision} in float32"
        for rung in sound
        if rung is not best and rung.spec.precision != "fp32"
    ]
    return lines


def _limits(comparison: Comparison) -> str:
    limits = [limit for _, limit in comparison.tolerance.prediction]
    return f"{limits[0]:.0e}" if len(limits) == 1 else f"{limits[-1]:.0e} … {limits[0]:.0e}"


def _decibels(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def write_json(rungs: Sequence[Rung], trajectory: Trajectory, path: Path) -> None:
    """Write every figure; one that is not finite is written as null, as JSON has no other word for it."""
    content: dict[str, Any] = {
        "ddpm_deploy": __version__,
        "within_tolerance": all(rung.comparison.within for rung in rungs),
        "reference": trajectory.spec.to_builtins(),
        "seed": trajectory.seed,
        "steps": trajectory.steps,
        "candidates": [_rung_json(rung) for rung in rungs],
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _rung_json(rung: Rung) -> dict[str, Any]:
    comparison = rung.comparison
    return {
        "name": rung.name,
        "within_tolerance": comparison.within,
        "tolerance": asdict(comparison.tolerance),
        "first_t_past_tolerance": comparison.first_past,
        "milliseconds": rung.milliseconds,
        "megabytes": rung.megabytes,
        "psnr": [_finite(value) for value in comparison.psnr],
        "predictions": predictions_json(comparison.steps),
        "spec": rung.spec.to_builtins(),
    }


def predictions_json(steps: Sequence[StepErrors]) -> list[dict[str, float | None]]:
    """Return the errors of predictions, one for each timestep."""
    return [
        {name: _finite(value) for name, value in (asdict(step) | {"relative_rms": step.relative_rms}).items()}
        for step in steps
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def require_plotting(path: Path) -> None:
    """Raise an error where `write_plot` could not write its plot: call this before long work."""
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise OutputError(f"{show(path)}: a plot is written as {', '.join(_PLOT_SUFFIXES)}")
    require("matplotlib", "plot")


def write_plot(rungs: Sequence[Rung], path: Path) -> None:
    """Plot the relative RMS error of each candidate's prediction against t, with its tolerance."""
    figure_module = require("matplotlib.figure", "plot")
    figure = figure_module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for rung in rungs:
        comparison = rung.comparison
        timesteps = [step.timestep for step in comparison.steps]
        (line,) = axes.semilogy(
            timesteps, [step.relative_rms for step in comparison.steps], ".-", label=rung.name
        )
        limits = [step.limit for step in comparison.steps]
        axes.step(timesteps, limits, color=line.get_color(), linestyle="--", label="  its tolerance")
    axes.set(xlabel="t", ylabel="RMS error of the prediction ÷ its RMS", title="Error against the reference")
    axes.invert_xaxis()  # as the chain runs
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
