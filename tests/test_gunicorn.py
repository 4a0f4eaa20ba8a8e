"""The service within somebody else's application, as docs/serving.md has it, under gunicorn with several workers."""

# ruff: noqa: E402  # what is optional is looked for first

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve")
pytest.importorskip("gunicorn.workers.gasgi")
httpx = pytest.importorskip("httpx2")

from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.serve.server import listening

ROOT = Path(__file__).parent.parent
LONG = 60  # seconds that no test takes: a hang fails
EARLY = """
from fastapi import FastAPI

from ddpm_deploy import Sampler
from ddpm_deploy.serve import Batcher
from ddpm_deploy.serve.http import create_app

app = FastAPI()
app.mount("/images", create_app(Batcher(Sampler.load("model.onnx"))))
"""


def documented() -> tuple[str, list[str]]:
    """The application of docs/serving.md, and the command that runs it."""
    text = (ROOT / "docs" / "serving.md").read_text()
    (application,) = re.findall(r"^```python\n(# service\.py\n.*?)^```", text, re.M | re.S)
    (command,) = re.findall(r"^gunicorn (.*)$", text, re.M)
    return application, command.split()


@contextmanager
def gunicorn(folder: Path, application: str, *options: str) -> Iterator[str]:
    """The documented command in a folder with an application and a model, at a free port; and its address."""
    (folder / "service.py").write_text(application)
    shutil.copy(ROOT / "ddpm_deploy/doctor/gaussian.onnx", folder / "model.onnx")
    with listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    arguments = [word.replace(":8000", f":{port}") for word in documented()[1]]
    running = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "--no-control-socket", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr
    with closing(running.stderr):
        try:
            yield f"http://127.0.0.1:{port}"
            running.send_signal(signal.SIGTERM)
            _, log = running.communicate(timeout=LONG)
            assert running.returncode == 0, log
            assert "Traceback" not in log, log
        finally:
            running.kill()
            running.wait(LONG)


def get(url: str, **keywords: Any) -> Any:
    """An answer, once somebody listens there."""
    end = time.monotonic() + LONG
    while True:
        try:
            return httpx.get(url, timeout=LONG, **keywords)
        except httpx.TransportError:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["", "preload"])
def test_several_workers(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Sampler.load(ROOT / "ddpm_deploy/doctor/gaussian.onnx") as sampler:
        right = {user: to_uint8(sampler.sample(1, seed=user, steps=10))[0] for user in range(8)}
    application = documented()[0].replace("steps=50", "steps=10")  # of the twelve that this model has
    with gunicorn(tmp_path, application, *options) as url:
        for user, pixels in right.items():
            np.testing.assert_array_equal(np.array(get(f"{url}/avatars/{user}").json()), pixels)
        assert get(url + "/images/ready").json() == {"status": "ready"}
        made = httpx.post(url + "/images/v1/samples", json={"seed": 3}, timeout=LONG)
        assert (made.status_code, made.headers["x-seed"]) == (200, "3")
        asked = httpx.post(url + "/images/v1/samples", json={}, headers={"Prefer": "respond-async"})
        found = {get(url + asked.headers["location"]).status_code for _ in range(16)}
        assert found <= {200, 202, 404}  # by its own worker, and the other


def test_what_was_made_before_the_fork_is_refused_in_a_line(tmp_path: Path) -> None:
    with gunicorn(tmp_path, EARLY, "--preload") as url:
        assert get(url + "/images/health").status_code == 200
        for answer in (get(url + "/images/ready"), httpx.post(url + "/images/v1/samples", json={})):
            assert answer.status_code == 500
            assert "forked after the model was loaded" in answer.json()["error"]["message"]
