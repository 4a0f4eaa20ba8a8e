"""What NVIDIA hardware this machine shows, asked of the driver itself: no package is needed for it."""

import ctypes
import re
from ctypes import byref, c_char_p, c_int, c_size_t, create_string_buffer
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LIBRARY: Final = "libcuda.so.1"
_VERSION_FILE: Final = Path("/proc/driver/nvidia/version")
OLDEST_CUDA: Final = (12, 2)
CUDA_13: Final = (13, 0)
# What packages of each CUDA need the driver to run, and the release that brings it.
DRIVERS: Final = {12: (OLDEST_CUDA, 535), 13: (CUDA_13, 580)}
UPDATE: Final = "update the NVIDIA driver to r{} or newer"
# Of CUdevice_attribute, in cuda.h.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One device. capability: its compute capability, as "8.6". memory: bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver as this process sees it.

    version: of the driver, as "580.65.06", or "" where it is not told. cuda: the newest CUDA it runs, as "13.0", or
    "" where there is no driver. problem: why there are no devices, or "".
    """

    version: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""

    def older_than(self, cuda: tuple[int, int]) -> bool:
        """Whether it runs no CUDA as new as this."""
        return bool(self.cuda) and numbers(self.cuda) < cuda


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, as "13.0" or "1.28.0rc1", fewer where it has no more."""
    return tuple(int(digits[0]) for part in version.split(".")[:2] if (digits := re.match(r"\d+", part)))


def driver() -> Driver:
    """Ask the driver; it does not raise."""
    version = _driver_version()
    number, count, reason = c_int(), c_int(), c_char_p()
    try:
        cuda = ctypes.CDLL(_LIBRARY)
        cuda.cuDriverGetVersion(byref(number))
        newest = f"{number.value // 1000}.{number.value % 1000 // 10}"
        if code := cuda.cuInit(0):
            cuda.cuGetErrorString(code, byref(reason))
            says = reason.value.decode(errors="replace") if reason.value else f"error {code}"
            return Driver(version, newest, problem=f"the NVIDIA driver says {says}")
        cuda.cuDeviceGetCount(byref(count))
        gpus = tuple(_device(cuda, index) for index in range(count.value))
        return Driver(version, newest, gpus, "" if gpus else "the NVIDIA driver shows no device")
    except OSError:
        return Driver(version, problem=f"no NVIDIA driver is installed ({_LIBRARY} is not there)")
    except AttributeError as error:
        return Driver(version, problem=f"{_LIBRARY} is no NVIDIA driver: {error}")


def visible_gpu(index: int = 0) -> Gpu | None:
    """The device of that number among those that are visible (CUDA_VISIBLE_DEVICES chooses); None without it."""
    gpus = driver().gpus
    return gpus[index] if index < len(gpus) else None


def _device(cuda: ctypes.CDLL, index: int) -> Gpu:
    handle, major, minor, memory = c_int(), c_int(), c_int(), c_size_t()
    name = create_string_buffer(256)
    cuda.cuDeviceGet(byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceGetAttribute(byref(major), _MAJOR, handle)
    cuda.cuDeviceGetAttribute(byref(minor), _MINOR, handle)
    cuda.cuDeviceTotalMem_v2(byref(memory), handle)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


def _driver_version() -> str:
    """Of the kernel module, from its own file: "NVRM version: … Kernel Module  580.65.06  …"."""
    try:
        words = _VERSION_FILE.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")
