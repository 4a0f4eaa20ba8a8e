"""Where ONNX Runtime puts the nodes of our graphs, by its own reports and its own optimised graphs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy.doctor import gaussian
from ddpm_deploy.errors import BackendError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import onnxruntime as backend
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork, require_products_on_gpu
from ddpm_deploy.words import Precision
from tests.host_device import HostDevice

onnx = pytest.importorskip("onnx")


def session(model: Path | bytes, optimised: Path | None = None) -> Any:
    """A session on the CPU that reports, and keeps what it makes of the graph before that is of one provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimised)
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def test_a_product_on_the_cpu_is_named(onnx_path: Path) -> None:
    """Everything is there in these sessions: the first convolution or matrix product is what is told."""
    with pytest.raises(BackendError) as caught:
        require_products_on_gpu(session(onnx_path), "model.onnx")
    convolution = next(
        node.name
        for node in onnx.load(onnx_path).graph.node
        if "Conv" in node.op_type or "Gemm" in node.op_type
    )
    (line,) = str(caught.value).splitlines()
    assert line.startswith("model.onnx: ONNX Runtime would run ")
    assert f" {convolution} on the CPU, not on the GPU: export the model again" in line
    with gaussian.onnx_model() as model, pytest.raises(BackendError, match="would run MatMul "):
        require_products_on_gpu(session(model.path), "gaussian.onnx")


def normalisation() -> bytes:
    """A graph that is a GroupNormalization, of a dynamic batch."""
    from onnx import TensorProto, helper

    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 8, 8]) for name in "xy"
    )
    ones = [helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0] * 4) for name in "sb"]
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)
    graph = helper.make_graph([node], "g", [given], [made], ones)
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    ).SerializeToString()
    return content


def test_what_a_normalisation_is_taken_apart_to_may_be_there() -> None:
    """On the CPU too it is, and its sizes are computed."""
    made = session(normalisation())
    parts = made.get_provider_graph_assignment_info()
    assert "Shape" in {node.op_type for part in parts for node in part.get_nodes()}
    require_products_on_gpu(made, "g.onnx")


# Kernels of ONNX Runtime's CUDA provider, for float and float16, of the operators that our graphs have after
# its optimisation (OperatorKernels.md of ONNX Runtime 1.24 to 1.31).
CUDA = {
    *("Add", "Cast", "Concat", "Conv", "Div", "FusedMatMul", "Gather", "Gemm", "MatMul", "Mul", "QuickGelu"),
    *("ReduceMean", "Reshape", "Resize", "Sigmoid", "Softmax", "Split", "Sqrt", "Sub", "Transpose"),
    "Unsqueeze",
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_sizes_can_go_to_the_cpu(
    exported: dict[Precision, Path], tmp_path: Path, precision: Precision
) -> None:
    """What is computed of sizes alone ONNX Runtime prefers on the CPU; what it has no kernel for it has to put there.

    The normalisations' sizes are all of it: none of it is of the size of an image.
    """
    session(exported[precision], optimised := tmp_path / "optimised.onnx")
    graph = onnx.load(optimised).graph
    constants, on_cpu, sizes = {"", *(each.name for each in graph.initializer)}, set(), Counter()
    for node in graph.node:
        inputs = set(node.input)
        if node.op_type == "Shape" or (inputs & on_cpu and inputs <= on_cpu | constants):
            on_cpu |= set(node.output)
            sizes[node.op_type] += 1
        else:
            assert node.op_type in CUDA, node
    norms = sum(node.op_type == "GroupNormalization" for node in onnx.load(exported[precision]).graph.node)
    assert norms
    assert sizes == {"Shape": 4 * norms, "Div": norms, "Concat": norms}


def test_on_a_device_powers_of_two_are_run_once_when_it_is_loaded(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run = OrtNetwork._run
    monkeypatch.setattr(
        backend.OrtNetwork, "_run", lambda self, batch: (ran.append(batch), run(self, batch))[1]
    )
    device: Any = HostDevice()
    network = OrtNetwork(open_model(onnx_path), device, max_batch=6, provider="CPUExecutionProvider")
    assert (list(network.buckets), ran) == ([1, 2, 4, 6], [6, 4, 2, 1])
    network.close()
    ran.clear()
    network = OrtNetwork(
        open_model(onnx_path), max_batch=6
    )  # on the CPU every size, and none before it is asked for
    assert (list(network.buckets), ran) == ([1, 2, 3, 4, 5, 6], [])
    network.close()
