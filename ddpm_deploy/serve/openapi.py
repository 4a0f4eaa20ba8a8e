"""What the OpenAPI document says of bodies and answers that FastAPI does not read itself."""

from typing import Any

import msgspec

from ddpm_deploy.serve.bodies import SamplesBody


def body_of(kind: type) -> dict[str, Any]:
    """The body of a route that takes a structure."""
    _, parts = msgspec.json.schema_components((kind,), ref_template="{name}")
    return {"required": True, "content": {"application/json": {"schema": parts[kind.__name__]}}}


SAMPLES_BODY = body_of(SamplesBody)

_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers that are errors of ours."""
    about = {
        400: "The body is not JSON",
        401: "An API key is needed",
        403: "A page of another site asks",
        404: "There is no such thing",
        406: "No format that is accepted",
        408: "The body came too slowly",
        413: "The body is too large",
        415: "The body is encoded",
        422: "A field is out of its range: `param` names it",
        429: "Too many wait: Retry-After says when to ask again",
        500: "The network failed",
        503: "The server is starting, or going down",
        504: "The images were not done in time",
    }
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": about[status], "content": content} for status in statuses}


def images_answers() -> dict[int | str, dict[str, Any]]:
    """The answers of a route that gives images."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    whole = {"schema": {"type": "object"}}
    content = {"image/png": binary, "application/x-npz": binary, "application/json": whole}
    return {
        200: {"description": "The images", "content": content},
        202: {"description": "Accepted, or under way", "content": {"application/json": whole}},
        **error_answers(400, 401, 403, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504),
    }
