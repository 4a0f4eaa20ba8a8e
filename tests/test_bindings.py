"""Every attribute of TensorRT's bindings that the code touches, looked up in real bindings of each flavour.

The bindings' wheels of TensorRT install anywhere; they import where shared libraries of the names that they need exist,
and here these hold functions that are never called.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BINDINGS = ROOT / ".venv-bindings"
VERSIONS = ("10.16.1.11", "11.4.0.106")

# The classes of what the code calls by these names, and of what these methods give.
VARIABLES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "layer": "ILayer",
    "tensor": "ITensor",
    "problem": "ParserError",
    "runtime": "Runtime",
    "cuda_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "kinds": "LayerType",
    "severity": "ILogger.Severity",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
RESULTS = {
    "get_input": "ITensor",
    "get_timing_cache": "ITimingCache",
    "deserialized": "ICudaEngine",
}
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LOOK_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
missing = []
for name in json.loads(sys.stdin.read()):
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        missing.append(name)
print(json.dumps([module.__version__, missing]))
"""


def touched() -> list[str]:
    """The attributes, as Class.attribute or Enumeration.member."""
    names: set[str] = set()
    package = ROOT / "ddpm_deploy"
    for path in (*(package / "engine").glob("*.py"), package / "runtime" / "backends" / "tensorrt.py"):
        names |= set(attributes(ast.parse(path.read_text()), VARIABLES))
    return sorted(names)


def attributes(tree: ast.AST, classes: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        match node.value:
            case ast.Name(id="trt"):
                yield node.attr
            case ast.Attribute(value=ast.Name(id="trt"), attr=parent):
                yield f"{parent}.{node.attr}"
            case ast.Name(id=variable) if variable in classes:
                yield f"{classes[variable]}.{node.attr}"
            case ast.Call(func=ast.Attribute(attr=method) | ast.Name(id=method)) if method in RESULTS:
                yield f"{RESULTS[method]}.{node.attr}"


def look_up(module: str, environment: dict[str, str]) -> tuple[str, set[str]]:
    """The version of some bindings, and what they lack of what is touched."""
    result = subprocess.run(
        [sys.executable, "-c", LOOK_UP, module],
        input=json.dumps(touched()),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    version, missing = json.loads(result.stdout)
    return version, set(missing)


def test_what_is_touched_is_found() -> None:
    """That the search above finds what it must."""
    names = touched()
    assert {"Builder", "BuilderFlag.TF32", "IBuilderConfig.clear_flag", "ParserError.node_operator"} <= set(
        names
    )
    assert {"ITensor.dtype", "OnnxParser.supports_operator", "ICudaEngine.name"} <= set(names)
    assert {"LayerType.SOFTMAX", "ILogger.Severity.WARNING", "IExecutionContext.execute_async_v3"} <= set(
        names
    )
    assert "EngineInspector" in {name.partition(".")[0] for name in names}
    assert len(names) > 50


def test_tensorrt_rtx_has_it_all() -> None:
    pytest.importorskip("tensorrt_rtx")
    _, missing = look_up("tensorrt_rtx", {})
    assert missing == set()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shared libraries with the names that the bindings ask for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for major in {version.split(".")[0] for version in VERSIONS}:
        for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            name = f"lib{library}.so.{major}"
            subprocess.run(
                [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True
            )
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_has_it_all(stand_ins: Path, version: str) -> None:
    """But for what only TensorRT-RTX has, and is only asked for of it."""
    folder = BINDINGS / version
    if not (folder / "tensorrt_bindings").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"tensorrt-cu13-bindings=={version}"], check=True)
    found, missing = look_up(
        "tensorrt_bindings", {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stand_ins)}
    )
    assert found == version
    assert missing == RTX_ONLY
