"""CuPy's own code over a pretended CUDA runtime, in a process of its own: see tests/pretended_cuda.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_deploy.runtime.device.kernel import kernel_source
from tests.host_device import build

TESTS = Path(__file__).parent
OLDEST = TESTS.parent / ".venv" / "oldest"  # the Makefile puts it there


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.parametrize("cupy", ["installed", "oldest"])
@pytest.mark.parametrize("name", ["test_gpu.py", "pretended_cases.py"])
def test_over_a_pretended_gpu(name: str, cupy: str, tmp_path: Path) -> None:
    if cupy == "oldest" and not OLDEST.is_dir():
        pytest.skip("the oldest CuPy is not there: make .venv/installed")
    pytest.importorskip("cuda.bindings.nvrtc")
    build(kernel_source())  # or there is no compiler
    options = ["-n", "0", "-p", "tests.pretended_cuda", "-p", "no:cacheprovider", f"--basetemp={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *options, TESTS / name]
    first = {"PYTHONPATH": str(OLDEST)} if cupy == "oldest" else {}
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=os.environ | first)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
