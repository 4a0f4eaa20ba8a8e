"""What makes the images of a run: two processes of which that differs may differ in the last bit."""

from collections.abc import Mapping
from typing import Final

from ddpm_deploy.doctor.backends import installed
from ddpm_deploy.files import show
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.version import __version__

_PACKAGES: Final = {"network": "torch"}  # of a backend whose module is not called as its package


def versions_of(network: Network) -> dict[str, str]:
    """This program, NumPy and the backend's package, and where it runs."""
    device = network.device.name.partition(":")[0]
    backend = type(network).__module__.rpartition(".")[2]
    makers = {"numpy", _PACKAGES.get(backend, backend)}
    packages = {name: version for name, version in installed().items() if name.partition("-")[0] in makers}
    return {"ddpm-deploy": __version__, "device": device, **packages}


def differences(begun: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What is otherwise here than where a run was begun, for people; "" where nothing is."""
    return "; ".join(
        f"{show(name)} {show(version)}, here {here.get(name, 'none')}"
        for name, version in begun.items()
        if here.get(name) != version
    )
