"""A network in torch → an ONNX file with its ModelSpec, that has been checked before it gets its name."""

import copy
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, BackendError, ParityError, first_line
from ddpm_deploy.export.bits import same_bits
from ddpm_deploy.export.ncnn import write_ncnn
from ddpm_deploy.export.precision import TYPES, Calibration, calibrate, convolutions, reduce, widened
from ddpm_deploy.files import atomic_together, require_output, show
from ddpm_deploy.importers.module import unwrapped
from ddpm_deploy.importers.own import OwnNetwork, adapt, own_name
from ddpm_deploy.model_file import open_model
from ddpm_deploy.ncnn_file import describe as describe_ncnn
from ddpm_deploy.onnx_file import entry, seal
from ddpm_deploy.runtime.backends.ncnn import NcnnNetwork, require_ncnn
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.parity import Comparison, StepErrors, Trajectory, judge, record, spot_check
from ddpm_deploy.runtime.proof import as_proof, proof_path, write_proof
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.spec import ISLANDS_KEY, SPEC_KEY, ModelSpec
from ddpm_deploy.stages import Stages, silent
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.words import GraphPrecision

logger = logging.getLogger(__name__)

_TOO_LARGE: Final = "the network is over 2 GiB, more than one ONNX file holds"
_CHECKED_BATCHES: Final = (1, 3)
_NEARLY: Final = 20.0  # dB: ten times as far
_EXPORTERS_LOGS: Final = (
    "torch.onnx",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._dynamo",
)
_PRODUCTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST_FILE: Final = 2**31 - 2**13  # what one protobuf holds, but for the spec and the seal

_FIXED_BATCH: Final = (
    "the network exports for one batch size only: take the batch from x.shape[0], and use that in no range(), list or "
    "int()"
)

# How long a chain the reference runs is decided by its size, not by a clock, so that the same network gives
# the same file and the same proof everywhere.
_WORK: Final = 4e11  # parameters × pixels × images × steps: some ten seconds on two cores
_MOST_IMAGES: Final = 4
_FEWEST_STEPS: Final = 20
_PROOF_STEPS: Final = 100  # of the chains, where they are not for calibration


@dataclass(frozen=True)
class Export:
    """How a file was checked.

    runner: what it was checked in. comparison: with the recorded chains of the reference. calibration: of a reduced
    precision. same_bits: as in the file's spec.
    """

    runner: str
    comparison: Comparison
    calibration: Calibration | None
    same_bits: bool | None


@dataclass(frozen=True)
class _Format:
    """A kind of file that a network is exported to.

    runner: what runs it, for people. write: a traced graph, with its spec, to a path. network: the class that runs the
    file. describe: adds a spec to the file, and a seal.
    """

    runner: str
    write: Callable[[Any, ModelSpec, Path], None]
    network: Callable[..., Network]
    describe: Callable[[Path, ModelSpec], None]


def export_onnx(
    network: nn.Module,
    spec: ModelSpec,
    path: Path,
    *,
    precision: GraphPrecision = "fp32",
    every: bool = False,
    stages: Stages = silent,
) -> Export:
    """Write `network` as an ONNX file: x (B, C, H, W), temb (B, D) → prediction, float32, B dynamic;
    a class-conditional one with y (B,) int64.

    network: ours, of the spec's configuration; or where spec.network is None any torch.nn.Module with forward(x, t) or
        forward(x, temb), and y where the spec has classes: the module itself stays as it is.
    precision: of the network's insides; below fp32, `precision.calibrate` decides what stays in float32.
    every: calibrate at every timestep, where a large network would be at some of them. stages: shows how
        far it is.

    The file gets its name, and its proof beside it, once it has passed the ONNX checker and agrees with
    the network in ONNX Runtime; its spec says whether bits hold there (`bits.same_bits`). Raises
    ParityError where it does not agree, ArtefactError where the network is too large for one file, is not as the spec
    says or cannot be traced, OutputError where a file cannot be written.
    """
    return _export(network, spec, path, _ONNX, precision, every, stages)


