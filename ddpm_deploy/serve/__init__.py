"""Many requests of many callers over one model: each joins the batch at the next step, and leaves when it is done.

from ddpm_deploy import Request, Sampler
from ddpm_deploy.serve import Batcher

with Sampler.load("model.onnx") as sampler, Batcher(sampler) as batcher:
    handle = batcher.submit(Request(count=1, steps=50, seed=7))
    image = handle.result()  # float32 (1, C, H, W)

Importing this is cheap: each name below is imported when it is first used. None needs a web server.
"""

from typing import TYPE_CHECKING

from ddpm_deploy.lazy import lazily

if TYPE_CHECKING:
    from ddpm_deploy.serve.batcher import Batcher, Status
    from ddpm_deploy.serve.handle import Handle, Preview

__all__ = ["Batcher", "Handle", "Preview", "Status"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Batcher": "ddpm_deploy.serve.batcher",
        "Handle": "ddpm_deploy.serve.handle",
        "Preview": "ddpm_deploy.serve.handle",
        "Status": "ddpm_deploy.serve.batcher",
    },
)
