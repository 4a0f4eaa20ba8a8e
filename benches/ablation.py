"""python -m benches.ablation writes docs/ablation.md: Table 2 of Ho et al. 2020 on the digits, over three seeds.

What a network predicts, what its training minimises, and whether the variance is learned, with all else the same. The
models are trained on two thirds of the digits, and judged on the third that is left. It takes half an hour on two
cores. Models and figures are kept in demo/ablation, and a run that was stopped goes on.
"""

import datetime
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch

from benches.page import DOCS
from benches.quality.data import DEMO, Real, digits
from benches.quality.draw import PAPER, draw
from benches.quality.judge import Judge, train_judge
from ddpm_deploy.errors import BackendError, ParityError
from ddpm_deploy.evaluate.frechet import frechet_distance, normal_of
from ddpm_deploy.evaluate.likelihood import Terms, likelihood
from ddpm_deploy.export.graph import export_onnx
from ddpm_deploy.files import atomic
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import load_network
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.train.checkpoint import Checkpoint
from ddpm_deploy.train.checkpoint import load_network as load_trained
from ddpm_deploy.train.data import Dataset
from ddpm_deploy.train.session import Session
from ddpm_deploy.train.settings import PRESETS, Preset
from ddpm_deploy.train.trainer import Trainer
from ddpm_deploy.words import Loss, Prediction, Variance

SEEDS: Final = range(3)
STEPS: Final = 1200  # of each training
DRAWN: Final = 300  # images of each model
_TERMS: Final = 50  # of the bound, of each image
_FOLDER: Final = DEMO / "ablation"
_PAGE: Final = DOCS / "ablation.md"
_MARK: Final = "<!-- made by python -m benches.ablation -->"
_STUDENT: Final = 4.303  # of 95 %, two-sided, for the mean of three
_PREDICTED: Final[dict[Prediction, str]] = {"mean": "μ̃", "epsilon": "ε"}
_MINIMISED: Final[dict[Loss, str]] = {"vlb": "L", "simple": "squared error", "hybrid": "L_hybrid"}
_VARIANCES: Final[dict[Variance, str]] = {"learned_range": "learned", "fixed_large": "fixed, β"}


@dataclass(frozen=True)
class Variant:
    """A way to train. published: its FID in the paper's table, on CIFAR-10."""

    prediction: Prediction
    loss: Loss
    variance: Variance
    published: str

    @property
    def name(self) -> str:
        """For files and progress."""
        return f"{self.prediction}-{self.loss}-{self.variance}"

    @property
    def label(self) -> str:
        """For a picture."""
        return f"{_PREDICTED[self.prediction]}, {_MINIMISED[self.loss]}, {_VARIANCES[self.variance]}"


# The paper's choice, which others are held against.
BEST: Final = Variant("epsilon", "simple", "fixed_large", "3.17")
VARIANTS: Final = (
    Variant("mean", "vlb", "learned_range", "23.69"),
    Variant("mean", "vlb", "fixed_large", "13.22"),
    Variant("mean", "simple", "fixed_large", "unstable"),
    Variant("epsilon", "vlb", "learned_range", "unstable"),
    Variant("epsilon", "vlb", "fixed_large", "13.51"),
    BEST,
    Variant("epsilon", "hybrid", "learned_range", ""),
)


class Figure(msgspec.Struct, frozen=True):
    """What was found of one model: Fréchet distance, the share of sure images, bits/dim; or why nothing was."""

    distance: float | None = None
    sure: float | None = None
    bits: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class Run:
    """A variant and a seed, and the files that are kept of them."""

    variant: Variant
    seed: int

    def file(self, suffix: str) -> Path:
        """Its checkpoint (.pt), network (.onnx) or figure (.json)."""
        return _FOLDER / f"{self.variant.name}-{self.seed}{suffix}"

    @property
    def figure(self) -> Figure | None:
        """What was found of it; None where it is not known yet."""
        path = self.file(".json")
        return msgspec.json.decode(path.read_bytes(), type=Figure) if path.exists() else None

    def keep(self, figure: Figure) -> None:
        """Write what was found."""
        with atomic(self.file(".json")) as temporary:
            temporary.write_bytes(msgspec.json.encode(figure))


def preset() -> Preset:
    """That of the digits with half of its channels, so that all trainings take half an hour."""
    full = PRESETS["digits"]
    halved = msgspec.structs.replace(full.network, channels=16, widths=(16, 32), time_width=64)
    return replace(full, network=halved, steps=STEPS)


def train(run: Run, real: Real) -> None:
    """Train and export a model on the digits that are not compared with. Raises KeyboardInterrupt where it is stopped:
    its checkpoint is kept, and the next time it goes on."""
    torch.set_num_threads(cpu_threads())
    data = Dataset(np.concatenate([real.known.images, real.rest.images]))
    path, cpu = run.file(".pt"), torch.device("cpu")
    if path.exists():
        trainer = Trainer.resume(Checkpoint.load(open_model(path)), data, cpu)
    else:
        trainer = new_trainer(run, data, cpu)
    if not Session(trainer, path, lambda steps, note: None).run():
        raise KeyboardInterrupt
    network, spec = load_trained(open_model(path))
    export_onnx(network, spec, run.file(".onnx"))


def new_trainer(run: Run, data: Dataset, device: torch.device) -> Trainer:
    """A training that has not begun."""
    variant, (height, width) = run.variant, data.images.shape[2:]
    spec = preset().spec(
        "digits", 1, (height, width), prediction=variant.prediction, variance=variant.variance
    )
    settings = preset().settings("digits", loss=variant.loss, seed=run.seed, sample_every=0, save_every=STEPS)
    return Trainer(spec, settings, data, device)


