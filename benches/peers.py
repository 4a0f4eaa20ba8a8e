"""Where the schedulers of diffusers leave their own chain: `python -m benches.peers` writes docs/peers.md."""

import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_deploy.reference import update
from ddpm_deploy.schedule import LinearBetas, Schedule
from ddpm_deploy.solvers import StepTable, ddim, ddpm, dpmpp_2m
from ddpm_deploy.spacings import spaced
from ddpm_deploy.words import Spacing

_DOCS: Final = Path(__file__).parent.parent / "docs" / "peers.md"
_MARK: Final = "<!-- made by python -m benches.peers -->"
_SCHEDULE: Final = Schedule(LinearBetas().betas(1000))
_COUNTS: Final = (250, 50, 7)
_SPACINGS: Final[tuple[Spacing, ...]] = ("leading", "trailing", "linspace")  # of diffusers
_MEAN, _STD = 0.3, 0.4  # of the data
_NOISE: Final = np.random.default_rng(0).standard_normal((1001, 64, 1, 4, 4))

Vector = NDArray[np.float64]


def main() -> None:
    """Measure, and write the part of the page that stands behind the mark."""
    warnings.simplefilter("ignore")
    head = f"With diffusers {metadata.version('diffusers')}:\n\n"
    head += "| scheduler | " + " | ".join(f"{count} steps" for count in _COUNTS) + " |\n"
    head += "| --- |" + " --- |" * len(_COUNTS) + "\n"
    rows = [f"| {name} | " + " | ".join(cells) + " |\n" for name, cells in _rows()]
    text = _DOCS.read_text().split(_MARK)[0]
    _DOCS.write_text(text + _MARK + "\n\n" + head + "".join(rows))
    print("".join(rows) + f"wrote {_DOCS}")


def _rows() -> Iterator[tuple[str, list[str]]]:
    for spacing in _SPACINGS:
        yield f"DDIM, {spacing}", [_ddim(spacing, count, None) for count in _COUNTS]
        yield (
            f"DDIM, {spacing}, our table with `stride=T // N`",
            [_ddim(spacing, count, 1000 // count) for count in _COUNTS],
        )
    for variance in ("fixed_small", "fixed_large"):
        for spacing in _SPACINGS:
            yield f"DDPM, {variance}, {spacing}", [_ddpm(variance, spacing, count) for count in _COUNTS]
    yield "DDPM, fixed_large_log", [_ddpm("fixed_large_log", "leading", count) for count in _COUNTS]
    for spacing in _SPACINGS:
        yield f"DPM-Solver++(2M), {spacing}", [_2m(spacing, count) for count in _COUNTS]
    yield "DPM-Solver++(2M), linspace, 1000 steps", [_2m("linspace", 1000), "", ""]


def _ddim(spacing: Spacing, count: int, stride: int | None) -> str:
    from diffusers import DDIMScheduler

    peer = DDIMScheduler(trained_betas=_SCHEDULE.betas, timestep_spacing=spacing)
    timesteps = spaced(spacing, _SCHEDULE, count)
    table = ddim(_SCHEDULE, timesteps, use_clipped_model_output=False, stride=stride)
    return _difference(peer, count, table)


def _ddpm(variance: Any, spacing: Spacing, count: int) -> str:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(trained_betas=_SCHEDULE.betas, timestep_spacing=spacing, variance_type=variance)
    table = ddpm(
        _SCHEDULE,
        spaced(spacing, _SCHEDULE, count),
        variance="fixed_small" if variance == "fixed_small" else "fixed_large",
    )
    return _difference(peer, count, table)


def _2m(spacing: Spacing, count: int) -> str:
    from diffusers import DPMSolverMultistepScheduler

    peer = DPMSolverMultistepScheduler(trained_betas=_SCHEDULE.betas, timestep_spacing=spacing)
    peer.set_timesteps(count)
    timesteps = peer.timesteps.numpy()
    if (np.diff(timesteps) >= 0).any():
        return f"{_finite(_theirs(peer, count))} (it repeats a timestep)"
    return _difference(peer, count, dpmpp_2m(_SCHEDULE, timesteps, clip=None))


def _difference(peer: Any, count: int, table: StepTable) -> str:
    """The largest difference of any number of 64 images, whole chains on the same noise."""
    try:
        theirs = _theirs(peer, count)
    except IndexError:
        return "IndexError"
    if not np.isfinite(theirs).all():
        return _finite(theirs)
    return f"{np.abs(_ours(table) - theirs).max():.1e}"


def _finite(images: Vector) -> str:
    return "finite" if np.isfinite(images).all() else "NaN"


def _network(x: Vector, t: int) -> Vector:
    """The optimal ε for data N(0.3, 0.4²)."""
    ac = _SCHEDULE.alphas_cumprod[t]
    epsilon: Vector = np.sqrt(1 - ac) * (x - np.sqrt(ac) * _MEAN) / (ac * _STD**2 + 1 - ac)
    return epsilon


def _theirs(peer: Any, count: int) -> Vector:
    peer.set_timesteps(count)
    draws: Iterator[Vector] = iter(_NOISE[1:])
    given: Callable[..., torch.Tensor] = lambda *a, **k: torch.from_numpy(next(draws))  # noqa: E731
    x = torch.from_numpy(_NOISE[0])
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", given):
        for t in peer.timesteps.tolist():
            x = peer.step(torch.from_numpy(_network(x.numpy(), t)), t, x).prev_sample
    result: Vector = x.numpy()
    return result


def _ours(table: StepTable) -> Vector:
    """The rows in float64."""
    x: Any = _NOISE[0]
    x0: Any = np.zeros_like(x)
    for row, t, z in zip(table.rows, table.timesteps, _NOISE[1:], strict=False):
        x, x0 = update(row, x, _network(x, int(t)), z, x0)  # type: ignore[arg-type]
    result: Vector = x
    return result


if __name__ == "__main__":
    main()
