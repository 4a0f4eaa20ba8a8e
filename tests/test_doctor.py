"""ddpm-deploy doctor: its known model against theory, what it says of machines, and that wrong numbers are seen."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy.doctor import backends as doctor
from ddpm_deploy.doctor import gaussian
from ddpm_deploy.errors import BackendError
from ddpm_deploy.gpu import Driver, Gpu, driver
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.tolerances import DOCTOR
from tests.models import GaussianNetwork
from tests.test_cli import call, refused

ROOT = Path(__file__).parent.parent
OLD = Driver("550.54", "12.4", (Gpu("A10", "8.6", 1),))
NEW = Driver("580.65", "13.0", (Gpu("A10", "8.6", 1),))
ANCIENT = Driver("470.1", "11.4", (Gpu("A10", "8.6", 1),))
NONE = Driver(problem="no NVIDIA driver is installed (libcuda.so.1 is not there)")


@pytest.fixture
def model() -> Iterator[ModelFile]:
    with gaussian.onnx_model() as model:
        yield model


def test_the_known_model_is_the_one_that_its_maker_makes(model: ModelFile) -> None:
    onnx = pytest.importorskip("onnx")
    from tests.golden.gaussian import model as made

    shipped, again = onnx.load(model.path), made()
    onnx.checker.check_model(shipped, full_check=True)
    assert model.spec == gaussian.SPEC
    assert model.path.stat().st_size < 3000
    assert shipped.graph.node == again.graph.node
    for mine, theirs in zip(shipped.graph.initializer, again.graph.initializer, strict=True):
        to_array = onnx.numpy_helper.to_array  # another machine's solver may differ in the last places
        np.testing.assert_allclose(to_array(mine), to_array(theirs), rtol=1e-4, atol=1e-6)


def test_the_network_is_the_optimal_one(model: ModelFile) -> None:
    """Against the closed form as the tests write it, at every t."""
    timesteps = gaussian.SPEC.timesteps
    x = np.random.default_rng(0).standard_normal((timesteps, *gaussian.SPEC.image_shape)).astype(np.float32)
    got = ask(OrtNetwork(model, max_batch=timesteps), x, gaussian.SPEC.embedding.table(timesteps))
    optimal = GaussianNetwork(gaussian.SPEC, timesteps, gaussian.MEAN, gaussian.STD)
    np.testing.assert_allclose(got, optimal.answer(x, np.arange(timesteps)), atol=1e-5)


def test_theory_and_the_chain_agree(model: ModelFile) -> None:
    """The recursion for the moments, the exact chain, and the real one, which are three pieces of code."""
    mean, variance = gaussian.moments()
    exact = gaussian.exact_images(512, seed=1)
    assert abs(exact.mean() - mean) < 4 * (variance / exact.size) ** 0.5
    assert abs(exact.var() / variance - 1) < 4 * (2 / exact.size) ** 0.5
    assert mean == pytest.approx(gaussian.MEAN, abs=1e-3)
    assert variance != pytest.approx(gaussian.STD**2, rel=0.1)  # twelve steps are not the data's
    with Sampler.load(model.path) as sampler:
        images = sampler.sample(64, seed=1)
    assert abs(images - exact[:64]).max() < DOCTOR


def versions(*packages: str) -> dict[str, str]:
    """As `installed` gives them: name=version, or 1.2.3."""
    parts = (package.partition("=") for package in packages)
    return {name: version or "1.2.3" for name, _, version in parts}


@pytest.mark.parametrize(
    ("packages", "machine", "says", "mend"),
    [
        (
            ["onnxruntime", "onnxruntime-gpu"],
            NONE,
            "overwrites the other's files",
            "pip uninstall -y onnxruntime ",
        ),
        (
            ["tensorrt-cu13"],
            OLD,
            "550.54 runs CUDA 12.4 and older, and tensorrt-cu13 is of CUDA 13",
            "pip install 'cuda-bindings<13,>=12.6' 'cupy-cuda12x>=14'",
        ),
        (["cupy-cuda13x"], OLD, "cupy-cuda13x is of CUDA 13", "pip uninstall -y cupy-cuda13x && "),
        (["tensorrt-cu12"], ANCIENT, "tensorrt-cu12 is of CUDA 12", "update the NVIDIA driver to r535"),
        (["tensorrt-cu13"], ANCIENT, "tensorrt-cu13 is of CUDA 13", "update the NVIDIA driver to r580"),
        (["tensorrt-cu13", "tensorrt-cu12"], NEW, "both installed", "&& pip install tensorrt-cu13"),
        (["cupy-cuda13x", "cupy-cuda12x"], OLD, "both installed", "&& pip install cupy-cuda12x"),
        (
            ["tensorrt-cu13-bindings"],
            NONE,
            "without tensorrt-cu13-libs",
            "pip install tensorrt-cu13-libs==1.2.3",
        ),
        (
            ["onnxruntime-gpu=1.31.1"],
            OLD,
            "onnxruntime-gpu is of CUDA 13",
            "pip uninstall -y onnxruntime-gpu && ",
        ),
        (["nvidia-cuda-nvrtc=13.0.48"], OLD, "nvidia-cuda-nvrtc is of CUDA 13", "r580 or newer"),
        (
            ["onnxruntime-gpu=1.26.0", "nvidia-cudnn-cu13"],
            NEW,
            "the cuDNN of CUDA 12",
            "onnxruntime-gpu[cuda",
        ),
        (
            ["onnxruntime-gpu=1.28.0", "nvidia-cudnn-cu12"],
            NEW,
            "the cuDNN of CUDA 13",
            "onnxruntime-gpu[cuda",
        ),
        (["cupy-cuda13x"], NEW, "cupy-cuda13x is installed without NVRTC", "'nvidia-cuda-nvrtc<14,>=13'"),
    ],
)
def test_what_cannot_work_together(packages: list[str], machine: Driver, says: str, mend: str) -> None:
    found = doctor.problems(versions(*packages), machine)
    (right,) = [finding for finding in found if says in finding.says]
    assert (right.state, mend in right.mend) == ("broken", True)


@pytest.mark.parametrize(
    ("packages", "machine"),
    [
        ("onnxruntime", NONE),
        ("onnxruntime-gpu libcudnn.so.9", NEW),
        ("onnxruntime-gpu=1.31.1 nvidia-cudnn-cu13", NEW),
        ("onnxruntime-gpu=1.26.0 nvidia-cudnn-cu12", OLD),
        ("tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs cupy-cuda13x NVRTC=13.0", NEW),
        ("tensorrt-cu12 tensorrt-cu12-bindings tensorrt-cu12-libs cupy-cuda12x NVRTC=12.9", OLD),
        ("cuda-bindings=12.9.1 nvidia-cuda-nvrtc-cu12=12.9.86 NVRTC=12.9", OLD),
        ("tensorrt-cu13 tensorrt-rtx", NONE),  # to build elsewhere
        ("", NONE),
    ],
)
def test_what_works_together(packages: str, machine: Driver) -> None:
    assert doctor.problems(versions(*packages.split()), machine) == []


def test_what_is_installed_here_is_named_with_its_cuda() -> None:
    """As far as it is: NVRTC where it loads, whatever package it came with."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    packages = doctor.installed()
    assert packages["NVRTC"] == ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    found = json.loads(call("doctor", "--json").stdout)["cuda"]
    assert found["NVRTC"] == found["cuda-bindings"] == 13
    assert "numpy" not in found
    assert "cuda-bindings 13." in (shown := call("doctor").stdout)
    assert "(CUDA 13)" in shown


