"""What this process may use of its machine: CPU threads and memory, as the system limits them."""

import ctypes
import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

MOST_THREADS: Final = 1024  # that anybody may ask for
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_MEMORY: Final = Path("/proc/meminfo")
_OWN_MEMORY: Final = Path("/proc/self/statm")
_CPUS: Final = Path("/sys/devices/system/cpu")


def cpu_threads(processes: int = 1) -> int:
    """CPU threads that this process should use: OMP_NUM_THREADS where it is set, else its part of `cpu_cores`.

    processes: of this machine that divide the cores among them.
    """
    with suppress(ValueError):  # it may be a list, one for each level of nesting
        if (typed := int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])) > 0:
            return min(typed, MOST_THREADS)
    return max(1, cpu_cores() // processes)


def cpu_cores() -> int:
    """Cores of this process's affinity (hyperthreads are no cores), and no more than its cgroups have the time of."""
    return max(1, min([_cores(), *map(math.ceil, _cpu_quotas())]))


def memory_limit() -> int:
    """Bytes of memory that this process may use in all: the machine's, or fewer by a limit of its cgroup or its own."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min([physical, *_memory_limits(), *([own] if own != resource.RLIM_INFINITY else [])])


def memory_used() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(_OWN_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def memory_left() -> int:
    """Bytes of memory that this process may still take: what is free, within `memory_limit`."""
    return min(memory_available(), memory_limit() - memory_used())


def trim_memory() -> None:
    """Give memory that was freed back to the system, which glibc keeps: half of what loading a model took."""
    with suppress(OSError, AttributeError):  # another C library has no such thing
        ctypes.CDLL(None).malloc_trim(0)


def _cores() -> int:
    """The cores that this process may run on, each with its hyperthreads counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The CPUs of the same core, as "0,8"; itself where the system does not say."""
    with suppress(OSError, ValueError):
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(cpu)


def _cpu_quotas() -> Iterator[float]:
    """The cores whose time each cgroup of this process has: cpu.max of version 2, cpu.cfs_quota_us of version 1."""
    for group in _groups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)


def _memory_limits() -> Iterator[int]:
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((group / name).read_text())


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, each with those above it, which bind it as well."""
    with suppress(OSError, ValueError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CGROUPS / controllers if controllers else _CGROUPS
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
            yield root  # in a container, the path may be that of the host


def memory_available() -> int:
    """Bytes of memory that are free now, or would be for the asking; where the system does not say, `memory_limit`."""
    with suppress(OSError, StopIteration):
        lines = _MEMORY.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return memory_limit()
