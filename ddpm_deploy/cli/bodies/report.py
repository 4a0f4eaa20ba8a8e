"""Comparisons for people and programs: a table, a JSON file, a plot."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import plural
from ddpm_deploy.files import atomic, require_suffix
from ddpm_deploy.runtime.parity import Comparison, StepErrors, Trajectory, summarise
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

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
    labels = [
        "t",
        *(f"{found.top:>5} … {found.bottom:<5}" for found in summarise(rungs[0].comparison)),
        "  tolerance",
        "  first t past tolerance",
        "  largest error of one number",
        "final images, worst PSNR",
        "  mean PSNR",
        "  tolerance",
        f"ms per step, batch {trajectory.count}, here",
        "MB",
        "",
    ]
    columns = [_column(rung) for rung in rungs]
    width = max(len(cell) for cells in columns for cell in cells) + 2
    head = max(map(len, labels))
    lines = [
        f"RMS error of the prediction ÷ its RMS, at the x_t of {reference} "
        f"({plural(len(trajectory.timesteps), 'timestep')}, {plural(trajectory.count, 'chain')} of "
        f"{plural(trajectory.steps, 'step')})"
    ]
    for label, *cells in zip(labels, *columns, strict=True):
        lines.append(f"{label:<{head}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join([*lines, *_advice(rungs)])


def _column(rung: Rung) -> list[str]:
    """What the table says of a candidate, from top to bottom."""
    found = rung.comparison
    limits = [limit for _, limit in found.tolerance.prediction]
    return [
        rung.name,
        *(f"{errors.relative_rms:.1e}" + " !" * (not errors.within) for errors in summarise(found)),
        f"{limits[0]:.0e}" if len(limits) == 1 else f"{limits[-1]:.0e} … {limits[0]:.0e}",
        "none" if found.first_past is None else str(found.first_past),
        f"{max(step.max for step in found.steps):.1e}",
        *(
            "equal" if psnr == math.inf else f"{psnr:.1f} dB"
            for psnr in (found.psnr.min(), found.psnr.mean())
        ),
        f"{found.tolerance.psnr:.0f} dB",
        f"{rung.milliseconds:.1f}",
        f"{rung.megabytes:.1f}",
        "within tolerance" if found.within else "PAST TOLERANCE",
    ]


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
    engines = [rung for rung in sound if rung is not best and rung.spec.precision != "fp32"]
    return [
        f"choose {best.name}: within tolerance, and none is clearly faster here",
        *(
            f"{rung.name} is for building an engine: a CPU computes {rung.spec.precision} in float32"
            for rung in engines
        ),
    ]


def json_text(content: dict[str, Any]) -> str:
    """Return what was found, dataclasses too, as JSON."""
    return json.dumps(content, indent=1, default=asdict)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write it to a file."""
    with atomic(path) as temporary:
        temporary.write_text(json_text(content) + "\n")


def as_json(rungs: Sequence[Rung], trajectory: Trajectory) -> dict[str, Any]:
    """Return every figure."""
    return {
        "ddpm_deploy": __version__,
        "within_tolerance": all(rung.comparison.within for rung in rungs),
        "reference": trajectory.spec.to_builtins(),
        "seed": trajectory.seed,
        "steps": trajectory.steps,
        "candidates": [
            {
                "name": rung.name,
                "within_tolerance": rung.comparison.within,
                "tolerance": rung.comparison.tolerance,
                "first_t_past_tolerance": rung.comparison.first_past,
                "milliseconds": rung.milliseconds,
                "megabytes": rung.megabytes,
                "psnr": finite(rung.comparison.psnr),
                "predictions": predictions_json(rung.comparison.steps),
                "spec": rung.spec.to_builtins(),
            }
            for rung in rungs
        ],
    }


def predictions_json(steps: Sequence[StepErrors]) -> list[dict[str, float | None]]:
    """Return the errors of predictions, one for each timestep."""
    errors = [asdict(step) | {"relative_rms": step.relative_rms} for step in steps]
    return [dict(zip(step, finite(step.values()), strict=True)) for step in errors]


def finite(values: Iterable[float]) -> list[float | None]:
    """Return the numbers as JSON has them: one that is not finite is null."""
    return [value if math.isfinite(value) else None for value in values]


def require_plotting(path: Path) -> None:
    """Raise an error where `write_plot` could not write its plot: call this before long work."""
    require_suffix(path, "a plot", ".png", ".svg", ".pdf")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where its cache cannot be written
    require("matplotlib", "plot")


def write_plot(rungs: Sequence[Rung], path: Path) -> None:
    """Plot the relative RMS error of each candidate's prediction against t, with its tolerance."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for rung in rungs:
        comparison = rung.comparison
        timesteps = [step.timestep for step in comparison.steps]
        errors = [step.relative_rms for step in comparison.steps]
        (line,) = axes.semilogy(timesteps, errors, ".-", label=rung.name)
        limits = [step.limit for step in comparison.steps]
        axes.step(timesteps, limits, color=line.get_color(), linestyle="--", label="  its tolerance")
    axes.set(xlabel="t", ylabel="RMS error of the prediction ÷ its RMS", title="Error against the reference")
    axes.invert_xaxis()  # as the chain runs
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
