"""README's snippets, as they are pasted."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_deploy import Sampler
from ddpm_deploy.cli import main

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def snippet(part: str) -> dict[str, Any]:
    """The names that a snippet makes: the one that has this part."""
    (text,) = (each for each in SNIPPETS if part in each)
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_embedding_in_a_service(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What README's Batcher gives is what a Sampler gives."""
    monkeypatch.chdir(onnx_path.parent)  # which has a model.onnx
    image = snippet("Batcher(sampler)")["image"]
    with Sampler.load(onnx_path) as sampler:
        np.testing.assert_array_equal(image, sampler.sample(1, solver="ddim", steps=50, seed=7))


OWN = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.time = torch.nn.Embedding(1000, 4)
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.last = torch.nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + self.time(t)[:, :, None, None]))


def build():
    return Network()
"""


def test_your_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three lines of the first screen, as they stand, on checkpoints that the originals' code or names make."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    from ddpm_deploy.importers.template import TEMPLATE
    from tests.golden import openai_networks
    from tests.importing import named_weights

    monkeypatch.chdir(tmp_path)
    blocks = {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
    }
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained("my-ddpm")
    with np.load(openai_networks.FILE) as golden:
        shapes = json.loads(golden["improved shapes"].tobytes())
    torch.save(named_weights({name: tuple(shape) for name, shape in shapes.items()}), "ema.pt")
    Path("my_package").mkdir()
    Path("my_package/models.py").write_text(OWN)
    names = {}
    exec(compile(OWN, "models.py", "exec"), names)
    torch.save(names["build"]().state_dict(), "ckpt.pt")
    Path("spec.toml").write_text(TEMPLATE)

    monkeypatch.setattr("ddpm_deploy.export.graph._WORK", 1e9)  # shorter chains of PyTorch
    pattern = r"^    ddpm-export ((?:my-ddpm/|ema\.pt|my_package)\S*(?: --\S+ \S+)*)"
    lines = re.findall(pattern, README.read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line, made in zip(lines, ("my-ddpm.onnx", "ema.onnx", "ckpt.onnx"), strict=True):
        ran = CliRunner().invoke(main, ["export", "-q", *shlex.split(line)])
        assert ran.exit_code == 0, ran.output
        assert f"wrote {made}" in ran.stdout
