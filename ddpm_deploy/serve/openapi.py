"""What a route says of its bodies and answers in the OpenAPI document: `document` puts that together."""

from typing import Any, Final, TypedDict

from ddpm_deploy.serve.refusals import ErrorAnswer

Answers = dict[int | str, dict[str, Any]]
REFERENCE: Final = "#/components/schemas/{name}"

_ABOUT: Final = {
    400: "The body is not JSON, or a header is not as it should be",
    401: "An API key is needed",
    403: "A page of another site asks, or one that calls this server by another name",
    404: "There is no such thing",
    406: "No format that is accepted",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is encoded",
    422: "A field is out of its range, or the model cannot do it",
    429: "Too many wait: Retry-After says when to ask again",
    500: "The network failed",
    503: "The server is starting, or going down",
    504: "The images were not done in time",
}
_LATER: Final = {"Retry-After": "Seconds after which to ask again"}
_HEADERS: Final[dict[int, dict[str, str]]] = {
    401: {"WWW-Authenticate": "How to show a key"},
    429: _LATER,
    503: _LATER,
}
# What may go wrong with any request for images.
SAMPLING: Final = (400, 408, 413, 415, 422, 429, 500, 503, 504)


class StateAnswer(TypedDict):
    """How the process is."""

    status: str


def reference(kind: type) -> dict[str, Any]:
    """The schema of a type, which `document` brings."""
    return {"$ref": REFERENCE.format(name=kind.__name__)}


def media(kind: type) -> dict[str, Any]:
    """JSON of a type."""
    return {"application/json": {"schema": reference(kind)}}


def binary(*types: str) -> dict[str, Any]:
    """Bytes of these media types."""
    return {each: {"schema": {"type": "string", "format": "binary"}} for each in types}


def events(*names: str) -> dict[str, Any]:
    """Server-sent events of these names, their data as JSON."""
    data = {"type": "string", "contentMediaType": "application/json"}
    fields = {"event": {"enum": list(names)}, "data": data}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return {"text/event-stream": {"schema": schema}}


def headers(about: dict[str, str], *, always: bool = True) -> dict[str, Any]:
    """Headers, by what they are. always: whether each answer has them."""
    return {
        name: {"description": text, "required": always, "schema": {"type": "string"}}
        for name, text in about.items()
    }


def body_of(kind: type, *, also: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body of a route that takes a structure. also: other media types."""
    return {"requestBody": {"required": True, "content": {**media(kind), **(also or {})}}}


def header_of(name: str, about: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A header of a request that a route reads by itself."""
    return {"name": name, "in": "header", "required": False, "description": about, "schema": schema}


def answer(
    status: int,
    about: str,
    content: dict[str, Any],
    told: dict[str, Any] | None = None,
    links: dict[str, Any] | None = None,
) -> Answers:
    """One answer. told: its headers. links: operations that what it says leads to."""
    return {status: {"description": about, "content": content, "headers": told or {}, "links": links or {}}}


def error_answers(*statuses: int, kind: type = ErrorAnswer) -> Answers:
    """Answers that are errors of ours."""
    found: Answers = {}
    for status in statuses:
        found |= answer(status, _ABOUT[status], media(kind), headers(_HEADERS.get(status, {})))
    return found
