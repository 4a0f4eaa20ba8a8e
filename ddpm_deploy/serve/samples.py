"""The routes of our own: /v1/samples, and /v1/model, which says what may be asked."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import MOST_GUIDANCE
from ddpm_deploy.serve.answers import (
    MEDIA,
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
from ddpm_deploy.serve.openapi import SAMPLES_BODY, images_answers
from ddpm_deploy.serve.refusals import RefusedError, refusal_of, retry_after
from ddpm_deploy.serve.results import Kept
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import MOST_PREVIEWS
from ddpm_deploy.spec import DEFAULT_CHAIN, ModelSpec
from ddpm_deploy.words import ASKED_SOLVERS, SPACINGS

ROUTE = "/v1/samples"


def router(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["samples"])

    @routes.get("/v1/model", summary="What the model is, and what may be asked of it")
    async def model() -> JSONResponse:
        return JSONResponse(model_fields(service))

    @routes.post(
        ROUTE,
        summary="Sample images",
        openapi_extra={"requestBody": SAMPLES_BODY},
        responses=images_answers(),
    )
    async def sample(http: Request) -> Response:
        return await _sampled(http, service)

    @routes.get(ROUTE + "/{id}", summary="How far a request is, or its images", responses=images_answers())
    async def result(id: str, http: Request, format: Format | None = None) -> Response:
        kept = service.results.get(id)
        kind = format or wanted(http.headers.get("accept"), "json")
        require_picture(kept.spec, kind)
        if not kept.handle.done():
            return JSONResponse(status_fields(kept), status_code=202, headers=retry_after(1))
        kept.fetched = True
        if kind == "json":
            return JSONResponse(await asyncio.to_thread(_whole_status, kept))
        if (error := error_of(kept)) is not None:
            raise refusal_of(error)
        return await _file(kept.spec, kept.handle.result(), kept.handle.request, kind)

    @routes.delete(ROUTE + "/{id}", status_code=204, summary="Call a request off, or forget its images")
    async def delete(id: str) -> Response:
        service.results.drop(service.results.get(id))
        return Response(status_code=204)

    @routes.get(ROUTE + "/{id}/events", summary="Previews of a request, as server-sent events")
    async def events(id: str, previews: Annotated[int, Query(ge=1, le=MOST_PREVIEWS)] = 8) -> Response:
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
        fields = {"request": request_fields(handle.request)}
        shown = await asyncio.to_thread(picture_fields, images, handle.request, service.spec)
        return JSONResponse(fields | {"images": shown})
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
    headers = {"Location": where, "Preference-Applied": "respond-async"}
    return JSONResponse(status_fields(kept), status_code=202, headers=headers)


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
    headers = {"Content-Disposition": f'inline; filename="samples.{kind}"', "X-Seed": str(request.seed)}
    return Response(data, media_type=MEDIA[kind], headers=headers)


def error_of(kept: Kept) -> BaseException | None:
    """What went wrong with a request that is over."""
    return None if kept.handle.cancelled() else kept.handle.exception()


def status_fields(kept: Kept) -> dict[str, Any]:
    """A request that is kept, as JSON, without its images."""
    handle = kept.handle
    fields: dict[str, Any] = {"id": kept.id, "created": int(kept.created), "progress": handle.progress()}
    fields["request"] = request_fields(handle.request)
    if not handle.done():
        return fields | {"status": "running" if fields["progress"] else "queued"}
    if handle.cancelled():
        return fields | {"status": "cancelled"}
    error = handle.exception()
    return fields | ({"status": "failed", **refusal_of(error).to_builtins()} if error else {"status": "done"})


def _whole_status(kept: Kept) -> dict[str, Any]:
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
    fields = status_fields(kept)
    yield event(fields["status"], fields)


def model_fields(service: Service) -> dict[str, Any]:
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
