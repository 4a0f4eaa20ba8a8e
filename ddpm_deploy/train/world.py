"""The processes that train one model together, each on its slice of every batch. A process alone is a world of one.

A launcher such as torchrun starts them all with the same command line, and tells each in its environment which it is.
Whatever they must agree on goes through gloo, on the CPU, so that no GPU is waited for; gradients and losses go
through NCCL where the networks are on GPUs.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from ddpm_deploy.errors import BackendError, DdpmDeployError, SettingError, first_line, plural
from ddpm_deploy.train.network import torch_device

logger = logging.getLogger(__name__)

_JOIN: Final = timedelta(minutes=5)  # for all processes to be there
_ANSWER: Final = timedelta(minutes=30)  # for the slowest of them, which may be reading images
_FAILED: Final = "failed"  # the key under which the first process to fail puts itself

Made = TypeVar("Made")


class ToldElsewhereError(Exception):
    """Another process of the same training failed before, and tells why: this one ends in silence."""


class World:
    """One process's view of all that train a model together.

    rank: its number, from 0. size: how many there are. local_rank, local_size: the same of those on this machine.
    launched: whether a launcher started it, which will also pass signals on to it.

    Raises SettingError where the numbers do not go together.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        *,
        launched: bool = False,
    ) -> None:
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise SettingError(
                f"RANK {rank} of WORLD_SIZE {size} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size} do not "
                "go together: start all processes with torchrun, which sets them"
            )
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.launched = launched

    @classmethod
    def of_environment(cls) -> "World":
        """What a launcher said of this process; a world of one where there is none.

        Raises SettingError where that is incomplete, or no numbers.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        return cls(
            _number("RANK"),
            _number("WORLD_SIZE"),
            _number("LOCAL_RANK", 0),
            _number("LOCAL_WORLD_SIZE", 1),
            launched=True,
        )

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """Those of a batch that are this process's; of one that does not divide evenly, some have a row more.

        Raises SettingError as `most_rows`.
        """
        self.most_rows(batch)
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def most_rows(self, batch: int) -> int:
        """Rows of a batch that a process has, or the one that has the most.

        Raises SettingError where there is not one for each process.
        """
        if batch < self.size:
            raise SettingError(
                f"a batch of {plural(batch, 'image')} cannot be shared by {plural(self.size, 'process')}: start at "
                f"most {batch}, or train with a larger --batch-size"
            )
        return -(-batch // self.size)

    def device(self, name: str) -> torch.device:
        """The torch device of that name for this process: of several GPUs, the one that has its number.

        Raises SettingError where there is none, or where the name is of one GPU for several processes.
        """
        if name == "auto":
            name = str(torch_device(name))
        if name == "cuda" and torch.cuda.is_available():
            name = f"cuda:{self._gpu()}"
        elif self.local_size > 1 and name.startswith("cuda:"):
            raise SettingError(
                f"{plural(self.local_size, 'process')} of this machine cannot share {name}: pass --device cuda, and "
                "each takes its own GPU"
            )
        device = torch_device(name)
        if self.size > 1 and device.type not in ("cpu", "cuda"):
            raise SettingError(f"several processes train on cpu or cuda, and not on {name}: choose one")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what NCCL goes by
        return device

    def _gpu(self) -> int:
        """The number of this process's GPU."""
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus:
            raise SettingError(
                f"{plural(self.local_size, 'process')} on this machine need a GPU each, and PyTorch sees {gpus}: pass "
                f"--nproc-per-node {gpus} to torchrun, or --device cpu"
            )
        return self.local_rank

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Meet the other processes, and part at the end.

        Of all that fail, one alone tells why: where an error leaves this context, others may have failed for the same
        reason, or for want of this process. The first keeps its error, and the others raise ToldElsewhereError.
        Raises BackendError where the others do not come.
        """
        if self.size == 1:
            yield
            return
        store = self._meet()
        try:
            yield
        except ToldElsewhereError:
            raise
        except BaseException as error:
            if not self._is_first(store):
                raise ToldElsewhereError from error
            if self.rank and isinstance(error, DdpmDeployError | OSError):
                raise BackendError(f"in process {self.rank} (of 0 to {self.size - 1}): {error}") from error
            raise
        dist.destroy_process_group()  # not after an error: on GPUs it would wait for processes that are lost

    def _meet(self) -> Any:
        """Form the group of all processes; gives what they share beside it."""
        try:
            store, *_ = next(rendezvous("env://", self.rank, self.size, timeout=_JOIN))
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            shared = PrefixStore("ddpm_deploy", store)
            dist.init_process_group(
                backends, store=shared, rank=self.rank, world_size=self.size, timeout=_ANSWER
            )
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise BackendError(
                f"the {self.size} processes of this training did not meet at {where} ({first_line(error)}): start them "
                "with torchrun, at an address that all machines reach"
            ) from error
        return shared

    def _is_first(self, store: Any) -> bool:
        """Whether no other process has failed yet."""
        try:
            first: bytes = store.compare_set(_FAILED, "", str(self.rank))
        except RuntimeError:  # who kept it has gone
            return True
        return first == str(self.rank).encode()

    def alike(self, make: Callable[[], Made], says: Callable[[Made], str]) -> Made:
        """What every process makes for itself, once all have, and what it says of itself is the same for all.

        Where some fail, the error is raised in the first of them, and in the others ToldElsewhereError. Raises
        SettingError in process 0 where they made different things.
        """
        if self.size == 1:
            return make()
        failure: Exception | None = None
        mine = bytes(32)
        try:
            made = make()
            mine = hashlib.sha256(says(made).encode()).digest()
        except Exception as error:
            failure = error
        all_said = self._gathered(mine)
        failed = [rank for rank, said in enumerate(all_said) if said == bytes(32)]
        if failure and failed[0] == self.rank:
            raise failure
        if failed:
            raise ToldElsewhereError from failure
        other = [rank for rank, said in enumerate(all_said) if said != all_said[0]]
        if other and self.rank:
            raise ToldElsewhereError
        if other:
            raise SettingError(
                f"process {other[0]} has other images, settings or another checkpoint than process 0: give all "
                "machines the same files, the same command line and the same versions"
            )
        return made

    def _gathered(self, mine: bytes) -> list[bytes]:
        """What each process has, all of one length, by rank."""
        parts = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(self.size)]
        with self.reaching():
            dist.all_gather(parts, torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        return [part.numpy().tobytes() for part in parts]

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag up; all wait for all."""
        if self.size == 1:
            return flag
        up = torch.tensor([flag], dtype=torch.uint8)
        with self.reaching():
            dist.all_reduce(up, dist.ReduceOp.MAX)
        return bool(up.item())

    def total(self, share: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size == 1:
            return share
        whole = share.clone()
        with self.reaching():
            dist.all_reduce(whole)
        return whole

    def shared(self, network: nn.Module) -> nn.Module:
        """The network, such that a backward pass leaves the mean of all processes' gradients in each.

        All must make it together, and start from process 0's weights.
        """
        if self.size == 1:
            return network
        with self.reaching():
            return DistributedDataParallel(network, gradient_as_bucket_view=True)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Say of what gloo and NCCL raise what it means. Raises BackendError."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if not isinstance(error, dist.DistError) and not any(
                name in text for name in ("gloo", "nccl", "connection")
            ):
                raise
            late = f"did not answer for {_ANSWER.total_seconds() / 60:.0f} minutes"
            what = late if "timed out" in text or "timeout" in text else "has ended"
            raise BackendError(
                f"another process of this training {what} ({_said(error)}): look for what it said, and continue with "
                "--resume where a checkpoint was saved"
            ) from error


def _said(error: Exception) -> str:
    """What gloo says, without the line of its source before it and the advice after it."""
    line = first_line(error)
    return (line.partition("] ")[2] if line.startswith("[") else line).partition(". ")[0]


def kept_apart(network: nn.Module) -> AbstractContextManager[None]:
    """While it is entered, a backward pass through what `World.shared` gave adds to this process's gradients alone."""
    return getattr(network, "no_sync", nullcontext)()


def _number(name: str, default: int | None = None) -> int:
    """A variable of the environment."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal()):
        got = f"is {text!r}, which is no number" if text else "is missing"
        raise SettingError(
            f"WORLD_SIZE is set, and {name} {got}: start all processes with torchrun, or unset WORLD_SIZE"
        )
    return int(text)


ALONE: Final = World()
