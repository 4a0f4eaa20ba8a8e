"""The Sampler, ONNX Runtime, parity, and the files that images go to."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.errors import (
    ArtefactError,
    BackendError,
    DependencyError,
    OutputError,
    OwnershipError,
    SettingError,
    SpecError,
)
from ddpm_deploy.gpu import Driver, Gpu
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import load_network
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.images import Destination, Form, grid, read_origin
from ddpm_deploy.runtime.parity import judge, psnr, record, spot_check, summarise, teacher_forced, tolerance
from ddpm_deploy.runtime.proof import as_proof, load_proof, write_proof
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.solvers import StepTable, ddpm
from ddpm_deploy.spec import ChainSettings, ModelSpec
from ddpm_deploy.tolerances import MEAN_PSNR, PARITY
from ddpm_deploy.words import Backend
from tests.models import ArrayNetwork, tiny_spec

# --- Sampler ------------------------------------------------------------------------------------------


def test_a_batch_is_its_splits_bit_for_bit_in_onnx_runtime(onnx_path: Path) -> None:
    """Whatever the batch size, position or number of threads."""
    with Sampler.load(onnx_path) as sampler:
        together = sampler.sample(7, steps=40, seed=3)
    with Sampler.load(onnx_path, max_batch=3, threads=1) as sampler:
        split = sampler.sample(7, steps=40, seed=3)
        single = np.concatenate([sampler.sample(1, steps=40, seed=3, first_index=i) for i in range(7)])
    np.testing.assert_array_equal(together, split)
    np.testing.assert_array_equal(together, single)
    assert together.shape == (7, 1, 8, 8)
    assert np.abs(together).max() <= 1
    assert len(np.unique(together.reshape(7, -1), axis=0)) == 7


def test_a_sampler_gives_the_same_again_and_other_for_another_seed(onnx_path: Path) -> None:
    with Sampler.load(onnx_path) as sampler:
        first = sampler.sample(2, steps=10, seed=1)
        np.testing.assert_array_equal(first, sampler.sample(2, steps=10, seed=1))
        assert (first != sampler.sample(2, steps=10, seed=2)).any()
        assert (sampler.sample(2, steps=10) != sampler.sample(2, steps=10)).any()


def test_iter_samples_gives_the_batches_of_sample() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 4))
    parts = list(sampler.iter_samples(10, steps=5, seed=0))
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), sampler.sample(10, steps=5, seed=0))


def test_callback_sees_every_step_and_may_stop_the_run() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 4))
    seen = []
    sampler.sample(6, steps=5, seed=0, callback=lambda step, x, x0: seen.append((step, x.shape, x0.shape)))
    shapes = {4: (4, 1, 8, 8), 2: (2, 1, 8, 8)}
    assert seen == [(step, shapes[n], shapes[n]) for n in (4, 2) for step in range(5)]

    def stop(step: int, x: object, x0: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    wanted = Sampler(ArrayNetwork(tiny_spec(), 4)).sample(3, steps=5, seed=0)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(3, steps=5, seed=0, callback=stop)
    np.testing.assert_array_equal(sampler.sample(3, steps=5, seed=0), wanted)


def test_a_stream_shows_every_step_of_sample() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 4))
    seen: list[Any] = []
    wanted = sampler.sample(
        3, steps=5, seed=0, callback=lambda step, x, x0: seen.append((step, x.copy(), x0.copy()))
    )
    got = list(sampler.stream(3, steps=5, seed=0))
    for mine, theirs in zip(got, seen, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got[-1][1], wanted)
    with pytest.raises(SettingError, match="5 images are more than one batch.*choose 1 to 4"):
        sampler.stream(5)


def from_another_thread(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Exception | None:
    """What a call raises there."""
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(call, *arguments, **keywords).exception()
    assert error is None or isinstance(error, OwnershipError)
    return error


def test_a_stream_holds_the_sampler_until_it_is_closed() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 4))
    wanted = sampler.sample(3, steps=5, seed=0)
    stream = sampler.stream(3, steps=5, seed=0)
    next(stream)
    with pytest.raises(
        OwnershipError, match=r"an iterator of this Sampler .* read the iterator to its end, or close\(\)"
    ):
        sampler.sample(1)
    assert "another thread's call or open iterator" in str(from_another_thread(sampler.sample, 1))
    assert "another thread's call or open iterator" in str(from_another_thread(sampler.close))
    stream.close()
    assert from_another_thread(sampler.sample, 1, steps=2) is None
    np.testing.assert_array_equal(sampler.sample(3, steps=5, seed=0), wanted)


def test_a_table_of_the_callers_own() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 2))
    table = sampler.spec.step_table(ChainSettings(steps=5, solver="ddim"))
    np.testing.assert_array_equal(
        sampler.sample(2, table=StepTable(table.rows.copy()), seed=0),
        sampler.sample(2, steps=5, solver="ddim", seed=0),
    )
    columns = {"a": 1.0, "hi": 1.0}
    for bad, problem in (
        ({"table": table, "steps": 5}, "instead of steps"),
        (
            {"table": StepTable.from_columns(t=np.array([1000, 3]), **columns)},
            "not whole numbers from 0 to the model's 999",
        ),
        (
            {"table": StepTable.from_columns(t=np.array([3, -1]), **columns)},
            "not whole numbers from 0 to the model's 999",
        ),
        ({"table": StepTable.from_columns(t=np.array([3, 3]), e=1.0, **columns)}, "must fall"),
        ({"table": ddpm(tiny_spec().make_schedule(), [5, 0], variance="learned_range")}, "has none"),
    ):
        with pytest.raises(SettingError, match=problem):
            sampler.sample(1, **bad)
    sampler.sample(1, steps=2)  # free again


def test_given_noise_replaces_the_addressed_noise() -> None:
    """The addressed noise, given back as the caller's own, gives the same images: splits included."""
    from ddpm_deploy import reference

    spec = tiny_spec()
    sampler = Sampler(ArrayNetwork(spec, 2))

    def noise(draw: int) -> np.ndarray:
        return np.stack([reference.normal(5, index, draw, spec.image_shape) for index in range(3)])

    np.testing.assert_array_equal(sampler.sample(3, steps=4, noise=noise), sampler.sample(3, steps=4, seed=5))
    with pytest.raises(SettingError, match=r"noise\(draw\) gave the shape"):
        sampler.sample(3, steps=4, noise=lambda draw: noise(draw)[:2])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"count": 0}, "count must be 1 or more"),
        ({"count": 2.5}, "count must be a whole number"),
        ({"count": 1, "steps": 2.5}, "steps must be a whole number"),
        ({"count": 10**15}, "do not fit in memory"),
        ({"count": 1, "steps": 0}, "choose from 1 to 1000"),
        ({"count": 1, "steps": 1001}, "choose from 1 to 1000"),
        ({"count": 1, "seed": -1}, "seed must be"),
        ({"count": 1, "seed": 2**64}, "seed must be"),
        ({"count": 2, "first_index": 2**64 - 1}, "first_index must be"),
        ({"count": 1, "solver": "euler"}, "solver 'euler' is not known"),
        ({"count": 1, "spacing": "even"}, "spacing 'even' is not known"),
        ({"count": 1, "eta": 0.5}, "eta is of the solver ddim"),
        ({"count": None}, "count must be a whole number, not None"),
        ({"count": 1, "solver": ["ddim"]}, "solver must be a name"),
        ({"count": 1, "solver": "ddim", "eta": "a"}, "eta must be a number"),
        ({"count": 1, "table": np.zeros((3, 12))}, "table must be a StepTable"),
        ({"count": 1, "labels": 1.0}, "Expected `int \\| str`, got `float`"),
        ({"count": True}, "count must be a whole number, not True"),
        ({"count": np.True_}, "count must be a whole number, not np.True_"),
        ({"count": 2.0}, "count must be a whole number, not 2.0"),
        ({"count": "1"}, "count must be a whole number, not '1'"),
        ({"count": 1, "steps": True}, "steps must be a whole number, not True"),
        ({"count": 1, "seed": 1.0}, "seed must be a whole number, not 1.0"),
        ({"count": 1, "first_index": np.True_}, "first_index must be a whole number"),
        ({"count": 1, "spacing": 3}, "spacing must be a name"),
        ({"count": 1, "solver": "ddim", "eta": True}, "eta must be a number"),
        ({"count": 1, "labels": True}, "Expected `int \\| str`, got `bool`"),
        ({"count": 1, "labels": np.True_}, "give one label for all images"),
        ({"count": 1, "labels": b"1"}, "Expected `int \\| str`, got `bytes`"),
        ({"count": 1, "guidance": b"1"}, "guidance must be a number, not b'1'"),
        ({"count": 1, "guidance": "1"}, "guidance must be a number, not '1'"),
        ({"count": 1, "guidance": object()}, "give one guidance scale for all images"),
        ({"count": 3, "guidance": [1.0]}, "1 guidance scale for 3 images"),
        ({"count": 1, "noise": np.zeros((3, 12))}, "noise must be a function, not ndarray"),
        ({"count": 1, "noise": lambda draw: "x"}, "noise\\(draw\\) gave no array of numbers"),
        ({"count": 1, "callback": True}, "callback must be a function, not bool"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Sampler(ArrayNetwork(tiny_spec(), 1)).sample(**arguments)  # type: ignore[arg-type]


def test_an_iterator_is_refused_at_once() -> None:
    """Before it is read."""
    sampler = Sampler(ArrayNetwork(tiny_spec(), 1))
    for make in (sampler.iter_samples, sampler.stream):
        for arguments in ({"count": True}, {"count": 1, "noise": 3}):
            with pytest.raises(SettingError):
                make(**arguments)  # type: ignore[arg-type]


def test_a_sampler_in_use_refuses_a_second_thread() -> None:
    sampler = Sampler(ArrayNetwork(tiny_spec(), 1))
    errors: list[Exception] = []

    def other() -> None:
        try:
            sampler.sample(1, steps=2)
        except OwnershipError as error:
            errors.append(error)

    def callback(step: int, x: object, x0: object) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    sampler.sample(1, steps=2, callback=callback)
    assert len(errors) == 2
    other()  # free again
    assert len(errors) == 2


def test_numbers_that_are_not_finite_are_an_error() -> None:
    class Broken(ArrayNetwork):
        def predict(self, batch: int) -> None:
            """NaN, as half precision gives when it overflows."""
            self.memory["prediction"][:batch] = np.nan

    with pytest.raises(BackendError, match="not finite"):
        Sampler(Broken(tiny_spec(), 1)).sample(1, steps=3)
    with pytest.raises(BackendError, match="not finite"):
        list(Sampler(Broken(tiny_spec(), 1)).stream(1, steps=3))


# --- ONNX Runtime -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"path": "missing.onnx"}, ArtefactError, "does not exist"),
        (
            {"backend": "tensorflow"},
            SettingError,
            "backend 'tensorflow' is not known: choose from onnxruntime",
        ),
        ({"backend": "torch"}, SettingError, r"is not a checkpoint \(.pt\)"),
        ({"backend": "tensorrt", "device": "cpu"}, SettingError, "TensorRT runs on a GPU"),
        ({"device": "cuda:x"}, SettingError, "device 'cuda:x' is not known"),
        ({"device": "cuda:"}, SettingError, "device 'cuda:' is not known"),
        ({"device": "cuda"}, BackendError, "no NVIDIA GPU is visible"),
        ({"device": "tpu"}, SettingError, "device 'tpu' is not known: say cpu, cuda or cuda:1"),
        ({"threads": 0}, SettingError, "threads must be"),
        ({"threads": "x"}, SettingError, "threads must be"),
        ({"max_batch": 0}, SettingError, "max_batch must be"),
    ],
)
def test_loads_that_are_refused(
    onnx_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object],
    error: type[Exception],
    problem: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = {**arguments, "path": onnx_path.parent / str(arguments.get("path", onnx_path.name))}
    with pytest.raises(error, match=problem):
        Sampler.load(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [None, "onnxruntime", "tensorrt"])
