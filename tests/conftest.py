"""What the tests share: a small trained-looking checkpoint, and its export."""

from pathlib import Path

import pytest

from tests.models import tiny_checkpoint, tiny_export


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after a few real training steps on digits, of a tiny network."""
    pytest.importorskip("torch")
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="session")
def onnx_path(checkpoint_path: Path) -> Path:
    """That checkpoint, exported."""
    return tiny_export(checkpoint_path)
