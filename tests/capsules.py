"""Python in the place of C functions by which Cython's modules call one another."""

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from tests.host_device import build

_KEPT: Final[list[object]] = []  # what the capsules point to
_API: Final = ctypes.pythonapi
_API.PyCapsule_GetName.restype = ctypes.c_char_p
_API.PyCapsule_GetName.argtypes = [ctypes.py_object]
_API.PyCapsule_New.restype = ctypes.py_object
_API.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def exchange(module: ModuleType, answers: dict[str, Callable[..., Any]]) -> None:
    """Let functions of a module be others, for its callers in Python and for modules that are imported from now on.

    Those look functions up as capsules, whose names are their signatures.
    """
    capsules: dict[str, Any] = module.__pyx_capi__  # type: ignore[attr-defined]
    signatures = {name: _API.PyCapsule_GetName(capsules[name]) for name in answers}
    lines = [_function(number, signature.decode()) for number, signature in enumerate(signatures.values())]
    library = build("\n".join(lines), "capsules.cpp")
    asked = (ctypes.py_object * 64).in_dll(library, "answers")
    for number, (name, signature) in enumerate(signatures.items()):
        asked[number] = answers[name]
        address = ctypes.cast(getattr(library, f"answer_{number}"), ctypes.c_void_p)
        capsules[name] = _API.PyCapsule_New(address, signature, None)
        setattr(module, name, answers[name])
    _KEPT.extend((library, asked, signatures))


def _function(number: int, signature: str) -> str:
    """C of a function of this signature, "intptr_t (size_t, int __pyx_skip_dispatch)", that asks Python. What Cython
    adds is not passed on."""
    result, _, rest = signature.partition("(")
    types = [kind for kind in rest.rstrip(")").split(", ") if kind != "void"]
    plain = ["void *" if "struct" in kind else kind.split(" __pyx")[0] for kind in types]
    declared = ", ".join(f"{kind} a{index}" for index, kind in enumerate(plain))
    letters = given = ""
    for index, kind in enumerate(types):
        if "__pyx_" not in kind:
            is_object = "PyObject" in kind
            letters += "O" if is_object else "n"
            given += f", a{index}" if is_object else f", (ptrdiff_t)a{index}"
    return f'extern "C" {result} answer_{number}({declared}) {{ return ask({number}, "{letters}"{given}); }}'
