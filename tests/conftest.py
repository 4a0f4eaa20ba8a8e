"""What the tests share: a small trained-looking checkpoint, and its export."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ddpm_deploy.model_file import open_model
from ddpm_deploy.words import GraphPrecision, Precision
from tests.models import tiny_checkpoint, tiny_export


@pytest.fixture(autouse=True)
def _same_log() -> Iterator[None]:
    """What a command's -v or -q sets is of that command alone."""
    log = logging.getLogger("ddpm_deploy")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is obeyed, here and in processes that are started, also where the tests run with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after a few real training steps on digits, of a tiny network."""
    pytest.importorskip("torch")
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="session")
def exported(
    checkpoint_path: Path, onnx_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Path]:
    """The network exported in each precision; the reduced ones with 60 timesteps, as calibration visits all of them."""
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    network, spec = load_network(open_model(checkpoint_path))
    folder, spec = tmp_path_factory.mktemp("half"), msgspec.structs.replace(spec, timesteps=60)
    files: dict[Precision, Path] = {"fp32": onnx_path}
    reduced: tuple[GraphPrecision, ...] = ("fp16", "bf16")
    for precision in reduced:
        files[precision] = folder / f"m.{precision}.onnx"
        assert export_onnx(network, spec, files[precision], precision=precision).comparison.within
    return files


@pytest.fixture(scope="session")
def onnx_path(checkpoint_path: Path) -> Path:
    """That checkpoint, exported."""
    return tiny_export(checkpoint_path)
