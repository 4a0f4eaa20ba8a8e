"""Run the benchmarks and write docs/benchmarks.md."""

import datetime
import tempfile
from pathlib import Path

from benches import chain, memory, parity, process, training
from benches.models import export_preset
from benches.page import PAGE, machine, write_head
from benches.table import HEAD, Row

PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers")

INTRODUCTION = """\
# Benchmarks

Made by `make bench` (`python -m benches`) on {date}: {machine}.
Random weights of the presets' networks: time does not depend on them. What is compared runs in one process, in
turn, in blocks of {block} steps; a ratio is of medians, with the smallest and largest ratio of two neighbouring
blocks after it. Nothing here was run on a GPU.

"""


def main() -> None:
    """Measure everything, print each row as it comes, and write the table."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        models = {preset: export_preset(preset, Path(name)) for preset in ("digits", "cifar10")}
        for group in (
            process.measure(models),
            memory.measure(export_preset("small", Path(name), image_size=(64, 64))),
            parity.measure(),
            chain.measure(models["cifar10"], batch=1),
            [chain.learned_variance(models["digits"], batch=16, limit=0.01)],
            [chain.learned_variance(models["cifar10"], batch=1, limit=0.01)],
            chain.admission(models["cifar10"]),
            training.measure("digits"),
            training.measure("small"),
            training.measure_reading(),
        ):
            for row in group:
                print(row.markdown(), flush=True)
                rows.append(row)
    write_head(_page(rows))
    print(f"wrote {PAGE}")


def _page(rows: list[Row]) -> str:
    introduction = INTRODUCTION.format(
        date=datetime.date.today().isoformat(),
        machine=machine(PACKAGES),
        block=chain.BLOCK,
    )
    return introduction + HEAD + "".join(row.markdown() + "\n" for row in rows)


if __name__ == "__main__":
    main()
