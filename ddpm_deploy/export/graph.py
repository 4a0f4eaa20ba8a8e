"""A network in torch → an ONNX file with its ModelSpec, that has been checked before it gets its name."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import ArtefactError, ParityError
from ddpm_deploy.files import atomic, require_output, show
from ddpm_deploy.runtime.ort import OrtDenoiser
from ddpm_deploy.runtime.parity import SpotCheck, spot_check
from ddpm_deploy.spec import SPEC_KEY, ModelSpec
from ddpm_deploy.tolerances import PARITY
from ddpm_deploy.train.denoiser import TorchDenoiser
from ddpm_deploy.train.unet import UNet

OPSET: Final = 21
_CHECKED_BATCHES: Final = (1, 2, 5)
_LARGEST_FILE: Final = 2**31 - 1  # what one protobuf holds


def export_onnx(network: UNet, spec: ModelSpec, path: Path) -> SpotCheck:
    """Write `network` as an ONNX file: x (B, C, H, W), temb (B, D) → prediction, float32, B dynamic.

    The file gets its name once it has passed the ONNX checker and agrees with the network in ONNX
    Runtime. Returns how nearly it does. Raises ParityError where it does not, ArtefactError where the
    network is too large for one file, OutputError where the file cannot be written.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    require_output(path)
    if sum(p.nbytes for p in network.parameters()) > _LARGEST_FILE:
        raise ArtefactError("the network has over 2 GiB of weights, more than one ONNX file holds")
    model = trace(network.eval(), spec)
    model.metadata_props.add(key=SPEC_KEY, value=spec.to_json())
    with atomic(path) as temporary:
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
        del model
        return _require_parity(network, spec, temporary, path)


def trace(network: UNet, spec: ModelSpec) -> Any:
    """The network as an onnx.ModelProto, without what the exporter tells of the machine it ran on."""
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, *spec.image_shape), torch.zeros(2, spec.embedding.dim)
    with _quiet_exporter():
        program = torch.onnx.export(
            network,
            example,
            input_names=["x", "temb"],
            output_names=["prediction"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: batch}, {0: batch}),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # Stack traces of each node hold the paths of this machine, and are most of a small file.
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    model.graph.name = "ddpm-deploy"
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter says of its own internals."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _require_parity(network: UNet, spec: ModelSpec, temporary: Path, path: Path) -> SpotCheck:
    largest = max(_CHECKED_BATCHES)
    reference = TorchDenoiser(network, spec, max_batch=largest)
    candidate = OrtDenoiser(temporary, max_batch=largest)
    check = spot_check(reference, candidate, _CHECKED_BATCHES)
    candidate.close()
    limit = PARITY[spec.precision].prediction
    if check.relative_rms > limit:
        raise ParityError(
            f"{show(path)} was not written: the exported network differs from PyTorch by {check.relative_rms:.1e} of "
            f"its RMS at t = {check.timestep}, batch {check.batch}, and {limit:.0e} is allowed"
        )
    return check
