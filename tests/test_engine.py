"""Engines: really built, by TensorRT-RTX, which needs no GPU for it; and every way in which one cannot be had."""

import hashlib
import json
import logging
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.cli.bodies.engine import EngineOptions, engine_settings
from ddpm_deploy.cli.export import main
from ddpm_deploy.engine import build
from ddpm_deploy.engine.bindings import as_bytes, log_of
from ddpm_deploy.engine.build import (
    EngineSettings,
    _configure,
    _set_name,
    build_engine,
    default_engine_batch,
    engine_spec,
)
from ddpm_deploy.engine.layers import Layers, inspected, require_precision
from ddpm_deploy.engine.load import _options_of, require_runs_here, runs_on, source_of
from ddpm_deploy.errors import ArtefactError, OutputError, ParityError, SettingError, SpecError
from ddpm_deploy.gpu import Gpu
from ddpm_deploy.model_file import open_model
from ddpm_deploy.onnx_file import OnnxFile, seal
from ddpm_deploy.plan import PlanHead, digest_path, read_plan_head, trusted
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.spec import ISLANDS_KEY, SPEC_KEY, EngineSpec, ModelSpec
from ddpm_deploy.words import GraphPrecision, Precision
from tests.models import tiny_spec
from tests.test_cli import call, refused

trt = pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

