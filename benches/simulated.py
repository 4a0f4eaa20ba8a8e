"""A server of requests, simulated: the Batcher's own admission, over a step time s(B) and a clock of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.serve.admission import Admission, Seat, Ticket
from ddpm_deploy.serve.pace import Pace

FEWEST, MOST = 20, 1000  # steps of a request
_AGAIN: Final = 32  # steps after which those who wait are looked at again, at the latest


@dataclass(frozen=True)
class Arrival:
    """A request of a single image: when it comes, and its steps."""

    at: float
    steps: int


class OneAtATime(Admission):
    """A request has the machine to itself."""

    def joins(self, ticket: Ticket, now: float) -> bool:
        """Where nobody runs."""
        return not self.seats


class Static(Admission):
    """Whole batches: who waits when the last one has ended makes up the next. One who is done leaves it narrower."""

    def take(self, now: float) -> list[Seat]:
        """All of a batch at once."""
        self._filling = not self.seats
        return super().take(now)

    def joins(self, ticket: Ticket, now: float) -> bool:
        """Before the first step alone."""
        return self._filling


class Full(Admission):
    """Step by step, whenever there is a row: what the rule is there to do better."""

    def joins(self, ticket: Ticket, now: float) -> bool:
        """Always."""
        return True


POLICIES: Final[dict[str, type[Admission]]] = {
    "continuous": Admission,
    "one at a time": OneAtATime,
    "static batches": Static,
}


class _Known(Pace):
    """A step time that is as it is."""

    def saw(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


def traffic(rate: float, count: int, seed: int, most: int = MOST) -> list[Arrival]:
    """Poisson arrivals, so many a second; steps from FEWEST to `most`, their logarithm uniform."""
    rng = np.random.default_rng(seed)
    steps = np.exp(rng.uniform(math.log(FEWEST), math.log(most), count)).round().astype(int)
    at = rng.exponential(1 / rate, count).cumsum()
    return [Arrival(*pair) for pair in zip(at.tolist(), steps.tolist(), strict=True)]


def saturation(table: NDArray[np.float64], most: int = MOST) -> float:
    """Requests a second of `traffic` at which a server of this s(B) would have no time left, whatever its policy."""
    mean_steps = (most - FEWEST) / math.log(most / FEWEST)
    return float((np.arange(1, len(table)) / table[1:]).max() / mean_steps)


def simulate(
    policy: type[Admission], table: Sequence[float] | NDArray[np.float64], arrivals: Sequence[Arrival]
) -> NDArray[np.float64]:
    """Seconds from each arrival to its image. table: s(B) for B from 0 to the capacity."""
    sizes = range(1, len(table))
    admission = policy(_Known(list(sizes), [float(table[size]) for size in sizes]), len(sizes), len(arrivals))
    seconds = np.zeros(len(arrivals))
    now, came = 0.0, 0
    while came < len(arrivals) or admission.seats or admission.waiting:
        if not (admission.seats or admission.waiting):
            now = max(now, arrivals[came].at)
        while came < len(arrivals) and arrivals[came].at <= now:
            admission.submit(Ticket(1, 1, arrivals[came].steps, owner=came), arrivals[came].at)
            came += 1
        admission.take(now)
        step = admission.pace(admission.rows)
        steps = min(min(seat.end for seat in admission.seats) - admission.step, _AGAIN)
        if came < len(arrivals):
            steps = min(steps, max(1, math.ceil((arrivals[came].at - now) / step)))
        admission.step += steps
        now += steps * step
        for seat in [seat for seat in admission.seats if seat.end <= admission.step]:
            admission.leave(seat)
            seconds[seat.ticket.owner] = now - arrivals[seat.ticket.owner].at
    return seconds
