"""What the first GPU at hand shows, in under eight minutes, without TensorRT or ONNX Runtime.

    python -m benches.first_run

Needs CuPy, NVRTC and the extra `train`, and pytest and compute-sanitizer for what they show. Each part is a process of
its own with a limit of its own, and what it found stands, whatever becomes of the others: after each, first_run.json is
written anew. A section of a page is printed in the end. docs/gpu.md has what an H200 gave.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from benches.replay import NO_GPU, against_replay
from benches.table import HEAD, Row
from benches.timing import interleave, median
from ddpm_deploy import Sampler
from ddpm_deploy.doctor.backends import installed
from ddpm_deploy.files import atomic, require_output
from ddpm_deploy.gpu import driver, visible_gpu

OUTPUT: Final = Path("first_run.json")
PRESET: Final = "cifar10"
BATCHES: Final = {1: 500, 64: 200, 256: 100}  # and the steps of a chain that is timed: some seconds
ROUNDS: Final = 5
LOADS: Final = 50
# Not initcheck: the compiler loads x̂0 before it is known that the row has no use for it, and that counts as a read of
# what was never written. The tests' stand-in for the device shows that nothing comes of it: its new memory is NaN.
SANITIZERS: Final = ("memcheck", "racecheck", "synccheck")
_ROOT: Final = Path(__file__).parent.parent
_SAID: Final = 20  # lines that are kept of what a part said
_TESTS: Final = ("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_gpu.py")
_KERNEL_TESTS: Final = (*_TESTS, "-k", "bit_for_bit or previews")


@dataclass(frozen=True)
class Part:
    """A command that prints a JSON object for each Row. limit: seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Result:
    """What became of a part: "done", "failed" or "cut off". said: the last lines of it, unless it is done."""

    part: str
    outcome: str
    seconds: float
    rows: tuple[Row, ...]
    said: tuple[str, ...]


def run_parts(parts: Sequence[Part], about: dict[str, Any], output: Path) -> list[Result]:
    """Run each in turn; `output` has `about` and the results so far after each of them. Raises OutputError."""
    results: list[Result] = []
    for part in parts:
        print(f"{part.name}: at most {part.limit:.0f} s", file=sys.stderr, flush=True)
        results.append(_run(part))
        with atomic(output) as temporary:
            temporary.write_bytes(
                msgspec.json.format(msgspec.json.encode(about | {"parts": [asdict(r) for r in results]}))
            )
    return results


def _run(part: Part) -> Result:
    with tempfile.TemporaryFile() as rows, tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            part.command,
            stdout=rows,
            stderr=said,
            stdin=subprocess.DEVNULL,
            cwd=_ROOT,
            start_new_session=True,
        )
        try:
            outcome = "failed" if process.wait(part.limit) else "done"
        except subprocess.TimeoutExpired:
            outcome = "cut off"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        seconds = time.perf_counter() - start
        texts = []
        for file in (rows, said):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    whole = texts[0].split("\n")[:-1]  # not a line that was cut
    return Result(
        part.name,
        outcome,
        round(seconds, 1),
        tuple(msgspec.json.decode(line, type=Row) for line in whole),
        () if outcome == "done" else tuple(texts[1].splitlines()[-_SAID:]),
    )


def page(about: dict[str, Any], results: Sequence[Result]) -> str:
    """A section in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    text = f"## {about['gpu']}\n\nDriver {about['driver']} (CUDA {about['cuda']}); {versions}.\n\n{HEAD}"
    for result in results:
        text += "".join(f"{row.markdown()}\n" for row in result.rows)
        if result.outcome != "done":
            last = result.said[-1].replace("|", "\\|") if result.said else ""
            text += (
                Row(result.part, f"{result.outcome} after {result.seconds} s: {last}", "", False).markdown()
                + "\n"
            )
    return text


def tests() -> Iterator[Row]:
    """The tests that only a GPU can show: those that did not pass by name, and how many did."""
    command = [sys.executable, *_TESTS, "-v"]
    counts: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            if found := re.match(r"(tests/\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
                outcome = found[2].lower()
                counts[outcome] = counts.get(outcome, 0) + 1
                if outcome != "passed":
                    yield Row(found[1], outcome, "", None if outcome == "skipped" else False)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none ran"
    yield Row("tests/test_gpu.py", said, "none failed", process.returncode == 0)


def sanitizer() -> Iterator[Row]:
    """The kernel's own tests, whose network copies on the GPU and is no PyTorch, under compute-sanitizer's tools.

    Under racecheck PyTorch 2.11's kernels end in an error of the tool's.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield Row("the kernel under compute-sanitizer", "it is not on the PATH")
        return
    for tool in SANITIZERS:
        options = ["--tool", tool, "--kernel-name", "kne=step", "--error-exitcode", "9"]
        command = [program, *options, sys.executable, *_KERNEL_TESTS]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            said, _ = process.communicate()
        print(said, file=sys.stderr, flush=True)
        summary = next((line for line in reversed(said.splitlines()) if "SUMMARY" in line), "no summary")
        clean = process.returncode == 0
        yield Row(f"the kernel under {tool}", summary.strip("= "), "no errors", clean)


