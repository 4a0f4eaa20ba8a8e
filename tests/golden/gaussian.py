"""Makes ddpm_deploy/doctor/gaussian.onnx: python -m tests.golden.gaussian"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.doctor import gaussian
from ddpm_deploy.spec import SPEC_KEY, Tensor

FILE = Path(gaussian.__file__).with_name("gaussian.onnx")


def model() -> Any:
    """prediction = x·unsqueeze(temb @ P) + unsqueeze(temb @ Q), P and Q the interpolation of p and q."""
    spec = gaussian.SPEC
    table = spec.embedding.table(spec.timesteps).astype(np.float64)
    weights = {
        name: np.linalg.lstsq(table, values[:, None], rcond=None)[0].astype(np.float32)  # (D, 1)
        for name, values in zip("PQ", gaussian.coefficients(), strict=True)
    }
    nodes = [
        helper.make_node("MatMul", ["temb", "P"], ["p"], name="p"),
        helper.make_node("MatMul", ["temb", "Q"], ["q"], name="q"),
        helper.make_node("Unsqueeze", ["p", "axes"], ["slope"], name="slope"),
        helper.make_node("Unsqueeze", ["q", "axes"], ["shift"], name="shift"),
        helper.make_node("Mul", ["x", "slope"], ["scaled"], name="scaled"),
        helper.make_node("Add", ["scaled", "shift"], ["prediction"], name="prediction"),
    ]
    constants = {**weights, "axes": np.array([2, 3], np.int64)}
    graph = helper.make_graph(
        nodes,
        "gaussian",
        [_value(tensor) for tensor in spec.inputs],
        [_value(spec.output)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(made, {SPEC_KEY: spec.to_json()})
    return made


def _value(tensor: Tensor) -> Any:
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, ["batch", *tensor.shape])


if __name__ == "__main__":
    onnx.checker.check_model(model(), full_check=True)
    onnx.save(model(), FILE)
