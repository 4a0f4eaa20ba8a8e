"""Slots and the loop: each row of the batch is a reverse Markov chain of its own.

A slot has a row pointer into a step table, a seed and a sample index. Slots that started together are a
batch; a service may start any slot that is done at any step.
"""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError
from ddpm_deploy.exponential import Exponential
from ddpm_deploy.noise import AddressedNoise
from ddpm_deploy.runtime.denoiser import Array, Denoiser, Labels
from ddpm_deploy.solvers import COLUMNS, IDENTITY, StepTable, learns_variance
from ddpm_deploy.spec import ModelSpec

T, A, B, LO, HI, C, D, E, F, G, LN_VAR_MIN, LN_VAR_MAX = range(len(COLUMNS))
_ZERO, _QUARTER, _HALF = np.array([0.0, 0.25, 0.5], np.float32)
_MAX_TABLES: Final = 32  # kept before those of finished chains are dropped
IDLE: Final = 0  # the row pointer of a slot with nothing to do


class NoiseSource(Protocol):
    """Where x_T and z come from: `noise.AddressedNoise`, or a peer's own noise.

    lookahead: steps whose noise the chain may ask for at once.
    """

    lookahead: int

    def assign(self, slots: slice, seeds: NDArray[np.uint64], indices: NDArray[np.uint64]) -> None:
        """Say whose noise these slots make from now on."""

    def fill(self, draws: NDArray[np.int64]) -> Array:
        """Give the leading slots their noise: draws (K, B) → (K, B, C·H·W). Overwritten by the next call."""


