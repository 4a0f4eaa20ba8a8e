"""Rows: what runs is known by its Seat, whatever slots it has had; and what happened is said once. Without a thread."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Request, Sampler
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.serve.admission import Seat, Ticket
from ddpm_deploy.serve.rows import Rows, rows_of
from tests.host_device import DeviceNetwork, HostDevice
from tests.test_guidance import Labelled


@dataclass
class Run:
    """Rows, the steps that were taken, and the images of those who have ended."""

    rows: Rows
    step: int = 0
    gone: dict[Seat, Array] = field(default_factory=dict)

    def start(self, request: Request, noise: Any = None) -> list[Seat]:
        """All of a request's images."""
        request = request.checked(self.rows.chain.spec)
        steps = len(request.table_for(self.rows.chain.spec))
        ticket = Ticket(request.count, request.rows // request.count, steps)
        seats = [Seat(ticket, index, self.step + steps) for index in range(request.count)]
        self.rows.start(seats, request, noise)
        return seats

    def take(self, steps: int) -> None:
        """So many steps, and note who ends."""
        for _ in range(steps):
            self.rows.step()
            self.step += 1
            self.gone.update({seat: image for seat, image, _ in self.rows.finished(self.step)})

    def seen(self) -> list[tuple[Seat, int, Array]]:
        return [(seat, at, image.copy()) for seat, at, image in self.rows.seen(self.step)]

    def images(self, seats: list[Seat]) -> Array:
        return np.stack([self.gone[seat] for seat in seats])


@pytest.fixture(params=["host", "device"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    inner = Labelled(max_batch=8)
    network: Any = inner if request.param == "host" else DeviceNetwork(inner, HostDevice(seed=0))
    with rows_of(network) as rows:
        yield Run(rows)


def alone(request: Request) -> Array:
    with Sampler(Labelled(max_batch=8)) as sampler:
        return np.concatenate(list(sampler.draw(request)))


PLAIN = Request(count=2, seed=1, steps=4, labels=(0,))
THREE = Request(count=3, seed=4, steps=9, labels=(0, 1))
GUIDED = Request(count=2, seed=2, steps=9, labels=(1, 2), guidance=(3.0,))


def test_an_image_is_known_when_it_was_moved(run: Run) -> None:
    plain, guided, others = run.start(PLAIN), run.start(GUIDED), run.start(THREE[:2])
    run.take(4)
    assert list(run.gone) == plain
    late = run.start(PLAIN)  # in the slots of the first
    run.take(1)
    run.rows.leave(late[0].ticket)
    run.take(4)  # the others move there
    assert set(run.gone) == {*plain, *guided, *others}
    assert len(run.rows) == 0
    np.testing.assert_array_equal(run.images(plain), alone(PLAIN))
    np.testing.assert_array_equal(run.images(guided), alone(GUIDED))
    np.testing.assert_array_equal(run.images(others), alone(THREE[:2]))


def test_who_leaves_is_out_of_the_batch(run: Run) -> None:
    plain, guided = run.start(PLAIN), run.start(GUIDED)
    run.rows.leave(plain[0].ticket)
    run.rows.leave(plain[0].ticket)  # again, to no effect
    assert list(run.rows) == guided
    run.take(1)
    assert run.rows.chain.free.tolist() == [4, 5, 6, 7]


def test_a_look_is_of_whom_it_was_asked_for(run: Run) -> None:
    """Also where it arrives when that one has moved, and another has its slot."""
    first, others = run.start(Request(seed=3, steps=1, labels=(0,))), run.start(THREE)
    run.take(1)
    run.rows.look([*first, others[2], others[0]], run.step)  # of the first, who left, there is nothing
    seen = run.seen()
    run.take(1)  # the last moves to the first's slot
    run.start(PLAIN)
    seen += run.seen()
    assert [(seat, at) for seat, at, _ in seen] == [(others[0], 0), (others[2], 0)]
    with Sampler(Labelled(max_batch=8)) as sampler:
        _, _, x0 = next(sampler.stream(3, seed=4, steps=9, labels=(0, 1, 0)))
    for seat, _, image in seen:
        np.testing.assert_array_equal(image, x0[seat.index])


def test_all_that_was_looked_at_arrives_with_the_last_step(run: Run) -> None:
    (seat, _), arrived = run.start(PLAIN), []
    for _ in range(4):
        run.rows.step()
        run.step += 1
        run.rows.look([seat], run.step)
        arrived.append([at for _, at, _ in run.seen()])
    assert arrived == ([[], [0], [1], [2, 3]] if run.rows.chain.lag else [[0], [1], [2], [3]])


def test_one_that_does_not_start_leaves_like_any(run: Run) -> None:
    def noise(draw: int) -> Array:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        run.start(PLAIN, noise)
    (ticket,) = {seat.ticket for seat in run.rows}
    run.rows.leave(ticket)
    assert len(run.rows) == 0
    guided = run.start(GUIDED)
    run.take(9)
    np.testing.assert_array_equal(run.images(guided), alone(GUIDED))


def test_a_restart_leaves_nothing(run: Run) -> None:
    seats = run.start(GUIDED)
    run.take(1)
    run.rows.look(seats, run.step)
    run.rows.restart()
    assert (len(run.rows), run.seen(), run.rows.broken()) == (0, [], [])
    again = run.start(GUIDED)
    run.take(9)
    assert list(run.gone) == again
    np.testing.assert_array_equal(run.images(again), alone(GUIDED))
