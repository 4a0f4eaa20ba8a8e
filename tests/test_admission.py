"""The policy of who joins, without a thread or a network: its rule from s(B), its order, and what it promises."""

from contextlib import suppress

import numpy as np
import pytest

from benches.simulated import Full, OneAtATime, Static, saturation, simulate, traffic
from ddpm_deploy.errors import BusyError, DeadlineError
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.serve.admission import AGEING, Admission, Ticket
from ddpm_deploy.serve.pace import Pace
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, tiny_spec

SIZES = list(range(1, 17))


def pace(share: float, second: float = 1.0, capacity: int = 16) -> Pace:
    """s(B) = s(1)·(1 + share·(B - 1))."""
    sizes = list(range(1, capacity + 1))
    return Pace(sizes, [second * (1 + share * (size - 1)) for size in sizes])


def admission(share: float = 0.0, capacity: int = 16, **keywords: int) -> Admission:
    return Admission(pace(share, capacity=capacity), capacity, **{"max_queue": 1000, **keywords})


def run(queue: Admission, steps: int, now: float = 0.0) -> list[object]:
    """The owners in the order in which their images begin, over so many steps of a second."""
    began: list[object] = []
    for step in range(steps):
        began += [seat.ticket.owner for seat in queue.take(now + step)]
        assert queue.rows == sum(seat.ticket.rows for seat in queue.seats) <= queue.capacity
        queue.step += 1
        for seat in [seat for seat in queue.seats if seat.end <= queue.step]:
            queue.leave(seat)
    return began


@pytest.mark.parametrize(
    ("share", "limits"),
    [
        (0.0, (16, 16)),  # a GPU that is not full
        (0.36, (14, 14)),  # 16 rows yield under 2 % more
        (0.5, (12, 12)),
        (0.9, (5, 1)),  # as cifar10 on two cores: anybody joins only who is alone
        (1.0, (1, 1)),
    ],
)
def test_how_many_at_once_follows_from_the_step_time(share: float, limits: tuple[int, int]) -> None:
    assert admission(share).limits() == limits


def test_stairs_are_not_climbed_where_they_yield_nothing() -> None:
    """A device that runs buckets of 8 and 16, and is full with 8."""
    steps = Pace([8, 16], [1.0, 2.0], stairs=True)
    assert Admission(steps, 16, 100).limits() == (8, 8)


@pytest.mark.parametrize("share", [0.36, 0.7, 0.9])
@pytest.mark.parametrize("load", [0.4, 0.7, 0.9, 1.0])
def test_the_95th_percentile_is_never_far_from_the_best_of_the_others(share: float, load: float) -> None:
    table = pace(share).table
    p95: dict[type[Admission], float] = {}
    for policy in (Admission, OneAtATime, Static, Full):
        runs = [simulate(policy, table, traffic(load * saturation(table), 400, seed)) for seed in range(4)]
        assert all((seconds > 0).all() for seconds in runs)
        p95[policy] = float(np.mean([np.percentile(seconds, 95) for seconds in runs]))
    assert p95[Admission] <= 1.1 * min(p95[OneAtATime], p95[Static])
    if share == load == 0.9:
        assert p95[Full] > 1.1 * p95[Static]  # what the rule is there for


def test_who_is_alone_is_not_made_later_by_a_tenth() -> None:
    """Where sharing is dear, short ones slip in beside a long one as long as it has time to spare."""
    queue = admission(0.9)
    queue.submit(Ticket(1, 1, 1000, owner="long"), 0.0)
    assert len(queue.take(0.0)) == 1
    for owner in range(10):
        queue.submit(Ticket(1, 1, 50, owner=owner), 0.0)
    joined = queue.take(0.0)
    assert [seat.ticket.owner for seat in joined] == [
        0,
        1,
    ]  # 50·(s(3) - s(1)) is 90 of 1000, and one more 135
    assert not queue.take(0.0)


def test_requests_take_turns() -> None:
    """A large one that came first, and small ones later: neither waits for the other."""
    queue = admission(capacity=4)
    queue.submit(Ticket(40, 1, 4, owner="large"), 0.0)
    assert run(queue, 2) == ["large"] * 4
    for owner in range(3):
        queue.submit(Ticket(1, 1, 4, owner=owner), 2.0)
    queue.submit(Ticket(20, 1, 4, owner="other"), 2.5)
    began = run(queue, 9, now=3.0)
    assert began[:5] == ["large", 0, 1, 2, "other"]
    assert began[5:] == ["large", "other", "large"]


@pytest.mark.parametrize("rows", [1, 2])
def test_one_request_leaves_room_for_others(rows: int) -> None:
    queue = admission(capacity=16)
    queue.submit(Ticket(100, rows, 50, owner="large"), 0.0)
    assert len(queue.take(0.0)) * rows == 14
    queue.submit(Ticket(1, 2, 50, owner="small"), 0.0)
    assert [seat.ticket.owner for seat in queue.take(0.0)] == ["small"]


