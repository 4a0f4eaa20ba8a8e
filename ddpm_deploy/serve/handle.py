"""What one who asks a Batcher holds: a future of the images, previews of them, and the way to call it off."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Lock
from typing import Final, Protocol, Self

import msgspec
import numpy as np

from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.chain import Noise, noise_of_part
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.serve.admission import Seat, Ticket

_KEPT: Final = 16  # previews that a slow reader has before it, the newest


@dataclass(frozen=True)
class Preview:
    """x̂0 of one image on its way: what the network takes it to be, after so many of its steps.

    index: of the image in its request, from 0. step: from 0, of `steps`. image: float32 (C, H, W), a copy.
    """

    index: int
    step: int
    steps: int
    image: Array


Watcher = Callable[[Preview], None]


class Keeper(Protocol):
    """What a handle asks of the batcher that has its request, from any thread."""

    def withdraw(self, job: "Job") -> None:
        """The request was cancelled."""

    def attend(self, job: "Job") -> None:
        """Somebody wants previews of it."""

    def progress(self, job: "Job") -> float:
        """The share of its steps that was taken."""


class Handle(Future[Array]):
    """The future of a request's images: float32 (count, C, H, W), the same bits as `Sampler.sample` gives on a CPU.

    It is a `concurrent.futures.Future`: `result(timeout)` waits, `add_done_callback` tells, and
    `await asyncio.wrap_future(handle)` is the same in asyncio, where cancelling the task cancels the request. What its
    `result` raises: BackendError where the network failed or gave numbers that are not finite, DeadlineError,
    what the caller's noise or watcher raised, `concurrent.futures.CancelledError`.

    request: as it was checked, with its seed. Callbacks run in the batcher's thread, or in that which cancels, and hold
    up the batch as long as they run.
    """

    def __init__(self, request: Request, steps: int, asks: "tuple[Job, Keeper] | None") -> None:
        super().__init__()
        self.request = request
        self._steps = steps
        self._asks = asks  # as long as it is not done
        self._watching = Lock()
        self.watchers: tuple[tuple[Watcher, frozenset[int]], ...] = ()  # and the steps that each wants

    @classmethod
    def over(cls, request: Request, outcome: Array | BaseException | None) -> Self:
        """The handle of a request that another batcher did: its images, its error, or None where it was cancelled."""
        handle = cls(request, len(request.timesteps or ()) or request.steps or 1, None)
        if outcome is None:
            handle.cancel()
        if handle.set_running_or_notify_cancel():
            if isinstance(outcome, BaseException):
                handle.set_exception(outcome)
            elif outcome is not None:
                handle.set_result(outcome)
        return handle

    def cancel(self) -> bool:
        """Call it off, also while it runs: its rows of the batch are free at the next step. False where it is done."""
        asks = self._asks
        if not super().cancel():
            return False
        if asks:
            job, keeper = asks
            keeper.withdraw(job)
        return True

    def running(self) -> bool:
        """Whether images of it run, or are done."""
        return not self.done() and self.progress() > 0

    def progress(self) -> float:
        """The share of its steps that was taken, 0 to 1."""
        asks = self._asks
        if asks is None:
            return 1.0
        job, keeper = asks
        return keeper.progress(job)

    def let_go(self) -> None:
        """Of the batcher, which is done with it."""
        self._asks, self.watchers = None, ()

    def watch(self, watcher: Watcher, looks: int = 8) -> None:
        """Call `watcher` with a Preview after each of `looks` steps of each image, evenly spread, the last step not
        among them; from now on. In the batcher's thread: it must return at once, and what it raises ends the request.

        In asyncio: `lambda preview: loop.call_soon_threadsafe(queue.put_nowait, preview)`.

        Raises SettingError for looks out of range.
        """
        if not isinstance(looks, int) or not 1 <= looks <= self._steps:
            raise SettingError(f"looks must be from 1 to the {self._steps} steps, not {looks!r}")
        steps = np.linspace(0, self._steps - 1, looks + 1).round().astype(int)[:-1].tolist()
        asks = self._asks
        if asks:
            with self._watching:  # two may ask at the same time
                self.watchers = (*self.watchers, (watcher, frozenset(steps)))
            job, keeper = asks
            keeper.attend(job)

    def previews(self, looks: int = 8) -> Iterator[Preview]:
        """The same as an iterator, which waits for the next and ends with the request, however that ends.

        One who reads slowly misses the older ones: they are not kept for him. Ask again for another iterator.
        """
        changed, kept = Condition(), deque[Preview](maxlen=_KEPT)

        def see(preview: Preview) -> None:
            with changed:
                kept.append(preview)
                changed.notify_all()

        def wake(_: Future[Array]) -> None:
            with changed:
                changed.notify_all()

        self.watch(see, looks)
        self.add_done_callback(wake)

        def read() -> Iterator[Preview]:
            while True:
                with changed:
                    changed.wait_for(lambda: kept or self.done())
                    if not kept:
                        return
                    preview = kept.popleft()
                yield preview

        return read()


class Job:
    """The batcher's side of a handle: where the images are gathered.

    images: (count, C, H, W), to be filled. deadline: by `time.perf_counter`. noise: of the caller's, of all images.
    """

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        keeper: Keeper,
        images: Array,
        deadline: float,
        noise: Noise | None,
    ) -> None:
        self.handle = Handle(request, ticket.steps, (self, keeper))
        self.request, self.ticket, self.deadline = request, ticket, deadline
        self._images, self._noise = images, noise
        ticket.owner = self
        self.left = ticket.images  # that are not done
        self.failure: Exception | None = None  # of what the caller gave

    def part(self, seats: list[Seat]) -> tuple[Request, Noise | None]:
        """What a chain starts for some images, neighbours of one another: with the very table that was checked."""
        first, count = seats[0].index, len(seats)
        request = msgspec.structs.replace(self.request[first : first + count], table=self.ticket.table)
        if self._noise is None:
            return request, None
        given = noise_of_part(self._noise, self._images.shape, first, count)

        def numbers(draw: int) -> Array:
            """Nothing, once the caller's noise failed: others are in the same step."""
            if self.failure is None:
                try:
                    return given(draw)
                except Exception as error:  # whatever a caller's function raises
                    self.failure = error
            return np.zeros((count, *self._images.shape[1:]), np.float32)

        return request, numbers

    def put(self, seat: Seat, image: Array) -> None:
        """Take an image in."""
        self._images[seat.index] = image
        self.left -= 1

    def end(self, error: BaseException | None = None) -> None:
        """Tell whoever waits: of the images, or of what went wrong, or nothing of a handle that was cancelled. Once."""
        handle = self.handle
        if handle.set_running_or_notify_cancel():
            if error is None:
                handle.set_result(self._images)
            else:
                handle.set_exception(error)
        handle.let_go()
        self.ticket.owner = None  # nothing refers to itself: what was made is freed with its handle
