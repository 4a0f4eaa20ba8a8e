"""The routes that OpenAI's clients know: /v1/images/generations, and /v1/models. The prompt is the name of a class."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal, TypedDict

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddpm_deploy.files import show
from ddpm_deploy.serve.answers import as_text, picture, preview, require_picture
from ddpm_deploy.serve.bodies import SamplesBody, Whole, parse, read_body
from ddpm_deploy.serve.events import QUIET, SILENCE, EventStream, event
from ddpm_deploy.serve.feed import Feed
from ddpm_deploy.serve.handle import Handle
from ddpm_deploy.serve.openapi import SAMPLING, answer, body_of, error_answers, events, media
from ddpm_deploy.serve.refusals import RefusedError, invalid, refusal_of
from ddpm_deploy.serve.service import Service, called_off
from ddpm_deploy.spec import ModelSpec

ROUTE: Final = "/v1/images/generations"
# What they call the fields of a request.
_NAMES: Final = {
    "count": "n",
    "labels": "prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
_PARTIAL, _COMPLETED = "image_generation.partial_image", "image_generation.completed"
_EVENTS: Final = (_PARTIAL, _COMPLETED, "error")
# Of those that count tokens, of which there are none.
_USAGE: Final = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


class ImagesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What POST /v1/images/generations takes.

    prompt: the name or number of a class, or empty. size: the model's own, as 32x32. partial_images: previews of each
    image, of a stream. seed, num_inference_steps, guidance_scale, solver: as of /v1/samples. user: is not looked at.
    """

    prompt: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=3)] | None = None
    seed: Whole | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None


class ModelEntry(TypedDict):
    """A model. created: when this server started, in seconds since 1970."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The models: there is one."""

    object: Literal["list"]
    data: list[ModelEntry]


class ImageData(TypedDict):
    """An image, a PNG in base64."""

    b64_json: str


class About(TypedDict):
    """What stands beside every image. size: as 32x32."""

    size: str
    output_format: Literal["png"]
    quality: Literal["auto"]
    background: Literal["auto"]


class ImagesAnswer(About):
    """The images, and what they are. seed: of all of them, as text."""

    created: int
    data: list[ImageData]
    seed: str


_GENERATED: Final = {
    **answer(200, "The images, or of a `stream` its events", {**media(ImagesAnswer), **events(*_EVENTS)}),
    **error_answers(404, *SAMPLING),
}


def router(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["as OpenAI's"])
    name, spec, now = service.settings.name, service.spec, int(time.time())
    entry = ModelEntry(id=name, object="model", created=now, owned_by="ddpm-deploy")

    @routes.get("/v1/models", summary="The models", responses=answer(200, "The one model", media(ModelList)))
    async def models() -> JSONResponse:
        return JSONResponse(ModelList(object="list", data=[entry]))

    @routes.get(
        "/v1/models/{id}",
        summary="The one model",
        responses={**answer(200, "The model", media(ModelEntry)), **error_answers(404)},
    )
    async def model(id: str) -> JSONResponse:
        _require_model(id, name)
        return JSONResponse(entry)

    @routes.post(
        ROUTE,
        summary="Sample images, as OpenAI's clients ask",
        openapi_extra=body_of(ImagesBody),
        responses=_GENERATED,
    )
    async def generate(http: Request) -> Response:
        service.require_ready()
        body = parse(await read_body(http, service.settings.max_body), ImagesBody)
        _require_model(body.model or name, name)
        _require_size(body.size, spec)
        if body.partial_images and not body.stream:
            raise invalid("partial_images are of a stream: ask with stream: true", "partial_images")
        require_picture(spec, "png", "output_format")
        handle = service.submit(_asked(body), ROUTE, _NAMES)
        if body.stream:
            return EventStream(_events(service, handle, body.partial_images or 0), over=handle.cancel)
        images = await service.images(http, handle)
        pngs = await asyncio.to_thread(_pictures, images, handle, spec)
        made: ImagesAnswer = {
            "created": int(time.time()),
            "data": [{"b64_json": as_text(png)} for png in pngs],
            **_about(spec),
            "seed": str(handle.request.seed),
        }
        return JSONResponse(made)

    return routes


def _require_model(asked: str, name: str) -> None:
    if asked != name:
        raise RefusedError(
            404, f"there is no model {show(asked[:100])}: this is {name}", "model_not_found", "model"
        )


def _require_size(size: str | None, spec: ModelSpec) -> None:
    own = _about(spec)["size"]
    if size not in (None, "auto", own):
        raise invalid(f"this model's images are {own}, not {show(str(size)[:40])}", "size")


def _about(spec: ModelSpec) -> About:
    _, height, width = spec.image_shape
    return {"size": f"{width}x{height}", "output_format": "png", "quality": "auto", "background": "auto"}


def _asked(body: ImagesBody) -> SamplesBody:
    """The same in our own words."""
    return SamplesBody(
        count=1 if body.n is None else body.n,
        labels=(body.prompt,) if body.prompt.strip() else (),
        seed=body.seed,
        steps=body.num_inference_steps,
        guidance=body.guidance_scale,
        solver=body.solver,
    )


def _pictures(images: Any, handle: Handle, spec: ModelSpec) -> list[bytes]:
    """A PNG of each image."""
    return [picture(image, handle.request[i : i + 1], spec) for i, image in enumerate(images)]


async def _events(service: Service, handle: Handle, looks: int) -> AsyncIterator[str]:
    """Previews, and the images; `image_index` tells several apart."""
    about = {"created_at": int(time.time()), **_about(service.spec)}
    counts = [itertools.count() for _ in range(handle.request.count)]
    try:
        async for look in Feed(handle, watch=looks > 0).read(looks, QUIET):
            if look is None:
                yield SILENCE
                continue
            png = await asyncio.to_thread(preview, look.image, service.spec)
            yield _event(
                _PARTIAL,
                {**about, "partial_image_index": next(counts[look.index]), "image_index": look.index},
                png,
            )
        if handle.cancelled():
            raise called_off()
        images = await asyncio.wrap_future(handle)
        for i, png in enumerate(await asyncio.to_thread(_pictures, images, handle, service.spec)):
            yield _event(_COMPLETED, {**about, "usage": _USAGE, "image_index": i}, png)
    except Exception as error:  # the head of the answer is out: this is how a stream says it
        yield event("error", refusal_of(error).to_builtins())


def _event(name: str, fields: dict[str, Any], png: bytes) -> str:
    return event(name, {"type": name, "b64_json": as_text(png), **fields})
