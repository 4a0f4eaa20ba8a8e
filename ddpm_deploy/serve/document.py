"""The OpenAPI document of a service: what FastAPI knows of the routes, and the schemas of what they read and give,
within the limits of this model and service."""

import inspect
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ddpm_deploy.runtime.request import MOST_GUIDANCE
from ddpm_deploy.serve import inference, openai, samples
from ddpm_deploy.serve.bodies import SamplesBody
from ddpm_deploy.serve.openapi import REFERENCE, StateAnswer
from ddpm_deploy.serve.refusals import ErrorAnswer
from ddpm_deploy.serve.settings import Settings
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import ASKED_SOLVERS, SPACINGS

_KINDS: Final = (
    ErrorAnswer,
    StateAnswer,
    SamplesBody,
    samples.SampledImages,
    samples.SampleStatus,
    samples.ModelFields,
    openai.ImagesBody,
    openai.ImagesAnswer,
    openai.ModelEntry,
    openai.ModelList,
    inference.InferBody,
    inference.InferAnswer,
    inference.InferError,
    inference.Live,
    inference.Ready,
    inference.ModelReady,
    inference.ServerMetadata,
    inference.ModelMetadata,
)
_NULL: Final = {"type": "null"}
_END: Final = 2**64  # of seeds and sample indices
_FOREIGN: Final = "HTTPValidationError"  # the answer that FastAPI takes for granted, and none of ours


def document(app: FastAPI, spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    """The whole of it, of an application with its routes."""
    whole = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = msgspec.json.schema_components(_KINDS, ref_template=REFERENCE)
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    for name, fields in _limits(spec, settings).items():
        for field, schema in fields.items():
            schemas[name]["properties"][field] |= schema
            if "anyOf" in schema:
                schemas[name]["properties"][field].pop("type", None)
    whole.setdefault("components", {})["schemas"] = schemas
    for path in whole["paths"].values():
        for operation in path.values():
            answers = operation["responses"]
            operation["responses"] = {
                status: answer for status, answer in answers.items() if _FOREIGN not in str(answer)
            }
    return whole


def _limits(spec: ModelSpec, settings: Settings) -> dict[str, dict[str, dict[str, Any]]]:
    """What each field of a body may be, of this model and service: what its type alone does not say."""
    count = {"type": "integer", "minimum": 1, "maximum": settings.max_count}
    most_steps = min(settings.max_steps or spec.timesteps, spec.timesteps)
    steps = {"type": "integer", "minimum": 1, "maximum": most_steps}
    time = {"type": "integer", "minimum": 0, "maximum": spec.timesteps - 1}
    solver = {"enum": list(ASKED_SOLVERS)}
    seed: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": _END - 1},
        {"type": "string", "pattern": "^[0-9]{1,20}$"},
    ]
    scale = {"type": "number", "minimum": -MOST_GUIDANCE, "maximum": MOST_GUIDANCE}
    label = _label(spec)
    size = "x".join(str(length) for length in spec.image_shape[:0:-1])
    return {
        "SamplesBody": {
            "count": count,
            "steps": _any(steps, _NULL),
            "solver": _any(solver, _NULL),
            "eta": _any({"type": "number", "minimum": 0, "maximum": 1}, _NULL),
            "spacing": _any({"enum": list(SPACINGS)}, _NULL),
            "timesteps": _any(_several(time, most_steps, least=1), _NULL),
            "seed": _any(*seed, _NULL),
            "first_index": _any(*seed),
            "labels": _any(*label, _several(_any(*label), settings.max_count)),
            "guidance": _any(*_guidance(spec, scale, settings.max_count), _NULL),
            "share_until": _any({"type": "integer", "minimum": 0, "maximum": spec.timesteps}, _NULL),
            "deadline": _any({"type": "number", "exclusiveMinimum": 0}, _NULL),
        },
        "ImagesBody": {
            "model": _any({"enum": [settings.name]}, _NULL),
            "n": _any(count, _NULL),
            "size": _any({"enum": ["auto", size]}, _NULL),
            "seed": _any(*seed, _NULL),
            "num_inference_steps": _any(steps, _NULL),
            "guidance_scale": _any(*([scale] if spec.null_class else []), _NULL),
            "solver": _any(solver, _NULL),
        },
        "InputTensor": {
            "name": {"enum": list(inference.INPUTS)},
            "datatype": {"enum": ["BYTES", *inference.TYPES]},
            "shape": {"items": {"type": "integer", "minimum": 1}},
        },
        "OutputWanted": {"name": {"enum": inference.outputs_of(spec)}},
    }


def _any(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def _several(item: dict[str, Any], most: int, *, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def _label(spec: ModelSpec) -> list[dict[str, Any]]:
    """A class, by its number or its name; nothing of an unconditional model."""
    if not spec.num_classes:
        return []
    numbers = {"type": "integer", "minimum": 0, "maximum": spec.num_labels - 1}
    names = [*spec.class_names, *map(str, range(spec.num_labels)), *(["none"] if spec.null_class else [])]
    return [numbers, {"enum": list(dict.fromkeys(names))}]


def _guidance(spec: ModelSpec, scale: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """A scale for all images, or several, in turn; none of a model that cannot be guided."""
    return [scale, _several(scale, most)] if spec.null_class else [_several(scale, 0)]
