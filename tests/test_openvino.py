"""OpenVINO as a backend: the chain that ONNX Runtime runs, its precisions, and what its library is kept from."""

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy import Sampler
from ddpm_deploy.dependencies import require_openvino
from ddpm_deploy.doctor import backends as doctor
from ddpm_deploy.doctor import gaussian
from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, SettingError
from ddpm_deploy.gpu import Driver
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.backends.openvino import OpenvinoNetwork, batch_sizes, cuts
from ddpm_deploy.runtime.network import ask, default_max_batch
from ddpm_deploy.runtime.parity import judge
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Precision, RunPrecision
from tests.models import tiny_spec
from tests.test_cli import call, refused

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("openvino") is None:  # looked for, as its import would start its telemetry
    pytest.skip("openvino is not installed", allow_module_level=True)


def has_bf16() -> bool:
    return "BF16" in require_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def questions(spec: ModelSpec, batch: int) -> tuple[Any, Any, Any]:
    """Noise, embeddings of timesteps, and labels."""
    rng = np.random.default_rng(0)
    temb = spec.embedding.table(spec.timesteps)[rng.integers(spec.timesteps, size=batch)]
    labels = rng.integers(max(1, spec.num_labels), size=batch)
    return rng.standard_normal((batch, *spec.image_shape), np.float32), temb, labels


# --- the same chain -----------------------------------------------------------------------------------------


def test_it_computes_what_the_checkpoint_does(onnx_path: Path) -> None:
    network = OpenvinoNetwork(open_model(onnx_path))
    comparison = judge(load_proof(proof_path(onnx_path)), network)
    assert comparison.within
    assert comparison.tolerance.psnr == 110
    assert network.spec.precision == "fp32"


def test_a_sampler_on_it(onnx_path: Path) -> None:
    """Batches that are cut, a last part, another solver, a stream, a snapshot that goes on elsewhere."""
    with (
        Sampler.load(onnx_path, backend="openvino", max_batch=7, threads=1) as sampler,
        Sampler.load(onnx_path) as other,
    ):
        for settings in ({}, {"solver": "dpmpp-2m"}):
            wanted = other.sample(10, steps=7, seed=3, **settings)  # type: ignore[arg-type]
            got = sampler.sample(10, steps=7, seed=3, **settings)  # type: ignore[arg-type]
            np.testing.assert_allclose(got, wanted, atol=2e-5)
        stream = sampler.stream(3, steps=7, seed=3)
        for _ in range(3):
            next(stream)
        snapshot = sampler.snapshot()
        stream.close()
        np.testing.assert_allclose(other.resume(snapshot), other.sample(3, steps=7, seed=3), atol=2e-5)
        assert sampler.spec.same_bits is None  # which is said of ONNX Runtime


def test_bits_do_not_depend_on_the_batch_or_the_threads(onnx_path: Path) -> None:
    model = open_model(onnx_path)
    x, temb, _ = questions(model.spec, 21)
    answers = []
    for threads in (1, 2):
        network = OpenvinoNetwork(model, threads=threads, max_batch=21)
        answers.append(np.concatenate([ask(network, x[[row]], temb[[row]]) for row in range(21)]))
        for batch in (1, 2, 3, 4, 5, 16, 21):
            np.testing.assert_array_equal(ask(network, x[-batch:], temb[-batch:]), answers[0][-batch:])
        network.close()
    np.testing.assert_array_equal(*answers)


