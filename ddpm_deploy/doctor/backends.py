"""What is installed, what is visible, which backends work here, and the line that mends each that does not.

The rules look at names and versions alone, so they can be tried on machines that are only described; `run_backends`
then runs a chain whose answer is known (`doctor.gaussian`) on every backend that there is.
"""

import ctypes
import logging
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ddpm_deploy.dependencies import ONE_ONNXRUNTIME, pip_install
from ddpm_deploy.doctor import gaussian
from ddpm_deploy.engine.bindings import MODULES, load_tensorrt
from ddpm_deploy.engine.build import EngineSettings, build_engine
from ddpm_deploy.errors import DependencyError, one_line
from ddpm_deploy.gpu import CUDA_13, DRIVERS, OLDEST_CUDA, UPDATE, Driver, numbers
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.device.kernel import require_nvrtc
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.tolerances import DOCTOR
from ddpm_deploy.version import __version__
from ddpm_deploy.words import CAPABILITIES, Flavour

PACKAGES: Final = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "ncnn",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "tensorrt-rtx",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "torch",
    "onnx",
    "onnxscript",
    "pillow",
    "matplotlib",
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
_NVRTC: Final = "NVRTC"  # which compiles the step kernel
_ORT_OF_CUDA_13: Final = (1, 27)  # the first
_OLDEST_CAPABILITY: Final = (7, 5)  # of TensorRT 11
_NO_GPU: Final = "needs an NVIDIA GPU, and none is visible"
_COUNT: Final = 64
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
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with suppress(OSError):
        ctypes.CDLL(_CUDNN)
        found[_CUDNN] = "9"
    with suppress(DependencyError):
        _, major, minor = require_nvrtc().nvrtcVersion()
        found[_NVRTC] = f"{major}.{minor}"
    return found


def cuda_of(name: str, version: str) -> int | None:
    """The major version of CUDA that a package was built for; None where it is of none, or of any."""
    if told := re.search(r"cu(?:da)?(1\d)", name):
        return int(told[1])
    if name in ("cuda-bindings", "nvidia-cuda-nvrtc", _NVRTC):
        return numbers(version)[0]
    if name == "onnxruntime-gpu":
        return 13 if numbers(version) >= _ORT_OF_CUDA_13 else 12
    return None


def about() -> str:
    """This program and the machine, in a line."""
    return f"ddpm-deploy {__version__} · Python {platform.python_version()} ({sys.executable}) · {platform.platform()}"


def problems(packages: Installed, driver: Driver) -> list[Finding]:
    """What cannot work together: packages that exclude each other, or that this driver cannot run."""
    return [
        *_both_onnxruntimes(packages),
        *_driver_too_old(packages, driver),
        *_both_cudas(packages, driver),
        *_without_libraries(packages, driver),
        *_without_nvrtc(packages, driver),
    ]


def _both_onnxruntimes(packages: Installed) -> Iterator[Finding]:
    if {"onnxruntime", "onnxruntime-gpu"} <= packages.keys():
        yield Finding(
            "onnxruntime",
            "broken",
            "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files",
            ONE_ONNXRUNTIME,
        )


def _driver_too_old(packages: Installed, driver: Driver) -> Iterator[Finding]:
    for major, (oldest, release) in DRIVERS.items():
        needs = [
            name for name, version in packages.items() if name in PACKAGES and cuda_of(name, version) == major
        ]
        if not needs or not driver.older_than(oldest):
            continue
        mend = UPDATE.format(release)
        if major == 13 and not driver.older_than(OLDEST_CUDA):
            old = " ".join(needs)
            mend = f"pip uninstall -y {old} && {pip_install('gpu-cu12', 'tensorrt')}  (or {mend})"
        says = f"the driver {driver.version} runs CUDA {driver.cuda} and older, and {needs[0]} is of CUDA {major}"
        yield Finding("driver", "broken", says, mend)


