"""The chain: equal to the reference bit for bit, however its slots are filled, without allocating.

That of the host, and that of a device over its stand-in, which runs step.cu: one contract.
"""

import tracemalloc
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy import reference
from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.exponential import Exponential
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.solvers import COLUMNS, StepTable, ddpm
from ddpm_deploy.spacings import spaced
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, tiny_spec

SPEC = tiny_spec((3, 4, 5), timesteps=30, network=None)
SCHEDULE = Schedule(SPEC.schedule.betas(30))


def every_column_table(seed: int, steps: int) -> StepTable:
    """A table that uses all columns of the rule: no solver does yet, and the chain must not know."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.uniform(-0.6, 0.6, steps) for name in ("a", "b", "c", "d", "e", "f", "g")}
    columns["e"][3:5] = 0  # steps without noise between steps with it
    return StepTable.from_columns(
        t=np.sort(rng.choice(30, steps, replace=False))[::-1], lo=-0.9, hi=0.8, **columns
    )


TABLES = {
    "full": ddpm(SCHEDULE, spaced("leading", SCHEDULE, 30)),
    "strided": ddpm(SCHEDULE, spaced("leading", SCHEDULE, 7), variance="fixed_small"),
    "unclipped": ddpm(SCHEDULE, spaced("leading", SCHEDULE, 5), clip=None),
    "every column": every_column_table(0, 12),
}


LEARNED_SPEC = msgspec.structs.replace(SPEC, variance="learned_range")
LEARNED_TABLES = {
    "learned": ddpm(SCHEDULE, spaced("leading", SCHEDULE, 30), variance="learned_range"),
    # Bounds that no schedule has: past what exp takes, the wrong way about, one of them zero.
    "any bounds": StepTable.from_columns(
        **{name: every_column_table(1, 20)[name] for name in COLUMNS[:10]},
        ln_var_min=np.linspace(-200, 20, 20).round(2),
        ln_var_max=np.roll(np.linspace(-10, 0, 20), 7),
    ),
    "one bound": StepTable.from_columns(
        **{name: every_column_table(2, 20)[name] for name in COLUMNS[:10]},
        ln_var_min=np.where(np.arange(20) % 2, -3.0, 0.0),
    ),
    "fixed": ddpm(SCHEDULE, spaced("leading", SCHEDULE, 7)),
}


class LearnedNetwork(ArrayNetwork):
    """One that says a variance as well."""

    def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
        """As any, and v within [-1.2, 1.2]."""
        out = super().answer(x, t)
        return np.concatenate([out, np.float32(1.2) * np.clip(np.roll(out, 2, axis=2), -1, 1)], axis=1)


def reference_images(
    table: StepTable, seed: int, index: int, network: ArrayNetwork | None = None
) -> NDArray[np.float32]:
    network = network or ArrayNetwork(SPEC, 1)
    *_, last = reference.chain(
        lambda x, t: network.answer(x[None], np.array([t]))[0], table, SPEC.image_shape, seed, index
    )
    return last


Make = Callable[[ArrayNetwork], Chain]


@pytest.fixture(params=["host", "device"])
def make(request: pytest.FixtureRequest) -> Make:
    """The chain of a network."""
    if request.param == "host":
        return Chain
    return lambda network: Chain(DeviceNetwork(network, HostDevice(seed=1)))  # type: ignore[arg-type]


def start(chain: Chain, slot: int, table: StepTable, seed: int, index: int) -> None:
    chain.start(np.array([slot]), Request(table=table, seed=seed, first_index=index))


def x_of(chain: Chain, slot: int) -> Array:
    """What stands in a slot, (C, H, W)."""
    return chain.images(np.array([slot]))[0]


@pytest.mark.parametrize("name", TABLES)
def test_batch_equals_the_reference_bit_for_bit(make: Make, name: str) -> None:
    table = TABLES[name]
    chain = make(ArrayNetwork(SPEC, 3))
    chain.start(np.arange(3), Request(table=table, count=3, seed=7, first_index=5))
    for _ in range(len(table)):
        chain.step()
    assert not chain.active.any()
    for slot in range(3):
        np.testing.assert_array_equal(
            x_of(chain, slot).view(np.uint32), reference_images(table, 7, 5 + slot).view(np.uint32)
        )


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", LEARNED_TABLES)
def test_a_learned_variance_equals_the_reference_bit_for_bit(make: Make, name: str, alone: bool) -> None:
    """By itself, and beside other tables, so that rows with and without one share a step."""
    chain = make(LearnedNetwork(LEARNED_SPEC, 3))
    start(chain, 1, LEARNED_TABLES[name], 7, 5)
    if not alone:
        start(chain, 0, LEARNED_TABLES["learned"], 8, 0)
        start(chain, 2, LEARNED_TABLES["fixed"], 8, 1)
    while chain.active[1]:
        chain.step()
    wanted = reference_images(LEARNED_TABLES[name], 7, 5, LearnedNetwork(LEARNED_SPEC, 1))
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(x_of(chain, 1).view(np.uint32), wanted.view(np.uint32))


def test_an_infinite_v_does_not_touch_a_slot_of_fixed_variance(make: Make) -> None:
    class Overflowing(LearnedNetwork):
        def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
            """As ever, but for v in slot 0."""
            both = super().answer(x, t)
            both[0, 3:] = np.inf
            return both

    chain = make(Overflowing(LEARNED_SPEC, 2))
    start(chain, 0, LEARNED_TABLES["fixed"], 7, 5)
    start(chain, 1, LEARNED_TABLES["learned"], 8, 0)
    while chain.active[0]:
        chain.step()
    wanted = reference_images(LEARNED_TABLES["fixed"], 7, 5, LearnedNetwork(LEARNED_SPEC, 1))
    np.testing.assert_array_equal(x_of(chain, 0).view(np.uint32), wanted.view(np.uint32))


def test_a_learned_variance_needs_a_model_that_has_one(make: Make) -> None:
    with pytest.raises(SettingError, match="needs a learned variance, and the model has none"):
        start(make(ArrayNetwork(SPEC, 1)), 0, LEARNED_TABLES["learned"], 1, 0)


def test_exp_is_the_reference_bit_for_bit_and_within_a_rounding() -> None:
    rng = np.random.default_rng(0)
    ends = [0.0, -0.0, 80, -80, 1e30, np.inf, -np.inf, np.finfo(np.float32).tiny]
    w = np.concatenate([rng.uniform(-85, 85, 3000), rng.normal(size=1000), ends]).astype(np.float32)
    got = w[None].copy()
    Exponential(2, w.size).apply(got)
    wanted = np.array([reference.exponential(number) for number in w])
    np.testing.assert_array_equal(got[0].view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_allclose(got[0], np.exp(np.clip(w.astype(np.float64), -80, 80)), rtol=6e-8)
    assert got[0, 4000] == 1
    w[0] = np.nan
    Exponential(2, w.size).apply(w[None])
    assert np.isnan(w[0])


def test_slots_are_independent(make: Make) -> None:
    """Chains of different tables, seeds and ages, started in any slot at any step, give the same bits."""
    chain = make(ArrayNetwork(SPEC, 4))
    admissions = {  # step: slot, table, seed, index
        0: [(2, "full", 1, 0)],
        3: [(0, "every column", 2, 9)],
        5: [(3, "strided", 3, 2**40)],
        12: [(3, "unclipped", 1, 1)],  # a slot that is done and taken again
        20: [(1, "strided", 9, 4)],
    }
    expected = {}
    for step in range(60):
        for slot, name, seed, index in admissions.get(step, []):
            assert not chain.active[slot]
            start(chain, slot, TABLES[name], seed, index)
            expected[slot] = (name, seed, index)
        if not chain.active.any():
            break
        before = chain.active.copy()
        chain.step()
        for slot in np.flatnonzero(before & ~chain.active):
            name, seed, index = expected.pop(int(slot))
            np.testing.assert_array_equal(x_of(chain, slot), reference_images(TABLES[name], seed, index))
    assert not expected


def test_a_chain_taken_up_again_ends_as_if_it_had_not_stopped(make: Make) -> None:
    """Beside another that goes on, and from a float32 x and x̂0 alone."""
    table = TABLES["every column"]
    chain = make(ArrayNetwork(SPEC, 2))
    start(chain, 0, table, 2, 9)
    for _ in range(5):
        chain.step()
    x, x0 = chain.read(np.array([0]))
    chain.clear()
    start(chain, 0, TABLES["full"], 1, 0)
    chain.step()
    request = Request(table=table, seed=2, first_index=9)
    chain.restore(np.array([1]), request, table, 5, x, x0)
    while chain.active[1]:
        chain.step()
    np.testing.assert_array_equal(x_of(chain, 1), reference_images(table, 2, 9))
    chain.restore(np.array([1]), request, table, len(table), x, x0)
    assert not chain.active[1]
    np.testing.assert_array_equal(x_of(chain, 1), x[0])


def test_idle_slots_keep_their_images(make: Make) -> None:
    chain = make(ArrayNetwork(SPEC, 2))
    start(chain, 0, TABLES["unclipped"], 1, 0)
    start(chain, 1, TABLES["full"], 1, 1)
    for _ in range(5):
        chain.step()
    done = x_of(chain, 0).copy()
    for _ in range(25):
        chain.step()
    np.testing.assert_array_equal(x_of(chain, 0), done)


def test_an_infinite_prediction_does_not_touch_an_idle_slot(make: Make) -> None:
    class Overflowing(ArrayNetwork):
        def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
            """Infinite in slot 0, as half precision may be for an image at the end of its chain."""
            out = super().answer(x, t)
            out[0] = np.inf
            return out

    chain = make(Overflowing(SPEC, 2))
    start(chain, 1, TABLES["full"], 1, 1)
    before = x_of(chain, 0)
    chain.step()
    np.testing.assert_array_equal(x_of(chain, 0), before)


def test_a_slot_that_breaks_is_marked_and_its_neighbours_go_on(make: Make) -> None:
    """Even where x̂0 is clipped, which hides an infinity from whoever looks at the end; and it can be used again."""

    class Breaking(ArrayNetwork):
        breaks = True

        def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
            """Infinite in slot 1 at one step."""
            out = super().answer(x, t)
            if self.breaks and len(out) > 1:
                out[1][t[1] == 20] = np.nan
            return out

    network = Breaking(SPEC, 3)
    chain = make(network)
    chain.start(np.arange(3), Request(table=TABLES["full"], count=3, seed=7))
    for _ in range(30):
        chain.step()
    assert chain.broken(np.arange(3)).tolist() == [False, True, False]
    for slot in (0, 2):
        np.testing.assert_array_equal(x_of(chain, slot), reference_images(TABLES["full"], 7, slot))
    network.breaks = False
    start(chain, 1, TABLES["full"], 7, 1)
    while chain.active.any():
        chain.step()
    assert not chain.broken(np.arange(3)).any()
    np.testing.assert_array_equal(x_of(chain, 1), reference_images(TABLES["full"], 7, 1))


def test_an_infinity_that_is_clipped_away_is_told_and_harms_no_neighbour(make: Make) -> None:
    """Whatever tables were loaded: a term without a coefficient is not there."""

    class Overflowing(ArrayNetwork):
        def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
            """Infinite at one pixel of slot 0."""
            out = super().answer(x, t)
            out[0, 0, 0, 0] = np.inf
            return out

    alone, beside = make(Overflowing(SPEC, 2)), make(Overflowing(SPEC, 2))
    start(beside, 1, TABLES["every column"], 1, 1)
    images = []
    for chain in (alone, beside):
        start(chain, 0, TABLES["full"], 7, 0)
        while chain.active[0]:
            chain.step()
        assert chain.broken(np.arange(2)).tolist() == [True, False]
        images.append(x_of(chain, 0))
    np.testing.assert_array_equal(*images)
    assert np.isfinite(images[0]).all()


def test_what_a_caller_does_wrong_is_told(make: Make) -> None:
    chain = make(GuidedNetwork(GUIDED_SPEC, 4))
    two = Request(count=2, seed=0, table=LEARNED_TABLES["fixed"])
    with pytest.raises(SettingError, match="no slot has steps to go"):
        chain.step()
    for slots in ([1, 1], [1], [0, 1, 2]):
        with pytest.raises(SettingError, match="takes 2 different slots"):
            chain.start(np.array(slots), two)
    chain.start(np.array([0, 2]), two)
    for slots in ([0, 1], [1, 4], [-1, 1]):
        with pytest.raises(SettingError, match=r"only \[1, 3\] are free"):
            chain.start(np.array(slots), two)
    for source, target in ((0, 2), (1, 3), (1, 1)):
        with pytest.raises(SettingError, match="must be in use and slot"):
            chain.move(source, target)

    def noise(draw: int) -> Array:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        chain.start(np.array([1, 3]), two, noise)
    with pytest.raises(ValueError, match="zebra"):  # a request that was not checked
        chain.start(np.array([1, 3]), msgspec.structs.replace(two, labels=("zebra",)))
    assert chain.free.tolist() == [1, 3]
    chain.clear()
    assert not chain._users.any()  # of tables
    guided = Request(seed=0, table=LEARNED_TABLES["fixed"], labels=(1,), guidance=(2.0,))
    chain.start(np.array([3, 1]), guided)
    chain.stop(np.array([1]))  # the partner's guide ends with it
    assert chain.free.tolist() == [0, 1, 2, 3]
    chain.close()
    with pytest.raises(BackendError, match="is closed"):
        chain.start(np.array([0, 1]), two)


def test_a_chain_that_is_stopped_frees_its_slot_alone(make: Make) -> None:
    chain = make(ArrayNetwork(SPEC, 3))
    chain.start(np.arange(3), Request(table=TABLES["full"], count=3, seed=7))
    for _ in range(4):
        chain.step()
    chain.stop(np.array([0, 2]))
    assert chain.free.tolist() == [0, 2]
    stopped = x_of(chain, 2)
    start(chain, 0, TABLES["every column"], 2, 9)
    while chain.active.any():
        chain.step()
    np.testing.assert_array_equal(x_of(chain, 2), stopped)
    np.testing.assert_array_equal(x_of(chain, 1), reference_images(TABLES["full"], 7, 1))
    np.testing.assert_array_equal(x_of(chain, 0), reference_images(TABLES["every column"], 2, 9))


def test_slots_move_into_holes(make: Make) -> None:
    """Between any two steps, with what they have seen and the noise that was made for them ahead."""
    chain = make(ArrayNetwork(SPEC, 5))
    names = ["strided", "full", "unclipped", "every column", "full"]
    for slot, name in enumerate(names):
        start(chain, slot, TABLES[name], 7, slot)
    place = dict(enumerate(range(5)))  # sample: slot
    while chain.active.any():
        chain.step()
        for sample, slot in list(place.items()):
            if not chain.active[slot]:
                wanted = reference_images(TABLES[names[sample]], 7, sample)
                np.testing.assert_array_equal(x_of(chain, place.pop(sample)), wanted)
        moved = chain.compact()
        place = {sample: moved.get(slot, slot) for sample, slot in place.items()}
        used = np.flatnonzero(chain.active)
        assert used.tolist() == sorted(place.values()) == list(range(len(used)))
    assert not place


def test_tables_leave_with_their_last_slot(make: Make) -> None:
    """More of them than there is room for, one after another; at once, that is told."""
    chain = make(ArrayNetwork(SPEC, 40))
    tables = [ddpm(SCHEDULE, spaced("leading", SCHEDULE, 1 + i % 30)) for i in range(90)]
    room = len(chain._tables)
    for first in range(0, 90, 30):
        for slot in range(30):
            start(chain, slot, tables[first + slot], 1, 0)
        chain.step()
        chain.clear()
    start(chain, 0, TABLES["full"], 1, 0)
    while chain.active.any():
        chain.step()
    np.testing.assert_array_equal(x_of(chain, 0), reference_images(TABLES["full"], 1, 0))
    assert room == 40
    small = make(ArrayNetwork(SPEC, 40))
    small._tables, small._users = small._tables[:2], small._users[:2]
    for slot in range(2):
        start(small, slot, tables[slot], 1, 0)
    with pytest.raises(SettingError, match="too many different tables are in use at once"):
        start(small, 2, tables[2], 1, 0)
    start(small, 2, tables[1], 1, 0)


def test_x0_is_the_clipped_estimate_of_the_last_step(make: Make) -> None:
    """From x before it and the prediction, which a step leaves as the network made it."""
    chain = make(LearnedNetwork(LEARNED_SPEC, 2))
    slots = np.arange(2)
    chain.start(slots, Request(table=LEARNED_TABLES["learned"], count=2, seed=1))
    x = chain.images(slots)
    chain.step()
    prediction = chain.network.device.fetch(chain.network.memory["prediction"][:2])
    wanted = LearnedNetwork(LEARNED_SPEC, 2).answer(x, np.array([29, 29]))
    np.testing.assert_array_equal(prediction, wanted)
    row = dict(zip(COLUMNS, LEARNED_TABLES["learned"].float32_rows()[0], strict=True))
    _, x0 = chain.read(slots)
    np.testing.assert_array_equal(x0, np.clip(row["a"] * x + row["b"] * prediction[:, :3], -1, 1))


GUIDED_SPEC = msgspec.structs.replace(LEARNED_SPEC, num_classes=3, null_class=True)


class GuidedNetwork(LearnedNetwork):
    """One that knows labels; every row of it says something else."""

    def predict(self, batch: int) -> None:
        """As ever, and the label."""
        super().predict(batch)
        label = self.memory["y"][:batch].astype(np.float32)[:, None, None, None]
        self.memory["prediction"][:batch, :3] += label * np.float32(0.125)


def guided_image(index: int, scale: float, label: int, table: StepTable) -> Array:
    """By reference.py: the blend of two predictions."""
    network, channels = GuidedNetwork(GUIDED_SPEC, 2), 3

    def predict(x: Array, t: int) -> Array:
        network.memory["x"][:], network.memory["temb"][:] = x, GUIDED_SPEC.embedding.table(30)[t]
        network.memory["y"][:] = [label, 3]
        network.predict(2)
        with_label, without = network.memory["prediction"]
        out = (with_label[:channels] - without[:channels]) * np.float32(scale) + without[:channels]
        return np.concatenate([out, with_label[channels:]])

    *_, last = reference.chain(predict, table, GUIDED_SPEC.image_shape, 7, index)
    return last


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4, 5], [5, 0, 3, 2, 6, 1], [2, 4, 6, 1, 3, 5]])
def test_guided_and_plain_samples_share_a_chain(make: Make, slots: list[int]) -> None:
    """Any two slots are a pair, and they may move."""
    chain = make(GuidedNetwork(GUIDED_SPEC, 7))
    table, plain = LEARNED_TABLES["learned"], LEARNED_TABLES["fixed"]
    request = Request(table=table, count=3, seed=7, labels=(2, 0, 1), guidance=(3.0, 1.0, -0.5))
    (other,) = set(range(7)) - set(slots)
    chain.start(np.array([other]), Request(table=plain, seed=7, first_index=9, labels=(1,)))
    chain.step()
    chain.start(np.array(slots), request)
    assert len(chain.free) == 0
    place = np.array(slots[:3])
    for _ in range(6):
        chain.step()
    np.testing.assert_array_equal(x_of(chain, other), guided_image(9, 1.0, 1, plain))
    moved = chain.compact()
    place = np.array([moved.get(slot, slot) for slot in place.tolist()])
    assert chain.free.tolist() == [6]
    while chain.active.any():
        chain.step()
    images = chain.images(place)
    for index, scale, label in ((0, 3.0, 2), (1, 1.0, 0), (2, -0.5, 1)):
        np.testing.assert_array_equal(images[index], guided_image(index, scale, label, table))
    assert len(chain.free) == 7


def test_a_callers_noise_runs_beside_addressed_noise(make: Make) -> None:
    """In any slots, of chains that started at different steps, one of them stopped on the way."""
    table = TABLES["full"]
    draws = {draw: reference_noise(draw) for draw in range(31)}
    asked: list[int] = []

    def noise(draw: int) -> Array:
        asked.append(draw)
        return draws[draw]

    chain = make(ArrayNetwork(SPEC, 4))
    start(chain, 1, table, 7, 5)
    chain.step()
    chain.start(np.array([3, 0]), Request(table=table, count=2, seed=0), noise)
    for _ in range(10):
        chain.step()
    chain.stop(np.array([3]))
    start(chain, 3, table, 8, 1)
    while chain.active.any():
        chain.step()
    assert asked == [0, *range(30, 1, -1)]  # the last step adds none
    np.testing.assert_array_equal(x_of(chain, 1), reference_images(table, 7, 5))
    np.testing.assert_array_equal(x_of(chain, 3), reference_images(table, 8, 1))
    np.testing.assert_array_equal(x_of(chain, 0), reference_images(table, 50, 1))


def reference_noise(draw: int) -> Array:
    """That of samples 0 and 1 of seed 50."""
    return np.stack([reference.normal(50, index, draw, SPEC.image_shape) for index in range(2)])


def test_a_step_allocates_less_than_an_image() -> None:
    spec = tiny_spec((3, 64, 64))
    image_bytes = 3 * 64 * 64 * 4

    class Still(ArrayNetwork):
        def predict(self, batch: int) -> None:
            """Predict zero, without allocating."""

    chain = Chain(Still(spec, 2))
    table = ddpm(spec.make_schedule(), spaced("leading", spec.make_schedule(), 1000))
    chain.start(np.arange(2), Request(table=table, count=2, seed=0))
    chain.step()
    tracemalloc.start()
    try:
        for _ in range(3):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            chain.step()
            assert tracemalloc.get_traced_memory()[1] - before < image_bytes
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            chain.step()
        assert tracemalloc.get_traced_memory()[0] - before < 1_000_000
    finally:
        tracemalloc.stop()
