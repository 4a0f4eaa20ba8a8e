"""Reduced precision: the oracle, what it keeps in float32, and the graph that comes of it."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.errors import ParityError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.onnx_file import OnnxFile
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.parity import Trajectory, judge, record, teacher_forced
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import GraphPrecision, Precision
from tests.models import tiny_spec

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from ddpm_deploy.export.graph import export_onnx  # noqa: E402
from ddpm_deploy.export.precision import (  # noqa: E402
    TYPES,
    Oracle,
    calibrate,
    reduce,
    standing_islands,
    unsafe,
)
from ddpm_deploy.train.checkpoint import Checkpoint, load_network  # noqa: E402
from ddpm_deploy.train.network import TorchNetwork  # noqa: E402
from ddpm_deploy.train.unet import Conv2d, UNet  # noqa: E402

FLOAT, FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


@pytest.fixture
def model(checkpoint_path: Path) -> tuple[UNet, ModelSpec]:
    """The network of the shared checkpoint, to spoil; with fewer timesteps, as calibration visits all of them."""
    network, spec = load_network(open_model(checkpoint_path))
    return network, msgspec.structs.replace(spec, timesteps=60)


def recorded(network: UNet, spec: ModelSpec, steps: int = 20) -> Trajectory:
    return record(TorchNetwork(network, spec, max_batch=2), count=2, steps=steps)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_oracle_rounds_as_torchs_own_half_does(
    model: tuple[UNet, ModelSpec], precision: Precision
) -> None:
    """Half precision done natively on the CPU is off from float32 as the oracle is: by as much, and alike."""
    network, spec = model
    trajectory = recorded(network, spec)
    errors = {}
    for name, one in (
        ("oracle", Oracle(network, spec, precision, UNet.float32_islands, max_batch=2)),
        ("native", TorchNetwork(reduce(network, precision, UNet.float32_islands), spec, max_batch=2)),
    ):
        steps = teacher_forced(trajectory, one)
        errors[name] = np.array([step.relative_rms for step in steps])
    assert (errors["native"] > torch.finfo(TYPES[precision]).eps / 20).all()
    np.testing.assert_allclose(errors["oracle"], errors["native"], rtol=0.5)
    assert errors["oracle"].mean() == pytest.approx(errors["native"].mean(), rel=0.1)


def test_without_reduction_the_oracle_is_the_network(model: tuple[UNet, ModelSpec]) -> None:
    network, spec = model
    everything = [name for name, module in network.named_modules() if isinstance(module, Conv2d)]
    oracle = Oracle(network, spec, "fp16", everything, max_batch=2)
    assert all(step.rms == 0 for step in teacher_forced(recorded(network, spec), oracle))
    assert oracle.ranges() == {}


def test_a_network_that_fits_keeps_only_the_standing_islands(model: tuple[UNet, ModelSpec]) -> None:
    network, spec = model
    found = calibrate(network, recorded(network, spec), "fp16")
    assert found.islands == UNet.float32_islands
    assert 0 < max(seen.largest for seen in found.ranges.values()) < 1000
    assert len(found.steps) == 20


def spoil_a_stream(network: UNet) -> None:
    """A residual stream of 30,000: from the block that makes it to the norm that undoes it."""
    network.middle[0].block.conv2.bias[3] = 3e4


def spoil_a_norm(network: UNet) -> None:
    """A normalisation that gives 80,000, in a block whose input is small."""
    network.middle[1].block.norm1.weight[2] = 3e4
    network.middle[1].block.norm1.bias[2] = 2e4


def spoil_an_attention(network: UNet) -> None:
    """The same before the attention of a block."""
    network.middle[0].attention.norm.bias[2] = 8e4


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (spoil_a_stream, "middle.0.block.conv2"),
        (spoil_a_norm, "middle.1.block.conv1"),
        (spoil_an_attention, "middle.0.attention.qkv"),
    ],
)
def test_what_overflows_stays_in_float32(
    model: tuple[UNet, ModelSpec], spoil: Callable[[UNet], None], kept: str
) -> None:
    network, spec = model
    with torch.no_grad():
        spoil(network)
    trajectory = recorded(network, spec)
    found = calibrate(network, trajectory, "fp16")
    assert "past a quarter of the type's 6.55e+04" in found.islands[kept]
    assert unsafe(found.ranges, network, torch.float16) == {}  # nothing that is left in half overflows
    assert len(found.islands) < found.convolutions / 2
    # bfloat16 has the range of float32.
    assert calibrate(network, trajectory, "bf16").islands == UNet.float32_islands


def test_the_oracle_gives_only_what_the_type_can_hold(model: tuple[UNet, ModelSpec]) -> None:
    """Weights, biases, and what each module hands on."""
    network, spec = model
    oracle = Oracle(network, spec, "fp16", UNet.float32_islands, max_batch=2)
    assert oracle._network is not None
    half = {name for name, p in oracle._network.named_parameters() if p.dtype == torch.float16}
    assert {name.split(".")[-1] for name in half} == {"weight", "bias"}
    for name, parameter in oracle._network.named_parameters():
        if name in half:
            assert torch.equal(parameter, network.get_parameter(name).half())
    seen = set()
    for module in oracle._network.modules():
        module.register_forward_hook(
            lambda module, inputs, output: seen.add((type(module).__name__, output.dtype))
        )
    teacher_forced(recorded(network, spec, steps=2), oracle)
    assert {("ResBlock", torch.float16), ("Attention", torch.float16), ("Linear", torch.float32)} <= seen
    floats = {kind for kind, dtype in seen if dtype == torch.float32}
    assert floats <= {"Conv2d", "Linear", "GroupNorm", "Identity", "UNet"}


def test_what_is_too_small_for_the_type_stays_in_float32(model: tuple[UNet, ModelSpec]) -> None:
    """Weights of 1e-7 with their effect restored by the norm behind them."""
    network, spec = model
    with torch.no_grad():
        network.down[0].block.conv1.weight.mul_(1e-6)
        network.down[0].block.conv1.bias.mul_(1e-6)
    found = calibrate(network, recorded(network, spec), "fp16")
    assert "by rounding: its values are too small" in found.islands["down.0.block.conv1"]


def test_a_network_that_no_choice_makes_fit_is_refused(model: tuple[UNet, ModelSpec]) -> None:
    """The last convolution cancels all but a thousandth of what comes in."""
    network, spec = model
    with torch.no_grad():
        network.up[-1].block.conv2.bias.add_(1e3)
        network.norm_out.weight.mul_(1e3)
    with pytest.raises(ParityError, match="hardware that rounds to fp16 would be off by"):
        calibrate(network, recorded(network, spec), "fp16")


def nodes(graph: Any, kind: str) -> Iterator[Any]:
    return (node for node in graph.node if node.op_type == kind)


def types(model: Any) -> dict[str, int]:
    """The element type of every tensor of a graph."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {t.name: t.data_type for t in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


