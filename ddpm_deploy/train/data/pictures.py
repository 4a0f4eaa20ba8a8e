"""Image files, in a folder or an archive: which there are, what Pillow says of them, and their classes."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath
from typing import Final

import msgspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.protocols import Labels
from ddpm_deploy.train.data.source import Depth, Source, checked_labels
from ddpm_deploy.train.data.trees import Tree

logger = logging.getLogger(__name__)

# What Pillow decodes by itself. It goes by a file's content, and would start Ghostscript for PostScript
# that calls itself .png.
_RASTERS: Final = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP XBM XPM"
Image.init()  # registers its decoders
_FORMATS: Final = tuple(name for name in _RASTERS.split() if name in Image.OPEN)
# Of these, those that Pillow may give more than 8 bits of.
_DEEP_FORMATS: Final = ("JPEG2000", "PNG", "PPM", "TIFF")
_DEEP: Final[dict[str, Depth]] = {"I": "32 bits", "F": "floats"}  # by Pillow's mode; besides those of 16 bits
_GREY: Final = ("1", "L", "LA", "I", "F")
_LABELS: Final = PurePosixPath("dataset.json")  # of an archive that StyleGAN's tools made


class _StyleGanLabels(msgspec.Struct):
    """dataset.json: of each file its label, or none at all (Karras et al., stylegan3, dataset_tool.py)."""

    labels: list[tuple[str, int]] | None = None


def picture_source(tree: Tree, labels: bool) -> Source:
    """The images of a tree. Raises DataError where there are none, or no labels where these are asked for."""
    known = _suffixes(_FORMATS)
    files = [file for file in tree.files if file.suffix.lower() in known]
    if not files:
        raise DataError(f"{tree.name} holds no images: files such as .png, .jpg or .webp are needed")
    _tell_others([file for file in tree.files if file.suffix.lower() not in known and file != _LABELS])
    source = Source(
        len(files),
        load=lambda i: _open(tree, files[i]),
        name=lambda i: tree.show(files[i]),
        channels=cache(lambda: 1 if _all_grey(tree, files) else 3),
        depths=cache(lambda: _depths(tree, files)),
    )
    if not labels:
        return source
    listed = _listed_labels(tree, files)
    return _with_class_folders(source, tree, files) if listed is None else replace(source, labels=listed)


def _suffixes(formats: Sequence[str]) -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def _tell_others(files: Sequence[PurePosixPath]) -> None:
    if files:
        kinds = Counter(file.suffix or "without a suffix" for file in files)
        named = show(", ".join(kind for kind, _ in kinds.most_common(5)))
        noun = "file is" if len(files) == 1 else "files are"
        logger.info("%d %s of other kinds and left out (%s)", len(files), noun, named)


def _open(tree: Tree, file: PurePosixPath) -> Image.Image:
    try:
        return Image.open(tree.open(file), formats=_FORMATS)
    except UnidentifiedImageError as error:  # whose text repeats the name
        raise ValueError("it is not an image of a kind that is read") from error


def _modes(tree: Tree, files: Sequence[PurePosixPath]) -> Iterator[str]:
    """Pillow's mode of every image that opens, by its header. One that does not is told of when it is read."""
    for file in files:
        try:
            with _open(tree, file) as image:
                yield image.mode
        except Exception:  # Pillow's decoders of a broken file raise nearly anything
            continue


def _all_grey(tree: Tree, files: Sequence[PurePosixPath]) -> bool:
    return all(mode in _GREY or mode.startswith("I;16") for mode in _modes(tree, files))


def _depths(tree: Tree, files: Sequence[PurePosixPath]) -> frozenset[Depth]:
    """What holds the numbers of the images; only of formats that can hold more than 8 bits is a header read."""
    deep = _suffixes(_DEEP_FORMATS)
    looked = [file for file in files if file.suffix.lower() in deep]
    found: set[Depth] = {
        "16 bits" if mode.startswith("I;16") else _DEEP.get(mode, "8 bits") for mode in _modes(tree, looked)
    }
    return frozenset(found | ({"8 bits"} if len(looked) < len(files) or not found else set()))


def _listed_labels(tree: Tree, files: Sequence[PurePosixPath]) -> Labels | None:
    """The labels in dataset.json, if there is one and it has some."""
    if _LABELS not in tree.files:
        return None
    name = tree.show(_LABELS)
    try:
        content = tree.open(_LABELS)
        text = content.read() if hasattr(content, "read") else content.read_bytes()
        labels = msgspec.json.decode(text, type=_StyleGanLabels).labels
    except (OSError, ValueError, RuntimeError, RecursionError) as error:
        raise DataError(f"{name} does not hold labels as [file, number]: {first_line(error)}") from error
    if labels is None:
        return None
    number = {PurePosixPath(file): label for file, label in labels}
    missing = next((file for file in files if file not in number), None)
    if missing is not None:
        raise DataError(f"{name} has no label for {tree.show(missing)}")
    try:
        return checked_labels(np.array([number[file] for file in files]), len(files), name)
    except OverflowError as error:
        raise DataError(f"{name} holds labels that are no numbers of classes") from error


def _with_class_folders(source: Source, tree: Tree, files: Sequence[PurePosixPath]) -> Source:
    """Label each image by the folder at the top of the tree that holds it."""
    bare = next((file for file in files if len(file.parts) == 1), None)
    if bare is not None:
        raise DataError(
            f"{tree.show(bare)} is in no class: with --labels, each image is in a folder of its class"
        )
    named: dict[str, str] = {}  # the folder of each class; file systems differ in how they compose an é
    for folder in tree.folders:
        name = unicodedata.normalize("NFC", folder)
        if name in named:
            raise DataError(f"{tree.name} has two folders of the name {show(name)}: merge or rename them")
        named[name] = folder
    used = {file.parts[0] for file in files}
    empty = next((name for name, folder in named.items() if folder not in used), None)
    if empty is not None:
        raise DataError(f"{tree.name}: the class {show(empty)} has no images: add some, or remove its folder")
    names = sorted(named)
    number = {named[name]: i for i, name in enumerate(names)}
    labels = np.array([number[file.parts[0]] for file in files], np.int64)
    return replace(source, labels=labels, class_names=tuple(names))
