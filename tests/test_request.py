"""A request: completed and checked once, the same in all its forms and parts."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_deploy.errors import DataError, SettingError
from ddpm_deploy.runtime.request import Request, make_request
from ddpm_deploy.spec import FAST, ChainSettings
from tests.models import tiny_spec

PLAIN = tiny_spec(network=None)
SPEC = msgspec.structs.replace(PLAIN, num_classes=3, class_names=("cat", "dog", "2"), null_class=True)


def test_a_checked_request_is_complete() -> None:
    request = Request(labels=("dog", "none", 0)).checked(SPEC)
    assert request.seed is not None
    assert (request.steps, request.labels) == (1000, (1, 3, 0))
    assert request.checked(SPEC) == request
    assert Request().checked(SPEC).seed != Request().checked(SPEC).seed
    assert request.table_for(SPEC) is Request(seed=1).checked(SPEC).table_for(SPEC)
    np.testing.assert_array_equal(request.table_for(SPEC).rows, SPEC.step_table(ChainSettings()).rows)


def test_fast_is_a_chain_with_a_name() -> None:
    fast = Request(solver="fast", seed=0).checked(SPEC)
    assert (fast.solver, fast.steps, fast.spacing) == (FAST.solver, FAST.steps, FAST.spacing)
    assert fast == Request(seed=0, solver=FAST.solver, steps=FAST.steps, spacing=FAST.spacing).checked(SPEC)
    other = Request(solver="fast", steps=7, spacing="log-snr", seed=0).checked(SPEC)
    assert (other.solver, other.steps, other.spacing) == (FAST.solver, 7, "log-snr")
    told = Request(solver="fast", timesteps=(900, 400, 0), seed=0).checked(SPEC)
    assert (told.solver, told.steps, told.timesteps) == (FAST.solver, 3, (900, 400, 0))
    assert Request(solver="fast", seed=0).checked(tiny_spec(timesteps=7)).steps == 7
    with pytest.raises(SettingError, match="eta is of the solver ddim"):
        Request(solver="fast", eta=0.5).checked(SPEC)
    with pytest.raises(SettingError, match="choose from 1 to"):
        Request(solver="fast", steps=0).checked(SPEC)


@given(
    count=st.integers(1, 12),
    first=st.one_of(st.integers(0, 20), st.integers(2**64 - 30, 2**64 - 12)),
    data=st.data(),
)
def test_a_part_has_what_the_whole_has(count: int, first: int, data: st.DataObject) -> None:
    """Labels, scales and addresses, wherever the part is cut out, also of a part."""
    each = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    scales = [
        float(value) for value in data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    ]
    whole = make_request(SPEC, count, first_index=first, seed=5, labels=each, guidance=scales)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    part = whole[start:stop]
    labels, strengths = whole.label_numbers(SPEC), whole.scales()
    assert labels is not None
    assert strengths is not None
    assert (labels.tolist(), strengths.tolist()) == (each, scales)
    np.testing.assert_array_equal(part.label_numbers(SPEC), labels[start:stop])
    np.testing.assert_array_equal(part.scales(), strengths[start:stop])
    np.testing.assert_array_equal(part.addresses()[1], whole.addresses()[1][start:stop])
    assert part[0:1] == whole[start : start + 1]
    assert part.rows == 2 * (stop - start)


def test_labels_in_turn_go_by_sample_index() -> None:
    turns = Request(count=5, first_index=4, seed=0).checked(SPEC).label_numbers(SPEC)
    assert turns is not None
    assert turns.tolist() == [1, 2, 0, 1, 2]
    some = Request(count=4, first_index=3, seed=0, labels=("cat", "dog")).checked(SPEC).label_numbers(SPEC)
    assert some is not None
    assert some.tolist() == [1, 0, 1, 0]
    assert Request(seed=0).checked(PLAIN).label_numbers(PLAIN) is None


def test_json_and_back() -> None:
    request = make_request(
        SPEC, 3, seed=2**64 - 1, labels=["cat", 2, "none"], guidance=1.5, solver="ddim", eta=0.5
    )
    text = json.dumps(request.to_builtins())
    assert Request.from_builtins(json.loads(text), "it") == request
    table = SPEC.step_table(ChainSettings(steps=3))
    with pytest.raises(SettingError, match="a table of your own has no form in JSON"):
        make_request(SPEC, 1, table=table).to_builtins()


@pytest.mark.parametrize(
    "fields",
    [
        [],
        None,
        {"count": "3"},
        {"steps": 1.5},
        {"solver": "euler"},
        {"labels": [1.5]},
        {"guidance": "much"},
        {"unknown": 1},
        {"table": {"rows": [[0.0] * 12]}},
    ],
)
def test_what_is_no_request(fields: Any) -> None:
    with pytest.raises(DataError, match=r"^it is not a request: "):
        Request.from_builtins(fields, "it")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"count": 0}, "count must be 1 or more"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"first_index": -1}, "first_index must be from 0"),
        ({"count": 2, "first_index": 2**64 - 1}, "first_index must be from 0"),
        ({"steps": 1001}, "choose from 1 to 1000"),
        ({"eta": 0.5}, "eta is of the solver ddim"),
        ({"labels": ("cow",)}, "no class 'cow'"),
        ({"guidance": (1e9,)}, "guidance must be from -1000 to 1000, not 1000000000"),
        ({"guidance": (float("nan"),)}, "not nan"),
        ({"count": "3"}, "not a request: Expected `int`, got `str`"),
        ({"guidance": 3.0}, "not a request"),
        ({"labels": "34"}, "not a request"),
        ({"steps": [1]}, "not a request"),
        ({"table": 3}, "table must be a StepTable"),
        ({"solver": "euler"}, "solver 'euler' is not known: choose from ddpm"),
    ],
)
def test_what_no_model_can_do(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Request(**changes).checked(SPEC)


def test_what_this_model_has_not() -> None:
    with pytest.raises(SettingError, match="guidance needs a model that knows the null class"):
        Request(guidance=(2.0,)).checked(PLAIN)
    with pytest.raises(SettingError, match="unconditional"):
        Request(labels=(0,)).checked(PLAIN)


@pytest.mark.parametrize("part", [slice(0, 0), slice(2, 1), slice(5, 9), slice(0, 4, 2)])
def test_no_part_of_it(part: slice) -> None:
    with pytest.raises(IndexError):
        Request(count=4, seed=0)[part]
