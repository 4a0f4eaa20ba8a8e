"""How fast a step is, beside what else runs such a network on a CPU: `python -m benches.peers_speed`.

Each contestant is a process of its own, and they take turns, so that a busy moment strikes all of them. Writes its part
of docs/benchmarks.md, docs/speed.png and docs/speed.json. Takes some eight minutes.
"""

import datetime
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from benches.contestants import BLOCK, PEAK
from benches.installed import megabytes_of
from benches.models import diffusers_pipeline, random_network
from benches.page import DOCS, PAGE, machine, write_section
from benches.table import HEAD, Row
from benches.timing import median, ratio
from ddpm_deploy.bench.process import Worker
from ddpm_deploy.dependencies import importable, require
from ddpm_deploy.errors import BackendError
from ddpm_deploy.export.graph import describe, trace
from ddpm_deploy.export.ncnn import write_ncnn
from ddpm_deploy.train.checkpoint import Checkpoint
from ddpm_deploy.train.settings import PRESETS

_NOISY: Final = 0.25  # of its median: a reference that swings by more says that the run is not one to trust
_TURN: Final = 0.4  # seconds of steps in a turn, where these are quick
_MOST: Final = 16  # steps of a turn
_MODULE: Final = "benches.contestants"
PACKAGES: Final = ("numpy", "onnxruntime", "openvino", "ncnn", "torch", "diffusers")
_CHAINS: Final = ("Ours", "Eager", "Compiled")  # which are told the batches that are to come
_BLOCKS: Final = 10  # of steps at the most, over which it is asked where the time goes, three at least
_OF_PARTS: Final = 4.0  # seconds that it is asked for, where steps are quick
REFERENCE: Final = "ONNX Runtime, bare"
PIPELINE: Final = "diffusers' DDPMPipeline"


_INTRODUCTION: Final = """\
# Beside what else there is

Made by `python -m benches.peers_speed` on {date}, in one run: {machine}; its own matrix products
(`torch.mm`) reach {float32:.0f} GFLOP/s in float32 and {bfloat16:.0f} in bfloat16. Random weights of the presets'
networks. Each contestant is a process of its own, and they take turns; the figures are milliseconds a step, the median
of the turns with the smallest and the largest. "Ours" is the whole step of a chain, noise and update; an engine that
is "bare" is called with the same inputs again and again. Cold start is from the start of the process to the end of
its first step, memory the most that the process held by then, both of cifar10 at batch 1; installed is the size of the
packages that it needs, with theirs. All figures are in [speed.json](speed.json).

"""
_PARTS: Final = """\
Of ancestral sampling; medians over blocks of {block} steps, after the network has emptied the caches for what follows
it. The update is NumPy's, noise is made for several steps at once.

"""


@dataclass(frozen=True)
class Kind:
    """A contestant: what makes it, and which file it takes. needs: its module. distributions: that it is installed by.

    precision: of its network. bare: an engine alone, with no chain around it.
    """

    name: str
    file: str
    given: dict[str, Any]
    needs: str
    distributions: tuple[str, ...]
    precision: str = "fp32"


_BASE: Final = ("numpy", "click", "msgspec")


def _ours(backend: str, file: str, precision: str | None = None) -> Kind:
    name = f"ours, {backend}" + f" {precision}" * bool(precision)
    given = {"kind": "Ours", "backend": backend, "precision": precision, "threads": None}
    return Kind(name, file, given, backend, (*_BASE, backend), precision or "fp32")


