"""Drawing what is judged: each chain from several seeds, kept in files, so that a run that was stopped goes on."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benches.quality.data import DEMO, Pixels, Real
from benches.timing import interleave, median
from ddpm_deploy.runtime.images import to_uint8
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ChainSettings
from ddpm_deploy.words import Solver, Spacing

SEEDS: Final = range(5)
STEPS: Final = (5, 10, 20, 50)
GUIDANCE: Final = 2.0  # of models with a null class
_DRAWN: Final = DEMO / "quality"


@dataclass(frozen=True)
class Way:
    """A chain: its solver, steps and spacing."""

    solver: Solver
    steps: int
    spacing: Spacing

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.solver}, {self.steps}" + (f", {self.spacing}" if self.spacing != "leading" else "")

    def settings(self) -> ChainSettings:
        """As a request has it."""
        return ChainSettings(solver=self.solver, steps=self.steps, spacing=self.spacing)


PAPER: Final = Way("ddpm", 1000, "leading")
BEST: Final = Way("sde-dpmpp-2m", 20, "linspace")  # what `spec.FAST` is
# Each solver by the spacing that it is best with here, of those that its authors or its users take.
WAYS: Final = (
    PAPER,
    Way("ddpm", 250, "leading"),
    *(Way("ddpm", steps, "leading") for steps in STEPS[::-1]),
    *(Way("ddim", steps, "leading") for steps in STEPS[::-1]),
    *(Way("dpmpp-2m", steps, "linspace") for steps in STEPS[::-1]),
    *(Way("dpmpp-2m", steps, "log-snr") for steps in STEPS[::-1]),
    *(Way("sde-dpmpp-2m", steps, "linspace") for steps in STEPS[::-1]),
    *(Way("sde-dpmpp-2m", steps, "log-snr") for steps in STEPS[::-1]),
)


def draw(real: Real, sampler: Sampler, way: Way, seed: int) -> Pixels:
    """Its images of a seed, (count, 1, H, W); from the file, where it was drawn before from the same model."""
    spec = sampler.spec
    model = f"{real.name}-{spec.provenance.digest[:12]}" + (
        "" if spec.precision == "fp32" else f"-{spec.precision}"
    )
    path = _DRAWN / f"{model}-{way.solver}-{way.steps}-{way.spacing}-{seed}-{real.count}.npy"
    if not path.exists():
        guidance = GUIDANCE if sampler.spec.null_class else None
        images = sampler.sample(
            real.count, solver=way.solver, steps=way.steps, spacing=way.spacing, seed=seed, guidance=guidance
        )
        path.parent.mkdir(exist_ok=True)
        whole = Path(f"{path}.part.npy")
        np.save(whole, to_uint8(images).transpose(0, 3, 1, 2))
        whole.rename(path)
    pixels: Pixels = np.load(path)
    return pixels


def step_times(real: Real, sampler: Sampler) -> dict[str, float]:
    """Seconds an image and step of each solver, in a full batch, timed in turn."""
    count, steps = min(real.count, sampler.max_batch(guided=sampler.spec.null_class)), 10
    guidance = GUIDANCE if sampler.spec.null_class else None

    def block(solver: Solver) -> None:
        sampler.sample(count, solver=solver, steps=steps, seed=0, guidance=guidance)

    blocks = {str(way.solver): partial(block, way.solver) for way in WAYS}
    times = interleave(blocks, steps * count, 6)
    return {solver: median(each) for solver, each in times.items()}


def table_time(sampler: Sampler) -> float:
    """The longest time that building any of the tables takes, in seconds."""
    times = []
    for way in WAYS:
        start = time.perf_counter()
        sampler.spec.step_table(way.settings())
        times.append(time.perf_counter() - start)
    return max(times)
