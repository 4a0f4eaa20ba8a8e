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
from ddpm_deploy.errors import SettingError
from ddpm_deploy.exponential import Exponential
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.denoiser import Array
from ddpm_deploy.runtime.device_chain import DeviceChain
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.solvers import COLUMNS, StepTable, ddpm
from ddpm_deploy.spacings import spaced
from tests.host_device import HostDevice, HostNetwork
from tests.models import ArrayDenoiser, tiny_spec

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
    "full": ddpm(SCHEDULE, spaced("leading", 30, 30)),
    "strided": ddpm(SCHEDULE, spaced("leading", 30, 7), variance="fixed_small"),
    "unclipped": ddpm(SCHEDULE, spaced("leading", 30, 5), clip=None),
    "every column": every_column_table(0, 12),
}


LEARNED_SPEC = msgspec.structs.replace(SPEC, variance="learned_range")
LEARNED_TABLES = {
    "learned": ddpm(SCHEDULE, spaced("leading", 30, 30), variance="learned_range"),
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
    "fixed": ddpm(SCHEDULE, spaced("leading", 30, 7)),
}


class LearnedDenoiser(ArrayDenoiser):
    """One that says a variance as well."""

    def predict(self, x: Array, t: NDArray[np.int64]) -> Array:
        """As any, and v within [-1.2, 1.2]."""
        out = super().predict(x, t)
        return np.concatenate([out, np.float32(1.2) * np.clip(np.roll(out, 2, axis=2), -1, 1)], axis=1)


def reference_images(
    table: StepTable, seed: int, index: int, denoiser: ArrayDenoiser | None = None
) -> NDArray[np.float32]:
    denoiser = denoiser or ArrayDenoiser(SPEC, 1)
    *_, last = reference.chain(
        lambda x, t: denoiser.predict(x[None], np.array([t]))[0], table, SPEC.image_shape, seed, index
    )
    return last


Make = Callable[[ArrayDenoiser], Chain | DeviceChain]


@pytest.fixture(params=["host", "device"])
def make(request: pytest.FixtureRequest) -> Make:
    """The chain of a Denoiser."""
    if request.param == "host":
        return Chain
    return lambda denoiser: DeviceChain(HostNetwork(denoiser, HostDevice(seed=1)))


def start(chain: Chain | DeviceChain, slot: int, table: StepTable, seed: int, index: int) -> None:
    chain.start(slice(slot, slot + 1), table, np.array([seed], np.uint64), np.array([index], np.uint64))


@pytest.mark.parametrize("name", TABLES)
def test_batch_equals_the_reference_bit_for_bit(make: Make, name: str) -> None:
    table = TABLES[name]
    chain = make(ArrayDenoiser(SPEC, 3))
    chain.start(slice(0, 3), table, np.full(3, 7, np.uint64), np.arange(5, 8, dtype=np.uint64))
    for _ in range(len(table)):
        chain.step()
    assert not chain.active.any()
    for slot in range(3):
        np.testing.assert_array_equal(
            chain.x[slot].view(np.uint32), reference_images(table, 7, 5 + slot).view(np.uint32)
        )


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", LEARNED_TABLES)
def test_a_learned_variance_equals_the_reference_bit_for_bit(make: Make, name: str, alone: bool) -> None:
    """By itself, and beside other tables, so that rows with and without one share a step."""
    chain = make(LearnedDenoiser(LEARNED_SPEC, 3))
    start(chain, 1, LEARNED_TABLES[name], 7, 5)
    if not alone:
        start(chain, 0, LEARNED_TABLES["learned"], 8, 0)
        start(chain, 2, LEARNED_TABLES["fixed"], 8, 1)
    while chain.active[1]:
        chain.step()
    wanted = reference_images(LEARNED_TABLES[name], 7, 5, LearnedDenoiser(LEARNED_SPEC, 1))
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(chain.x[1].view(np.uint32), wanted.view(np.uint32))


def test_an_infinite_v_does_not_touch_a_slot_of_fixed_variance(make: Make) -> None:
    class Overflowing(LearnedDenoiser):
        def predict(self, x: Array, t: NDArray[np.int64]) -> Array:
            """As ever, but for v in slot 0."""
            both = super().predict(x, t)
            both[0, 3:] = np.inf
            return both

    chain = make(Overflowing(LEARNED_SPEC, 2))
    start(chain, 0, LEARNED_TABLES["fixed"], 7, 5)
    start(chain, 1, LEARNED_TABLES["learned"], 8, 0)
    while chain.active[0]:
        chain.step()
    wanted = reference_images(LEARNED_TABLES["fixed"], 7, 5, LearnedDenoiser(LEARNED_SPEC, 1))
    np.testing.assert_array_equal(chain.x[0].view(np.uint32), wanted.view(np.uint32))