def test_a_gpu_that_is_not_there(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend | None
) -> None:
    """Whichever backend is asked for; described, as none is here."""
    two = Driver("580.65", "13.0", (Gpu("A10", "8.6", 1), Gpu("A10", "8.6", 1)))
    monkeypatch.setattr("ddpm_deploy.engine.bindings.driver", lambda: two)
    with pytest.raises(BackendError) as caught:
        Sampler.load(onnx_path, device="cuda:2", backend=backend)
    assert str(caught.value).startswith(
        "no NVIDIA GPU has the number 2 (visible: cuda:0, cuda:1; CUDA_VISIBLE_DEVICES chooses): leave "
    )


@pytest.mark.parametrize("backend", [None, "onnxruntime", "tensorrt"])
def test_a_driver_that_is_older_than_the_packages(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend | None
) -> None:
    """By the metadata of the CuPy that is installed, before it is imported."""
    metadata = tmp_path / "cupy_cuda13x-14.2.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: cupy-cuda13x\nVersion: 14.2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    old = Driver("550.54", "12.4", (Gpu("A10", "8.6", 1),))
    monkeypatch.setattr("ddpm_deploy.engine.bindings.driver", lambda: old)
    with pytest.raises(BackendError) as caught:
        Sampler.load(onnx_path, device="cuda", backend=backend)
    assert str(caught.value) == (
        "the NVIDIA driver 550.54 runs CUDA 12.4 and older, and cupy-cuda13x is of CUDA 13: update the NVIDIA driver "
        "to r580 or newer (ddpm-deploy doctor says what this one runs)"
    )


