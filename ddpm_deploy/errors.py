"""Every error that ddpm-deploy raises on purpose.

    DdpmDeployError
    ├── SettingError      an argument out of its range (also a ValueError)
    ├── ArtefactError     a .pt, .onnx or .plan that cannot be used
    │   └── SpecError     its ModelSpec is missing, malformed or from a newer version
    ├── DataError         training images that cannot be used
    ├── OutputError       a result that cannot be written
    ├── DependencyError   a package that is missing or in conflict (also an ImportError)
    ├── BackendError      the backend failed, or the network gave numbers that are not finite
    ├── ParityError       an exported network does not compute what its original computes
    ├── OwnershipError    a Sampler used while it is in use, or in a process forked after it was loaded
    ├── BusyError         a Batcher has as many requests waiting as it takes
    └── DeadlineError     a request cannot be, or was not, done by its deadline (also a TimeoutError)

A message says what was got, what is wrong with it, and what to do. The command lines print it on one
line and exit 1.
"""

from typing import Final

_LONGEST: Final = 200  # characters of a foreign message


class DdpmDeployError(Exception):
    """Root of the tree: catch this to catch everything ddpm-deploy raises on purpose."""


class SettingError(DdpmDeployError, ValueError):
    """An argument is out of its range."""


class ArtefactError(DdpmDeployError):
    """A model file is missing, broken, of another kind, or not ours."""


class SpecError(ArtefactError):
    """A model's ModelSpec is missing, malformed or written by a newer version."""


class DataError(DdpmDeployError):
    """Training images are missing or cannot be read."""


class OutputError(DdpmDeployError):
    """A result cannot be written where it was asked for."""


class DependencyError(DdpmDeployError, ImportError):
    """A package that this needs is not installed, or two packages exclude each other."""


class BackendError(DdpmDeployError):
    """A backend failed, or its network gave numbers that are not finite."""


class ParityError(DdpmDeployError):
    """An exported network does not compute what its original computes."""


class OwnershipError(DdpmDeployError):
    """A Sampler was used while another call on it was still running."""


class BusyError(DdpmDeployError):
    """A Batcher has as many requests waiting as it takes. retry_after: seconds until it may have room, estimated."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.message, self.retry_after = message, retry_after

    def __str__(self) -> str:
        return self.message


class DeadlineError(DdpmDeployError, TimeoutError):
    """A request cannot be done by its deadline, or was not."""


def plural(count: int, noun: str) -> str:
    """A number of things, for a message: 1 step, 2 steps, 2 classes."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"


def newer(source: str, got: str, known: str) -> str:
    """What is said of a file from the future: `source` names it, `got` and `known` are versions of what it holds."""
    return (
        f"{source} was written by a newer ddpm-deploy ({got}; this one knows {known}): install a newer one "
        "from where this one came"
    )


def one_line(error: BaseException) -> str:
    """What a foreign error says, on one line, as `_short` has it."""
    return _short(error, " ".join(str(error).split()))


def first_line(error: BaseException) -> str:
    """The first line of what a foreign error says, as `_short` has it."""
    return _short(error, next(iter(str(error).strip().splitlines()), ""))


def _short(error: BaseException, text: str) -> str:
    """A foreign message in some 200 characters, cut at a word; the error's name where it says nothing.

    One of our own is not cut: what to do stands at its end.
    """
    if isinstance(error, DdpmDeployError) or len(text) <= _LONGEST:
        return text or type(error).__name__
    start = text[:_LONGEST]
    words = start.rpartition(" ")[0]
    return f"{words if len(words) > _LONGEST // 2 else start} …"
