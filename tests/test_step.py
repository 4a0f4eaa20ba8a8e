"""step.cu: compiled for every GPU that is supported, and run on the CPU, where a race would show."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy import reference
from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.engine.build import EngineSettings
from ddpm_deploy.errors import BackendError, DependencyError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network, tensorrt
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.device import kernel
from ddpm_deploy.runtime.device.kernel import OPTIONS, compiled, kernel_source
from ddpm_deploy.runtime.protocols import SLOT
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Flavour
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, tiny_spec
from tests.test_chain import every_column_table, start

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
TABLE = every_column_table(0, 12)


def test_the_source_is_short_and_compiled_without_contraction() -> None:
    source = Path(kernel.__file__).with_name("step.cu").read_text()
    assert len(source.splitlines()) < 150
    assert {"--fmad=false", "--ftz=false"} <= set(OPTIONS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_it(architecture: str) -> None:
    """As on the GPU itself; this needs none."""
    pytest.importorskip("cuda.bindings.nvrtc")
    cubin = compiled(kernel_source(), architecture)
    assert cubin.startswith(b"\x7fELF")
    assert b"step" in cubin


def ptx(architecture: str, *options: str) -> str:
    """What NVRTC makes of the kernel before it is an architecture's own code."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    _, program = nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"step.cu", 0, [], [])
    every = [option.encode() for option in (f"--gpu-architecture=compute_{architecture}", *options)]
    assert not int(nvrtc.nvrtcCompileProgram(program, len(every), every)[0])
    text = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    assert not int(nvrtc.nvrtcGetPTX(program, text)[0])
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


def inexact(text: str) -> set[str]:
    """Instructions on floats that may give other bits than IEEE 754's: fused, flushing, approximate, or whose rounding
    is not said, which the next compiler may fuse."""
    instructions = set(
        re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)*\.f(?:32|64))\b", text, re.MULTILINE)
    )
    return {
        each
        for each in instructions
        if re.search(r"fma|\bmad|ftz|approx|\.full", each)
        or (re.match(r"(add|sub|mul|div|sqrt|rcp)\.", each) and ".rn." not in each)
    }


@pytest.mark.parametrize("architecture", ["75", "90", "120"])
def test_every_instruction_rounds_as_ieee_754_says(architecture: str) -> None:
    """Asserted of what NVRTC made; and with its own defaults, or fast ones, it would not be so."""
    text = ptx(architecture, *OPTIONS)
    assert len(re.findall(r"\b(?:add|mul)\.rn\.f(?:32|64)\b", text)) > 100
    assert inexact(text) == set()
    assert any("fma" in each for each in inexact(ptx(architecture)))
    fast = inexact(ptx(architecture, "--use_fast_math", "--fmad=false"))
    assert any("approx" in each for each in fast)
    assert any("ftz" in each for each in fast)


def test_what_nvrtc_does_not_compile_is_told() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(BackendError, match="does not compile the kernel for sm_86: NVRTC_ERROR_COMPILATION"):
        compiled("no CUDA C", "86")
    with pytest.raises(BackendError, match="for sm_35: NVRTC_ERROR_INVALID_OPTION"):
        compiled(kernel_source(), "35")


def no_library() -> None:
    """As cuda.bindings answers the first call where there is no libnvrtc."""
    raise RuntimeError("Failed to dlopen libnvrtc.so.13")


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_nvrtc_is_told_before_minutes_of_building(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: Flavour
) -> None:
    built: list[object] = []
    monkeypatch.setattr(kernel, "require", lambda module, extra: SimpleNamespace(nvrtcVersion=no_library))
    monkeypatch.setattr(tensorrt, "settings_here", lambda *_: EngineSettings(flavour=flavour))
    monkeypatch.setattr(tensorrt, "built_on_arrival", lambda *_, **settings: built.append(settings))
    brings = {"tensorrt": "'tensorrt-cu13>=10.16'", "tensorrt-rtx": "'tensorrt-rtx>=1.3'"}[flavour]
    with pytest.raises(DependencyError, match=rf"NVRTC does not load .*libnvrtc.*pip install .*{brings}"):
        load_network(open_model(onnx_path), LoadSettings(device="cuda"), backend="tensorrt")
    assert built == []
    with pytest.raises(DependencyError, match="NVRTC does not load"):
        compiled(kernel_source(), "86")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_it(tmp_path: Path) -> None:
    source = tmp_path / "step.cu"
    source.write_text(kernel_source())
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [
        "nvcc",
        *targets,
        "-fmad=false",
        "-Werror",
        "all-warnings",
        "-fatbin",
        "-o",
        tmp_path / "s",
        source,
    ]
    subprocess.run(command, check=True)


