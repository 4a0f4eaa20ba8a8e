"""Results that another replica of the service has: whichever is asked, the one that has them answers.

An id begins with the name of the replica that made it, and a dot. A replica that goes gives what it has to another, so
the maker is asked first, and then all. What carries the questions is `Peers`; no route knows of this, as it is
`Results.get` that finds out.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.serve.handle import Handle
from ddpm_deploy.serve.refusals import RefusedError, retry_after, unready
from ddpm_deploy.serve.results import Kept, Results
from ddpm_deploy.serve.settings import Settings
from ddpm_deploy.spec import ModelSpec

_PAUSES: Final = (
    0.0,
    0.1,
    0.4,
    1.0,
)  # seconds before asking again: results move, and names take a while to spread
_CARRIED: Final = ("type", "method", "path", "root_path", "query_string", "headers", "http_version", "scheme")


class ElsewhereError(Exception):
    """The results of an id are not here."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id


class NamedResults(Results):
    """Results whose ids begin with the name of a replica. kept: told of each that is made here."""

    def __init__(self, settings: Settings, replica: str, kept: Callable[[Kept], object]) -> None:
        super().__init__(settings)
        self._replica, self._told = replica, kept

    def new_id(self) -> str:
        """An id that cannot be guessed, but for who made it."""
        return f"{self._replica}.{super().new_id()}"

    def keep(self, handle: Handle, spec: ModelSpec) -> Kept:
        """As `Results.keep`."""
        kept = super().keep(handle, spec)
        self._told(kept)
        return kept

    def get(self, id: str) -> Kept:
        """As `Results.get`; raises ElsewhereError where another may have it."""
        if not self.has(id) and maker_of(id) != self._replica:
            raise ElsewhereError(id)
        return super().get(id)


def maker_of(id: str) -> str:
    """The name of the replica that made an id; empty where none did."""
    name, dot, _ = id.partition(".")
    return name if dot and name.isascii() and name.isalnum() and len(name) < 64 else ""


class Peers(Protocol):
    """The replicas of a service, as one of them reaches the others."""

    def ask(self, replica: str, id: str, scope: Scope) -> AsyncIterator[Message]:
        """What a replica answers; nothing where it is not reached, or does not have what is asked for."""

    async def holder(self, id: str) -> str | None:
        """The name of the replica that has the results of an id."""

    async def lives(self, replica: str) -> bool:
        """Whether a replica has not ended: it may be finishing what it took, and is asked no more."""


class PassedOn(Response):
    """The answer that the replica which has the results of an id gives."""

    def __init__(self, id: str, peers: Peers) -> None:
        super().__init__()
        self._id, self._peers = id, peers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        maker = replica = maker_of(self._id)
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            if replica and await self._asked(replica, scope, send):
                return
            found = await self._peers.holder(self._id) if maker else None
            if found is None:
                break
            replica = found
        going = bool(maker) and await self._peers.lives(maker)
        await self._unreached(going, scope)(scope, receive, send)

    async def _asked(self, replica: str, scope: Scope, send: Send) -> bool:
        answered = False
        async for message in self._peers.ask(replica, self._id, carried(scope)):
            answered = True
            await send(message)
        return answered

    def _unreached(self, going: bool, scope: Scope) -> Response:
        """What is said where nobody has it whom one can ask. going: whether its maker is finishing what it took."""
        if going and scope["method"] == "GET" and not scope["path"].endswith("/events"):
            fields = {"id": self._id, "status": "running"}
            return JSONResponse(fields, status_code=202, headers=retry_after(1))
        error = unready("the replica that has it is going down: ask again") if going else _lost()
        return JSONResponse(error.to_builtins(), status_code=error.status, headers=dict(error.headers))


def _lost() -> RefusedError:
    return RefusedError(
        404,
        "there is no such sample: it expired, was deleted, never was, or was lost with its replica",
        "not_found",
    )


def carried(scope: Scope) -> dict[str, Any]:
    """What another process needs of a request without a body."""
    return {name: scope[name] for name in _CARRIED if name in scope} | {"client": None, "server": None}


async def messages_of(app: ASGIApp, scope: Scope) -> AsyncIterator[Message]:
    """What an application answers to a request without a body, as it comes; it is called off with its reader."""
    answer: asyncio.Queue[Message | None] = asyncio.Queue()
    asked = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not asked:
            await asyncio.Event().wait()  # it never disconnects: it is cancelled
        return asked.pop()

    async def run() -> None:
        try:
            await app(scope, receive, answer.put)
        finally:
            answer.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (message := await answer.get()) is not None:
            yield message
        await running
    finally:
        running.cancel()


@dataclass(frozen=True)
class Moved:
    """A request that is over, on its way from a replica that goes to another. outcome: as of `Handle.over`."""

    id: str
    created: float
    fetched: bool
    spec: ModelSpec
    request: Request
    outcome: Array | BaseException | None

    @classmethod
    def of(cls, kept: Kept) -> Self:
        """Of one whose handle is done."""
        handle = kept.handle
        outcome = None if handle.cancelled() else handle.exception() or handle.result()
        return cls(kept.id, kept.created, kept.fetched, kept.spec, handle.request, outcome)

    def kept(self) -> Kept:
        """As its new replica keeps it."""
        handle = Handle.over(self.request, self.outcome)
        return Kept(self.id, handle, self.spec, self.created, self.fetched)
