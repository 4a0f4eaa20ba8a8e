"""Rows of the batch: whose image is in which slot of a Chain, and what a step brought of it.

All of it goes by `Seat`, never by position: slots are reused, and moved. Whoever steps them has one thread, and says
who comes and goes (`batcher`).
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ddpm_deploy.runtime.chain import Chain, Noise, time_step
from ddpm_deploy.runtime.protocols import Array, Look, Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.serve.admission import Seat, Ticket


class Rows:
    """The images that run, over all of which it iterates.

    chain: one that nobody else uses. `step` of its methods is the number of steps that were taken, as of `Seat.end`.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._seats: dict[int, Seat] = {}  # by slot; that of a guided image's partner is not among them
        self._looks: deque[_Look] = deque()  # that a device still brings
        self._holes = False  # whether slots were freed since they were last closed

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def __len__(self) -> int:
        return len(self._seats)

    def start(self, seats: list[Seat], request: Request, noise: Noise | None) -> None:
        """Start the images of a request in free slots. They are here also where that raises, until they leave."""
        slots = self.chain.free[: request.rows]
        self._seats.update(zip(slots.tolist(), seats, strict=False))  # behind them the partners
        self.chain.start(slots, request, noise)

    def step(self) -> None:
        """Take each one step on."""
        self._close_holes()
        self.chain.step()

    def _close_holes(self) -> None:
        """A batch is as wide as its highest slot."""
        if not self._holes:
            return
        self._holes, free = False, self.chain.free
        if len(free) and free[0] < sum(seat.ticket.rows for seat in self):
            moves = self.chain.compact()
            self._seats = {moves.get(slot, slot): seat for slot, seat in self._seats.items()}

    def finished(self, step: int) -> list[tuple[Seat, Array, bool]]:
        """Those whose last step this was, who leave: each with its image, (C, H, W), and whether its numbers broke."""
        slots = [slot for slot, seat in self._seats.items() if seat.end <= step]
        if not slots:
            return []
        ended = np.array(slots)
        images, broken = self.chain.images(ended), self.chain.broken(ended)
        seats = [self._pop(slot) for slot in slots]
        return list(zip(seats, images, broken.tolist(), strict=True))

    def broken(self) -> list[Seat]:
        """Those whose numbers are not finite."""
        if not self._seats:
            return []
        slots = np.array(list(self._seats))
        return [self._seats[slot] for slot in slots[self.chain.broken(slots)].tolist()]

    def look(self, seats: Collection[Seat], step: int) -> None:
        """Ask for x̂0 of some, as it is after this step: `seen` has it when it has arrived."""
        slots = sorted(slot for slot, seat in self._seats.items() if seat in seats)
        if slots:
            look = self.chain.watch(np.array(slots))
            self._looks.append(_Look(step, look, [self._seats[slot] for slot in slots]))

    def seen(self, step: int) -> Iterator[tuple[Seat, int, Array]]:
        """What has arrived: whose, after which of its own steps, from 0, and x̂0, (C, H, W), which the next overwrites.

        After the last step of all, this is everything.
        """
        if not self._looks:
            return
        going_on = any(seat.end > step for seat in self)
        while self._looks and (not going_on or self._looks[0].step + self.chain.lag <= step):
            look = self._looks.popleft()
            _, x0 = look.look()
            for seat, image in zip(look.seats, x0, strict=True):
                yield seat, seat.taken(look.step) - 1, image

    def leave(self, ticket: Ticket) -> None:
        """End a request's images before their time: their slots are free now."""
        slots = [slot for slot, seat in self._seats.items() if seat.ticket is ticket]
        for slot in slots:
            self._pop(slot)
        if slots:
            self.chain.stop(np.array(slots))

    def _pop(self, slot: int) -> Seat:
        self._holes = True
        return self._seats.pop(slot)

    def restart(self) -> None:
        """After a step that failed: end all, and try another. Raises what the network does where that fails too."""
        self._looks.clear()
        self._seats.clear()
        self.chain.clear()
        time_step(self.chain, 1)


@dataclass(frozen=True)
class _Look:
    """What was seen after a step, and of whom."""

    step: int
    look: Look
    seats: list[Seat]


@contextmanager
def rows_of(model: Sampler | Network) -> Iterator[Rows]:
    """The rows of a model, for as long as it is held."""
    if isinstance(model, Sampler):
        with model.lent() as chain:
            yield Rows(chain)
        return
    chain = Chain(model)
    try:
        yield Rows(chain)
    finally:
        chain.close()
