"""ddpm-verify: record the reference or read its proof, and judge the candidates by it."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Unpack

import click

from ddpm_deploy.cli.bodies import report as reporting
from ddpm_deploy.cli.bodies.models import Place, open_network
from ddpm_deploy.cli.bodies.outputs import check_outputs
from ddpm_deploy.cli.bodies.progress import duration, stage
from ddpm_deploy.cli.bodies.report import Rung
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import ArtefactError, SettingError, plural
from ddpm_deploy.files import require_suffix, show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.network import time_call
from ddpm_deploy.runtime.parity import Trajectory, judge, record, require_comparable
from ddpm_deploy.runtime.proof import proof_of, proof_path
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.words import Backend

_COUNT: Final = 4  # images, where nothing else is said
_KEPT: Final = 50  # timesteps at which predictions are compared, where nothing else is said
_ROUNDS: Final = 5  # of timing


def verify(
    models: tuple[Path, ...],
    *,
    count: int | None,
    steps: int | None,
    seed: int | None,
    every: bool,
    proof: Path | None,
    report: Path | None,
    as_json: bool,
    plot: Path | None,
    **place: Unpack[Place],
) -> None:
    """Compare models with a reference, or one with its proof; exit with 1 where one is past tolerance."""
    check_outputs([report, plot], filter(None, [*models, *map(proof_path, models), proof]))
    if report:
        require_suffix(report, "a report", ".json")
    if plot:
        reporting.require_plotting(plot)
    opened = [_opened(path, place["backend"]) for path in models]
    if len(opened) == 1:
        if every or (count, steps, seed) != (None, None, None):
            raise click.UsageError(
                "a proof has its own count, steps, seed and timesteps: omit --count, --steps, --seed and --all"
            )
        candidates, trajectory = opened, proven(opened[0], proof)
        reference = show(proof or "its proof")
    else:
        if proof:
            raise click.UsageError("--proof is for a single model")
        first, *candidates = opened
        for candidate in candidates:
            require_comparable(first.spec, candidate.spec)
        trajectory = _recorded(first, count or _COUNT, steps, seed or 0, every, len(candidates), place)
        reference = first.name
    rungs = _climb(candidates, trajectory, place)
    trajectory = trajectory.first(len(rungs[0].comparison.psnr))
    content = reporting.as_json(rungs, trajectory)
    table = reporting.as_table(rungs, trajectory, reference)
    click.echo(reporting.json_text(content) if as_json else table)
    if report:
        reporting.write_json(content, report)
    if plot:
        reporting.write_plot(rungs, plot)
    if not all(rung.comparison.within for rung in rungs):
        raise click.exceptions.Exit(1)


def _opened(path: Path, backend: Backend | None) -> ModelFile:
    """Open a model. Refuses one that cannot be compared, before minutes of work, and warns of one that was edited."""
    model = open_model(path)
    if model.spec.precision == "bf16" and model.kind == "onnx" and backend != "openvino":
        raise SettingError(
            f"{model.name} is in bfloat16, which ONNX Runtime cannot run on a CPU: ddpm-export has checked it in "
            "another way, and --backend openvino runs it"
        )
    model.require_finite()
    if not model.intact:
        logger.warning("%s is not what ddpm-export wrote: it is damaged, or was edited", model.name)
    return model


def proven(model: ModelFile, proof: Path | None) -> Trajectory:
    """The chains recorded in a model's proof."""
    path = proof or proof_path(model.path)
    if not (proof or path.exists()):
        raise ArtefactError(
            f"{model.name} has no proof beside it ({show(path)} does not exist): name a reference, as in "
            "ddpm-verify model.pt model.onnx, or a --proof"
        )
    return proof_of(model, path)


def _recorded(
    model: ModelFile,
    count: int,
    steps: int | None,
    seed: int,
    every: bool,
    candidates: int,
    place: Place,
) -> Trajectory:
    """The chains of the reference, recorded after a message that says how long all comparisons will take."""
    # It runs as it does by default: --device, --backend and --precision are for the candidates.
    by_default: Place = {**place, "device": None, "backend": None, "precision": None}
    reference = open_network(model, count, **by_default)
    count = _fitting(count, [reference])
    length = min(steps or reference.spec.timesteps, reference.spec.timesteps)
    keep = length if every else min(length, _KEPT)
    forecast = (length + candidates * (length + keep)) * time_call(reference, count)
    images, chains = plural(count, "image"), plural(length, "step")
    logger.info("%s · %d chains of %s · about %s", images, candidates + 1, chains, duration(forecast))
    with stage("reference", length) as advance:
        trajectory = record(reference, count=count, steps=steps, seed=seed, keep=keep, progress=advance)
    reference.close()
    return trajectory


def _fitting(count: int, networks: Sequence[Network]) -> int:
    """The number of images that fit into a batch of every network; warns where that is fewer than `count`."""
    fitting = min(count, *(network.max_batch for network in networks))
    if fitting < count:
        logger.warning("%d of %d images are compared: the batch of a model takes no more", fitting, count)
    return fitting


def _climb(candidates: Sequence[ModelFile], trajectory: Trajectory, place: Place) -> list[Rung]:
    """Judge and time each candidate."""
    networks = [open_network(model, trajectory.count, **place) for model in candidates]
    trajectory = trajectory.first(_fitting(trajectory.count, networks))
    comparisons = []
    for model, network in zip(candidates, networks, strict=True):
        if network.spec.provenance.digest != trajectory.spec.provenance.digest:
            logger.warning("the weights of %s are not the reference's", model.name)
        with stage(model.name, len(trajectory.timesteps) + trajectory.steps) as advance:
            comparisons.append(judge(trajectory, network, advance))
    # In turn, so that a busy moment affects all of them.
    rounds = [[time_call(network, trajectory.count) for network in networks] for _ in range(_ROUNDS)]
    measured = zip(candidates, networks, comparisons, zip(*rounds, strict=True), strict=True)
    return [
        Rung(
            model.name,
            network.spec,
            comparison,
            statistics.median(times) * 1e3,
            model.path.stat().st_size / 1e6,
        )
        for model, network, comparison, times in measured
    ]
