"""ncnn: a network as its layers, the file that holds them, what is refused before ncnn sees it, and its bits."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.dependencies import pip_install
from ddpm_deploy.doctor import gaussian
from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.ncnn_file import NcnnFile, describe
from ddpm_deploy.ncnn_layers import Layer, outcome
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec, UNetConfig
from ddpm_deploy.tolerances import DOCTOR, PARITY
from tests.conftest import once
from tests.models import tiny_spec

ncnn = pytest.importorskip("ncnn")
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from ddpm_deploy.export.graph import describe as describe_onnx  # noqa: E402
from ddpm_deploy.export.graph import export_ncnn, trace  # noqa: E402
from ddpm_deploy.export.ncnn import convert, write_ncnn  # noqa: E402
from ddpm_deploy.runtime.backends.ncnn import NcnnNetwork  # noqa: E402
from ddpm_deploy.train.checkpoint import load_network, new_network  # noqa: E402
from tests.importing import randomise  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ncnn_path(checkpoint_path: Path) -> Path:
    """The tiny checkpoint, exported for ncnn, in a folder of its own."""
    path = checkpoint_path.parent / "ncnn" / "model.ncnn"
    path.parent.mkdir(exist_ok=True)
    return once(path, lambda: export_ncnn(*load_network(open_model(checkpoint_path)), path))


def command(*words: object) -> Result:
    return CliRunner().invoke(ddpm_deploy, [str(word) for word in words])


def questions(spec: ModelSpec, count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    t, y = rng.integers(spec.timesteps, size=count), rng.integers(max(1, spec.num_labels), size=count)
    x = rng.standard_normal((count, *spec.image_shape), np.float32)
    return [x, spec.embedding.table(spec.timesteps)[t], y]


# --- the export -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_one_file_that_describes_itself(ncnn_path: Path, checkpoint_path: Path) -> None:
    model, checkpoint = open_model(ncnn_path), open_model(checkpoint_path)
    assert model.kind == "ncnn"
    assert model.intact
    assert model.spec.same_bits is True
    assert model.spec.provenance.weights == "ema"
    assert (
        msgspec.structs.replace(model.spec, same_bits=None, provenance=checkpoint.spec.provenance)
        == checkpoint.spec
    )
    with zipfile.ZipFile(ncnn_path) as archive:
        assert archive.namelist() == ["model.param", "spec.json", "sha256"]
        assert archive.testzip() is None
    assert proof_path(ncnn_path).exists()


def test_an_onnx_file_becomes_the_same_file(ncnn_path: Path, onnx_path: Path, tmp_path: Path) -> None:
    """Without PyTorch: it is judged by the proof that is there already."""
    other = tmp_path / "other.ncnn"
    assert convert(open_model(onnx_path), other).within
    assert other.read_bytes() == ncnn_path.read_bytes()
    assert proof_path(other).exists()


def test_whatever_our_networks_have_is_converted(tmp_path: Path) -> None:
    """Labels and a null class, a learned variance, several heads, the other way of resampling, a scale and a shift, no
    norm in the middle, images that are not square."""
    config = UNetConfig(
        channels=8,
        widths=(8, 16),
        time_width=16,
        blocks=1,
        attention_levels=(1,),
        heads=2,
        groups=4,
        scale_shift=True,
        padding="symmetric",
        resampling_blocks=(0, 1),
        middle_groups=0,
    )
    spec = ModelSpec(
        image_shape=(3, 8, 12),
        embedding=SinusoidalEmbedding(dim=8),
        network=config,
        variance="learned_range",
        num_classes=3,
        null_class=True,
    )
    assert difference(spec, new_network(spec), tmp_path) < 1e-6  # November 2026: 4e-7


def difference(spec: ModelSpec, network: Any, folder: Path) -> float:
    """The relative RMS of the difference between a network in ncnn and in ONNX Runtime."""
    randomise(network)
    model = trace(network.eval(), spec)
    onnx.save(model, folder / "m.onnx")
    describe_onnx(folder / "m.onnx", spec)
    write_ncnn(model, spec, folder / "m.ncnn")
    asked = questions(spec, 4)
    got = ask(NcnnNetwork(open_model(folder / "m.ncnn"), max_batch=4), *asked)
    wanted = ask(OrtNetwork(open_model(folder / "m.onnx"), max_batch=4), *asked).astype(np.float64)
    return float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))


class Other(torch.nn.Module):  # type: ignore[misc]
    """Operators of other people's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.temb = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(8)
        self.mix = torch.nn.Linear(8, 8, bias=False)
        self.last = torch.nn.Conv2d(8, 1, 1)

    def forward(self, x: Any, temb: Any) -> Any:
        h = torch.nn.functional.gelu(self.first(x))
        scale, shift = self.temb(torch.relu(temb))[:, :, None, None].chunk(2, dim=1)
        h = h * (scale.tanh() + 1) - shift.exp() / 4
        h = torch.nn.functional.normalize(h, dim=1) * 8**0.5
        rows = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        rows = rows + self.mix(self.norm(rows)) + 0.25
        h = rows.transpose(1, 2).unflatten(2, x.shape[2:])
        low = torch.nn.functional.avg_pool2d(h, 2)
        h = self.deep(torch.nn.functional.interpolate(low, scale_factor=2.0)) + h * torch.sigmoid(h) ** 2
        return self.last(torch.nn.functional.leaky_relu(1 / (2 + h**2) + h[:, :1].abs().sqrt()))


