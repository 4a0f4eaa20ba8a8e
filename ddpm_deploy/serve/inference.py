"""The Open Inference Protocol, version 2, as Triton's clients speak it: JSON, and tensors in binary behind it.

The inputs are the fields of a request, each a tensor of its values; they may stand among the parameters too.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any, Final, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from ddpm_deploy.errors import first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.images import to_uint8
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request as Asked
from ddpm_deploy.serve.bodies import SamplesBody, parse, read_body
from ddpm_deploy.serve.openapi import (
    SAMPLING,
    Answers,
    answer,
    binary,
    body_of,
    error_answers,
    header_of,
    headers,
    media,
)
from ddpm_deploy.serve.refusals import RefusedError, invalid
from ddpm_deploy.serve.service import Service
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

_MODEL: Final = "/v2/models/{name}"
ROUTE: Final = f"{_MODEL}/infer"
_VERSION: Final = "1"
_VERSIONED: Final = f"{_MODEL}/versions/{_VERSION}"  # the same, as clients ask that name the version
_HEADER: Final = "Inference-Header-Content-Length"
_SIZE: Final = "binary_data_size"
_MOST_VALUES: Final = 1 << 16
TYPES: Final[dict[str, Any]] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_NAMES: Final = {np.dtype(kind): name for name, kind in TYPES.items()}
# What a request takes, and whether of one value or of several. Labels may be BYTES too, by name.
INPUTS: Final[dict[str, tuple[str, list[int]]]] = {
    "count": ("INT64", [1]),
    "steps": ("INT64", [1]),
    "solver": ("BYTES", [1]),
    "eta": ("FP32", [1]),
    "spacing": ("BYTES", [1]),
    "timesteps": ("INT64", [-1]),
    "seed": ("UINT64", [1]),
    "first_index": ("UINT64", [1]),
    "labels": ("INT64", [-1]),
    "guidance": ("FP32", [-1]),
}


class InputTensor(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One tensor that is sent. data: its values in C order, nested or not; or parameters has binary_data_size."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputWanted(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One tensor that is wanted. parameters: binary_data, whether in binary."""

    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What infer takes. parameters: fields of a request by name; timeout, in microseconds; binary_data_output."""

    inputs: list[InputTensor] = []
    outputs: list[OutputWanted] | None = None
    id: str | None = None
    parameters: dict[str, Any] = {}


class InferError(TypedDict):
    """An answer that is an error."""

    error: str


class Live(TypedDict):
    """The process answers."""

    live: Literal[True]


class Ready(TypedDict):
    """Requests are taken."""

    ready: Literal[True]


class ModelReady(TypedDict):
    """Requests for a model are taken."""

    name: str
    ready: Literal[True]


class ServerMetadata(TypedDict):
    """The server. extensions: to the protocol, that it speaks."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """A tensor. shape: -1 where it depends on the request."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """The model and its tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class BinarySize(TypedDict):
    """Of a tensor behind the JSON: how many bytes."""

    binary_data_size: int


class OutputTensor(TypedDict):
    """One tensor that is answered. data: its values in C order; or parameters, of one that stands behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[BinarySize]
    data: NotRequired[list[float]]


class InferAnswer(TypedDict):
    """The outputs. id: as it was asked."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[OutputTensor]


def errors(*statuses: int) -> Answers:
    """Answers that are errors, as this protocol has them."""
    return error_answers(*statuses, kind=InferError)


def answer_of(refusal: RefusedError) -> Response:
    """A refusal as this protocol has it: {"error": "…"}."""
    named = f" ({refusal.param})" if refusal.param else ""
    fields = InferError(error=f"{refusal.message}{named}")
    return JSONResponse(fields, status_code=refusal.status, headers=dict(refusal.headers))


def router(service: Service, guards: Mapping[str, Any]) -> APIRouter:
    """The routes over one service. guards: what all but those of health have besides: dependencies and answers."""
    whole = APIRouter(tags=["Open Inference Protocol"])
    whole.include_router(_health(service))
    whole.include_router(_models(service), **guards)
    whole.include_router(_infer(service), **guards)
    return whole


