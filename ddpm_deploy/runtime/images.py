"""Images: [-1, 1] to uint8, grids, and the files that hold them."""

import io
import itertools
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import array_in
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DataError, OutputError, SettingError, first_line, plural
from ddpm_deploy.files import atomic, make_folder, require_file, require_output, show
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

Pixels = NDArray[np.uint8]
Writer = Callable[[Array], object]  # takes samples (k, C, H, W), in order
# What an .npz holds: arr_0 of uint8, as it is or grey in three equal channels; or samples, unrounded, in value_range or
# in the units of the data.
Form = Literal["uint8", "rgb", "float", "data"]

LABELS: Final = "arr_1"  # of an .npz: the labels of its images, int64 (N,)
PNG_KEY: Final = "ddpm_deploy"  # of the text in a PNG that says where it came from
COLOURS: Final = (1, 3, 4)  # of images that a PNG can hold: grey, RGB, RGBA
_LARGEST_GRID: Final = 4096  # images
_LINE_WIDTH, _LINE_GREY = 2, 96  # of a grid
_SMALLEST_TILE: Final = 64  # pixels: smaller images are enlarged in a grid, so that a person sees them


def to_uint8(images: Array, value_range: tuple[float, float] = (-1.0, 1.0)) -> Pixels:
    """(N, C, H, W) floats in `value_range` → (N, H, W, C) uint8, rounded to nearest; clipped outside."""
    lo, hi = value_range
    pixels = np.clip((images - lo) * (255.0 / (hi - lo)), 0.0, 255.0)
    rounded: Pixels = np.rint(pixels).astype(np.uint8)
    return rounded.transpose(0, 2, 3, 1)


def in_data_range(
    images: Array, data_range: tuple[float, float], value_range: tuple[float, float] = (-1.0, 1.0)
) -> Array:
    """(N, C, H, W) floats in `value_range` → float32 (N, C, H, W) in the units of the data, not clipped.

    data_range: what the ends of `value_range` stand for, as `ModelSpec.data_range` says it; (0, 255) of 8-bit images.
    """
    (lo, hi), (value_lo, value_hi) = data_range, value_range
    shares = (images.astype(np.float64) - value_lo) / (value_hi - value_lo)
    scaled: Array = (lo + shares * (hi - lo)).astype(np.float32)
    return scaled


def stored_as(
    form: Form, image_shape: tuple[int, int, int]
) -> tuple[str, np.dtype[Any], tuple[int, int, int]]:
    """What an .npz of a form holds: the name of the array, its type, and the shape of one image (C, H, W) in it.

    Raises OutputError where images of so many channels have no such form.
    """
    channels, height, width = image_shape
    if form == "rgb" and channels not in (1, 3):
        raise OutputError(f"images of {channels} channels do not become RGB")
    if form in ("uint8", "rgb"):
        return "arr_0", np.dtype(np.uint8), (height, width, 3 if form == "rgb" else channels)
    return "samples", np.dtype(np.float32), image_shape


