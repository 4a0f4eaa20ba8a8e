"""Server-sent events: a response that ends when its reader goes, and says so."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

QUIET: Final = 15.0  # seconds, after which a line says that the connection lives
SILENCE: Final = ": still here\n\n"


def event(name: str, data: Any) -> str:
    """One event; data as JSON, which has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class EventStream(StreamingResponse):
    """A response of events. over: called when it ends, also where its reader goes before that."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], object] = lambda: None) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
