"""Many requests of many callers over one model: each joins the batch at the next step, and leaves when it is done.

from ddpm_deploy import Request, Sampler
from ddpm_deploy.serve import Batcher

with Sampler.load("model.onnx") as sampler, Batcher(sampler) as batcher:
    handle = batcher.submit(Request(count=1, steps=50, seed=7))
    image = handle.result()  # float32 (1, C, H, W)

Importing this is cheap: each name below is imported when it is first used. None needs a web server.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_deploy.serve.batcher import Batcher, Status
    from ddpm_deploy.serve.handle import Handle, Preview

__all__ = ["Batcher", "Handle", "Preview", "Status"]

_HOMES = {
    "Batcher": "ddpm_deploy.serve.batcher",
    "Handle": "ddpm_deploy.serve.handle",
    "Preview": "ddpm_deploy.serve.handle",
    "Status": "ddpm_deploy.serve.batcher",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
