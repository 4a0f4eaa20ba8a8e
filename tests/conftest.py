"""What the tests share: a small trained-looking checkpoint, and its export."""

import fcntl
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from ddpm_deploy.model_file import open_model
from ddpm_deploy.words import GraphPrecision, Precision
from tests.models import tiny_checkpoint, tiny_export

# The tests run in a process for each core: their threads, and those of the commands that they start, would only wait
# for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_log() -> Iterator[None]:
    """What a command's -v or -q sets is of that command alone."""
    log = logging.getLogger("ddpm_deploy")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT and SIGHUP are obeyed, here and in processes that are started, also where the tests run with them
    ignored."""
    obeyed = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in obeyed.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes that run the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(path: Path, make: Callable[[], object]) -> Path:
    """A file that is made by whichever process first needs it, with what is made beside it."""
    done = path.with_name(f"{path.name}.done")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make()
            done.touch()
    return path


@pytest.fixture(scope="session")
def checkpoint_path(shared: Path) -> Path:
    """A checkpoint after a few real training steps on digits, of a tiny network."""
    pytest.importorskip("torch")
    path = shared / "model.pt"
    return once(path, lambda: tiny_checkpoint(path))


@pytest.fixture(scope="session")
def onnx_path(checkpoint_path: Path) -> Path:
    """That checkpoint, exported."""
    return once(checkpoint_path.with_suffix(".onnx"), lambda: tiny_export(checkpoint_path))


@pytest.fixture(scope="session")
def exported(checkpoint_path: Path, onnx_path: Path) -> dict[Precision, Path]:
    """The network exported in each precision; the reduced ones with 60 timesteps, as calibration visits all of them."""
    reduced: tuple[GraphPrecision, ...] = ("fp16", "bf16")
    files: dict[Precision, Path] = {"fp32": onnx_path}
    for precision in reduced:
        path = checkpoint_path.with_name(f"m.{precision}.onnx")
        files[precision] = once(path, lambda path=path, precision=precision: export(path, precision))  # type: ignore[misc]
    return files


def export(path: Path, precision: GraphPrecision) -> None:
    """The network of `checkpoint_path`, which is beside it, in a reduced precision."""
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    network, spec = load_network(open_model(path.with_name("model.pt")))
    spec = msgspec.structs.replace(spec, timesteps=60)
    assert export_onnx(network, spec, path, precision=precision).comparison.within
