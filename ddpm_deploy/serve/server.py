"""A process of its own for one model: uvicorn, which waits for nobody for ever, and finishes what it took before it
goes."""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ddpm_deploy.errors import SettingError
from ddpm_deploy.serve.http import answer_of
from ddpm_deploy.serve.refusals import RefusedError, retry_after
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import HEAD_SECONDS, WRITE_SECONDS

logger = logging.getLogger(__name__)
# uvicorn's own of a connection: what is wrong with a stranger's bytes is told to him, and fills no log.
_failures = logging.getLogger("uvicorn.error.connection")
_failures.setLevel(logging.ERROR)

_KEEP_ALIVE: Final = 30  # seconds that a connection may be without a request
_CLOSING: Final = 5  # seconds in which answers are read, once all are written
_MOST_HEAD: Final = 1 << 14  # bytes


class Protocol(H11Protocol):
    """HTTP of one connection, with an end to waiting: for the head of its first request, for what comes after an answer
    and is no whole head, and for a reader who reads nothing. (uvicorn itself has one for the silence between two
    requests, and bodies have theirs in `bodies`.) What is no HTTP, and one connection too many, are told in the form
    that all errors have."""

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.logger, self._whole_app = _failures, self.app
        self._most, self.limit_concurrency = self.limit_concurrency or sys.maxsize, None

    def handle_events(self) -> None:
        """Act on what has arrived."""
        full = max(len(self.connections), len(self.tasks)) >= self._most
        self.app = _full if full else self._whole_app
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, unless an answer is under way or done."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = JSONResponse(
                _NO_HTTP.to_builtins(), status_code=_NO_HTTP.status, headers=_NO_HTTP.headers
            )
            head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        """Somebody connected."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # what is not read is paused for, however little
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Some of a request came."""
        known = self.scope
        super().data_received(data)
        if self.scope is not known:  # a whole head
            _cancel(self._head)
            self._head = None
        elif self._head is None and (self.cycle is None or self.cycle.response_complete):
            # A part of the next, or a body that was answered unread. It ended uvicorn's own wait.
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """More was written than is read."""
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def _await_reader(self, left: int) -> None:
        """Give up on a reader who takes nothing of so many bytes."""

        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < left:
                self._await_reader(now)
            else:
                self.transport.abort()

        self._reader = self.loop.call_later(WRITE_SECONDS, look)

    def resume_writing(self) -> None:
        """It was read."""
        super().resume_writing()
        _cancel(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        _cancel(self._head)
        _cancel(self._reader)
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: what a stranger asks for is no fault of this server, nor of what is installed."""


_NO_HTTP: Final = RefusedError(
    400, "what was sent is no HTTP that this server reads", "not_http", headers={"Connection": "close"}
)


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """The application while too many are connected."""
    refusal = RefusedError(
        503,
        "too many connections are open: try again later",
        "unavailable",
        headers={"Connection": "close", **retry_after(1)},
    )
    await answer_of(refusal, HttpRequest(scope))(scope, receive, send)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """Serves until a signal; then it takes no more requests, and ends when those that it took are done and were had, or
    after `patience` seconds; at a second signal at once."""

    def __init__(self, app: FastAPI, service: Service, patience: float, connections: int) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_CLOSING,
            limit_concurrency=connections,
            h11_max_incomplete_event_size=_MOST_HEAD,
        )
        super().__init__(config)
        self._service, self._patience = service, patience
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. It is not raised again at the end: an end that was asked for is no failure."""
        if self._until is not None:
            if sig != signal.SIGHUP:  # a terminal that closes may send several
                self.should_exit = self.force_exit = True
            return
        logger.info("finishing what was taken, for at most %.0f s (again: stop at once)", self._patience)
        self._until = time.monotonic() + self._patience
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._until is not None and (self._service.drained or time.monotonic() > self._until):
            self.should_exit = True
        if self.should_exit:  # those who still wait are told so, while there is somebody to tell them
            self._service.call_off()
        return await super().on_tick(counter)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, before anything long begins. Raises SettingError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise SettingError(
            f"{host}:{port} cannot be listened at: {reason} (choose another --host or --port)"
        ) from error
    # asyncio sets it for sockets whose protocol it sees, and those of create_server do not say theirs: without it, the
    # body of an answer waits some 40 ms for the other side to confirm the head. Connections inherit it.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with found:
        yield found


def url_of(found: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = found.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