def labelled(path: Path) -> ModelFile:
    """A graph with labels: ε = x + y + the mean of temb."""
    onnx = pytest.importorskip("onnx")
    spec = msgspec.structs.replace(tiny_spec(network=None), num_classes=3, null_class=True)
    node, value, number = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    shape = onnx.numpy_helper.from_array(np.array([-1, 1, 1, 1]), "shape")
    last = onnx.numpy_helper.from_array(np.array([1]), "last")
    nodes = [
        node("Cast", ["y"], ["label"], to=number),
        node("ReduceMean", ["temb", "last"], ["time"], keepdims=0),
        node("Add", ["label", "time"], ["both"]),
        node("Reshape", ["both", "shape"], ["shift"]),
        node("Add", ["x", "shift"], ["prediction"]),
    ]
    inputs = [
        value("x", number, ["B", 1, 8, 8]),
        value("temb", number, ["B", 8]),
        value("y", onnx.TensorProto.INT64, ["B"]),
    ]
    outputs = [value("prediction", number, ["B", 1, 8, 8])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, [shape, last])
    made = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(made, path)
    return open_model(path, spec)


def test_labels_and_guidance(tmp_path: Path) -> None:
    model = labelled(tmp_path / "m.onnx")
    x, temb, y = questions(model.spec, 6)
    wanted = x + (y + temb.mean(axis=1))[:, None, None, None]
    np.testing.assert_allclose(ask(OpenvinoNetwork(model, max_batch=6), x, temb, y), wanted, atol=1e-6)
    ours, theirs = Sampler(OpenvinoNetwork(model, max_batch=6)), Sampler(OrtNetwork(model, max_batch=6))
    for settings in ({"labels": [2, 0, 1]}, {"guidance": 2.0}):
        wanted = theirs.sample(3, steps=5, seed=0, **settings)  # type: ignore[arg-type]
        np.testing.assert_allclose(ours.sample(3, steps=5, seed=0, **settings), wanted, atol=1e-5)  # type: ignore[arg-type]


# --- few compilations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "max_batch", "sizes"),
    [
        ((1, 8, 8), None, [1, 4, 16]),
        ((1, 8, 8), 1000, [1, 4, 16]),
        ((1, 8, 8), 5, [1, 4]),
        ((1, 8, 8), 3, [1]),
        ((1, 28, 28), None, [1, 4]),
        ((3, 32, 32), None, [1, 4]),
        ((3, 64, 64), None, [1]),
        ((3, 256, 256), 8, [1]),
    ],
)
def test_the_sizes_that_are_compiled(
    shape: tuple[int, int, int], max_batch: int | None, sizes: list[int]
) -> None:
    spec = tiny_spec(shape)
    assert batch_sizes(spec, max_batch or default_max_batch(spec)) == sizes