def test_a_graph_that_does_not_fit_its_spec(onnx_path: Path) -> None:
    spec = msgspec.structs.replace(tiny_spec(), image_shape=(3, 8, 8))
    with pytest.raises(ArtefactError, match=r"has x float32 \(B, 1, 8, 8\).*\(B, 3, 8, 8\).*is needed"):
        OrtNetwork(open_model(onnx_path, spec))


def test_a_broken_graph_with_a_whole_spec(tmp_path: Path, onnx_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtefactError, match="ONNX Runtime cannot load it"):
        OrtNetwork(open_model(tmp_path / "x.onnx"))


def test_a_graph_with_inputs_and_outputs_exchanged(tmp_path: Path, onnx_path: Path) -> None:
    onnx = pytest.importorskip("onnx")

    def value(name: str, *shape: int) -> object:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", *shape])

    outputs = [value("x", 1, 8, 8), value("temb", 64)]
    nodes = [
        onnx.helper.make_node("Identity", ["prediction"], ["x"]),
        onnx.helper.make_node("Flatten", ["prediction"], ["temb"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [value("prediction", 1, 8, 8)], outputs)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtefactError, match="does not fit its ModelSpec"):
        OrtNetwork(open_model(tmp_path / "x.onnx", open_model(onnx_path).spec))


def test_closing_twice_is_once_and_a_closed_sampler_says_so(onnx_path: Path) -> None:
    with Sampler.load(onnx_path) as sampler:
        sampler.close()
    with pytest.raises(BackendError, match="closed"):
        sampler.sample(1, steps=1)


def test_a_fixed_batch_is_refused(tmp_path: Path, onnx_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtefactError, match="fixed batch"):
        OrtNetwork(open_model(tmp_path / "x.onnx"))


def test_spec_from_elsewhere_for_a_graph_without_one(tmp_path: Path, onnx_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(SpecError):
        Sampler.load(tmp_path / "bare.onnx")
    with (
        Sampler.load(tmp_path / "bare.onnx", spec=open_model(onnx_path).spec) as bare,
        Sampler.load(onnx_path) as whole,
    ):
        np.testing.assert_array_equal(bare.sample(1, steps=3, seed=0), whole.sample(1, steps=3, seed=0))


def test_both_onnxruntimes_at_once_are_explained(monkeypatch: pytest.MonkeyPatch, onnx_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    with pytest.raises(DependencyError, match="both installed.*pip uninstall -y onnxruntime onnxruntime-gpu"):
        Sampler.load(onnx_path)


# --- labels -------------------------------------------------------------------------------------------


class Labelled(ArrayNetwork):
    """Its images tell their label: the network predicts what leads to label/10 everywhere."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(msgspec.structs.replace(tiny_spec(), **changes), 4)

    def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """ε of an image that is y/10 everywhere."""
        ac = self.spec.make_schedule().alphas_cumprod[t][:, None, None, None]
        wanted = self.memory["y"][: len(x), None, None, None] / 10
        return np.asarray((x - ac**0.5 * wanted) / (1 - ac) ** 0.5, np.float32)


def drawn(sampler: Sampler, *arguments: Any, **settings: Any) -> list[int]:
    """The labels that the images tell."""
    images = sampler.sample(*arguments, steps=20, **settings)
    return [round(float(image.mean()) * 10) for image in images]


def test_labels_reach_their_images() -> None:
    named = {"num_classes": 3, "class_names": ("cat", "dog", "2"), "null_class": True}
    sampler = Sampler(Labelled(**named))
    assert drawn(sampler, 6) == [0, 1, 2, 0, 1, 2]  # over two batches
    assert drawn(sampler, 2, first_index=4) == [1, 2]
    assert drawn(sampler, 2, labels="dog") == [1, 1]
    assert drawn(sampler, 2, labels=2) == [2, 2]
    assert drawn(sampler, 5, labels=["dog", 0, "2", "none", np.int64(1)]) == [1, 0, 2, 3, 1]
    for labels, problem in (
        ("cow", "no class 'cow': choose cat, dog, 2, or 0 to 2, or none for no class"),
        (-1, "no class -1"),
        (4, "no class 4"),
        ([0, 1], "2 labels for 1 image:"),
    ):
        with pytest.raises(SettingError, match=problem):
            sampler.sample(1, labels=labels)
    with pytest.raises(SettingError, match="no class 'none': choose 0 to 2$"):
        Sampler(Labelled(num_classes=3)).sample(1, labels="none")
    with pytest.raises(SettingError, match="unconditional"):
        Sampler(Labelled()).sample(1, labels=0)


def test_class_names_are_told_apart() -> None:
    for change in (
        {"num_classes": 2, "class_names": ("cat", "cat")},
        {"num_classes": 2, "class_names": ("cat",)},
        {"null_class": True},
    ):
        content = tiny_spec().to_builtins() | change
        with pytest.raises(SpecError):
            ModelSpec.from_json(json.dumps(content), "x")
    hostile = msgspec.structs.replace(tiny_spec(), num_classes=1, class_names=("\x1b[2J",))
    with pytest.raises(SettingError, match=r"choose \\x1b\[2J, or 0 to 0$"):
        hostile.label("9" * 5000)


def test_a_proof_holds_its_labels(tmp_path: Path) -> None:
    network = Labelled(num_classes=3, null_class=True)
    proof = as_proof(record(network, count=4, steps=20))
    write_proof(proof, tmp_path / "x.npz")
    assert load_proof(tmp_path / "x.npz").labels.tolist() == [0, 1, 2, 3]
    network.memory["y"][:] = 0
    assert judge(proof, network).within
    with pytest.raises(SettingError, match="differ in num_classes"):
        judge(proof, Labelled(num_classes=4, null_class=True))


# --- parity -------------------------------------------------------------------------------------------


class Off(ArrayNetwork):
    """Right, but for an error of a given relative size below a given timestep."""

    def __init__(self, size: float, below: int = 1000) -> None:
        super().__init__(tiny_spec(), 4)
        self.size, self.below = size, below

    def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The prediction, scaled."""
        scale = np.where(t < self.below, 1 + self.size, 1).astype(np.float32)
        return super().answer(x, t) * scale[:, None, None, None]


def test_equal_models_are_equal() -> None:
    result = judge(record(Off(0), count=2, steps=100), Off(0))
    assert result.within
    assert result.first_past is None
    assert np.isinf(result.psnr).all()
    assert all(step.rms == 0 for step in result.steps)
    assert len(result.steps) == 50


def test_errors_are_measured_and_located() -> None:
    """An error of one part in a thousand below t = 300 is found there, at that size, and nowhere else."""
    result = judge(record(Off(0), count=2, keep=1000), Off(1e-3, below=300))
    assert not result.within
    assert result.first_past == 299
    assert len(result.steps) == 1000
    for step in result.steps:
        assert step.relative_rms == pytest.approx(1e-3 if step.timestep < 300 else 0, rel=1e-3)
    rows = summarise(result)
    assert [row.top for row in rows] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, 9]
    assert [row.within for row in rows] == [True] * 7 + [False] * 4
    assert np.isfinite(result.psnr).all()


def test_nan_is_past_tolerance() -> None:
    result = judge(record(Off(0), count=1, steps=10), Off(float("nan"), below=500))
    assert not result.within
    assert result.first_past == 400
    assert not spot_check(Off(0), Off(float("nan"), below=500), 2).within


def test_questions_asked_together_have_the_answers_of_those_asked_alone() -> None:
    """A candidate with room for more is asked about several timesteps in one batch."""
    trajectory = record(Off(0), count=2, steps=30)
    alone, together = Off(1e-3, below=400), Off(1e-3, below=400)
    alone.max_batch = 2
    assert teacher_forced(trajectory, alone) == teacher_forced(trajectory, together)


def test_a_predicted_mean_passes_its_rounding_on() -> None:
    spec = msgspec.structs.replace(tiny_spec(), prediction="mean")
    half = msgspec.structs.replace(spec, precision="fp16")
    assert (
        tolerance(spec, spec).psnr
        == MEAN_PSNR
        < PARITY["fp32"].psnr
        == tolerance(tiny_spec(), tiny_spec()).psnr
    )
    assert tolerance(spec, spec).prediction == PARITY["fp32"].prediction
    assert tolerance(spec, half) == PARITY["fp16"]


def test_psnr_is_that_of_its_definition() -> None:
    wanted = np.zeros((2, 1, 8, 8), np.float32)
    images = wanted + np.array([0.02, 0], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr(images, wanted, 2.0), [40, np.inf], rtol=1e-6)
    np.testing.assert_allclose(psnr(images, wanted, 1.0)[0], 40 - 20 * np.log10(2), rtol=1e-6)


def test_models_of_different_kinds_cannot_be_compared() -> None:
    other = ArrayNetwork(tiny_spec(timesteps=500), 4)
    with pytest.raises(SettingError, match="differ in timesteps"):
        judge(record(Off(0), count=1, steps=2), other)
    with pytest.raises(SettingError, match="count must be from 1 to 4"):
        record(Off(0), count=5)


def test_exported_network_agrees_with_pytorch(checkpoint_path: Path, onnx_path: Path) -> None:
    reference = load_network(open_model(checkpoint_path))
    result = judge(record(reference, count=2), load_network(open_model(onnx_path)))
    assert result.within
    assert result.tolerance == PARITY["fp32"]


# --- the proof that travels -----------------------------------------------------------------------------


def test_a_proof_says_what_was_recorded(tmp_path: Path) -> None:
    trajectory = record(Off(0), count=2, steps=50, seed=2**63, keep=50)
    proof = as_proof(trajectory)
    assert proof.timesteps[[0, -1]].tolist() == [980, 0]
    assert len(proof.timesteps) == 16
    write_proof(proof, tmp_path / "x.proof.npz")
    again = load_proof(tmp_path / "x.proof.npz")
    assert (again.spec, again.seed, again.steps) == (trajectory.spec, 2**63, 50)
    for name in ("timesteps", "x", "prediction", "images"):
        np.testing.assert_array_equal(getattr(again, name), getattr(proof, name))
    assert judge(again, Off(0)).within
    assert judge(again, Off(1e-3, below=300)).first_past == 260


def test_a_proof_for_images_as_cifars_is_under_a_megabyte(tmp_path: Path) -> None:
    trajectory = record(ArrayNetwork(tiny_spec((3, 32, 32)), 1), count=1, steps=25)
    write_proof(as_proof(trajectory), tmp_path / "x.proof.npz")
    assert (tmp_path / "x.proof.npz").stat().st_size < 1_000_000


def test_a_proof_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    write_proof(as_proof(record(Off(0), count=2, steps=50)), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as archive:
        content = dict(archive)
    np.savez_compressed(tmp_path / "y.npz", **content, more=np.zeros(1 << 28, np.uint8))
    with pytest.raises(ArtefactError, match="unpacks to over"):
        load_proof(tmp_path / "y.npz")


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.zeros((16, 2, 1, 8, 8))},
        {"x": np.zeros((16, 3, 1, 8, 8), np.float32)},
        {"prediction": np.full((16, 2, 1, 8, 8), np.nan, np.float32)},
        {"images": np.zeros((0, 1, 8, 8), np.float32)},
        {"timesteps": np.arange(16)},
        {"steps": 10**9},
        {"steps": 0},
        {"seed": -1},
        {"format": "one"},
        {"format": 2},
        {"spec": np.frombuffer(b"{}", np.uint8)},
        {"spec": None},
    ],
)
def test_proofs_that_do_not_fit_themselves(tmp_path: Path, change: dict[str, Any]) -> None:
    write_proof(as_proof(record(Off(0), count=2, steps=50)), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as archive:
        content = dict(archive) | change
    np.savez(tmp_path / "y.npz", **{name: value for name, value in content.items() if value is not None})
    with pytest.raises(ArtefactError, match=r"y\.npz"):
        load_proof(tmp_path / "y.npz")


# --- images -------------------------------------------------------------------------------------------


def test_to_uint8_rounds_and_clips() -> None:
    values = np.array([-1.5, -1, -0.999, 0, 0.999, 1, 7, 1 / 255 - 1], np.float32).reshape(1, 1, 2, 4)
    assert to_uint8(values).ravel().tolist() == [0, 0, 0, 128, 255, 255, 255, 0]
    assert to_uint8(np.zeros((2, 3, 4, 5), np.float32)).shape == (2, 4, 5, 3)
    assert to_uint8(np.full((1, 1, 1, 1), 0.5, np.float32), (0.0, 1.0)).item() == 128


def test_to_uint8_undoes_the_trainers_scaling() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(pixels * np.float32(2 / 255) - 1)[..., 0], pixels[0])