RTX = EngineSettings(flavour="tensorrt-rtx")
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
MEANT = ["temb1", "temb2", "temb_projections", "conv_in", "conv_out"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is what happens without one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def fp16(exported: dict[Precision, Path], tmp_path: Path) -> Path:
    """The tiny network in fp16 with its proof, in a folder of its own."""
    shutil.copy(proof_path(exported["fp16"]), tmp_path / "m.proof.npz")
    return Path(shutil.copy(exported["fp16"], tmp_path / "m.onnx"))


@pytest.fixture(scope="module")
def engine(exported: dict[Precision, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good engine, not to be changed."""
    path = tmp_path_factory.mktemp("engine") / "m.rtx.plan"
    build_engine(open_model(exported["fp16"]), path, RTX)
    return path


# --- building --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [("fp32", ()), ("fp16", ()), ("fp16", ("8.6",)), ("bf16", ("8.9", "12.0")), ("fp32", ("8.0", "12.1"))],
)
def test_an_engine_is_what_it_says(
    exported: dict[Precision, Path], tmp_path: Path, precision: Precision, capabilities: tuple[str, ...]
) -> None:
    path = tmp_path / "e.plan"
    settings = EngineSettings(flavour="tensorrt-rtx", capabilities=capabilities, batches=((1, 8, 64),))
    layers = build_engine(open_model(exported[precision]), path, settings)

    wide = MEANT if precision != "fp32" else list(layers.products)
    assert layers.in_float32 == wide
    narrow = {name for name, kind in layers.products.items() if kind == TYPES[precision]}
    assert narrow == set(layers.products) - set(wide if precision != "fp32" else ())
    assert len(layers.products) == 3 + 33 + 8  # of the timestep, convolutions, two in each of four attentions
    assert Counter(layers.norms.values()) == {"FLOAT": 21 + 4}  # group norms, softmaxes

    spec, source = open_model(path).spec, open_model(exported[precision]).spec
    assert spec == msgspec.structs.replace(source, engine=spec.engine, same_bits=None)
    assert spec.engine == EngineSpec(
        flavour="tensorrt-rtx", version=trt.__version__, capabilities=capabilities, batches=((1, 8, 64),)
    )
    assert path.read_bytes().count(spec.to_json().encode()) == 1
    assert read_plan_head(path) == PlanHead("tensorrt-rtx", trt.__version__)
    assert digest_path(path).read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  e.plan\n"
    trusted(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.plan", "e.plan.sha256"]


def traced(folder: Path, spec: ModelSpec, precision: GraphPrecision, network: Any = None) -> Path:
    """A network with random weights as ddpm-export writes it, without the chains that it is calibrated on."""
    from ddpm_deploy.export.graph import describe, trace
    from ddpm_deploy.export.precision import reduce, standing_islands
    from ddpm_deploy.train.checkpoint import new_network

    network = network or new_network(spec).eval()
    spec, path = msgspec.structs.replace(spec, precision=precision), folder / f"{precision}.onnx"
    model = trace(reduce(network, precision, standing_islands(network)), spec)
    onnx.save(model, path)
    describe(path, spec)
    return path


@pytest.mark.parametrize(
    ("preset", "precision", "capabilities"),
    [
        ("digits", "fp32", ()),
        ("digits", "fp16", ("8.6", "8.9", "12.0")),
        ("cifar10", "fp32", ("8.9",)),
        ("cifar10", "fp16", ()),
        ("256", "fp16", ("8.6",)),
    ],
)
def test_the_papers_networks_build(
    tmp_path: Path, preset: str, precision: GraphPrecision, capabilities: tuple[str, ...]
) -> None:
    from ddpm_deploy.train.checkpoint import new_network
    from ddpm_deploy.train.settings import PRESETS
    from ddpm_deploy.train.unet import Attention, Conv2d, GroupNorm

    known = PRESETS[preset]
    spec = known.spec(preset, known.channels or 3, known.image_size)
    modules = Counter(type(module) for module in new_network(spec).modules())
    source, path = traced(tmp_path, spec, precision), tmp_path / "e.plan"
    layers = build_engine(
        open_model(source), path, EngineSettings(flavour="tensorrt-rtx", capabilities=capabilities)
    )
    full = 3 + 2 if precision == "fp16" else 3 + modules[Conv2d] + 2 * modules[Attention]
    assert list(layers.products.values()).count("FLOAT") == full
    assert len(layers.products) == 3 + modules[Conv2d] + 2 * modules[Attention]
    assert Counter(layers.norms.values()) == {"FLOAT": modules[GroupNorm] + modules[Attention]}
    engine = open_model(path).spec.engine
    assert engine
    most = 4 if preset == "256" else 64
    assert (engine.batches, engine.capabilities) == (((1, most, most),), capabilities)


def test_labels_and_learned_variances_build(tmp_path: Path) -> None:
    """An int64 input more, and twice the channels."""
    spec = msgspec.structs.replace(tiny_spec(), num_classes=3, null_class=True, variance="learned_range")
    build_engine(open_model(traced(tmp_path, spec, "fp16")), tmp_path / "e.plan", RTX)
    assert open_model(tmp_path / "e.plan").spec.prediction_shape == (2, 8, 8)


def test_any_network_builds(tmp_path: Path) -> None:
    """One that says nothing of precision: its convolutions are in half, its attention and its timestep are not."""
    from tests.test_precision import foreign

    network, spec = foreign()
    layers = build_engine(open_model(traced(tmp_path, spec, "fp16", network)), tmp_path / "e.plan", RTX)
    assert {name for name, kind in layers.products.items() if kind == "HALF"} == {
        "first",
        "body.0",
        "body.2",
        "last",
    }
    assert Counter(layers.products.values()) == {"HALF": 4, "FLOAT": 3}
    assert Counter(layers.norms.values()) == {"FLOAT": 2}


def test_the_head_holds_the_capabilities(
    exported: dict[Precision, Path], tmp_path: Path, engine: Path
) -> None:
    """The engine's own record, which we do not write: a bit for each capability at byte 32."""
    path = tmp_path / "e.plan"
    build_engine(
        open_model(exported["fp16"]),
        path,
        EngineSettings(flavour="tensorrt-rtx", capabilities=("8.6", "12.0")),
    )
    masks = [int.from_bytes(plan.read_bytes()[32:40], "little") for plan in (path, engine)]
    assert masks == [1 << 2 | 1 << 4, 0x7E]


def test_tf32_is_asked_for_or_off(exported: dict[Precision, Path], tmp_path: Path) -> None:
    path = tmp_path / "e.plan"
    build_engine(open_model(exported["fp32"]), path, EngineSettings(flavour="tensorrt-rtx", tf32=True))
    assert open_model(path).spec.precision == "tf32"
    with pytest.raises(SettingError, match="tf32 rounds what float32 layers multiply, and .* is in fp16"):
        build_engine(open_model(exported["fp16"]), path, EngineSettings(flavour="tensorrt-rtx", tf32=True))


@pytest.mark.parametrize("asked", [True, False])
def test_the_settings_reach_tensorrt(asked: bool) -> None:
    """TF32 is on where nothing is said."""
    log = log_of("tensorrt-rtx")
    builder = trt.Builder(log.handle)
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    settings = EngineSettings(
        flavour="tensorrt-rtx",
        batches=((1, 1, 1), (2, 4, 8)),
        tf32=asked,
        workspace=1 << 20,
        level=4,
        capabilities=("8.6",) if asked else (),
    )
    spec = engine_spec(tiny_spec(), settings, "1")
    config = _configure(trt, builder, settings, spec, log)
    assert config.get_flag(trt.BuilderFlag.TF32) is asked
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20
    assert (config.builder_optimization_level, config.num_optimization_profiles) == (4, 2)
    assert config.num_compute_capabilities == asked


def test_settings_out_of_range() -> None:
    for settings, problem in (
        ({"batches": ((0, 1, 1),)}, "not in order from 1 to 65535"),
        ({"batches": ((1, 9, 8),)}, "not in order"),
        ({"flavour": "tensorrt-rtx", "capabilities": ("9.0",)}, "not for 9.0"),
        ({"capabilities": ("8.6",)}, "are of TensorRT-RTX"),
        ({"flavour": "tensorrt-rtx", "hardware_compatible": True}, "is of TensorRT"),
        ({"flavour": "tensorrt-rtx", "timing_cache": Path("x.cache")}, "are of TensorRT"),
        ({"timing_cache": Path("model.onnx")}, "must end in .cache"),
        ({"batches": ((1, 1, 70_000),)}, "not in order from 1 to 65535"),
        ({"level": 6}, "0 to 5"),
        ({"workspace": 0}, "workspace"),
    ):
        with pytest.raises(SettingError, match=problem):
            EngineSettings(**settings)  # type: ignore[arg-type]


def test_the_default_batch_shrinks_with_the_image() -> None:
    sizes = {8: 64, 32: 64, 64: 64, 128: 16, 256: 4, 1024: 1}
    assert {size: default_engine_batch(tiny_spec((3, size, size))) for size in sizes} == sizes


def test_the_longest_name_is_kept_and_a_longer_one_refused() -> None:
    """TensorRT drops it without a word."""

    builder = trt.Builder(log_of("tensorrt-rtx").handle)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    for length, kept in ((3999, True), (4095, True), (4096, False)):
        network.name = "short"
        network.name = "n" * length
        assert (network.name == "n" * length) is kept
    engine = EngineSpec(flavour="tensorrt-rtx", version="1", batches=((1, 1, 1),))
    spec = msgspec.structs.replace(tiny_spec(), engine=engine)
    _set_name(network, spec)
    assert network.name == spec.to_json()
    crowded = msgspec.structs.replace(spec, num_classes=33, class_names=tuple(f"{i:0100}" for i in range(33)))
    with pytest.raises(
        SpecError, match="only 3999 fit in an engine: shorten the names of the classes, or build for fewer"
    ):
        _set_name(network, crowded)


@contextmanager
def interrupting(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """Ctrl-C at the first step."""
    yield lambda steps: signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_while_the_graph_is_read_is_not_lost(
    exported: dict[Precision, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it meet native code: it is held until that is done."""
    look = build.layers_of

    def interrupted(*arguments: Any) -> Layers:
        signal.raise_signal(signal.SIGINT)
        return look(*arguments)

    monkeypatch.setattr(build, "layers_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(open_model(exported["fp16"]), tmp_path / "e.plan", RTX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_build_and_leaves_nothing(
    exported: dict[Precision, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(open_model(exported["fp16"]), tmp_path / "e.plan", RTX, stages=interrupting)
    assert "stopping at the next chance, with nothing written" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler


# --- graphs that cannot be built -------------------------------------------------------------------------


def spoil(path: Path, change: Callable[[Any], None], output: Path) -> Path:
    """A copy of an .onnx that someone changed, without its seal."""
    model = onnx.load(path)
    del [p for p in model.metadata_props if p.key == "ddpm_deploy.sha256"][:]
    change(model)
    properties = {p.key: p.value for p in model.metadata_props if p.key != "ddpm_deploy.sha256"}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, output)
    return output


def unsupported(model: Any) -> None:
    """Two operators that no TensorRT has."""
    first = model.graph.node[0].input[0]
    for kind in ("Bernoulli", "Unique"):
        node = onnx.helper.make_node(kind, [first], [f"{kind}_out"], name=kind)
        model.graph.node.insert(0, node)
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{kind}_out", onnx.TensorProto.FLOAT, None)
        )


def claim(precision: Precision) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for entry in model.metadata_props:
            if entry.key == SPEC_KEY:
                spec = ModelSpec.from_json(entry.value, "it")
                entry.value = msgspec.structs.replace(spec, precision=precision).to_json()

    return change


def forget_islands(model: Any) -> None:
    (entry,) = [p for p in model.metadata_props if p.key == ISLANDS_KEY]
    model.metadata_props.remove(entry)


def islands(value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        (entry,) = [p for p in model.metadata_props if p.key == ISLANDS_KEY]
        entry.value = value

    return change


def claim_and_mean_it(model: Any) -> None:
    """All of it in float32, and meant to be."""
    claim("fp16")(model)
    names = [node.name for node in model.graph.node]
    model.metadata_props.add(key=ISLANDS_KEY, value=json.dumps(names))


def external_weights(model: Any) -> None:
    """In a file beside it, which a graph could name anywhere."""
    tensor = model.graph.initializer[0]
    Path("weights.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


def no_text(model: Any) -> None:
    """An operator whose name is no UTF-8, once its bytes are changed."""
    model.graph.node.insert(0, onnx.helper.make_node("Bernoulli", ["x"], ["unused"]))


def spoiled_weight(model: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "conv_in.weight")
    tensor.raw_data = b"\xff" * len(tensor.raw_data)


def rename_output(model: Any) -> None:
    model.graph.output[0].name = "epsilon"
    model.graph.node[-1].output[0] = "epsilon"


@pytest.mark.parametrize(
    ("source", "change", "error", "problem"),
    [
        (
            "fp32",
            unsupported,
            ArtefactError,
            "uses what TensorRT does not support: Unique, Bernoulli;",
        ),
        ("fp32", rename_output, ArtefactError, "does not fit its ModelSpec: it has .*epsilon.*prediction"),
        ("fp32", claim("fp16"), ParityError, "44 of 44 .* are not in fp16.*temb1, temb2, .* and 39 more"),
        ("fp16", claim("fp32"), ParityError, "39 of 44 .* are not in fp32"),
        ("fp16", claim("bf16"), ParityError, "44 of 44 .* are not in bf16"),
        ("fp16", forget_islands, ParityError, "5 of 44 .* are not in fp16.*: temb1, .*conv_out"),
        ("fp16", islands('["temb1"]'), ParityError, "4 of 44 "),
        ("fp32", claim_and_mean_it, ParityError, "44 of 44 .* are not in fp16"),
        ("fp32", external_weights, ArtefactError, "TensorRT cannot read it: .*weights.bin"),
        ("fp32", no_text, ArtefactError, "uses what TensorRT does not support: "),
        ("fp32", spoiled_weight, ArtefactError, "numbers that are not finite in conv_in.weight"),
        ("fp16", islands("{"), ArtefactError, "is no list of names"),
        ("fp16", islands('{"a": 1}'), ArtefactError, "no list of names"),
    ],
)
def test_graphs_that_are_refused(
    exported: dict[Precision, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Precision,
    change: Callable[[Any], None],
    error: type[Exception],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = spoil(exported[source], change, tmp_path / "bad.onnx")
    if change is no_text:
        bad.write_bytes(bad.read_bytes().replace(b"Bernoulli", b"Bern\xff\xfe\x1b[m"))
    with pytest.raises(error, match=problem) as refusal:
        build_engine(open_model(bad), tmp_path / "e.plan", RTX)
    assert "\x1b" not in str(refusal.value)
    assert not list(tmp_path.glob("*plan*"))


def test_files_that_are_refused(exported: dict[Precision, Path], tmp_path: Path) -> None:
    whole = exported["fp16"].read_bytes()
    cut, edited, foreign = tmp_path / "cut.onnx", tmp_path / "edited.onnx", tmp_path / "foreign.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    edited.write_bytes(whole.replace(b"conv_in", b"conv_im"))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), foreign)
    for bad, problem in (
        (cut, "not a whole .onnx"),
        (edited, "damaged, or edited"),
        (foreign, "carries no ModelSpec"),
        (tmp_path / "none.onnx", "does not exist"),
    ):
        with pytest.raises(ArtefactError, match=problem):
            build_engine(open_model(bad), tmp_path / "e.plan", RTX)
    assert not list(tmp_path.glob("*.plan*"))


def test_a_sealed_file_that_the_parser_refuses(exported: dict[Precision, Path], tmp_path: Path) -> None:
    """Whole for us, and no graph for TensorRT."""
    bad = tmp_path / "bad.onnx"
    model = onnx.load(exported["fp32"])
    model.graph.node[3].input[0] = "nowhere"
    del model.metadata_props[1:]
    onnx.save(model, bad)
    bad.write_bytes(bad.read_bytes() + seal(bad))
    with pytest.raises(ArtefactError, match="TensorRT cannot read it: "):
        build_engine(open_model(bad), tmp_path / "e.plan", RTX)


def test_norms_in_half_precision_are_refused() -> None:
    layers = Layers({"conv": "HALF"}, {"norm": "FLOAT", "softmax": "HALF"})
    with pytest.raises(ParityError, match="softmax would normalise in half precision"):
        require_precision(layers, "fp16", [])
    require_precision(Layers({"conv": "HALF"}, {"norm": "FLOAT"}), "fp16", [])


def test_what_the_inspector_says() -> None:
    """Of an engine on a GPU; its JSON here was written after NVIDIA's documentation."""

    def kernel(*kinds: str) -> dict[str, Any]:
        return {
            "Name": "k",
            "Inputs": [{"Name": "x", "Format/Datatype": kind} for kind in kinds],
            "Outputs": [],
        }

    half = json.dumps({"Layers": [kernel("Half"), kernel("Float"), kernel("Float", "Half"), "a name alone"]})
    full = json.dumps({"Layers": [kernel("Float"), kernel("Float")]})
    assert inspected(half, "fp16") == (2, 3)
    assert inspected(full, "fp32") == (0, 2)
    with pytest.raises(ParityError, match="without one kernel in fp16"):
        inspected(full, "fp16")
    for nothing in ("", "{}", "[]", '{"Layers": ["only names"]}'):
        assert inspected(nothing, "fp16") == (0, 0)


# --- plans ------------------------------------------------------------------------------------------------


def test_damaged_plans(engine: Path, tmp_path: Path) -> None:
    whole = engine.read_bytes()
    spec = whole.index(b'{"spec_version":')

    def plan(content: bytes, digest: str | None = None) -> Path:
        path = tmp_path / "x.plan"
        path.write_bytes(content)
        digest_path(path).unlink(missing_ok=True)
        if digest is not None:
            digest_path(path).write_text(digest)
        return path

    right = digest_path(engine).read_text()
    for content, problem in (
        (whole[:1000], "not whole: it has 1000 bytes, and says that it has"),
        (whole[:20], "truncated: it has 20 bytes"),
        (whole + b"x", "not whole"),
        (b"PK" + whole[2:], "not a TensorRT engine by its first bytes"),
        (b"", "is empty"),
    ):
        with pytest.raises(ArtefactError, match=problem):
            assert open_model(plan(content)).spec
    nameless = plan(whole.replace(b'{"spec_version":', b'{"spec_versiom":'))
    with pytest.raises(SpecError, match="carries no ModelSpec"):
        assert open_model(nameless).spec
    with pytest.raises(ArtefactError, match="not a whole .plan file"):
        open_model(plan(whole[:spec] + b'{"spec_version":' + b"[" * 3000 + whole[spec + 3016 :]))
    with pytest.raises(ArtefactError, match="is missing: an engine is native code"):
        trusted(plan(whole))
    trusted(plan(whole, right))
    for content, digest in ((whole[:-1] + b"x", right), (whole, "0" * 64), (whole, "ü"), (whole, "\n")):
        with pytest.raises(ArtefactError, match="damaged, edited or replaced"):
            trusted(plan(content, digest))
    assert json.loads(call("inspect", nameless, "--json").stdout)["plan"] == {
        "flavour": "tensorrt-rtx",
        "version": trt.__version__,
        "digest": "wrong",
    }


AMPERE, HOPPER, TURING = Gpu("RTX 3060", "8.6", 1), Gpu("H100", "9.0", 1), Gpu("T4", "7.5", 1)
BUILT = EngineSpec(
    flavour="tensorrt", version="11.4.0.106", capabilities=("8.6",), gpu="A10", batches=((1, 64, 64),)
)


def test_a_plan_of_another_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it was built for, what is here, and the command."""
    path, other = tmp_path / "my engine.plan", tmp_path / "other.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([11, 4, 0, 106]) + bytes(100))
    other.write_bytes(b"ftrt" + b"new!" + bytes(16) + bytes([11, 4, 0, 106]) + bytes(100))
    plan = open_model(path, msgspec.structs.replace(tiny_spec(), engine=BUILT))
    require_runs_here(plan, "11.4.0.99", Gpu("A10", "8.6", 1))
    require_runs_here(open_model(path), "11.4.0.106", HOPPER)
    require_runs_here(open_model(other), "10.16.1.11", HOPPER)  # TensorRT itself will say
    assert caplog.text == ""
    require_runs_here(plan, "11.4.0.99", AMPERE)
    assert "was built on A10, and this is RTX 3060: it may be slow or fail; build it again" in caplog.text
    again = f"build it again here, with ddpm-export '{tmp_path}/my engine.onnx' --max-batch 64 -o '{path}' --force"
    with pytest.raises(
        ArtefactError, match=f"built for compute capability 8.6 .A10., and this is H100 .9.0.: {again}"
    ):
        require_runs_here(plan, "11.4.0.106", HOPPER)
    with pytest.raises(
        ArtefactError, match=f"built by tensorrt 11.4.0.106, and 10.16.1.11 is installed here: {again}"
    ):
        require_runs_here(plan, "10.16.1.11", AMPERE)


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, [AMPERE]),
        ({"hardware_compatible": True, "capabilities": ()}, [AMPERE, HOPPER]),
        ({"flavour": "tensorrt-rtx", "capabilities": ()}, [AMPERE]),
        ({"flavour": "tensorrt-rtx", "capabilities": ("8.9",)}, []),
    ],
)
def test_which_gpus_an_engine_runs_on(changes: dict[str, Any], gpus: list[Gpu]) -> None:
    built = msgspec.structs.replace(BUILT, **changes)
    assert [gpu for gpu in (AMPERE, HOPPER, TURING) if runs_on(built, gpu)] == gpus


@pytest.mark.parametrize(
    ("changes", "precision", "gpu", "options"),
    [
        ({}, "fp16", HOPPER, "--max-batch 64"),
        ({"batches": ((1, 8, 64),)}, "tf32", HOPPER, "--precision tf32 --max-batch 64 --opt-batch 8"),
        (
            {"batches": ((1, 1, 1), (8, 8, 8))},
            "fp16",
            HOPPER,
            "--batch-buckets 1,8",
        ),
        ({"flavour": "tensorrt-rtx", "capabilities": ()}, "fp16", AMPERE, "--rtx --max-batch 64"),
        (
            {"flavour": "tensorrt-rtx", "capabilities": ()},
            "fp16",
            HOPPER,
            "--max-batch 64",
        ),  # which RTX cannot
        ({"hardware_compatible": True}, "fp16", TURING, "--max-batch 64 --hardware-compatible"),
    ],
)
def test_the_command_that_rebuilds_an_engine(
    changes: dict[str, Any], precision: Precision, gpu: Gpu, options: str
) -> None:
    spec = msgspec.structs.replace(
        tiny_spec(), precision=precision, engine=msgspec.structs.replace(BUILT, **changes)
    )
    assert " ".join(_options_of(spec, gpu)) == options
    parsed = main.make_context("ddpm-export", ["m.onnx", *options.split(), "-o", "e.plan"])
    typed: Any = {name: parsed.params[name] for name in EngineOptions.__annotations__}
    assert engine_settings(typed, spec).batches == spec.engine.batches  # type: ignore[union-attr]


def test_the_source_of_a_plan(tmp_path: Path) -> None:
    plan = tmp_path / "m.tf32.rtx.plan"
    assert source_of(plan) == tmp_path / "m.onnx"
    (tmp_path / "m.tf32.onnx").touch()
    assert source_of(plan) == tmp_path / "m.tf32.onnx"


# --- the command ------------------------------------------------------------------------------------------


def test_without_a_gpu_the_engine_is_skipped_or_insisted_on(
    tmp_path: Path, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint_path, "model.pt")
    for insisting in (["-o", "engine.plan"], ["--engine"], ["--precision", "tf32"]):
        refused(call("export", "model.pt", *insisting), 1, "cannot be built here: no NVIDIA GPU is visible")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    for contradiction in (["--max-batch", 8, "--batch-buckets", "1"], ["-o", "net.onnx", "--max-batch", 8]):
        refused(call("export", "model.pt", *contradiction), 2)
    refused(call("export", "model.pt", "--compute-capability", "8.6"), 2, "are of TensorRT-RTX")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    refused(call("export", "model.pt", "--report", "model.pt"), 1, "the name of a report must end in .json")
    typed = ("--timing-cache", "my timing.cache", "--batch-buckets", "1,8", "--optimization-level", 0)
    result = call("export", "model.pt", "-q", *typed)
    assert result.exit_code == 0
    again = (
        "ddpm-export model.onnx --batch-buckets 1,8 --optimization-level 0 --timing-cache 'my timing.cache' "
        "-o engine.plan"
    )
    assert (
        result.stdout.splitlines()[-1]
        == f"engine.plan skipped: no NVIDIA GPU is visible. On the target: {again}"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.proof.npz", "model.pt"]
    refused(
        call("export", "model.onnx"),
        1,
        "cannot be built here: no NVIDIA GPU is visible. Run this on the machine",
    )
    assert (
        "engine.plan" not in call("export", "model.pt", "-o", "net.onnx").stdout
    )  # which names what is wanted


def test_an_engine_of_an_onnx_and_back(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fp16.parent)
    result = call("export", "m.onnx", "--rtx", "--compute-capability", "8.6", "--batch-buckets", "1,4", "-v")
    assert result.exit_code == 0, result.output
    assert (
        f"wrote m.rtx.plan (fp16, TensorRT-RTX {trt.__version__} for compute capability 8.6, batch 1, 4, "
        in (result.stdout)
    )
    assert (
        "39 of 44 convolutions and matrix products are in fp16; in float32, as was meant: "
        "temb1, temb2, temb_projections, conv_in, conv_out"
    ) in result.stdout
    assert proof_path(Path("m.rtx.plan")).read_bytes() == Path("m.proof.npz").read_bytes()
    spec = json.loads(call("inspect", "m.rtx.plan", "--json").stdout)
    assert spec["engine"]["batches"] == [[1, 1, 1], [4, 4, 4]]
    assert spec["plan"] == {"flavour": "tensorrt-rtx", "version": trt.__version__, "digest": "right"}
    assert "for compute capability 8.6, batch 1, 4\n" in call("inspect", "m.rtx.plan").stdout
    advice = "no NVIDIA GPU is visible: on this machine's CPU run the model it was built of, ddpm-run m.onnx;"
    refused(call("run", "m.rtx.plan"), 1, advice)
    refused(call("verify", "m.rtx.plan"), 1, advice)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["m.onnx", "--rtx", "-o", "e.onnx"], 1, "must end in .plan"),
        (["m.onnx", "--rtx", "--weights", "raw"], 2, "--weights cannot be given with an .onnx"),
        (["m.onnx", "--rtx", "--all", "--report", "r.json"], 2, "--all, --report cannot be given"),
        (["m.onnx", "--rtx", "--precision", "bf16"], 1, "is in fp16, and its engine will be too"),
        (["m.onnx", "--rtx", "--precision", "tf32"], 1, "is in fp16, and its engine will be too"),
        (["m.onnx", "--rtx", "--max-batch", "8", "--batch-buckets", "1"], 2, "in place of --max-batch"),
        (["m.onnx", "--rtx", "--max-batch", "8", "--opt-batch", "9"], 2, "is more than --max-batch 8"),
        (["m.onnx", "--rtx", "--batch-buckets", "8,1"], 2, "each larger than the one before"),
        (["m.onnx", "--rtx", "--batch-buckets", "a"], 2, "not of the form 1,8,64"),
        (["m.onnx", "--rtx", "--compute-capability", "9.0"], 2, "'9.0' is not one of"),
        (["m.onnx", "--rtx", "--hardware-compatible"], 2, "is of TensorRT"),
        (["m.onnx", "--rtx", "--timing-cache", "t.cache"], 2, "are of TensorRT"),
        (["m.onnx", "--timing-cache", "m.onnx"], 2, "must end in .cache"),
        (["m.onnx", "--rtx", "-o", "a.plan"], 1, "a.proof.npz exists and is not the proof of this model"),
        (["m.onnx", "--compute-capability", "8.6"], 2, "are of TensorRT-RTX"),
        (["m.onnx", "--rtx", "--workspace", "0"], 2, "--workspace"),
        (["m.onnx", "--rtx", "--workspace", "nan"], 2, "--workspace nan"),
        (["m.onnx", "--rtx", "-o", "loop.plan"], 1, "loop.plan"),
        (["m.onnx", "--rtx", "-o", "b.plan"], 1, "b.plan.sha256 exists and is no digest"),
        (["m.onnx", "--rtx", "-o", "c.plan"], 1, "c.plan.sha256 is another file of this command"),
        (["m.onnx", "--rtx", "-o", "link.plan"], 1, "link.proof.npz is another file of this command"),
        (["m.onnx", "--rtx", "-o", "other.plan"], 1, "holds another model"),
        (["m.onnx", "--rtx", "-o", "folder.plan"], 1, "is a folder"),
        (["other.plan"], 1, "is not a TensorRT engine by its first bytes"),
    ],
)
def test_bad_arguments(
    fp16: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, problem: str
) -> None:
    monkeypatch.chdir(fp16.parent)
    Path("other.plan").write_text("all that there is of it")
    Path("folder.plan").mkdir()
    Path("a.proof.npz").write_text("the proof of a")
    Path("loop.plan").symlink_to("loop.plan")
    Path("link.proof.npz").symlink_to("m.onnx")
    Path("b.plan.sha256").symlink_to("other.plan")
    Path("c.plan.sha256").symlink_to("m.proof.npz")
    before = sorted(fp16.parent.iterdir())
    refused(call("export", *arguments), code, problem)
    assert sorted(fp16.parent.iterdir()) == before
    assert Path("other.plan").read_text() == "all that there is of it"


def test_a_full_disk_costs_a_line(fp16: Path, tmp_path: Path) -> None:
    """Here: no file may grow over 64 KiB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match=r"e\.plan cannot be written"):
            build_engine(open_model(fp16), tmp_path / "e.plan", RTX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*plan*"))


def test_what_was_meant_is_in_the_file(exported: dict[Precision, Path]) -> None:
    assert OnnxFile(exported["fp16"]).meant_float32 == MEANT
    assert OnnxFile(exported["fp32"]).meant_float32 is None
    assert np.isin(MEANT, [node.name for node in onnx.load(exported["fp16"]).graph.node]).all()


def test_memory_of_tensorrt_compares_as_bytes() -> None:
    """By itself it says that it is of floats, of a byte each, and comparing two such ends in an error."""
    builder = trt.Builder(log_of("tensorrt-rtx").handle)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
    memory = builder.build_serialized_network(network, builder.create_builder_config())
    held = as_bytes(memory)
    assert held == bytes(held)
    assert len(held) == memory.nbytes