def test_other_peoples_operators(tmp_path: Path) -> None:
    assert difference(tiny_spec(network=None), Other(), tmp_path) < 1e-6  # November 2026: 1e-7


class Rolled(torch.nn.Module):  # type: ignore[misc]
    """A network with an operator that has no counterpart."""

    def forward(self, x: Any, temb: Any) -> Any:
        return torch.cumsum(x, dim=3) + temb[:, :1, None, None]


def test_an_operator_that_is_lacking_is_named(tmp_path: Path) -> None:
    spec = tiny_spec(network=None)
    with pytest.raises(ArtefactError, match="CumSum .*no counterpart in ncnn here; run its .onnx instead"):
        write_ncnn(trace(Rolled(), spec), spec, tmp_path / "m.ncnn")


def test_a_reduced_precision_is_refused(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(tiny_spec(), precision="fp16")
    with pytest.raises(ArtefactError, match="the graph is in fp16: export it in fp32"):
        write_ncnn(onnx.ModelProto(), spec, tmp_path / "m.ncnn")
    assert not list(tmp_path.iterdir())


def test_without_its_proof_an_onnx_is_not_converted(onnx_path: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "m.onnx"
    lonely.write_bytes(onnx_path.read_bytes())
    with pytest.raises(ArtefactError, match="has no proof beside it .*by: export its checkpoint to .ncnn"):
        convert(open_model(lonely), tmp_path / "m.ncnn")


# --- bits -------------------------------------------------------------------------------------------------------------


def test_an_image_has_its_bits_in_every_batch_and_with_any_threads(ncnn_path: Path) -> None:
    x, temb, y = questions(open_model(ncnn_path).spec, 5)
    answers = {}
    for threads in (1, 2, 4):
        network = NcnnNetwork(open_model(ncnn_path), threads=threads, max_batch=5)
        for batch in range(1, 6):
            answers[threads, batch] = ask(network, x[5 - batch :], temb[5 - batch :], y[5 - batch :])
        network.close()
    first = answers[1, 5].view(np.uint32)
    assert [
        which for which, got in answers.items() if (got.view(np.uint32) != first[5 - which[1] :]).any()
    ] == []


def test_a_sampler_draws_what_onnx_runtime_draws(ncnn_path: Path, onnx_path: Path) -> None:
    """And the same bits however the images are batched: three a call are two and one."""
    with Sampler.load(onnx_path) as sampler:
        wanted = sampler.sample(3, steps=20, seed=1)
    with Sampler.load(ncnn_path, threads=2) as sampler:
        images = sampler.sample(3, steps=20, seed=1)
        alone = sampler.sample(1, steps=20, seed=1, first_index=2)
    assert (images[2:] == alone).all()
    psnr = 10 * np.log10(4 / ((images - wanted) ** 2).mean())
    assert psnr > PARITY["fp32"].psnr


# --- hostile files ----------------------------------------------------------------------------------------------------


def edited(path: Path, folder: Path, edit: Callable[[str], str]) -> Path:
    """A copy with other layers, sealed as ddpm-export seals it."""
    there = NcnnFile(path)
    copy = folder / "edited.ncnn"
    copy.write_bytes(path.read_bytes()[: there.weights])
    changed = edit(there.param)
    assert changed != there.param
    describe(copy, open_model(path).spec, changed)
    return copy


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        ("^7767517", "7767518"),
        (r"^(7767517\n)\d+", r"\g<1>1000000000"),
        ("Convolution ", "YoloV3DetectionOutput "),
        (r"(Convolution .*) 0=8 ", r"\1 0=800000 "),  # reads past the weights
        (r"(Convolution .*) 6=\d+", r"\1 6=999999999"),
        (r"(Convolution .*) 3=1 ", r"\1 3=0 "),
        (r"(Convolution .*) 5=1 ", r"\1 5=-1 "),
        (r"(GroupNorm .*) 1=8 ", r"\1 1=4096 "),
        (r"(GroupNorm .*) 0=4 ", r"\1 0=0 "),
        (r"(InnerProduct .*) 0=32 ", r"\1 0=16 "),
        (r"(Input .* x) 0=8 1=8", r"\1 0=64 1=64"),
        (r"(Reshape .*) 2=\d+", r"\1 2=1048576"),
        (r"(Slice .*) -23300=(\d+),", r"\1 -23300=1,"),
        (r"(Concat .*) 0=0", r"\1 0=7"),
        (r"(Softmax .*) 0=2", r"\1 0=9"),
        (r"(Permute .*) 0=\d", r"\1 0=23"),
        (r"(Interp .*) 1=2\.0", r"\1 1=9.0"),
        (r"Split (\S+) 1 2 (\S+)", r"Split \1 1 2 nothing"),
        (r"(Split \S+ 1 2 \S+) (\S+) \S+", r"\1 \2 \2"),  # a blob that is made twice
        (r"(BinaryOp .*) 0=0", r"\1 0=0 9=" + "x" * 300),
        (r"(BinaryOp) \S+", r"\1 " + "n" * 300),
        ("(Swish .*)", r"\1 31=64"),
        (r"(Convolution .*)", r"\1 31=1"),
        (r"(?s)\n[^\n]*prediction.*", "\n"),
        (r"\n(Swish)", "\x1c" + r"\1"),  # which ends a line for Python, and not for ncnn
    ],
)
def test_layers_that_lie_never_reach_ncnn(
    ncnn_path: Path, tmp_path: Path, pattern: str, instead: str
) -> None:
    """Its own parser believes them, and ends the process or reads what is not its own."""
    path = edited(
        ncnn_path, tmp_path, lambda param: re.sub(pattern, instead, param, count=1, flags=re.MULTILINE)
    )
    model = open_model(path)
    assert model.intact
    with pytest.raises(
        ArtefactError, match=r"has layers that cannot be run: .*; export it again with ddpm-export"
    ):
        NcnnNetwork(model)


