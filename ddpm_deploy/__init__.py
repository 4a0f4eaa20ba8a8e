"""Taking a trained DDPM to production: train, export, verify, run.

from ddpm_deploy import Sampler, to_uint8

with Sampler.load("model.onnx") as sampler:
    pixels = to_uint8(sampler.sample(16, seed=0))

Importing this is cheap: each name below is imported when it is first used, and none brings in torch.
"""

from typing import TYPE_CHECKING

from ddpm_deploy.lazy import lazily
from ddpm_deploy.version import __version__

if TYPE_CHECKING:
    from ddpm_deploy.errors import (
        ArtefactError,
        BackendError,
        BusyError,
        DataError,
        DdpmDeployError,
        DeadlineError,
        DependencyError,
        OutputError,
        OwnershipError,
        ParityError,
        SettingError,
        SpecError,
    )
    from ddpm_deploy.runtime.images import in_data_range, to_uint8
    from ddpm_deploy.runtime.interpolate import interpolate
    from ddpm_deploy.runtime.protocols import Network
    from ddpm_deploy.runtime.request import Request
    from ddpm_deploy.runtime.sampler import Sampler
    from ddpm_deploy.runtime.snapshot import Snapshot
    from ddpm_deploy.schedule import Schedule
    from ddpm_deploy.solvers import StepTable
    from ddpm_deploy.spec import ModelSpec

__all__ = [
    "ArtefactError",
    "BackendError",
    "BusyError",
    "DataError",
    "DdpmDeployError",
    "DeadlineError",
    "DependencyError",
    "ModelSpec",
    "Network",
    "OutputError",
    "OwnershipError",
    "ParityError",
    "Request",
    "Sampler",
    "Schedule",
    "SettingError",
    "Snapshot",
    "SpecError",
    "StepTable",
    "__version__",
    "in_data_range",
    "interpolate",
    "to_uint8",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        **{name: "ddpm_deploy.errors" for name in __all__ if name.endswith("Error")},
        "ModelSpec": "ddpm_deploy.spec",
        "Network": "ddpm_deploy.runtime.protocols",
        "Request": "ddpm_deploy.runtime.request",
        "Sampler": "ddpm_deploy.runtime.sampler",
        "Schedule": "ddpm_deploy.schedule",
        "Snapshot": "ddpm_deploy.runtime.snapshot",
        "StepTable": "ddpm_deploy.solvers",
        "__version__": "ddpm_deploy.version",
        "in_data_range": "ddpm_deploy.runtime.images",
        "interpolate": "ddpm_deploy.runtime.interpolate",
        "to_uint8": "ddpm_deploy.runtime.images",
    },
)