_TORCH: Final = ("torch", "numpy")
KINDS: Final = (
    Kind(PIPELINE, "", {"kind": "Pipeline"}, "diffusers", ("diffusers", "torch")),
    Kind("PyTorch eager", ".pt", {"kind": "Eager"}, "torch", _TORCH),
    Kind("PyTorch eager, channels-last", ".pt", {"kind": "Eager", "channels_last": True}, "torch", _TORCH),
    Kind("torch.compile", ".pt", {"kind": "Compiled"}, "torch", _TORCH),
    Kind(REFERENCE, ".onnx", {"kind": "BareOnnxRuntime"}, "onnxruntime", ("onnxruntime",)),
    Kind("OpenVINO f32, bare", ".onnx", {"kind": "BareOpenvino", "hint": "f32"}, "openvino", ("openvino",)),
    Kind(
        "OpenVINO bf16, bare",
        ".onnx",
        {"kind": "BareOpenvino", "hint": "bf16"},
        "openvino",
        ("openvino",),
        "bf16",
    ),
    _ours("onnxruntime", ".onnx"),
    _ours("openvino", ".onnx", "fp32"),
    _ours("openvino", ".onnx", "bf16"),
    _ours("ncnn", ".ncnn"),
)


@dataclass(frozen=True)
class Case:
    """A preset's network, and the batch sizes that it is timed at. rounds: turns of each contestant."""

    preset: str
    batches: tuple[int, ...]
    rounds: int
    parts: tuple[int, ...] = ()  # batch sizes at which is asked where the time goes
    without: tuple[str, ...] = ()  # contestants that would take minutes more


CASES: Final = (
    Case("digits", (16,), 5, parts=(16,)),
    Case("cifar10", (1, 4, 16), 4, parts=(1,)),
    Case("256", (1,), 2, without=("torch.compile", "PyTorch eager, channels-last", "OpenVINO bf16, bare")),
)


@dataclass
class Entry:
    """A contestant, and what was measured of it: seconds a step of each turn, by batch size; where the time goes."""

    case: Case
    kind: Kind
    worker: Worker | None = None
    problem: str = ""
    cold: float = 0.0
    first: float = 0.0
    megabytes: float | None = None  # after its first steps, of one image
    times: dict[int, list[float]] = field(default_factory=dict)
    parts: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def ask(self, question: str, **given: Any) -> Any:
        """An answer, or None where there is none any more."""
        if self.problem or self.worker is None:
            return None
        try:
            return self.worker.ask(question, **given)
        except BackendError as error:
            self.problem = str(error)
            return None

    def milliseconds(self, batch: int) -> float:
        """A step: the median."""
        return statistics.median(self.times[batch]) * 1e3


def main() -> None:
    """Measure everything, and write the page, the picture and the figures."""
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = _peaks()
        for case in CASES:
            entries += _measured(case, _files(case.preset, Path(folder)))
            _write(entries, peaks)  # what was measured stands, whatever becomes of the next
    print(f"wrote {PAGE}, speed.png and speed.json")


def _write(entries: Sequence[Entry], peaks: dict[str, float]) -> None:
    """Write the page, the picture and the figures."""
    content = {
        "machine": machine(PACKAGES),
        "gflops": peaks,
        "entries": [_figures(entry) for entry in entries],
    }
    (DOCS / "speed.json").write_text(json.dumps(content, indent=1) + "\n")
    _write_picture(entries, DOCS / "speed.png")
    write_section(_page(entries, peaks))


def _files(preset: str, folder: Path) -> dict[str, Path]:
    """A preset's network with random weights in a file of each kind, by its suffix; "" is diffusers' own folder."""
    network, spec = random_network(preset)
    spec = msgspec.structs.replace(spec, same_bits=True)  # as exports of all presets find it
    files = {suffix: folder / f"{preset}{suffix}" for suffix in ("", ".pt", ".onnx", ".ncnn")}
    state = network.state_dict()
    settings = PRESETS[preset].settings(preset, steps=1)
    Checkpoint(spec, state, state, {"state": {}}, 1, settings).save(files[".pt"])
    graph = trace(network.eval(), spec)
    require("onnx", "export").save(graph, files[".onnx"])
    describe(files[".onnx"], spec)
    write_ncnn(graph, spec, files[".ncnn"])
    diffusers_pipeline(spec).save_pretrained(files[""])
    return files


