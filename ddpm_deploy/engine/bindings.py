"""The two TensorRTs behind one name: which is installed, and its log as ours."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from ddpm_deploy.dependencies import is_installed, pip_install, require
from ddpm_deploy.errors import BackendError, DependencyError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.gpu import DRIVERS, UPDATE, Gpu, driver
from ddpm_deploy.words import Flavour

logger = logging.getLogger(__name__)

MODULES: Final[dict[Flavour, tuple[str, str]]] = {  # and the extra that brings it
    "tensorrt": ("tensorrt", "gpu"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
_OLDEST: Final[dict[Flavour, tuple[int, int]]] = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 3)}
_KNOWN: Final = "has Int64 binding"  # a warning about what is as it should be: y
_MEMORY_HINT: Final = " (smaller batches take less memory, and a workspace may be too small)"
_REPEATED: Final = 2000  # messages of which it is known that they were shown


def load_tensorrt(flavour: Flavour) -> Any:
    """Import a flavour's module. Raises DependencyError where it is missing, broken or too old."""
    module, extra = MODULES[flavour]
    trt: Any = require(module, extra)
    oldest = _OLDEST[flavour]
    try:
        version = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
    except (AttributeError, ValueError):
        version = (0,)
    if version < oldest:
        raise DependencyError(
            f"{module} {getattr(trt, '__version__', '')} is too old or broken, and {oldest[0]}.{oldest[1]} is needed: "
            f"{pip_install(extra, module, '-U')}"
        )
    return trt


def require_builder(flavour: Flavour, index: int = 0) -> Any:
    """Load a flavour that can build engines here: TensorRT times kernels on a GPU, of that number, and TensorRT-RTX
    needs none.

    Raises DependencyError or BackendError where it cannot.
    """
    if flavour == "tensorrt":
        require_gpu(index=index)
    return load_tensorrt(flavour)


def require_gpu(otherwise: str = "", index: int = 0) -> Gpu:
    """The GPU of that number.

    Raises BackendError where it is not visible, with what to do otherwise, or the driver is older than the CuPy that is
    installed, by which whatever runs on a GPU does.
    """
    found = driver()
    if index >= len(found.gpus):
        what = "no NVIDIA GPU is visible"
        if found.gpus:
            here = ", ".join(f"cuda:{number}" for number in range(len(found.gpus)))
            what = f"no NVIDIA GPU has the number {index} (visible: {here}; CUDA_VISIBLE_DEVICES chooses)"
        raise BackendError(what + (f": {otherwise}" if otherwise else ""))
    for major, (_, release) in DRIVERS.items():
        if is_installed(cupy := f"cupy-cuda{major}x") and found.older_than((major, 0)):
            raise BackendError(
                f"the NVIDIA driver {found.version} runs CUDA {found.cuda} and older, and {cupy} is of CUDA {major}: "
                f"{UPDATE.format(release)} (ddpm-deploy doctor says what this one runs)"
            )
    return found.gpus[index]


class Log:
    """What TensorRT says, sent on to our log: warnings once, and errors kept to be raised."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self._seen: set[str] = set()
        severity = trt.ILogger.Severity
        self._levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
        }
        log = self

        class Handle(trt.ILogger):  # type: ignore[misc]  # it can only be made once TensorRT is there
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.hear(severity, message)

        self.handle: Any = Handle()

    def hear(self, severity: Any, message: str) -> None:
        """One message. It must not raise: C++ calls it."""
        level = self._levels.get(severity, logging.DEBUG)
        if level == logging.ERROR:
            self.errors.append(" ".join(message.split()))
            return
        repeated = message in self._seen or len(self._seen) >= _REPEATED
        if level == logging.WARNING and not repeated and _KNOWN not in message:
            self._seen.add(message)
        else:
            level = logging.DEBUG
        logger.log(level, "TensorRT: %s", message)

    def reason(self, otherwise: str = "it does not say why") -> str:
        """The first error since the last time it was asked, or `otherwise`."""
        errors, self.errors = self.errors, []
        reason = errors[0] if errors else otherwise
        return reason + (_MEMORY_HINT if "OutOfMemory" in reason else "")


@cache
def log_of(flavour: Flavour) -> Log:
    """The one log of a flavour: TensorRT keeps the first that it is given, for the life of the process."""
    return Log(load_tensorrt(flavour))


def as_bytes(memory: Any) -> memoryview:
    """Memory of TensorRT's (IHostMemory) as bytes: by itself it says that it is of floats, and compares as such."""
    return memoryview(memory).cast("B")


def made(what: str, log: Log, make: Any, *arguments: Any) -> Any:
    """Call a factory of TensorRT, whose failure is None, or a TypeError where pybind expected an object.

    Raises BackendError with what the log says.
    """
    try:
        result = make(*arguments)
    except TypeError as error:
        raise BackendError(f"TensorRT could not make {what}: {log.reason(first_line(error))}") from error
    if result is None:
        raise BackendError(f"TensorRT could not make {what}: {log.reason()}")
    return result


def in_words(say: Callable[[], str]) -> str:
    """What TensorRT says of a file, for a message: its names may be no text at all."""
    try:
        return show(say())
    except UnicodeDecodeError:
        return "(a name that is no text)"


def name_of(thing: Any) -> str:
    """The name of a layer or a tensor, for a message."""
    return in_words(lambda: str(thing.name))
