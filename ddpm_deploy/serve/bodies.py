"""From bytes that a stranger sent to a Request: read within bounds, parsed strictly, and checked, with the field named
that is at fault."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.serve.refusals import RefusedError, invalid
from ddpm_deploy.serve.settings import BODY_SECONDS, Settings
from ddpm_deploy.spec import ModelSpec

Body = TypeVar("Body")
Whole = int | str  # a number of up to 64 bits: as text too, since JavaScript rounds what is over 2^53
Format = Literal["png", "npz", "json"]
_MOST_DIGITS: Final = 100
_WHOLE: Final = re.compile(r"[0-9]{1,20}", re.ASCII)


class GoneError(Exception):
    """The caller has closed the connection: there is nobody to answer."""


class SamplesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What POST /v1/samples takes: the fields of a Request, and how to answer.

    seed, first_index: 0 to 2^64 - 1, as a number or as text. labels: names or numbers of classes, in turn. guidance:
    scales, in turn. share_until: as of a Request. deadline: seconds from now after which the images are of no use.
    format: of the answer, in place of what the header Accept says.
    """

    count: int = 1
    steps: int | None = None
    solver: str | None = None
    eta: float | None = None
    spacing: str | None = None
    timesteps: tuple[int, ...] | None = None
    seed: Whole | None = None
    first_index: Whole = 0
    labels: int | str | tuple[int | str, ...] = ()
    guidance: float | tuple[float, ...] | None = None
    share_until: int | None = None
    deadline: float | None = None
    format: Format | None = None


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """The body of a request. Raises RefusedError where it is too large or too slow, GoneError where its sender is."""
    if http.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "send the body as it is, without a Content-Encoding", "content_encoding")
    too_large = RefusedError(
        413, f"the body is larger than {limit} bytes", "too_large", headers={"Connection": "close"}
    )
    length = http.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        late = f"the body did not arrive within {BODY_SECONDS:.0f} s"
        raise RefusedError(408, late, "too_slow", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise GoneError from error
    return bytes(body)


def parse(body: bytes, kind: type[Body]) -> Body:
    """A body as the structure that it must have: JSON without NaN and without a key twice.

    Raises RefusedError, naming the field.
    """
    try:
        fields = json.loads(body, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise RefusedError(400, f"the body is not JSON as it should be: {what}", "not_json") from error
    try:
        return msgspec.convert(fields, kind)
    except UnicodeEncodeError as error:
        raise invalid("a key has half of a surrogate pair, which is no text") from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise invalid(first_line(error), _field_in(first_line(error))) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys stands there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a key twice")
    return fields


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _integer(digits: str) -> int:
    """A whole number. Its text is what an error shows, and Python reads no more than some thousand digits."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than any field takes")
    return int(digits)


def _field_in(message: str) -> str | None:
    """The field that msgspec complains of: "… - at `$.steps`", or "… unknown field `stepps`"."""
    found = re.search(r"at `\$\.(\w+)", message) or re.search(r"field `(.{1,100}?)`", message)
    return found[1] if found else None


def to_request(
    body: SamplesBody, spec: ModelSpec, settings: Settings, names: Mapping[str, str] | None = None
) -> Request:
    """The request that a body asks for, checked for a model and within the service's limits.

    names: what the caller calls a field, where that is something else. Raises RefusedError, naming the field.
    """
    try:
        request = _within(_request(body), settings)
        return request.checked(spec)
    except RefusedError as refusal:
        raise renamed(refusal, names or {}) from None
    except SettingError as error:
        said = invalid(str(error), _culprit(request, spec, str(error)))
        raise renamed(said, names or {}) from error


def renamed(refusal: RefusedError, names: Mapping[str, str]) -> RefusedError:
    """The same of a field by the name that the caller knows, also where the message begins with it."""
    own = refusal.param or ""
    if (theirs := names.get(own)) is None:
        return refusal
    message = re.sub(rf"^{own}\b", theirs, refusal.message)
    return dataclasses.replace(refusal, message=message, param=theirs)


def _request(body: SamplesBody) -> Request:
    """The same fields as a Request has them, not checked."""
    labels, guidance = body.labels, body.guidance
    return Request(
        count=body.count,
        steps=body.steps,
        solver=body.solver,  # type: ignore[arg-type]
        eta=body.eta,
        spacing=body.spacing,  # type: ignore[arg-type]
        timesteps=body.timesteps,
        seed=None if body.seed is None else _whole("seed", body.seed),
        first_index=_whole("first_index", body.first_index),
        labels=labels if isinstance(labels, tuple) else (labels,),
        guidance=guidance if isinstance(guidance, tuple) else () if guidance is None else (guidance,),
        share_until=body.share_until,
    )


def _whole(name: str, value: Whole) -> int:
    if isinstance(value, int):
        return value
    if not _WHOLE.fullmatch(value):
        raise invalid(f"{name} must be a whole number from 0 to 2^64 - 1, not {show(value[:40])}", name)
    return int(value)


def _within(request: Request, settings: Settings) -> Request:
    """The same request, which asks for no more than the service gives."""
    for name, value, most in (
        ("count", request.count, settings.max_count),
        ("steps", request.steps, settings.max_steps),
        ("timesteps", len(request.timesteps or ()), settings.max_steps),
        ("labels", len(request.labels), settings.max_count),
        ("guidance", len(request.guidance), settings.max_count),
    ):
        if value is not None and most is not None and value > most:
            raise invalid(f"{name} may be at most {most} here, not {value}", name)
    return request


def _culprit(request: Request, spec: ModelSpec, message: str) -> str | None:
    """The field without which there is no such complaint; of several, that which the complaint names first."""
    plain = Request()
    found: list[str] = []
    for name in Request.__struct_fields__:
        default = getattr(plain, name)
        if getattr(request, name) == default:
            continue
        try:
            msgspec.structs.replace(request, **{name: default}).checked(spec)
        except SettingError as error:
            if str(error) == message:
                continue
        found.append(name)
    return min(found, key=lambda name: message.find(name) % (len(message) + 1), default=None)
