"""What a backend's library must not free in a process that was forked: its threads do not live on there, and it would
wait for them for ever, also when the process ends."""

import ctypes
import os
import weakref
from typing import Any, Final

_KEPT: Final["weakref.WeakSet[Any]"] = weakref.WeakSet()


def keep_in_forks(*held: Any) -> None:
    """Note objects that are freed as ever here, and never in a fork of this process."""
    _KEPT.update(held)


def _keep() -> None:
    for held in _KEPT:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


os.register_at_fork(after_in_child=_keep)