def _health(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get(
        "/v2/health/live",
        summary="Whether the process answers",
        responses=answer(200, "It does", media(Live)),
    )
    async def live() -> Response:
        return JSONResponse(Live(live=True))

    @routes.get(
        "/v2/health/ready",
        summary="Whether requests are taken",
        responses={**answer(200, "They are", media(Ready)), **errors(503)},
    )
    async def ready() -> Response:
        service.require_ready()
        return JSONResponse(Ready(ready=True))

    return routes


def _models(service: Service) -> APIRouter:
    routes = APIRouter()
    described = {
        "summary": "The model's tensors",
        "responses": {**answer(200, "The model", media(ModelMetadata)), **errors(404)},
    }
    asked_after = {
        "summary": "Whether requests are taken",
        "responses": {**answer(200, "They are", media(ModelReady)), **errors(404, 503)},
    }

    @routes.get("/v2", summary="The server", responses=answer(200, "The server", media(ServerMetadata)))
    async def server() -> Response:
        fields: ServerMetadata = {
            "name": "ddpm-deploy",
            "version": __version__,
            "extensions": ["binary_tensor_data"],
        }
        return JSONResponse(fields)

    async def model(name: str) -> Response:
        _require_model(name, service)
        return JSONResponse(_metadata(service))

    async def model_ready(name: str) -> Response:
        _require_model(name, service)
        service.require_ready()
        return JSONResponse(ModelReady(name=name, ready=True))

    for path, endpoint, about in (("", model, described), ("/ready", model_ready, asked_after)):
        for whose in (_MODEL, _VERSIONED):
            routes.add_api_route(whose + path, endpoint, methods=["GET"], **about)  # type: ignore[arg-type]  # of a plain dict mypy knows no keys
    return routes


def _infer(service: Service) -> APIRouter:
    routes = APIRouter()
    mixed = binary("application/octet-stream")
    length = header_of(
        _HEADER,
        "Bytes of the JSON, where tensors in binary stand behind it",
        {"type": "integer", "minimum": 0},
    )
    told = headers({_HEADER: "Bytes of the JSON, of an answer in binary"}, always=False)

    async def infer(name: str, http: Request) -> Response:
        _require_model(name, service)
        service.require_ready()
        body, values = _read(await read_body(http, service.settings.max_body), http.headers.get(_HEADER))
        wanted = _wanted(body, service.spec)
        handle = service.submit(_asked(body, values), ROUTE)
        images = await service.images(http, handle)
        return await asyncio.to_thread(_answer, body, wanted, images, handle.request, service)

    for path in (ROUTE, _VERSIONED + "/infer"):
        routes.add_api_route(
            path,
            infer,
            methods=["POST"],
            summary="Sample images",
            openapi_extra={**body_of(InferBody, also=mixed), "parameters": [length]},
            responses={
                **answer(200, "The outputs", {**media(InferAnswer), **mixed}, told),
                **errors(404, *SAMPLING),
            },
        )
    return routes


def _require_model(name: str, service: Service) -> None:
    own = service.settings.name
    if name != own:
        raise RefusedError(404, f"there is no model {show(name[:100])}: this is {own}", "model_not_found")


def _metadata(service: Service) -> ModelMetadata:
    inputs = [TensorMetadata(name=n, datatype=kind, shape=shape) for n, (kind, shape) in INPUTS.items()]
    one = Asked(seed=0).checked(service.spec)
    found = {
        name: _output(name, np.zeros((1, *service.spec.image_shape), np.float32), one, service.spec)
        for name in outputs_of(service.spec)
    }
    outputs = [
        TensorMetadata(
            name=name,
            datatype=_NAMES[array.dtype],
            shape=[1] if name == "seed" else [-1, *array.shape[1:]],
        )
        for name, array in found.items()
    ]
    return {
        "name": service.settings.name,
        "versions": [_VERSION],
        "platform": "ddpm_deploy",
        "inputs": inputs,
        "outputs": outputs,
    }


# --- what is asked ------------------------------------------------------------------------------------------


def _read(body: bytes, header: str | None) -> tuple[InferBody, dict[str, list[Any]]]:
    """The JSON of a body, and the values of its tensors by name."""
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdecimal()) or len(header) > 9 or int(header) > length:
            raise RefusedError(
                400, f"{_HEADER} must be the bytes of the JSON, at most {length}", "invalid_header"
            )
        length = int(header)
    asked, rest = parse(body[:length], InferBody), memoryview(body)[length:]
    values: dict[str, list[Any]] = {}
    for tensor in asked.inputs:
        _require_tensor(tensor, values)
        size = tensor.parameters.get(_SIZE)
        if size is None:
            values[tensor.name] = _listed(tensor)
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise invalid(f"{_SIZE} of {tensor.name} must be from 0 to {len(rest)}", tensor.name)
        values[tensor.name], rest = _unpacked(tensor, bytes(rest[:size])), rest[size:]
    if len(rest):
        raise invalid(f"{len(rest)} bytes stand behind the last tensor")
    return asked, values


def _require_tensor(tensor: InputTensor, values: dict[str, list[Any]]) -> None:
    """Refuse one that is not known, is there twice, or is too large."""
    name = show(tensor.name[:40])
    if tensor.name not in INPUTS:
        raise invalid(f"there is no input {name}: choose from {', '.join(INPUTS)}", name)
    if tensor.name in values:
        raise invalid(f"the input {name} is there twice", name)
    if tensor.datatype != "BYTES" and tensor.datatype not in TYPES:
        known = ", ".join(("BYTES", *TYPES))
        raise invalid(f"there is no datatype {show(tensor.datatype[:40])}: choose from {known}", name)
    if any(length < 1 for length in tensor.shape) or math.prod(tensor.shape) > _MOST_VALUES:
        raise invalid(f"{name} must have from 1 to {_MOST_VALUES} values", name)


