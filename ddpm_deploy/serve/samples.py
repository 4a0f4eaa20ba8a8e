"""The routes of our own: /v1/samples, and /v1/model, which says what may be asked."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import MOST_GUIDANCE
from ddpm_deploy.serve.answers import (
    MEDIA,
    PictureFields,
    RequestFields,
    as_text,
    encoded,
    picture_fields,
    preview,
    request_fields,
    require_picture,
    wanted,
)
from ddpm_deploy.serve.bodies import Format, SamplesBody, parse, read_body
from ddpm_deploy.serve.events import QUIET, SILENCE, EventStream, event
from ddpm_deploy.serve.openapi import (
    SAMPLING,
    answer,
    binary,
    body_of,
    error_answers,
    events,
    header_of,
    headers,
    media,
)
from ddpm_deploy.serve.refusals import ErrorFields, RefusedError, refusal_of, retry_after
from ddpm_deploy.serve.results import Kept
from ddpm_deploy.serve.service import Service, called_off
from ddpm_deploy.serve.settings import MOST_PREVIEWS
from ddpm_deploy.spec import DEFAULT_CHAIN, ModelSpec
from ddpm_deploy.words import ASKED_SOLVERS, SPACINGS

ROUTE = "/v1/samples"
State = Literal["queued", "running", "done", "failed", "cancelled"]
_ENDS: Final = ("done", "failed", "cancelled")


class SampledImages(TypedDict):
    """The images of a request that was waited for, and the request as it was done."""

    request: RequestFields
    images: list[PictureFields]


class SampleStatus(TypedDict):
    """A request that is kept.

    created: seconds since 1970. progress: the share of its steps that was taken. error: of one that failed. images: of
    one that is done, where they are asked for.
    """

    id: str
    created: int
    progress: float
    request: RequestFields
    status: State
    error: NotRequired[ErrorFields]
    images: NotRequired[list[PictureFields]]


class Defaults(TypedDict):
    """The chain of a request that says nothing of it."""

    solver: str | None
    steps: int | None
    spacing: str | None
    eta: float | None


class Limits(TypedDict):
    """The most that one request may ask for. guidance: of either sign. seconds: until its images are done."""

    count: int
    steps: int
    guidance: float
    body_bytes: int
    seconds: float
    previews: int
    keep_seconds: float


class ModelFields(TypedDict):
    """What the model is, and what may be asked of it.

    classes: 0 of an unconditional model. shows_pictures: whether its images come as PNG. guidance: whether it may be
    asked for. timesteps: of the full chain. digest: of the checkpoint that it was made of.
    """

    name: str
    image_shape: list[int]
    shows_pictures: bool
    classes: int
    class_names: list[str]
    null_class: bool
    guidance: bool
    timesteps: int
    solvers: list[str]
    spacings: list[str]
    defaults: Defaults
    limits: Limits
    precision: str
    digest: str


_FILES: Final = binary(MEDIA["png"], MEDIA["npz"])
_TOLD: Final = headers(
    {
        "X-Seed": "The seed, of a file",
        "Content-Disposition": "Under which name to save a file",
    },
    always=False,
)
_LINKS: Final = {
    name: {"operationId": name, "parameters": {"id": "$response.body#/id"}}
    for name in ("getSample", "deleteSample", "watchSample")
}
_PREFER: Final = header_of(
    "Prefer", "respond-async: answer at once with an id, and keep the images", {"type": "string"}
)
_SAMPLED: Final = {
    **answer(200, "The images", {**_FILES, **media(SampledImages)}, _TOLD),
    **answer(
        202,
        "Accepted, as `Prefer: respond-async` asked for",
        media(SampleStatus),
        headers({"Location": "Where the images will be", "Preference-Applied": "What was asked for"}),
        _LINKS,
    ),
    **error_answers(406, *SAMPLING),
}
_RESULT: Final = {
    **answer(200, "How it ended, or its images", {**_FILES, **media(SampleStatus)}, _TOLD),
    **answer(
        202,
        "It is under way",
        media(SampleStatus),
        headers({"Retry-After": "Seconds after which to ask again"}),
    ),
    **error_answers(404, 406, 422, 500, 503, 504),
}
_WATCHED: Final = {
    **answer(200, "Its status, previews, and how it ended", events("status", "preview", *_ENDS)),
    **error_answers(404, 422, 503),
}


def router(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["samples"])

    @routes.get(
        "/v1/model",
        summary="What the model is, and what may be asked of it",
        responses=answer(200, "The model", media(ModelFields)),
    )
    async def model() -> JSONResponse:
        return JSONResponse(model_fields(service))

    @routes.post(
        ROUTE,
        summary="Sample images",
        openapi_extra={**body_of(SamplesBody), "parameters": [_PREFER]},
        responses=_SAMPLED,
    )
    async def sample(http: Request) -> Response:
        return await _sampled(http, service)

    routes.include_router(_kept(service))
    return routes


def _kept(service: Service) -> APIRouter:
    """Those of requests that nobody waits for."""
    routes = APIRouter()

    @routes.get(
        ROUTE + "/{id}",
        summary="How far a request is, or its images",
        operation_id="getSample",
        responses=_RESULT,
    )
    async def result(id: str, http: Request, format: Format | None = None) -> Response:
        kept = service.results.get(id)
        kind = format or wanted(http.headers.get("accept"), "json")
        require_picture(kept.spec, kind)
        return await _result(kept, kind)

    @routes.delete(
        ROUTE + "/{id}",
        status_code=204,
        summary="Call a request off, or forget its images",
        operation_id="deleteSample",
        responses=error_answers(404, 503),
    )
    async def delete(id: str) -> Response:
        service.results.drop(service.results.get(id))
        return Response(status_code=204)

    @routes.get(
        ROUTE + "/{id}/events",
        summary="Previews of a request, as server-sent events",
        operation_id="watchSample",
        response_class=Response,
        responses=_WATCHED,
    )
    async def watch(id: str, previews: Annotated[int, Query(ge=1, le=MOST_PREVIEWS)] = 8) -> Response:
        return EventStream(_events(service, service.results.get(id), previews))

    return routes


async def _sampled(http: Request, service: Service) -> Response:
    """A request, and its images: now, or at an address of their own."""
    service.require_ready()
    body = parse(await read_body(http, service.settings.max_body), SamplesBody)
    apart = prefers_async(http)
    kind = body.format or wanted(http.headers.get("accept"), default_format(service))
    require_picture(service.spec, kind)
    if apart:
        return await _accepted(http, service, body)
    handle = service.submit(body, ROUTE)
    images = await service.images(http, handle)
    if kind == "json":
        shown = await asyncio.to_thread(picture_fields, images, handle.request, service.spec)
        return JSONResponse(SampledImages(request=request_fields(handle.request), images=shown))
    return await _file(service.spec, images, handle.request, kind)


async def _accepted(http: Request, service: Service, body: SamplesBody) -> Response:
    """A request that nobody waits for: 202, and where it is found."""
    handle = service.submit(body, ROUTE)
    try:
        kept = service.results.keep(handle, service.spec)
    except RefusedError:
        handle.cancel()
        raise
    where = http.url_for("result", id=kept.id).path
    told = {"Location": where, "Preference-Applied": "respond-async"}
    return JSONResponse(status_fields(kept), status_code=202, headers=told)


async def _result(kept: Kept, kind: Format) -> Response:
    """How far a request is, or its images."""
    handle = kept.handle
    if not handle.done():
        return JSONResponse(status_fields(kept), status_code=202, headers=retry_after(1))
    kept.fetched = True
    if kind == "json":
        return JSONResponse(await asyncio.to_thread(_whole_status, kept))
    if handle.cancelled():
        raise called_off()
    if (error := handle.exception()) is not None:
        raise refusal_of(error)
    return await _file(kept.spec, handle.result(), handle.request, kind)


def prefers_async(http: Request) -> bool:
    """Whether the header Prefer (RFC 7240) says so."""
    return any(
        part.partition(";")[0].strip().lower() == "respond-async"
        for value in http.headers.getlist("prefer")
        for part in value.split(",")
    )


def default_format(service: Service) -> Format:
    """What one gets who does not say what he likes."""
    return "png" if service.shows_pictures else "npz"


async def _file(spec: ModelSpec, images: Array, request: Any, kind: Format) -> Response:
    """Images as one file; its seed is in the header X-Seed, whichever it is."""
    data = await asyncio.to_thread(encoded, images, request, spec, kind)
    told = {"Content-Disposition": f'inline; filename="samples.{kind}"', "X-Seed": str(request.seed)}
    return Response(data, media_type=MEDIA[kind], headers=told)


def status_fields(kept: Kept) -> SampleStatus:
    """A request that is kept, as JSON, without its images."""
    handle, over = kept.handle, kept.handle.done()
    progress = handle.progress()
    state: State = "running" if progress else "queued"
    if over:
        state = "cancelled" if handle.cancelled() else "failed" if handle.exception() else "done"
    fields: SampleStatus = {
        "id": kept.id,
        "created": int(kept.created),
        "progress": progress,
        "request": request_fields(handle.request),
        "status": state,
    }
    if error := state == "failed" and handle.exception():
        fields["error"] = refusal_of(error).to_builtins()["error"]
    return fields


def _whole_status(kept: Kept) -> SampleStatus:
    """The same with its images."""
    fields = status_fields(kept)
    if fields["status"] == "done":
        request = kept.handle.request
        fields["images"] = picture_fields(kept.handle.result(), request, kept.spec)
    return fields


async def _events(service: Service, kept: Kept, looks: int) -> AsyncIterator[str]:
    """A request on its way: its status, previews, and how it ended."""
    yield event("status", status_fields(kept))
    async for look in kept.watched().read(looks, QUIET):
        if look is None:
            yield SILENCE
            continue
        fields: dict[str, Any] = {"index": look.index, "step": look.step, "steps": look.steps}
        if service.shows_pictures:
            fields["png"] = as_text(await asyncio.to_thread(preview, look.image, service.spec))
        yield event("preview", fields | {"progress": kept.handle.progress()})
    ended = status_fields(kept)
    yield event(ended["status"], ended)


def model_fields(service: Service) -> ModelFields:
    """What a page needs to know to ask."""
    spec, settings = service.spec, service.settings
    own = spec.completed(DEFAULT_CHAIN)
    return {
        "name": settings.name,
        "image_shape": list(spec.image_shape),
        "shows_pictures": service.shows_pictures,
        "classes": spec.num_classes,
        "class_names": list(spec.class_names),
        "null_class": spec.null_class,
        "guidance": service.takes_guidance,
        "timesteps": spec.timesteps,
        "solvers": list(ASKED_SOLVERS),
        "spacings": list(SPACINGS),
        "defaults": {"solver": own.solver, "steps": own.steps, "spacing": own.spacing, "eta": own.eta},
        "limits": {
            "count": settings.max_count,
            "steps": min(settings.max_steps or spec.timesteps, spec.timesteps),
            "guidance": MOST_GUIDANCE,
            "body_bytes": settings.max_body,
            "seconds": settings.timeout,
            "previews": MOST_PREVIEWS,
            "keep_seconds": settings.keep_seconds,
        },
        "precision": spec.precision,
        "digest": spec.provenance.digest,
    }