def test_a_learned_variance_needs_a_model_that_has_one(make: Make) -> None:
    with pytest.raises(SettingError, match="needs a learned variance, and the model has none"):
        start(make(ArrayDenoiser(SPEC, 1)), 0, LEARNED_TABLES["learned"], 1, 0)


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
    chain = make(ArrayDenoiser(SPEC, 4))
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
            np.testing.assert_array_equal(chain.x[slot], reference_images(TABLES[name], seed, index))
    assert not expected


def test_a_chain_taken_up_again_ends_as_if_it_had_not_stopped(make: Make) -> None:
    """Beside another that goes on, and from a float32 x and x̂0 alone."""
    table = TABLES["every column"]
    chain = make(ArrayDenoiser(SPEC, 2))
    start(chain, 0, table, 2, 9)
    for _ in range(5):
        chain.step()
    x, x0 = chain.x[:1].copy(), chain.x0[:1].copy()
    chain.clear()
    start(chain, 0, TABLES["full"], 1, 0)
    chain.step()
    address = np.array([2], np.uint64), np.array([9], np.uint64)
    chain.restore(slice(1, 2), table, 5, x, x0, *address)
    while chain.active[1]:
        chain.step()
    np.testing.assert_array_equal(chain.x[1], reference_images(table, 2, 9))
    chain.restore(slice(1, 2), table, len(table), x, x0, *address)
    assert not chain.active[1]
    np.testing.assert_array_equal(chain.x[1], x[0])


def test_idle_slots_keep_their_images(make: Make) -> None:
    chain = make(ArrayDenoiser(SPEC, 2))
    start(chain, 0, TABLES["unclipped"], 1, 0)
    start(chain, 1, TABLES["full"], 1, 1)
    for _ in range(5):
        chain.step()
    done = chain.x[0].copy()
    for _ in range(25):
        chain.step()
    np.testing.assert_array_equal(chain.x[0], done)


def test_an_infinite_prediction_does_not_touch_an_idle_slot() -> None:
    class Overflowing(ArrayDenoiser):
        def run(self, batch: int) -> None:
            """Infinite in slot 0, as half precision may be for an image at the end of its chain."""
            super().run(batch)
            self.prediction[0] = np.inf

    chain = Chain(Overflowing(SPEC, 2))
    start(chain, 1, TABLES["full"], 1, 1)
    chain.x[0] = 0.5
    chain.step()
    assert (chain.x[0] == 0.5).all()


def test_tables_of_finished_chains_are_dropped() -> None:
    chain = Chain(ArrayDenoiser(SPEC, 1))
    tables = [ddpm(SCHEDULE, spaced("leading", 30, 1 + i % 30)) for i in range(90)]
    for table in tables:
        start(chain, 0, table, 1, 0)
        chain.step()
        chain.clear()
    assert len(chain._rows) <= 33 * 31
    start(chain, 0, TABLES["full"], 1, 0)
    while chain.active.any():
        chain.step()
    np.testing.assert_array_equal(chain.x[0], reference_images(TABLES["full"], 1, 0))


def test_x0_is_the_clipped_estimate_of_the_last_step() -> None:
    chain = Chain(ArrayDenoiser(SPEC, 1))
    start(chain, 0, TABLES["full"], 1, 0)
    x = chain.x.copy()
    batch = chain.predict()
    out = chain.denoiser.prediction.copy()
    chain.update(batch)
    row = dict(zip(COLUMNS, TABLES["full"].float32_rows()[0], strict=True))
    np.testing.assert_array_equal(chain.x0, np.clip(row["a"] * x + row["b"] * out, -1, 1))


def test_a_step_allocates_less_than_an_image() -> None:
    spec = tiny_spec((3, 64, 64))
    image_bytes = 3 * 64 * 64 * 4

    class Still(ArrayDenoiser):
        def run(self, batch: int) -> None:
            """Predict zero, without allocating."""

    chain = Chain(Still(spec, 2))
    table = ddpm(spec.make_schedule(), spaced("leading", 1000, 1000))
    chain.start(slice(0, 2), table, np.zeros(2, np.uint64), np.arange(2, dtype=np.uint64))
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