def _peaks() -> dict[str, float]:
    """Billions of operations a second of the machine's own matrix products, by type: the best of three turns."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        with Worker(_MODULE) as worker:
            worker.ask("make", kind="Peak", dtype=dtype)
            seconds = min(worker.ask("turn", batch=1, steps=5) for _ in range(3))
        found[dtype] = 2 * PEAK**3 / seconds / 1e9
        print(f"torch.mm {dtype}: {found[dtype]:.0f} GFLOP/s", flush=True)
    return found


def _measured(case: Case, files: dict[str, Path]) -> list[Entry]:
    """Start all contestants of a case, one after another, and let them take turns."""
    with ExitStack() as stack:
        entries = [_started(case, kind, files, stack) for kind in KINDS]
        for batch in case.batches:
            for _ in range(case.rounds):
                for entry in entries:
                    if entry.kind.given["kind"] == "Compiled" and batch != case.batches[0]:
                        continue  # it compiles for a minute for each
                    seconds = entry.ask("turn", batch=batch, steps=_steps(entry, batch))
                    if seconds is not None:
                        entry.times.setdefault(batch, []).append(seconds)
        for entry in entries:
            for batch in case.parts if entry.kind.given["kind"] == "Ours" else ():
                blocks = min(_BLOCKS, max(3, int(_OF_PARTS / (BLOCK * entry.first)))) if entry.first else 3
                if parts := entry.ask("parts", batch=batch, blocks=blocks):
                    entry.parts[batch] = parts
            _tell(entry)
    return entries


def _started(case: Case, kind: Kind, files: dict[str, Path], stack: ExitStack) -> Entry:
    """A contestant's process, loaded, after its first step."""
    entry = Entry(case, kind)
    if not importable(kind.needs):
        entry.problem = f"{kind.needs} is not installed"
    elif kind.name in case.without:
        entry.problem = "left out, to be done in minutes"
    else:
        entry.worker = stack.enter_context(Worker(_MODULE))
        given = {"batches": case.batches} if kind.given["kind"] in _CHAINS else {}
        entry.ask("make", path=str(files[kind.file]), **kind.given, **given)
        entry.ask("turn", batch=case.batches[0], steps=0)
        entry.cold, entry.megabytes = entry.worker.age, entry.worker.megabytes
        if not case.without:
            entry.first = entry.ask("turn", batch=case.batches[0], steps=1) or 0.0
    return entry


def _steps(entry: Entry, batch: int) -> int:
    seconds = entry.first * batch / entry.case.batches[0]
    return min(_MOST, max(1, int(_TURN / seconds))) if seconds else 1


def _tell(entry: Entry) -> None:
    """Say how it went, while others are still to come."""
    times = ", ".join(f"{batch}: {entry.milliseconds(batch):.1f} ms" for batch in entry.times)
    print(f"{entry.case.preset} · {entry.kind.name} · {entry.problem or times}", flush=True)


def _figures(entry: Entry) -> dict[str, Any]:
    """Every figure of it."""
    return {
        "network": entry.case.preset,
        "contestant": entry.kind.name,
        "precision": entry.kind.precision,
        "problem": entry.problem or None,
        "seconds_a_step": entry.times,
        "seconds_to_first_step": entry.cold,
        "megabytes": entry.megabytes,
        "installed_megabytes": megabytes_of(entry.kind.distributions),
        "parts": entry.parts,
    }


# --- the page -----------------------------------------------------------------------------------------------


def _page(entries: Sequence[Entry], peaks: dict[str, float]) -> str:
    """The section of docs/benchmarks.md."""
    text = _INTRODUCTION.format(date=datetime.date.today().isoformat(), machine=machine(PACKAGES), **peaks)
    text += _noise(entries)
    text += "\n![ms a step of each](speed.png)\n\n" + _table(entries)
    text += "\n## What was asked\n\n" + HEAD + "".join(f"{row.markdown()}\n" for row in _asked(entries))
    return text + "\n## Where a step's time goes\n\n" + _PARTS.format(block=BLOCK) + _parts(entries)


