"""The contest: every candidate in a process of its own, so that memory and caches don't mix, and in turn."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from ddpm_deploy.bench.candidates import Candidate
from ddpm_deploy.bench.process import Worker
from ddpm_deploy.errors import BackendError
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.spec import FAST
from ddpm_deploy.stages import Stages, silent

BATCHES: Final = (1, 4, 16)
_ROUNDS: Final = 5
_TURN: Final = 0.4  # seconds of steps in a turn, where these are quick
_LEAST: Final = 2  # steps of a turn
_LONGEST: Final = 120.0  # seconds for a batch size, above which one that was not asked for is left out
_OF_PROOF: Final = 10.0  # seconds for the images of a proof, above which one of them will do
_CLEARLY: Final = 1.05  # timings differ by more than this from run to run


@dataclass
class Row:
    """A candidate, and what was measured of it.

    problem: why it was not measured to the end, or "". load: seconds to its first step, from its process's start.
    first: seconds of a step at batch 1, roughly. times: seconds a step, of each turn, by batch size. error:
    of its predictions against the proof (`worker.Backend.error`), None where there is no proof. megabytes: the most
    memory of its process.
    """

    candidate: Candidate
    problem: str = ""
    load: float = 0.0
    first: float = 0.0
    times: dict[int, list[float]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    megabytes: float | None = None

    def milliseconds(self, batch: int) -> float:
        """A step of a batch: the median."""
        return statistics.median(self.times[batch]) * 1e3

    def rate(self, batch: int) -> float:
        """Images a second by the recommended chain."""
        return batch / (self.milliseconds(batch) / 1e3 * steps_of(self.candidate.model))

    @property
    def best_batch(self) -> int:
        """The batch size of the most images a second."""
        return max(self.times, key=self.rate)

    @property
    def images_per_second(self) -> float:
        """At that."""
        return self.rate(self.best_batch)

    @property
    def sound(self) -> bool:
        """Whether it ran, and is not known to err by more than it may."""
        return not self.problem and (self.error is None or self.error["within"])


def steps_of(model: ModelFile) -> int:
    """Of the recommended chain."""
    return min(FAST.steps or 1, model.spec.timesteps)


class Contest:
    """The candidates' processes, started and loaded; they end with the `with`."""

    def __init__(
        self, rows: list[Row], workers: list[Worker], batches: tuple[int, ...], chosen: bool
    ) -> None:
        self.rows, self._workers = rows, workers
        self.batches = tuple(
            batch for batch in batches if chosen or batch == batches[0] or self._seconds(batch) <= _LONGEST
        )
        self.left_out = {batch: self._seconds(batch) for batch in batches if batch not in self.batches}

    @property
    def seconds(self) -> float:
        """What the measurement will take, about: more where batches gain nothing by their size."""
        proofs = sum(row.first * _images(row) * _kept(row) for row in self._running)
        return proofs + sum(map(self._seconds, self.batches))

    @property
    def _running(self) -> list[Row]:
        return [row for row in self.rows if not row.problem]

    def _seconds(self, batch: int) -> float:
        return sum(_ROUNDS * (1 + _steps(row, batch)) * row.first * batch for row in self._running)

    def measure(self, stages: Stages = silent) -> None:
        """Let all take their turns, smallest batch first, and then hold them against their proofs."""
        turns = len(self._running) * (_ROUNDS * len(self.batches) + 1)
        with stages("measuring", turns) as advance:
            for batch in self.batches:
                for _ in range(_ROUNDS):
                    for row, worker in self._pairs():
                        with _told(row):
                            seconds = worker.ask("turn", batch=batch, steps=_steps(row, batch))
                            row.times.setdefault(batch, []).append(seconds)
                        advance(1)
            for row, worker in self._pairs():
                row.megabytes = worker.megabytes
                if _kept(row):
                    with _told(row):
                        proof = str(proof_path(row.candidate.model.path))
                        row.error = worker.ask("error", proof=proof, images=_images(row))
                advance(1)

    def _pairs(self) -> list[tuple[Row, Worker]]:
        return [pair for pair in zip(self.rows, self._workers, strict=True) if not pair[0].problem]


