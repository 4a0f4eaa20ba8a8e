"""What is installed, what is visible, which backends work here, and the line that mends each that does not.

The rules look at names and versions alone, so they can be tried on machines that are only described; `run_backends`
then runs a chain whose answer is known (`doctor.gaussian`) on every backend that there is.
"""

import ctypes
import logging
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ddpm_deploy.doctor import gaussian
from ddpm_deploy.engine.bindings import MODULES, load_tensorrt
from ddpm_deploy.engine.build import EngineSettings, build_engine
from ddpm_deploy.errors import one_line
from ddpm_deploy.gpu import Driver
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.tolerances import DOCTOR
from ddpm_deploy.version import __version__
from ddpm_deploy.words import CAPABILITIES, Flavour

PACKAGES: Final = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "tensorrt-rtx",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "torch",
    "onnx",
    "onnxscript",
    "pillow",
    "matplotlib",
)
_PARTS: Final = (
    "tensorrt-cu13-bindings",
    "tensorrt-cu13-libs",
    "tensorrt-cu12-bindings",
    "tensorrt-cu12-libs",
    "tensorrt-rtx-cu13",
    "tensorrt-rtx-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)
_CUDNN: Final = "libcudnn.so.9"  # which onnxruntime-gpu loads
_OLDEST_CUDA: Final = (12, 2)  # which driver r535 brings
_OLDEST_CAPABILITY: Final = (7, 5)  # of TensorRT 11
_UPDATE: Final = "update the NVIDIA driver to r{} or newer"
_NO_GPU: Final = "needs an NVIDIA GPU, and none is visible"
_COUNT: Final = 64
_BATCHES: Final = ((1, _COUNT, _COUNT),)
_SIGMAS: Final = 5.0
Installed = Mapping[str, str]
State = Literal["works", "builds", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """Of one thing: its state, what there is to say, and the command or step that mends it, or "".

    "builds": engines for elsewhere, and runs none. "absent": not here, which may be as it should be.
    """

    name: str
    state: State
    says: str
    mend: str = ""


def installed() -> dict[str, str]:
    """The version of each package that matters here and is installed."""
    found = {}
    for name in (*PACKAGES, *_PARTS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    with suppress(OSError):
        ctypes.CDLL(_CUDNN)
        found[_CUDNN] = "9"
    return found


def about() -> str:
    """This program and the machine, in a line."""
    return f"ddpm-deploy {__version__} · Python {platform.python_version()} ({sys.executable}) · {platform.platform()}"


def problems(packages: Installed, driver: Driver) -> list[Finding]:
    """What cannot work together: packages that exclude each other, or that this driver cannot run."""
    found = [
        _both_onnxruntimes(packages),
        *(_driver_too_old(packages, driver, major) for major in (12, 13)),
    ]
    for first, second in (("tensorrt-cu13", "tensorrt-cu12"), ("cupy-cuda13x", "cupy-cuda12x")):
        found.append(_both_cudas(packages, driver, first, second))
    found += [_without_libraries(packages, major) for major in (12, 13)]
    found.append(_without_cudnn(packages, driver))
    return [finding for finding in found if finding]


def _both_onnxruntimes(packages: Installed) -> Finding | None:
    if not {"onnxruntime", "onnxruntime-gpu"} <= packages.keys():
        return None
    return Finding(
        "onnxruntime",
        "broken",
        "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddpm-deploy[cpu]'  (or [gpu])",
    )


def _both_cudas(packages: Installed, driver: Driver, newer: str, older: str) -> Finding | None:
    if not {newer, older} <= packages.keys():
        return None
    wrong = older if not driver.cuda or _number(driver.cuda) >= (13, 0) else newer
    says = f"{newer} and {older} are both installed, and hold the same modules"
    kept = newer if wrong == older else older
    return Finding(
        newer.split("-")[0], "broken", says, f"pip uninstall -y {newer} {older} && pip install {kept}"
    )


def _driver_too_old(packages: Installed, driver: Driver, major: int) -> Finding | None:
    """CUDA 13 needs driver r580; CUDA 12 runs from r535 on."""
    needs = [name for name in packages if f"cu{major}" in name or f"cuda{major}" in name]
    if not needs or not driver.cuda or _number(driver.cuda) >= (_OLDEST_CUDA if major == 12 else (13, 0)):
        return None
    says = f"the driver {driver.version} runs CUDA {driver.cuda} and older, and {needs[0]} is of CUDA {major}"
    if major == 13 and _number(driver.cuda) >= _OLDEST_CUDA:
        old = " ".join(needs)
        mend = (
            f"pip uninstall -y {old} && pip install 'ddpm-deploy[gpu-cu12]'  (or update the driver to r580)"
        )
    else:
        mend = _UPDATE.format(535 if major == 12 else 580)
    return Finding("driver", "broken", says, mend)


def _without_libraries(packages: Installed, major: int) -> Finding | None:
    bindings, libraries = f"tensorrt-cu{major}-bindings", f"tensorrt-cu{major}-libs"
    if bindings not in packages or libraries in packages:
        return None
    return Finding(
        "tensorrt",
        "broken",
        f"{bindings} is installed without {libraries}, which pip takes from NVIDIA's own index",
        f"pip install {libraries}=={packages[bindings]}  (or use NVIDIA's container, which has it)",
    )


def _without_cudnn(packages: Installed, driver: Driver) -> Finding | None:
    if (
        "onnxruntime-gpu" not in packages
        or {_CUDNN, "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"} & packages.keys()
    ):
        return None
    says = f"onnxruntime-gpu is installed without cuDNN ({_CUDNN}): it falls back to the CPU"
    # Its own extras bring what its build is of.
    return Finding(
        "cudnn", "broken" if driver.gpus else "absent", says, "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def run_backends(
    packages: Installed, driver: Driver, tell: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Run the known chain on each backend that is here; each finding is told as it is found."""
    findings = []
    with _quiet_builds(), gaussian.onnx_model() as model:
        for look in (_on_onnxruntime, _on_onnxruntime_cuda, _on_tensorrt, _on_tensorrt_rtx):
            findings.append(look(model, packages, driver))
            tell(findings[-1])
    return findings


@contextmanager
def _quiet_builds() -> Iterator[None]:
    """The engines that are built here are of no interest to anybody."""
    log = logging.getLogger("ddpm_deploy.engine")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _on_onnxruntime(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name = "ONNX Runtime, CPU"
    if not {"onnxruntime", "onnxruntime-gpu"} & packages.keys():
        return Finding(name, "absent", "is not installed", "pip install 'ddpm-deploy[cpu]'")
    if both := _both_onnxruntimes(packages):
        return replace(both, name=name)
    return _chain_finding(name, "pip install --force-reinstall onnxruntime", lambda: load_network(model))


def _on_onnxruntime_cuda(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name, mend = "ONNX Runtime, CUDA", f"pip install 'ddpm-deploy[{_extra(driver)}]'"
    if not driver.gpus:
        return Finding(name, "absent", _NO_GPU, _get_a_gpu(driver))
    if "onnxruntime-gpu" not in packages:
        return Finding(
            name, "absent", "onnxruntime-gpu is not installed", f"pip uninstall -y onnxruntime && {mend}"
        )
    return _chain_finding(
        name, mend, lambda: load_network(model, LoadSettings(device="cuda"), backend="onnxruntime")
    )


def _extra(driver: Driver) -> str:
    """The one for this driver."""
    return "gpu" if not driver.cuda or _number(driver.cuda) >= (13, 0) else "gpu-cu12"


def _on_tensorrt(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name = "TensorRT"
    if not driver.gpus:
        return Finding(name, "absent", _NO_GPU, _get_a_gpu(driver))
    gpu = driver.gpus[0]
    if _number(gpu.capability) < _OLDEST_CAPABILITY:
        return Finding(
            name, "absent", f"does not know compute capability {gpu.capability}", "use ONNX Runtime"
        )
    if driver.cuda and _number(driver.cuda) < _OLDEST_CUDA:
        return Finding(
            name, "absent", f"needs CUDA 12.2, and the driver runs {driver.cuda}", _UPDATE.format(535)
        )
    mend = f"pip install 'ddpm-deploy[{_extra(driver)}]'"
    if problem := _import_problem(name, "tensorrt", packages, mend):
        return problem
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "gaussian.plan"

        def load() -> Network:
            build_engine(model, plan, EngineSettings(batches=_BATCHES))
            return load_network(open_model(plan))

        return _chain_finding(name, mend, load)


def _on_tensorrt_rtx(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    """It builds anywhere, and runs on the GPUs that it has a target for."""
    name, mend = "TensorRT-RTX", "pip install 'ddpm-deploy[rtx]'"
    if problem := _import_problem(name, "tensorrt-rtx", packages, mend):
        return problem
    with tempfile.TemporaryDirectory() as folder:
        return _built_by_rtx(model, Path(folder) / "gaussian.rtx.plan", driver, name, mend)


def _built_by_rtx(model: ModelFile, plan: Path, driver: Driver, name: str, mend: str) -> Finding:
    start = time.perf_counter()
    try:
        build_engine(model, plan, EngineSettings(flavour="tensorrt-rtx", batches=_BATCHES))
    except Exception as error:
        again = "pip install -U --force-reinstall tensorrt-rtx"
        return Finding(name, "broken", f"builds no engine: {one_line(error)}", again)
    built = f"builds engines here (a tiny one in {time.perf_counter() - start:.1f} s)"
    if not driver.gpus:
        return Finding(
            name, "builds", f"{built}; none is run, as no NVIDIA GPU is visible", _get_a_gpu(driver)
        )
    if driver.gpus[0].capability not in CAPABILITIES:
        says = f"{built}; none for compute capability {driver.gpus[0].capability}, which is this GPU's"
        new = _number(driver.gpus[0].capability) >= _OLDEST_CAPABILITY
        other = "use TensorRT on this GPU: pip install 'ddpm-deploy[gpu]'" if new else "use ONNX Runtime"
        return Finding(name, "builds", says, other)
    return _chain_finding(name, mend, lambda: load_network(open_model(plan)))


def _chain_finding(name: str, mend: str, load: Callable[[], Network]) -> Finding:
    """Run the chain, and hold its images against theory."""
    try:
        with Sampler(load()) as sampler:
            images = sampler.sample(_COUNT, seed=0).astype(np.float64)
            where = sampler.network.device.name
    except (
        Exception
    ) as error:  # a backend that is broken may raise anything, and the others are yet to be tried
        says, _, own = one_line(error).partition(": pip install ")  # of a package that is missing
        return Finding(name, "broken", says, f"pip install {own}" if own else mend)
    mean, variance = gaussian.moments()
    off_mean = (images.mean() - mean) / math.sqrt(variance / images.size)
    off_variance = (images.var() / variance - 1) / math.sqrt(2 / images.size)
    worst = float(abs(images - gaussian.exact_images(_COUNT, seed=0)).max())
    says = (
        f"{_COUNT} images by {gaussian.SPEC.timesteps} steps on {where}: mean {images.mean():.4f} (theory {mean:.4f}, "
        f"{off_mean:+.1f} standard errors), variance {images.var():.4f} (theory {variance:.4f}, {off_variance:+.1f}), "
        f"at most {worst:.0e} from the exact chain"
    )
    right = abs(off_mean) < _SIGMAS and abs(off_variance) < _SIGMAS and worst < DOCTOR
    return Finding(name, "works", says) if right else Finding(name, "broken", f"WRONG NUMBERS: {says}", mend)


def _import_problem(name: str, flavour: Flavour, packages: Installed, mend: str) -> Finding | None:
    """Of a TensorRT that does not import: absent where it is not installed, broken where it is."""
    module, _ = MODULES[flavour]
    try:
        load_tensorrt(flavour)
    except Exception as error:
        says = one_line(error).partition(": pip install")[0].removeprefix(module).strip()
        broken = any(package.startswith(f"{flavour}-cu") or package == flavour for package in packages)
        if not broken:
            return Finding(name, "absent", says, mend)
        return Finding(name, "broken", says, mend.replace("pip install", "pip install --force-reinstall"))
    return None


def _get_a_gpu(driver: Driver) -> str:
    if driver.problem.startswith("no NVIDIA driver"):
        return "on a machine with an NVIDIA GPU, install its driver (in a container: docker run --gpus all)"
    return f"{driver.problem}: look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
