"""What goes wrong around the product: hostile files, two writers, full and read-only disks, little memory."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BIN = Path(sys.executable).parent
_RECORDS = ("metrics.csv", "events.out.tfevents.")  # of a training, which is not lost with its checkpoint
ROOT = Path(__file__).parent.parent


def test_mutated_files(checkpoint_path: Path, onnx_path: Path) -> None:
    """A sample, two for each use of a file; `python -m tests.mutations` is the whole of it."""
    command = [
        sys.executable,
        "-m",
        "tests.mutations",
        "--count",
        "58",
        "--seed",
        "1",
        "--model",
        checkpoint_path,
    ]
    tried = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert "58 files" in tried.stdout


def start(*arguments: object, **settings: Any) -> "subprocess.Popen[str]":
    words = [str(argument) for argument in arguments]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings)


def run(*arguments: object, **settings: Any) -> tuple[int, str]:
    """How a command ended, and what it said on stderr."""
    with start(*arguments, **settings) as process:
        stderr = process.communicate()[1]
    return process.returncode, stderr


def test_two_processes_write_one_output(tmp_path: Path, onnx_path: Path) -> None:
    """Both end well, and the file is one of theirs, whole."""
    output = tmp_path / "x.npz"
    command = (BIN / "ddpm-run", onnx_path, "--steps", 30, "--count", 16, "--threads", 1, "--float")
    for seed in (1, 2):
        assert run(*command, "--seed", seed, "-o", tmp_path / f"{seed}.npz")[0] == 0
    both = [start(*command, "--seed", seed, "-o", output) for seed in (1, 2)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    samples = [np.load(path)["samples"] for path in (output, tmp_path / "1.npz", tmp_path / "2.npz")]
    assert any(np.array_equal(samples[0], other) for other in samples[1:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz", "x.npz"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, checkpoint_path: Path, onnx_path: Path) -> None:
    """One line that says so; what stood there before still stands, and nothing else does."""
    before = small_disk / "x.npz"
    shutil.copy(onnx_path.with_suffix(".proof.npz"), before)
    content = before.read_bytes()
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 20_000))
    for command in (
        (BIN / "ddpm-run", onnx_path, "--steps", 2, "--count", 2000, "-o", before),
        (BIN / "ddpm-export", checkpoint_path, "-o", small_disk / "m.onnx"),
        (BIN / "ddpm-train", "digits", "--steps", 2, "--sample-every", 0, "-o", small_disk / "m.pt"),
    ):
        code, stderr = run(*command)
        assert code == 1, (command, stderr)
        last = stderr.splitlines()[-1]
        assert last.startswith("Error: "), stderr
        assert "no space left on device: free some space there" in last.lower(), last
    assert before.read_bytes() == content
    names = {p.name for p in small_disk.rglob("*") if p.is_file()}
    assert {n for n in names if not n.startswith(_RECORDS)} == {"ballast", "x.npz"}


def test_a_read_only_disk(small_disk: Path, onnx_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, stderr = run(BIN / "ddpm-run", onnx_path, "--steps", 2, "-o", small_disk / "x.png")
    assert code == 1
    assert "cannot be written: read-only file system" in stderr


@pytest.mark.parametrize(("command", "megabytes"), [("run", 700), ("train", 1500)])
def test_little_memory_is_one_line(tmp_path: Path, onnx_path: Path, command: str, megabytes: int) -> None:
    """The system's own limit, not ours: 1024 images of 256×256 in one batch, or a batch of 60,000."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    arguments = {
        "run": (
            BIN / "ddpm-run",
            onnx_path,
            "--count",
            60_000,
            "--batch",
            60_000,
            "--steps",
            2,
            "--threads",
            1,
        ),
        "train": (BIN / "ddpm-train", "digits", "--batch-size", 60_000, "--steps", 2),
    }[command]
    output = tmp_path / ("x.npz" if command == "run" else "x.pt")
    code, stderr = run(*arguments, "-o", output, preexec_fn=limited)
    assert code == 1, stderr
    assert "Traceback" not in stderr
    assert "memory" in stderr.splitlines()[-1], stderr
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob("*.pt"))


def test_a_folder_with_images_of_every_sort(tmp_path: Path) -> None:
    """1×1, 16-bit, CMYK, animated, with alpha, turned by EXIF; names with spaces, newlines and no UTF-8."""
    from ddpm_deploy.train.data import find_images, read_images

    grey16 = Image.fromarray(np.full((9, 7), 40_000, np.uint16))
    turned = Image.new("RGB", (12, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("P", (10, 10), i) for i in range(3)]
    Image.new("L", (1, 1), 7).save(tmp_path / "one pixel.png")
    grey16.save(tmp_path / "sixteen\nbits.png")
    Image.new("CMYK", (9, 9)).save(tmp_path / "cmyk.jpg")
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "alpha.png")
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (9, 9)).save(os.fsdecode(os.fsencode(tmp_path) + b"/no utf-8 \xff.png"))
    data = read_images(find_images(str(tmp_path)), (8, 8), 3)
    assert data.images.shape == (7, 3, 8, 8)
