"""python -m benches.quality [digits|mnist …] writes docs/quality.md and its pictures.

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

from benches.quality.data import DEMO, Real, digits, mnist, write_mnist
from benches.quality.draw import GUIDANCE, PAPER, SEEDS, WAYS, Way, draw, step_times, table_time
from benches.quality.judge import Features, Judge, frechet, train_judge
from ddpm_deploy.runtime.images import grid, save_png
from ddpm_deploy.runtime.sampler import Sampler

_DOCS: Final = Path(__file__).parent.parent.parent / "docs"
_MARK: Final = "<!-- made by python -m benches.quality -->"
_STUDENT: Final = 2.776  # of 95 %, two-sided, for the mean of five
_PICTURED: Final = 12
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
    reference = judge.features(real.reference.images)
    real_ones = judge.features(real.rest.images[: real.count])
    with Sampler.load(real.model) as sampler:
        labelled = bool(sampler.spec.num_classes)
        steps, table = step_times(real, sampler), table_time(sampler)
        results = [
            _result(real, sampler, judge, reference, way, steps[way.solver] * way.steps) for way in WAYS
        ]
    return Report(
        real,
        judge.accuracy(real.rest.images, real.rest.labels),
        frechet(reference, real_ones),
        results,
        labelled,
        steps,
        table,
    )


def _result(
    real: Real, sampler: Sampler, judge: Judge, reference: Features, way: Way, seconds: float
) -> Result:
    distances, right = [], []
    for seed in SEEDS:
        images = draw(real, sampler, way, seed)
        distances.append(frechet(reference, judge.features(images)))
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
    base = found.steps["ddpm"]
    ratios = ", ".join(f"{name} {time / base:.3f}" for name, time in found.steps.items())
    guided = f", guided by {GUIDANCE}" if found.labelled else ""
    return (
        f"### {real.name}\n\n{real.count} images of each of {len(SEEDS)} seeds{guided}; the classifier is right on "
        f"{found.accuracy:.1%} of {len(real.rest)} real images that it was not trained on.\n\n"
        + "\n".join(lines)
        + f"\n\nA step, as a multiple of ddpm's: {ratios}. Building a table takes at most {found.table * 1e3:.1f} ms.\n"
    )


def _plot(reports: Sequence[Report], path: Path) -> None:
    """Fréchet distance against seconds an image, for each data set."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(reports), figsize=(6 * len(reports), 4.5), squeeze=False)
    for axis, found in zip(axes[0], reports, strict=True):
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
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _rows(found: Report, path: Path) -> None:
    """Rows of samples from the same x_T: real ones, the paper's chain, then each solver at 20 steps."""
    with Sampler.load(found.real.model) as sampler:
        ways = (PAPER, *(way for way in WAYS if way.steps == 20))
        drawn = [draw(found.real, sampler, way, SEEDS[0])[:_PICTURED] for way in ways]
    shown = [found.real.rest.images[:_PICTURED], *drawn]
    save_png(grid(np.concatenate(shown).transpose(0, 2, 3, 1), _PICTURED), path, {})


def main() -> None:
    """Judge the data sets that were named, all where none was, and write the page behind the mark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*_REAL, "data"], default=[*_REAL])
    names: Any = parser.parse_args().names
    if "data" in names:
        write_mnist(DEMO / "mnist.npz")
        return
    reports = [report(_REAL[name]()) for name in names]
    for found in reports:
        _rows(found, _DOCS / f"quality-{found.real.name}.png")
    _plot(reports, _DOCS / "quality.png")
    page = _DOCS / "quality.md"
    said = f"Measured {datetime.date.today().isoformat()}.\n\n" + "\n".join(map(_table, reports))
    page.write_text(page.read_text().split(_MARK)[0] + _MARK + "\n\n" + said)
    for found in reports:
        best = [f"{one.way.name} ({one.distances.mean():.2f})" for one in found.equal()[:4]]
        print(f"{found.real.name}: as good as {PAPER.name}, fewest steps first: {'; '.join(best) or 'none'}")


if __name__ == "__main__":
    main()