def test_a_flood_of_small_ones_does_not_starve_a_large_one() -> None:
    queue = admission(capacity=2, max_queue=8)
    large = Ticket(10, 1, 4, owner="large")
    queue.submit(large, 0.0)
    for step in range(200):
        with suppress(BusyError):
            queue.submit(Ticket(1, 1, 4, owner="small"), float(step))
        run(queue, 1, now=float(step))
    assert large.began == 10  # one in each round of the queue


def test_priority_goes_first_and_not_for_ever() -> None:
    queue = admission(capacity=1)
    queue.submit(Ticket(1, 1, 5, priority=0, owner="old"), 0.0)
    for second in range(3):
        queue.submit(Ticket(1, 1, 5, priority=1, owner="urgent"), float(second))
    assert run(queue, 6) == ["urgent", "urgent"]
    queue.submit(Ticket(1, 1, 5, priority=1, owner="late"), AGEING + 1)
    assert run(queue, 20, now=AGEING + 1) == ["urgent", "old", "late"]


def test_who_waits_for_two_rows_is_passed_only_by_who_is_soon_gone() -> None:
    queue = admission(capacity=4)
    for owner, steps in enumerate((30, 30, 30)):
        queue.submit(Ticket(1, 1, steps, owner=owner), 0.0)
    queue.take(0.0)
    queue.submit(Ticket(1, 2, 10, owner="guided"), 0.0)
    queue.submit(Ticket(1, 1, 31, owner="too long"), 0.0)
    queue.submit(Ticket(1, 1, 30, owner="short"), 0.0)
    assert run(queue, 30) == ["short"]
    assert run(queue, 1) == ["guided", "too long"]


def test_tables_have_places() -> None:
    tables = [object(), object(), object()]
    queue = admission(capacity=4, tables=2)
    for owner in (0, 1, 2, 0):
        queue.submit(Ticket(1, 1, 5, table=tables[owner], owner=owner), 0.0)
    assert run(queue, 5) == [0, 1, 0]
    assert run(queue, 1) == [2]


def test_the_queue_says_when_to_come_again() -> None:
    queue = admission(capacity=1, max_queue=2)
    for _ in range(2):
        queue.submit(Ticket(1, 1, 30), 0.0)
    with pytest.raises(BusyError) as refused:
        queue.submit(Ticket(1, 1, 30), 0.0)
    assert refused.value.retry_after == pytest.approx(30)


def test_what_a_deadline_can_be() -> None:
    queue = admission(capacity=1)
    for steps, deadline, holds in ((10, 10.5, True), (10, 9.5, False)):
        with_it = Ticket(1, 1, steps)
        if not holds:
            with pytest.raises(DeadlineError, match=r"takes about 10.00 s here, and its deadline is 9.50 s"):
                queue.submit(with_it, 0.0, deadline)
        assert queue.expected(with_it) == pytest.approx(steps)
    queue.submit(Ticket(1, 1, 100), 0.0)
    queue.take(0.0)
    queue.submit(Ticket(1, 1, 50), 0.0)
    late = Ticket(1, 1, 10, since=0.0, turn=9)
    assert queue.expected(late) == pytest.approx(160)
    urgent = Ticket(1, 1, 10, since=0.0, turn=9, priority=1)
    assert queue.expected(urgent) == pytest.approx(110)


def test_what_is_withdrawn_is_gone() -> None:
    queue = admission(capacity=1)
    tickets = [Ticket(3, 1, 5), Ticket(1, 1, 5)]
    for ticket in tickets:
        queue.submit(ticket, 0.0)
    (seat,) = queue.take(0.0)
    for ticket in tickets:
        queue.withdraw(ticket, 0.0)
        queue.withdraw(ticket, 0.0)
    queue.leave(seat)
    assert (queue.waiting, queue.seats, queue.rows) == ({}, {}, 0)
    assert not queue.take(0.0)


@pytest.mark.parametrize("place", ["host", "device"])
def test_the_step_time_is_measured(place: str) -> None:
    inner = ArrayNetwork(tiny_spec((1, 4, 4), timesteps=30, network=None), 6)
    chain = Chain(inner if place == "host" else DeviceNetwork(inner, HostDevice(seed=0)))  # type: ignore[arg-type]
    found = Pace.measured(chain, 5)
    assert len(found.table) == 6
    assert (found.table > 0).all()
    assert (np.diff(found.table) >= 0).all()
    assert not chain.active.any()


def test_the_step_time_is_learned() -> None:
    """From steps of any sizes; a size that is never seen follows the machine, not another's shape."""
    found = pace(0.36)
    for _ in range(150):
        for size in (1, 16):
            for _ in range(16):
                found.saw(size, 2 * pace(0.9)(size))
    assert found(1) == pytest.approx(2, rel=0.05)
    assert found(16) == pytest.approx(2 * pace(0.9)(16), rel=0.05)
    assert found(1) < found(4) < found(16)
    before = found(8)
    found.saw(8, 1e6)  # a machine that was asleep
    assert found(8) == before
