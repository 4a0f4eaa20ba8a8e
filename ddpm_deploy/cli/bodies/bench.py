"""ddpm-deploy bench: let the backends take turns, and print what came out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ddpm_deploy.bench.candidates import candidates, not_installed
from ddpm_deploy.bench.measure import Contest, Row, advice, contest, steps_of
from ddpm_deploy.cli.bodies.progress import duration, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import DependencyError, SettingError, plural
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.spec import FAST
from ddpm_deploy.version import __version__


def bench(
    models: tuple[Path, ...], batches: tuple[int, ...] | None, threads: int | None, as_json: bool
) -> None:
    """Measure every backend that takes one of the models; exit with 1 where none ran within tolerance."""
    opened = [_opened(path) for path in models]
    for model in opened[1:]:
        if model.spec.provenance.digest != opened[0].spec.provenance.digest:
            logger.warning("the weights of %s are not those of %s", model.name, opened[0].name)
    absent = not_installed(opened)
    found = candidates(opened)
    if not found:
        raise DependencyError(f"no backend is installed that runs this: {' or '.join(absent.values())}")
    with contest(found, batches, threads, stage) as run:
        _forecast(run, threads or cpu_threads())
        run.measure(stage)
    click.echo(json.dumps(_content(run), indent=1) if as_json else _table(run.rows, run.batches))
    for backend, line in absent.items():
        logger.info("%s is not installed, and may be faster: %s", backend, line)
    if not any(row.sound and row.times for row in run.rows):
        raise click.exceptions.Exit(1)


def _opened(path: Path) -> ModelFile:
    """Open a model that may be run. Refuses what no backend takes."""
    model = open_model(path)
    if model.kind == "foreign":
        raise SettingError(f"{model.name} is another's checkpoint: make an .onnx of it with ddpm-export")
    assert model.spec
    model.require_intact()
    return model


def _forecast(run: Contest, threads: int) -> None:
    """Say what it will take."""
    logger.info(
        "%s · batch %s · %s · about %s",
        plural(len(run.rows), "backend"),
        ", ".join(map(str, run.batches)),
        plural(threads, "thread"),
        duration(run.seconds),
    )
    for batch, seconds in run.left_out.items():
        logger.info(
            "batch %d would take %s more, and is left out: --batch %d times it",
            batch,
            duration(seconds),
            batch,
        )


def _table(rows: Sequence[Row], batches: Sequence[int]) -> str:
    """Write the table for people, and the advice."""
    head = ["model", "backend", *(f"batch {batch}" for batch in batches), "images/s", "MB", "error", ""]
    cells = [_cells(row, batches) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 or i == len(head) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *cells)
    ]
    steps = steps_of(rows[0].candidate.model)
    about = f"ms a step · images/s by {plural(steps, 'step')} of {FAST.solver} · largest memory · error of a prediction"
    return "\n".join([about, *lines, advice(rows)])


def _cells(row: Row, batches: Sequence[int]) -> list[str]:
    """What the table says of a row; of one that failed, why."""
    found = row.candidate
    backend = f"{found.backend} {found.precision}"
    if row.problem:
        return [found.model.name, backend, *("-" for _ in batches), "-", "-", "-", row.problem]
    error, verdict = "no proof", ""
    if row.error:
        error = f"{row.error['relative_rms']:.1e}"
        verdict = "within tolerance" if row.error["within"] else f"PAST {row.error['limit']:.0e}"
    memory = "?" if row.megabytes is None else f"{row.megabytes:.0f}"
    times = [f"{row.milliseconds(batch):.1f}" for batch in batches]
    return [found.model.name, backend, *times, f"{row.images_per_second:.2f}", memory, error, verdict]


def _content(run: Contest) -> dict[str, Any]:
    """Return every figure."""
    return {
        "ddpm_deploy": __version__,
        "solver": FAST.solver,
        "rows": [_figures(row) for row in run.rows],
        "advice": advice(run.rows),
    }


def _figures(row: Row) -> dict[str, Any]:
    found = row.candidate
    content = {
        "model": found.model.name,
        "backend": found.backend,
        "precision": found.precision,
        "problem": row.problem or None,
        "seconds_to_first_step": row.load,
        "seconds_a_step": row.times,
        "milliseconds": {batch: row.milliseconds(batch) for batch in row.times},
        "megabytes": row.megabytes,
        "error": row.error,
    }
    if row.times:
        content |= {"images_per_second": row.images_per_second, "at_batch": row.best_batch}
    return content
