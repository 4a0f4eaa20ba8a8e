"""What a library holds does not outlive a fork: its threads are gone in the child, and freeing it there may hang."""

import ctypes
import os
import weakref
from typing import Any, Final

_HELD: Final["weakref.WeakSet[Any]"] = weakref.WeakSet()


def keep_in_forks(held: Any) -> None:
    """Keep an object of a library for ever in processes that are forked off: freeing it would hang, also at their
    exit. In this process it is freed as ever."""
    _HELD.add(held)


def _keep() -> None:
    for held in _HELD:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


os.register_at_fork(after_in_child=_keep)