def judge_run(run: Run, real: Real, judge: Judge) -> Figure:
    """Draw from a trained model by the paper's chain, and evaluate the bound of the images that it has not seen."""
    mine = replace(real, model=run.file(".onnx"), count=DRAWN)
    with Sampler.load(mine.model) as sampler:
        images = draw(mine, sampler, PAPER, run.seed)
    network = load_network(open_model(mine.model))
    held = real.reference.images
    bound = likelihood(
        network, Terms(network.spec, strata=_TERMS), lambda i: held[i], np.arange(len(held))
    ).bound
    network.close()
    distance = frechet_distance(normal_of(judge.features(held)), normal_of(judge.features(images)))
    return Figure(distance, judge.sure(images), bound.bits)


def work(runs: Sequence[Run], real: Real) -> Iterator[str]:
    """Make what is missing; yields the name of each model and figure once it is kept."""
    judge: Judge | None = None
    for run in runs:
        if run.figure is not None:
            continue
        try:
            if not run.file(".onnx").exists():
                train(run, real)
                yield f"{run.variant.name}, seed {run.seed}: trained"
            judge = judge or train_judge(real.known)
            figure = judge_run(run, real, judge)
        except (BackendError, ParityError) as error:  # numbers that are not finite, or fit into no float32
            figure = Figure(failed=str(error))
        run.keep(figure)
        yield f"{run.variant.name}, seed {run.seed}: {figure}"


@dataclass(frozen=True)
class Summary:
    """What was found of a variant, of each seed that did not fail."""

    variant: Variant
    figures: Sequence[Figure]

    @property
    def failed(self) -> list[str]:
        """Why there is no figure, of the seeds that failed."""
        return [figure.failed for figure in self.figures if figure.failed]

    def of(self, name: str) -> list[float]:
        """One figure by its name in Figure, of the seeds that did not fail."""
        return [getattr(figure, name) for figure in self.figures if not figure.failed]

    def spread(self, name: str) -> tuple[float, float] | None:
        """The mean over the seeds, and half of its 95 % interval; None unless all did not fail."""
        values = self.of(name)
        return None if len(values) < len(SEEDS) else _interval(values)

    def difference(self, other: "Summary", name: str) -> tuple[float, float] | None:
        """The mean difference to another variant, paired by seed, and half of its 95 % interval."""
        mine, theirs = self.of(name), other.of(name)
        if min(len(mine), len(theirs)) < len(SEEDS):
            return None
        return _interval([a - b for a, b in zip(mine, theirs, strict=True)])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), _STUDENT * statistics.stdev(values) / len(values) ** 0.5


def table(found: Sequence[Summary], yardstick: float) -> str:
    """The table of the page."""
    best = next(one for one in found if one.variant == BEST)
    lines = [
        "| predicted | minimised | variance | Fréchet distance | difference to the paper's choice | sure (p ≥ 0.9) | "
        "bits/dim | FID in the paper, CIFAR-10 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| real digits, the other part | | | {yardstick:.1f} | | | | |",
    ]
    for one in found:
        variant = one.variant
        apart = "" if one is best else _shown(one.difference(best, "distance"), "+.1f")
        cells = [
            _PREDICTED[variant.prediction],
            _MINIMISED[variant.loss],
            _VARIANCES[variant.variance],
            _shown(one.spread("distance"), ".1f"),
            apart,
            _shown(one.spread("sure"), ".0%"),
            _shown(one.spread("bits"), ".3f"),
            variant.published,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {one.variant.label}: {reason}" for one in found for reason in one.failed]
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def _shown(found: tuple[float, float] | None, form: str) -> str:
    return "–" if found is None else f"{found[0]:{form}} ± {found[1]:{form.lstrip('+')}}"


def _picture(found: Sequence[Summary], yardstick: float, path: Path) -> None:
    """The Fréchet distance and the bits/dim of each variant: seeds as dots, means with their 95 % intervals."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    rows = range(len(found))[::-1]
    for axis, name in ((left, "distance"), (right, "bits")):
        for row, one in zip(rows, found, strict=True):
            values = one.of(name)
            axis.plot(values, [row] * len(values), ".", color="grey")
            if middle := one.spread(name):
                axis.errorbar(middle[0], row, xerr=middle[1], fmt="o", color="C0", capsize=3)
    left.axvline(yardstick, color="grey", linestyle=":", label="real digits")
    left.set_yticks(list(rows), [one.variant.label for one in found])
    left.set(xscale="log", xlabel="Fréchet distance (less is better)")
    right.set(xscale="log", xlabel="bits/dim of digits not trained on (less is better)")
    right.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    right.set_xticks([], minor=True)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make what is missing, then write the page behind its mark."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    real = digits()
    # Seed by seed, so that all variants can be compared before the last.
    for made in work([Run(variant, seed) for seed in SEEDS for variant in VARIANTS], real):
        print(made, flush=True)
    judge = train_judge(real.known)
    others = real.rest.images[:DRAWN]
    yardstick = frechet_distance(
        *(normal_of(judge.features(images)) for images in (real.reference.images, others))
    )
    found = [
        Summary(variant, [figure for seed in SEEDS if (figure := Run(variant, seed).figure)])
        for variant in VARIANTS
    ]
    _picture(found, yardstick, _PAGE.with_suffix(".png"))
    measured = f"Measured {datetime.date.today().isoformat()}."
    head = _PAGE.read_text().split(_MARK)[0]
    _PAGE.write_text(f"{head}{_MARK}\n\n{table(found, yardstick)}\n\n{measured}\n")


if __name__ == "__main__":
    main()