def _both_cudas(packages: Installed, driver: Driver) -> Iterator[Finding]:
    for newer, older in (("tensorrt-cu13", "tensorrt-cu12"), ("cupy-cuda13x", "cupy-cuda12x")):
        if {newer, older} <= packages.keys():
            kept = older if driver.older_than(CUDA_13) else newer
            says = f"{newer} and {older} are both installed, and hold the same modules"
            mend = f"pip uninstall -y {newer} {older} && pip install {kept}"
            yield Finding(newer.split("-")[0], "broken", says, mend)


def _without_libraries(packages: Installed, driver: Driver) -> Iterator[Finding]:
    for major in DRIVERS:
        bindings, libraries = f"tensorrt-cu{major}-bindings", f"tensorrt-cu{major}-libs"
        if bindings in packages and libraries not in packages:
            says = f"{bindings} is installed without {libraries}, which pip takes from NVIDIA's own index"
            mend = f"pip install {libraries}=={packages[bindings]}  (or use NVIDIA's container, which has it)"
            yield Finding("tensorrt", "broken", says, mend)
    runtime = packages.get("onnxruntime-gpu", "")
    built = cuda_of("onnxruntime-gpu", runtime)
    if runtime and not {_CUDNN, f"nvidia-cudnn-cu{built}"} & packages.keys():
        says = f"onnxruntime-gpu {runtime} is installed without the cuDNN of CUDA {built}: it falls back to the CPU"
        yield Finding("cudnn", "broken" if driver.gpus else "absent", says, _install_for(driver))


def _without_nvrtc(packages: Installed, driver: Driver) -> Iterator[Finding]:
    cupy = next((name for name in packages if name.startswith("cupy-")), None)
    if cupy and _NVRTC not in packages:
        says = f"{cupy} is installed without NVRTC, which compiles what a GPU runs of a chain, or that does not load"
        yield Finding("nvrtc", "broken" if driver.gpus else "absent", says, _install_for(driver))


def run_backends(packages: Installed, driver: Driver) -> Iterator[Finding]:
    """Run the known chain on each backend that is here, one after another."""
    log = logging.getLogger("ddpm_deploy.engine")
    level = log.level
    log.setLevel(logging.WARNING)  # the engines that are built here are of no interest to anybody
    try:
        with gaussian.onnx_model() as model:
            for look in (
                _on_onnxruntime,
                _on_openvino,
                _on_ncnn,
                _on_onnxruntime_cuda,
                _on_tensorrt,
                _on_tensorrt_rtx,
            ):
                yield look(model, packages, driver)
    finally:
        log.setLevel(level)


