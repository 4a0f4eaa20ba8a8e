"""The page at `/`: three files that are sent as they lie here, and ask nothing of any other site."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

_FILES: Final = {"": "index.html", "page.css": "page.css", "page.js": "page.js"}
_HEADERS: Final = {
    # Nothing but these files and this server's answers; pictures come in JSON, hence `data:`.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and sent again where it changed
}


def router() -> APIRouter:
    """The routes of the page, which need no API key: what the page asks does."""
    routes = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        routes.add_api_route(f"/{path}", _sender(Path(__file__).parent / name), methods=["GET", "HEAD"])
    return routes


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(file, headers=_HEADERS)

    return send