def _noise(entries: Sequence[Entry]) -> str:
    """Whether the reference held still."""
    swings = {}
    for entry in entries:
        if entry.kind.name == REFERENCE:
            for batch, times in entry.times.items():
                median = statistics.median(times)
                swings[f"{entry.case.preset} at batch {batch}"] = (max(times) - min(times)) / median
    said = ", ".join(f"{swing:.0%} ({where})" for where, swing in swings.items())
    text = f"{REFERENCE} swung over the run by {said} of its median."
    noisy = [where for where, swing in swings.items() if swing > _NOISY]
    if noisy:
        text += f" **The run was too noisy at {', '.join(noisy)}: do not trust these figures.**"
    return text + "\n"


def _table(entries: Sequence[Entry]) -> str:
    """A row for each contestant, a column for each network and batch."""
    columns = _columns(entries)
    head = [
        "",
        *(f"{preset}, batch {batch}" for preset, batch in columns),
        "cold start",
        "memory",
        "installed",
    ]
    large = max((entry.case for entry in entries), key=lambda case: len(case.batches)).preset
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for kind in KINDS:
        mine = {entry.case.preset: entry for entry in entries if entry.kind is kind}
        cells = [_time(mine[preset], batch) for preset, batch in columns]
        cifar = mine[large]
        size = megabytes_of(kind.distributions)
        cold = f"{cifar.cold:.1f} s" if cifar.times else "–"
        memory = f"{cifar.megabytes:.0f} MB" if cifar.times and cifar.megabytes else "–"
        cells += [cold, memory, f"{size:.0f} MB" if size else "–"]
        lines.append(f"| {kind.name} | {' | '.join(cells)} |")
    problems = [
        f"- {entry.kind.name}, {entry.case.preset}: {entry.problem}" for entry in entries if entry.problem
    ]
    return "\n".join([*lines, "", *problems, ""]) + ("\n" if problems else "")