@pytest.mark.parametrize("sizes", [[1], [1, 4], [1, 4, 16]])
def test_every_row_is_in_one_part(sizes: list[int]) -> None:
    for batch in range(1, 70):
        places = cuts(batch, sizes)
        parts = np.diff(places).tolist()
        assert (places[0], places[-1], parts) == (0, batch, sorted(parts, reverse=True))
        assert set(parts) <= set(sizes)
        assert all(parts.count(small) < large // small for small, large in pairwise(sizes))


def test_a_size_is_compiled_when_it_is_needed_and_all_is_freed(onnx_path: Path) -> None:
    model = open_model(onnx_path)
    network = OpenvinoNetwork(model)
    assert not network._compiled
    x, temb, _ = questions(model.spec, 9)
    for _ in range(2):
        ask(network, x, temb)  # 4 + 4 + 1
    assert list(network._compiled) == [4, 1]
    held = [weakref.ref(each) for each in (*network._compiled.values(), *network._requests.values())]
    assert len(held) == 2 + 3
    network.close()
    network.close()
    gc.collect()
    assert [each() for each in held] == [None] * 5
    with pytest.raises(BackendError, match="is closed: load it again"):
        ask(network, x, temb)


# --- precision ----------------------------------------------------------------------------------------------


def test_bfloat16_is_within_its_tolerance_and_is_bfloat16(onnx_path: Path) -> None:
    if not has_bf16():
        pytest.skip("this processor has no bfloat16")
    with Sampler.load(onnx_path, backend="openvino", precision="bf16") as sampler:
        assert sampler.spec.precision == "bf16"
        comparison = judge(load_proof(proof_path(onnx_path)), sampler.network)
    assert comparison.within
    assert comparison.worst.relative_rms > 1e-4  # of float32 it is 1e-6
    wanted = call("verify", onnx_path, "--backend", "openvino", "--precision", "bf16", "--json")
    assert wanted.exit_code == 0, wanted.output


def test_float32_is_float32_where_openvino_would_take_bfloat16(onnx_path: Path) -> None:
    model = open_model(onnx_path)
    network = OpenvinoNetwork(model, max_batch=1)
    x, temb, _ = questions(model.spec, 1)
    np.testing.assert_allclose(ask(network, x, temb), ask(OrtNetwork(model), x, temb), atol=2e-5)
    assert network._compiled[1].get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_a_processor_without_bfloat16(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = require_openvino()
    monkeypatch.setattr(openvino.Core, "get_property", lambda core, device, name: ["FP32", "INT8"])
    with pytest.raises(
        SettingError, match="has no bfloat16 arithmetic, .* run .*model.onnx with precision fp32"
    ):
        Sampler.load(onnx_path, backend="openvino", precision="bf16")
    Sampler.load(onnx_path, backend="openvino").close()


def test_a_precision_that_openvino_does_not_take_is_told(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes in what it has, and says so only where it is asked."""
    openvino = require_openvino()
    monkeypatch.setattr(
        openvino.CompiledModel, "get_property", lambda compiled, name: openvino.Type.f16, raising=False
    )
    with (
        Sampler.load(onnx_path, backend="openvino") as sampler,
        pytest.raises(BackendError, match="computes in f16 here, and not in f32"),
    ):
        sampler.sample(1, steps=1)


@pytest.mark.parametrize(("precision", "runs"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_a_file_in_reduced_precision(
    exported: dict[Precision, Path], precision: Precision, runs: RunPrecision
) -> None:
    """Its weights are as they were rounded; it computes in what was asked for."""
    if runs == "bf16" and not has_bf16():
        pytest.skip("this processor has no bfloat16")
    model, original = open_model(exported[precision]), open_model(exported["fp32"])
    network = OpenvinoNetwork(model, precision=runs, max_batch=2)
    assert network.spec.precision == ("fp16" if (precision, runs) == ("fp16", "fp32") else "bf16")
    x, temb, _ = questions(model.spec, 2)
    got, wanted = ask(network, x, temb), ask(OrtNetwork(original), x, temb)
    error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-6 < error < {"fp16": 5e-3, "bf16": 4e-2}[network.spec.precision]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "onnxruntime", "tensorrt"])
def test_a_backend_that_takes_no_precision(onnx_path: Path, backend: Any) -> None:
    with pytest.raises(
        SettingError, match="runs .* in the precision of its file, .* choose the backend openvino"
    ):
        Sampler.load(onnx_path, backend=backend, precision="fp32")


def test_what_does_not_fit_is_refused_in_a_line(onnx_path: Path, checkpoint_path: Path) -> None:
    for arguments, code, problem in (
        ((onnx_path, "--backend", "openvino", "--device", "cuda"), 1, "on the CPU alone"),
        ((onnx_path, "--precision", "bf16"), 1, "cannot be told another"),
        ((onnx_path, "--backend", "openvino", "--precision", "int8"), 2, "'fp32', 'bf16'"),
        ((checkpoint_path, "--backend", "openvino"), 1, "is not an .onnx file"),
        ((checkpoint_path, "--precision", "bf16"), 1, "torch runs"),
    ):
        refused(call("run", *arguments, "--steps", 2), code, problem)
    with pytest.raises(SettingError, match="precision 'fp16' is not one to load a model in"):
        Sampler.load(onnx_path, backend="openvino", precision="fp16")  # type: ignore[arg-type]


def test_it_is_not_installed(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"^openvino is not installed: pip install .*openvino"):
        Sampler.load(onnx_path, backend="openvino")
    finding = doctor._on_openvino(open_model(onnx_path), {}, Driver())
    assert (finding.state, finding.mend.startswith("pip install")) == ("absent", True)


def broken(path: Path, kind: str) -> None:
    """A file of which its framing alone is right."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    if kind == "an unknown operator":
        model.graph.node[0].op_type = "Frobnicate"
    if kind == "weights that are missing":
        del model.graph.initializer[:]
    if kind == "a fixed batch":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2
    if kind == "another output":
        for node in model.graph.node:
            node.output[:] = ["noise" if name == "prediction" else name for name in node.output]
        model.graph.output[0].name = "noise"
    if kind == "weights in another file":
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, "../weights.bin")
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("an unknown operator", "OpenVINO cannot load it: it has no operator Frobnicate"),
        ("weights that are missing", "OpenVINO cannot load it: Input tensor isn't found"),
        ("a fixed batch", "has a fixed batch dimension"),
        ("another output", "does not fit its ModelSpec: it has x float32 .* → noise float32"),
        ("weights in another file", "OpenVINO cannot load it"),
    ],
)
def test_a_file_that_is_broken(tmp_path: Path, onnx_path: Path, kind: str, problem: str) -> None:
    path, spec = tmp_path / "m.onnx", open_model(onnx_path).spec
    path.write_bytes(onnx_path.read_bytes())
    (tmp_path.parent / "weights.bin").write_bytes(bytes(100_000))
    broken(path, kind)
    with pytest.raises(ArtefactError, match=problem) as caught:
        load_network(open_model(path, spec), LoadSettings(), backend="openvino")
    assert "\n" not in str(caught.value)


