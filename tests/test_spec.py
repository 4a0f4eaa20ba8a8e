"""ModelSpec: round trips, and what it refuses."""

import json
from typing import Any

import msgspec
import pytest

from ddpm_deploy.errors import SpecError
from ddpm_deploy.schedule import CosineBetas
from ddpm_deploy.spec import MAX_SPEC_BYTES, ModelSpec, Tensor, UNetConfig
from tests.models import tiny_spec


def test_round_trip() -> None:
    spec = msgspec.structs.replace(
        tiny_spec((3, 64, 32)), schedule=CosineBetas(s=0.01), variance="fixed_small"
    )
    assert ModelSpec.from_json(spec.to_json(), "x.onnx") == spec


def test_kinds_are_told() -> None:
    content = json.loads(tiny_spec().to_json())
    kinds = {name: content[name]["kind"] for name in ("schedule", "embedding", "network")}
    assert kinds == {"schedule": "linear", "embedding": "sinusoidal", "network": "unet"}


def test_what_goes_in_and_out() -> None:
    spec = tiny_spec((3, 8, 16))
    x, temb = Tensor("x", "float32", (3, 8, 16)), Tensor("temb", "float32", (8,))
    assert spec.inputs == (x, temb)
    assert spec.output == Tensor("prediction", "float32", (3, 8, 16))
    more = msgspec.structs.replace(spec, num_classes=2, variance="learned_range")
    assert more.inputs == (x, temb, Tensor("y", "int64", ()))
    assert more.output.shape == more.prediction_shape == (6, 8, 16)


def test_largest_spec_fits_in_an_engines_name() -> None:
    network = UNetConfig(
        channels=16_384,
        widths=(16_384,) * 13,
        time_width=16_384,
        attention_levels=tuple(range(16)),
        head_channels=16_384,
    )
    spec = tiny_spec((3, 4096, 4096), network=network)
    provenance = msgspec.structs.replace(
        spec.provenance, data="日" * 200, ddpm_deploy="v" * 200, torch="v" * 200
    )
    assert len(msgspec.structs.replace(spec, provenance=provenance).to_json().encode()) <= MAX_SPEC_BYTES


def test_a_spec_that_would_not_fit_is_refused() -> None:
    spec = msgspec.structs.replace(tiny_spec(), network=UNetConfig(attention_levels=tuple([1] * 4000)))
    with pytest.raises(SpecError, match="only 3999 fit"):
        spec.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": 0},
        {"timesteps": 10**9},
        {"timesteps": 1000.5},
        {"image_shape": [1, 8]},
        {"image_shape": [1, 8, -8]},
        {"image_shape": [1, 8, 10**12]},
        {"prediction": "noise"},
        {"variance": "learned"},
        {"schedule": {"kind": "quadratic"}},
        {"schedule": {"kind": "linear", "beta_end": 2.0}},
        {"schedule": {"kind": "given", "betas": [0.1, 0.2]}},
        {"schedule": {"kind": "linear", "beta_end": "1e-2"}},
        {"embedding": {"dim": 8, "spacing": "third"}},
        {"embedding": None},
        {"embedding": {"kind": "fourier", "dim": 8}},
        {"surprise": 1},
        {"precision": "int4"},
        {"provenance": {"digest": "g" * 64}},
        {"value_range": [1.0, -1.0]},
        {"value_range": [0.0, 0.0]},
        {"image_shape": [16384, 16384, 16384]},
        {"image_shape": [1, 7, 8]},
        {"timesteps": 100_000, "embedding": {"dim": 65_536}},
        {"network": {"kind": "transformer"}},
        {"network": {"channel_mults": [1, 2]}},
        {"network": {"widths": []}},
        {"network": {"channels": 8, "widths": [6], "groups": 3}},
        {"network": {"channels": 6, "widths": [8], "groups": 4}},
        {"network": {"widths": [32], "head_channels": 48}},
    ],
)
def test_malformed_specs_are_refused(change: dict[str, Any]) -> None:
    content = json.loads(tiny_spec().to_json()) | change
    with pytest.raises(SpecError, match=r"the ModelSpec in x\.pt is not valid"):
        ModelSpec.from_json(json.dumps(content), "x.pt")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "NaN", "[" * 100_000, '{"spec_version": 1}', b"\xff\xfe"]
)
def test_what_is_no_spec_is_refused(text: str | bytes) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text, "x.pt")


@pytest.mark.parametrize("version", ["spec_version", "noise_version"])
def test_a_newer_version_says_so_whatever_else_it_holds(version: str) -> None:
    content = json.loads(tiny_spec().to_json()) | {version: 99, "new_field": {}}
    with pytest.raises(SpecError, match="newer ddpm-deploy.*from where this one came"):
        ModelSpec.from_json(json.dumps(content), "x.pt")
