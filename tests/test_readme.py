"""README's snippets, as they are pasted."""

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from ddpm_deploy import Sampler, to_uint8

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
