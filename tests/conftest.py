"""What the tests share: a small trained-looking checkpoint, and its export."""

from pathlib import Path

import pytest

from tests.models import tiny_spec


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after a few real training steps on digits, of a tiny network."""
    torch = pytest.importorskip("torch")
    from ddpm_deploy.train.data import find_images, read_images
    from ddpm_deploy.train.settings import PRESETS
    from ddpm_deploy.train.trainer import Trainer

    settings = PRESETS["digits"].settings("digits", steps=40, warmup_steps=5, batch_size=16)
    images = read_images(find_images("digits"), 8, 1)
    trainer = Trainer(tiny_spec(), settings, images, torch.device("cpu"))
    for _ in range(settings.steps):
        trainer.advance()
    path = tmp_path_factory.mktemp("model") / "model.pt"
    trainer.checkpoint().save(path)
    return path


@pytest.fixture(scope="session")
def onnx_path(checkpoint_path: Path) -> Path:
    """That checkpoint, exported."""
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    path = checkpoint_path.with_suffix(".onnx")
    export_onnx(*load_network(checkpoint_path), path)
    return path