def chain() -> Iterator[Row]:
    """The chain against the bare network, each batch size with a graph of its own."""
    for batch, steps in BATCHES.items():
        with _sampler(PRESET, batch) as sampler:
            yield from against_replay(sampler, batch, f"{PRESET} in PyTorch, batch {batch}", steps, ROUNDS)


def few_steps() -> Iterator[Row]:
    """Short chains, where what a call costs once counts most."""
    for batch in (1, 64):
        with _sampler(PRESET, batch) as sampler:
            for steps in (10, 50):

                def images(sampler: Sampler = sampler, batch: int = batch, steps: int = steps) -> None:
                    sampler.sample(batch, steps=steps, solver="ddim", seed=0)

                seconds = median(interleave({"images": images}, batch, ROUNDS)["images"])
                yield Row(f"{PRESET} in PyTorch, batch {batch}: {steps} steps", f"{seconds:.5f} s an image")


def load_and_close() -> Iterator[Row]:
    """Memory of the card in use, by the driver's account, after one load and after many."""
    from ddpm_deploy.runtime.device.cuda import Cuda

    used: list[float] = []
    for _ in range(LOADS + 1):
        with _sampler("digits", 4) as sampler:
            sampler.sample_on_device(4, steps=2, seed=0)
        del sampler
        device = Cuda()
        device.release()
        with device.here():
            left, total = device._cupy.cuda.runtime.memGetInfo()
        used.append((total - left) / 2**20)
    yield Row(f"memory of the card before and after {LOADS} loads", f"{used[0]:.1f} MiB, {used[-1]:.1f} MiB")


def ctrl_c() -> Iterator[Row]:
    """SIGINT a second into the longest chain."""
    batch = max(BATCHES)
    with _sampler(PRESET, batch) as sampler:
        yield interrupted(sampler, batch)


def interrupted(sampler: Sampler, batch: int, after: float = 1.0) -> Row:
    """How long a full chain goes on after SIGINT. after: seconds from its start."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored here
    timer = threading.Timer(after, send)
    what = f"batch {batch}: from SIGINT to the end of the chain, and of what was started"
    try:
        timer.start()
        sampler.sample_on_device(batch, seed=0)
    except KeyboardInterrupt:
        ended = time.perf_counter() - sent[0]
        sampler.network.device.synchronize()
        idle = time.perf_counter() - sent[0]
        return Row(what, f"{ended:.3f} s, {idle:.3f} s", "≤ 0.5 s", idle <= 0.5)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    return Row(what, f"the chain ended within {after} s, before the signal")


def _sampler(preset: str, batch: int) -> Sampler:
    """A preset's network, in half precision but for what must stay in float32, captured with the chain."""
    from benches.captured import CapturedNetwork
    from benches.models import random_network
    from ddpm_deploy.export.precision import reduce

    network, spec = random_network(preset)
    return Sampler(CapturedNetwork(reduce(network, "fp16", network.float32_islands), spec, batch))


# With the seconds that each may take: 470 in all.
WORK: Final[dict[str, tuple[Callable[[], Iterator[Row]], float]]] = {
    "tests": (tests, 90),
    "sanitizer": (sanitizer, 100),
    "chain": (chain, 130),
    "few_steps": (few_steps, 50),
    "load_and_close": (load_and_close, 60),
    "ctrl_c": (ctrl_c, 40),
}


def _print_rows(work: Callable[[], Iterator[Row]]) -> None:
    """As `Part` wants it: whatever else is printed goes where the errors go."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as output:
        os.dup2(2, 1)
        for row in work():
            output.write(msgspec.json.encode(row) + b"\n")


def main() -> None:
    """Run all parts, or the one that is named, which prints its rows as JSON."""
    if name := "".join(sys.argv[1:]):
        _print_rows(WORK[name][0])
        return
    gpu, nvidia = visible_gpu(), driver()
    if gpu is None:
        sys.exit(NO_GPU)
    require_output(OUTPUT)
    about = {"gpu": gpu.name, "driver": nvidia.version, "cuda": nvidia.cuda, "packages": installed()}
    parts = [
        Part(name, (sys.executable, "-m", "benches.first_run", name), limit)
        for name, (_, limit) in WORK.items()
    ]
    print(page(about, run_parts(parts, about, OUTPUT)), end="")


if __name__ == "__main__":
    main()
