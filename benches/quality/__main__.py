"""python -m benches.quality [digits|mnist|all] writes docs/quality.md and its pictures.

The models are those of `make demo` and `make mnist`. It takes hours on two cores: what was drawn is kept in
demo/quality/, and a run that was stopped goes on. `python -m benches.quality data` writes demo/mnist.npz, which MNIST's
model is trained on.
"""

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benches.quality.data import DEMO, Pixels, Real, digits, mnist, write_mnist
from benches.quality.draw import BEST, GUIDANCE, PAPER, SEEDS, WAYS, Way, draw, step_times, table_time
from benches.quality.judge import Judge, train_judge
from ddpm_deploy.errors import BackendError, DependencyError, SettingError
from ddpm_deploy.evaluate.frechet import Normal, frechet_distance, normal_of
from ddpm_deploy.runtime.sampler import Sampler

_DOCS: Final = Path(__file__).parent.parent.parent / "docs"
_MARK: Final = "<!-- made by python -m benches.quality -->"
_STUDENT: Final = 2.776  # of 95 %, two-sided, for the mean of five
_PICTURED: Final = 20
_SMOOTHED: Final = 20  # entries of the training's metrics
_SHOWN: Final = [
    PAPER,
    *(way for way in WAYS if way.steps == 20 and way.spacing != "log-snr"),
    *(way for way in WAYS if way.steps in (5, 10) and way.spacing == "linspace"),
]
_REAL: Final = {"digits": digits, "mnist": mnist}


@dataclass(frozen=True)
class Result:
    """What was found of a chain: Fréchet distances (seeds,), accuracies or sure shares (seeds,), seconds an image."""

    way: Way
    distances: NDArray[np.float64]
    right: NDArray[np.float64]
    seconds: float

    def difference(self, paper: "Result") -> tuple[float, float]:
        """The mean paired difference of the distance to the paper's chain, and half of its 95 % interval."""
        differences = self.distances - paper.distances
        return float(differences.mean()), float(_STUDENT * differences.std(ddof=1) / len(differences) ** 0.5)


@dataclass(frozen=True)
class Report:
    """All that was found on a data set."""

    real: Real
    accuracy: float
    yardstick: float
    results: Sequence[Result]
    labelled: bool
    steps: dict[str, float]
    table: float
    half: Result | None

    @property
    def paper(self) -> Result:
        """Of the full chain of the paper."""
        return next(result for result in self.results if result.way == PAPER)

    def equal(self) -> list[Result]:
        """The chains whose distance is not above the paper's, by the interval of the difference; fewest steps first."""
        fair = [one for one in self.results if one.way != PAPER]
        good = [one for one in fair if (d := one.difference(self.paper))[0] - d[1] <= 0]
        return sorted(good, key=lambda one: (one.way.steps, one.distances.mean()))


def report(real: Real) -> Report:
    """Draw and judge every chain."""
    judge = train_judge(real.known)
    reference = normal_of(judge.features(real.reference.images))
    real_ones = normal_of(judge.features(real.rest.images[: real.count]))
    with Sampler.load(real.model) as sampler:
        labelled = bool(sampler.spec.num_classes)
        steps, table = step_times(real, sampler), table_time(sampler)
        results = [
            _result(real, sampler, judge, reference, way, steps[way.solver] * way.steps) for way in WAYS
        ]
    half = _in_half(real, judge, reference)
    return Report(
        real,
        judge.accuracy(real.rest.images, real.rest.labels),
        frechet_distance(reference, real_ones),
        results,
        labelled,
        steps,
        table,
        half,
    )


def _in_half(real: Real, judge: Judge, reference: Normal) -> Result | None:
    """The best chain with its network in bfloat16, by OpenVINO; None where the processor has none."""
    try:
        with Sampler.load(real.model, backend="openvino", precision="bf16") as sampler:
            seconds = step_times(real, sampler)[BEST.solver] * BEST.steps
            return _result(real, sampler, judge, reference, BEST, seconds)
    except (BackendError, DependencyError, SettingError) as error:
        print(f"not in bfloat16: {error}", flush=True)
        return None


