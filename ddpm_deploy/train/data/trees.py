"""Trees of image files: a folder or a .zip archive of one."""

import io
import os
import unicodedata
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Final, Protocol

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show

_LARGEST_MEMBER: Final = 1 << 30  # bytes of one file in an archive
_NOT_OURS: Final = "__MACOSX"  # what macOS adds to an archive
_UTF_8, _ENCRYPTED = 0x800, 0x1  # flags of a member


class Tree(Protocol):
    """Files below one place, but for those that are hidden.

    name: of the place, for messages. files, folders: of each its path below; the files in the order of their names,
    which is the same however a file system composes an é.
    """

    name: str
    files: list[PurePosixPath]
    folders: list[PurePosixPath]

    def open(self, file: PurePosixPath) -> IO[bytes]:
        """A file's content."""

    def show(self, file: PurePosixPath) -> str:
        """A file's path, for messages."""


class Folder:
    """A folder and its subfolders, links followed. Raises DataError where one of them cannot be read."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = show(path), path
        files: list[PurePosixPath] = []
        self.folders: list[PurePosixPath] = []
        seen: set[tuple[int, int]] = set()
        for place, folders, names in os.walk(path, followlinks=True, onerror=_refuse):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:  # links may go round in circles
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = PurePosixPath(os.path.relpath(place, path))
            self.folders.append(below)
            files += [below / name for name in names if _is_image_or_link(Path(place, name))]
        self.files = sorted(files, key=_in_order)

    def open(self, file: PurePosixPath) -> IO[bytes]:
        """Its content. Pillow maps what it opens by itself, and then reads a turned TIFF wrongly."""
        return (self._path / file).open("rb")

    def show(self, file: PurePosixPath) -> str:
        """Its path, for messages."""
        return show(self._path / file)


def _refuse(error: OSError) -> None:
    raise DataError(f"the folder {show(error.filename)} cannot be read: {first_line(error)}") from error


def _is_image_or_link(path: Path) -> bool:
    """Whether a path is a file, or a link to none, which is told when it is read; not a pipe or a device."""
    return not path.name.startswith(".") and (path.is_file() or not path.exists())


class Archive:
    """A .zip archive, read in place. Raises DataError where it is not whole."""

    def __init__(self, path: Path) -> None:
        self.name = show(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{self.name} is not a whole .zip archive: {first_line(error)}") from error
        members = {_place(info): info for info in self._archive.infolist()}
        shown = {place: info for place, info in members.items() if _is_shown(place)}
        self._members = {place: info for place, info in shown.items() if not info.is_dir()}
        self.files = sorted(self._members, key=_in_order)
        folders = {place for place, info in shown.items() if info.is_dir()}
        self.folders = list(folders.union(*(file.parents for file in self.files)))

    def open(self, file: PurePosixPath) -> IO[bytes]:
        """Its content."""
        info = self._members[file]
        if info.flag_bits & _ENCRYPTED:
            raise ValueError("it is encrypted")
        if info.file_size > _LARGEST_MEMBER:
            raise ValueError(f"it unpacks to {info.file_size / 2**30:.1f} GiB")
        return io.BytesIO(self._archive.read(info))

    def show(self, file: PurePosixPath) -> str:
        """Its path, for messages."""
        return f"{show(str(file))} in {self.name}"


def _place(info: zipfile.ZipInfo) -> PurePosixPath:
    """The path of a member, also by tools that write it with backslashes, from the root, or in UTF-8 unsaid."""
    name = info.filename
    if not info.flag_bits & _UTF_8:
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            name = info.filename
    return posix_path(name)


def posix_path(name: str) -> PurePosixPath:
    """A relative path, of a name that may have backslashes or begin at the root. Nothing is written there."""
    path = PurePosixPath(name if "/" in name else name.replace("\\", "/"))
    return PurePosixPath(*(part for part in path.parts if part not in ("/", "//", "..")))


def _is_shown(place: PurePosixPath) -> bool:
    return _NOT_OURS not in place.parts and not any(part.startswith(".") for part in place.parts)


def _in_order(file: PurePosixPath) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in file.parts)
