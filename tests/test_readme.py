"""README's snippets, as they are pasted."""

import io
import json
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.cli import main

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
REQUESTS, SEEDS = 40, 5


def snippet(part: str) -> dict[str, Any]:
    """The names that a snippet makes: the one that has this part."""
    (text,) = (each for each in SNIPPETS if part in each)
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_a_threaded_server(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's `draw` behind a real server: 40 requests at once, every one answered with its image."""
    monkeypatch.chdir(onnx_path.parent)  # which has a model.onnx
    names = snippet("def draw(")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """/SEED: its picture."""
            png = names["draw"](seed=int(self.path[1:]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = REQUESTS

    with Server(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(REQUESTS) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def get(seed: int) -> np.ndarray:
            with (
                urlopen(f"{address}/{seed}", timeout=60) as answer,
                Image.open(io.BytesIO(answer.read())) as image,
            ):
                return np.asarray(image)

        try:
            found = list(pool.map(get, (i % SEEDS for i in range(REQUESTS))))
        finally:
            server.shutdown()
    names["sampler"].close()
    with Sampler.load(onnx_path) as sampler:
        wanted = [sampler.sample(1, solver="ddim", steps=50, seed=seed) for seed in range(SEEDS)]
    for i, image in enumerate(found):
        np.testing.assert_array_equal(image, to_uint8(wanted[i % SEEDS])[0, ..., 0])


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
