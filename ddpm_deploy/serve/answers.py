"""From images to bytes: a PNG, an .npz or JSON, whichever a caller likes best."""

import base64
import io
from typing import Final, NotRequired, TypedDict

from ddpm_deploy.runtime.images import COLOURS, grid, npz_writer, origin_text, png, to_uint8
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.serve.bodies import Format
from ddpm_deploy.serve.refusals import RefusedError, invalid
from ddpm_deploy.spec import ModelSpec

MEDIA: Final[dict[Format, str]] = {
    "png": "image/png",
    "npz": "application/x-npz",
    "json": "application/json",
}
_ALSO: Final[dict[str, Format]] = {
    "image/*": "png",
    "application/octet-stream": "npz",
    "application/zip": "npz",
    "application/*": "json",
}
_KINDS: Final[dict[str, Format]] = {media: kind for kind, media in MEDIA.items()} | _ALSO


class RequestFields(TypedDict):
    """A request as it was done: `POST /v1/samples` takes it as it is. Its numbers of 64 bits are text."""

    count: int
    steps: int | None
    solver: str | None
    eta: float | None
    spacing: str | None
    timesteps: list[int] | None
    seed: str
    first_index: str
    labels: list[int]
    guidance: list[float]
    share_until: NotRequired[int]


class PictureFields(TypedDict):
    """One image: its sample index, its label, and a PNG in base64."""

    index: str
    label: int | None
    png: str


def wanted(accept: str | None, default: Format) -> Format:
    """The format that a header Accept likes best; `default` where it likes anything.

    Raises RefusedError where it likes none of ours.
    """
    if not accept:
        return default
    ranges = [_weighed(part) for part in accept.split(",")[:64]]
    for media, weight in sorted(ranges, key=lambda item: -item[1]):
        if weight > 0 and media == "*/*":
            return default
        if weight > 0 and media in _KINDS:
            return _KINDS[media]
    raise RefusedError(
        406, f"images come as {', '.join(MEDIA.values())}: accept one of these", "not_acceptable", "accept"
    )


def _weighed(part: str) -> tuple[str, float]:
    """A media type and how much it is liked, of "image/png;q=0.5"."""
    media, *parameters = (text.strip().lower() for text in part.split(";"))
    weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    try:
        return media, float(weight)
    except ValueError:
        return media, 0.0


def require_picture(spec: ModelSpec, kind: Format, param: str = "format") -> None:
    """Raise RefusedError where the model's images are none that a PNG can hold. param: the field that asks for one."""
    if kind != "npz" and spec.image_shape[0] not in COLOURS:
        raise invalid(f"images of {spec.image_shape[0]} channels come as npz alone", param)


def encoded(images: Array, request: Request, spec: ModelSpec, kind: Format) -> bytes:
    """Images (N, C, H, W) as one .png (a grid) or .npz, as `ddpm-run` writes them."""
    if kind == "png":
        text = origin_text(spec, request, is_grid=True)
        return png(grid(to_uint8(images, spec.value_range)), text)
    file = io.BytesIO()
    with npz_writer(file, request, spec, "uint8") as write:
        write(images)
    return file.getvalue()


def picture(image: Array, request: Request, spec: ModelSpec) -> bytes:
    """A PNG of the one image (C, H, W) of a request."""
    return png(to_uint8(image[None], spec.value_range)[0], origin_text(spec, request, is_grid=False))


def preview(image: Array, spec: ModelSpec) -> bytes:
    """A PNG of an image (C, H, W) on its way."""
    return png(to_uint8(image[None], spec.value_range)[0], {})


def as_text(data: bytes) -> str:
    """Bytes as JSON has them, base64."""
    return base64.b64encode(data).decode()


def request_fields(request: Request) -> RequestFields:
    """A request as JSON that also JavaScript reads exactly."""
    fields = request.to_builtins()
    exact: RequestFields = {**fields, "seed": str(request.seed), "first_index": str(request.first_index)}  # type: ignore[typeddict-item]  # of plain dicts mypy knows no keys
    return exact


def picture_fields(images: Array, request: Request, spec: ModelSpec) -> list[PictureFields]:
    """The images of a request as JSON."""
    labels = request.label_numbers(spec)
    return [
        {
            "index": str(request.first_index + i),
            "label": None if labels is None else int(labels[i]),
            "png": as_text(picture(image, request[i : i + 1], spec)),
        }
        for i, image in enumerate(images)
    ]
