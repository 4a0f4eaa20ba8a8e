"""What a training will take of memory is known before its first step, and one that does not fit is refused."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.machine import memory_limit

torch = pytest.importorskip("torch")

from ddpm_deploy.train.memory import estimate, require_memory  # noqa: E402
from ddpm_deploy.train.settings import PRESETS  # noqa: E402

CPU = torch.device("cpu")


def images(path: Path, size: int) -> Path:
    np.save(path, np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("options", "helps"),
    [
        (["--batch-size", "1"], "try a smaller --image-size, another --preset"),
        (
            ["--batch-size", "4", "--accumulate", "2"],
            "try a smaller --batch-size, --accumulate (in more parts), a smaller",
        ),
    ],
)
def test_a_training_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, options: list[str], helps: str
) -> None:
    """Attention over 65,536 pixels: some 90 GB; where there is as much, over sixteen times as many."""
    data = images(tmp_path / "x.npy", 32)
    size = 1024 if memory_limit() < 64e9 else 4096
    words = ["train", str(data), "-o", str(tmp_path / "m.pt"), "--device", "cpu", "--image-size", str(size)]
    result = CliRunner().invoke(ddpm_deploy, [*words, *options])
    assert result.exit_code == 1, (result.output, result.exception)
    (line,) = result.output.splitlines()
    assert re.match(
        rf"Error: training takes about [\d.]+ GB of memory \([\d.]+ GB of it for a step's .*image.* of "
        rf"3×{size}×{size}\), and [\d.]+ GB can be used here: ",
        line,
    ), line
    assert helps in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what was used")
def test_the_estimate_is_near_what_is_used(tmp_path: Path) -> None:
    """A fresh process, and the most that it ever had."""
    options = ["--image-size", "64", "--batch-size", "8", "--steps", "1", "--sample-every", "0"]
    words = [
        "train",
        str(images(tmp_path / "x.npy", 64)),
        "-o",
        str(tmp_path / "m.pt"),
        "--device",
        "cpu",
        *options,
    ]
    code = (
        "import re, torch\n"
        "from ddpm_deploy.cli import main\n"
        "from ddpm_deploy.train import memory\n"
        "from ddpm_deploy.train.settings import PRESETS\n"
        "spec = PRESETS['small'].spec('x', 3, (64, 64))\n"
        "settings = PRESETS['small'].settings('x', batch_size=8, sample_every=0)\n"
        "print('told', memory.estimate(spec, settings, torch.device('cpu'), 8).total)\n"
        f"main({words!r}, standalone_mode=False)\n"
        "print('used', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, used = (int(re.findall(rf"^{word} (\d+)", done.stdout, re.M)[0]) for word in ("told", "used"))
    assert used / 1.5 < told < used * 1.5


def test_what_takes_memory_and_what_spares_it() -> None:
    small = PRESETS["small"]
    spec = small.spec("x", 3, (32, 32))

    def step(**settings: object) -> int:
        return estimate(spec, small.settings("x", batch_size=16, **settings), CPU, 8).step

    whole = step()
    assert 0.2 < step(accumulate=4) / whole < 0.5
    assert step(amp=True) < whole
    assert (
        whole * 3.5 < estimate(small.spec("x", 3, (64, 64)), small.settings("x", batch_size=16), CPU, 8).step
    )


def test_a_training_that_needs_what_others_have_now_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = PRESETS["small"]
    monkeypatch.setattr("ddpm_deploy.train.memory.memory_available", lambda: 1_000_000)
    require_memory(small.spec("x", 3, (32, 32)), small.settings("x", batch_size=2), CPU, 8)
    assert re.search(r"training takes about .* .B of memory .*, and 1 MB is free now", caplog.text)
