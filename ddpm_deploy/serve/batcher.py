"""Batcher: many callers' requests over one Chain, stepped by one thread; each joins at a step, and leaves when done.

Who joins and how many is `admission`'s to say, by the step time that `pace` measures; `rows` has the slots. This is the
thread between them, and how requests end. Four things hold, and the tests hold them:

- what may share a step is explicit (`Admission.joins` and `_fits`);
- each request's state is its own: its slots, its images, its noise, its failure;
- what waits and what runs is bounded;
- results go by identity (`Seat`: whose image, which of them), never by position: slots are reused and moved.
"""

import atexit
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import BackendError, BusyError, DeadlineError, SettingError, one_line
from ddpm_deploy.runtime.chain import Noise, require_runs
from ddpm_deploy.runtime.network import not_finite, require_process
from ddpm_deploy.runtime.protocols import Array, Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler, require_callable
from ddpm_deploy.serve.admission import Admission, Seat, Ticket
from ddpm_deploy.serve.handle import Handle, Job, Preview
from ddpm_deploy.serve.pace import Pace
from ddpm_deploy.serve.rows import Rows, rows_of

State = Literal["open", "draining", "closed", "failed"]
_COUNTS: Final = ("submitted", "refused", "completed", "cancelled", "failed")
_MOST_PRIORITY: Final = 1000  # of either sign
_LONGEST: Final = 1e9  # seconds of a deadline
_WATCH: Final = 32  # steps after which all that runs is looked at: on a GPU a look waits for the device


@dataclass(frozen=True)
class Status:
    """What a Batcher does at this moment, and what it has done.

    state: "failed" where the network did. waiting: requests none or not all of whose images have begun. running: images
    that run. rows: of the batch that they take, of `capacity`. width: rows up to which anybody joins.
    step_seconds: of a step with as many rows. steps: that were taken. submitted, refused, completed, cancelled, failed:
    requests, ever.
    """

    state: State
    waiting: int
    running: int
    rows: int
    capacity: int
    width: int
    step_seconds: float
    steps: int
    submitted: int
    refused: int
    completed: int
    cancelled: int
    failed: int