def test_the_backends_of_other_machines(model: ModelFile) -> None:
    """As far as names tell: what is missing, and the line that mends it."""
    for machine, says, mend in (
        (NONE, "needs an NVIDIA GPU, and none is visible", "install its driver"),
        (
            Driver("580", "13.0", (), "the NVIDIA driver shows no device"),
            "none is visible",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            Driver("580", "13.0", (Gpu("P100", "6.0", 1),)),
            "does not know compute capability 6.0",
            "ONNX Runtime",
        ),
    ):
        found = doctor._on_tensorrt(model, {}, machine)
        assert (found.state, says in found.says, mend in found.mend) == ("absent", True, True)
    assert doctor._on_onnxruntime(model, {}, NONE).mend == "pip install 'onnxruntime>=1.20' 'pillow>=11'"
    pytest.importorskip("tensorrt_rtx")
    hopper = Driver("580", "13.0", (Gpu("H100", "9.0", 1),))
    found = doctor._on_tensorrt_rtx(model, {}, hopper)
    assert (found.state, "none for compute capability 9.0" in found.says) == ("builds", True)
    assert "use TensorRT on this GPU: pip install 'cuda-bindings" in found.mend
    assert "'tensorrt-cu13>=10.16'" in found.mend


@pytest.mark.parametrize(
    "content",
    [
        "raise ImportError('DLL\\nload failed')",
        "raise RuntimeError('no')",
        "",
        "__version__ = 'x'",
        "syntax error",
        "exit(3)",
    ],
)
def test_a_broken_package_is_told_and_the_rest_goes_on(tmp_path: Path, content: str) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(content)
    command = [sys.executable, "-c", "from ddpm_deploy.cli import main; main()", "doctor", "--json"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    states = {finding["name"]: finding["state"] for finding in json.loads(result.stdout)["backends"]}
    assert states["ONNX Runtime, CPU"] == "works"
    assert states["TensorRT-RTX"] == "broken"


class Wrong(OrtNetwork):
    """A backend that is off by a little, or broken."""

    def __init__(self, model: ModelFile, shift: float) -> None:
        super().__init__(model)
        self.shift = shift

    def enqueue(self, bucket: int) -> None:
        super().enqueue(bucket)
        self.memory["prediction"][:bucket] += self.shift
        if np.isnan(self.shift):
            raise BackendError("the driver went away")


def test_wrong_numbers_are_seen(model: ModelFile) -> None:
    right = doctor._chain_finding("it", "mend it", lambda: Wrong(model, 0.0))
    assert (right.state, right.mend) == ("works", "")
    for shift, says in (
        (1e-4, "WRONG NUMBERS"),
        (0.1, "WRONG NUMBERS"),
        (float("nan"), "the driver went away"),
    ):
        wrong = doctor._chain_finding("it", "mend it", lambda shift=shift: Wrong(model, shift))  # type: ignore[misc]
        assert (wrong.state, wrong.mend, wrong.says.startswith(says)) == ("broken", "mend it", True)


@pytest.mark.parametrize(("attribute", "value"), [("epsilon", 1e-5), ("num_groups", 1)])
def test_a_wrong_normalisation_is_seen(
    model: ModelFile, tmp_path: Path, attribute: str, value: float
) -> None:
    """As of a backend that takes it for another one."""
    onnx = pytest.importorskip("onnx")
    other = onnx.load(model.path)
    (norm,) = (node for node in other.graph.node if node.op_type == "GroupNormalization")
    (changed,) = (each for each in norm.attribute if each.name == attribute)
    changed.CopyFrom(onnx.helper.make_attribute(attribute, value))
    onnx.save(other, tmp_path / "other.onnx")
    found = doctor._chain_finding("it", "mend it", lambda: OrtNetwork(open_model(tmp_path / "other.onnx")))
    assert (found.state, found.says.startswith("WRONG NUMBERS")) == ("broken", True)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "works   ONNX Runtime, CPU  64 images by 12 steps on cpu: mean 0.29" in result.stdout
    assert "models run here on: ONNX Runtime, CPU" in result.stdout
    found = json.loads(call("doctor", "--json").stdout)
    assert found["backends"][0]["state"] == "works"
    assert found["driver"]["gpus"] == [dict(vars(gpu)) for gpu in driver().gpus]

    def nowhere(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nowhere)
    result = call("doctor")
    assert result.exit_code == 1
    assert "models run here on: nothing yet" in result.stdout
    assert "→ pip install 'onnxruntime>=1.20' 'pillow>=11'\n" in result.stdout
    refused(call("doctor", "x"), 2, "unexpected extra argument")


def test_the_driver_is_asked_without_raising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ddpm_deploy import gpu

    monkeypatch.setattr(gpu, "_LIBRARY", "no-such-library.so.1")
    monkeypatch.setattr(gpu, "_VERSION_FILE", tmp_path / "version")
    assert gpu.driver() == Driver(problem="no NVIDIA driver is installed (no-such-library.so.1 is not there)")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2026\nGCC version: 12\n"
    )
    assert gpu.driver().version == "580.65.06"
    (tmp_path / "version").write_text("")
    assert gpu.driver().version == ""