@pytest.mark.parametrize(
    "layer",
    [
        Layer("Reduction", "r", ("x",), ("y",), {0: 0, 1: 0, 3: (), 4: 1, 5: 1}),  # makes 1 of 8 there
        Layer("Crop", "c", ("x",), ("y",), {9: (), 10: (), 11: ()}),
        Layer("Reshape", "r", ("x",), ("y",), {2: 8, 0: 1}),
        Layer("Reshape", "r", ("x",), ("y",), {1: 8}),
    ],
    ids=str,
)
def test_a_layer_of_which_ncnn_makes_another_shape_is_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="has a parameter out of its range"):
        outcome(layer, [(8,)])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (3, 3)])
def test_another_file_in_its_place_is_not_mixed_in(
    ncnn_path: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Each Net is loaded when it is first needed: by then a model may have been exported anew."""
    path, there, spec = tmp_path / "m.ncnn", NcnnFile(ncnn_path), open_model(ncnn_path).spec
    path.write_bytes(ncnn_path.read_bytes())
    with Sampler.load(path, threads=2) as sampler:
        wanted = sampler.sample(after, steps=3, seed=1)
    with Sampler.load(path, threads=2) as sampler, Sampler.load(path, threads=2) as late:
        sampler.sample(before, steps=3, seed=1)
        (tmp_path / "other").write_bytes(bytes(there.weights))
        describe(tmp_path / "other", spec, there.param)
        (tmp_path / "other").replace(path)
        np.testing.assert_array_equal(sampler.sample(after, steps=3, seed=1), wanted)
        with pytest.raises(BackendError, match=r"another file is in the place of .*: load the model again"):
            late.sample(1, steps=3)


def test_weights_of_another_type_or_length_are_refused(ncnn_path: Path, tmp_path: Path) -> None:
    there, whole = NcnnFile(ncnn_path), ncnn_path.read_bytes()[: NcnnFile(ncnn_path).weights]
    path, spec = tmp_path / "m.ncnn", open_model(ncnn_path).spec
    half = (0x01306B47).to_bytes(4, "little")  # how ncnn marks half precision
    for weights, said in (
        (half + whole[4:], "said to be other than float32"),
        (whole[:-8], "its layers read .* bytes"),
        (whole + bytes(8), "its layers read .* bytes"),
    ):
        path.write_bytes(weights)
        describe(path, spec, there.param)
        with pytest.raises(ArtefactError, match=said):
            NcnnNetwork(open_model(path))


def test_a_spec_of_another_shape_is_refused(ncnn_path: Path) -> None:
    spec = msgspec.structs.replace(open_model(ncnn_path).spec, image_shape=(1, 16, 16))
    with pytest.raises(ArtefactError, match="unlike that of its ModelSpec"):
        Sampler.load(ncnn_path, spec=spec)


def test_a_damaged_file_is_told(ncnn_path: Path, tmp_path: Path) -> None:
    whole, path = ncnn_path.read_bytes(), tmp_path / "m.ncnn"
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtefactError, match=r"is empty|is not a whole \.ncnn file"):
            open_model(path)
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ArtefactError, match=r"is not what ddpm-export wrote: .*\. Export it again$"):
        Sampler.load(path)
    path.write_bytes(whole[4:])
    with pytest.raises(ArtefactError):
        Sampler.load(path)


def test_weights_that_are_not_finite_are_told(ncnn_path: Path, tmp_path: Path) -> None:
    there, path = NcnnFile(ncnn_path), tmp_path / "m.ncnn"
    path.write_bytes(b"\0\0\0\0" + b"\0\0\xc0\x7f" + ncnn_path.read_bytes()[8 : there.weights])
    describe(path, open_model(ncnn_path).spec, there.param)
    assert "not finite in its weights" in command("verify", path, "--proof", proof_path(ncnn_path)).output


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    end = io.BytesIO()
    with zipfile.ZipFile(end, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return end.getvalue()


def test_a_zip_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    names, path = ("model.param", "spec.json", "sha256"), tmp_path / "m.ncnn"
    ours = dict.fromkeys(names, b"{}")
    for end in (
        packed({}),
        packed({"../../x": b"1"}),
        packed({**ours, "more": b""}),
        packed({**ours, "sha256": b"0" * 65}),
        packed({**ours, "spec.json": b" " * 5000}),
        packed({**ours, "model.param": bytes(8 << 20)}, zipfile.ZIP_DEFLATED),
        packed({**ours, "model.param": "7767517 \N{SNOWMAN}".encode()}),
    ):
        path.write_bytes(bytes(64) + end)
        with pytest.raises(ArtefactError, match=r"is not a whole \.ncnn file"):
            open_model(path)
    path.write_bytes(bytes(63) + packed(ours))
    with pytest.raises(ArtefactError, match="no whole float32 numbers"):
        open_model(path)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_commands_take_it(ncnn_path: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    ran = command("run", ncnn_path, "--steps", 3, "--count", 2, "-o", tmp_path / "x.png")
    assert ran.exit_code == 0, ran.output
    assert "within tolerance" in command("verify", ncnn_path).output
    verified = command("verify", checkpoint_path, ncnn_path, "--count", 1, "--steps", 5)
    assert verified.exit_code == 0, verified.output
    shown = command("inspect", ncnn_path).output
    assert re.search(r"same_bits +True", shown)


def test_export_writes_it_on_demand(checkpoint_path: Path, onnx_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    for source, copy in ((onnx_path, model), (proof_path(onnx_path), proof_path(model))):
        copy.write_bytes(source.read_bytes())
    made = command("export", model, "--ncnn")
    assert made.exit_code == 0, made.output
    assert "checked against its proof in ncnn" in made.output
    assert open_model(tmp_path / "model.ncnn").intact
    again = command("export", model, "-o", tmp_path / "model.ncnn")  # the same model may be written again
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--fp16"],
            "--precision fp16 cannot be given with --ncnn: a .ncnn file is in float32, and no engine",
        ),
        (["--precision", "bf16", "--all"], "--precision bf16, --all cannot be given with --ncnn"),
        (["--engine", "--rtx"], "--engine, --rtx cannot be given with --ncnn"),
        (["-o", "x.onnx"], "the name of the output must end in .ncnn"),
    ],
)
def test_export_refuses_what_ncnn_has_not(checkpoint_path: Path, words: list[str], said: str) -> None:
    refused = command("export", checkpoint_path, "--ncnn", *words)
    assert refused.exit_code in (1, 2)
    assert said in refused.output


def test_it_runs_on_the_cpu_and_in_ncnn_alone(ncnn_path: Path, onnx_path: Path) -> None:
    with pytest.raises(SettingError, match="runs on the CPU alone: leave device out, or say cpu, not cuda"):
        Sampler.load(ncnn_path, device="cuda")
    with pytest.raises(SettingError, match=r"is not a \.ncnn file$"):
        Sampler.load(onnx_path, backend="ncnn")
    with pytest.raises(SettingError, match=r"is not an \.onnx file$"):
        Sampler.load(ncnn_path, backend="onnxruntime")


def test_a_missing_package_is_told(ncnn_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(
        DependencyError, match=re.escape(f"ncnn is not installed: {pip_install('ncnn', 'ncnn')}")
    ):
        Sampler.load(ncnn_path)


def test_a_processor_without_avx2_is_told(ncnn_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(ncnn, "cpu_support_x86_avx2", lambda: 0)
    with pytest.raises(BackendError, match=r"has no AVX2, .*: run the \.onnx of this model in ONNX Runtime"):
        Sampler.load(ncnn_path)


# --- processes and threads --------------------------------------------------------------------------------------------


def test_a_run_needs_neither_torch_nor_onnx(ncnn_path: Path, tmp_path: Path) -> None:
    words = ["run", str(ncnn_path), "--steps", "2", "--count", "3", "-o", str(tmp_path / "x.npz")]
    code = (
        f"import sys; from ddpm_deploy.cli import main; main({words}, standalone_mode=False); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'requests') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


def test_opening_it_does_not_import_ncnn(ncnn_path: Path) -> None:
    code = (
        "import sys; from ddpm_deploy.model_file import open_model; "
        f"model = open_model({str(ncnn_path)!r}); assert model.intact; print(model.kind, 'ncnn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split() == ["ncnn", "False"], result.stderr


def test_a_child_of_a_fork_loads_it_anew(ncnn_path: Path) -> None:
    """ncnn's own threads stayed in the parent, and whatever waits for those waits for ever."""
    with Sampler.load(ncnn_path, threads=2) as sampler:
        wanted = sampler.sample(3, steps=2, seed=0)
        child = os.fork()
        if not child:
            signal.alarm(30)
            with Sampler.load(ncnn_path, threads=2) as other:
                os._exit(0 if (other.sample(3, steps=2, seed=0) == wanted).all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (sampler.sample(3, steps=2, seed=0) == wanted).all()


def test_closing_ends_its_threads(ncnn_path: Path) -> None:
    network = NcnnNetwork(open_model(ncnn_path), threads=3, max_batch=4)
    spec = network.spec
    ask(network, *questions(spec, 4))
    assert "crew" in str(threading.enumerate())
    network.close()
    network.close()
    assert "crew" not in str(threading.enumerate())
    with pytest.raises(BackendError, match="is closed: load it again"):
        network.enqueue(1)


def test_the_doctors_chain_runs_in_it() -> None:
    with gaussian.ncnn_model() as model:
        assert model.intact
        assert model.spec == gaussian.SPEC
        with Sampler.load(model.path, threads=2) as sampler:
            images = sampler.sample(9, seed=1)
    assert abs(images - gaussian.exact_images(9, seed=1)).max() < DOCTOR