def _result(
    real: Real, sampler: Sampler, judge: Judge, reference: Normal, way: Way, seconds: float
) -> Result:
    distances, right = [], []
    for seed in SEEDS:
        images = draw(real, sampler, way, seed)
        distances.append(frechet_distance(reference, normal_of(judge.features(images))))
        labels = np.arange(len(images)) % max(1, sampler.spec.num_classes)
        right.append(judge.accuracy(images, labels) if sampler.spec.num_classes else judge.sure(images))
    result = Result(way, np.array(distances), np.array(right), seconds)
    print(f"{real.name}: {way.name}: {result.distances.mean():.2f}, {result.right.mean():.1%}", flush=True)
    return result


def _table(found: Report) -> str:
    paper, real = found.paper, found.real
    right = "class accuracy" if found.labelled else "sure (p ≥ 0.9)"
    lines = [
        f"| solver, steps, spacing | Fréchet distance | difference to {PAPER.name} | {right} | ms an image | "
        "× as fast |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| real, the other part | {found.yardstick:.2f} |  |  |  |  |",
    ]
    for one in found.results:
        mean, half = one.difference(paper)
        apart = "" if one.way == PAPER else f"{mean:+.2f} ± {half:.2f}"
        lines.append(
            f"| {one.way.name} | {one.distances.mean():.2f} | {apart} | {one.right.mean():.1%} | "
            f"{one.seconds * 1e3:.1f} | {paper.seconds / one.seconds:.0f} |"
        )
    reduced = ""
    if found.half:
        best = next(one for one in found.results if one.way == BEST)
        mean, off = found.half.difference(best)
        reduced = (
            f"\n\n{BEST.name} in bfloat16 (OpenVINO), against the same in float32: {found.half.distances.mean():.2f}, "
            f"difference {mean:+.2f} ± {off:.2f}; {right} {found.half.right.mean():.1%}; "
            f"{found.half.seconds * 1e3:.1f} ms an image.\n"
        )
    base = found.steps["ddpm"]
    ratios = ", ".join(f"{name} {time / base:.3f}" for name, time in found.steps.items())
    guided = f", guided by {GUIDANCE}" if found.labelled else ""
    return (
        f"### {real.name}\n\n{real.count} images of each of {len(SEEDS)} seeds{guided}; the classifier is right on "
        f"{found.accuracy:.1%} of {len(real.rest)} real images that it was not trained on.\n\n"
        + "\n".join(lines)
        + reduced
        + f"\n\nA step, as a multiple of ddpm's: {ratios}. Building a table takes at most {found.table * 1e3:.1f} ms.\n"
    )


def _answer(reports: Sequence[Report]) -> str:
    """How many steps it takes, in a sentence."""
    good = [{one.way: one for one in found.equal()} for found in reports]
    both = sorted((way for way in good[0] if all(way in ones for ones in good)), key=lambda way: way.steps)
    names = " and ".join(found.real.name for found in reports)
    if not both:
        return f"**How many steps do I need? All {PAPER.steps}: nothing shorter is as good on {names}.**"
    best = both[0]
    alone = "; ".join(
        f"{found.real.name} alone: {one.way.steps}, {one.way.solver}"
        for found in reports
        for one in found.equal()[:1]
    )
    faster = min(found.paper.seconds / ones[best].seconds for found, ones in zip(reports, good, strict=True))
    return (
        f"**How many steps do I need? {best.steps}: {best.solver} with the spacing {best.spacing} is then not behind "
        f"the paper's {PAPER.steps} on {names} (the 95 % interval of the paired difference does not lie above zero), "
        f"at {faster:.0f} times its images/s or more.** ({alone}.)"
    )


