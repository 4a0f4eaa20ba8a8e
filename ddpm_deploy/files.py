"""Reading and writing files so that a mistake costs one clear line and never a file.

A result is written to a temporary name beside its own and renamed when it is whole: whatever goes
wrong, what stood under the name before still stands there.
"""

import errno
import hashlib
import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpm_deploy.errors import ArtefactError, DdpmDeployError, OutputError, SettingError
from ddpm_deploy.signals import signals_held


def show(text: str | Path) -> str:
    """A path, or a text out of a file, for a message: one line, whatever its characters are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fspath(text))


def quoted(path: Path) -> str:
    """A path in a command line to be pasted into a shell."""
    return shlex.quote(f"./{show(path)}" if show(path).startswith("-") else show(path))


def require_file(path: Path, error: type[DdpmDeployError] = ArtefactError) -> None:
    """Raise `error` unless `path` is a readable regular file that is not empty; name near misses."""
    _require_text(path, error)
    try:
        if path.is_dir():
            raise error(f"{show(path)} is a folder, and a file is needed: name a file in it")
        if not path.exists():
            what = "is a link to no file" if path.is_symlink() else "does not exist"
            raise error(f"{show(path)} {what}{_near_misses(path)}")
        if not path.is_file():
            raise error(f"{show(path)} is not a regular file")
        if path.stat().st_size == 0:
            raise error(f"{show(path)} is empty: it was probably cut short; make it again")
        with path.open("rb"):
            pass
    except error:
        raise
    except (OSError, ValueError) as problem:
        raise error(f"{show(path)} cannot be read: {_reason(problem)}") from problem


def _require_text(path: Path, error: type[DdpmDeployError]) -> None:
    """Neither torch nor ONNX Runtime opens a name that is not text, and what they say of it misleads."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as problem:
        raise error(f"the name {show(path)} is not UTF-8: rename it, or reach it by a link") from problem


def _near_misses(path: Path) -> str:
    with suppress(OSError):
        near = sorted(p.name for p in path.parent.iterdir() if p.stem == path.stem and p.is_file())
        if near:
            return f"; found {', '.join(near[:3])} beside it"
    return ""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_suffix(path: Path, what: str, *suffixes: str) -> None:
    """Raise SettingError unless a name ends as that of such a file must."""
    if path.suffix.lower() not in suffixes:
        raise SettingError(f"{show(path)}: the name of {what} must end in {' or '.join(suffixes)}")


def require_output(path: Path) -> None:
    """Raise OutputError unless a file can be written at `path`: ask this before long work."""
    _require_text(path, OutputError)
    folder = path.parent
    with _naming(path, (OSError, ValueError)):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # which tells of links that go round in circles
        if path.is_dir():
            raise OutputError(f"{show(path)} is a folder: name a file to write")
        if path.exists() and not path.is_file():
            raise OutputError(f"{show(path)} is not a regular file: name another output")
        if not folder.is_dir():
            raise OutputError(
                f"the folder {show(folder)} does not exist: create it, or choose another output"
            )
        with signals_held(lambda: None):  # between the two it would stay
            _create_beside(path).unlink()


def make_folder(path: Path) -> None:
    """Make the folder, unless it is there. Raises OutputError."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {show(path)} cannot be made: {error.strerror}") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its suffix; rename it to `path` when the block succeeds.

    Where `path` is a link, the file that it points at is replaced. Raises OutputError where the file
    cannot be written; however the block ends, the temporary file does not stay behind.
    """
    with atomic_together(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_together(*paths: Path) -> Iterator[list[Path]]:
    """As `atomic`, for files that belong together: no signal comes between their names."""
    temporaries: dict[Path, Path] = {}  # of each file that is replaced in the end
    try:
        for path in paths:
            with _naming(path, (OSError, ValueError)), signals_held(lambda: None):
                target = Path(os.path.realpath(path))
                temporaries[target] = _create_beside(target)
        with _naming(paths[0]):
            yield list(temporaries.values())
        for target, temporary in temporaries.items():
            with _naming(target), temporary.open("rb") as file:
                os.fsync(file.fileno())
        with signals_held(lambda: None):
            for target, temporary in temporaries.items():
                with _naming(target):
                    temporary.replace(target)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def create_once(path: Path, content: bytes) -> None:
    """Write a file unless there is one: whole, and once, however many processes try at the same time.

    Whoever needs to know which content it has reads it afterwards. Raises OutputError.
    """
    with _naming(path, (OSError, ValueError)), signals_held(lambda: None):
        temporary = _create_beside(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links: the last of them wins
                if not path.exists():
                    temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Name the file that an error is about."""
    try:
        yield
    except errors as problem:
        hint = ": free some space there" if getattr(problem, "errno", None) == errno.ENOSPC else ""
        raise OutputError(f"{show(path)} cannot be written: {_reason(problem)}{hint}") from problem


def _create_beside(path: Path) -> Path:
    """A new, empty file with a name of its own."""
    temporary = path.with_name(f".ddpm-{secrets.token_hex(8)}{path.suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _reason(problem: Exception) -> str:
    reason = getattr(problem, "strerror", None) or str(problem)
    return reason[:1].lower() + reason[1:]
