"""Makes ddpm_deploy/doctor/gaussian.onnx and gaussian.ncnn: python -m tests.golden.gaussian"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.doctor import gaussian
from ddpm_deploy.export.ncnn import write_ncnn
from ddpm_deploy.spec import SPEC_KEY, Tensor

FILE = Path(gaussian.__file__).with_name("gaussian.onnx")

EPSILON = 1e-2  # that counts: a backend that has another gives other numbers


def model() -> Any:
    """prediction = image·unsqueeze(temb @ P) + unsqueeze(temb @ Q), P and Q the interpolation of p and q.

    image is x, normalised and brought back: with μ and v the mean and variance of each channel, ε, s and b those of
    the normalisation, ((x - μ)/√(v + ε)·s + b - b)·√(v + ε)/s + μ = x.
    """
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
        helper.make_node(
            "GroupNormalization", ["x", "s", "b"], ["norm"], name="norm", num_groups=3, epsilon=EPSILON
        ),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean"),
        helper.make_node("Sub", ["x", "mean"], ["centred"], name="centred"),
        helper.make_node("Mul", ["centred", "centred"], ["squares"], name="squares"),
        helper.make_node("ReduceMean", ["squares", "axes"], ["variance"], name="variance"),
        helper.make_node("Add", ["variance", "epsilon"], ["above"], name="above"),
        helper.make_node("Sqrt", ["above"], ["std"], name="std"),
        helper.make_node("Div", ["std", "s_image"], ["back"], name="back"),
        helper.make_node("Sub", ["norm", "b_image"], ["unbiased"], name="unbiased"),
        helper.make_node("Mul", ["unbiased", "back"], ["restored"], name="restored"),
        helper.make_node("Add", ["restored", "mean"], ["image"], name="image"),
        helper.make_node("Mul", ["image", "slope"], ["scaled"], name="scaled"),
        helper.make_node("Add", ["scaled", "shift"], ["prediction"], name="prediction"),
    ]
    scale, bias = np.array([[0.5, 1, 2], [-1, 0.5, 1]], np.float32)
    constants = {
        **weights,
        "axes": np.array([2, 3], np.int64),
        "epsilon": np.array(EPSILON, np.float32),
        "s": scale,
        "b": bias,
        "s_image": scale[:, None, None],
        "b_image": bias[:, None, None],
    }
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
    write_ncnn(onnx.load(FILE), gaussian.SPEC, FILE.with_suffix(".ncnn"))