# --- its library --------------------------------------------------------------------------------------------

SILENT = """
import sys
for name in ("torch", "onnx", "onnxruntime"):
    sys.modules[name] = None  # as where it is not installed
from ddpm_deploy.cli.run import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry  # and whoever wants it has it
"""
TELEMETRY = """
import sys
if "ddpm_deploy.runtime.backends.openvino" in sys.modules and "openvino.frontend" not in sys.modules:
    raise SystemExit("telemetry was imported by openvino")
print("telemetry was imported")
"""


def test_it_needs_its_extra_alone_and_tells_nobody(tmp_path: Path, onnx_path: Path) -> None:
    """Its own telemetry is a package that tells of itself here; nothing comes into the home folder."""
    for folder in ("site", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "openvino_telemetry.py").write_text(TELEMETRY)
    command = [
        sys.executable,
        "-c",
        SILENT,
        onnx_path,
        "--backend",
        "openvino",
        "--steps",
        "3",
        "-o",
        "x.png",
    ]
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": paths, "HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("telemetry was imported") == 1
    assert "16 images, 3 steps" in ran.stdout
    assert list((tmp_path / "home").iterdir()) == []


FORKED = """
import os, signal, sys
from ddpm_deploy import Sampler
from ddpm_deploy.errors import OwnershipError
sampler = Sampler.load(sys.argv[1], backend="openvino", threads=2)
wanted = sampler.sample(5, steps=2, seed=0)
child = os.fork()
if not child:
    if sys.argv[2] == "sample":
        try:
            sampler.sample(1, steps=2)
        except OwnershipError as error:
            print(error)
    if sys.argv[2] == "let go":
        del sampler
    sys.exit(7)  # as an interpreter ends
signal.alarm(30)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert (sampler.sample(5, steps=2, seed=0) == wanted).all()  # the parent goes on
"""


@pytest.mark.parametrize("use", ["sample", "let go", "nothing"])
def test_a_fork_of_a_process_ends_whatever_it_does(onnx_path: Path, use: str) -> None:
    command = [sys.executable, "-c", FORKED, str(onnx_path), use]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    assert ("was forked after the model was loaded" in result.stdout) == (use == "sample")


def test_the_doctor_runs_its_chain_on_it() -> None:
    with gaussian.onnx_model() as model:
        finding = doctor._on_openvino(model, {"openvino": "1.2.3"}, Driver())
    assert finding.state == "works", finding.says
    assert "64 images by 12 steps on cpu" in finding.says