class Batcher:
    """Serves requests of any number of threads at once over one model, without any waiting for a batch to be full.

        with Sampler.load("model.onnx") as sampler, Batcher(sampler) as batcher:
            handle = batcher.submit(Request(count=4, steps=50, seed=7))
            images = handle.result()  # float32 (4, C, H, W)

    model: a Sampler, which it holds until it is closed, or a Network that nobody else uses; neither is closed with it.
    capacity: rows of the batch to use (None: the model's max_batch); a guided image takes two. max_queue: requests that
    may wait for rows. admission: the class of the policy.

    The constructor measures the step time, which takes about a second. All that runs, runs in a thread of the
    batcher's own. Make it in the process that uses it: after a fork, not before.

    Raises SettingError for a capacity or max_queue out of range, OwnershipError where the Sampler is in use,
    BackendError where the network fails.
    """

    def __init__(
        self,
        model: Sampler | Network,
        capacity: int | None = None,
        max_queue: int = 256,
        *,
        admission: type[Admission] = Admission,
    ) -> None:
        self.network = model.network if isinstance(model, Sampler) else model
        most = self.network.max_batch
        capacity = most if capacity is None else capacity
        for name, value, limit in (("capacity", capacity, most), ("max_queue", max_queue, 1 << 20)):
            if type(value) is not int or not 1 <= value <= limit:
                raise SettingError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
        self.spec, self.capacity = self.network.spec, capacity
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards all that other threads look at, the admission among it
        self._state: State = "open"
        self._error: BaseException | None = None
        self._live: set[Job] = set()  # accepted and not over
        self._timed: set[Job] = set()  # those with a deadline
        self._watched: set[Job] = set()  # those with a watcher
        self._leaving: list[Job] = []  # cancelled since the last turn
        self._counts = Counter[str]()
        self._admission: Admission
        # The thread's own: the images that run, when the last step ended.
        self._rows: Rows
        self._last = 0.0
        self._launch(model, max_queue, admission)

    def _launch(self, model: Sampler | Network, max_queue: int, policy: type[Admission]) -> None:
        """Start the thread, and wait until it has the rows and knows the step time."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._serve,
            args=(model, ready, max_queue, policy),
            name="ddpm-deploy batcher",
            daemon=True,
        )
        self._thread.start()
        ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        _OPEN.add(self)
        atexit.unregister(
            _close_all
        )  # again for each, as in runtime.sampler: what is registered last runs first
        atexit.register(_close_all)

    def submit(
        self,
        request: Request,
        *,
        priority: float = 0,
        deadline: float | None = None,
        noise: Noise | None = None,
    ) -> Handle:
        """Ask for a request's images, from any thread; it does not wait.

        priority: 1 is worth `admission.AGEING` seconds of waiting, -1000 to 1000. deadline: seconds from now after
        which the images are of no use. noise: as of `Sampler.sample`, called in the batcher's thread.

        Raises SettingError where the model cannot do this, BusyError where too many wait, DeadlineError where the step
        time that was measured says it would be late, BackendError where the batcher is closed or its network failed,
        OwnershipError in a fork of the process that made it.
        """
        require_process(self._process)
        require_callable(noise=noise)
        priority = _number("priority", priority, -_MOST_PRIORITY, _MOST_PRIORITY)
        seconds = math.inf if deadline is None else _number("deadline", deadline, 0, _LONGEST)
        job = self._job(request, priority, seconds, noise)
        with self._changed:
            self._require_open()
            try:
                self._admission.submit(job.ticket, time.perf_counter(), seconds)
            except (BusyError, DeadlineError):
                self._counts["refused"] += 1
                raise
            self._counts["submitted"] += 1
            self._live.add(job)
            if deadline is not None:
                self._timed.add(job)
            self._changed.notify_all()
        return job.handle

    def _job(self, request: Request, priority: float, seconds: float, noise: Noise | None) -> Job:
        """A request, checked, with room for its images."""
        if not isinstance(request, Request):
            raise SettingError(f"submit takes a Request, not {type(request).__name__}")
        now, request = time.perf_counter(), request.checked(self.spec)
        table = request.table_for(self.spec)
        require_runs(table, self.spec)
        rows = request.rows // request.count
        if rows > self.capacity:
            raise SettingError(
                "guidance takes two rows of the batch for an image, and this batcher has one: give it capacity 2"
            )
        try:
            images = np.empty((request.count, *self.spec.image_shape), np.float32)
        except (MemoryError, ValueError) as error:
            raise SettingError(
                f"{request.count} images do not fit in memory: ask for fewer at once"
            ) from error
        ticket = Ticket(request.count, rows, len(table), priority, table)
        return Job(request, ticket, self, images, now + seconds, noise)

    def _require_open(self) -> None:
        if self._error is not None:
            raise BackendError(f"this batcher ended, as its network failed: {one_line(self._error)}")
        if self._state != "open":
            raise BackendError("this batcher is closed: make another")

    def status(self) -> Status:
        """What it does now, and has done."""
        require_process(self._process)
        with self._changed:
            admission = self._admission
            return Status(
                state=self._state,
                waiting=len(admission.waiting),
                running=len(admission.seats),
                rows=admission.rows,
                capacity=self.capacity,
                width=admission.limits()[1],
                step_seconds=admission.pace(max(1, admission.rows)),
                steps=admission.step,
                **{name: self._counts[name] for name in _COUNTS},
            )

    @property
    def pace(self) -> NDArray[np.float64]:
        """s(B): seconds of a step with B rows, for B from 0 (as for 1) to `capacity`, as it is known now."""
        return self._admission.pace.table

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end when those that were taken are done; closing again does nothing.

        drain: whether to do them; else they are cancelled. timeout: seconds until the rest is cancelled.
        In a fork of its process it does nothing.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            if self._state == "open":
                self._state = "draining"
            self._changed.notify_all()
        if not drain:
            self._cancel_all()
        if threading.current_thread() is self._thread:  # a callback: it ends after this turn
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._cancel_all()
            self._thread.join()
        _OPEN.discard(self)

    def _cancel_all(self) -> None:
        with self._changed:
            jobs = list(self._live)
        for job in jobs:
            job.handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    # What a handle asks, in any thread.

    def withdraw(self, job: Job) -> None:
        """A request was cancelled: its place in the queue is free at once, its rows at the next step."""
        with self._changed:
            self._admission.withdraw(job.ticket, time.perf_counter())
            self._leaving.append(job)
            self._changed.notify_all()

    def attend(self, job: Job) -> None:
        """Somebody wants previews of a request."""
        with self._changed:
            if job in self._live:
                self._watched.add(job)

    def progress(self, job: Job) -> float:
        """The share of a request's steps that was taken."""
        with self._changed:
            ticket, step = job.ticket, self._admission.step
            to_go = sum(seat.end - step for seat in self._admission.seats if seat.ticket is ticket)
            to_go += (ticket.images - ticket.began) * ticket.steps
            return 1 - to_go / (ticket.images * ticket.steps)

    # The thread.

    def _serve(
        self, model: Sampler | Network, ready: threading.Event, max_queue: int, policy: type[Admission]
    ) -> None:
        """Hold the model, and take turns until the batcher is closed."""
        try:
            with rows_of(model) as self._rows:
                chain = self._rows.chain
                pace = Pace.measured(chain, self.capacity)
                self._admission = policy(pace, self.capacity, max_queue, chain.places)
                ready.set()
                while self._turn():
                    pass
        except BaseException as error:  # of a thread nobody hears: whoever waits is told
            self._error = error
        finally:
            self._shut()
            ready.set()

    def _shut(self) -> None:
        """Nobody waits for what will not come."""
        with self._changed:
            self._state = "failed" if self._error else "closed"
            jobs = list(self._live)
        for job in jobs:
            self._end(job, _failed(self._error or BackendError("the batcher ended")))

    def _turn(self) -> bool:
        """Whoever leaves, leaves; who may join, joins; and a step. False at the end."""
        with self._changed:
            idle = not self._has_work()
            self._changed.wait_for(self._has_work)
            leaving, self._leaving = self._leaving, []
            now = time.perf_counter()
            if idle:
                self._last = now
            late = [job for job in self._timed if job.deadline <= now]
        for job in leaving:
            self._drop(job)
        for job in late:
            self._drop(job, DeadlineError("the deadline passed before the images were done"))
        with self._changed:
            seats = self._admission.take(now)
        self._start(seats)
        if self._rows:
            try:
                self._step()
            except Exception as error:  # of any library: all in flight have lost their step
                self._recover(error)
        with self._changed:
            return bool(self._live) or self._state == "open"

    def _has_work(self) -> bool:
        return bool(self._live or self._leaving) or self._state != "open"

    def _start(self, seats: list[Seat]) -> None:
        """Start images, those of one request together."""
        groups: dict[Ticket, list[Seat]] = {}
        for seat in seats:
            groups.setdefault(seat.ticket, []).append(seat)
        for ticket, group in groups.items():
            job: Job = ticket.owner
            request, noise = job.part(group)
            try:
                self._rows.start(group, request, noise)
            except Exception as error:  # of this request alone
                job.failure = error
            if job.failure:
                self._drop(job, job.failure)

    def _step(self) -> None:
        """One step of all who run, and what it brings."""
        self._rows.step()
        now = time.perf_counter()
        with self._changed:
            self._admission.stepped(now - self._last)
        self._last = now
        for job in _jobs_of(seat for seat in self._rows if seat.ticket.owner.failure):
            self._drop(job, job.failure)
        self._look()
        self._finish()
        if self._admission.step % _WATCH == 0:
            for job in _jobs_of(self._rows.broken()):  # nothing to wait for comes of them
                self._drop(job, not_finite())

    def _look(self) -> None:
        """Take the previews that are wanted of this step, and hand out those that have arrived."""
        step = self._admission.step
        if self._watched:
            self._rows.look({seat for seat in self._rows if _is_wanted(seat, seat.taken(step) - 1)}, step)
        for seat, at, image in self._rows.seen(step):
            if seat.ticket.owner:  # else it ended meanwhile
                self._show(seat, at, image)

    def _show(self, seat: Seat, at: int, image: Array) -> None:
        """Give a preview to whoever wanted it."""
        job: Job = seat.ticket.owner
        try:
            for watcher, steps in job.handle.watchers:
                if at in steps:
                    watcher(Preview(seat.index, at, seat.ticket.steps, image.copy()))
        except Exception as error:  # of the caller's own
            self._drop(job, error)

    def _finish(self) -> None:
        """Hand on the images whose last step this was."""
        finished = self._rows.finished(self._admission.step)
        if not finished:
            return
        with self._changed:
            for seat, _, _ in finished:
                self._admission.leave(seat)
        jobs: dict[Job, Exception | None] = {}
        for seat, image, is_broken in finished:
            job: Job = seat.ticket.owner
            job.put(seat, image)
            jobs[job] = jobs.get(job) or (not_finite() if is_broken else None)
        for job, error in jobs.items():
            if error:
                self._drop(job, error)
            elif not job.left:
                self._end(job)

    def _drop(self, job: Job, error: BaseException | None = None) -> None:
        """End a request before its time: its slots are free now."""
        self._give_up(job, error)
        self._rows.leave(job.ticket)

    def _give_up(self, job: Job, error: BaseException | None) -> None:
        """End a request whose images are about to leave."""
        with self._changed:
            for seat in self._rows:
                if seat.ticket is job.ticket:
                    self._admission.leave(seat)
            self._admission.withdraw(job.ticket, time.perf_counter())
        self._end(job, error)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """A request is over, once; outside the lock, as callbacks may submit the next."""
        with self._changed:
            if job not in self._live:
                return
            for jobs in (self._live, self._timed, self._watched):
                jobs.discard(job)
            cancelled = job.handle.cancelled()
            self._counts["cancelled" if cancelled else "failed" if error else "completed"] += 1
        job.end(error)

    def _recover(self, error: Exception) -> None:
        """The network failed as a whole, and all in flight with it. Where it answers again, those who wait go on."""
        for job in _jobs_of(self._rows):
            self._give_up(job, _failed(error))
        self._rows.restart()
        self._last = time.perf_counter()


def _failed(error: BaseException) -> BackendError:
    """The error of one of several requests that fail together: each its own, as they are raised in many threads."""
    failed = BackendError(f"the network failed: {one_line(error)}")
    failed.__cause__ = error
    return failed


def _jobs_of(seats: Iterable[Seat]) -> set[Job]:
    """Whose images these are."""
    return {seat.ticket.owner for seat in seats}


def _is_wanted(seat: Seat, at: int) -> bool:
    """Whether somebody wants a preview of an image after this of its steps."""
    return any(at in steps for _, steps in seat.ticket.owner.handle.watchers)


def _number(name: str, value: float, least: float, most: float) -> float:
    """A number in its range."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise SettingError(f"{name} must be a number from {least:.0f} to {most:.0f}, not {value!r}")
    return float(value)


_OPEN: Final["weakref.WeakSet[Batcher]"] = weakref.WeakSet()


def _close_all() -> None:
    """At the end of the process, before the backends are freed."""
    for batcher in list(_OPEN):
        batcher.close(drain=False)