def test_grid_places_every_image() -> None:
    pixels = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((5, 64, 64, 3), np.uint8)
    picture = grid(pixels)
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 66, 2 + i % 3 * 66
        assert (picture[top : top + 64, left : left + 64] == i + 1).all()
    assert grid(pixels[:, :8, :8]).shape == picture.shape  # small ones are enlarged


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_destinations(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (5, *shape)).astype(np.float32)
    request = Request(count=5, first_index=30, seed=1).checked(tiny_spec(shape))

    def write(name: str, form: Form = "uint8") -> Path:
        destination = Destination(tmp_path / name, request, tiny_spec(shape), form)
        destination.check()
        with destination.open() as put:
            put(samples[:2])
            put(samples[2:])
        return destination.path

    pixels = to_uint8(samples)
    np.testing.assert_array_equal(np.load(write("x.npz"))["arr_0"], pixels)
    np.testing.assert_array_equal(np.load(write("f.npz", "float"))["samples"], samples)
    for folder in (write("folder"), write("folder")):
        assert sorted(p.name for p in folder.iterdir()) == [f"{30 + i:06d}.png" for i in range(5)]
        with Image.open(folder / "000033.png") as image:
            np.testing.assert_array_equal(np.asarray(image).reshape(pixels[3].shape), pixels[3])
            assert read_origin(folder / "000033.png").request == request[3:4]
    with Image.open(write("x.png")) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(grid(pixels).shape), grid(pixels))
    origin = read_origin(tmp_path / "x.png")
    assert (origin.request, origin.is_grid, origin.model) == (request, True, "0" * 64)


def test_an_interrupted_destination_leaves_nothing(tmp_path: Path) -> None:
    for name in ("x.npz", "x.png"):
        destination = Destination(tmp_path / name, Request(count=5, seed=0), tiny_spec())
        with pytest.raises(KeyboardInterrupt), destination.open() as put:
            put(np.zeros((2, 1, 8, 8), np.float32))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "count", "form", "problem"),
    [
        ("x.jpg", 1, "uint8", r"not a \.jpg"),
        ("missing/x.png", 1, "uint8", "does not exist"),
        ("missing/folder", 1, "uint8", "does not exist"),
        ("file", 1, "uint8", "is a file"),
        ("x.png", 5000, "uint8", "do not fit in one grid"),
        ("x.png", 1, "float", "only an .npz holds floats"),
    ],
)
def test_destinations_that_are_refused(
    tmp_path: Path, name: str, count: int, form: Form, problem: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=problem):
        Destination(tmp_path / name, Request(count=count, seed=0), tiny_spec(), form).check()
