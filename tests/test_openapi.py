"""The OpenAPI document, true and complete: schemathesis asks a real server all that the document allows, and all that
it does not, and compares what comes back with what the document says."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve")
pytest.importorskip("httpx2")
pytest.importorskip("schemathesis")

from ddpm_deploy import Request
from ddpm_deploy.serve.answers import RequestFields
from ddpm_deploy.serve.bodies import SamplesBody
from tests.models import ArrayNetwork, tiny_spec
from tests.test_guidance import Labelled
from tests.test_serve import serving, told

# What a schema does not say: timesteps fall, eta is of ddim, a tensor has as many values as its shape says.
SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "422", "429"]

[[operations]]
include-path-regex = "/infer$"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "422", "429"]
"""
# Other seeds, and many more examples: SEED=7 EXAMPLES=1000 in place of these.
SEED, EXAMPLES = "1", "5"


def schemathesis(folder: Path, url: str, *arguments: str) -> None:
    """All its checks, with a fixed seed; what it finds is the message of the failure."""
    (folder / "schemathesis.toml").write_text(SETTINGS)
    code = "from schemathesis.cli import schemathesis; schemathesis()"
    fixed = ("--seed", SEED, "--max-examples", EXAMPLES, "--continue-on-failure")
    ran = subprocess.run(
        [sys.executable, "-c", code, "run", f"{url}/openapi.json", *fixed, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_route_is_as_the_document_says(tmp_path: Path) -> None:
    with serving(Labelled(), name="toy", max_count=32) as live:
        schemathesis(tmp_path, live.url)
        live.idle()
        assert live.batcher.status().failed == 0


def test_keys_are_asked_for_as_the_document_says(tmp_path: Path) -> None:
    with serving(Labelled(), api_keys=("secret",)) as live:
        told(live.ask("GET", "/openapi.json"), 401)
        some = ("--include-path-regex", "^/(v1/model|v2|metrics|v1/samples/{id})$", "--phases", "coverage")
        schemathesis(tmp_path, live.url, "--header", "Authorization: Bearer secret", *some)


@pytest.mark.parametrize(
    "network",
    [
        ArrayNetwork(tiny_spec((1, 4, 4), timesteps=20), 4),
        ArrayNetwork(tiny_spec((2, 4, 4), timesteps=20), 4),
    ],
    ids=["without classes", "without pictures"],
)
def test_the_limits_are_those_of_the_model(network: Any) -> None:
    with serving(network, max_count=5, max_steps=9) as live:
        schemas = live.ask("GET", "/openapi.json").json()["components"]["schemas"]
        fields = schemas["SamplesBody"]["properties"]
        assert fields["count"]["maximum"] == 5
        assert fields["steps"]["anyOf"][0]["maximum"] == 9
        assert [kind.get("maxItems") for kind in fields["guidance"]["anyOf"]] == [0, None]
        assert "model" not in schemas["InferBody"]["properties"]


def test_a_new_field_of_a_request_is_in_the_document() -> None:
    own = set(Request.__struct_fields__) - {"table", "depth"}  # which JSON does not ask for
    assert set(RequestFields.__annotations__) == own
    assert set(SamplesBody.__struct_fields__) == own | {"deadline", "format"}
