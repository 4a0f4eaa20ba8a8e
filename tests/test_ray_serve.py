"""The service on Ray Serve: Ray and its proxy as they are, two replicas, asked over HTTP.

One Ray and one order of events, as a start takes seconds: so this is one test of several parts, each a function.
"""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from ddpm_deploy import Sampler, to_uint8
from tests.ray_driver import Driver

httpx = pytest.importorskip("httpx2")
if find_spec("ray") is None:
    pytest.skip("the extra ray-serve", allow_module_level=True)

ROOT = Path(__file__).parent.parent
LONG = 120  # seconds that nothing here takes: a hang fails
SHORT = {"count": 2, "steps": 20, "seed": 7}
LENGTHY = {"count": 64, "steps": 1000, "seed": 1}  # some seconds


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + LONG
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@dataclass
class Live:
    """The service that runs."""

    ray: Driver
    url: str
    folder: Path

    def ask(self, method: str, path: str, **keywords: Any) -> Any:
        """By a connection of its own, which Ray's proxy gives to any replica."""
        return httpx.request(method, self.url + path, timeout=LONG, **keywords)

    def post(self, body: Any, **headers: str) -> Any:
        return self.ask("POST", "/v1/samples", json=body, headers=headers)

    def images(self, body: Any) -> NDArray[np.uint8]:
        answer = self.post(body, Accept="application/x-npz")
        assert answer.status_code == 200, answer.text
        return np.load(io.BytesIO(answer.content))["arr_0"]

    def apart(self, body: Any, **headers: str) -> str:
        """Where a request is that nobody waits for."""
        answer = self.post(body, Prefer="respond-async", **headers)
        assert answer.status_code == 202, answer.text
        return str(answer.headers["location"])

    def fetched(self, where: str) -> NDArray[np.uint8]:
        """Its images, once they are there."""
        accept = {"Accept": "application/x-npz"}
        answer = until(lambda: (a := self.ask("GET", where, headers=accept)).status_code != 202 and a)
        assert answer.status_code == 200, answer.text
        return np.load(io.BytesIO(answer.content))["arr_0"]

    def replicas(self, state: str = "RUNNING") -> dict[str, int]:
        """The process ids of the replicas in a state, by their names."""
        found = self.ray.ask(replicas=None)["replicas"]
        return {each["name"]: each["pid"] for each in found if each["state"] == state}

    def deploy(self, model: Path) -> None:
        """One command with the one file of the docs, in which the model, the port and the sizes are ours."""
        config = yaml.safe_load((ROOT / "docs/serve.yaml").read_text())
        config["http_options"]["port"] = int(self.url.rpartition(":")[2])
        (application,) = config["applications"]
        application["args"] |= {"model": str(model), "max_count": 1000}
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"]["num_cpus"] = 1
        deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        deployment |= {"graceful_shutdown_wait_loop_s": 0.2, "max_surge_percent": 100}
        path = self.folder / f"{model.stem}.yaml"
        path.write_text(yaml.safe_dump(config))
        before = set(self.replicas())
        said = self.ray.ask(deploy=str(path))
        assert "Submitted deploy config successfully" in said, said

        def deployed() -> bool:
            now = self.ray.ask(replicas=None)
            assert now["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), now["message"]
            names = {each["name"] for each in now["replicas"]}
            return now["status"] == "RUNNING" and len(names) == 2 and not names & before

        until(deployed)


@contextmanager
def serving(folder: Path, model: Path) -> Iterator[Live]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Driver() as ray:
        live = Live(ray, f"http://127.0.0.1:{port}", folder)
        live.deploy(model)
        yield live


def of(model: Path, body: dict[str, Any]) -> NDArray[np.uint8]:
    """The same images without any service."""
    with Sampler.load(model) as sampler:
        images = sampler.sample(body["count"], steps=body["steps"], seed=body["seed"])
        return to_uint8(images, sampler.spec.value_range)


def test_the_service_on_ray(tmp_path: Path, onnx_path: Path) -> None:
    for path in (onnx_path, onnx_path.with_name(f"{onnx_path.stem}.proof.npz")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second = tmp_path / onnx_path.name, tmp_path / "gaussian.onnx"
    second.write_bytes((ROOT / "ddpm_deploy/doctor/gaussian.onnx").read_bytes())
    with serving(tmp_path, first) as live:
        the_images_are_those_of_a_sampler(live, first)
        an_id_is_followed_to_its_replica(live, first)
        who_goes_is_called_off(live)
        the_model_changes_under_traffic(live, first, second)
        a_replica_is_killed(live, second)


def who_goes_is_called_off(live: Live) -> None:
    """As Ray's metrics say, which have the numbers of each replica some time later."""
    page = live.ray.ask(metrics=None)
    line = re.compile(r'ray_ddpm_requests_total\{[^}]*outcome="cancelled"[^}]*\} ([0-9.]+)')

    def called_off() -> bool:
        somebody_asks_and_goes(live)
        return sum(map(float, line.findall(httpx.get(page).text))) >= 1

    until(called_off)


def somebody_asks_and_goes(live: Live) -> None:
    body = json.dumps(LENGTHY)
    head = f"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    address = live.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall((head + body).encode())
        time.sleep(0.4)


def the_images_are_those_of_a_sampler(live: Live, model: Path) -> None:
    """Also of many at once, with both replicas at work."""
    bodies = [SHORT | {"seed": seed} for seed in range(8)]
    answers: dict[int, NDArray[np.uint8]] = {}
    threads = [
        threading.Thread(target=lambda body=body: answers.update({body["seed"]: live.images(body)}))  # type: ignore[misc]
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for body in bodies:
        assert np.array_equal(answers[body["seed"]], of(model, body))
    assert live.ask("GET", "/v1/model").json()["name"] == model.stem
    assert live.ask("GET", "/metrics").status_code == 404
    assert live.post({"count": 0}).json()["error"]["param"] == "count"


def an_id_is_followed_to_its_replica(live: Live, model: Path) -> None:
    """By connections that reach one replica or the other."""
    places: dict[str, str] = {}
    until(
        lambda: places.update({(w := live.apart(SHORT)).split("/")[-1].split(".")[0]: w}) or len(places) == 2
    )
    assert set(places) == set(live.replicas())
    for where in places.values():
        wanted = of(model, SHORT)
        assert all(np.array_equal(live.fetched(where), wanted) for _ in range(6))
        with httpx.stream("GET", f"{live.url}{where}/events", timeout=LONG) as events:
            assert [line for line in events.iter_lines() if line.startswith("event")][-1] == "event: done"
        assert live.ask("DELETE", where).status_code == 204
        assert {live.ask("GET", where).status_code for _ in range(4)} == {404}
    running = live.apart(LENGTHY)
    assert {live.ask("GET", running).json()["status"] for _ in range(4)} <= {"queued", "running"}
    with httpx.stream("GET", f"{live.url}{running}/events?previews=32", timeout=LONG) as events:
        assert any(line == "event: preview" for line in events.iter_lines())
    assert live.ask("DELETE", running).status_code == 204
    for id in ("nothing", "nobody00.nothing", "a.b.c", "%00.x", f"{next(iter(places))}.nothing"):
        answer = live.ask("GET", f"/v1/samples/{id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def the_model_changes_under_traffic(live: Live, first: Path, second: Path) -> None:
    """No request fails, each is of one model or the other, and what was asked before is kept."""
    body = {"count": 2, "steps": 12, "seed": 3}
    either = of(first, body), of(second, body)
    ended, seen, failures = threading.Event(), [], []

    def ask() -> None:
        while not ended.is_set():
            try:
                time.sleep(0.1)
                images = live.images(body)
                seen.append(next(i for i, known in enumerate(either) if np.array_equal(images, known)))
            except Exception as error:
                failures.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    done = [live.apart(SHORT) for _ in range(4)]
    under_way = [live.apart(LENGTHY | {"count": 4, "seed": seed}) for seed in range(2)]
    until(lambda: 0 in seen)
    live.deploy(second)
    until(lambda: 1 in seen or failures)
    kept = [live.fetched(where) for where in (*done, *under_way)]
    ended.set()
    for thread in asking:
        thread.join()
    assert not failures
    assert set(seen) == {0, 1}
    assert np.array_equal(live.images(body), either[1])
    assert all(np.array_equal(images, of(first, SHORT)) for images in kept[: len(done)])
    for seed, images in enumerate(kept[len(done) :]):
        assert np.array_equal(images, of(first, LENGTHY | {"count": 4, "seed": seed}))
    assert {live.ask("GET", done[0]).json()["status"] for _ in range(4)} == {"done"}
    assert live.ask("DELETE", done[0]).status_code == 204
    assert {live.ask("GET", done[0]).status_code for _ in range(4)} == {404}


def a_replica_is_killed(live: Live, model: Path) -> None:
    """What it had fails, and says so; what others have is done, and what comes next."""
    body = {"count": 1000, "steps": 12, "seed": 3}  # some seconds
    (dying, pid), (living, _) = live.replicas().items()
    statuses: dict[str, int] = {}

    def ask(name: str) -> None:
        statuses[name] = live.post(body, **of_replica(name)).status_code

    asking = [threading.Thread(target=ask, args=(name,)) for name in (dying, living)]
    for thread in asking:
        thread.start()
    time.sleep(0.2)
    places = {name: live.apart(body, **of_replica(name)) for name in (dying, living)}
    assert all(f"/{name}." in where for name, where in places.items())
    os.kill(pid, signal.SIGKILL)
    for thread in asking:
        thread.join(LONG)
    assert statuses == {dying: 500, living: 200}
    answer = until(lambda: (a := live.ask("GET", places[dying])).status_code != 202 and a)
    assert (answer.status_code, "lost with its replica" in answer.text) == (404, True)
    assert live.fetched(places[living]).shape[0] == 1000
    assert np.array_equal(live.images(SHORT | {"steps": 12}), of(model, SHORT | {"steps": 12}))


def of_replica(name: str) -> dict[str, str]:
    """The header by which Ray's proxy chooses a replica, as each is known to it by its name."""
    return {"serve_multiplexed_model_id": name}


def test_what_no_replica_could_do_is_refused_when_it_is_built() -> None:
    code = """
import sys, warnings
warnings.simplefilter("ignore")
from pydantic import ValidationError
from ddpm_deploy.errors import SettingError
from ddpm_deploy.serve.ray import Args, build
for given in ({"model": "model.onnx"}, {"model": "/m.onnx", "keep_seconds": 0}, {"model": "/m.onnx", "api_keys": [""]}):
    try:
        build(Args(**given))
    except SettingError as error:
        print(error)
for given in ({"model": "/m.onnx", "capcity": 4}, {"model": "/m.onnx", "max_queue": 0}, {"capacity": 4}):
    try:
        Args(**given)
    except ValidationError as error:
        print(error.errors()[0]["loc"][0])
sys.modules["ray"] = None
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = said.stdout.splitlines()
    assert lines[0] == "model is a path on every machine, and begins with /, which 'model.onnx' does not", (
        said.stderr
    )
    assert lines[1].startswith("keep_seconds must be more than 0")
    assert lines[2].startswith("an API key is empty")
    assert lines[3:] == ["capcity", "max_queue", "model"]


def test_without_ray_a_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; import ddpm_deploy.serve.ray"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stderr
    last = said.splitlines()[-1]
    assert "ray.serve is not installed: pip install" in last
    assert "ray[serve]" in last
