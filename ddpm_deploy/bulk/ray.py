"""A run in shards on Ray: workers, each an actor with some cores or a GPU, that are given one shard after another.

A shard is all that can be lost: whatever becomes of its worker, another makes it again, to the same bytes. Retries are
ours and not Ray's, so that a shard that ends every worker, or an error that would come again, ends the run.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.bulk.manifest import Manifest
from ddpm_deploy.bulk.shards import put_shard
from ddpm_deploy.bulk.worker import Folder, Job, Opened, Worker
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import (
    ArtefactError,
    BackendError,
    DdpmDeployError,
    DependencyError,
    SettingError,
    first_line,
    one_line,
    plural,
)
from ddpm_deploy.files import show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.signals import signals_held
from ddpm_deploy.version import __version__

logger = logging.getLogger(__name__)

# HTTP/2's greeting, and an empty SETTINGS: a gRPC server, as Ray's is, answers with its own.
_GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_FRAME: Final = 9, 3, 4  # bytes of a frame's head, where its type stands, and the type of SETTINGS
_ANSWER_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 1.0  # between two questions to a worker how far it is
_MOST_QUESTIONS: Final = 100  # a second
_ROOM_SECONDS: Final = 60.0  # without any worker, until that is told
_MOST_LOSSES: Final = 3  # of workers at one shard, or while they load the model
_LONGEST_SOCKET: Final = 107  # characters of a Unix socket's path
_BELOW: Final = 64  # of them that Ray needs below its folder
_STORE_BYTES: Final = (
    100 << 20
)  # of Ray's memory for objects, of which a run on one machine needs next to none
_SENT: Final = ("onnx", "ncnn", "checkpoint")  # kinds of file that are sent to a worker that has none
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")
_NOT_MADE: Final = "error raised in its creation task"  # what Ray says of an actor whose class is not there


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its cores and GPUs, as Ray counts them."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How many workers a run has, the threads of each, and whether each has a GPU."""

    workers: int
    threads: int
    gpu: bool