def _picture(reports: Sequence[Report], path: Path) -> None:
    """Fréchet distance against seconds an image of each data set; below, labelled rows of samples of the last."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6 * len(reports), 10), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.5, 5.5))
    upper, lower = parts
    for axis, found in zip(upper.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
        _curves(axis, found)
    rows = _rows(reports[-1])
    lower.suptitle(f"{reports[-1].real.name}: samples from the same x_T, and seconds an image", fontsize=10)
    for axis, (label, pixels) in zip(lower.subplots(len(rows), 1), rows, strict=True):
        axis.imshow(np.hstack([image[0] for image in pixels]), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


def _curves(axis: Any, found: Report) -> None:
    lines: dict[tuple[str, str], list[Result]] = {}
    for one in found.results:
        lines.setdefault((one.way.solver, one.way.spacing), []).append(one)
    for (solver, spacing), ones in lines.items():
        seconds, distances = [one.seconds for one in ones], [one.distances.mean() for one in ones]
        errors = [one.distances.std(ddof=1) for one in ones]
        name = solver if spacing == "leading" else f"{solver}, {spacing}"
        axis.errorbar(seconds, distances, errors, marker="o", capsize=2, label=name)
    axis.axhline(found.yardstick, color="grey", linestyle=":", label="real images")
    axis.set(xscale="log", yscale="log", title=found.real.name, xlabel="seconds an image")
    axis.set_ylabel("Fréchet distance")
    axis.legend(fontsize=7)


def _rows(found: Report) -> list[tuple[str, Pixels]]:
    """Of real images and of chains from the same x_T: labels, and pixels (k, 1, H, W)."""
    with Sampler.load(found.real.model) as sampler:
        ones = [one for one in found.results if one.way in _SHOWN]
        drawn = [draw(found.real, sampler, one.way, SEEDS[0])[:_PICTURED] for one in ones]
    labels = [f"{one.way.name}\n{one.seconds:.3f} s" for one in ones]
    return [("real", found.real.rest.images[:_PICTURED]), *zip(labels, drawn, strict=True)]


def _training(path: Path) -> None:
    """How MNIST's model was trained: the loss by step, and the last picture of samples."""
    import matplotlib.pyplot as plt

    folder = DEMO / "mnist.train"
    steps, losses = np.loadtxt(folder / "metrics.csv", delimiter=",", skiprows=1, usecols=(0, 1)).T
    smooth = np.convolve(losses, np.ones(_SMOOTHED) / _SMOOTHED, "valid")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot(steps, losses, color="lightgrey")
    left.plot(steps[_SMOOTHED - 1 :], smooth)
    left.set(
        yscale="log", xlabel="training step", ylabel="loss", title=f"mean of {_SMOOTHED} entries in blue"
    )
    right.imshow(plt.imread(max(folder.glob("samples-*.png"))), cmap="gray")
    right.set(title="samples at the last step (EMA weights)")
    right.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Judge the data sets that were named, all where none was, and write the page behind the mark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*_REAL, "all", "data"], default="all")
    asked: Any = parser.parse_args().names
    names = [*_REAL] if "all" in asked else asked
    if "data" in names:
        write_mnist(DEMO / "mnist.npz")
        return
    reports = [report(_REAL[name]()) for name in names]
    if "mnist" in names:
        _training(_DOCS / "quality-training.png")
    _picture(reports, _DOCS / "quality.png")
    page = _DOCS / "quality.md"
    measured = f"Measured {datetime.date.today().isoformat()}."
    said = f"{_answer(reports)}\n\n{measured}\n\n" + "\n".join(map(_table, reports))
    page.write_text(page.read_text().split(_MARK)[0] + _MARK + "\n\n" + said)
    for found in reports:
        best = [f"{one.way.name} ({one.distances.mean():.2f})" for one in found.equal()[:4]]
        print(f"{found.real.name}: as good as {PAPER.name}, fewest steps first: {'; '.join(best) or 'none'}")


if __name__ == "__main__":
    main()
