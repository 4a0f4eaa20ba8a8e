"""Slots and the loop: each row of the batch is a reverse Markov chain of its own.

One Chain for the host and for a GPU: it knows which sample is in which slot and how many steps that has to go; the
device's stepper does the arithmetic. What draws anything goes through it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import SettingError, first_line, plural
from ddpm_deploy.runtime.network import bucket_of, require_open
from ddpm_deploy.runtime.protocols import IDLE, SLOT, Array, Labels, Look, Network, Slots, upload_rows
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import START, E, StepTable, T, learns_variance
from ddpm_deploy.spec import ModelSpec

# noise(draw) -> (k, C, H, W) in place of the addressed noise: draw 0 is x_T, t + 1 the noise of the step from t.
Noise = Callable[[int], Array]

_ROWS: Final = 1 << 16  # of step tables that there is room for, and at least those of _TABLES tables
_TABLES: Final = 16
_TIMED: Final = 16, 0.1  # steps that are timed, as noise is made for so many at once; and seconds for them


@dataclass(frozen=True)
class _Given:
    """Slots that started together on a caller's noise, and which of its images each of them takes."""

    slots: Slots
    images: Slots
    noise: Noise
    table: StepTable

    def kept(self, which: NDArray[np.bool_]) -> "_Given":
        """The same for some of the slots."""
        return replace(self, slots=self.slots[which], images=self.images[which])


