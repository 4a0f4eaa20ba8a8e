"""The picture of `benches.serving`: 95th percentiles by load, a panel a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.dependencies import require

_COLOURS: Final = {"continuous": "C0", "static batches": "C1", "one at a time": "C2", "full": "C7"}

_NAMES: Final = {"full": "filled whenever there is room"}


def write_picture(panels: Sequence[dict[str, Any]], path: Path) -> None:
    """Lines: simulated, of endless traffic. Crosses: real, of a quarter of a minute of it."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(12, 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for policy, seconds in panel["told"].items():
            axes.plot(panel["loads"], seconds, color=_COLOURS[policy], label=_NAMES.get(policy, policy))
            real = [(point["load"], point["p95"]) for point in panel["points"] if point["policy"] == policy]
            axes.scatter(*zip(*real, strict=True) if real else ((), ()), color=_COLOURS[policy], marker="x")
        best = min(panel["told"]["continuous"])
        axes.set(
            yscale="log",
            ylim=(best / 2, 60 * best),
            title=panel["name"],
            xlabel="load, of the best throughput",
        )
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("95th percentile of seconds a request")
    figure.axes[1].legend(loc="upper left")
    figure.savefig(path, dpi=90)