class Chain:
    """The reverse chains in the slots of a Denoiser's batch, one step of all of them at a time.

    A step is the network on the leading slots in use, then the update of `solvers` in float32, in
    memory allocated here once.
    """

    lag: Final = 0  # steps by which what is watched may be behind

    def __init__(self, denoiser: Denoiser, noise: NoiseSource | None = None) -> None:
        spec, slots = denoiser.spec, denoiser.max_batch
        elements = denoiser.x[0].size
        self.denoiser = denoiser
        self.noise = noise or AddressedNoise(slots, elements)
        self._embedding = spec.embedding.table(spec.timesteps)
        self._rows = np.array([IDENTITY], np.float32)
        self._tables: dict[int, tuple[StepTable, int]] = {}  # by id: the table and its first row
        self._pointer = np.full(slots, IDLE)
        self._end = np.full(slots, IDLE)
        self._x0 = np.zeros((slots, elements), np.float32)
        self._x0_previous = np.zeros_like(self._x0)
        self._scratch = np.empty_like(self._x0)
        self._current = np.zeros((slots, len(COLUMNS)), np.float32)
        self._timestep = np.zeros(slots, np.int64)
        self._ahead = np.empty((0, slots, elements), np.float32)  # noise of the steps to come
        # Whether any table so far uses x̂0_prev or the raw prediction, or a learned variance: few do.
        self._uses_previous = self._uses_prediction = False
        self._exponential: Exponential | None = None

    @property
    def x(self) -> Array:
        """x_t of every slot, (slots, C, H, W): the Denoiser's own input."""
        return self.denoiser.x

    @property
    def x0(self) -> Array:
        """x̂0 of the slots that took the last step, (slots, C, H, W). Memory that the next step reuses."""
        return self._x0_previous.reshape(self.denoiser.x.shape)

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which slots have steps to go, (slots,)."""
        active: NDArray[np.bool_] = self._pointer != IDLE
        return active

    def start(
        self,
        slots: slice,
        table: StepTable,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        labels: Labels | None = None,
    ) -> None:
        """Start the chains of samples `indices` (k,) of `seeds` (k,) in k slots, each at its x_T.

        labels: (k,), of a class-conditional model.

        The slots must have nothing to do. An image is whole when its slot is not `active` any more, and
        stays in `x` until the slot is started again. Raises SettingError where the model has not what the
        table needs.
        """
        self._occupy(slots, table, 0, seeds, indices, labels)
        x_T = self.noise.fill(np.zeros((1, slots.stop), np.int64))[0]  # noqa: N806  (the paper's name)
        self._flat(self.denoiser.x)[slots] = x_T[slots]
        self._x0_previous[slots] = 0

    def restore(
        self,
        slots: slice,
        table: StepTable,
        step: int,
        x: Array,
        x0: Array,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        labels: Labels | None = None,
    ) -> None:
        """Take chains up again after `step` of their steps: as `start`, from x and the last x̂0, (k, C, H, W)."""
        self._occupy(slots, table, step, seeds, indices, labels)
        self.denoiser.x[slots], self.x0[slots] = x, x0

    def _occupy(
        self,
        slots: slice,
        table: StepTable,
        step: int,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        labels: Labels | None,
    ) -> None:
        """All that the slots' chains are, but for their numbers."""
        assert not self.active[slots].any()
        first = self._first_row(table)
        self._ahead = self._ahead[:0]  # the noise made ahead was of other slots
        self.noise.assign(slots, seeds, indices)
        if labels is not None:
            self.denoiser.y[slots] = labels
        self._pointer[slots] = first + step if step < len(table) else IDLE
        self._end[slots] = first + len(table)

    def _first_row(self, table: StepTable) -> int:
        known = self._tables.get(id(table))
        if known is None:
            require_runs(table, self.denoiser.spec)
            if len(self._tables) >= _MAX_TABLES and not self.active.any():
                self._tables, self._rows = {}, self._rows[:1]
            known = table, len(self._rows)
            self._rows = np.concatenate([self._rows, table.float32_rows()])
            self._tables[id(table)] = known
            self._uses_previous |= bool(table["f"].any())
            self._uses_prediction |= bool(table["g"].any())
            if learns_variance(table.rows).any() and not self._exponential:
                self._exponential = Exponential(*self._x0.shape)
        return known[1]

    def watch(self, count: int) -> Callable[[], tuple[Array, Array]]:
        """What gives x and x̂0 of the leading slots: (count, C, H, W) each, views that the next step overwrites."""
        return lambda: (self.x[:count], self.x0[:count])

    def close(self) -> None:
        """Nothing to free but the Denoiser, which is another's."""

    def clear(self) -> None:
        """Leave every slot with nothing to do."""
        self._pointer[:] = IDLE

    def step(self) -> None:
        """Take every active slot one step on."""
        batch = self.predict()
        self.update(batch)

    def predict(self) -> int:
        """The network at each active slot's x and t. Returns the batch: leading slots in use, at least one."""
        batch = int(np.flatnonzero(self._pointer)[-1]) + 1
        current, timestep = self._current[:batch], self._timestep[:batch]
        # mode="clip" writes straight into `out`; the indices are ours and in range.
        np.take(self._rows, self._pointer[:batch], axis=0, out=current, mode="clip")
        timestep[:] = current[:, T]
        np.take(self._embedding, timestep, axis=0, out=self.denoiser.temb[:batch], mode="clip")
        self.denoiser.run(batch)
        idle = self._pointer[:batch] == IDLE
        if idle.any():  # 0 times an infinity would be NaN, and their images are to stay
            self.denoiser.prediction[:batch][idle] = 0
        return batch

    def update(self, batch: int) -> None:
        """x ← x', x̂0 and the row pointers, by the rows that `predict` looked up."""
        row = self._current[:batch, :, None]  # (B, columns, 1)
        elements = self._x0.shape[1]
        prediction = self._flat(self.denoiser.prediction)[:batch]
        x, out, v = self._flat(self.denoiser.x)[:batch], prediction[:, :elements], prediction[:, elements:]
        x0, x0_previous, scratch = self._x0[:batch], self._x0_previous[:batch], self._scratch[:batch]

        np.multiply(x, row[:, A], x0)
        np.multiply(out, row[:, B], scratch)
        np.add(x0, scratch, x0)
        np.maximum(x0, row[:, LO], out=x0)
        np.minimum(x0, row[:, HI], out=x0)

        np.multiply(x, row[:, D], x)
        np.multiply(x0, row[:, C], scratch)
        np.add(x, scratch, x)
        if row[:, E].any():
            np.multiply(self._next_noise(batch), row[:, E], scratch)
            if self._exponential:
                np.multiply(scratch, self._deviation(row, v), scratch)
            np.add(x, scratch, x)
        else:
            self._ahead = self._ahead[1:]
        if self._uses_previous:
            np.multiply(x0_previous, row[:, F], scratch)
            np.add(x, scratch, x)
        if self._uses_prediction:
            np.multiply(out, row[:, G], scratch)
            np.add(x, scratch, x)
        # -0 becomes +0, so that a term with a zero coefficient may as well not be computed.
        np.add(x, _ZERO, x)

        self._x0, self._x0_previous = self._x0_previous, self._x0
        pointer = self._pointer[:batch]
        pointer += pointer != IDLE
        pointer[pointer == self._end[:batch]] = IDLE

    def _deviation(self, row: Array, v: Array) -> Array:
        """s of the rule, (B, C·H·W), in the memory of v, which the next prediction fills anew."""
        assert self._exponential
        fixed = ~learns_variance(row[..., 0])
        if fixed.any():
            v[fixed] = 0  # whatever it was: 0 times an infinity would be NaN
        quarter = (row[:, LN_VAR_MAX] - row[:, LN_VAR_MIN]) * _QUARTER
        np.multiply(v, quarter, v)
        np.add(v, quarter + row[:, LN_VAR_MIN] * _HALF, v)
        self._exponential.apply(v)
        return v

    def _next_noise(self, batch: int) -> Array:
        """z of the leading slots at their steps, (B, C·H·W), made for some steps to come as well."""
        if not len(self._ahead):
            pointers = self._pointer[:batch] + np.arange(self.noise.lookahead)[:, None]  # (K, B)
            # Past a chain's end this asks for noise that is never used.
            timesteps = self._rows[:, T].take(pointers, mode="clip")
            self._ahead = self.noise.fill(timesteps.astype(np.int64) + 1)
        z, self._ahead = self._ahead[0, :batch], self._ahead[1:]
        return z

    @staticmethod
    def _flat(array: Array) -> Array:
        return array.reshape(len(array), -1)


def require_runs(table: StepTable, spec: ModelSpec) -> None:
    """Raise SettingError unless a model of this spec can run the table."""
    if learns_variance(table.rows).any() and spec.variance != "learned_range":
        raise SettingError("this table needs a learned variance, and the model has none")
    last, t = spec.timesteps - 1, table["t"]
    if not (0 <= t.min() <= t.max() <= last) or (t % 1).any():
        raise SettingError(f"the timesteps of this table are not whole numbers from 0 to the model's {last}")
    if (np.diff(t) >= 0).any():
        raise SettingError("the timesteps of a table must fall: the noise of a step is found by its timestep")
