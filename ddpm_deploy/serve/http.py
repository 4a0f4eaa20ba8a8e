"""The web application: every route over one model.

from ddpm_deploy.serve.http import create_app

app.mount("/images", create_app(batcher))  # in a FastAPI or Starlette application of your own

`ddpm-serve` runs the same (`serve.server`).
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpm_deploy.serve import inference, openai, page, samples
from ddpm_deploy.serve.batcher import Batcher
from ddpm_deploy.serve.bodies import GoneError
from ddpm_deploy.serve.openapi import error_answers
from ddpm_deploy.serve.refusals import RefusedError, refusal_of
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
    app = FastAPI(title="ddpm-deploy", version=__version__, docs_url=None, redoc_url=None)
    guarded = [Depends(require_key(service.settings)), Depends(require_site(service.settings))]
    app.include_router(samples.router(service), dependencies=guarded)
    app.include_router(openai.router(service), dependencies=guarded)
    app.include_router(inference.router(service, guarded))
    _add_state(app, service, guarded)
    _add_errors(app)
    app.add_middleware(_Counted, service=service)
    if service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Prefer", "X-API-Key"],
            expose_headers=["Location", "Retry-After", "X-Seed", "Preference-Applied"],
        )
    app.include_router(page.router())
    return app


def _add_state(app: FastAPI, service: Service, guarded: list[Any]) -> None:
    """How the service is, for those who watch over it."""

    @app.get("/health", tags=["state"], summary="Whether the process answers")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", tags=["state"], summary="Whether requests are taken", responses=error_answers(503))
    async def ready() -> JSONResponse:
        service.require_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["state"], summary="Numbers for Prometheus", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


# --- who may ask --------------------------------------------------------------------------------------------

_BEARER: Final = HTTPBearer(auto_error=False, description="One of the keys that the server was started with")


def require_key(settings: Settings) -> Callable[..., None]:
    """A dependency that refuses who shows none of the keys, where there are any.

    All of them are compared, each in a time that does not tell how much of it was right.
    """
    keys = [key.encode() for key in settings.api_keys]

    def check(
        http: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None
    ) -> None:
        shown = (bearer.credentials if bearer else http.headers.get("x-api-key", "")).encode()
        right = [hmac.compare_digest(shown, key) for key in keys]
        if keys and not any(right):
            raise RefusedError(
                401,
                "this server needs an API key: send the header Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def require_site(settings: Settings) -> Callable[..., None]:
    """A dependency that refuses what a page of another site asks: a browser sends it without asking its user, also to
    servers that nobody but he can reach."""

    def check(http: Request) -> None:
        origin = http.headers.get("origin")
        if origin is None or http.method in _SAFE or origin in settings.allow_origins:
            return
        if "*" not in settings.allow_origins and origin.partition("://")[2] != http.headers.get("host"):
            raise RefusedError(
                403, f"pages of {origin[:100]} may not ask this server: see --allow-origin", "foreign_origin"
            )

    return check


# --- errors -------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    """Every error in the form that its route has for them."""

    async def refused(http: Request, error: Exception) -> Response:
        return answer_of(refusal_of(error), http)

    async def gone(http: Request, error: Exception) -> Response:
        return Response(status_code=_GONE)

    async def of_framework(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else "invalid_request"
        refusal = RefusedError(error.status_code, str(error.detail), code, headers=error.headers or {})
        return answer_of(refusal, http)

    async def invalid(http: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        refusal = RefusedError(422, str(first["msg"]), "invalid_value", str(first["loc"][-1]))
        return answer_of(refusal, http)

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        RefusedError: refused,
        GoneError: gone,
        HTTPException: of_framework,
        RequestValidationError: invalid,
        Exception: refused,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def answer_of(refusal: RefusedError, http: Request) -> Response:
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
