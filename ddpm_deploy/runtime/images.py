"""Images: [-1, 1] to uint8, grids, and the files that hold them."""

import itertools
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DataError, OutputError, first_line, plural
from ddpm_deploy.files import atomic, make_folder, require_file, require_output, show
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__

Pixels = NDArray[np.uint8]
Writer = Callable[[Array], None]  # takes samples (k, C, H, W), in order

PNG_KEY: Final = "ddpm_deploy"  # of the text in a PNG that says where it came from
_LARGEST_GRID: Final = 4096  # images
_LINE_WIDTH, _LINE_GREY = 2, 96  # of a grid
_SMALLEST_TILE: Final = 64  # pixels: smaller images are enlarged in a grid, so that a person sees them


def to_uint8(images: Array, value_range: tuple[float, float] = (-1.0, 1.0)) -> Pixels:
    """(N, C, H, W) floats in `value_range` → (N, H, W, C) uint8, rounded to nearest; clipped outside."""
    lo, hi = value_range
    pixels = np.clip((images - lo) * (255.0 / (hi - lo)), 0.0, 255.0)
    rounded: Pixels = np.rint(pixels).astype(np.uint8)
    return rounded.transpose(0, 2, 3, 1)


def grid(pixels: Pixels, columns: int | None = None) -> Pixels:
    """Tile (N, H, W, C) images into one (H', W', C), as near square as can be, on grey lines.

    Images under 64 pixels are enlarged by a whole factor, each pixel a square.
    """
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    zoom = max(1, _SMALLEST_TILE // max(height, width))
    tiles = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    tile_height, tile_width = height * zoom, width * zoom
    line = _LINE_WIDTH
    canvas = np.full((rows, tile_height + line, columns, tile_width + line, channels), _LINE_GREY, np.uint8)
    for i, tile in enumerate(tiles):
        canvas[i // columns, line:, i % columns, line:] = tile
    canvas = canvas.reshape(rows * (tile_height + line), columns * (tile_width + line), channels)
    return np.pad(canvas, ((0, line), (0, line), (0, 0)), constant_values=_LINE_GREY)


def to_pillow(pixels: Pixels) -> Any:
    """A PIL.Image of (H, W, C) pixels, C = 1 or 3."""
    return require("PIL.Image", "cpu").fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def save_png(pixels: Pixels, path: Path, text: Mapping[str, Any]) -> None:
    """Write one (H, W, C) image, C = 1 or 3, with `text` as JSON under the key "ddpm_deploy"."""
    info = require("PIL.PngImagePlugin", "cpu").PngInfo()
    info.add_text(PNG_KEY, json.dumps(dict(text)))
    with atomic(path) as temporary:
        to_pillow(pixels).save(temporary, pnginfo=info)


@dataclass(frozen=True)
class Origin:
    """Where a PNG says that it came from.

    model: digest of the weights. request: what was drawn. is_grid: whether the picture is a grid of the samples, or
    the one sample itself.
    """

    model: str
    request: Request
    is_grid: bool

    def to_text(self) -> dict[str, Any]:
        """What the PNG holds."""
        request = self.request.to_builtins()
        return {"model": self.model, "is_grid": self.is_grid, "request": request, "ddpm_deploy": __version__}


def read_origin(path: Path) -> tuple[Origin, Pixels]:
    """What a PNG says of where it came from, and its pixels (H, W, C).

    Raises DataError where it is no PNG of ours, or is broken.
    """
    require_file(path, DataError)
    image_module = require("PIL.Image", "cpu")
    try:
        with image_module.open(path, formats=("PNG",)) as image:
            text = image.text.get(PNG_KEY)
            pixels = np.atleast_3d(np.asarray(image))
    except Exception as error:  # Pillow's decoder of a broken file raises nearly anything
        raise DataError(f"{show(path)} is not a whole PNG: {first_line(error)}") from error
    try:
        origin = msgspec.json.decode(str(text or ""), type=Origin)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"{show(path)} does not say where it came from: ddpm-run did not make it") from error
    count = origin.request.count
    if origin.request.seed is None or count > (_LARGEST_GRID if origin.is_grid else 1):
        raise DataError(
            f"{show(path)} cannot hold {plural(count, 'image')}, as it says that it does, or names no seed"
        )
    return origin, pixels


@dataclass(frozen=True)
class Destination:
    """Where the samples of one run go: a grid (.png), an array (.npz), or a folder with a PNG for each.

    path: a name with a suffix, or a folder (made if it does not exist), whose files are named by sample index.
    request: the samples to come; a PNG says that it is of it. spec: the model's.
    as_float: whether an .npz holds `samples`, float32 (N, C, H, W), and not `arr_0`, uint8 (N, H, W, C).
    """

    path: Path
    request: Request
    spec: ModelSpec
    as_float: bool = False

    @property
    def _suffix(self) -> str:
        """What the path ends in; nothing where it is a folder."""
        return "" if self.path.is_dir() else self.path.suffix.lower()

    def check(self) -> None:
        """Raise OutputError where the samples could not be written: ask this before long work."""
        suffix, name = self._suffix, show(self.path)
        if suffix not in ("", ".png", ".npz"):
            raise OutputError(f"{name}: samples go to a .png (one grid), an .npz or a folder, not a {suffix}")
        if not suffix and self.path.is_file():
            raise OutputError(f"{name} is a file; a folder of images needs another name")
        require_output(self.path / "x" if self.path.is_dir() else self.path)
        if suffix == ".npz":
            return
        require("PIL.Image", "cpu")
        if self.as_float:
            raise OutputError(f"{name}: only an .npz holds floats")
        if self.spec.image_shape[0] not in (1, 3):
            raise OutputError(f"{name}: images of {self.spec.image_shape[0]} channels go to an .npz")
        if suffix == ".png" and self.request.count > _LARGEST_GRID:
            raise OutputError(
                f"{self.request.count} images do not fit in one grid (at most {_LARGEST_GRID}): name an .npz or a "
                "folder"
            )

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Give the function that takes the samples, (k, C, H, W) in value_range, in order."""
        if not self._suffix:
            yield self._folder_writer()
        elif self._suffix == ".npz":
            with self._npz_writer() as write:
                yield write
        else:
            batches: list[Pixels] = []
            yield lambda samples: batches.append(self._pixels(samples))
            save_png(grid(np.concatenate(batches)), self.path, self._origin(self.request, is_grid=True))

    def _origin(self, request: Request, *, is_grid: bool) -> dict[str, Any]:
        if request.table is not None:  # a caller's own cannot be told
            return {}
        return Origin(self.spec.provenance.digest, request, is_grid).to_text()

    def _pixels(self, samples: Array) -> Pixels:
        return to_uint8(samples, self.spec.value_range)

    def _folder_writer(self) -> Writer:
        make_folder(self.path)
        places = itertools.count()

        def write(samples: Array) -> None:
            for pixels, place in zip(self._pixels(samples), places, strict=False):
                request = self.request[place : place + 1]
                text = self._origin(request, is_grid=False)
                save_png(pixels, self.path / f"{request.first_index:06d}.png", text)

        return write

    @contextmanager
    def _npz_writer(self) -> Iterator[Writer]:
        """An .npz written as the samples come, so that any number of them fits in memory."""
        channels, height, width = self.spec.image_shape
        count = self.request.count
        name, dtype, shape = "arr_0", "|u1", (count, height, width, channels)
        if self.as_float:
            name, dtype, shape = "samples", "<f4", (count, channels, height, width)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        with (
            atomic(self.path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)

            def write(samples: Array) -> None:
                file.write((samples if self.as_float else self._pixels(samples)).tobytes())

            yield write
