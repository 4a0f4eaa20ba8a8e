"""Loading a model to run it, as the options that many commands have say it."""

from typing import TypedDict, Unpack

from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.errors import SettingError
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.words import Backend, RunPrecision, Weights


class Place(TypedDict):
    """The options --device, --backend, --precision, --weights and --threads; None where they were not typed."""

    device: str | None
    backend: Backend | None
    precision: RunPrecision | None
    weights: Weights | None
    threads: int | None


def open_network(model: ModelFile, max_batch: int | None = None, **place: Unpack[Place]) -> Network:
    """Load a model's network, for at most `max_batch` rows (None: as many as are best)."""
    settings = LoadSettings(
        device=place["device"],
        threads=place["threads"],
        max_batch=max_batch,
        precision=place["precision"],
        weights=place["weights"] or "ema",
        stages=stage,
    )
    return load_network(model, settings, backend=place["backend"])


def open_sampler(model: ModelFile, request: Request, batch: int | None, place: Place) -> Sampler:
    """Load a model to sample a request, `batch` images at the same time (None: as many as are best)."""
    require_runnable(model, place)
    return Sampler(open_network(model, rows_for(request, batch), **place))


def rows_for(request: Request, batch: int | None) -> int | None:
    """The rows of the batch for so many images at the same time; None for as many as are best."""
    return min(batch, request.count) * (2 if request.guidance else 1) if batch else None


def require_runnable(model: ModelFile, place: Place) -> None:
    """Refuse a damaged model, and a choice of weights where there is none."""
    model.require_intact()
    if place["weights"] and model.kind != "checkpoint":
        raise SettingError(
            f"{model.name} has the weights that it was exported with: --weights is for a checkpoint"
        )
