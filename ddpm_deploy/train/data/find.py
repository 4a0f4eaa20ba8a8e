"""What a name on the command line means: a folder, an archive, an array file, or the digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DataError
from ddpm_deploy.files import require_file, show
from ddpm_deploy.train.data.arrays import ARRAY_SUFFIXES, array_file, array_source
from ddpm_deploy.train.data.idx import idx_file, is_idx
from ddpm_deploy.train.data.pictures import picture_source
from ddpm_deploy.train.data.source import DIGITS, Source
from ddpm_deploy.train.data.trees import Archive, Folder

_ARCHIVE_SUFFIX = ".zip"


def find_images(data: str, *, labels: bool = False, array: str = "") -> Source:
    """The images that `data` names.

    data: a folder of images, with its subfolders; a .zip of one; an .npy, .npz or idx file (MNIST's form); or the word
    "digits" (a folder of that name is "./digits"). labels: whether to find labels too: each folder in the folder is a
    class, or dataset.json has them, as StyleGAN's archives do; an .npz has an array of them, an idx file another beside
    it, and the digits have theirs. array: which array of an .npz the images are, where it has several.

    Raises DataError.
    """
    path = Path(data)
    if array and path.suffix.lower() != ".npz":
        raise DataError(f"{show(path)} is no .npz, of whose arrays --array could name one: leave it out")
    if data == DIGITS:
        return _digits(labels)
    if path.is_dir():
        return picture_source(Folder(path), labels)
    require_file(path, DataError)
    suffix = path.suffix.lower()
    if suffix == _ARCHIVE_SUFFIX:
        return picture_source(Archive(path), labels)
    if suffix in ARRAY_SUFFIXES:
        return array_file(path, labels, array)
    if is_idx(path):
        return idx_file(path, labels)
    raise DataError(
        f"{show(path)} is not a folder or .zip of images, nor an .npy, .npz or idx file, nor the word {DIGITS!r}"
    )


def _digits(labels: bool) -> Source:
    """1,797 handwritten digits, (N, 8, 8) (Alpaydin & Kaynak 1998, UCI, CC BY 4.0; shipped by scikit-learn)."""
    digits = require("sklearn.datasets", "train").load_digits()
    source = array_source(np.rint(digits.images * (255 / 16)).astype(np.uint8), DIGITS)
    if not labels:
        return source
    return replace(source, labels=digits.target.astype(np.int64), class_names=tuple("0123456789"))
