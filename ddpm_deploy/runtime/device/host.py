"""The host as a device, and its stepper: the update of `solvers` in NumPy, float32, in memory allocated once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.exponential import Exponential
from ddpm_deploy.noise import AddressedNoise
from ddpm_deploy.runtime.protocols import IDLE, Array, Look, Network, Slots, runs_of
from ddpm_deploy.solvers import (
    COLUMNS,
    HI,
    IDENTITY,
    LN_VAR_MAX,
    LN_VAR_MIN,
    LO,
    A,
    B,
    C,
    D,
    E,
    F,
    G,
    T,
    learns_variance,
)

# What the host adds to a row: w = v·QUARTER + BASE is the exponent of a learned variance, where LEARNS is not 0.
QUARTER, BASE, LEARNS = range(len(COLUMNS), len(COLUMNS) + 3)
_QUARTER, _HALF = np.array([0.25, 0.5], np.float32)
# An array without axes: NumPy would convert a number anew at every call.
_ZERO: Final = np.array(0.0, np.float32)
_LOOK_AHEAD: Final = 16  # steps whose rows are looked up at once


class Host:
    """The host's memory: NumPy arrays; work is done when it returns. Follows `protocols.Device`."""

    is_host = True
    lag = 0

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array; the system gives memory only where it is used."""
        return np.zeros(shape, dtype)

    def address(self, memory: NDArray[Any]) -> int:
        """Where it starts."""
        return memory.ctypes.data

    def upload(self, host: NDArray[Any], memory: NDArray[Any]) -> None:
        """Copy."""
        np.copyto(memory, host)

    def fetch(self, memory: NDArray[Any]) -> NDArray[Any]:
        """A copy."""
        return memory.copy()

    def start(self, work: Callable[[], None]) -> None:
        """Call it."""
        work()

    def synchronize(self) -> None:
        """Everything is done."""

    def release(self) -> None:
        """NumPy keeps nothing back."""

    def stepper(self, network: Network, rows: int) -> "HostStepper":
        """The update in NumPy."""
        return HostStepper(network, rows)


class NoiseAhead:
    """The noise of each slot for its next steps, made some steps at once: a start or a stop costs the others nothing.

    A caller's noise takes the place of a slot's own for one step. As long as the same slots ask, a step is a view.
    """

    def __init__(self, slots: int, elements: int) -> None:
        self._noise = AddressedNoise(slots, elements)
        self._steps, self._elements = self._noise.lookahead, elements
        # By step and slot, so that a step's noise of neighbours is one piece of memory.
        self._ahead = np.empty((self._steps, slots, self._noise.width), np.float32)
        self._made = np.empty((self._steps * slots, self._noise.width), np.float32)  # by slot and step
        self._left = np.zeros(slots, np.int64)  # steps whose noise is made and not used
        self._gathered = np.empty((slots, self._noise.width), np.float32)
        # The slots that asked last, the place of their noise at that time, whether it is one place for neighbours, how
        # many steps of it there were, and how many were taken since: these are not in `_left` yet.
        self._slots, self._place = np.empty(0, np.intp), np.empty(0, np.int64)
        self._together, self._ready, self._taken = False, 0, 0

    def _settle(self) -> None:
        self._left[self._slots] -= self._taken
        self._slots, self._ready, self._taken = self._slots[:0], 0, 0

    def assign(
        self,
        slots: Slots,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        share_until: NDArray[np.int32],
    ) -> None:
        """Say whose noise slots make from now on."""
        self._settle()
        done = 0
        for run in runs_of(slots):
            part = slice(done, done + run.stop - run.start)
            self._noise.assign(run, seeds[part], indices[part], share_until[part])
            done = part.stop
        self._left[slots] = 0

    def give(self, slots: Slots, noise: Array) -> None:
        """Use this noise, (k, elements), for the next step."""
        self._settle()
        self._ahead[-1, slots, : self._elements] = noise
        self._left[slots] = 1

    def move(self, source: int, target: int) -> None:
        """Let a slot have what another has."""
        self._settle()
        self._noise.move(source, target)
        self._ahead[:, target], self._left[target] = self._ahead[:, source], self._left[source]

    def skip(self, slots: Slots) -> None:
        """Take a step without noise."""
        if slots is self._slots and self._taken < self._ready:
            self._taken += 1
            return
        self._settle()
        left = self._left[slots]
        self._left[slots] = left - (left > 0)

    def take(self, slots: Slots, draws: Callable[[slice, int], NDArray[np.int64]], steps: int) -> Array:
        """The noise of slots for their next step, (k, elements): memory that the next call reuses.

        draws(run, steps): the numbers of the next draws of a run of slots, (k, steps). steps: that all of them are to
        take, this one among them; for no more is noise made.
        """
        if slots is not self._slots or self._taken == self._ready:
            self._make_ready(slots, draws, min(steps, self._noise.window(len(slots))))
        step, self._taken = self._taken, self._taken + 1
        if self._together:
            first = slots[0]
            return self._ahead[self._place[0] + step, first : first + len(slots), : self._elements]
        _, every, width = self._ahead.shape
        ahead, gathered = self._ahead.reshape(-1, width), self._gathered[: len(slots)]
        np.take(ahead, (self._place + step) * every + slots, axis=0, out=gathered, mode="clip")
        return gathered[:, : self._elements]

    def _make_ready(self, slots: Slots, draws: Callable[[slice, int], NDArray[np.int64]], steps: int) -> None:
        """Make the noise of those that have none left, for the last of the places that there are."""
        self._settle()
        left = self._left[slots]
        for run in runs_of(slots[left == 0]):
            count = run.stop - run.start
            made = self._made[: count * steps].reshape(count, steps, -1)
            self._noise.fill(run, draws(run, steps), made)
            self._ahead[self._steps - steps :, run] = made.swapaxes(0, 1)
        left[left == 0] = steps
        self._left[slots] = left
        self._slots, self._place, self._ready = slots, self._steps - left, int(left.min())
        neighbours = int(slots[-1] - slots[0]) == len(slots) - 1
        self._together = neighbours and bool((left == left[0]).all())


@dataclass
class _Plan:
    """The slots that take the next step, as long as none starts, stops, ends or moves.

    runs: their runs of neighbours, each with its part of arrays that hold these slots alone. pairs: the same of the
    guided ones, each with the slots of its partners. scale: of each guided one, (slots, 1). steps: until the first of
    them ends. taken: steps since then, which the stepper's own row pointers do not know yet.
    x, x0, out: of these slots, (slots, C·H·W): the memory itself, or where `gathers`, memory of the stepper's for what
    lies apart or is blended.
    rows, temb, noisy, learns: of the next _LOOK_AHEAD steps from `since` on, looked up at once: (columns, slots, 1)
    each, or (columns,) where all slots are at the same row; (steps, slots, D), whether a step has noise, and whether
    every slot's variance is learned in it.
    """

    slots: Slots
    runs: list[tuple[slice, slice]]
    pairs: list[tuple[slice, slice]]
    scale: Array
    steps: int
    x: Array
    x0: Array
    out: Array
    gathers: bool
    taken: int = 0
    since: int = 0
    rows: list[Array] = field(default_factory=list)
    temb: Array = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))
    noisy: list[bool] = field(default_factory=list)
    learns: list[bool] = field(default_factory=list)


class HostStepper:
    """Follows `protocols.Stepper`. What a table does not use (x̂0 of the step before, the raw prediction, a learned
    variance) is not computed while no table has used it."""

    def __init__(self, network: Network, rows: int) -> None:
        slots = network.max_batch
        self._network = network
        self._memory = network.memory
        self._x, self._prediction = _flat(network.memory["x"]), _flat(network.memory["prediction"])
        self._temb = network.memory["temb"]
        elements = self._x.shape[1]
        self._embedding = network.spec.embedding.table(network.spec.timesteps)
        self._rows = np.zeros((rows, len(COLUMNS) + 3), np.float32)
        self._rows[0, : len(COLUMNS)] = IDENTITY
        self._row, self._end = np.full(slots, IDLE), np.full(slots, IDLE)
        self._partner, self._scale = np.full(slots, -1), np.ones((slots, 1), np.float32)
        self._ahead = NoiseAhead(slots, elements)
        # The rows and embeddings of the plan's slots, for some steps.
        self._rows_ahead = np.empty(_LOOK_AHEAD * slots * self._rows.shape[1], np.float32)
        self._temb_ahead = np.empty(_LOOK_AHEAD * self._temb[:slots].size, np.float32)
        self._x0 = np.zeros((slots, elements), np.float32)
        # The sum of 0·x̂0 over a chain, before an infinity is clipped away: 0, or NaN where one was not finite.
        self._doubt = np.zeros((slots, elements), np.float32)
        # Arrays that hold the plan's slots alone, where they are not neighbours, and what terms are computed in.
        self._gathered = np.empty((4, slots, elements), np.float32)
        self._scratch = np.empty((slots, elements), np.float32)
        self._previous = np.empty((slots, elements), np.float32)
        self._uses_previous = self._uses_prediction = False
        self._exponential: Exponential | None = None
        self._plan: _Plan | None = None

    def put_rows(self, first: int, rows: Array) -> None:
        """Write rows of a step table."""
        place = self._rows[first : first + len(rows)]
        place[:, : len(COLUMNS)] = rows
        place[:, QUARTER] = (rows[:, LN_VAR_MAX] - rows[:, LN_VAR_MIN]) * _QUARTER
        place[:, BASE] = place[:, QUARTER] + rows[:, LN_VAR_MIN] * _HALF
        place[:, LEARNS] = learns_variance(rows)
        self._uses_previous |= bool(rows[:, F].any())
        self._uses_prediction |= bool(rows[:, G].any())
        if place[:, LEARNS].any() and not self._exponential:
            self._settle()  # a plan has not looked up what is of a learned variance
            self._exponential = Exponential(*self._x0.shape)

    def assign(self, slots: Slots, records: NDArray[np.void]) -> None:
        """Say what slots run from now on."""
        self._settle()
        self._row[slots], self._end[slots] = records["row"], records["end"]
        self._partner[slots], self._scale[slots, 0] = records["partner"], records["scale"]
        self._doubt[slots] = 0
        self._ahead.assign(slots, records["seed"], records["index"], records["share_until"])

    def begin(self, slots: Slots, noise: Array | None) -> None:
        """x_T is written, not computed by the START row: 0·NaN would keep a slot broken that once was."""
        self._settle()
        if noise is None:
            noise = self._ahead.take(slots, self._draws, int((self._end[slots] - self._row[slots]).min()))
        self._x0[slots] = 0
        self._set(slots, noise)
        self._row[slots] += 1

    def resume(self, slots: Slots, x: Array, x0: Array) -> None:
        """Set x and the last x̂0."""
        self._x0[slots] = _flat(x0)
        self._set(slots, x)

    def _set(self, slots: Slots, x: Array) -> None:
        """Set x, of the partners too."""
        self._settle()
        self._x[slots] = _flat(x)
        guided = slots[self._partner[slots] >= 0]
        self._x[self._partner[guided]] = self._x[guided]

    def give(self, slots: Slots, noise: Array) -> None:
        """The noise of a caller's for the next step."""
        self._ahead.give(slots, _flat(noise))

    def pair(self, guide: int, partner: int) -> None:
        """Say which slot has the unconditional row of a guided one."""
        self._settle()
        self._partner[guide] = partner

    def move(self, source: int, target: int) -> None:
        """Let a slot take another's place."""
        self._settle()
        inputs = [self._memory[tensor.name] for tensor in self._network.spec.inputs]
        rows = self._x0, self._doubt, self._row, self._end, self._partner, self._scale
        for array in (*inputs, *rows):
            array[target] = array[source]
        self._ahead.move(source, target)
        self._row[source] = IDLE

    def _settle(self) -> None:
        """Drop the plan: its steps into the row pointers, and slots that have ended to rest."""
        plan, self._plan = self._plan, None
        if plan:
            row = self._row[plan.slots] + plan.taken
            self._row[plan.slots] = np.where(row == self._end[plan.slots], IDLE, row)

    def step(self, bucket: int) -> None:
        """The network, then the update."""
        plan = self._plan or self._planned()
        # Of a slot that is broken `broken` tells. Entered before the network, which leaves the caches to nobody.
        with np.errstate(invalid="ignore", over="ignore"):
            self._network.enqueue(bucket)
            self._update(plan)
        plan.taken += 1
        if plan.taken == plan.steps:
            self._settle()
        else:
            self._show(plan)

    def _planned(self) -> _Plan:
        """Which slots take the next step; their rows are looked up."""
        slots = np.flatnonzero(self._row != IDLE)
        guided = np.flatnonzero(self._partner[slots] >= 0)
        partners = self._partner[slots[guided]]
        steps = int((self._end[slots] - self._row[slots]).min())
        runs, pairs = _pairs(np.arange(len(slots)), slots), _pairs(guided, partners)
        x, x0, out = self._gathered[:3, : len(slots)]
        gathers = len(runs) > 1 or bool(pairs)
        if len(runs) == 1:
            x, x0 = self._x[runs[0][1]], self._x0[runs[0][1]]
        if not gathers:
            out = self._prediction[runs[0][1], : self._x.shape[1]]
        self._plan = _Plan(slots, runs, pairs, self._scale[slots], steps, x, x0, out, gathers)
        self._look_ahead(self._plan)
        self._show(self._plan)
        return self._plan

    def _look_ahead(self, plan: _Plan) -> None:
        """Look up the rows of the next steps and the embeddings of their timesteps; past an end they are not used."""
        count = len(plan.slots)
        rows = self._row[plan.slots] + plan.taken + np.arange(_LOOK_AHEAD)[:, None]
        plan.since = plan.taken
        found = self._rows_ahead[: rows.size * self._rows.shape[1]].reshape(_LOOK_AHEAD, count, -1)
        plan.temb = self._temb_ahead[: rows.size * self._temb.shape[1]].reshape(_LOOK_AHEAD, count, -1)
        # mode="clip" writes straight into `out`.
        np.take(self._rows, rows, axis=0, out=found, mode="clip")
        np.take(self._embedding, found[..., T].astype(np.intp), axis=0, out=plan.temb, mode="clip")
        # Slots that are at one row, as those are that started together, need no axis of slots, which is quicker.
        together = len(set(rows[0].tolist())) == 1
        plan.rows = list(found[:, 0] if together else found.transpose(0, 2, 1)[..., None])
        plan.noisy = [any(column) for column in found[..., E].tolist()]
        if self._exponential:
            plan.learns = [all(column) for column in found[..., LEARNS].tolist()]

    def _show(self, plan: _Plan) -> None:
        """Write the embedding of each slot's next timestep, for its partner too."""
        if plan.taken - plan.since == _LOOK_AHEAD:
            self._look_ahead(plan)
        temb = plan.temb[plan.taken - plan.since]
        for part, slots in (*plan.runs, *plan.pairs):
            self._temb[slots] = temb[part]

    def _update(self, plan: _Plan) -> None:
        """x ← x', x̂0, of the plan's slots, by the rows that were looked up."""
        count = len(plan.slots)
        now = plan.taken - plan.since
        row = plan.rows[now]  # (columns, k, 1) or (columns,): row[A, ...] is an array either way
        x, x0, out = plan.x, plan.x0, plan.out
        scratch, previous = self._scratch[:count], self._previous[:count]
        if plan.gathers:
            self._gather(plan)
        if self._uses_previous:  # before x̂0 takes its place
            _times(x0, row[F, ...], previous)

        np.multiply(x, row[A, ...], x0)
        np.multiply(out, row[B, ...], scratch)
        np.add(x0, scratch, x0)
        np.multiply(x0, _ZERO, scratch)
        for part, slots in plan.runs:
            np.add(self._doubt[slots], scratch[part], self._doubt[slots])
        np.maximum(x0, row[LO, ...], out=x0)
        np.minimum(x0, row[HI, ...], out=x0)

        np.multiply(x, row[D, ...], x)
        np.multiply(x0, row[C, ...], scratch)
        np.add(x, scratch, x)
        if plan.noisy[now]:
            noise = self._ahead.take(plan.slots, self._draws, plan.steps - plan.taken)
            np.multiply(noise, row[E, ...], scratch)
            if self._exponential:
                np.multiply(scratch, self._deviation(plan, row), scratch)
            np.add(x, scratch, x)
        else:
            self._ahead.skip(plan.slots)
        if self._uses_previous:
            np.add(x, previous, x)
        if self._uses_prediction:
            _times(out, row[G, ...], scratch)
            np.add(x, scratch, x)
        # -0 becomes +0, so that a term with a zero coefficient may as well not be computed.
        np.add(x, _ZERO, x)
        if len(plan.runs) > 1:
            for part, slots in plan.runs:
                self._x[slots], self._x0[slots] = x[part], x0[part]
        for part, slots in plan.pairs:
            self._x[slots] = x[part]

    def _gather(self, plan: _Plan) -> None:
        """Copy what of the plan's slots lies apart, and blend what the network predicts for those that are guided:
        out(none) + scale·(out(y) - out(none)) (Ho & Salimans 2022)."""
        prediction = self._prediction[:, : self._x.shape[1]]
        for part, slots in plan.runs:
            plan.out[part] = prediction[slots]
            if len(plan.runs) > 1:
                plan.x[part], plan.x0[part] = self._x[slots], self._x0[slots]
        for part, partners in plan.pairs:
            out, without = plan.out[part], prediction[partners]
            np.subtract(out, without, out)
            np.multiply(out, plan.scale[part], out)
            np.add(out, without, out)

    def _deviation(self, plan: _Plan, row: Array) -> Array:
        """s of the rule, (k, C·H·W), in memory of its own."""
        assert self._exponential
        w, learned = self._gathered[3, : len(plan.slots)], self._prediction[:, self._x.shape[1] :]
        v = learned[plan.runs[0][1]] if len(plan.runs) == 1 else w
        if v is w:
            for part, slots in plan.runs:
                w[part] = learned[slots]
        np.multiply(v, row[QUARTER, ...], w)
        np.add(w, row[BASE, ...], w)
        if not plan.learns[plan.taken - plan.since]:
            _clear(w, row[LEARNS, ...])  # whatever v was: 0 times an infinity would be NaN
        self._exponential.apply(w)
        return w

    def _draws(self, run: slice, steps: int) -> NDArray[np.int64]:
        """The draws of a run of slots from their next step on: t + 1. Past a chain's end they are never used."""
        taken = self._plan.taken if self._plan else 0
        rows = self._row[run, None] + taken + np.arange(steps)
        timesteps: NDArray[np.float32] = self._rows[:, T].take(rows, mode="clip")
        return timesteps.astype(np.int64) + 1

    def broken(self, slots: Slots) -> NDArray[np.bool_]:
        """Which slots had numbers that were not finite: one in x stays so in all steps to come."""
        broken: NDArray[np.bool_] = ~np.isfinite(self._doubt[slots] + self._x[slots]).all(axis=1)
        return broken

    def x(self, part: slice) -> Array:
        """A copy."""
        x, _ = self.watch(part)()
        return x.copy()

    def x0(self, part: slice) -> Array:
        """A copy."""
        _, x0 = self.watch(part)()
        return x0.copy()

    def watch(self, part: slice) -> Look:
        """Views of x and x̂0."""
        x: Array = self._memory["x"]
        return lambda: (x[part], self._x0.reshape(-1, *x.shape[1:])[part])

    def close(self) -> None:
        """Nothing to free."""


def _times(values: Array, coefficient: Array, out: Array) -> None:
    """out ← values·coefficient, (k, 1) or of all; zero makes zero, also of an infinity, as if no term were there."""
    np.multiply(values, coefficient, out)
    if not coefficient.all():
        _clear(out, coefficient)


def _clear(values: Array, coefficient: Array) -> None:
    """Make the rows of values zero whose coefficient, (k, 1) or of all, is zero."""
    values[np.broadcast_to(coefficient == 0, (len(values), 1))[:, 0]] = 0


def _flat(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _pairs(places: Slots, slots: Slots) -> list[tuple[slice, slice]]:
    """Places in one array and slots in another, as pairs of slices: one for each stretch where both have neighbours."""
    if not len(places):
        return []
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(slots) != 1)) + 1
    ends = [*breaks.tolist(), len(places)]
    return [
        (slice(int(places[a]), int(places[b - 1]) + 1), slice(int(slots[a]), int(slots[b - 1]) + 1))
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
