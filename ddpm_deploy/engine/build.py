"""ONNX → a TensorRT engine that has been looked at before it gets its name.

One code for TensorRT 10.16 and later and for TensorRT-RTX, which differ here in two things: TensorRT builds for the
GPU that it runs on, and needs one; TensorRT-RTX builds for any that it is told, and needs none.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ddpm_deploy.engine.bindings import Log, as_bytes, in_words, log_of, made, name_of, require_builder
from ddpm_deploy.engine.layers import Layers, inspected, layers_of, require_precision
from ddpm_deploy.engine.load import deserialized, runs_on
from ddpm_deploy.errors import ArtefactError, BackendError, SettingError, plural
from ddpm_deploy.files import atomic, require_output, require_suffix, show
from ddpm_deploy.gpu import driver, visible_gpu
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.plan import digest_path, write_plan
from ddpm_deploy.signals import signals_held
from ddpm_deploy.spec import EngineSpec, ModelSpec
from ddpm_deploy.stages import Stages, silent
from ddpm_deploy.words import CAPABILITIES, MAX_BATCH, Flavour

logger = logging.getLogger(__name__)

DEFAULT_LEVEL: Final = 3  # TensorRT's own
# Where a graph is said to be, so that the parser finds no other file that it may name.
NOWHERE: Final = "/dev/null/model.onnx"
# Settings that one TensorRT alone has.
_OF_ONE: Final = {
    "capabilities": (
        "tensorrt-rtx",
        "compute capabilities are of TensorRT-RTX: TensorRT builds for the GPU it runs on",
    ),
    "timing_cache": (
        "tensorrt",
        "timing caches are of TensorRT: TensorRT-RTX measures nothing when it builds",
    ),
    "hardware_compatible": (
        "tensorrt",
        "hardware compatibility is of TensorRT: an engine of TensorRT-RTX runs on all the compute capabilities that it "
        "names",
    ),
}
_TYPES: Final = {"float32": "FLOAT", "int64": "INT64"}  # as TensorRT names them


@dataclass(frozen=True)
class EngineSettings:
    """How to build.

    batches: (smallest, best, largest) of each optimisation profile; none: up to `default_engine_batch` of the model.
    tf32: round to TensorFloat-32 what float32 layers multiply. workspace: bytes of scratch (None: all there are).
    level: of TensorRT's optimisation, 0 to 5.
    hardware_compatible: of TensorRT: run on every GPU from Ampere on, at some cost in speed.
    capabilities: of TensorRT-RTX: compute capabilities to build for, out of CAPABILITIES (none: all, compiled on
        the target). timing_cache: a file of TensorRT's measurements, made where it does not exist. gpu: the number
        of the GPU that TensorRT builds on, which must be the thread's own.
    """

    flavour: Flavour = "tensorrt"
    batches: tuple[tuple[int, int, int], ...] = ()
    tf32: bool = False
    workspace: int | None = None
    level: int = DEFAULT_LEVEL
    hardware_compatible: bool = False
    capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    gpu: int = 0

    def __post_init__(self) -> None:
        for smallest, best, largest in self.batches:
            if not 1 <= smallest <= best <= largest <= MAX_BATCH:
                raise SettingError(
                    f"a profile of the batches {smallest}, {best}, {largest} is not in order from 1 to {MAX_BATCH}"
                )
        if not 0 <= self.level <= 5:
            raise SettingError(f"the optimisation level must be from 0 to 5, not {self.level}")
        if self.workspace is not None and self.workspace < 1:
            raise SettingError(f"workspace must be a number of bytes, not {self.workspace}")
        if unknown := [c for c in self.capabilities if c not in CAPABILITIES]:
            raise SettingError(
                f"TensorRT-RTX builds for the compute capabilities {', '.join(CAPABILITIES)}, not for {unknown[0]}"
            )
        for name, (flavour, says) in _OF_ONE.items():
            if getattr(self, name) and self.flavour != flavour:
                raise SettingError(says)
        if self.timing_cache:
            require_suffix(self.timing_cache, "a timing cache", ".cache")


def default_engine_batch(spec: ModelSpec) -> int:
    """The largest batch of an engine, where nothing else is said: 64, and less for images over 64×64."""
    _, height, width = spec.image_shape
    return max(2 if spec.null_class else 1, min(64, 64**3 // (height * width)))


def build_engine(onnx: ModelFile, path: Path, settings: EngineSettings, *, stages: Stages = silent) -> Layers:
    """Build the engine of an .onnx file of ddpm-export, with its ModelSpec as its name and its digest beside it.

    The spec of the engine says how it was built (`EngineSpec`). stages: shows how far it is. Ctrl-C ends it at the
    next step of TensorRT's; nothing is left under `path` unless the engine is whole.

    Raises ArtefactError where the .onnx is not one that can be built, ParityError where it is not in the precision
    it says, DependencyError or BackendError where TensorRT is missing or fails, OutputError where it cannot be
    written.
    """
    onnx.require_intact()
    if settings.tf32 and onnx.spec.precision != "fp32":
        raise SettingError(
            f"tf32 rounds what float32 layers multiply, and {onnx.name} is in {onnx.spec.precision}"
        )
    onnx.require_finite()
    for output in (path, digest_path(path)):
        require_output(output)
    stopped = threading.Event()
    with signals_held(stopped.set, "stopping at the next chance, with nothing written"):
        layers, plan = _build(onnx, settings, stopped, stages)
    write_plan(path, plan)
    return layers


def _build(
    onnx: ModelFile, settings: EngineSettings, stopped: threading.Event, stages: Stages
) -> tuple[Layers, memoryview]:
    """All that is TensorRT's."""
    trt = require_builder(settings.flavour, settings.gpu)
    log = log_of(settings.flavour)
    log.errors.clear()
    builder = made("a builder", log, trt.Builder, log.handle)
    network = made(
        "a network", log, builder.create_network, 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    _parse(trt, network, onnx, log)
    _require_interface(network, onnx)
    layers = layers_of(trt, network)
    require_precision(layers, onnx.spec.precision, onnx.onnx.meant_float32 if onnx.onnx else None)
    spec = engine_spec(onnx.spec, settings, str(trt.__version__))
    _set_name(network, spec)
    config = _configure(trt, builder, settings, spec, log)
    logger.info("building an engine of %s with %s %s", onnx.name, settings.flavour, trt.__version__)
    config.progress_monitor = monitor = _monitor(trt, stopped, stages)
    with _timing_cache(config, settings.timing_cache, log):
        plan = None if stopped.is_set() else builder.build_serialized_network(network, config)
    del monitor
    if stopped.is_set():
        raise BackendError("the build was stopped by a signal")
    if plan is None:
        raise BackendError(f"TensorRT built no engine: {log.reason()}")
    _inspect(trt, plan, spec, settings.gpu, log)
    return layers, as_bytes(plan)


def engine_spec(spec: ModelSpec, settings: EngineSettings, version: str) -> ModelSpec:
    """The spec of the engine that is built of a model with these settings, here."""
    largest = default_engine_batch(spec)
    engine = EngineSpec(
        flavour=settings.flavour,
        version=version,
        capabilities=settings.capabilities,
        hardware_compatible=settings.hardware_compatible,
        batches=settings.batches or ((1, largest, largest),),
    )
    if settings.flavour == "tensorrt":  # which builds for the GPU that it runs on
        found = driver()
        gpu = found.gpus[settings.gpu]
        only = () if settings.hardware_compatible else (gpu.capability,)
        engine = msgspec.structs.replace(engine, capabilities=only, gpu=gpu.name, driver=found.version)
    precision = "tf32" if settings.tf32 else spec.precision
    return msgspec.structs.replace(spec, engine=engine, precision=precision, same_bits=None)


def _parse(trt: Any, network: Any, onnx: ModelFile, log: Log) -> None:
    parser = made("a parser", log, trt.OnnxParser, network, log.handle)
    if parser.parse(onnx.path.read_bytes(), NOWHERE):
        return
    problems = [parser.get_error(index) for index in range(parser.num_errors)]
    named = dict.fromkeys(in_words(problem.node_operator) for problem in problems)
    operators = [operator for operator in named if operator and not parser.supports_operator(operator)]
    if operators:
        raise ArtefactError(
            f"{onnx.name} uses what TensorRT does not support: {', '.join(operators)}; export the model "
            "again with ddpm-export"
        )
    reason = log.reason(in_words(problems[0].desc) if problems else "it does not say why")
    raise ArtefactError(f"{onnx.name}: TensorRT cannot read it: {show(reason)}")


def _require_interface(network: Any, onnx: ModelFile) -> None:
    """The graph must have the inputs and the output that its spec says, B dynamic."""
    wanted, result = (
        {tensor.name: (_TYPES[tensor.dtype], (-1, *tensor.shape)) for tensor in side}
        for side in (onnx.spec.inputs, [onnx.spec.output])
    )
    inputs, outputs = (
        {name_of(tensor): (tensor.dtype.name, tuple(tensor.shape)) for tensor in map(get, range(count))}
        for get, count in (
            (network.get_input, network.num_inputs),
            (network.get_output, network.num_outputs),
        )
    )
    if (inputs, outputs) != (wanted, result):
        raise ArtefactError(
            f"{onnx.name} does not fit its ModelSpec: it has {show(f'{inputs} → {outputs}')}, and "
            f"{wanted} → {result} is needed: export it again with ddpm-export"
        )


def _set_name(network: Any, spec: ModelSpec) -> None:
    """The spec as the network's name, which a plan keeps verbatim; one that is too long is silently dropped."""
    text = spec.to_json()
    network.name = text
    if network.name != text:
        raise BackendError(
            f"TensorRT did not take the ModelSpec of {len(text)} characters as the network's name"
        )


def _configure(trt: Any, builder: Any, settings: EngineSettings, spec: ModelSpec, log: Log) -> Any:
    config = made("a configuration", log, builder.create_builder_config)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    if settings.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.builder_optimization_level = settings.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector can tell
    if settings.flavour == "tensorrt-rtx":
        # CUDA graphs are captured only of engines that allocate nothing themselves.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(settings.capabilities)
        for index, capability in enumerate(settings.capabilities):
            name = "SM" + capability.replace(".", "")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    elif settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert spec.engine is not None
    for batches in spec.engine.batches:
        profile = made("a profile", log, builder.create_optimization_profile)
        for tensor in spec.inputs:
            profile.set_shape(tensor.name, *((batch, *tensor.shape) for batch in batches))
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT refuses the batches {batches}: {log.reason()}")
    return config


@contextmanager
def _timing_cache(config: Any, path: Path | None, log: Log) -> Iterator[None]:
    """Start from what TensorRT has measured before, and keep what it measures: a second build is far quicker.

    A cache that cannot be read or written costs a warning, not the engine.
    """
    if path is None:
        yield
        return
    try:
        known = path.read_bytes() if path.exists() else b""
    except OSError as error:
        logger.warning(
            f"the timing cache {show(path)} cannot be read ({error.strerror}): building without it"
        )
        known = b""
    cache = config.create_timing_cache(known)
    if (cache is None or not config.set_timing_cache(cache, False)) and known:
        logger.warning(
            f"the timing cache {show(path)} is of another TensorRT or GPU, or damaged: it starts anew"
        )
        log.errors.clear()
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, temporary.open("wb") as file:
            file.write(config.get_timing_cache().serialize())
    except Exception as error:  # whatever it is, the engine is there
        logger.warning("the timing cache was not kept: %s", error)


def _monitor(trt: Any, stopped: threading.Event, stages: Stages) -> Any:
    """TensorRT's progress as bars of ours, one for each of its outermost phases.

    Its methods are called from C++, on other threads too: they must not raise, as for want of an inner phase's bar.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bars: dict[str, tuple[ExitStack, Callable[[int], None]]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                bar = ExitStack()
                with suppress(Exception):
                    self._bars[phase_name] = bar, bar.enter_context(stages(phase_name.lower(), num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            with suppress(Exception):
                self._bars[phase_name][1](1)
            return not stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with suppress(Exception):
                self._bars.pop(phase_name)[0].close()

    return Monitor()


def _inspect(trt: Any, plan: memoryview, spec: ModelSpec, index: int, log: Log) -> None:
    """Where there is a GPU that can run it: load the engine, and ask it what it is."""
    gpu = visible_gpu(index)
    if gpu is None or spec.engine is None or not runs_on(spec.engine, gpu):
        return
    try:
        cuda_engine = deserialized(trt, log, plan, "the new engine")
        if ModelSpec.from_json(cuda_engine.name, "the new engine") != spec:
            raise ArtefactError("TensorRT does not keep the ModelSpec of the new engine as its name")
    except ArtefactError as error:
        if spec.engine.flavour == "tensorrt":  # which was built for this very machine
            raise
        logger.warning("the engine could not be looked at on this machine's GPU: %s", error)
        return
    inspector = made("an inspector", log, cuda_engine.create_engine_inspector)
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    narrow, kernels = inspected(information, spec.precision)
    logger.info("the inspector: %s, %d with %s", plural(kernels, "kernel"), narrow, spec.precision)