@pytest.mark.parametrize(
    ("precision", "narrow", "opset"), [("fp16", FLOAT16, 21), ("bf16", BFLOAT16, 22), ("fp32", FLOAT, 21)]
)
def test_the_graph_is_what_it_says(
    exported: dict[Precision, Path], precision: Precision, narrow: int, opset: int
) -> None:
    graph = onnx.load(exported[precision])
    kinds = types(graph)
    assert graph.opset_import[0].version == opset
    assert [kinds[name] for name in ("x", "temb", "prediction")] == [FLOAT] * 3
    convolutions = [[kinds[name] for name in node.input] for node in nodes(graph.graph, "Conv")]
    assert sum(set(c) == {narrow} for c in convolutions) == (33 if precision == "fp32" else 31)
    assert all(len(set(c)) == 1 for c in convolutions)
    assert {kinds[name] for node in nodes(graph.graph, "MatMul") for name in node.input} == {narrow}
    for kind in ("GroupNormalization", "Softmax", "Gemm"):
        assert {kinds[name] for node in nodes(graph.graph, kind) for name in node.input} == {FLOAT}


def test_the_file_agrees_with_pytorch_in_onnx_runtime(
    model: tuple[UNet, ModelSpec], exported: dict[Precision, Path]
) -> None:
    network, spec = model
    reference = record(TorchNetwork(network, spec, max_batch=2), count=2)
    candidate = OrtNetwork(open_model(exported["fp16"]))
    assert candidate.spec.precision == "fp16"
    assert candidate.spec.provenance == spec.provenance
    result = judge(reference, candidate)
    assert result.within
    assert result.worst.relative_rms > 1e-5  # it is not float32


# --- networks of other people ------------------------------------------------------------------------


