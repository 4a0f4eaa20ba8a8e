"""The slots and the loop on a device: a step is the network and one kernel, and nothing comes back until it is asked.

The host only counts: it knows how many steps each slot has to go, as the device does what it is told. All memory is
allocated, and the steps of every batch size captured, when the chain is made; between a start and its images there is
no allocation, no copy to the device, and no waiting that the device would notice.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.runtime.chain import require_runs
from ddpm_deploy.runtime.denoiser import Array, Labels
from ddpm_deploy.runtime.kernel import SLOT, blocks, kernel_source
from ddpm_deploy.runtime.network import DeviceNetwork, bucket_of
from ddpm_deploy.solvers import COLUMNS, IDENTITY, StepTable

_AHEAD: Final = 32  # steps between two marks in the stream
_TABLES: Final = 16  # of all T steps, that there is room for at once
# The row before a table's own: x ← 1·z and x̂0 ← 0, of draw 0, which is t + 1 for t = -1.
START: Final = np.array(
    [{"t": -1.0, "e": 1.0, "lo": -np.inf, "hi": np.inf}.get(column, 0.0) for column in COLUMNS], np.float32
)


class DeviceChain:
    """The reverse chains in the slots of a network's batch, as `chain.Chain` has them on the host."""

    noise: Final = None  # the addressed one alone, which the kernel makes
    lag: Final = 1  # what is watched comes while the next step runs

    def __init__(self, network: DeviceNetwork) -> None:
        spec, slots, self._device = network.spec, network.max_batch, network.device
        self._network, self._spec = network, spec
        self._size, self._outputs = int(np.prod(spec.image_shape)), int(np.prod(spec.prediction_shape))
        self._kernel = self._device.compile(kernel_source(), "step")
        self._embedding = spec.embedding.table(spec.timesteps)
        empty = self._device.empty
        self._x0 = empty((slots, *spec.image_shape), np.float32)
        self._slots = empty((slots, SLOT.itemsize // 4), np.uint32)
        self._rows = empty((1 + _TABLES * (spec.timesteps + 1), len(COLUMNS)), np.float32)
        self._embeddings = empty(self._embedding.shape, np.float32)
        self._device.upload(self._embedding, self._embeddings)
        self._device.upload(np.array([IDENTITY], np.float32), self._rows[:1])
        self._device.upload(np.zeros((slots, SLOT.itemsize // 4), np.uint32), self._slots)
        self._device.upload(np.repeat(self._embedding[:1], slots, axis=0), network.memory["temb"][:slots])
        self._tables: dict[int, tuple[StepTable, int]] = {}  # by id: the table and its first row
        self._used = 1  # rows
        self._left = np.zeros(slots, np.int64)  # steps to go
        both, pinned = (2, slots, *spec.image_shape), self._device.pinned
        # What `watch` keeps and gives, in turn: x and x̂0, on the device and on the host.
        self._seen = [(empty(both, np.float32), pinned(both, np.float32)) for _ in range(2)]
        host = pinned(both, np.float32)
        self._host_x: Array = host[0]  # as last read
        self._host_x0: Array = host[1]
        self._read_since: set[str] = set()  # the last step
        self._taken = 0
        self._marks: deque[Callable[[], None]] = deque()
        self._steps = {bucket: self._prepare(bucket) for bucket in network.buckets}

    @property
    def x(self) -> Array:
        """x_t of every slot, (slots, C, H, W), as it is now: this waits for the device. Overwritten when read again."""
        return self._read("x", self._network.memory.get("x"), self._host_x)

    @property
    def x0(self) -> Array:
        """x̂0 of the slots that took the last step, likewise."""
        return self._read("x0", self._x0, self._host_x0)

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which slots have steps to go, (slots,)."""
        active: NDArray[np.bool_] = self._left > 0
        return active

    def start(
        self,
        slots: slice,
        table: StepTable,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        labels: Labels | None = None,
    ) -> None:
        """Start chains in slots that have nothing to do, as `Chain.start`."""
        self._occupy(slots, table, -1, seeds, indices, labels)
        self._launch(slots.start, slots.stop - slots.start)  # the START row makes x_T

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
        """Take chains up again after `step` of their steps, as `Chain.restore`."""
        self._occupy(slots, table, step, seeds, indices, labels)
        upload, memory = self._device.upload, self._network.memory
        upload(np.ascontiguousarray(x, np.float32), memory["x"][slots])
        upload(np.ascontiguousarray(x0, np.float32), self._x0[slots])
        if step < len(table):
            seen = self._embedding[int(table.timesteps[step])]
            upload(np.repeat(seen[None], slots.stop - slots.start, axis=0), memory["temb"][slots])

    def _occupy(
        self,
        slots: slice,
        table: StepTable,
        step: int,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.uint64],
        labels: Labels | None,
    ) -> None:
        """Point slots at a step of a table, -1 for the START row."""
        if self._slots is None:
            raise BackendError("this model is closed: load it again")
        assert not self.active[slots].any()
        first = self._first_row(table)
        chains = np.zeros(slots.stop - slots.start, SLOT)
        chains["row"] = first + step if step < len(table) else 0
        chains["end"] = first + len(table)
        for field, numbers in (("key", seeds), ("sample", indices)):
            chains[field] = np.stack([numbers & np.uint64(0xFFFFFFFF), numbers >> np.uint64(32)], axis=1)
        self._left[slots] = len(table) - max(step, 0)
        self._read_since.clear()
        self._device.upload(chains.view(np.uint32).reshape(len(chains), -1), self._slots[slots])
        if labels is not None:
            self._device.upload(np.ascontiguousarray(labels, np.int64), self._network.memory["y"][slots])

    def _first_row(self, table: StepTable) -> int:
        """Where a table's first step is in the device's rows; its START row stands before that."""
        known = self._tables.get(id(table))
        if known is None:
            require_runs(table, self._spec)
            if self._used + 1 + len(table) > len(self._rows):
                if self.active.any():
                    raise SettingError(
                        "too many different tables are in use at once: wait for some chains to end"
                    )
                self._tables, self._used = {}, 1
            rows = np.concatenate([START[None], table.float32_rows()[:-1]])  # of an end, `end` tells
            self._device.upload(rows, self._rows[self._used : self._used + len(rows)])
            known = self._tables[id(table)] = table, self._used + 1
            self._used += len(rows)
        return known[1]

    def clear(self) -> None:
        """Leave every slot with nothing to do."""
        active = self.active.any()
        self._left[:] = 0
        if active:
            self._device.upload(np.zeros(self._slots.shape, np.uint32), self._slots)

    def step(self) -> None:
        """Take every active slot one step on. It returns as soon as that is started."""
        batch = int(np.flatnonzero(self._left)[-1]) + 1
        self._steps[bucket_of(self._network, batch)]()
        self._left[:batch] -= self._left[:batch] > 0
        self._read_since.clear()
        self._bound_queue()

    def _bound_queue(self) -> None:
        """Wait for what was started long ago, so that signals and progress are not a whole chain ahead."""
        self._taken += 1
        if self._taken % _AHEAD == 0:
            self._marks.append(self._device.mark())
            if len(self._marks) > 2:  # the device has 2 × _AHEAD steps to go, and does not idle
                self._marks.popleft()()

    def _prepare(self, bucket: int) -> Callable[[], None]:
        """What starts a step of a bucket: captured, where that can be, after a run of it with every slot idle."""
        self._start_step(bucket)
        self._device.synchronize()
        if not self._network.capturable:
            return lambda: self._start_step(bucket)
        return self._device.capture(lambda: self._start_step(bucket))

    def _start_step(self, bucket: int) -> None:
        self._network.enqueue(bucket)
        self._launch(0, min(bucket, len(self._left)))

    def _launch(self, first: int, count: int) -> None:
        memory = self._network.memory
        data = self._rows, self._embeddings, memory["x"], self._x0, memory["temb"], memory["prediction"]
        sizes = self._size, self._outputs, self._spec.embedding.dim
        self._kernel((blocks(self._size), count), (self._slots, first, *data, *sizes))

    def watch(self, count: int) -> Callable[[], tuple[Array, Array]]:
        """Bring x and x̂0 of the leading slots to the host as they are after this step, while the next one runs.

        Gives what waits for them: (count, C, H, W) each, which the next but one call overwrites.
        """
        self._seen.reverse()
        kept, host = (pair[:, :count] for pair in self._seen[0])
        of = self._network.memory["x"][:count], self._x0[:count]
        wait = self._device.copy_out(list(zip(of, kept, host, strict=True)))

        def seen() -> tuple[Array, Array]:
            wait()
            x, x0 = host
            return x, x0

        return seen

    def result(self, count: int) -> Any:
        """x of the leading slots, on the device: memory that the next start overwrites."""
        return self._network.memory["x"][:count]

    def finite(self, count: int) -> bool:
        """Whether x of the leading slots was so all the way: the kernel keeps watch."""
        words = np.empty((count, SLOT.itemsize // 4), np.uint32)
        self._device.download(self._slots[:count], words)
        self._device.synchronize()
        return not words.view(SLOT)["broken"].any()

    def close(self) -> None:
        """Free the memory, once what is under way there has ended. Closing again does nothing."""
        if self._steps:
            with suppress(BackendError):
                self._device.synchronize()
        self._left[:] = 0
        self._steps, self._seen = {}, []
        self._marks.clear()
        self._x0 = self._slots = self._rows = self._embeddings = None

    def _read(self, name: str, memory: Any, host: Array) -> Array:
        """Bring one of them to the host, where it is not there yet."""
        if name not in self._read_since:
            self._device.download(memory[: len(host)], host)
            self._device.synchronize()
            self._read_since.add(name)
        return host