def _columns(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """The networks and batch sizes that were timed."""
    return list(
        dict.fromkeys((entry.case.preset, batch) for entry in entries for batch in entry.case.batches)
    )


def _time(entry: Entry, batch: int) -> str:
    if batch not in entry.times:
        return "–"
    times = [seconds * 1e3 for seconds in entry.times[batch]]
    digits = 1 if statistics.median(times) < 1000 else 0
    return f"{statistics.median(times):.{digits}f} ({min(times):.{digits}f} … {max(times):.{digits}f})"


def _asked(entries: Sequence[Entry]) -> Iterator[Row]:
    """The figures that were asked of us."""
    yield from _ratio(entries, "cifar10", 1, "fp32", REFERENCE, 1.4)
    yield from _ratio(entries, "cifar10", 1, "fp32", PIPELINE, 1.85)
    yield from _ratio(entries, "cifar10", 1, "bf16", REFERENCE, 1.9)
    yield from _ratio(entries, "cifar10", 1, "bf16", PIPELINE, 2.5)
    yield from _ratio(entries, "digits", 16, "", PIPELINE, 3.0)
    for batch in (4, 16):
        yield from _ratio(entries, "cifar10", batch, "", REFERENCE, 1.1, only="ours, onnxruntime")
    for entry in entries:
        for batch, parts in entry.parts.items():
            share, limit = _outside(parts), 0.04 if entry.case.preset == "digits" else 0.01
            what = f"{entry.case.preset}, batch {batch}, {entry.kind.name}: time outside the network ÷ in it"
            yield Row(what, f"{share:.2%}", f"≤ {limit:.0%}", share <= limit)
    yield from _sizes({entry.kind.name: entry for entry in entries if entry.case.preset == "cifar10"})


def _sizes(cifar: dict[str, Entry]) -> Iterator[Row]:
    """What was asked of memory and of the disk."""
    held = {name: entry.megabytes for name, entry in cifar.items() if entry.megabytes}
    if "ours, ncnn" in held:
        most = held["ours, ncnn"]
        yield Row("cifar10: memory of ours, ncnn", f"{most:.0f} MB", "≤ 800 MB", most <= 800)
    if REFERENCE in held and "ours, onnxruntime" in held:
        ours, bare = held["ours, onnxruntime"], held[REFERENCE]
        share = f"{ours / bare:.2f} ({ours:.0f} ÷ {bare:.0f} MB)"
        yield Row("cifar10: memory of ours, onnxruntime ÷ bare", share, "≤ 1.2", ours / bare <= 1.2)
    if size := megabytes_of((*_BASE, "onnxruntime", "pillow")):
        yield Row("base and cpu extra, installed, without pip", f"{size:.0f} MB", "≤ 250 MB", size <= 250)


def _ratio(
    entries: Sequence[Entry],
    preset: str,
    batch: int,
    precision: str,
    peer: str,
    wanted: float,
    only: str = "",
) -> Iterator[Row]:
    """How many times as long a step of a peer takes as of our fastest backend (or one) in a precision ("": any)."""
    here = [entry for entry in entries if entry.case.preset == preset and batch in entry.times]
    peers = [entry for entry in here if entry.kind.name == peer]
    ours = [
        entry
        for entry in here
        if entry.kind.given["kind"] == "Ours"
        and precision in ("", entry.kind.precision)
        and only in ("", entry.kind.name)
    ]
    if not (peers and ours):
        return
    best = min(ours, key=lambda entry: entry.milliseconds(batch))
    upper, lower = peers[0].times[batch], best.times[batch]
    what = f"{preset}, batch {batch}: {peer} ÷ {best.kind.name}"
    yield Row(what, ratio(upper, lower), f"≥ {wanted}", median(upper) / median(lower) >= wanted)


def _outside(parts: dict[str, list[float]]) -> float:
    """Time outside the network ÷ in it: the median over blocks of steps, which noise in the network spares."""
    return statistics.median(
        (every - network) / network for every, network in zip(parts["all"], parts["network"], strict=True)
    )


def _parts(entries: Sequence[Entry]) -> str:
    """Microseconds of each part."""
    lines = [
        "| | network | update | noise | the rest, in Python | outside ÷ network |",
        "| --- |" + " --- |" * 5,
    ]
    for entry in entries:
        for batch, parts in entry.parts.items():
            middle = {name: statistics.median(seconds) * 1e6 for name, seconds in parts.items()}
            inside = zip(parts["all"], parts["network"], parts["update"], parts["noise"], strict=True)
            rest = statistics.median(every - sum(others) for every, *others in inside) * 1e6
            cells = [
                f"{middle['network'] / 1e3:.2f} ms",
                *(f"{value:.0f} µs" for value in (middle["update"], middle["noise"], rest)),
                f"{_outside(parts):.2%}",
            ]
            lines.append(f"| {entry.case.preset}, batch {batch}, {entry.kind.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write_picture(entries: Sequence[Entry], path: Path) -> None:
    """Bars of milliseconds a step, a panel for each network and batch; ours in colour."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(10, 6.5), layout="constrained")
    panels = _columns(entries)
    axes = list(figure.subplots(2, -(-len(panels) // 2)).flat)
    for axis, (preset, batch) in zip(axes, panels, strict=False):
        shown = [entry for entry in entries if entry.case.preset == preset and batch in entry.times]
        shown.sort(key=lambda entry: -entry.milliseconds(batch))
        names = [entry.kind.name for entry in shown]
        colours = ["C0" if name.startswith("ours") else "0.75" for name in names]
        bars = axis.barh(names, [entry.milliseconds(batch) for entry in shown], color=colours)
        axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axis.set(title=f"{preset}, batch {batch}: ms a step")
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
