"""Who joins the batch at the next step, and who waits: the policy, without a thread, a network or a clock.

The batcher calls it with the time of day, a simulator with a time of its own.

**What may share a step.** Any requests: each row of the batch has its own timestep, table, noise and guidance. Only
room counts: rows (a guided image takes two), and places for different step tables (`Admission._fits`).

**Who is next.** The request that has waited longest since it was last given a row: requests with images left take
turns, so that a large one gives way to a small one that comes later, and is itself never passed more than once by
each of the others. A priority of 1 is worth `AGEING` seconds of waiting, 2 twice that: it puts a request ahead of
others, never for ever. One request leaves an eighth of the rows to others, so that one who comes later finds room.
Where the next may not join yet, those behind it may, if they will be gone when the first of those who run is: so nobody
blocks the queue, and nobody is passed for ever.

**How many at once** follows from s(B), the time of a step with B rows, since batching pays only as far as that says.
Sharing is not free: whoever runs is slowed down from s(B) to s(B + 1) by who joins, and on a network that fills
the machine by itself (s(B) near B·s(1)) all would end as late as the last.

- *Useful.* Never more rows than it takes to get `USEFUL` of the throughput that any size gives: more would only make
  everybody later.
- *Cheap.* Among these, up to the largest B with s(B) ≤ s(1)·(B + 1)/2 anybody joins: there a row costs at most half of
  what it costs alone, on average. Sharing a machine equally makes the longest requests later, by some 1/(1 - load),
  where a queue in order would not; at half the cost the load is halved, which pays for that at every load.
- *Harmless.* Beyond that one joins where everybody who runs still ends in time: no later than `STRETCH` times what
  it would have taken, waiting and all, if the requests were run one at a time in their order. So when there is little
  to do, requests run nearly alone, and short ones slip in beside long ones; under load one at a time falls behind,
  everybody gains time to spare, and the batch fills up as far as that is useful.

In simulations (`benches.serving`, docs/serving.md) of single images of 20 to 1000 steps, with the s(B) of a network
that gains by batches and of one that does not, at loads from 30 % of saturation to all of it, the 95th percentile was
at most 1.04 times that of the better of one at a time and static batches; filling the batch whenever there is room made
it 1.16 times that.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import BusyError, DeadlineError
from ddpm_deploy.serve.pace import Pace

AGEING: Final = 10.0  # seconds of waiting that a priority of 1 is worth
STRETCH: Final = 1.1
USEFUL: Final = 0.98
_LOOKS: Final = 32  # requests that are looked at for one free row
_AGAIN: Final = 32  # steps after which those who may not join are looked at again, though nothing happened


@dataclass(eq=False)
class Ticket:
    """A request as the policy sees it: `images` of so many rows and steps each.

    priority: in units of AGEING. table: what tells step tables apart. owner: whose it is. began: images that were given
    a row so far, in order. rows_used: that it has now. since: when it came, or was last given a row. due: when it
    would have ended one at a time, and STRETCH.
    """

    images: int
    rows: int
    steps: int
    priority: float = 0.0
    table: Any = None
    owner: Any = None
    began: int = 0
    rows_used: int = 0
    since: float = 0.0
    turn: int = 0
    due: float = math.inf

    @property
    def key(self) -> tuple[float, int]:
        """Its place among those who wait: the least is next."""
        return self.since - AGEING * self.priority, self.turn


@dataclass(eq=False)
class Seat:
    """An image that runs: `index` of its request, until the step of this number was taken."""

    ticket: Ticket
    index: int
    end: int

    def taken(self, step: int) -> int:
        """Its own steps among so many that were taken."""
        return step - (self.end - self.ticket.steps)


@dataclass(eq=False)
class Admission:
    """Requests that wait, images that run, and the rule that makes one of the other.

    capacity: rows at once. max_queue: requests that may wait. tables: different step tables at once.
    """

    pace: Pace
    capacity: int
    max_queue: int
    tables: int = 1 << 30
    step: int = 0  # that were taken
    rows: int = 0  # in use
    waiting: dict[Ticket, None] = field(default_factory=dict)
    seats: dict[Seat, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._turns = itertools.count()
        self._clock = 0.0  # when all that was ever asked for would be done, one at a time
        self._look_at = 0  # the step at which to look again
        self._table: NDArray[np.float64] | None = None  # of which the limits are
        self._limits = 1, 1

    def limits(self) -> tuple[int, int]:
        """Rows that are useful, and those among them that are cheap: up to these anybody joins."""
        table = self.pace.table
        if table is not self._table:
            self._table, seconds = table, table[1 : self.capacity + 1]
            sizes = np.arange(1, len(seconds) + 1)
            throughput = sizes / seconds
            useful = int(np.argmax(throughput >= USEFUL * throughput.max())) + 1
            cheap = np.flatnonzero(seconds[:useful] <= seconds[0] * (sizes[:useful] + 1) / 2)
            self._limits = useful, int(cheap[-1]) + 1
        return self._limits

    @property
    def most_rows(self) -> int:
        """Rows that one request may have: an eighth is left to others."""
        return self.capacity - self.capacity // 8

    def alone(self, ticket: Ticket) -> float:
        """Seconds that a request takes by itself."""
        at_once = max(1, self.most_rows // ticket.rows)
        full, rest = divmod(ticket.images, at_once)
        each = full * self.pace(at_once * ticket.rows) + (self.pace(rest * ticket.rows) if rest else 0)
        return ticket.steps * each

    def submit(self, ticket: Ticket, now: float, deadline: float = math.inf) -> None:
        """Let a request wait for its rows. deadline: seconds from now.

        Raises BusyError where too many wait, DeadlineError where it cannot be done in time.
        """
        if len(self.waiting) >= self.max_queue:
            wait = max(1e-3, self.backlog() / len(self.waiting))
            raise BusyError(
                f"{self.max_queue} requests are waiting, and no more may: try again in {wait:.1f} s", wait
            )
        ticket.since, ticket.turn = now, next(self._turns)
        if deadline < math.inf and (expected := self.expected(ticket)) > deadline:
            raise DeadlineError(
                f"this takes about {expected:.2f} s here, and its deadline is {deadline:.2f} s: ask for fewer steps "
                "or images, or give it more time"
            )
        alone = self.alone(ticket)
        self._clock = max(self._clock, now) + alone
        ticket.due = now + STRETCH * (self._clock - now)
        self.waiting[ticket] = None
        self._look_at = 0

    def backlog(self, before: tuple[float, int] = (math.inf, 0)) -> float:
        """Seconds of work, of a full batch, that waits in the places before one."""
        rows = sum(
            ticket.rows * ticket.steps * (ticket.images - ticket.began)
            for ticket in self.waiting
            if ticket.key < before
        )
        useful, _ = self.limits()
        return rows * self.pace(useful) / useful

    def expected(self, ticket: Ticket) -> float:
        """Seconds until a request that comes now is done: the wait for its turn, and its own steps."""
        useful, _ = self.limits()
        rows = min(ticket.rows * ticket.images, self.most_rows)
        wait = self.backlog(ticket.key)
        if self.rows + ticket.rows > useful and self.seats:
            wait += self._soonest() * self.pace(self.rows)
        company = self.pace(min(self.rows + rows, max(useful, rows)))
        return wait + self.alone(ticket) * company / self.pace(rows)

    def take(self, now: float) -> list[Seat]:
        """Who joins before the next step, images of one request in order."""
        if not self.waiting or self.rows >= self.capacity or self.step < self._look_at:
            return []
        self._look_at = self.step + _AGAIN
        return list(self._seated(now))

    def _seated(self, now: float) -> Iterator[Seat]:
        """Each who joins, in turn."""
        queue = [(ticket.key, ticket) for ticket in heapq.nsmallest(_LOOKS, self.waiting, lambda t: t.key)]
        longest: float = math.inf  # steps of who may pass one that waits on
        while queue and self.rows < self.capacity:
            _, ticket = heapq.heappop(queue)
            if ticket.steps > longest or not self._fits(ticket):
                continue
            if self.rows + ticket.rows <= self.capacity and self.joins(ticket, now):
                yield self._seat(ticket, now)
                if ticket.began < ticket.images:
                    heapq.heappush(queue, (ticket.key, ticket))
            else:
                longest = min(longest, self._soonest())

    def _soonest(self) -> int:
        """Steps until the first of those who run is done."""
        return min(seat.end for seat in self.seats) - self.step

    def _fits(self, ticket: Ticket) -> bool:
        """What may share a step: whoever leaves others their share of the rows, and has a place for its table."""
        if ticket.rows_used and ticket.rows_used + ticket.rows > self.most_rows:
            return False
        if len(self.seats) < self.tables:
            return True
        used = {id(seat.ticket.table) for seat in self.seats}
        return id(ticket.table) in used or len(used) < self.tables

    def joins(self, ticket: Ticket, now: float) -> bool:
        """Whether one more image of a request may run beside those that do: the rule above."""
        rows, (useful, cheap) = self.rows + ticket.rows, self.limits()
        return not self.seats or rows <= cheap or (rows <= useful and self._harmless(ticket, now))

    def _harmless(self, ticket: Ticket, now: float) -> bool:
        """Whether everybody who runs still ends in time beside another image."""
        seats = [(seat.end - self.step, seat.ticket.rows, seat.ticket.due) for seat in self.seats]
        left, rows, due = np.array([*seats, (ticket.steps, ticket.rows, math.inf)]).T
        order = np.argsort(left)
        left, rows, due = left[order], rows[order].astype(int), due[order]
        in_use = rows[::-1].cumsum()[::-1]  # until each of the ends
        ends = now + (np.diff(left, prepend=0) * self.pace.table[in_use]).cumsum()
        return bool((ends <= due).all())

    def _seat(self, ticket: Ticket, now: float) -> Seat:
        seat = Seat(ticket, ticket.began, self.step + ticket.steps)
        ticket.began += 1
        ticket.rows_used += ticket.rows
        ticket.since, ticket.turn = now, next(self._turns)
        self.rows += ticket.rows
        self.seats[seat] = None
        if ticket.began == ticket.images:
            del self.waiting[ticket]
        return seat

    def stepped(self, seconds: float) -> None:
        """A step was taken, in so many seconds."""
        self.step += 1
        self.pace.saw(self.rows, seconds)

    def leave(self, seat: Seat) -> None:
        """An image is done, or was ended."""
        del self.seats[seat]
        seat.ticket.rows_used -= seat.ticket.rows
        self.rows -= seat.ticket.rows
        self._look_at = 0

    def withdraw(self, ticket: Ticket, now: float) -> None:
        """What a request has not begun is no longer wanted; nothing where it has begun all."""
        if ticket in self.waiting:
            del self.waiting[ticket]
            self._clock -= self.alone(ticket) * (1 - ticket.began / ticket.images)
            self._look_at = 0
