"""What is shipped, what it imports, and that it runs without torch."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ddpm_deploy

ROOT = Path(__file__).parent.parent
MODULES = [
    "__init__",
    "arrays",
    "bench/__init__",
    "bench/candidates",
    "bench/measure",
    "bench/process",
    "bench/worker",
    "bound",
    "bulk/__init__",
    "bulk/manifest",
    "bulk/merge",
    "bulk/ray",
    "bulk/shards",
    "bulk/versions",
    "bulk/worker",
    "bulk/source",
    "cli/__init__",
    "cli/bench",
    "cli/bodies/__init__",
    "cli/bodies/bench",
    "cli/bodies/between",
    "cli/bodies/chain",
    "cli/bodies/check",
    "cli/bodies/cluster",
    "cli/bodies/distances",
    "cli/bodies/doctor",
    "cli/bodies/engine",
    "cli/bodies/evaluate",
    "cli/bodies/export",
    "cli/bodies/importing",
    "cli/bodies/inspect",
    "cli/bodies/merge",
    "cli/bodies/models",
    "cli/bodies/ncnn",
    "cli/bodies/outputs",
    "cli/bodies/progress",
    "cli/bodies/replay",
    "cli/bodies/report",
    "cli/bodies/resume",
    "cli/bodies/run",
    "cli/bodies/serve",
    "cli/bodies/shards",
    "cli/bodies/sources",
    "cli/bodies/to_onnx",
    "cli/bodies/train",
    "cli/bodies/verify",
    "cli/check",
    "cli/common",
    "cli/doctor",
    "cli/evaluate",
    "cli/export",
    "cli/inspect",
    "cli/merge",
    "cli/options",
    "cli/replay",
    "cli/resume",
    "cli/run",
    "cli/serve",
    "cli/train",
    "cli/verify",
    "dependencies",
    "doctor/__init__",
    "doctor/backends",
    "doctor/gaussian",
    "embedding",
    "engine/__init__",
    "engine/bindings",
    "engine/build",
    "engine/cache",
    "engine/layers",
    "engine/load",
    "errors",
    "evaluate/__init__",
    "evaluate/data",
    "evaluate/efficientnet",
    "evaluate/features",
    "evaluate/frechet",
    "evaluate/inception",
    "evaluate/kernel",
    "evaluate/likelihood",
    "exponential",
    "export/__init__",
    "export/bits",
    "export/graph",
    "export/ncnn",
    "export/precision",
    "files",
    "gpu",
    "importers/__init__",
    "importers/check",
    "importers/dialects",
    "importers/diffusers/__init__",
    "importers/diffusers/folder",
    "importers/diffusers/network",
    "importers/diffusers/scheduler",
    "importers/family",
    "importers/flags",
    "importers/ho",
    "importers/imported",
    "importers/lucidrains",
    "importers/module",
    "importers/monai",
    "importers/openai",
    "importers/own",
    "importers/template",
    "importers/told",
    "importers/weights",
    "lazy",
    "machine",
    "model_file",
    "ncnn_file",
    "ncnn_layers",
    "noise",
    "onnx_file",
    "plan",
    "reference",
    "runtime/__init__",
    "runtime/backends/__init__",
    "runtime/backends/ncnn",
    "runtime/backends/norms",
    "runtime/backends/onnxruntime",
    "runtime/backends/openvino",
    "runtime/backends/split",
    "runtime/backends/tensorrt",
    "runtime/chain",
    "runtime/device/__init__",
    "runtime/device/cuda",
    "runtime/device/host",
    "runtime/device/kernel",
    "runtime/forks",
    "runtime/images",
    "runtime/interpolate",
    "runtime/network",
    "runtime/parity",
    "runtime/preview",
    "runtime/proof",
    "runtime/protocols",
    "runtime/request",
    "runtime/sampler",
    "runtime/snapshot",
    "schedule",
    "serve/__init__",
    "serve/admission",
    "serve/answers",
    "serve/batcher",
    "serve/bodies",
    "serve/document",
    "serve/elsewhere",
    "serve/events",
    "serve/feed",
    "serve/handle",
    "serve/http",
    "serve/inference",
    "serve/metrics",
    "serve/openai",
    "serve/openapi",
    "serve/pace",
    "serve/page/__init__",
    "serve/proving",
    "serve/ray",
    "serve/refusals",
    "serve/results",
    "serve/rows",
    "serve/samples",
    "serve/server",
    "serve/service",
    "serve/settings",
    "signals",
    "solvers",
    "spacings",
    "spec",
    "stages",
    "tolerances",
    "train/__init__",
    "train/__main__",
    "train/checkpoint",
    "train/data/__init__",
    "train/data/arrays",
    "train/data/find",
    "train/data/idx",
    "train/data/pictures",
    "train/data/pixels",
    "train/data/read",
    "train/data/scale",
    "train/data/source",
    "train/data/trees",
    "train/diffusion",
    "train/ema",
    "train/memory",
    "train/network",
    "train/noise",
    "train/pictures",
    "train/session",
    "train/settings",
    "train/trainer",
    "train/unet",
    "train/world",
    "version",
    "words",
]
PAGE = ["serve/page/index.html", "serve/page/page.css", "serve/page/page.js"]
DATA = ["doctor/gaussian.ncnn", "doctor/gaussian.onnx", "py.typed", "runtime/device/step.cu", *PAGE]
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "PIL",
    "sklearn",
    "matplotlib",
    "diffusers",
)


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names() -> None:
    assert ddpm_deploy.__all__ == [
        "ArtefactError",
        "BackendError",
        "BusyError",
        "DataError",
        "DdpmDeployError",
        "DeadlineError",
        "DependencyError",
        "ModelSpec",
        "Network",
        "OutputError",
        "OwnershipError",
        "ParityError",
        "Request",
        "Sampler",
        "Schedule",
        "SettingError",
        "Snapshot",
        "SpecError",
        "StepTable",
        "__version__",
        "in_data_range",
        "interpolate",
        "to_uint8",
    ]
    for name in ddpm_deploy.__all__:
        assert getattr(ddpm_deploy, name) is not None
    assert dir(ddpm_deploy) == ddpm_deploy.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ddpm_deploy.nothing


def test_every_error_is_public_and_of_one_tree() -> None:
    from ddpm_deploy import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(error, ddpm_deploy.DdpmDeployError) for error in classes)
    assert {error.__name__ for error in classes} <= set(ddpm_deploy.__all__)
    assert all(error.__name__ in (errors.__doc__ or "") for error in classes)


def test_importing_brings_in_nothing_heavy() -> None:
    code = f"import sys, ddpm_deploy; print([m for m in ('numpy', 'click', 'msgspec', *{HEAVY}) if m in sys.modules])"
    assert python(code).strip() == "[]"
    names = f"[getattr(ddpm_deploy, n) for n in ddpm_deploy.__all__]; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(f"import sys, ddpm_deploy; {names}").strip() == "[]"


def test_running_never_imports_torch(onnx_path: Path, tmp_path: Path) -> None:
    arguments = ["run", str(onnx_path), "--steps", "2", "--count", "1", "-o", str(tmp_path / "x.png")]
    code = (
        f"import sys; from ddpm_deploy.cli import main; main({arguments}, standalone_mode=False); "
        f"print([m for m in ('torch', 'onnx', 'sklearn') if m in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_arrows_point_one_way() -> None:
    """core ← engine ← runtime ← train ← importers ← export, evaluate, doctor, bench, bulk, serve ← cli."""
    order = [
        "core",
        "engine",
        "runtime",
        "train",
        "importers",
        "export",
        "evaluate",
        "doctor",
        "bench",
        "bulk",
        "serve",
        "cli",
    ]
    for path in (ROOT / "ddpm_deploy").rglob("*.py"):
        parts = path.relative_to(ROOT / "ddpm_deploy").parts
        stage = parts[0] if len(parts) > 1 else "core"
        if path.name == "__main__.py":  # a command line by another name, which nobody imports
            stage = "cli"
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("from", "import") and words[1].startswith("ddpm_deploy."):
                target = words[1].split(".")[1]
                target = target if target in order else "core"
                if parts != ("__init__.py",):  # the public face, which imports lazily
                    assert order.index(target) <= order.index(stage), f"{path}: {line.strip()}"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


def test_wheel_content(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = sorted(name for name in names if ".dist-info/" not in name)
    assert package == sorted(
        [f"ddpm_deploy/{name}" for name in (*DATA, *(f"{module}.py" for module in MODULES))]
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    ("extra", "right", "wrong", "other"),
    [
        ("gpu", ("1.28.0", "1.31.1"), ("1.26.0", "1.27.0"), r"cu12|cuda12"),
        ("gpu-cu12", ("1.24.1", "1.26.0"), ("1.21.0", "1.27.0", "1.31.1"), r"cu13|cuda13"),
    ],
)
def test_an_extra_for_gpus_is_of_one_cuda(
    distributions: Path, extra: str, right: tuple[str, ...], wrong: tuple[str, ...], other: str
) -> None:
    """onnxruntime-gpu is of CUDA 12 up to 1.26, and brings its libraries by extras, which 1.27 has wrong.

    So their own metadata says: 1.27.0 asks for nvidia-cuda-nvrtc-cu13~=13.0, of which there is only a 0.0.1; and up to
    1.23 a session does not say where it places its nodes.
    """
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])
    brings = {
        each.name: each
        for each in map(Requirement, lines)
        if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate({"extra": ""})
    }
    runtime = brings["onnxruntime-gpu"]
    assert runtime.extras == {"cuda", "cudnn"}
    assert all(runtime.specifier.contains(version) for version in right)
    assert not any(runtime.specifier.contains(version) for version in wrong)
    assert not [name for name in brings if re.search(other, name)]


def test_sdist_content(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "SECURITY.md",
        "tests/test_noise.py",
    } <= names
    assert not any(name.startswith((".", "demo")) and name != ".gitignore" for name in names)


@pytest.fixture(scope="session")
def runtime_python(distributions: Path) -> Path:
    """The Python of an environment with nothing but the wheel's base and its `cpu` extra.

    Kept in .venv-cpu, since filling it takes a while; the wheel itself is installed anew.
    """
    environment = ROOT / ".venv-cpu"
    executable = environment / "bin" / "python"
    (wheel,) = distributions.glob("*.whl")
    pip = [
        executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    ]
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    marker = environment / "installed"
    if not marker.exists() or marker.read_text() != wanted:
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([*pip, f"{wheel}[cpu]"], check=True)
        marker.write_text(wanted)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    return executable


def test_the_runtime_runs_a_whole_chain_without_torch(
    runtime_python: Path, onnx_path: Path, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"]}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    freeze = run(runtime_python, "-m", "pip", "list", "--format=freeze").stdout
    installed = {line.split("==")[0].lower() for line in freeze.splitlines()}
    assert {"ddpm-deploy", "onnxruntime", "numpy", "click", "msgspec", "pillow"} <= installed
    assert not installed & {"torch", "onnx", "onnxscript", "scikit-learn", "diffusers"}

    scripts = runtime_python.parent
    ran = run(scripts / "ddpm-run", onnx_path, "--count", 2, "--seed", 0, "-o", "x.png")
    assert ran.returncode == 0, ran.stderr
    assert "2 images, 1000 steps" in ran.stdout
    assert run(scripts / "ddpm-deploy", "inspect", onnx_path).returncode == 0
    assert run(scripts / "ddpm-deploy", "inspect", onnx_path.with_suffix(".pt")).returncode == 0
    assert run(scripts / "ddpm-verify", onnx_path, onnx_path, "--steps", 5, "--count", 1).returncode == 0
    proven = run(scripts / "ddpm-verify", onnx_path)
    assert proven.returncode == 0, proven.stderr
    assert "at the x_t of its proof (16 timesteps" in proven.stdout

    train = ["pillow>=11", "scikit-learn>=1.5", "torch<2.14,>=2.13"]
    export = ["onnx>=1.19", "onnxscript>=0.5", "safetensors>=0.4", *train]
    for command, package, wanted in (
        (["ddpm-run", onnx_path.with_suffix(".pt")], "torch", train),
        (["ddpm-train", "digits"], "torch", train),
        (["ddpm-export", onnx_path.with_suffix(".pt")], "torch", export),
        (["ddpm-verify", onnx_path, onnx_path, "--plot", "r.png"], "matplotlib", ["matplotlib>=3.9"]),
    ):
        refused = run(scripts / str(command[0]), *command[1:])
        assert refused.returncode == 1
        (line,) = refused.stderr.splitlines()
        told, _, install = line.partition(": pip install ")
        assert told == f"Error: {package} is not installed"
        assert sorted(shlex.split(install)) == sorted(wanted)
