"""A client of HTTP/1.1 for `soak`: one that also does what no decent client does."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import h11

LONG: Final = 120.0  # seconds that no answer takes


@dataclass(frozen=True)
class Answer:
    """What a server answered. headers: their names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)


class Connection:
    """One connection, for any number of requests. Raises ConnectionError where the server closes it, TimeoutError where
    it does not answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, address: tuple[str, int], *, receive_buffer: int | None = None) -> Self:
        """Connect. receive_buffer: bytes that the kernel keeps of what is not read."""
        found = socket.socket(socket.AF_INET)
        if receive_buffer:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        found.setblocking(False)
        await asyncio.get_running_loop().sock_connect(found, address)
        limit = receive_buffer or 1 << 16
        return cls(*await asyncio.open_connection(sock=found, limit=limit))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Go, whatever is under way."""
        self._writer.transport.abort()

    async def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """A request, and its whole answer."""
        await self.begin(method, path, body, **headers)
        return await self.answer()

    async def begin(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """A request. headers: `_` stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        fields = {"Host": "localhost", "Content-Length": str(len(body)), **named}
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        events: Iterable[h11.Event] = (
            h11.Request(method=method, target=path, headers=list(fields.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        await self.send(b"".join(self._http.send(event) or b"" for event in events))

    async def answer(self, *, pause: float = 0.0, piece: int = 1 << 16) -> Answer:
        """The answer to it. pause: seconds before each `piece` bytes are read."""
        head = await self.head(piece)
        body = b"".join([part async for part in self.parts(pause=pause, piece=piece)])
        return Answer(head.status, head.headers, body)

    async def head(self, piece: int = 1 << 16) -> Answer:
        """The head of the answer."""
        event = await self._event(piece)
        assert isinstance(event, h11.Response), event
        headers = {name.decode(): value.decode() for name, value in event.headers}
        return Answer(event.status_code, headers, b"")

    async def parts(self, *, pause: float = 0.0, piece: int = 1 << 16) -> AsyncIterator[bytes]:
        """What stands behind the head, as it comes."""
        while not isinstance(event := await self._event(piece), h11.EndOfMessage):
            assert isinstance(event, h11.Data), event
            yield bytes(event.data)
            if pause:
                await asyncio.sleep(pause)

    async def _event(self, piece: int) -> h11.Event:
        try:
            async with asyncio.timeout(LONG):
                while (event := self._http.next_event()) is h11.NEED_DATA:
                    self._http.receive_data(await self._reader.read(piece))
        except h11.RemoteProtocolError as error:  # it ended amid an answer
            raise ConnectionResetError(str(error)) from error
        if isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError("the server closed the connection")
        assert isinstance(event, h11.Event)
        return event

    async def closed(self, within: float) -> bool:
        """Whether the server closes it within so many seconds; what it says before that is not looked at."""
        try:
            async with asyncio.timeout(within):
                while await self._reader.read(1 << 16):
                    pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True
