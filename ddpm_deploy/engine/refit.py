"""New weights of the same network in an engine that was built to take them: seconds in place of minutes."""

from pathlib import Path

import msgspec

from ddpm_deploy.artefact import read_spec, require_intact
from ddpm_deploy.engine.bindings import made
from ddpm_deploy.engine.build import NOWHERE
from ddpm_deploy.engine.load import deserialized, load_engine
from ddpm_deploy.errors import ArtefactError, BackendError
from ddpm_deploy.files import quoted, show
from ddpm_deploy.plan import spec_place, write_plan
from ddpm_deploy.spec import ModelSpec

# What must be the same in both for the weights to fit.
_NETWORK = ("image_shape", "embedding", "network", "prediction", "variance", "num_classes", "null_class")


def refit_engine(onnx: Path, engine: Path, path: Path) -> None:
    """Write to `path` the engine `engine` with the weights of `onnx`, and their ModelSpec.

    Raises ArtefactError where it was not built refittable, or is of another network or precision, BackendError where
    no GPU is visible or TensorRT does not do it, OutputError where it cannot be written.
    """
    require_intact(onnx)
    new, old = read_spec(onnx), read_spec(engine)
    spec = refitted_spec(onnx, new, engine, old)
    there = load_engine(engine)
    trt, cuda_engine, log = there.trt, there.engine, there.log
    refitter = made("a refitter", log, trt.Refitter, cuda_engine, log.handle)
    parser = made("a parser", log, trt.OnnxParserRefitter, refitter, log.handle)
    if not parser.refit_from_bytes(onnx.read_bytes(), NOWHERE) or not refitter.refit_cuda_engine():
        raise BackendError(
            f"TensorRT did not take the weights of {show(onnx)}: {log.reason('it does not say why')}"
        )
    serialization = made("a configuration", log, cuda_engine.create_serialization_config)
    serialization.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it can be refitted again
    plan = renamed(bytes(made("a plan", log, cuda_engine.serialize_with_config, serialization)), spec)
    if not deserialized(trt, log, plan, spec).refittable:
        raise BackendError("TensorRT made a plan that takes no new weights again: build the engine anew")
    write_plan(path, plan)


def refitted_spec(onnx: Path, new: ModelSpec, engine: Path, old: ModelSpec) -> ModelSpec:
    """The spec of an engine with new weights. Raises ArtefactError where they cannot be put into it."""
    if old.engine is None or not old.engine.refittable:
        rtx = " --rtx" if old.engine and old.engine.flavour == "tensorrt-rtx" else ""
        raise ArtefactError(
            f"{show(engine)} is not an engine that was built to take new weights: build one that is, with "
            f"ddpm-export {quoted(onnx)}{rtx} --refittable, on a machine with a GPU"
        )
    differs = [name for name in _NETWORK if getattr(new, name) != getattr(old, name)]
    if differs or new.precision != ("fp32" if old.precision == "tf32" else old.precision):
        raise ArtefactError(
            f"{show(onnx)} and {show(engine)} are not of the same network: they differ in "
            f"{', '.join(differs) or 'precision'}; build an engine of its own, with ddpm-export {quoted(onnx)}"
        )
    return msgspec.structs.replace(new, engine=old.engine, precision=old.precision)


def renamed(plan: bytes, spec: ModelSpec) -> bytes:
    """A plan with another spec in the place of its own: TensorRT keeps the name that an engine was built with.

    The name keeps its length, so that nothing else moves: a refittable engine is named with spaces behind its spec
    (`build.SPARE`), which the new one may use. Raises BackendError where it does not fit.
    """
    place = spec_place(plan)
    text = spec.to_json().encode()
    if place is None or len(text) > place.stop - place.start:
        raise BackendError(
            "the ModelSpec of these weights does not fit in the place of the engine's own: build anew"
        )
    return plan[: place.start] + text.ljust(place.stop - place.start) + plan[place.stop :]
