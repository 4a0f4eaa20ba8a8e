"""GroupNormalization in ONNX Runtime on a CPU: the same numbers by other operators, and the file as it was."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Sampler
from ddpm_deploy.model_file import open_model
from ddpm_deploy.onnx_file import OnnxFile
from ddpm_deploy.runtime.backends import onnxruntime as backend
from ddpm_deploy.runtime.backends.norms import without_group_norm
from ddpm_deploy.words import Precision

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")


def normalisation(axes: int, kind: int = 1, opset: int = 21, **attributes: Any) -> Any:
    """A model that is one: of x (batch, 6, …) by two groups."""
    from onnx import helper

    shape = ["batch", 6, *range(5, 5 + axes)]
    given, made = (helper.make_tensor_value_info(name, kind, shape) for name in "xy")
    weights = [
        helper.make_tensor(name, kind, [6], np.linspace(low, 2, 6)) for name, low in (("s", 0.5), ("b", -1))
    ]
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2, **attributes)
    graph = helper.make_graph([node], "g", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: bytes, **arrays: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    (y,) = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, arrays)
    return y


def apart(model: Any, folder: Path) -> bytes | None:
    onnx.save(model, path := folder / "m.onnx")
    return without_group_norm(OnnxFile(path))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_it_is_pytorchs(tmp_path: Path, axes: int, epsilon: float | None) -> None:
    """Also where the mean is large beside the deviation, and where a group is all one number."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6, *range(5, 5 + axes)), np.float32)
    x[1] += 100
    x[2, 3:] = 7
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    changed = apart(normalisation(axes, **attributes), tmp_path)
    assert changed is not None
    got = run(changed, x=x)
    s, b = (torch.from_numpy(np.linspace(low, 2, 6)) for low in (0.5, -1))
    wanted = torch.nn.functional.group_norm(torch.from_numpy(x).double(), 2, s, b, epsilon or 1e-5).numpy()
    np.testing.assert_allclose(got[[0, 2, 3]], wanted[[0, 2, 3]], atol=2e-6)  # measured: 7.1e-7
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-4)  # measured: 3.5e-5


def test_in_half_precision_it_works_in_float32(tmp_path: Path) -> None:
    """Squares above 256 overflow half."""
    x = (np.random.default_rng(0).standard_normal((2, 6, 5, 6)) * 1000).astype(np.float16)
    changed = apart(normalisation(2, kind=10), tmp_path)
    assert changed is not None
    got = run(changed, x=x)
    assert got.dtype == np.float16
    same = run(normalisation(2, kind=1).SerializeToString(), x=x.astype(np.float32))
    np.testing.assert_allclose(got, same, atol=4e-3)  # measured: 2.7e-3


def test_what_it_is_not_right_for_is_left(tmp_path: Path) -> None:
    """Before opset 21 scale and bias were by group; and another's operator of that name is another operator."""
    assert apart(normalisation(2, opset=18), tmp_path) is None
    model = normalisation(2)
    model.graph.node[0].domain = "another"
    changed = onnx.load_from_string(apart(model, tmp_path))
    assert [(node.domain, node.op_type) for node in changed.graph.node] == [("another", "GroupNormalization")]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_session_does_not_have_its_passes(exported: dict[Precision, Path], precision: Precision) -> None:
    model = open_model(exported[precision])
    assert model.onnx
    changed = without_group_norm(model.onnx)
    assert changed is not None
    graph = onnx.load(model.path).graph
    norms = sum(node.op_type == "GroupNormalization" for node in graph.node)
    assert norms
    said = onnx.ModelProto.FromString(changed)
    kinds = Counter((node.domain, node.op_type) for node in said.graph.node)
    assert (kinds["ddpm_deploy", "GroupNorm"], kinds["", "GroupNormalization"]) == (norms, 0)
    assert list(said.graph.initializer) == list(graph.initializer)
    assert backend._given(model, backend._CPU) == changed
    assert backend._given(model, ["another"]) == str(model.path)


def test_a_file_that_is_written_over_ends_nothing(exported: dict[Precision, Path], tmp_path: Path) -> None:
    """Were it mapped, a read of what was cut off would end the process."""
    path = tmp_path / "m.onnx"
    path.write_bytes(exported["fp32"].read_bytes())
    with Sampler.load(path) as sampler:
        images = sampler.sample(2, steps=3, seed=0)
        os.truncate(path, 100)
        np.testing.assert_array_equal(sampler.sample(2, steps=3, seed=0), images)
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(path) not in maps.read_text()
