"""Image files, in a folder or an archive: which there are, what Pillow says of them, and their classes."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Final

import msgspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.protocols import Labels
from ddpm_deploy.train.data.pixels import depth_of
from ddpm_deploy.train.data.source import Depth, Source, checked_labels
from ddpm_deploy.train.data.trees import Tree, posix_path

logger = logging.getLogger(__name__)

# What Pillow decodes by itself. It goes by a file's content, and would start Ghostscript for PostScript
# that calls itself .png.
_RASTERS: Final = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP XBM XPM"
Image.init()  # registers its decoders
_FORMATS: Final = tuple(name for name in _RASTERS.split() if name in Image.OPEN)
# Of these, those that Pillow may give more than 8 bits of.
_DEEP_FORMATS: Final = ("JPEG2000", "PNG", "PPM", "TIFF")
_GREY: Final = ("1", "L", "LA")
# Of each file its label: {"labels": [["00000/img0.png", 3], …]} (Karras et al., stylegan3, dataset_tool.py).
_LABELS: Final = "dataset.json"


def picture_source(tree: Tree, labels: bool) -> Source:
    """The images of a tree. Raises DataError where there are none, or no labels where these are asked for."""
    known = _suffixes(_FORMATS)
    files = [file for file in tree.files if file.suffix.lower() in known]
    if not files:
        raise DataError(f"{tree.name} holds no images: files such as .png, .jpg or .webp are needed")
    _tell_others([file for file in tree.files if file.suffix.lower() not in known and file.name != _LABELS])
    look = cache(partial(_look, tree))
    source = Source(
        len(files),
        load=lambda i: _opened(tree, files[i]),
        name=lambda i: tree.show(files[i]),
        channels=cache(lambda: 1 if all(map(_is_grey, map(look, files))) else 3),
        depths=cache(lambda: _depths(look, files)),
    )
    if not labels:
        return source
    root = _root(files)
    listed = _listed_labels(tree, files, root)
    return (
        _with_class_folders(source, tree, files, root) if listed is None else replace(source, labels=listed)
    )


def _root(files: Sequence[PurePosixPath]) -> PurePosixPath:
    """The folder whose folders are the classes: one that holds all others in a single folder of its own is not it."""
    root = PurePosixPath()
    while True:
        below = [file.relative_to(root).parts for file in files]
        tops = {parts[0] for parts in below}
        if len(tops) != 1 or not any(len(parts) > 2 for parts in below):
            return root
        root /= tops.pop()


def _suffixes(formats: Sequence[str]) -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def _tell_others(files: Sequence[PurePosixPath]) -> None:
    if files:
        kinds = Counter(file.suffix or "without a suffix" for file in files)
        named = show(", ".join(kind for kind, _ in kinds.most_common(5)))
        noun = "file is" if len(files) == 1 else "files are"
        logger.info("%d %s of other kinds and left out (%s)", len(files), noun, named)


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """One image file by itself. Raises ValueError where it is none, and whatever Pillow's decoders raise."""
    with path.open("rb") as content:
        yield _identified(content)


@contextmanager
def _opened(tree: Tree, file: PurePosixPath) -> Iterator[Image.Image]:
    """What Pillow makes of a file. Raises ValueError where that is nothing, and whatever its decoders raise."""
    with tree.open(file) as content:
        yield _identified(content)


def _identified(content: IO[bytes]) -> Image.Image:
    try:
        return Image.open(content, formats=_FORMATS)
    except UnidentifiedImageError as error:  # whose text repeats the name
        raise ValueError("it is not an image of a kind that is read") from error


@dataclass(frozen=True)
class _Look:
    """What the header of an image says: Pillow's mode, and its depth."""

    mode: str
    depth: Depth


def _look(tree: Tree, file: PurePosixPath) -> _Look | None:
    """Look at a header; None where the image does not open, which is told when it is read."""
    try:
        with _opened(tree, file) as image:
            return _Look(image.mode, depth_of(image))
    except Exception:  # Pillow's decoders of a broken file raise nearly anything
        return None


def _is_grey(look: _Look | None) -> bool:
    return look is None or look.mode in _GREY or look.depth != "8 bits"


def _depths(
    look: Callable[[PurePosixPath], _Look | None], files: Sequence[PurePosixPath]
) -> frozenset[Depth]:
    """What holds the numbers of the images; only of formats that can hold more than 8 bits is a header read."""
    deep = _suffixes(_DEEP_FORMATS)
    looked = [file for file in files if file.suffix.lower() in deep]
    found = {there.depth for there in map(look, looked) if there}
    return frozenset(found | ({"8 bits"} if len(looked) < len(files) or not found else set()))


def _listed_labels(tree: Tree, files: Sequence[PurePosixPath], root: PurePosixPath) -> Labels | None:
    """The labels in dataset.json, if there is one and it has some."""
    place = next(
        (folder / _LABELS for folder in (PurePosixPath(), root) if folder / _LABELS in tree.files), None
    )
    if place is None:
        return None
    name = tree.show(place)
    try:
        with tree.open(place) as content:
            text = content.read()
        whole = msgspec.json.decode(text)
        if not isinstance(whole, dict) or not whole.get("labels"):  # somebody else's, or without labels
            return None
        labels = msgspec.convert(whole["labels"], list[tuple[str, int]])
    except Exception as error:  # zipfile's reader of a hostile file raises nearly anything
        raise DataError(f"{name} does not hold labels as [file, number]: {first_line(error)}") from error
    number = {place.parent / posix_path(file): label for file, label in labels}
    missing = next((file for file in files if file not in number), None)
    if missing is not None:
        raise DataError(f"{name} has no label for {tree.show(missing)}")
    try:
        return checked_labels(np.array([number[file] for file in files]), len(files), name)
    except OverflowError as error:
        raise DataError(f"{name} holds labels that are no numbers of classes") from error


def _with_class_folders(
    source: Source, tree: Tree, files: Sequence[PurePosixPath], root: PurePosixPath
) -> Source:
    """Label each image by the folder in `root` that holds it."""
    bare = next((file for file in files if file.parent == root), None)
    if bare is not None:
        raise DataError(
            f"{tree.show(bare)} is in no class: with labels, each image is in a folder of its class"
        )
    used = {root / file.relative_to(root).parts[0] for file in files}
    named: dict[
        str, PurePosixPath
    ] = {}  # the folder of each class; file systems differ in how they compose an é
    for folder in tree.folders:
        if folder.parent != root or folder == root:
            continue
        name = unicodedata.normalize("NFC", folder.name)
        if name in named:
            raise DataError(f"{tree.name} has two folders of the name {show(name)}: merge or rename them")
        if folder not in used:
            raise DataError(
                f"{tree.name}: the class {show(name)} has no images: add some, or remove its folder"
            )
        named[name] = folder
    names = sorted(named)
    number = {named[name]: i for i, name in enumerate(names)}
    labels = np.array([number[root / file.relative_to(root).parts[0]] for file in files], np.int64)
    return replace(source, labels=labels, class_names=tuple(names))
