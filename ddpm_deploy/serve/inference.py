"""The Open Inference Protocol, version 2, as Triton's clients speak it: JSON, and tensors in binary behind it.

The inputs are the fields of a request, each a tensor of its values; they may stand among the parameters too.
"""

import asyncio
import json
import math
from typing import Any, Final

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
from ddpm_deploy.serve.openapi import body_of
from ddpm_deploy.serve.refusals import RefusedError, invalid
from ddpm_deploy.serve.service import Service
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

ROUTE: Final = "/v2/models/{name}/infer"
_VERSION: Final = "1"
_VERSIONED: Final = (
    f"/v2/models/{{name}}/versions/{_VERSION}"  # the same, as clients ask that name the version
)
_HEADER: Final = "Inference-Header-Content-Length"
_SIZE: Final = "binary_data_size"
_MOST_VALUES: Final = 1 << 16
_TYPES: Final[dict[str, Any]] = {
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
_NAMES: Final = {np.dtype(kind): name for name, kind in _TYPES.items()}
# What a request takes, and whether of one value or of several. Labels may be BYTES too, by name.
_INPUTS: Final[dict[str, tuple[str, list[int]]]] = {
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


class InputTensor(msgspec.Struct, kw_only=True):
    """One tensor that is sent. data: its values in C order, nested or not; or parameters has binary_data_size."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputWanted(msgspec.Struct, kw_only=True):
    """One tensor that is wanted. parameters: binary_data, whether in binary."""

    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct, kw_only=True):
    """What infer takes. parameters: fields of a request by name; timeout, in microseconds; binary_data_output."""

    inputs: list[InputTensor] = []
    outputs: list[OutputWanted] | None = None
    id: str | None = None
    parameters: dict[str, Any] = {}


def answer_of(refusal: RefusedError) -> Response:
    """A refusal as this protocol has it: {"error": "…"}."""
    named = f" ({refusal.param})" if refusal.param else ""
    fields = {"error": f"{refusal.message}{named}"}
    return JSONResponse(fields, status_code=refusal.status, headers=dict(refusal.headers))


def router(service: Service, guarded: list[Any]) -> APIRouter:
    """The routes over one service; all but those of health are guarded."""
    routes = APIRouter(tags=["Open Inference Protocol"])

    @routes.get("/v2/health/live", summary="Whether the process answers")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @routes.get("/v2/health/ready", summary="Whether requests are taken")
    async def ready() -> Response:
        service.require_ready()
        return JSONResponse({"ready": True})

    @routes.get("/v2", summary="The server", dependencies=guarded)
    async def server() -> Response:
        fields = {"name": "ddpm-deploy", "version": __version__, "extensions": ["binary_tensor_data"]}
        return JSONResponse(fields)

    @routes.get(_VERSIONED, summary="The model's tensors", dependencies=guarded)
    @routes.get("/v2/models/{name}", summary="The model's tensors", dependencies=guarded)
    async def model(name: str) -> Response:
        _require_model(name, service)
        return JSONResponse(_metadata(service))

    @routes.get(_VERSIONED + "/ready", summary="Whether requests are taken", dependencies=guarded)
    @routes.get("/v2/models/{name}/ready", summary="Whether requests are taken", dependencies=guarded)
    async def model_ready(name: str) -> Response:
        _require_model(name, service)
        service.require_ready()
        return JSONResponse({"name": name, "ready": True})

    asked = {"requestBody": body_of(InferBody)}

    @routes.post(_VERSIONED + "/infer", summary="Sample images", dependencies=guarded, openapi_extra=asked)
    @routes.post(ROUTE, summary="Sample images", dependencies=guarded, openapi_extra=asked)
    async def infer(name: str, http: Request) -> Response:
        _require_model(name, service)
        service.require_ready()
        body, values = _read(await read_body(http, service.settings.max_body), http.headers.get(_HEADER))
        wanted = _wanted(body, service.spec)
        handle = service.submit(_asked(body, values), ROUTE)
        images = await service.images(http, handle)
        return await asyncio.to_thread(_answer, body, wanted, images, handle.request, service)

    return routes


def _require_model(name: str, service: Service) -> None:
    own = service.settings.name
    if name != own:
        raise RefusedError(404, f"there is no model {show(name[:100])}: this is {own}", "model_not_found")


def _metadata(service: Service) -> dict[str, Any]:
    """The model and its tensors, -1 where a shape depends on the request."""
    inputs = [{"name": n, "datatype": kind, "shape": shape} for n, (kind, shape) in _INPUTS.items()]
    one = Asked(seed=0).checked(service.spec)
    found = {
        name: _output(name, np.zeros((1, *service.spec.image_shape), np.float32), one, service.spec)
        for name in _outputs(service.spec)
    }
    outputs = [
        {
            "name": name,
            "datatype": _NAMES[array.dtype],
            "shape": [1] if name == "seed" else [-1, *array.shape[1:]],
        }
        for name, array in found.items()
    ]
    fields = {"name": service.settings.name, "versions": [_VERSION], "platform": "ddpm_deploy"}
    return fields | {"inputs": inputs, "outputs": outputs}


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
    if tensor.name not in _INPUTS:
        raise invalid(f"there is no input {name}: choose from {', '.join(_INPUTS)}", name)
    if tensor.name in values:
        raise invalid(f"the input {name} is there twice", name)
    if tensor.datatype != "BYTES" and tensor.datatype not in _TYPES:
        known = ", ".join(("BYTES", *_TYPES))
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
    kind = np.dtype(_TYPES[tensor.datatype]).newbyteorder("<")
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
            case _ if name in _INPUTS and name not in values:
                fields[name] = value
            case _:
                name = show(name[:40])
                raise invalid(f"{name} is no parameter here, or is an input too", name)
    for name, found in values.items():
        several = _INPUTS[name][1] == [-1]
        if not several and len(found) != 1:
            raise invalid(f"{name} must have one value, not {len(found)}", name)
        fields[name] = tuple(found) if several else found[0]
    try:
        return msgspec.convert(fields, SamplesBody)
    except msgspec.ValidationError as error:
        raise invalid(first_line(error)) from error


# --- what is answered ---------------------------------------------------------------------------------------


def _outputs(spec: ModelSpec) -> list[str]:
    return ["images", "pixels", "seed", *(["labels"] if spec.num_classes else [])]


def _wanted(body: InferBody, spec: ModelSpec) -> dict[str, bool]:
    """The outputs that are wanted, and whether in binary."""
    by_default = body.parameters.get("binary_data_output") is True
    if not body.outputs:
        return {"images": by_default, "seed": by_default}
    wanted: dict[str, bool] = {}
    for output in body.outputs:
        name, known = show(output.name[:40]), _outputs(spec)
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
    outputs, raws = [], []
    for name, binary in wanted.items():
        array = _output(name, images, request, service.spec)
        fields: dict[str, Any] = {
            "name": name,
            "datatype": _NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if binary:
            raws.append(array.tobytes())
            fields["parameters"] = {_SIZE: array.nbytes}
        else:
            fields["data"] = array.ravel().tolist()
        outputs.append(fields)
    whole: dict[str, Any] = {"model_name": service.settings.name, "model_version": _VERSION}
    head = json.dumps(whole | ({"id": body.id} if body.id else {}) | {"outputs": outputs}).encode()
    if not raws:
        return Response(head, media_type="application/json")
    headers = {_HEADER: str(len(head))}
    return Response(b"".join([head, *raws]), media_type="application/octet-stream", headers=headers)