def grid(pixels: Pixels, columns: int | None = None) -> Pixels:
    """Tile (N, H, W, C) images into one (H', W', C), as near square as can be, on grey lines, which are opaque.

    Images under 64 pixels are enlarged by a whole factor, each pixel a square.
    """
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    zoom = max(1, _SMALLEST_TILE // max(height, width))
    tiles = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    tile_height, tile_width = height * zoom, width * zoom
    line, colour = _LINE_WIDTH, [_LINE_GREY] * min(channels, 3) + [255] * (channels - 3)
    down, across = tile_height + line, tile_width + line
    canvas = np.full((rows * down + line, columns * across + line, channels), colour, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * down + line, i % columns * across + line
        canvas[top : top + tile_height, left : left + tile_width] = tile
    return canvas


def to_pillow(pixels: Pixels) -> Any:
    """A PIL.Image of (H, W, C) pixels, C = 1, 3 or 4."""
    return require("PIL.Image", "cpu").fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def save_png(pixels: Pixels, path: Path, text: Mapping[str, Any]) -> None:
    """Write one (H, W, C) image, C = 1, 3 or 4, with `text` as JSON under the key "ddpm_deploy"."""
    content = png(pixels, text)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def png(pixels: Pixels, text: Mapping[str, Any]) -> bytes:
    """What `save_png` writes."""
    info = require("PIL.PngImagePlugin", "cpu").PngInfo()
    info.add_text(PNG_KEY, json.dumps(dict(text)))
    file = io.BytesIO()
    to_pillow(pixels).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


@dataclass(frozen=True)
class Origin:
    """Where a PNG says that it came from.

    model: digest of the weights. request: what was drawn. is_grid: whether the picture is a grid of the samples, or
    the one sample itself. between: of a strip from one image to another, of which images, and how.
    """

    model: str
    request: Request
    is_grid: bool
    between: dict[str, Any] | None = None

    def to_text(self) -> dict[str, Any]:
        """What the PNG holds."""
        text = {
            "model": self.model,
            "is_grid": self.is_grid,
            "request": self.request.to_builtins(),
            "ddpm_deploy": __version__,
        }
        return text if self.between is None else text | {"between": self.between}


@contextmanager
def _opened_png(path: Path) -> Iterator[Any]:
    """The PIL.Image of a PNG. Raises DataError where there is none, or it turns out to be broken."""
    require_file(path, DataError)
    image_module = require("PIL.Image", "cpu")
    try:
        with image_module.open(path, formats=("PNG",)) as image:
            yield image
    except Exception as error:  # Pillow's decoder of a broken file raises nearly anything
        raise DataError(f"{show(path)} is not a whole PNG: {first_line(error)}") from error


def read_pixels(path: Path) -> Pixels:
    """The pixels (H, W, C) of a PNG. Raises DataError where it is broken."""
    with _opened_png(path) as image:
        return np.atleast_3d(np.asarray(image))


def read_origin(path: Path) -> Origin:
    """What a PNG says of where it came from. Raises DataError where it is no PNG of ours, or is broken.

    One of ours says it before its pixels, which are not decoded; another program may have moved it behind them.
    """
    with _opened_png(path) as image:
        text = image.info.get(PNG_KEY) or image.text.get(PNG_KEY)
    try:
        origin = msgspec.json.decode(str(text or ""), type=Origin)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"{show(path)} does not say where it came from: ddpm-run did not make it") from error
    count = origin.request.count
    if origin.request.seed is None or count > (_LARGEST_GRID if origin.is_grid else 1):
        raise DataError(
            f"{show(path)} cannot hold {plural(count, 'image')}, as it says that it does, or names no seed"
        )
    return origin


@dataclass(frozen=True)
class Destination:
    """Where the samples of one run go: a grid (.png), an array (.npz), or a folder with a PNG for each.

    path: a name with a suffix, or a folder (made if it does not exist), whose files are named by sample index.
    request: the samples to come; a PNG says that it is of it. spec: the model's.
    form: of an .npz, which holds `arr_0`, uint8 (N, H, W, C), or `samples`, float32 (N, C, H, W); and, of a
    class-conditional model, the labels as `arr_1`, int64 (N,). force: whether pictures may go among, and replace, those
    of another run.
    """

    path: Path
    request: Request
    spec: ModelSpec
    form: Form = "uint8"
    force: bool = False

    @property
    def _suffix(self) -> str:
        """What the path ends in; nothing where it is a folder."""
        return "" if self.path.is_dir() else self.path.suffix.lower()

    def check(self) -> None:
        """Raise OutputError where the samples could not be written: ask this before long work."""
        suffix, name = self._suffix, show(self.path)
        if self.path.name.lower() in (".png", ".npz"):
            raise OutputError(f"{name} has no name before its suffix: name the file")
        if suffix not in ("", ".png", ".npz"):
            raise OutputError(f"{name}: samples go to a .png (one grid), an .npz or a folder, not a {suffix}")
        if not suffix and self.path.is_file():
            raise OutputError(f"{name} is a file; a folder of images needs another name")
        require_output(self.path / "x" if self.path.is_dir() else self.path)
        channels = self.spec.image_shape[0]
        if suffix == ".npz":
            stored_as(self.form, self.spec.image_shape)  # or is refused
            return
        require("PIL.Image", "cpu")
        if self.form != "uint8":
            raise OutputError(
                f"{name}: only an .npz holds {'grey as RGB' if self.form == 'rgb' else 'floats'}"
            )
        if channels not in COLOURS:
            raise OutputError(f"{name}: images of {channels} channels go to an .npz")
        if suffix == ".png" and self.request.count > _LARGEST_GRID:
            raise OutputError(
                f"{self.request.count} images do not fit in one grid (at most {_LARGEST_GRID}): name an .npz or a "
                "folder"
            )

    def require_own(self) -> None:
        """Raise OutputError where the folder holds what is no picture of this model, seed and settings, unless that is
        to be replaced.

        Whatever its sample index is, so that a run may add to another; hidden files are passed over. The text of each
        picture is read, and not its pixels: 50,000 take seconds.
        """
        if self.path.is_dir() and not self._suffix:
            for path in sorted(self.path.iterdir()):
                if not path.name.startswith("."):
                    self._require_own(path)

    def _require_own(self, path: Path) -> None:
        if not self.force and (why := self._strange(path)):
            raise OutputError(
                f"{show(self.path)} holds {show(path.name)}, {why}: choose another folder, give the --seed and the "
                "settings of what is there, or pass --force"
            )

    def _strange(self, path: Path) -> str:
        """Why a file is no picture of this run; nothing where it is one."""
        try:
            origin = read_origin(path)
        except DataError:
            return "which is no picture of ddpm-run"
        digest = self.spec.provenance.digest
        if origin.is_grid:
            return "which is a grid"
        if origin.model != digest:
            return f"which is of the model {show(origin.model[:12])}…, and this is {digest[:12]}…"
        try:
            there = origin.request.checked(self.spec)
        except SettingError:
            return "which no run of this model made"
        here = msgspec.structs.replace(self.request, first_index=there.first_index, count=1)
        if path.name != _picture_name(there):
            return f"which is {_picture_name(there)} under another name"
        differing = [
            f"{name} {theirs}, not {mine}"
            for (name, theirs), (_, mine) in zip(self._meaning(there), self._meaning(here), strict=True)
            if theirs != mine
        ]
        return f"which is of another run ({'; '.join(differing)})" if differing else ""

    def _meaning(self, request: Request) -> list[tuple[str, object]]:
        """What makes the one sample of a request, whichever way that was said."""
        labels, scales = request.label_numbers(self.spec), request.scales()
        return [
            ("seed", request.seed),
            ("steps", request.steps),
            ("solver", request.solver),
            ("eta", request.eta or 0.0),
            ("spacing", request.spacing),
            ("timesteps", request.timesteps),
            ("label", "none" if labels is None else labels[0]),
            ("guidance", "none" if scales is None else scales[0]),
            ("share_until", "none" if request.share_until is None else request.share_until),
        ]

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Give the function that takes the samples, (k, C, H, W) in value_range, in order."""
        if not self._suffix:
            yield self._folder_writer()
        elif self._suffix == ".npz":
            with (
                atomic(self.path) as temporary,
                npz_writer(temporary, self.request, self.spec, self.form) as write,
            ):
                yield write
        else:
            batches: list[Pixels] = []
            yield lambda samples: batches.append(self._pixels(samples))
            text = origin_text(self.spec, self.request, is_grid=True)
            save_png(grid(np.concatenate(batches)), self.path, text)

    def _pixels(self, samples: Array) -> Pixels:
        return to_uint8(samples, self.spec.value_range)

    def _folder_writer(self) -> Writer:
        make_folder(self.path)
        places = itertools.count()

        def write(samples: Array) -> None:
            for pixels, place in zip(self._pixels(samples), places, strict=False):
                request = self.request[place : place + 1]
                text = origin_text(self.spec, request, is_grid=False)
                path = self.path / _picture_name(request)
                if path.exists():  # another run may have begun after this one
                    self._require_own(path)
                save_png(pixels, path, text)

        return write


def origin_text(spec: ModelSpec, request: Request, *, is_grid: bool) -> dict[str, Any]:
    """What a PNG of a request says of where it came from; nothing of a table of a caller's own, which has no form."""
    if request.table is not None:
        return {}
    return Origin(spec.provenance.digest, request, is_grid).to_text()


@contextmanager
def npz_writer(target: Path | IO[bytes], request: Request, spec: ModelSpec, form: Form) -> Iterator[Writer]:
    """An .npz written as the samples come, so that any number fits in memory; `Destination` says what it holds."""
    name, dtype, shape = stored_as(form, spec.image_shape)
    labels = request.label_numbers(spec)
    with zipfile.ZipFile(target, "w") as archive:
        with array_in(archive, name, dtype, (request.count, *shape)) as put:
            yield lambda samples: put(_numbers(samples, spec, form).tobytes())
        if labels is not None:
            with array_in(archive, LABELS, labels.dtype, labels.shape) as put:
                put(labels.tobytes())


def _numbers(samples: Array, spec: ModelSpec, form: Form) -> NDArray[Any]:
    """Samples (k, C, H, W) as an .npz has them."""
    match form:
        case "uint8":
            return to_uint8(samples, spec.value_range)
        case "rgb":
            pixels = to_uint8(samples, spec.value_range)
            return np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        case "float":
            return samples
        case "data":
            return in_data_range(samples, spec.data_range, spec.value_range)


def _picture_name(request: Request) -> str:
    """The name that a sample's picture has in a folder."""
    return f"{request.first_index:06d}.png"