@contextmanager
def _told(row: Row) -> Iterator[None]:
    """A backend that fails is a row that says why."""
    try:
        yield
    except BackendError as error:
        row.problem = str(error)


def _steps(row: Row, batch: int) -> int:
    """Of a turn: at most the recommended chain's, but for the one that is not counted."""
    most = max(1, steps_of(row.candidate.model) - 1)
    return min(most, max(_LEAST, int(_TURN / (row.first * batch))))


def _kept(row: Row) -> int:
    """The timesteps in its model's proof; 0 where there is no proof of it."""
    model = row.candidate.model
    path = proof_path(model.path)
    if not path.exists():
        return 0
    proof = load_proof(path)
    return len(proof.timesteps) if proof.spec.provenance.digest == model.spec.provenance.digest else 0


def _images(row: Row) -> int:
    """Of its proof, that it is held against."""
    every = load_proof(proof_path(row.candidate.model.path)).count if _kept(row) else 0
    return every if every * _kept(row) * row.first <= _OF_PROOF else 1


@contextmanager
def contest(
    candidates: Sequence[Candidate],
    batches: tuple[int, ...] | None = None,
    threads: int | None = None,
    stages: Stages = silent,
) -> Iterator[Contest]:
    """Start each candidate's process and let it load, one after another.

    batches: ascending (None: those of BATCHES that don't take too long). threads: as `LoadSettings` has them.
    """
    with ExitStack() as stack, stages("loading", len(candidates)) as advance:
        rows, workers = [], []
        for candidate in candidates:
            row, worker = Row(candidate), stack.enter_context(Worker())
            with _told(row):
                worker.ask(
                    "make",
                    path=str(candidate.model.path),
                    backend=candidate.backend,
                    precision=candidate.asked,
                    threads=threads,
                    batches=batches or BATCHES,
                )
                worker.ask("turn", batch=1, steps=0)
                row.load = worker.age
                # The quicker of two turns: what it will take is told by them, and the machine may be busy.
                row.first = min(worker.ask("turn", batch=1, steps=_LEAST) for _ in range(2))
            rows.append(row)
            workers.append(worker)
            advance(1)
        yield Contest(rows, workers, batches or BATCHES, batches is not None)


def advice(rows: Sequence[Row]) -> str:
    """One line: what to use, by images a second; what is exact first, and then whether less precision is faster."""
    sound = [row for row in rows if row.sound and row.times]
    if not sound:
        return "use none of them: none ran within tolerance"
    usual, *_ = sound
    exact = [row for row in sound if row.candidate.precision == usual.candidate.precision]
    best = max(exact, key=lambda row: row.images_per_second)
    gain = best.images_per_second / usual.images_per_second
    if best is usual or gain < _CLEARLY:
        best, said = usual, f"use {_name(usual)}: none is clearly faster here"
        if usual.error is not None:
            said += ", and it is within tolerance"
    else:
        said = f"use {_name(best)}: {gain:.1f} times as fast as {usual.candidate.backend}, {_judged(best)}"
    others = [row for row in sound if row not in exact]
    quick = max(others, key=lambda row: row.images_per_second, default=best)
    if quick.images_per_second >= _CLEARLY * best.images_per_second:
        gain = quick.images_per_second / usual.images_per_second
        said += (
            f"; or in {quick.candidate.precision}, {_name(quick)}: {gain:.1f} times as fast, {_judged(quick)}"
        )
    return said


def _name(row: Row) -> str:
    return f"{row.candidate.model.name} {row.candidate.words}"


def _judged(row: Row) -> str:
    if row.error is None:
        return "its error unknown, as there is no proof beside it"
    return f"within the tolerance of {row.candidate.precision}"
