"""The contracts below the chain: a Network predicts, a Device has memory, a Stepper takes a step of every slot.

There is one Chain above them (`runtime.chain`), so what runs on a GPU is the program that runs on the host. A new
backend is a class that follows Network; a new kind of machine one that follows Device, with a Stepper of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.spec import ModelSpec

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
Slots = NDArray[np.intp]
# Gives x and x̂0 of the slots that are watched.
Look = Callable[[], tuple[Array, Array]]

# What a slot runs, as `struct Slot` of step.cu has it, little-endian. row, end: of the stepper's rows; row 0 is a slot
# with nothing to do. seed, index: the address of its noise. partner, scale: of guidance, the slot of the unconditional
# row (-1: without). given: whether a caller gives its noise. arrived, broken: the kernel's own. share_until: as of a
# Request (-1: without).
SLOT: Final = np.dtype(
    [
        ("row", "<i4"),
        ("end", "<i4"),
        ("seed", "<u8"),
        ("index", "<u8"),
        ("partner", "<i4"),
        ("scale", "<f4"),
        ("given", "<u4"),
        ("arrived", "<u4"),
        ("broken", "<u4"),
        ("share_until", "<i4"),
    ]
)
IDLE: Final = 0  # the row of a slot with nothing to do


class Network(Protocol):
    """A network that owns its input and output memory on a device, the same from the first call to the last.

    buckets: the batch sizes that it runs, ascending; the last is max_batch or more. memory: one array for each of
    `spec.inputs` and `spec.output`, by name, of as many rows as the last bucket; the chain updates "x" in place.
    capturable: whether what `enqueue` starts can be captured into a CUDA graph and replayed.
    """

    spec: ModelSpec
    device: "Device"
    max_batch: int
    buckets: Sequence[int]
    memory: dict[str, Any]
    capturable: bool

    def enqueue(self, bucket: int) -> None:
        """Start to predict for the leading rows, as many as the bucket has."""

    def close(self) -> None:
        """Free what it holds. Nothing may be called afterwards; closing again does nothing."""


class Device(Protocol):
    """Memory that can be sliced by rows, in which everything that is started happens in order.

    name: for people ("cpu", "cuda:0"). is_host: whether its memory is the host's, and work is done when it returns.
    lag: steps by which what is watched may be behind: 0 or 1.
    """

    name: str
    is_host: bool
    lag: int

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory that holds zeros; freed with the last reference."""

    def address(self, memory: Any) -> int:
        """Where it starts."""

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy an array into memory of its shape; the array may be changed at once."""

    def fetch(self, memory: Any) -> NDArray[Any]:
        """A new array with what memory holds, once everything that was started is done."""

    def start(self, work: Callable[[], None]) -> None:
        """Run `work`, a library's call that starts something here, with this device and its stream current."""

    def synchronize(self) -> None:
        """Wait for everything that was started."""

    def release(self) -> None:
        """Give back memory that nothing refers to any more."""

    def stepper(self, network: Network, rows: int) -> "Stepper":
        """What takes the steps of a network's slots, with room for so many rows of step tables."""


class Stepper(Protocol):
    """The slots of a network's batch, and one step of all of them at a time: the network, then one update.

    The row of temb that a network reads belongs to the row that its slot will run next, also after a start. A step
    leaves the network's prediction as the network made it, so that whoever records a step reads x before it and the
    prediction after it. The slots of an argument ascend.
    """

    def put_rows(self, first: int, rows: Array) -> None:
        """Write rows of a step table, (k, columns), from row `first` on."""

    def assign(self, slots: Slots, records: NDArray[np.void]) -> None:
        """Say what slots run from now on: SLOT records (k,)."""

    def begin(self, slots: Slots, noise: Array | None) -> None:
        """Take the START row in slots that were assigned to it: x ← x_T, x̂0 ← 0. noise: x_T of a caller's."""

    def resume(self, slots: Slots, x: Array, x0: Array) -> None:
        """Set x and the last x̂0, (k, C, H, W) each, of slots that were assigned."""

    def give(self, slots: Slots, noise: Array) -> None:
        """The noise of a caller's for the next step, (k, C, H, W)."""

    def pair(self, guide: int, partner: int) -> None:
        """Say which slot has the unconditional row of a guided one."""

    def move(self, source: int, target: int) -> None:
        """Let a slot that has nothing to do take another's place, with all that it has; that one is idle then."""

    def step(self, bucket: int) -> None:
        """Predict for the leading rows, and take every slot that has something to do one step on."""

    def broken(self, slots: Slots) -> NDArray[np.bool_]:
        """Which slots had numbers in x or the prediction that were not finite, at any step since they were assigned."""

    def x(self, part: slice) -> Array:
        """A copy of x of some slots, (k, C, H, W)."""

    def x0(self, part: slice) -> Array:
        """A copy of the last x̂0 of some slots, (k, C, H, W)."""

    def watch(self, part: slice) -> Look:
        """Note x and x̂0 of some slots as they are after this step: views. On the host the next step overwrites
        them; with a lag, the second later call of `watch` does."""

    def close(self) -> None:
        """Free the memory, once what is under way has ended. Closing again does nothing."""


def runs_of(slots: Slots) -> list[slice]:
    """Ascending slots as slices, one for each run of neighbours."""
    if not len(slots):
        return []
    if int(slots[-1] - slots[0]) == len(slots) - 1:
        return [slice(int(slots[0]), int(slots[-1]) + 1)]
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, breaks)]


def upload_rows(device: Device, slots: Slots, rows: NDArray[Any], memory: Any) -> None:
    """Copy rows of an array into those of ascending slots, a copy for each run of neighbours."""
    done = 0
    for run in runs_of(slots):
        count = run.stop - run.start
        device.upload(np.ascontiguousarray(rows[done : done + count]), memory[run])
        done += count