def planned(
    nodes: Sequence[Node], shards: int, workers: int | None, threads: int | None, gpu: bool | None
) -> Plan:
    """The workers for so many shards: one a GPU, or else one a core, and fewer with more cores where shards are few.

    workers, threads: as they were typed. gpu: whether GPUs are wanted (None: where there are any).

    Raises SettingError where no machine has what a worker needs.
    """
    gpus = int(sum(node.gpus for node in nodes))
    if gpu and not gpus:
        raise SettingError("no machine of this Ray cluster has a GPU: leave --device out to run on its CPUs")
    largest = int(max((node.cpus for node in nodes), default=0))
    if threads and threads > largest > 0:
        raise SettingError(
            f"--threads {threads}: the largest machine of this Ray cluster has {plural(largest, 'CPU')}: choose at most"
            " that many"
        )
    if gpus and gpu is not False:
        return Plan(workers or min(gpus, shards), threads or 1, gpu=True)

    def room(size: int) -> int:
        return sum(int(node.cpus) // size for node in nodes)

    count = workers or max(1, min(room(threads or 1), shards))
    fitting = (size for size in range(largest, 1, -1) if room(size) >= count)
    return Plan(count, threads or next(fitting, 1), gpu=False)


@contextmanager
def connected(address: str | None, cores: int) -> Iterator[Any]:
    """Ray, in a cluster by the address of its head, as host:port; None: in one of so many cores that lives no longer.

    Raises DependencyError, SettingError where the address is none, BackendError where it does not answer.
    """
    # Before its import, which reads them. A token of our own, as Ray would keep one in the home folder.
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    ray = require("ray", "ray")
    _keep_quiet()
    where = _local(cores) if address is None else _cluster(ray, address)
    with where as options:
        try:
            _init(ray, options)
            yield ray
        finally:
            with signals_held(lambda: None):  # between its processes some would stay
                ray.shutdown()


def _keep_quiet() -> None:
    """Ray prints what befalls a machine, with pages of its log, on standard output, which is for results: -v tells."""

    def tell(data: Any, *rest: Any, **more: Any) -> None:
        logger.debug("Ray says: %s", data)

    # It has no setting for that: of a Ray that keeps it elsewhere, this changes nothing.
    if module := sys.modules.get("ray._private.worker"):
        vars(module)["print_to_stdstream"] = tell


@contextmanager
def _local(cores: int) -> Iterator[dict[str, Any]]:
    """The settings of a cluster of our own, which nobody else's machine reaches, in a folder that is removed."""
    folder = tempfile.mkdtemp(prefix="ddpm-ray-")
    if len(folder) > _LONGEST_SOCKET - _BELOW:
        Path(folder).rmdir()
        raise SettingError(
            f"Ray's sockets need a folder with a shorter name than {show(folder)}: set TMPDIR to one of at most 25 "
            "characters"
        )
    try:
        yield {
            "address": "local",
            "num_cpus": cores,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_temp_dir": folder,
            "_node_ip_address": "127.0.0.1",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[dict[str, Any]]:
    """The settings of a cluster that is there."""
    host, port = _parsed(address)
    if host in _LOCAL:  # which Ray takes for the machine's own address
        host = ray.util.get_node_ip_address()
    _require_answer(host, port, address)
    yield {"address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}


def _parsed(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if "/" in address or not (colon and host and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise SettingError(
            f"{show(address)} is not the address of a Ray cluster's head, as 10.0.0.1:6379, which ray start prints: "
            "give that, on a machine of the cluster"
        )
    return host.strip("[]"), int(port)


def _require_answer(host: str, port: int, address: str) -> None:
    """Raise BackendError unless something there speaks as Ray does: Ray itself would wait for minutes."""
    try:
        with socket.create_connection((host, port), _ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            connection.settimeout(_ANSWER_SECONDS)
            connection.sendall(_GREETING)
            head = connection.recv(_FRAME[0], socket.MSG_WAITALL)
    except TimeoutError as error:
        raise BackendError(
            f"{show(address)} did not answer within {_ANSWER_SECONDS:.0f} s: is that the address of a Ray cluster's "
            "head?"
        ) from error
    except (OSError, UnicodeError) as error:
        raise BackendError(
            f"{show(address)} does not answer ({one_line(error)}): is a Ray cluster's head running there?"
        ) from error
    if len(head) < _FRAME[0] or head[_FRAME[1]] != _FRAME[2]:
        raise BackendError(f"what answers at {show(address)} is no Ray cluster's head")


def _init(ray: Any, options: dict[str, Any]) -> None:
    """Start or join a cluster, quietly; SIGTERM, which Ray takes for itself, stays as it is."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many kinds
        hint = (
            " (a busy machine may be too slow for it: give the command again)"
            if "_temp_dir" in options
            else " (one that asks for a token wants RAY_AUTH_MODE=token here too)"
        )
        raise BackendError(f"Ray could not be started or joined: {one_line(error)}{hint}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def nodes_of(ray: Any) -> list[Node]:
    """The machines of a cluster that live."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in resources]


class _Actor(Worker):
    """A Worker as an actor of Ray."""

    def enter(self, job: Job, model: bytes | None = None) -> tuple[str, Opened | None]:
        """The id of the machine that it is on; and what `open` gives."""
        import ray

        return ray.get_runtime_context().get_node_id(), self.open(job, model)

    def deliver(self, folder: Folder, manifest: Manifest, number: int) -> tuple[bool, bytes | None]:
        """Make a shard: whether its bytes come back, and they, which are looked for only then."""
        data = self.make(folder, manifest, number)
        return data is not None, data


class _LostError(Exception):
    """A worker is gone, or what it made."""


@dataclass(eq=False)
class _Hand:
    """A worker as it is known here: what it has loaded, on which machine, and the shard that it is at."""

    actor: Any
    opened: Opened | None = None
    node: str = ""
    shard: int | None = None
    images: float = 0.0
    asked: bool = False  # how far it is


class Crew:
    """The workers of a run. model: that they load; job: how."""

    def __init__(self, ray: Any, plan: Plan, model: ModelFile, job: Job) -> None:
        self._ray, self._plan, self._model, self._job = ray, plan, model, job
        self._actor = ray.remote(concurrency_groups={"watch": 1})(_Actor).options(
            num_cpus=plan.threads, num_gpus=1 if plan.gpu else 0, max_restarts=0, max_task_retries=0
        )
        self._waits: dict[Any, tuple[_Hand, Callable[[_Hand, Any], None]]] = {}  # by the ref of an answer
        self._to_do: deque[int] = deque()
        self._left, self._given, self._images = set[int](), 0, 0
        self._meet: Callable[[Opened], None] = lambda opened: None
        self._losses: Counter[int | None] = Counter()  # of workers, by shard; None: while they loaded
        self._asked = 0.0
        self._sent: Any = None
        self._hands: list[_Hand] = []
        for _ in range(plan.workers):
            self._hire()

    def first(self) -> Opened:
        """Wait until a worker has loaded the model: what it says. Raises the error of one that cannot."""
        due = time.monotonic() + _ROOM_SECONDS
        while True:
            for hand in self._hands:
                if hand.opened:
                    return hand.opened
            self._turn()
            if time.monotonic() > due:
                due += _ROOM_SECONDS
                logger.info(
                    "still waiting for a worker, which takes %s: the cluster may have no room%s",
                    "a GPU" if self._plan.gpu else plural(self._plan.threads, "CPU") + " of one machine",
                    "; --threads 1 asks for less" if self._plan.threads > 1 else "",
                )

    def make(
        self,
        folder: Folder,
        manifest: Manifest,
        numbers: Iterable[int],
        meet: Callable[[Opened], None],
        tell: Callable[[float], None],
    ) -> None:
        """Make shards.

        meet: called with what each worker has loaded. tell: called with how many of their images are made, about once a
        second.

        Raises the error of a worker that has one, BackendError where too many are lost.
        """
        self._folder, self._manifest, self._meet = folder, manifest, meet
        self._to_do = deque(numbers)
        self._left, self._given, self._images = set(self._to_do), len(self._to_do), 0
        for hand in self._hands:
            if hand.opened:
                meet(hand.opened)
        while self._left:
            for hand in self._hands:
                if hand.opened and hand.shard is None:
                    self._give(hand)
            self._turn()
            self._ask()
            tell(self._images + sum(hand.images for hand in self._hands))

    @property
    def made(self) -> int:
        """How many shards were made so far."""
        return self._given - len(self._left)

    def close(self) -> None:
        """End all workers."""
        for hand in self._hands:
            self._end(hand)

    def _end(self, hand: _Hand) -> None:
        with suppress(Exception):  # it may be gone, and Ray too
            self._ray.kill(hand.actor)

    def _hire(self) -> None:
        """Ask for a worker more; it comes when there is room."""
        hand = _Hand(self._actor.remote())
        self._hands.append(hand)
        self._wait(hand.actor.enter.remote(self._job), hand, self._entered)

    def _wait(self, ref: Any, hand: _Hand, see: Callable[[_Hand, Any], None]) -> None:
        self._waits[ref] = hand, see

    def _turn(self) -> None:
        """Wait a moment for an answer, and see to it."""
        refs = list(self._waits)
        ready, _ = self._ray.wait(refs, timeout=_POLL_SECONDS, fetch_local=False)
        for ref in ready:
            hand, see = self._waits.pop(ref)
            if hand in self._hands:
                try:
                    see(hand, ref)
                except _LostError as error:
                    self._lose(hand, str(error))

    def _got(self, ref: Any) -> Any:
        """What a worker answered. Raises its error where it is one of ours, BackendError where it is another's."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, (DdpmDeployError, OSError, MemoryError)):
                raise error.cause from None
            raise BackendError(f"a worker failed: {one_line(error.cause)}") from error
        except errors.RayError as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            if _NOT_MADE in said[0]:  # by its class, which does nothing but be imported
                raise DependencyError(
                    f"a machine of the cluster cannot load ddpm-deploy {__version__} ({said[-1]}): install that, with "
                    "what runs the model, on each of them"
                ) from error
            raise _LostError(first_line(Exception(said[-1]))) from error

    def _entered(self, hand: _Hand, ref: Any) -> None:
        """A worker has loaded the model, or has no such file."""
        hand.node, hand.opened = self._got(ref)
        if hand.opened:
            self._losses[None] = 0
            self._meet(hand.opened)
        else:
            self._wait(hand.actor.enter.remote(self._job, self._sent_model()), hand, self._entered)

    def _sent_model(self) -> Any:
        """The model's file, in Ray's memory for objects."""
        if self._model.kind not in _SENT:
            raise ArtefactError(
                f"a worker does not have {self._model.name}, and an engine is not sent to it: put it under the same "
                "path on every machine, or give the .onnx, whose engine is built there"
            )
        if self._sent is None:
            logger.info("a worker does not have %s: it is sent there", self._model.name)
            self._sent = self._ray.put(self._model.path.read_bytes())
        return self._sent

    def _give(self, hand: _Hand) -> None:
        """Give the next shard to a worker, where there is one."""
        hand.images, hand.shard = 0.0, self._to_do.popleft() if self._to_do else None
        if hand.shard is not None:
            deliver = hand.actor.deliver.options(num_returns=2)
            returned, data = deliver.remote(self._folder, self._manifest, hand.shard)
            self._wait(returned, hand, partial(self._delivered, data))

    def _delivered(self, data: Any, hand: _Hand, ref: Any) -> None:
        """A shard is made; its bytes come while its worker makes the next."""
        returned, number = self._got(ref), hand.shard
        assert number is not None
        self._give(hand)
        if returned:
            try:
                put_shard(Path(self._folder.path), self._manifest, number, self._got(data))
            except _LostError as error:
                logger.warning("%s was lost (%s): it is made again", self._name(number), error)
                self._to_do.appendleft(number)
                return
        self._left.discard(number)
        self._images += self._manifest.part(number).count

    def _name(self, number: int) -> str:
        return self._manifest.shard_name(number)

    def _lose(self, hand: _Hand, reason: str) -> None:
        """A worker is gone: another comes in its place, and its shard is given out again."""
        self._hands.remove(hand)
        self._end(hand)
        number, at = hand.shard, "loading the model"
        if hand.opened and number is None and self._hands:
            return  # it had nothing to do any more
        if number is not None:
            self._to_do.appendleft(number)
            at = f"making {self._name(number)}"
        if any(node["NodeID"] == hand.node and node["Alive"] for node in self._ray.nodes()) or not hand.node:
            self._losses[number] += 1
        if self._losses[number] >= _MOST_LOSSES:
            raise BackendError(
                f"{_MOST_LOSSES} workers in turn were lost while {at} ({reason}): they may lack memory, and Ray's "
                "logs say more"
            )
        logger.warning("a worker was lost while %s (%s): another takes its place", at, reason)
        self._hire()

    def _ask(self) -> None:
        """Ask the workers how far they are, from time to time."""
        busy = [hand for hand in self._hands if hand.shard is not None and not hand.asked]
        now = time.monotonic()
        if now - self._asked < max(_POLL_SECONDS, len(busy) / _MOST_QUESTIONS):
            return
        self._asked = now
        for hand in busy:
            hand.asked = True
            ask = hand.actor.images.options(concurrency_group="watch")
            self._wait(ask.remote(), hand, partial(self._answered, hand.shard))

    def _answered(self, number: int | None, hand: _Hand, ref: Any) -> None:
        hand.asked, images = False, self._got(ref)
        if hand.shard == number:
            hand.images = images