class Foreign(torch.nn.Module):  # type: ignore[misc]
    """A network of plain modules that says nothing of precision, with an attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 16, 3, padding=1, padding_mode="circular")
        self.temb = torch.nn.Linear(8, 16)
        self.norm = torch.nn.GroupNorm(4, 16)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.SiLU(inplace=True), torch.nn.Conv2d(16, 48, 1)
        )
        self.last = torch.nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Any, temb: Any) -> Any:
        h = self.first(x) + self.temb(temb)[:, :, None, None]
        q, k, v = self.body(self.norm(h)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k / 4, dim=2)
        return self.last(h + (v @ weights.transpose(1, 2)).reshape(h.shape))


class Outspoken(Foreign):
    """The same, with islands: a convolution by its name, and those of a part by its name."""

    float32_islands: ClassVar = {"first": "reads x", "body": "may overflow"}


def foreign(kind: type[Foreign] = Foreign) -> tuple[Foreign, ModelSpec]:
    torch.manual_seed(0)
    return kind().eval(), tiny_spec(network=None, timesteps=60)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_any_network_is_exported(precision: GraphPrecision, tmp_path: Path) -> None:
    """Its convolutions work in half, and what is around them in float32."""
    network, spec = foreign()
    assert export_onnx(network, spec, tmp_path / "m.onnx", precision=precision).comparison.within
    model = onnx.load(tmp_path / "m.onnx")
    kinds, wide = types(model), {FLOAT}
    narrow = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}[precision]
    assert {kinds[name] for node in nodes(model.graph, "Conv") for name in node.input} == {narrow}
    assert {node.name for node in nodes(model.graph, "Conv")} == {"first", "body.0", "body.2", "last"}
    for kind in ("GroupNormalization", "Softmax", "Gemm", "MatMul"):
        assert {kinds[name] for node in nodes(model.graph, kind) for name in node.input} == wide
    meant = OnnxFile(tmp_path / "m.onnx").meant_float32
    assert meant is None if precision == "fp32" else len(meant or ()) == 3


def test_a_network_says_its_own_islands() -> None:
    network, spec = foreign(Outspoken)
    islands = {"first": "reads x", "body.0": "may overflow", "body.2": "may overflow"}
    assert standing_islands(network) == islands
    assert standing_islands(foreign()[0]) == {}
    reduced = reduce(network, "fp16", islands)
    half = {name for name, p in reduced.named_parameters() if p.dtype == torch.float16}
    assert half == {"last.weight", "last.bias"}
    assert calibrate(network, recorded(network, spec), "fp16").islands == islands


def test_what_overflows_in_any_network_stays_in_float32() -> None:
    """The convolution that makes it, and the one that reads it."""
    network, spec = foreign()
    with torch.no_grad():
        network.body[0].bias[3] = 3e4
    found = calibrate(network, recorded(network, spec), "fp16")
    assert found.islands.keys() == {"body.0", "body.2"}


def test_a_network_of_which_nothing_fits_is_refused() -> None:
    network, spec = foreign()
    with torch.no_grad():
        for convolution in (network.first, network.body[0], network.body[2], network.last):
            convolution.bias.fill_(6e4)
    wanted = r"nothing of this network fits fp16: all .*; export it in fp32, or in tf32 or bf16 for an engine"
    with pytest.raises(ParityError, match=wanted):
        calibrate(network, recorded(network, spec), "fp16")


def test_a_checkpoint_of_which_nothing_fits_is_refused_before_anything_is_written(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    whole = Checkpoint.load(open_model(checkpoint_path))
    average = {name: tensor.clone() for name, tensor in whole.ema.items()}
    for name, tensor in average.items():
        if tensor.ndim == 4 and "conv_" not in name:
            average[f"{name.removesuffix('weight')}bias"][0] = 2e4  # past a quarter of what fp16 holds
    spec = msgspec.structs.replace(whole.spec, timesteps=60)
    dataclasses.replace(whole, spec=spec, ema=average).save(tmp_path / "m.pt")
    result = CliRunner().invoke(ddpm_deploy, ["export", str(tmp_path / "m.pt"), "--fp16"])
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.splitlines()[-1] == (
        "Error: nothing of this network fits fp16: all its convolutions must stay in float32; export it in fp32, or in "
        "tf32 or bf16 for an engine (--precision)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_a_network_without_convolutions_is_refused() -> None:
    class Flat(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, temb: Any) -> Any:
            return x * temb.mean()

    network, spec = Flat().eval(), tiny_spec(network=None, timesteps=60)
    with pytest.raises(ParityError, match="fits fp16: it has no convolutions; export it in fp32"):
        calibrate(network, recorded(network, spec), "fp16")