class Chain:
    """The reverse chains in the slots of a network's batch, one step of all of them at a time.

    A slot is free when it has no steps to go; the image of a chain that has ended stays in it until the slot is
    started again or moved to. A guided sample takes two slots, any two: its partner holds the unconditional row.

    lag: steps by which what is watched may be behind.
    """

    def __init__(self, network: Network) -> None:
        slots = network.max_batch
        self.network, self.spec = network, network.spec
        self.lag = network.device.lag
        length = self.spec.timesteps + 1  # a table's START row, and its own
        self._tables: list[StepTable | None] = [None] * min(slots, max(_TABLES, _ROWS // length))
        self._users = np.zeros(len(self._tables), np.int64)
        self._stepper = network.device.stepper(network, 1 + length * len(self._tables))
        self._left = np.zeros(slots, np.int64)  # steps to go, but for those taken since they were settled
        self._taken = 0
        self._table = np.full(slots, -1)  # of each slot that has steps to go
        self._partner = np.full(slots, -1)  # of each guided slot
        self._guide = np.full(slots, -1)  # of each slot that is a partner
        self._given: list[_Given] = []
        self._closed = False
        self._count()

    def _settle(self) -> None:
        """Take the steps since the last count off those to go; no slot ended before."""
        self._left -= np.minimum(self._left, self._taken)
        self._next_end -= self._taken
        self._taken = 0

    def _count(self) -> None:
        """Find the batch size and the next end anew: after slots were started, ended or moved."""
        used = np.flatnonzero((self._left > 0) | (self._guide >= 0))
        self._bucket = bucket_of(self.network, int(used[-1]) + 1) if len(used) else 0
        self._next_end = int(self._left[self._left > 0].min()) if len(used) else 0

    @property
    def places(self) -> int:
        """Different step tables that there is room for at once."""
        return len(self._tables)

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which slots have steps to go, (slots,)."""
        self._settle()
        active: NDArray[np.bool_] = self._left > 0
        return active

    @property
    def free(self) -> Slots:
        """The slots that can be started, ascending."""
        self._settle()
        return np.flatnonzero((self._left == 0) & (self._guide < 0))

    def start(self, slots: Slots, request: Request, noise: Noise | None = None) -> None:
        """Start the samples of a checked request in free slots, each at its x_T; the rest of `slots` are the partners.

        slots: `request.rows` of them, in any order. noise: in place of the addressed noise.

        Raises SettingError where the model cannot run the request's table, too many tables are in use, or the request
        begins at images, as `restore` takes them.
        """
        if request.depth is not None:
            raise SettingError("depth is where given images begin: give them as start, or leave depth out")
        if noise is not None and request.share_until is not None:
            raise SettingError("noise of your own is shared as it is: leave share_until out")
        table = request.table_for(self.spec)
        if noise is None:
            slots, _ = self._occupy(slots, request, table, -1)
            self._stepper.begin(slots, None)
            return
        start = np.asarray(noise(0), np.float32)  # it may raise, and nothing is begun
        slots, order = self._occupy(slots, request, table, -1, given=True)
        self._given.append(_Given(slots, order, noise, table))
        self._stepper.begin(slots, start[order])

    def restore(
        self, slots: Slots, request: Request, table: StepTable, step: int, x: Array, x0: Array
    ) -> None:
        """Take chains up again after `step` steps of a table: as `start`, from x and the last x̂0, (k, C, H, W)."""
        slots, order = self._occupy(slots, request, table, step)
        self._stepper.resume(slots, x[order], x0[order])

    def _occupy(
        self, slots: Slots, request: Request, table: StepTable, step: int, given: bool = False
    ) -> tuple[Slots, Slots]:
        """Reserve slots for a request before a step of its table (-1: the START row): all but x and x̂0 is set.

        Gives the slots of the samples, ascending, and which sample each has.
        """
        require_open(not self._closed)
        slots = np.asarray(slots, np.intp)
        if len(np.unique(slots)) != request.rows or len(slots) != request.rows:
            raise SettingError(
                f"this request takes {plural(request.rows, 'different slot')}, not {slots.tolist()}"
            )
        if not np.isin(slots, self.free).all():
            raise SettingError(f"of the slots {slots.tolist()} only {self.free.tolist()} are free")
        samples, partners = slots[: request.count], slots[request.count :]
        # What a request that was not checked fails at comes before anything is taken.
        seeds, indices = request.addresses()
        scales, labels = request.scales(), request.label_numbers(self.spec)
        region = self._enter(table, len(samples))
        first = self._first_row(region)
        records = np.zeros(len(samples), SLOT)
        records["row"] = first + step if step < len(table) else IDLE
        records["end"] = first + len(table)
        records["seed"], records["index"] = seeds, indices
        records["share_until"] = -1 if request.share_until is None else request.share_until
        records["partner"], records["scale"], records["given"] = -1, 1.0, given
        if scales is not None:
            records["partner"], records["scale"] = partners, scales
            self._partner[samples], self._guide[partners] = partners, samples
        order = np.argsort(samples)
        self._stepper.assign(samples[order], records[order])
        if labels is not None:
            null = np.full(len(partners), self.spec.num_classes)
            self._label(slots, np.concatenate([labels, null]))
        self._left[samples] = len(table) - max(step, 0)
        self._table[samples] = region
        self._leave()
        self._count()
        return samples[order], order

    def _label(self, slots: Slots, labels: Labels) -> None:
        order = np.argsort(slots)
        upload_rows(self.network.device, slots[order], labels[order], self.network.memory["y"])

    def _first_row(self, region: int) -> int:
        """Of a table's own, behind its START row; row 0 is that of slots with nothing to do."""
        return 2 + region * (self.spec.timesteps + 1)

    def _enter(self, table: StepTable, users: int) -> int:
        """Where a table stands, which so many slots more run; tables that no slot runs make room."""
        region = next((i for i, other in enumerate(self._tables) if other is table), None)
        if region is None:
            require_runs(table, self.spec)
            unused = np.flatnonzero(self._users == 0).tolist()
            if not unused:
                raise SettingError(
                    "too many different tables are in use at once: wait for some chains to end"
                )
            region = next((i for i in unused if self._tables[i] is None), unused[0])
            rows = np.concatenate([[START], table.rows]).astype(np.float32)
            self._stepper.put_rows(self._first_row(region) - 1, rows)
            self._tables[region] = table
        self._users[region] += users
        return region

    def _leave(self) -> None:
        """Let go of what slots that have ended held: a share of their table, their partners, a caller's noise."""
        slots = np.flatnonzero((self._left == 0) & (self._table >= 0))
        np.subtract.at(self._users, self._table[slots], 1)
        self._table[slots] = -1
        partners = self._partner[slots]
        self._guide[partners[partners >= 0]] = -1
        self._partner[slots] = -1
        kept = [given.kept(self._left[given.slots] > 0) for given in self._given]
        self._given = [given for given in kept if len(given.slots)]

    def stop(self, slots: Slots) -> None:
        """End the chains of some slots before the next step, each with its partner; of free slots, none."""
        self._settle()
        slots = np.asarray(slots, np.intp)
        slots = np.unique(np.where(self._guide[slots] >= 0, self._guide[slots], slots))
        slots = slots[self._left[slots] > 0]
        if not len(slots):
            return
        self._left[slots] = 0
        self._leave()
        self._stepper.assign(slots, np.zeros(len(slots), SLOT))
        self._count()

    def clear(self) -> None:
        """End all chains."""
        self.stop(np.flatnonzero(self._left))

    def move(self, source: int, target: int) -> None:
        """Let a free slot take the place of another that is in use, of a sample or a partner."""
        if target not in self.free or source in self.free:
            raise SettingError(f"slot {source} must be in use and slot {target} free, to move one there")
        self._stepper.move(source, target)
        for array, nothing in ((self._left, 0), (self._table, -1), (self._partner, -1), (self._guide, -1)):
            array[target], array[source] = array[source], nothing
        partner, guide = int(self._partner[target]), int(self._guide[target])
        if partner >= 0:
            self._guide[partner] = target
        if guide >= 0:
            self._partner[guide] = target
            self._stepper.pair(guide, target)
        self._given = [
            replace(given, slots=np.where(given.slots == source, target, given.slots))
            for given in self._given
        ]
        self._count()

    def compact(self) -> dict[int, int]:
        """Close the holes between slots in use, since a batch is as wide as its highest: which slot moved where.

        The images of chains that have ended are overwritten: read them first.
        """
        self._settle()
        moves = {}
        used = np.flatnonzero((self._left > 0) | (self._guide >= 0))
        for source, target in zip(used[::-1].tolist(), self.free.tolist(), strict=False):
            if target > source:
                break
            self.move(source, target)
            moves[source] = target
        return moves

    def step(self) -> None:
        """Take every active slot one step on."""
        require_open(not self._closed)
        if not self._bucket:
            raise SettingError("no slot has steps to go: start one first")
        for given in self._given:
            self._give(given)
        self._stepper.step(self._bucket)
        self._taken += 1
        if self._taken == self._next_end:
            self._settle()
            self._leave()
            self._count()

    def _give(self, given: _Given) -> None:
        """The noise of the next step, where that adds any."""
        row = given.table.rows[len(given.table) - self._left[given.slots[0]] + self._taken]
        if row[E]:
            order = np.argsort(given.slots)  # which may have moved
            noise = np.asarray(given.noise(int(row[T]) + 1), np.float32)
            self._stepper.give(given.slots[order], noise[given.images[order]])

    def broken(self, slots: Slots) -> NDArray[np.bool_]:
        """Which slots had numbers that are not finite, at any step of their chain; ask before they are stopped."""
        require_open(not self._closed)
        return self._stepper.broken(slots)

    def read(self, slots: Slots) -> tuple[Array, Array]:
        """x and the last x̂0 of some slots as they are now, (k, C, H, W) each, as copies."""
        part = _around(slots)
        return self.images(slots), self._stepper.x0(part)[slots - part.start]

    def images(self, slots: Slots) -> Array:
        """x of some slots as it is now, (k, C, H, W), as a copy."""
        require_open(not self._closed)
        part = _around(slots)
        images: Array = self._stepper.x(part)[slots - part.start]
        return images

    def watch(self, slots: Slots) -> Look:
        """What gives x and x̂0 of some slots as they are after this step, (k, C, H, W) each.

        They may be views that the next step (with a lag, the next but one call) overwrites.
        """
        require_open(not self._closed)
        part = _around(slots)
        look = self._stepper.watch(part)
        if len(slots) == part.stop - part.start and (np.diff(slots) == 1).all():
            return look

        def chosen() -> tuple[Array, Array]:
            x, x0 = look()
            return x[slots - part.start], x0[slots - part.start]

        return chosen

    def close(self) -> None:
        """Free what the chain holds; the network is another's. Closing again does nothing."""
        self._closed = True
        self._left[:] = 0
        self._stepper.close()


def _around(slots: Slots) -> slice:
    """The slots from the first to the last of some."""
    return slice(int(slots.min()), int(slots.max()) + 1)


def require_runs(table: StepTable, spec: ModelSpec) -> None:
    """Raise SettingError unless a model of this spec can run the table."""
    if learns_variance(table.rows).any() and spec.variance != "learned_range":
        raise SettingError("this table needs a learned variance, and the model has none")
    last, t = spec.timesteps - 1, table["t"]
    if not (0 <= t.min() <= t.max() <= last) or (t % 1).any():
        raise SettingError(f"the timesteps of this table are not whole numbers from 0 to the model's {last}")
    if len(table) > spec.timesteps:
        raise SettingError(
            f"a table of {len(table)} steps is longer than any chain of this model, of {last + 1}"
        )
    if (np.diff(t) >= 0).any() and table["e"].any():
        raise SettingError(
            "the timesteps of a table that adds noise must fall: the noise of a step is found by its timestep"
        )


def noise_of_part(noise: Noise, shape: tuple[int, ...], first: int, count: int) -> Noise:
    """A caller's noise for some of the samples that it is of."""

    def of_part(draw: int) -> Array:
        numbers = noise(draw)
        try:
            given = np.asarray(numbers, np.float32)
        except (TypeError, ValueError) as error:
            raise SettingError(f"noise(draw) gave no array of numbers: {first_line(error)}") from error
        if given.shape != shape:
            raise SettingError(f"noise(draw) gave the shape {given.shape}, and {shape} is needed")
        return given[first : first + count]

    return of_part


def time_step(chain: Chain, rows: int) -> float:
    """Seconds of a step of so many images: the mean of the first of their chains, but for one that warms it up.

    As many as there is time for, two at least where the model has them. The chain is one that nobody uses.
    """
    most, seconds = _TIMED
    chain.start(np.arange(rows), Request(count=rows, seed=0).checked(chain.spec))
    times: list[float] = []
    while len(times) <= most and chain.active.any() and (len(times) < 2 or sum(times) < seconds):
        start = time.perf_counter()
        chain.step()
        chain.network.device.synchronize()
        times.append(time.perf_counter() - start)
    chain.clear()
    return float(np.mean(times[1:] or times))
