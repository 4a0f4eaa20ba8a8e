"""The web application: every route over one model.

from ddpm_deploy.serve.http import create_app

app.mount("/images", create_app(batcher))  # in a FastAPI or Starlette application of your own

`ddpm-serve` runs the same (`serve.server`).
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpm_deploy.files import show
from ddpm_deploy.serve import inference, openai, page, samples
from ddpm_deploy.serve.batcher import Batcher
from ddpm_deploy.serve.bodies import GoneError
from ddpm_deploy.serve.document import document
from ddpm_deploy.serve.openapi import StateAnswer, answer, error_answers, media
from ddpm_deploy.serve.refusals import ErrorAnswer, RefusedError, refusal_of
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import Settings
from ddpm_deploy.version import __version__

_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_GONE: Final = 499  # nobody reads it: the log alone has it


def create_app(batcher: Batcher, settings: Settings | None = None) -> FastAPI:
    """The application over a batcher, which stays its maker's to close. It may be mounted in another."""
    return app_of(Service(batcher.spec, settings or Settings(), batcher))


def app_of(service: Service) -> FastAPI:
    """The application over a service, whose batcher may come later."""
    app = app_without_metrics(service)
    app.include_router(_metrics(service), **_guards(service.settings))
    return app


def app_without_metrics(service: Service) -> FastAPI:
    """The same for one of several that answer at one address, and whose numbers are asked for in another way."""
    settings = service.settings
    app = FastAPI(title="ddpm-deploy", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(samples.router(service), **_guards(settings))
    app.include_router(openai.router(service), **_guards(settings))
    app.include_router(inference.router(service, _guards(settings, inference.InferError)))
    app.include_router(_state(service))
    app.include_router(_document(service), **_guards(settings))
    _add_errors(app)
    app.add_middleware(_Counted, service=service)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Prefer", "X-API-Key"],
            expose_headers=["Location", "Retry-After", "X-Seed", "Preference-Applied"],
        )
    app.include_router(page.router())
    return app


def _state(service: Service) -> APIRouter:
    """How the service is, for those who watch over it."""
    routes = APIRouter(tags=["state"])

    @routes.get(
        "/health",
        summary="Whether the process answers",
        responses=answer(200, "It does", media(StateAnswer)),
    )
    async def health() -> JSONResponse:
        return JSONResponse(StateAnswer(status="ok"))

    @routes.get(
        "/ready",
        summary="Whether requests are taken",
        responses={**answer(200, "They are", media(StateAnswer)), **error_answers(503)},
    )
    async def ready() -> JSONResponse:
        service.require_ready()
        return JSONResponse(StateAnswer(status="ready"))

    return routes


def _metrics(service: Service) -> APIRouter:
    """What it did, for Prometheus."""
    routes = APIRouter(tags=["state"])
    text = {"text/plain": {"schema": {"type": "string"}}}

    @routes.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses=answer(200, "The numbers", text),
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes


def _document(service: Service) -> APIRouter:
    """What it can do, for programs."""
    routes = APIRouter()

    @routes.get("/openapi.json", include_in_schema=False)
    async def openapi(http: HttpRequest) -> JSONResponse:
        app: FastAPI = http.app
        if app.openapi_schema is None:
            app.openapi_schema = document(app, service.spec, service.settings)
        return JSONResponse(app.openapi_schema)

    return routes


# --- who may ask --------------------------------------------------------------------------------------------

_BEARER: Final = HTTPBearer(auto_error=False, description="One of the keys that the server was started with")
_KEY: Final = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same in a header of its own")


def _guards(settings: Settings, kind: type = ErrorAnswer) -> dict[str, Any]:
    """What routes have that are not for everybody: dependencies, and what these answer. kind: the form of an error."""
    checks = [require_site(settings), *([require_key(settings)] if settings.api_keys else [])]
    statuses = (401, 403) if settings.api_keys else (403,)
    return {
        "dependencies": [Depends(check) for check in checks],
        "responses": error_answers(*statuses, kind=kind),
    }


def require_key(settings: Settings) -> Callable[..., None]:
    """A dependency that refuses who shows none of the keys.

    All of them are compared, each in a time that does not tell how much of it was right.
    """
    keys = [key.encode() for key in settings.api_keys]

    def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None,
        key: Annotated[str | None, Depends(_KEY)] = None,
    ) -> None:
        shown = (bearer.credentials if bearer else key or "").encode()
        right = [hmac.compare_digest(shown, each) for each in keys]
        if not any(right):
            raise RefusedError(
                401,
                "this server needs an API key: send the header Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def require_site(settings: Settings) -> Callable[..., None]:
    """A dependency that refuses what a page of another site asks: a browser sends it without asking its user, also to
    servers that nobody but he can reach.

    A page may also be of a site whose name was made to lead here after it was loaded: then it is no other site to the
    browser, and the name alone tells.
    """

    def check(http: HttpRequest) -> None:
        host = http.headers.get("host", "")
        if settings.allow_hosts is not None and not _is_own(host, settings.allow_hosts):
            raise RefusedError(
                403, f"this server is not called {show(host[:100])}: see --allow-host", "foreign_host"
            )
        origin = http.headers.get("origin")
        if origin is None or http.method in _SAFE or origin in settings.allow_origins:
            return
        if "*" not in settings.allow_origins and origin.partition("://")[2] != host:
            raise RefusedError(
                403,
                f"pages of {show(origin[:100])} may not ask this server: see --allow-origin",
                "foreign_origin",
            )

    return check


def _is_own(host: str, names: tuple[str, ...]) -> bool:
    """Whether a header Host is of this machine, by name or address, or one of some names. Browsers always send one."""
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")
    if name in ("", "localhost", *names) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# --- errors -------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    """Every error in the form that its route has for them."""

    async def refused(http: HttpRequest, error: Exception) -> Response:
        return answer_of(refusal_of(error), http)

    async def gone(http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=_GONE)

    async def of_framework(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else "invalid_request"
        told = {"Allow": ", ".join(_methods_at(http))} if error.status_code == 405 else error.headers or {}
        return answer_of(RefusedError(error.status_code, str(error.detail), code, headers=told), http)

    async def invalid(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        refusal = RefusedError(422, str(first["msg"]), "invalid_value", str(first["loc"][-1]))
        return answer_of(refusal, http)

    handlers: dict[Any, Callable[[HttpRequest, Exception], Awaitable[Response]]] = {
        RefusedError: refused,
        GoneError: gone,
        HTTPException: of_framework,
        RequestValidationError: invalid,
        Exception: refused,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _methods_at(http: HttpRequest) -> list[str]:
    """The methods that some route takes there. The framework names those of the first route alone."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "POST")
        if any(route.matches({**http.scope, "method": method})[0] is Match.FULL for route in http.app.routes)
    ]


def answer_of(refusal: RefusedError, http: HttpRequest) -> Response:
    """A refusal as an answer, in the form of whatever was asked."""
    path = http.scope["path"].removeprefix(http.scope.get("root_path", ""))
    if path == "/v2" or path.startswith("/v2/"):
        return inference.answer_of(refusal)
    return JSONResponse(
        refusal.to_builtins(), status_code=refusal.status, headers=dict(refusal.headers) or None
    )


class _Counted:
    """Counts the answers, by status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.answered(message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