def chained(
    spec: ModelSpec, source: str | None = None, seed: int = 0, table: StepTable = TABLE
) -> np.ndarray[Any, Any]:
    """The images of two chains, the second started a step after the first; source: of another kernel."""
    device = HostDevice(seed)
    if source is not None:
        compiled = device.compile
        device.compile = lambda _, name: compiled(source, name)  # type: ignore[method-assign]
    chain = Chain(DeviceNetwork(ArrayNetwork(spec, 3), device))  # type: ignore[arg-type]
    for slot in (0, 2):
        start(chain, slot, table, 7, slot)
        chain.step()
    for _ in range(len(table) + 3):
        if chain.active.any():
            chain.step()
    return chain.images(np.array([0, 2]))


def expected(spec: ModelSpec, table: StepTable = TABLE) -> np.ndarray[Any, Any]:
    """The same by reference.py."""
    network = ArrayNetwork(spec, 1)

    def last(index: int) -> Iterator[np.ndarray[Any, Any]]:
        return reference.chain(
            lambda x, t: network.answer(x[None], np.array([t]))[0], table, spec.image_shape, 7, index
        )

    return np.stack([list(last(index))[-1] for index in (0, 2)])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 5, 7), (1, 16, 32), (3, 20, 30)])
@pytest.mark.parametrize("dim", [8, 301])
def test_odd_sizes_equal_the_reference_bit_for_bit(shape: tuple[int, int, int], dim: int) -> None:
    """One number, blocks that are not full, several blocks; an embedding wider than the image has threads."""
    spec = msgspec.structs.replace(
        tiny_spec(shape, timesteps=30, network=None), embedding=SinusoidalEmbedding(dim=dim)
    )
    np.testing.assert_array_equal(chained(spec).view(np.uint32), expected(spec).view(np.uint32))


def test_the_order_of_threads_has_no_say() -> None:
    spec = tiny_spec((3, 20, 30), timesteps=30, network=None)
    wanted = expected(spec)
    for seed in range(1, 6):
        np.testing.assert_array_equal(chained(spec, seed=seed), wanted)


@pytest.mark.parametrize(
    ("correct", "planted"),
    [
        ("    __syncthreads();", "    ;"),
        ("== gridDim.x - 1", ">= 0"),  # the first block to arrive moves the slot on
        ("const Slot slot = slots[index];", "const Slot &slot = slots[index];"),  # read again later
    ],
)
def test_a_planted_race_is_caught(correct: str, planted: str) -> None:
    """In some order of some ten: the images differ, or the chain walks out of its table."""
    spec = tiny_spec((3, 20, 30), timesteps=30, network=None)
    source = kernel_source()
    assert source.count(correct) == 1
    wanted = expected(spec)
    assert any(
        not np.array_equal(apart(source.replace(correct, planted), seed), wanted) for seed in range(10)
    )


APART = """
import sys
import numpy as np
from tests.models import tiny_spec
from tests.test_step import chained
spec = tiny_spec((3, 20, 30), timesteps=30, network=None)
np.save(sys.argv[2], chained(spec, sys.stdin.read(), int(sys.argv[1])))
"""


def apart(source: str, seed: int) -> np.ndarray[Any, Any] | None:
    """`chained` in a process of its own, as a wrong kernel may write anywhere; None where it dies of that."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        command = [sys.executable, "-c", APART, str(seed), file.name]
        result = subprocess.run(command, input=source, text=True, capture_output=True, cwd=ROOT)
        if result.returncode == 0:
            images: np.ndarray[Any, Any] = np.load(file.name)
            return images
        assert result.returncode < 0 or "assert distance.min() == 0.0" in result.stderr, result.stderr
        return None  # killed, or asked for an embedding that is none


def test_what_was_never_written_would_be_seen() -> None:
    """The stand-in's new memory is NaN: a kernel that reads what it did not write shows it."""
    spec = tiny_spec((1, 2, 2), timesteps=30, network=None)
    source = kernel_source().replace("term(row[F], *x0)", "row[F] * *x0")  # 0 times what was there before x_T
    assert not np.array_equal(chained(spec, source), expected(spec))


def test_a_place_is_what_the_kernel_reads() -> None:
    """Field by field as `struct Slot` lists them, in words of four bytes."""
    source = Path(kernel.__file__).with_name("step.cu").read_text()
    start = source.index("struct Slot {")
    struct = source[start : source.index("};", start)]
    names = [
        "row,",
        "end;",
        "key[2];",
        "sample[2];",
        "partner;",
        "scale;",
        "given;",
        "arrived;",
        "broken;",
        "share_until;",
    ]
    places = [struct.index(name) for name in names]
    assert places == sorted(places)
    offsets = [SLOT.fields[name][1] for name in SLOT.names or ()]  # type: ignore[index]
    assert offsets == [0, 4, 8, 16, 24, 28, 32, 36, 40, 44]