def export_ncnn(network: nn.Module, spec: ModelSpec, path: Path, *, stages: Stages = silent) -> Export:
    """Write `network` as a .ncnn file, in float32, checked in ncnn as `export_onnx` checks an .onnx in ONNX Runtime.

    Raises as it does, and ArtefactError where the network has an operator that is not known of ncnn; DependencyError
    or BackendError where ncnn cannot run here.
    """
    require_ncnn()
    return _export(network, spec, path, _NCNN, "fp32", every=False, stages=stages)


def _export(
    network: nn.Module,
    spec: ModelSpec,
    path: Path,
    target: _Format,
    precision: GraphPrecision,
    every: bool,
    stages: Stages,
) -> Export:
    require("onnx", "export")
    require("onnxscript", "export")
    require_output(path)
    require_output(proof_path(path))
    network, spec = _prepared(network, spec, precision)
    trajectory = _record(network.eval(), spec, precision != "fp32", every, stages)
    calibration, reduced = None, network
    if precision != "fp32":
        calibration = calibrate(network, trajectory, precision, stages=stages)
        reduced = reduce(network, precision, calibration.islands)
        spec = msgspec.structs.replace(spec, precision=precision)
    proof = as_proof(trajectory)
    model = trace(reduced, spec)
    if model.ByteSize() > _LARGEST_FILE:
        raise ArtefactError(_TOO_LARGE)
    with atomic_together(path, proof_path(path)) as (temporary, proof_file):
        write_proof(proof, proof_file)
        _require_valid(model)
        target.write(model, spec, temporary)
        del model, reduced
        comparison = _require_parity(network, proof, spec, target, temporary, path, stages)
        # Nobody runs bfloat16 on a CPU.
        bits = (
            None
            if precision == "bf16"
            else same_bits(open_model(temporary, spec), target.network, stages=stages)
        )
        target.describe(temporary, msgspec.structs.replace(spec, same_bits=bits))
    return Export(target.runner, comparison, calibration and _by_own_names(calibration), bits)


def _save(model: Any, spec: ModelSpec, path: Path) -> None:
    """Write the graph; its spec is added once it has been checked."""
    require("onnx", "export").save(model, path)


def _prepared(network: nn.Module, spec: ModelSpec, precision: GraphPrecision) -> tuple[nn.Module, ModelSpec]:
    """The network as the runtime asks it; one that is not ours is copied, and checked."""
    if spec.network is None:
        network = unwrapped(network)
    _require_one_file(network, precision)
    return (network, spec) if spec.network else adapt(_copied(network), spec)


def _require_valid(model: Any) -> None:
    """Raise ArtefactError where the ONNX checker does not take what torch's exporter made."""
    try:
        require("onnx", "export").checker.check_model(model, full_check=True)
    except Exception as error:
        raise ArtefactError(
            f"the network exports to no valid ONNX: {first_line(error)}; where its forward() uses torch.autocast, or "
            "casts by the type of a weight, take that out, as --precision chooses the precision"
        ) from error


def _copied(network: nn.Module) -> nn.Module:
    """A copy, to be moved and cast: the caller's own may be in use."""
    if isinstance(network, OwnNetwork):  # nothing is done to one that was adapted already
        return network
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise ArtefactError(
            f"the network cannot be copied ({first_line(error)}): take weight_norm and the like off first"
        ) from error


def _by_own_names(found: Calibration) -> Calibration:
    """What was decided, by the names in the network itself."""
    islands = {own_name(name): reason for name, reason in found.islands.items()}
    return replace(
        found, islands=islands, ranges={own_name(name): seen for name, seen in found.ranges.items()}
    )


def _require_one_file(network: nn.Module, precision: GraphPrecision) -> None:
    """Raise ArtefactError where the weights alone are more than one file holds, before long work, or are not there."""
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise ArtefactError("the network has lazy layers without weights: load these first")
    reduced = {id(p) for name in convolutions(network) for p in network.get_submodule(name).parameters()}
    size = dict.fromkeys(TYPES, 0)
    for tensor in (*network.parameters(), *network.buffers()):
        for kind in size:
            size[kind] += tensor.numel() * (TYPES[kind].itemsize if id(tensor) in reduced else 4)
    if size[precision] > _LARGEST_FILE:
        raise ArtefactError(_TOO_LARGE + (": try --fp16" if size["fp16"] <= _LARGEST_FILE else ""))


