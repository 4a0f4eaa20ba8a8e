"""Which backend runs a model: by the suffix of its file and the device that is asked for."""

import logging
from pathlib import Path

from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES, ONNX_SUFFIX, read_spec
from ddpm_deploy.engine.bindings import MODULES, require_gpu
from ddpm_deploy.engine.cache import built_on_arrival, flavour_here, settings_here
from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.files import quoted, show
from ddpm_deploy.plan import PLAN_SUFFIX
from ddpm_deploy.runtime.denoiser import Denoiser
from ddpm_deploy.runtime.device import Cuda
from ddpm_deploy.runtime.kernel import require_nvrtc
from ddpm_deploy.runtime.network import Mirrored
from ddpm_deploy.runtime.ort import OrtDenoiser, OrtNetwork, onnxruntime_has_cuda
from ddpm_deploy.runtime.trt import TrtNetwork
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.stages import Stages, silent

logger = logging.getLogger(__name__)


def load_denoiser(
    path: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
    spec: ModelSpec | None = None,
    stages: Stages = silent,
) -> Denoiser:
    """The backend of an exported model, by the suffix of its name and the device. Arguments as of `Sampler.load`;
    stages: shows how far the build of an engine is."""
    if device not in (None, "cpu", "cuda"):
        raise SettingError(f"device {device!r} is not known: say 'cpu' or 'cuda', or leave it out")
    if threads is not None and threads < 1:
        raise SettingError(f"threads must be 1 or more, not {threads}")
    if max_batch is not None and max_batch < 1:
        raise SettingError(f"max_batch must be 1 or more, not {max_batch}")
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        raise ArtefactError(f"{show(path)} is a checkpoint: export it first, with ddpm-export {quoted(path)}")
    if threads is not None and runs_on_gpu(path, device):
        raise SettingError("threads are of the CPU, and the model is to run on a GPU: leave them out")
    if suffix == PLAN_SUFFIX:
        if device == "cpu":
            raise SettingError(
                f"{show(path)} is an engine, which runs on a GPU: leave device out, or load its .onnx"
            )
        return Mirrored(TrtNetwork.load(path, max_batch=max_batch, spec=spec))
    if device == "cuda":
        return _on_gpu(path, max_batch, spec, stages)
    return OrtDenoiser(path, threads=threads, max_batch=max_batch, spec=spec)


def runs_on_gpu(path: Path, device: str | None) -> bool:
    """Whether `load_denoiser` runs it there: an engine always, an .onnx where it is asked for."""
    return path.suffix.lower() == PLAN_SUFFIX or (path.suffix.lower() == ONNX_SUFFIX and device == "cuda")


def _on_gpu(path: Path, max_batch: int | None, spec: ModelSpec | None, stages: Stages) -> Denoiser:
    """An .onnx file on this machine's GPU: by an engine that is built here, once; without TensorRT, by ONNX Runtime."""
    gpu = require_gpu("leave device out to run on the CPU; ddpm-deploy doctor says what is missing")
    if flavour_here(gpu) is None and onnxruntime_has_cuda():
        logger.info("no TensorRT is installed that runs on this GPU: using ONNX Runtime")
        return Mirrored(OrtNetwork(path, Cuda(), max_batch=max_batch, spec=spec))
    settings = settings_here(spec or read_spec(path), max_batch, gpu)
    Cuda(MODULES[settings.flavour][1])  # what is missing to run it is told before minutes of building
    require_nvrtc(MODULES[settings.flavour][1])

    def load(plan: Path) -> Denoiser:
        return Mirrored(TrtNetwork.load(plan, max_batch=max_batch))

    return built_on_arrival(path, settings, load, spec=spec, stages=stages)
