"""Requests that nobody waits for: kept by an id that cannot be guessed, until they are old or there are too many."""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ddpm_deploy.serve.feed import Feed
from ddpm_deploy.serve.handle import Handle
from ddpm_deploy.serve.refusals import RefusedError, busy, invalid
from ddpm_deploy.serve.settings import Settings
from ddpm_deploy.spec import ModelSpec

_MOST: Final = 4096  # results, however small


@dataclass(eq=False)
class Kept:
    """A request and, once it is done, its images.

    spec: of the model that makes them. fetched: whether somebody had them.
    """

    id: str
    handle: Handle
    spec: ModelSpec
    created: float = field(default_factory=time.time)
    fetched: bool = False
    feed: Feed | None = None

    @property
    def size(self) -> int:
        """Bytes of its images."""
        numbers = self.handle.request.count * int(np.prod(self.spec.image_shape))
        return numbers * np.dtype(np.float32).itemsize

    def watched(self) -> Feed:
        """Its previews, from the first time that somebody asks for them."""
        self.feed = self.feed or Feed(self.handle)
        return self.feed


class Results:
    """What is kept, the oldest first. Of one event loop, and no other thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, Kept] = {}
        self._bytes = 0  # of all that is kept, and of what is on its way

    def __len__(self) -> int:
        return len(self._kept)

    def _fits(self, size: int) -> bool:
        return self._bytes + size <= self._settings.keep_bytes and len(self._kept) < _MOST

    def _require_room(self, size: int) -> None:
        """Let go of the oldest that are done, so that there is room for one more.

        Raises RefusedError where there is none.
        """
        most = self._settings.keep_bytes
        if size > most:
            raise invalid(
                f"the images take {size} bytes, and results may take {most}: ask for fewer", "count"
            )
        for kept in self.all():
            if self._fits(size):
                return
            if kept.handle.done():
                self.drop(kept)
        if not self._fits(size):
            raise busy("too many results are on their way: ask again later", 1)

    def keep(self, handle: Handle, spec: ModelSpec) -> Kept:
        """Keep a request, and its images for some time after it is done. Raises RefusedError where there is no room."""
        kept = Kept(self.new_id(), handle, spec)
        self.put(kept)
        return kept

    def new_id(self) -> str:
        """An id that cannot be guessed."""
        return secrets.token_urlsafe(16)

    def put(self, kept: Kept) -> None:
        """The same of one that has an id already."""
        self._require_room(kept.size)
        self._kept[kept.id] = kept
        self._bytes += kept.size
        kept.handle.add_done_callback(self._aging(kept.id))

    def _aging(self, id: str) -> Callable[[object], None]:
        """What is called when a request is done. By its id, so that it does not keep what was dropped in memory."""
        loop = asyncio.get_running_loop()

        def expire() -> None:
            if kept := self._kept.get(id):
                self.drop(kept)

        def done(_: object) -> None:  # in the batcher's thread
            if not loop.is_closed():
                loop.call_soon_threadsafe(loop.call_later, self._settings.keep_seconds, expire)

        return done

    def has(self, id: str) -> bool:
        """Whether something is kept by an id."""
        return id in self._kept

    def all(self) -> list[Kept]:
        """All that is kept, the oldest first."""
        return list(self._kept.values())

    def get(self, id: str) -> Kept:
        """What is kept by an id. Raises RefusedError where that is nothing."""
        kept = self._kept.get(id)
        if kept is None:
            raise RefusedError(
                404,
                "there is no such sample here: it expired, was deleted, never was, or is of another worker",
                "not_found",
            )
        return kept

    def drop(self, kept: Kept) -> None:
        """Forget it, and call it off where it is not done."""
        if self._kept.pop(kept.id, None):
            self._bytes -= kept.size
        kept.handle.cancel()

    def unfetched(self) -> bool:
        """Whether anything is on its way, or done and nobody had it."""
        return any(not kept.fetched for kept in self._kept.values())