def _record(network: nn.Module, spec: ModelSpec, calibrates: bool, every: bool, stages: Stages) -> Trajectory:
    """Whole chains of the float32 network: what the file is checked by, and a reduced precision calibrated on."""
    image_steps = int(
        _WORK / (max(1, sum(p.numel() for p in network.parameters())) * math.prod(spec.image_shape[1:]))
    )
    count = _MOST_IMAGES if image_steps >= _MOST_IMAGES * _FEWEST_STEPS else 1
    steps = min(spec.timesteps, max(_FEWEST_STEPS, image_steps // count))
    # A mean is used itself in the full chain alone; a strided one takes x̂0 from it, and with it some thousand times its
    # rounding.
    if every or spec.prediction == "mean":
        steps = spec.timesteps
    elif not calibrates:
        steps = min(steps, _PROOF_STEPS)
    reference = TorchNetwork(network, spec, max_batch=count)
    with stages("recording PyTorch", steps) as progress:
        trajectory = record(reference, count=count, steps=steps, keep=steps, progress=progress)
    finite = np.isfinite(trajectory.prediction).all(axis=(1, 2, 3, 4))
    if not finite.all():
        t = trajectory.timesteps[finite.argmin()]
        raise BackendError(
            f"PyTorch's own prediction is not finite at t = {t}: the network is broken, train again"
        )
    return trajectory


def describe(path: Path, spec: ModelSpec) -> None:
    """Append to an ONNX file its spec, and then the seal of it all."""
    said = entry(SPEC_KEY, spec.to_json().encode())
    with path.open("ab") as file:
        file.write(said)
    end = seal(path)
    with path.open("ab") as file:
        file.write(end)


def _float32_products(model: Any) -> list[str]:
    """The convolutions and matrix products of an onnx.ModelProto that read float32, by the names of their nodes."""
    graph, wide = model.graph, require("onnx", "export").TensorProto.FLOAT
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    return [node.name for node in products if types[node.input[0]] == wide]


def trace(network: nn.Module, spec: ModelSpec) -> Any:
    """The network as an onnx.ModelProto, without what the exporter tells of the machine it ran on.

    What has a weight is named as in the network, so that an engine's layers are. One of a reduced precision says
    what is in float32.
    """
    batch = torch.export.Dim("batch", min=1)
    example = {
        tensor.name: torch.zeros(2, *tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in spec.inputs
    }
    with _quiet_exporter(), _explained():
        program = torch.onnx.export(
            network,
            tuple(example.values()),
            input_names=list(example),
            output_names=[spec.output.name],
            # bfloat16 convolutions are ONNX from opset 22 on; engines are best built from 21.
            opset_version=22 if spec.precision == "bf16" else 21,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in example),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    if any(tensor.type.tensor_type.shape.dim[0].dim_value for tensor in model.graph.input):
        raise ArtefactError(_FIXED_BATCH)
    # Stack traces of each node hold the paths of this machine, and are most of a small file.
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        weights = [name for name in node.input if name.endswith(".weight")]
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and weights:
            node.name = own_name(weights[0]).removesuffix(".weight")
    model.graph.name = "ddpm-deploy"
    if spec.precision != "fp32":
        model.metadata_props.add(key=ISLANDS_KEY, value=json.dumps(_float32_products(model)))
    return model


@contextmanager
def _explained() -> Iterator[None]:
    """Say in one line what torch's exporter cannot do with a network."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        raise ArtefactError(
            f"PyTorch's exporter cannot trace the network: {first_line(cause).rstrip('.')}. What it computes must not "
            "hang on the numbers of a tensor (if, .item(), loops), and all its operators must be those of ONNX"
        ) from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter says of its own internals; where it fails it prints whole programs as well."""
    logs = {logging.getLogger(name): logging.getLogger(name).level for name in _EXPORTERS_LOGS}
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in logs.items():
            log.setLevel(level)


def _require_parity(
    network: nn.Module,
    proof: Trajectory,
    spec: ModelSpec,
    target: _Format,
    temporary: Path,
    path: Path,
    stages: Stages,
) -> Comparison:
    """Judge the file by its own proof, and by the network at other batch sizes."""
    largest = max(*_CHECKED_BATCHES, proof.count)
    with _runnable(temporary, spec) as model:
        candidate = target.network(open_model(model, spec), max_batch=largest)
        reference = TorchNetwork(network, proof.spec, max_batch=largest)
        try:
            checks = {batch: spot_check(reference, candidate, batch) for batch in _CHECKED_BATCHES}
        except BackendError as error:
            raise ArtefactError(f"{_FIXED_BATCH} ({first_line(error)})") from error
        with stages(f"checking in {target.runner}", len(proof.timesteps) + proof.steps) as progress:
            comparison = judge(proof, candidate, progress)
        candidate.close()
    _require_agreement(network, proof, comparison, checks, path)
    return comparison


def _require_agreement(
    network: nn.Module,
    proof: Trajectory,
    comparison: Comparison,
    checks: Mapping[int, StepErrors],
    path: Path,
) -> None:
    """Raise ParityError where the exported network differs from PyTorch by more than is allowed.

    checks: by batch size.
    """
    refused = f"{show(path)} was not written: the exported network differs from PyTorch"
    for batch, check in checks.items():
        if not check.within:
            raise ParityError(
                f"{refused} by {check.relative_rms:.1e} of its RMS at t = {check.timestep}, batch {batch}, and "
                f"{check.limit:.0e} is allowed"
            )
    if comparison.first_past is None and _amplifies(network, proof, comparison):
        logger.warning(
            "the images of this network's chains differ by %.0f dB PSNR (%.0f is asked), though its predictions agree "
            "to %.0e: a chain of PyTorch's own, off by as little at each step, ends as far away. The network is "
            "untrained, or what was told of it is not as it was trained",
            comparison.psnr.min(),
            comparison.tolerance.psnr,
            comparison.worst.relative_rms,
        )
    elif not comparison.within:
        worst = comparison.worst
        hint = (
            ": a predicted mean passes its rounding on at every step; export it in fp32, or train ε, v or x0"
            if proof.spec.prediction == "mean"
            else ""
        )
        raise ParityError(
            f"{refused} on real trajectories: by up to {worst.relative_rms:.1e} of its RMS at t = {worst.timestep} "
            f"({worst.limit:.0e} is allowed), the images by {comparison.psnr.min():.0f} dB PSNR "
            f"({comparison.tolerance.psnr:.0f} is asked){hint}"
        )


def _amplifies(network: nn.Module, proof: Trajectory, comparison: Comparison) -> bool:
    """Whether the images differ only as the network's own do where its predictions are off by as little.

    Of a mean they do by nature, and that is refused: it is for the full chain, in float32.
    """
    if comparison.within or proof.spec.prediction == "mean":
        return False
    shaken = _Shaken(network, proof.spec, comparison.worst.relative_rms, max_batch=proof.count)
    return bool(judge(proof, shaken).psnr.min() <= comparison.psnr.min() + _NEARLY)


class _Shaken(TorchNetwork):
    """A network whose predictions are off by a share of their RMS, in any direction."""

    def __init__(self, network: nn.Module, spec: ModelSpec, share: float, *, max_batch: int) -> None:
        super().__init__(network, spec, max_batch=max_batch)
        self._share, self._generator = share, torch.Generator().manual_seed(0)

    def predict(self, batch: int) -> None:
        """Predict for the leading rows."""
        super().predict(batch)
        there = self._prediction[:batch]
        there += (
            self._share * there.square().mean().sqrt() * torch.randn(there.shape, generator=self._generator)
        )


@contextmanager
def _runnable(path: Path, spec: ModelSpec) -> Iterator[Path]:
    """The file as ONNX Runtime can run it on a CPU: itself, but for bfloat16."""
    if spec.precision != "bf16":
        yield path
        return
    onnx = require("onnx", "export")
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / path.name
        onnx.save(widened(onnx.load(path)), wide)
        yield wide


_ONNX: Final = _Format("ONNX Runtime", _save, OrtNetwork, describe)
_NCNN: Final = _Format("ncnn", write_ncnn, NcnnNetwork, describe_ncnn)
