"""Trees of image files: a folder or a .zip archive of one."""

import io
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show

_LARGEST_MEMBER: Final = 1 << 30  # bytes of one file in an archive
_NOT_OURS: Final = "__MACOSX"  # what macOS adds to an archive


class Tree(Protocol):
    """Files below one place, but for those that are hidden.

    name: of the place, for messages. files: of each its path below, in order. folders: at the top.
    """

    name: str
    files: list[PurePosixPath]
    folders: list[str]

    def open(self, file: PurePosixPath) -> Path | io.BytesIO:
        """What Pillow opens."""

    def show(self, file: PurePosixPath) -> str:
        """A file's path, for messages."""


class Folder:
    """A folder and its subfolders, links followed."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = show(path), path
        self.files: list[PurePosixPath] = []
        self.folders: list[str] = []
        seen: set[tuple[int, int]] = set()
        for place, folders, names in os.walk(path, followlinks=True):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            if place == str(path):
                self.folders = [name for name in folders if not Path(place, name).samefile(path)]
            below = PurePosixPath(os.path.relpath(place, path))
            self.files += [below / name for name in names if self._is_file(place, name)]
        self.files.sort()

    @staticmethod
    def _is_file(place: str, name: str) -> bool:
        return not name.startswith(".") and Path(place, name).is_file()

    def open(self, file: PurePosixPath) -> Path:
        """Where it is."""
        return self._path / file

    def show(self, file: PurePosixPath) -> str:
        """Its path, for messages."""
        return show(self._path / file)


class Archive:
    """A .zip archive, read in place. A folder that holds all else is no level of its own."""

    def __init__(self, path: Path) -> None:
        self.name = show(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{self.name} is not a whole .zip archive: {first_line(error)}") from error
        shown = {PurePosixPath(info.filename): info for info in self._archive.infolist()}
        shown = {place: info for place, info in shown.items() if _is_shown(place)}
        root = _common_folder([place for place, info in shown.items() if not info.is_dir()])
        below = {place.relative_to(root): info for place, info in shown.items() if root in place.parents}
        self._members = {place: info for place, info in below.items() if not info.is_dir()}
        self.files = sorted(self._members)
        self.folders = sorted({p.parts[0] for p, info in below.items() if info.is_dir() or len(p.parts) > 1})

    def open(self, file: PurePosixPath) -> io.BytesIO:
        """Its content."""
        info = self._members[file]
        if info.file_size > _LARGEST_MEMBER:
            raise ValueError(f"it unpacks to {info.file_size / 2**30:.1f} GiB")
        return io.BytesIO(self._archive.read(info))

    def show(self, file: PurePosixPath) -> str:
        """Its path, for messages."""
        return f"{show(str(file))} in {self.name}"


def _is_shown(place: PurePosixPath) -> bool:
    return _NOT_OURS not in place.parts and not any(part.startswith(".") for part in place.parts)


def _common_folder(files: list[PurePosixPath]) -> PurePosixPath:
    """The folder that holds all else in folders of its own, as an archive of one folder has it."""
    root = PurePosixPath()
    while True:
        below = [file.relative_to(root).parts for file in files]
        tops = {parts[0] for parts in below}
        if len(tops) != 1 or not any(len(parts) > 2 for parts in below):
            return root
        root /= tops.pop()