def _listed(tensor: InputTensor) -> list[Any]:
    """The values of a tensor in JSON, in C order."""
    found = _flat(tensor.data or [])
    if len(found) != math.prod(tensor.shape):
        raise invalid(f"{tensor.name} has {len(found)} values, and its shape says otherwise", tensor.name)
    return found


def _flat(data: list[Any]) -> list[Any]:
    """A list of lists as one; whoever nested it deeply was refused as it was parsed, or is told here."""
    try:
        return [value for item in data for value in (_flat(item) if isinstance(item, list) else [item])]
    except RecursionError as error:
        raise invalid("data is nested too deeply", "data") from error


def _unpacked(tensor: InputTensor, raw: bytes) -> list[Any]:
    """The values of a tensor in binary: little-endian; of BYTES each has its length before it."""
    wrong = invalid(f"{tensor.name} has {len(raw)} bytes, and its shape says otherwise", tensor.name)
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        return _texts(raw, count, wrong)
    kind = np.dtype(TYPES[tensor.datatype]).newbyteorder("<")
    if len(raw) != count * kind.itemsize:
        raise wrong
    values: list[Any] = np.frombuffer(raw, kind).tolist()
    return values


def _texts(raw: bytes, count: int, wrong: RefusedError) -> list[str]:
    """BYTES in binary: each text with its length before it."""
    texts: list[str] = []
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if end > len(raw):
            raise wrong
        try:
            texts.append(raw[at + 4 : end].decode())
        except UnicodeDecodeError as error:
            raise wrong from error
        at = end
    if len(texts) != count:
        raise wrong
    return texts


def _asked(body: InferBody, values: dict[str, list[Any]]) -> SamplesBody:
    """The same in our own words."""
    fields: dict[str, Any] = {}
    for name, value in body.parameters.items():
        match name:
            case "timeout" if type(value) is int:
                fields["deadline"] = value / 1e6
            case "binary_data_output":
                pass
            case _ if name in INPUTS and name not in values:
                fields[name] = value
            case _:
                name = show(name[:40])
                raise invalid(f"{name} is no parameter here, or is an input too", name)
    for name, found in values.items():
        several = INPUTS[name][1] == [-1]
        if not several and len(found) != 1:
            raise invalid(f"{name} must have one value, not {len(found)}", name)
        fields[name] = tuple(found) if several else found[0]
    try:
        return msgspec.convert(fields, SamplesBody)
    except msgspec.ValidationError as error:
        raise invalid(first_line(error)) from error


# --- what is answered ---------------------------------------------------------------------------------------


def outputs_of(spec: ModelSpec) -> list[str]:
    """The outputs that may be wanted."""
    return ["images", "pixels", "seed", *(["labels"] if spec.num_classes else [])]


def _wanted(body: InferBody, spec: ModelSpec) -> dict[str, bool]:
    """The outputs that are wanted, and whether in binary."""
    by_default = body.parameters.get("binary_data_output") is True
    if not body.outputs:
        return {"images": by_default, "seed": by_default}
    wanted: dict[str, bool] = {}
    for output in body.outputs:
        name, known = show(output.name[:40]), outputs_of(spec)
        if output.name not in known:
            raise invalid(f"there is no output {name}: choose from {', '.join(known)}", name)
        if strange := set(output.parameters) - {"binary_data"}:
            raise invalid(f"{show(min(strange)[:40])} is no parameter of an output here", name)
        wanted[output.name] = output.parameters.get("binary_data", by_default) is True
    return wanted


def _output(name: str, images: Array, request: Asked, spec: ModelSpec) -> NDArray[Any]:
    """One of the outputs: the images as they are, as 8-bit pixels (N, H, W, C), their seed, or their labels."""
    match name:
        case "images":
            return images
        case "pixels":
            return to_uint8(images, spec.value_range)
        case "seed":
            return np.array([request.seed], np.uint64)
    return np.asarray(request.label_numbers(spec))


def _answer(
    body: InferBody, wanted: dict[str, bool], images: Array, request: Asked, service: Service
) -> Response:
    """The outputs: JSON, and behind it those that are wanted in binary."""
    outputs: list[OutputTensor] = []
    raws = []
    for name, in_binary in wanted.items():
        array = _output(name, images, request, service.spec)
        tensor: OutputTensor = {
            "name": name,
            "datatype": _NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if in_binary:
            raws.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": array.nbytes}
        else:
            tensor["data"] = array.ravel().tolist()
        outputs.append(tensor)
    whole: InferAnswer = {
        "model_name": service.settings.name,
        "model_version": _VERSION,
        "outputs": outputs,
    }
    if body.id:
        whole["id"] = body.id
    head = json.dumps(whole).encode()
    if not raws:
        return Response(head, media_type="application/json")
    told = {_HEADER: str(len(head))}
    return Response(b"".join([head, *raws]), media_type="application/octet-stream", headers=told)