def _on_onnxruntime(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name = "ONNX Runtime, CPU"
    if not {"onnxruntime", "onnxruntime-gpu"} & packages.keys():
        return Finding(name, "absent", "is not installed", pip_install("cpu", "onnxruntime"))
    if both := next(_both_onnxruntimes(packages), None):
        return replace(both, name=name)
    return _chain_finding(name, "pip install --force-reinstall onnxruntime", lambda: load_network(model))


def _on_openvino(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name = "OpenVINO, CPU"
    if "openvino" not in packages:
        return Finding(name, "absent", "is not installed", pip_install("openvino", "openvino"))
    mend = "pip install --force-reinstall openvino"
    return _chain_finding(name, mend, lambda: load_network(model, backend="openvino"))


def _on_ncnn(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    """It runs the same model in a file of its own kind."""
    if "ncnn" not in packages:
        return Finding("ncnn", "absent", "is not installed", pip_install("ncnn", "ncnn"))
    with gaussian.ncnn_model() as own:
        return _chain_finding("ncnn", "pip install --force-reinstall ncnn", lambda: load_network(own))


def _on_onnxruntime_cuda(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name, mend = "ONNX Runtime, CUDA", _install_for(driver)
    if not driver.gpus:
        return Finding(name, "absent", _NO_GPU, _get_a_gpu(driver))
    if "onnxruntime-gpu" not in packages:
        mend = f"pip uninstall -y onnxruntime && {mend}"
        return Finding(name, "absent", "onnxruntime-gpu is not installed", mend)
    settings = LoadSettings(device="cuda")
    return _chain_finding(name, mend, lambda: load_network(model, settings, backend="onnxruntime"))


def _install_for(driver: Driver) -> str:
    """The line that installs what this driver runs."""
    return pip_install("gpu-cu12" if driver.older_than(CUDA_13) else "gpu", "tensorrt")


def _on_tensorrt(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    name, mend = "TensorRT", _install_for(driver)
    if not driver.gpus:
        return Finding(name, "absent", _NO_GPU, _get_a_gpu(driver))
    capability = driver.gpus[0].capability
    if numbers(capability) < _OLDEST_CAPABILITY:
        return Finding(name, "absent", f"does not know compute capability {capability}", "use ONNX Runtime")
    if driver.older_than(OLDEST_CUDA):
        says = f"needs CUDA 12.2, and the driver runs {driver.cuda}"
        return Finding(name, "absent", says, UPDATE.format(535))
    if problem := _import_problem(name, "tensorrt", packages, mend):
        return problem
    with tempfile.TemporaryDirectory() as folder:
        return _chain_finding(name, mend, lambda: load_network(_built(model, folder, "tensorrt")))


def _on_tensorrt_rtx(model: ModelFile, packages: Installed, driver: Driver) -> Finding:
    """It builds anywhere, and runs on the GPUs that it has a target for."""
    name, mend = "TensorRT-RTX", pip_install("rtx", "tensorrt_rtx")
    if problem := _import_problem(name, "tensorrt-rtx", packages, mend):
        return problem
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            plan = _built(model, folder, "tensorrt-rtx")
        except Exception as error:
            again = "pip install -U --force-reinstall tensorrt-rtx"
            return Finding(name, "broken", f"builds no engine: {one_line(error)}", again)
        built = f"builds engines here (a tiny one in {time.perf_counter() - start:.1f} s)"
        if not driver.gpus:
            says = f"{built}; none is run, as no NVIDIA GPU is visible"
            return Finding(name, "builds", says, _get_a_gpu(driver))
        capability = driver.gpus[0].capability
        if capability not in CAPABILITIES:
            says = f"{built}; none for compute capability {capability}, which is this GPU's"
            new = numbers(capability) >= _OLDEST_CAPABILITY
            other = f"use TensorRT on this GPU: {_install_for(driver)}" if new else "use ONNX Runtime"
            return Finding(name, "builds", says, other)
        return _chain_finding(name, mend, lambda: load_network(plan))


def _built(model: ModelFile, folder: str, flavour: Flavour) -> ModelFile:
    """The engine of the known model."""
    plan = Path(folder) / "gaussian.plan"
    build_engine(model, plan, EngineSettings(flavour=flavour, batches=((1, _COUNT, _COUNT),)))
    return open_model(plan)


def _chain_finding(name: str, mend: str, load: Callable[[], Network]) -> Finding:
    """Run the chain, and hold its images against theory."""
    try:
        with Sampler(load()) as sampler:
            images = sampler.sample(_COUNT, seed=0).astype(np.float64)
            where = sampler.network.device.name
    except Exception as error:  # one that is broken may raise anything, and the others are yet to be tried
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
    try:
        load_tensorrt(flavour)
    except Exception as error:
        says = one_line(error).partition(": pip install")[0].removeprefix(MODULES[flavour][0]).strip()
        broken = any(package.startswith(f"{flavour}-cu") or package == flavour for package in packages)
        if broken:
            mend = mend.replace("pip install", "pip install --force-reinstall")
        return Finding(name, "broken" if broken else "absent", says, mend)
    return None


def _get_a_gpu(driver: Driver) -> str:
    if driver.problem.startswith("no NVIDIA driver"):
        return "on a machine with an NVIDIA GPU, install its driver (in a container: docker run --gpus all)"
    return f"{driver.problem}: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
