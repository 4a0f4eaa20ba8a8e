"""The service over HTTP: a real server on a real port, asked by real clients, and by some who mean no good."""

# ruff: noqa: E402  # what is optional is looked for first

import base64
import gc
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
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve")
httpx = pytest.importorskip("httpx2")

import uvicorn
from click.testing import CliRunner
from fastapi import FastAPI
from PIL import Image

from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.cli.serve import main
from ddpm_deploy.errors import SettingError
from ddpm_deploy.runtime.images import grid
from ddpm_deploy.runtime.parity import record
from ddpm_deploy.runtime.proof import as_proof, proof_path, write_proof
from ddpm_deploy.serve import Batcher, bodies, server
from ddpm_deploy.serve.http import app_of, create_app
from ddpm_deploy.serve.server import Server, listening, url_of
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import Settings
from tests.models import ArrayNetwork, tiny_spec
from tests.test_guidance import Labelled

ROOT = Path(__file__).parent.parent
LONG = 30  # seconds that no test takes: a hang fails


class Held(Labelled):
    """A network that answers when it may."""

    def __init__(self, max_batch: int = 8, **changes: Any) -> None:
        super().__init__(max_batch, **changes)
        self.go = threading.Event()
        self.go.set()

    def predict(self, batch: int) -> None:
        assert self.go.wait(LONG)
        super().predict(batch)


@dataclass
class Live:
    """A server that runs."""

    url: str
    service: Service
    batcher: Batcher
    network: Any
    server: Any = None

    def ask(self, method: str, path: str, **keywords: Any) -> Any:
        return httpx.request(method, self.url + path, timeout=LONG, **keywords)

    def post(self, body: Any, **headers: str) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/v1/samples", content=content, headers=headers)

    def connect(self, sent: bytes = b"") -> socket.socket:
        address = self.url.removeprefix("http://").split(":")
        made = socket.create_connection((address[0], int(address[1])), timeout=LONG)
        made.sendall(sent)
        return made

    def idle(self) -> None:
        """Wait until nothing runs or waits."""
        until(lambda: self.batcher.status().rows + self.batcher.status().waiting == 0)


@contextmanager
def serving(
    network: Any = None, *, capacity: int | None = None, max_queue: int = 64, **limits: Any
) -> Iterator[Live]:
    network = network or Held()
    with Batcher(network, capacity, max_queue) as batcher, listening("127.0.0.1", 0) as listener:
        service = Service(batcher.spec, Settings(**limits), batcher)
        running = Server(app_of(service), service, patience=1, connections=64)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: running.started)
            yield Live(url_of(listener), service, batcher, network, running)
        finally:
            getattr(network, "go", threading.Event()).set()
            running.should_exit = True
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One for the tests that change nothing about it."""
    with serving(name="toy", max_count=32) as running:
        yield running


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(2e-3)


def wanted(**fields: Any) -> np.ndarray:
    """The pixels (N, H, W, C) that the model makes by itself."""
    with Sampler(Labelled()) as sampler:
        return to_uint8(sampler.sample(fields.pop("count", 1), **fields))


def pixels(png: bytes) -> np.ndarray:
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


def told(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an error, which is in the one form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    return str(error["message"])


# --- /v1/samples --------------------------------------------------------------------------------------------

BODY = {"count": 5, "steps": 7, "seed": "18446744073709551615", "labels": ["1", 2], "guidance": [0, 2.5]}
ALONE: dict[str, Any] = {"count": 5, "steps": 7, "seed": 2**64 - 1, "labels": [1, 2, 1, 2, 1]}
ALONE["guidance"] = [0.0, 2.5, 0.0, 2.5, 0.0]


def test_the_images_are_those_of_a_sampler_in_each_format(live: Live) -> None:
    right = wanted(**ALONE)
    png = live.post(BODY)
    assert png.headers["content-type"] == "image/png"
    assert png.headers["x-seed"] == "18446744073709551615"
    np.testing.assert_array_equal(pixels(png.content), grid(right))

    npz = live.post(BODY, Accept="text/html, image/png;q=0.4, application/x-npz;q=0.8")
    with np.load(io.BytesIO(npz.content)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], right)
        np.testing.assert_array_equal(arrays["arr_1"], [1, 2, 1, 2, 1])

    whole = live.post(BODY | {"format": "json"}).json()
    assert [image["label"] for image in whole["images"]] == [1, 2, 1, 2, 1]
    for i, image in enumerate(whole["images"]):
        assert image["index"] == str(i)
        np.testing.assert_array_equal(pixels(base64.b64decode(image["png"])), right[i])
    again = live.post(whole["request"] | {"format": "npz"})  # what was done, asked for again
    with np.load(io.BytesIO(again.content)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], right)
    told(live.post(BODY, Accept="image/webp"), 406, "accept")


def test_a_request_that_nobody_waits_for() -> None:
    with serving() as live:
        live.network.go.clear()
        accepted = live.post(BODY, Prefer="wait=1, Respond-Async")
        assert accepted.status_code == 202
        assert accepted.headers["preference-applied"] == "respond-async"
        where = accepted.headers["location"]
        assert accepted.json()["status"] in ("queued", "running")
        early = live.ask("GET", where, headers={"Accept": "image/png"})
        assert early.status_code == 202
        assert early.headers["retry-after"] == "1"
        live.network.go.set()
        live.idle()
        done = live.ask("GET", where).json()
        assert (done["status"], done["progress"], len(done["images"])) == ("done", 1.0, 5)
        right = wanted(**ALONE)
        np.testing.assert_array_equal(pixels(base64.b64decode(done["images"][4]["png"])), right[4])
        png = live.ask("GET", where + "?format=png")
        np.testing.assert_array_equal(pixels(png.content), grid(right))
        told(live.ask("GET", where + "?format=gif"), 422, "format")
        assert live.ask("DELETE", where).status_code == 204
        for method in ("GET", "DELETE"):
            told(live.ask(method, where), 404)


def test_events_bring_previews_and_the_end(live: Live) -> None:
    where = live.post({"count": 2, "steps": 20, "seed": 1}, Prefer="respond-async").headers["location"]
    live.idle()  # whoever comes late is told the end all the same
    names = [name for name, _ in read_events(live.ask("GET", where + "/events").text)]
    assert (names[0], names[-1]) == ("status", "done")
    told(live.ask("GET", where + "/events?previews=1000"), 422, "previews")

    live.network.go.clear()
    where = live.post({"count": 2, "steps": 20, "seed": 1}, Prefer="respond-async").headers["location"]
    with httpx.stream("GET", live.url + where + "/events?previews=4", timeout=LONG) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: status"
        live.network.go.set()
        found = read_events("\n".join(lines))
    previews = [data for name, data in found if name == "preview"]
    for index in range(2):
        steps = [data["step"] for data in previews if data["index"] == index]
        assert 1 <= len(steps) <= 4
        assert steps == sorted(set(steps))
    assert pixels(base64.b64decode(previews[0]["png"])).shape == (4, 4, 1)
    assert found[-1][0] == "done"
    assert found[-1][1]["progress"] == 1.0


def read_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, with the first "event:" of it cut off or not."""
    return [(name, json.loads(data)) for name, data in re.findall(r"event: (\S+)\ndata: (.*)", text)]


def test_results_expire_by_age_and_by_bytes() -> None:
    each = 4 * 4 * 4  # bytes of an image
    with serving(keep_bytes=10 * each, keep_seconds=600) as live:
        told(live.post({"count": 11}, Prefer="respond-async"), 422, "count")
        places = []
        for _ in range(3):
            places.append(live.post({"count": 4, "steps": 1}, Prefer="respond-async").headers["location"])
            live.idle()
        assert [live.ask("GET", where).status_code for where in places] == [404, 200, 200]
        live.network.go.clear()
        running = [live.post({"count": 5}, Prefer="respond-async") for _ in range(2)]
        assert [answer.status_code for answer in running] == [202, 202]
        assert "on their way" in told(live.post({"count": 1}, Prefer="respond-async"), 429)
        for answer in running:
            live.ask("DELETE", answer.headers["location"])
        live.network.go.set()
        live.idle()
    with serving(keep_seconds=0.05) as live:
        where = live.post({"steps": 1}, Prefer="respond-async").headers["location"]
        until(lambda: live.ask("GET", where).status_code == 404)
        assert len(live.service.results) == 0


def test_what_is_dropped_is_freed(live: Live) -> None:
    live.network.go.clear()
    where = live.post({"count": 2, "steps": 20}, Prefer="respond-async").headers["location"]
    with httpx.stream("GET", live.url + where + "/events", timeout=LONG) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: status"
        live.network.go.set()
        assert "event: done" in list(lines)
    assert len(live.ask("GET", where).json()["images"]) == 2
    gc.disable()
    try:
        handle = weakref.ref(live.service.results.get(where.rpartition("/")[2]).handle)
        assert live.ask("DELETE", where).status_code == 204
        until(lambda: handle() is None)
    finally:
        gc.enable()


def test_a_failure_is_told_to_its_own_caller_alone() -> None:
    class Sick(Held):
        def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
            out = super().answer(x, t)
            out[self.memory["y"][: len(x)] == 2] = np.nan
            return out

    with serving(Sick()) as live:
        live.network.go.clear()
        sick = live.post({"labels": 2, "format": "json"}, Prefer="respond-async").headers["location"]
        live.network.go.set()
        assert live.post({"labels": 1}).status_code == 200
        assert "not finite" in told(live.post({"labels": 2}), 500)
        live.idle()
        failed = live.ask("GET", sick).json()
        assert failed["status"] == "failed"
        assert "not finite" in failed["error"]["message"]
        told(live.ask("GET", sick + "?format=png"), 500)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"count": 0}, "count", "1 or more"),
        ({"count": 33}, "count", "at most 32"),
        ({"count": 2**70}, "count", "at most 32"),
        ({"count": "4"}, "count", "int"),
        ({"count": 1.5}, "count", "int"),
        ({"count": True}, "count", "int"),
        ({"steps": 0}, "steps", "1 to 20"),
        ({"steps": 21}, "steps", "1 to 20"),
        ({"seed": 2**64}, "seed", "2^64"),
        ({"seed": "18446744073709551616"}, "seed", "2^64"),
        ({"seed": -1}, "seed", "2^64"),
        ({"seed": "-1"}, "seed", "2^64"),
        ({"seed": "٣"}, "seed", "2^64"),
        ({"seed": "0x10"}, "seed", "2^64"),
        ({"seed": "1" * 1000}, "seed", "2^64"),
        ({"first_index": "18446744073709551615", "count": 2}, "first_index", "2^64"),
        ({"labels": "cat"}, "labels", "no class 'cat'"),
        ({"labels": [0, 4]}, "labels", "no class 4"),
        ({"labels": list(range(40))}, "labels", "at most 32"),
        ({"labels": {"a": 1}}, "labels", "object"),
        ({"guidance": 1001}, "guidance", "1000"),
        ({"solver": "euler"}, "solver", "not known"),
        ({"solver": "ddim", "eta": 7}, "eta", "eta"),
        ({"eta": 0.5}, "eta", "ddim"),
        ({"spacing": "odd"}, "spacing", "spacing"),
        ({"timesteps": [5, 6]}, "timesteps", "fall"),
        ({"timesteps": [19, 0], "steps": 3}, "timesteps", "leave these out"),
        ({"table": None}, "table", "unknown field"),
        ({"stepps": 3}, "stepps", "unknown field"),
        ({"format": "gif"}, "format", "gif"),
        ({"deadline": -1}, "deadline", "deadline"),
        ({"deadline": 1e-9}, "deadline", "deadline"),
    ],
)
def test_a_bad_field_is_named(live: Live, body: dict[str, Any], param: str, part: str) -> None:
    message = told(live.post(body), 422, param)
    assert part in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b"7",
        b"null",
        b"\xff\xfe",
        b'{"count": NaN}',
        b'{"guidance": 1e999}',
        b'{"guidance": -Infinity}',
        b'{"count": 1, "count": 2}',
        b'{"count": 1}}',
        b'{"count": ' + b"9" * 5000 + b"}",
        b'{"labels": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a": ' * 9_000 + b"1" + b"}" * 9_000,
        b"count=4",
        b'{"\\ud800": 1}',
        b'{"timesteps": [' + b"9" * 90 + b"]}",
        b'{"deadline": 1' + b"0" * 400 + b"}",
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_a_malformed_body_is_refused(live: Live, body: bytes) -> None:
    answer = live.post(body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert live.post({"steps": 1}).status_code == 200


def test_an_oversized_body_is_refused_before_it_is_read(live: Live) -> None:
    with closing(live.connect(head(length=1 << 40))) as connection:  # and nothing of it comes
        assert b" 413 " in connection.recv(4096)

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 4096

    with suppress(httpx.WriteError):  # the connection is closed before all is sent, so an answer may be lost
        assert live.ask("POST", "/v1/samples", content=endless()).status_code == 413
    assert live.post(b"x" * (1 << 17)).status_code == 413
    told(live.post(b"x", **{"Content-Encoding": "gzip"}), 415)
    assert live.post({"steps": 1}).status_code == 200


def head(path: str = "/v1/samples", length: int = 0, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def test_an_unconditional_model_takes_no_label() -> None:
    with serving(ArrayNetwork(tiny_spec((1, 4, 4), timesteps=20), 4)) as live:
        told(live.post({"labels": 0}), 422, "labels")
        told(live.post({"guidance": 2.0}), 422, "guidance")
        told(live.ask("POST", "/v1/images/generations", json={"prompt": "a cat"}), 422, "prompt")
        model = live.ask("GET", "/v1/model").json()
        assert (model["classes"], model["guidance"]) == (0, False)


def test_images_that_no_picture_holds_come_as_npz() -> None:
    with serving(ArrayNetwork(tiny_spec((2, 4, 4), timesteps=20), 4)) as live:
        with np.load(io.BytesIO(live.post({"steps": 2}).content)) as arrays:
            assert arrays["arr_0"].shape == (1, 4, 4, 2)
        told(live.post({}, Accept="image/png"), 422, "format")
        told(live.ask("POST", "/v1/images/generations", json={}), 422, "output_format")
        where = live.post({"steps": 2}, Prefer="respond-async").headers["location"]
        live.idle()
        assert live.ask("GET", where + "/events").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_count", 0),
        ("timeout", float("nan")),
        ("name", "a/b"),
        ("api_keys", ("",)),
        ("api_keys", ("é",)),
        ("allow_origins", ("https://a.example/",)),
        ("allow_origins", ("a.example",)),
        ("allow_origins", ("https://A.example",)),
        ("allow_hosts", ("a.example:80",)),
        ("allow_hosts", ("https://a.example",)),
        ("allow_hosts", ("A.example",)),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(SettingError):
        Settings(**{name: value})


# --- load, and who goes -------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    with serving(max_queue=1, capacity=2) as live:
        live.network.go.clear()
        live.post({"count": 2}, Prefer="respond-async")
        until(lambda: live.batcher.status().running > 0)
        live.post({"count": 2}, Prefer="respond-async")
        full = live.post({})
        assert "waiting" in told(full, 429)
        assert int(full.headers["retry-after"]) >= 1
        late = live.post({"deadline": 1e-6})  # on a busy server it is the load
        assert late.status_code in (422, 429)
        openai = live.ask("POST", "/v1/images/generations", json={})
        assert openai.json()["error"]["type"] == "rate_limit_error"
        assert "error" in live.ask("POST", "/v2/models/ddpm/infer", json={"inputs": []}).json()
        assert b'ddpm_requests_total{outcome="refused"} ' in live.ask("GET", "/metrics").content


@pytest.mark.parametrize(
    "stage", ["connected", "head", "body", "waiting", "running", "stream", "events", "answer"]
)
def test_who_goes_is_called_off_at_whatever_stage(stage: str) -> None:
    body = json.dumps({"count": 4, "steps": 20}).encode()
    streamed = json.dumps({"n": 2, "stream": True, "partial_images": 3}).encode()
    with serving(capacity=2) as live:
        live.network.go.clear()
        whole = head(length=len(body)) + body
        sent = {
            "connected": b"",
            "head": whole[:20],
            "body": whole[:-5],
            "stream": head("/v1/images/generations", len(streamed)) + streamed,
        }.get(stage, whole)
        if stage == "waiting":  # behind another
            live.post({"count": 2}, Prefer="respond-async")
            until(lambda: live.batcher.status().running == 2)
        if stage == "events":
            where = live.post({"count": 2}, Prefer="respond-async").headers["location"]
            sent = f"GET {where}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        before = live.batcher.status().submitted
        connection = live.connect(sent)
        if stage in ("waiting", "running", "stream", "answer"):
            until(lambda: live.batcher.status().submitted > before)
        if stage in ("stream", "events"):
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        if stage == "answer":
            live.network.go.set()
            live.idle()
        connection.close()
        if stage in ("waiting", "running", "stream"):  # at once, though no step was taken
            until(lambda: live.service.live == (stage == "waiting"))
        live.network.go.set()
        live.idle()
        status = live.batcher.status()
        assert (status.failed, status.cancelled) == (0, stage in ("waiting", "running", "stream"))
        assert live.post({"steps": 1}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"HELLO\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * 20_000,
    ],
    ids=["words", "TLS", "no host", "a long head"],
)
def test_what_is_no_http_is_told_so(live: Live, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with closing(live.connect(sent)) as connection:
        head_of, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head_of.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "not_http"
    assert not caplog.records


def test_a_body_that_breaks_behind_its_answer_ends_the_connection(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    with closing(live.connect(chunked)) as connection:
        assert b" 404 " in connection.recv(4096)
        connection.sendall(b"no chunk\r\n")
        assert connection.recv(4096) == b""
    assert not caplog.records


def test_one_connection_too_many_is_told_so(live: Live) -> None:
    with serving() as small:
        others = [small.connect() for _ in range(63)]  # of 64
        until(lambda: len(small.server.server_state.connections) == 63)
        refused = small.ask("GET", "/health")
        assert "connections" in told(refused, 503)
        assert refused.headers["retry-after"] == "1"
        for other in others:
            other.close()
        until(lambda: small.ask("GET", "/health").status_code == 200)


def test_a_client_that_trickles_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    with serving() as live:
        for sent in (b"", b"POST /v1/sam"):
            with closing(live.connect(sent)) as connection, suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        with closing(live.connect(head(length=10) + b"{")) as connection:
            assert b" 408 " in connection.recv(4096)
        with closing(live.connect(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) as connection:
            assert b" 200 " in connection.recv(4096)
            connection.sendall(b"GET /hea")  # the second of a connection
            with suppress(ConnectionResetError):
                while connection.recv(100):
                    pass
        for answered in (b"POST /nowhere", b"GET /health"):  # and nobody reads its body
            asked = answered + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"
            with closing(live.connect(asked)) as connection, suppress(ConnectionError):
                assert connection.recv(4096)
                end = time.monotonic() + LONG
                while time.monotonic() < end:
                    connection.sendall(b"x")
                    time.sleep(0.02)
                pytest.fail("it reads on")
        assert live.post({"steps": 1}).status_code == 200


def test_a_slow_reader_who_goes_on_reading_gets_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.3)
    large = tiny_spec((3, 256, 256), timesteps=20)
    with serving(ArrayNetwork(large, 8)) as live:
        asked = json.dumps({"parameters": {"count": 24, "steps": 1, "binary_data_output": True}}).encode()
        head_of = head("/v2/models/ddpm/infer", len(asked), "Connection: close\r\n")
        with closing(socket.socket()) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            slow.connect(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
            slow.sendall(head_of + asked)
            got = 0
            while found := slow.recv(1 << 16):
                got += len(found)
                time.sleep(0.004)
        assert got > 24 * 3 * 256 * 256 * 4


def test_slow_readers_stall_nobody_and_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their previews are large, and they read nothing: the newest alone are kept for them."""
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.5)
    network = Noisy(tiny_spec((3, 128, 128), timesteps=60), 8)
    with serving(network) as live:
        where = live.post({"count": 8}, Prefer="respond-async").headers["location"]
        asked = f"GET {where}/events?previews=32 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        readers = [live.connect(asked) for _ in range(2)]
        assert live.post({"steps": 2, "format": "npz"}).status_code == 200
        live.idle()
        assert live.ask("GET", where + "?format=npz").status_code == 200
        until(lambda: not live.server.server_state.connections)
        for reader in readers:
            reader.close()


def test_others_go_on_while_two_read_nothing() -> None:
    with serving(Noisy(tiny_spec((3, 128, 128), timesteps=60), 8)) as live:
        where = live.post({"count": 8}, Prefer="respond-async").headers["location"]
        asked = f"GET {where}/events?previews=32 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        readers = [live.connect(asked) for _ in range(2)]

        def held_up() -> int:
            found = live.server.server_state.connections
            return sum(each.transport.get_write_buffer_size() > 0 for each in list(found))

        until(lambda: held_up() == 2)
        for seed in range(20):
            assert live.post({"steps": 2, "seed": seed, "format": "npz"}).status_code == 200
        assert held_up() == 2
        for reader in readers:
            reader.close()


class Noisy(ArrayNetwork):
    """One whose images do not compress."""

    def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        time.sleep(0.005)
        return x * np.float32(0.5)


def test_the_time_limit_ends_a_request() -> None:
    with serving(timeout=0.2) as live:
        live.network.go.clear()
        threading.Timer(0.5, live.network.go.set).start()
        told(live.post({}), 504)
        live.idle()


# --- who may ask --------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_where_there_are_any() -> None:
    with serving(api_keys=("one", "two")) as live:
        for path in ("/v1/model", "/v1/models", "/metrics", "/v2", "/v2/models/ddpm"):
            assert live.ask("GET", path).status_code == 401, path
            assert live.ask("GET", path, headers={"Authorization": "Bearer two"}).status_code == 200
        refused = live.post({})
        told(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
        for header, value in (
            ("Authorization", "Bearer on"),
            ("Authorization", "Basic one"),
            ("Authorization", "Bearer oné"),
            ("X-API-Key", "onee"),
        ):
            assert live.ask("GET", "/v1/model", headers={header: value.encode()}).status_code == 401
        assert live.ask("GET", "/v1/model", headers={"X-API-Key": "one"}).status_code == 200
        for path in ("/health", "/ready", "/v2/health/live", "/v2/health/ready"):
            assert live.ask("GET", path).status_code == 200


def test_pages_of_other_sites_may_not_ask_unless_they_are_named() -> None:
    with serving() as live:
        told(live.post({}, Origin="https://evil.example"), 403)
        told(live.post({}, Origin="null"), 403)
        told(live.post({}, Origin="http://["), 403)
        own = live.post({"steps": 1}, Origin=live.url)
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers
    with serving(allow_origins=("https://good.example",)) as live:
        good = live.post({"steps": 1}, Origin="https://good.example")
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        asked = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        assert live.ask("OPTIONS", "/v1/samples", headers=asked).status_code == 200
        told(live.post({}, Origin="https://evil.example"), 403)


def test_a_name_that_was_made_to_lead_here_is_refused() -> None:
    """As a page of evil.example does once that name has this machine's address: to the browser it asks its own site."""
    with serving(allow_hosts=("images.example",)) as live:
        port = live.url.rpartition(":")[2]
        for host in (
            f"evil.example:{port}",
            "evil.example",
            "localhost.evil.example",
            "1.2.3.4.evil.example",
            "[x]",
        ):
            for method, path in (("GET", "/v1/model"), ("POST", "/v1/samples"), ("GET", "/openapi.json")):
                headers = {"Host": host, "Origin": f"http://{host}"}
                assert "--allow-host" in told(live.ask(method, path, headers=headers), 403), host
        for host in (
            f"localhost:{port}",
            "LOCALHOST",
            "a.localhost.",
            "127.0.0.1",
            f"[::1]:{port}",
            "images.example:1",
        ):
            assert live.ask("GET", "/v1/model", headers={"Host": host}).status_code == 200, host
            assert live.post({"steps": 1}, Host=host, Origin=f"http://{host}").status_code == 200, host
        assert live.ask("GET", "/health", headers={"Host": "evil.example"}).status_code == 200


# --- state --------------------------------------------------------------------------------------------------


def test_state_and_documents(live: Live) -> None:
    assert live.ask("GET", "/ready").json() == {"status": "ready"}
    model = live.ask("GET", "/v1/model").json()
    assert (model["name"], model["image_shape"], model["classes"]) == ("toy", [1, 4, 4], 3)
    assert (model["guidance"], model["timesteps"], model["limits"]["count"]) == (True, 20, 32)
    assert "fast" in model["solvers"]
    live.post({"steps": 3})
    text = live.ask("GET", "/metrics").text
    for line in (
        r"ddpm_slots 8\.0",
        r"ddpm_slots_in_use 0\.0",
        r"ddpm_queue_requests 0\.0",
        r"ddpm_step_seconds \S+",
        r'ddpm_requests_total\{outcome="completed"\} [1-9]\d*\.0',
        r'ddpm_request_seconds_bucket\{le="\+Inf",route="/v1/samples"\} [1-9]\d*\.0',
        r'ddpm_http_answers_total\{status="200"\} [1-9]\d*\.0',
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    document = live.ask("GET", "/openapi.json").json()
    assert "/v1/samples" in document["paths"]
    assert {"count", "steps", "seed", "labels"} <= set(
        document["components"]["schemas"]["SamplesBody"]["properties"]
    )
    told(live.ask("GET", "/nothing"), 404)
    for method, path, allowed in (
        ("PUT", "/v1/samples", "POST"),
        ("POST", "/v1/samples/x", "DELETE, GET"),
        ("POST", "/", "GET, HEAD"),
    ):
        refused = live.ask(method, path)
        told(refused, 405)
        assert refused.headers["allow"] == allowed


def test_before_it_is_ready_it_says_so() -> None:
    network = Labelled()
    service = Service(network.spec, Settings())
    with listening("127.0.0.1", 0) as listener:
        running = Server(app_of(service), service, patience=1, connections=64)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            ask = Live(url_of(listener), service, None, network).ask  # type: ignore[arg-type]
            service.preparing = "its proof is checked, 37 % done"
            assert ask("GET", "/health").status_code == 200
            assert "37 %" in told(ask("GET", "/ready"), 503)
            early = ask("POST", "/v1/samples", json={})
            assert "37 %" in told(early, 503)
            assert early.headers["retry-after"] == "1"
            with Batcher(network) as batcher:
                service.open(batcher)
                assert ask("GET", "/v2/health/ready").status_code == 200
            told(ask("GET", "/ready"), 503)  # the batcher has ended
        finally:
            running.should_exit = True
            thread.join(LONG)


@contextmanager
def mounted() -> Iterator[str]:
    """Where the service is found that is a part of somebody else's application."""
    with Batcher(Labelled()) as batcher, listening("127.0.0.1", 0) as listener:
        outer = FastAPI()
        outer.mount("/pictures", create_app(batcher))
        running = uvicorn.Server(uvicorn.Config(outer, log_config=None, lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: running.started)
            yield url_of(listener) + "/pictures"
        finally:
            running.should_exit = True
            thread.join(LONG)


def test_it_may_be_mounted_in_another_application() -> None:
    with mounted() as url:
        accepted = httpx.post(url + "/v1/samples", json={"seed": 3}, headers={"Prefer": "respond-async"})
        where = accepted.headers["location"]
        assert where.startswith("/pictures/v1/samples/")
        where = url.removesuffix("/pictures") + where
        until(lambda: httpx.get(where + "?format=png").status_code == 200)
        png = httpx.get(where + "?format=png")
        np.testing.assert_array_equal(pixels(png.content), grid(wanted(seed=3)))
        assert httpx.post(url + "/v1/samples", json={"steps": 99}).json()["error"]["param"] == "steps"


# --- OpenAI's -----------------------------------------------------------------------------------------------


def test_openais_own_client(live: Live) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        assert client.models.retrieve("toy").id == "toy"
        more = {"seed": 5, "num_inference_steps": 9, "guidance_scale": 2.0}
        made = client.images.generate(
            prompt="1", model="toy", n=2, size="4x4", response_format="b64_json", extra_body=more
        )
        right = wanted(count=2, seed=5, steps=9, labels=1, guidance=2.0)
        for image, one in zip(made.data, right, strict=True):
            np.testing.assert_array_equal(pixels(base64.b64decode(image.b64_json)), one)

        found = list(client.images.generate(prompt="", stream=True, partial_images=3, extra_body={"seed": 6}))
        assert {event.type for event in found[:-1]} <= {"image_generation.partial_image"}
        assert [event.partial_image_index for event in found[:-1]] == list(range(len(found) - 1))
        assert len(found) <= 4
        assert found[-1].type == "image_generation.completed"
        np.testing.assert_array_equal(pixels(base64.b64decode(found[-1].b64_json)), wanted(seed=6)[0])
        for bad, param in (
            ({"prompt": "cat"}, "prompt"),
            ({"prompt": "", "size": "1024x1024"}, "size"),
            ({"prompt": "", "n": 99}, "n"),
            ({"prompt": "", "response_format": "url"}, "response_format"),
            ({"prompt": "", "output_format": "webp"}, "output_format"),
            ({"prompt": "", "partial_images": 2}, "partial_images"),
            ({"prompt": "", "extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
            ({"prompt": "", "extra_body": {"guidance_scale": 1e9}}, "guidance_scale"),
        ):
            with pytest.raises(openai.UnprocessableEntityError) as told_so:
                client.images.generate(**bad)
            assert told_so.value.param == param
            assert "count" not in told_so.value.message  # which is n here
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="", model="dall-e-3")


# --- the Open Inference Protocol ----------------------------------------------------------------------------


def test_tritons_own_client(live: Live) -> None:
    triton = pytest.importorskip("tritonclient.http")
    with closing(triton.InferenceServerClient(live.url.removeprefix("http://"))) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("toy")
        assert client.get_server_metadata()["name"] == "ddpm-deploy"
        shapes = {each["name"]: each["shape"] for each in client.get_model_metadata("toy")["outputs"]}
        assert shapes == {"images": [-1, 1, 4, 4], "pixels": [-1, 4, 4, 1], "seed": [1], "labels": [-1]}
        right = wanted(count=3, seed=2**63, steps=4, labels=2, solver="ddim")
        given = {
            "count": np.array([3]),
            "seed": np.array([2**63], np.uint64),
            "steps": np.array([4], np.int32),
            "labels": np.array([2]),
            "solver": np.array([b"ddim"], np.object_),
        }
        for binary in (True, False):
            outputs = [
                triton.InferRequestedOutput(name, binary_data=binary) for name in ("pixels", "seed", "labels")
            ]
            answer = client.infer("toy", inputs(triton, given, binary), outputs=outputs, request_id="a1")
            np.testing.assert_array_equal(answer.as_numpy("pixels"), right)
            assert answer.as_numpy("seed")[0] == 2**63
            assert answer.as_numpy("labels").tolist() == [2, 2, 2]
            assert answer.get_response()["id"] == "a1"
        answer = client.infer("toy", [], parameters={"seed": 4, "steps": 3})
        np.testing.assert_array_equal(to_uint8(answer.as_numpy("images")), wanted(seed=4, steps=3))
        for bad in ({"count": np.array([0])}, {"stepps": np.array([1])}, {"count": np.array([1, 2])}):
            with pytest.raises(triton.InferenceServerException, match="count|stepps"):
                client.infer("toy", inputs(triton, bad, True))
        assert client.is_model_ready("toy", "1")
        assert client.get_model_metadata("toy", "1")["versions"] == ["1"]
        answer = client.infer("toy", [], model_version="1", parameters={"seed": 4, "steps": 3})
        np.testing.assert_array_equal(to_uint8(answer.as_numpy("images")), wanted(seed=4, steps=3))
        for nowhere in (client.get_model_config, client.load_model, client.get_inference_statistics):
            with pytest.raises(triton.InferenceServerException, match="Not Found"):
                nowhere("toy")
        with pytest.raises(triton.InferenceServerException, match="no model"):
            client.infer("resnet", inputs(triton, {"count": np.array([1])}, True))


def inputs(triton: Any, given: dict[str, np.ndarray], binary: bool) -> list[Any]:
    """Tensors of Triton's client."""
    kinds = {"i4": "INT32", "i8": "INT64", "u8": "UINT64"}
    made = []
    for name, array in given.items():
        tensor = triton.InferInput(name, list(array.shape), kinds.get(array.dtype.str[1:], "BYTES"))
        tensor.set_data_from_numpy(array, binary_data=binary)
        made.append(tensor)
    return made


COUNT = {"name": "count", "shape": [1], "datatype": "INT64"}


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"{}", "-1"),
        (b"{}", "3"),
        (b"{}x", "2"),
        ({"inputs": [COUNT | {"data": [1, 2]}]}, None),
        ({"inputs": [COUNT | {"data": []}]}, None),
        ({"inputs": [COUNT]}, None),
        ({"inputs": [COUNT | {"shape": [1 << 40, 1 << 40]}]}, None),
        ({"inputs": [COUNT | {"shape": [-1], "data": [1]}]}, None),
        ({"inputs": [COUNT | {"datatype": "INT65", "data": [1]}]}, None),
        ({"inputs": [COUNT | {"data": [1]}, COUNT | {"data": [1]}]}, None),
        ({"inputs": [COUNT | {"parameters": {"binary_data_size": 8}}]}, None),
        ({"inputs": [COUNT | {"parameters": {"binary_data_size": -8}}]}, None),
        ({"inputs": [COUNT | {"parameters": {"binary_data_size": 1e3}}]}, None),
        ({"inputs": [COUNT | {"data": ["1"]}]}, None),
        ({"parameters": {"priority": 3}}, None),
        ({"parameters": {"timeout": 1}}, None),
        ({"parameters": {"timeout": 10**400}}, None),
        ({"parameters": {"timesteps": [10**30]}}, None),
        ({"outputs": [{"name": "logits"}]}, None),
        ({"count": 4}, None),  # which belongs to the parameters
        ({"outputs": [{"name": "images", "parameters": {"classification": 3}}]}, None),
    ],
)
def test_bad_tensors_are_refused(live: Live, body: Any, header: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {} if header is None else {"Inference-Header-Content-Length": header}
    answer = live.ask("POST", "/v2/models/toy/infer", content=content, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xff", b"\0\0\0", b"\0\0\0\0" * 2, b""])
def test_bad_texts_in_binary_are_refused(live: Live, raw: bytes) -> None:
    tensor = {"name": "solver", "shape": [1], "datatype": "BYTES"}
    asked = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(asked))}
    answer = live.ask("POST", "/v2/models/toy/infer", content=asked + raw, headers=headers)
    assert answer.status_code == 422, answer.text


# --- as a process -------------------------------------------------------------------------------------------

heard = pytest.mark.usefixtures("ctrl_c")


@contextmanager
def process(model: Path, *arguments: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """ddpm-serve, ready, and its address; killed at the end where it still runs."""
    code = "from ddpm_deploy.cli.serve import main; main()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(model), "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    try:
        assert running.stderr is not None
        lines: list[str] = []
        for line in running.stderr:
            lines.append(line)
            if line == "ready\n":
                break
        (url,) = re.findall(r"http://\S+", "".join(lines)) or [""]
        assert url, lines
        yield running, url
    finally:
        running.kill()
        running.wait(LONG)
        running.stderr.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of twelve steps in closed form, and its proof."""
    path = tmp_path_factory.mktemp("served") / "gaussian.onnx"
    path.write_bytes((ROOT / "ddpm_deploy/doctor/gaussian.onnx").read_bytes())
    with Sampler.load(path, max_batch=2) as sampler:
        write_proof(as_proof(record(sampler.network, count=2)), proof_path(path))
    return path


@heard
def test_each_option_does_what_it_says(model: Path) -> None:
    options = {
        "--name": "toy",
        "--capacity": "2",
        "--max-count": "3",
        "--max-steps": "5",
        "--timeout": "7",
        "--keep-seconds": "9",
        "--max-connections": "4",
        "--allow-origin": "https://a.example",
        "--allow-host": "b.example",
        "--proof": "off",
    }
    words = [word for option in options.items() for word in option]
    with process(model, *words, DDPM_SERVE_API_KEY="one two") as (_, url):
        shown = {"Authorization": "Bearer two"}
        with httpx.Client(base_url=url, headers=shown, timeout=LONG) as client:
            about = client.get("/v1/model").json()
            assert about["name"] == "toy"
            limits = about["limits"]
            assert (limits["count"], limits["steps"], limits["seconds"], limits["keep_seconds"]) == (
                3,
                5,
                7,
                9,
            )
            told(client.post("/v1/samples", json={"count": 4}), 422, "count")
            told(client.post("/v1/samples", json={"steps": 6}), 422, "steps")
            own = client.post("/v1/samples", json={"steps": 1}, headers={"Origin": "https://a.example"})
            assert own.status_code == 200
            assert client.get("/v1/model", headers={"Host": "b.example"}).status_code == 200
            told(client.get("/v1/model", headers={"Host": "c.example"}), 403)
            told(client.get("/v1/model", headers={"Authorization": "Bearer three"}), 401)
            assert "ddpm_slots 2.0" in client.get("/metrics").text
            others = [httpx.Client(base_url=url) for _ in range(3)]
            assert [other.get("/health").status_code for other in others] == [200, 200, 503]
            for other in others:
                other.close()


LENGTHY = {"count": 200}  # some seconds


@heard
def test_sigterm_finishes_what_was_taken(model: Path) -> None:
    with process(model, "--capacity", "2", "--max-count", "4096") as (running, url):
        before = httpx.post(url + "/v1/samples", json=LENGTHY, headers={"Prefer": "respond-async"})
        answers: list[Any] = []

        def ask() -> None:
            answers.append(httpx.post(url + "/v1/samples", json=LENGTHY, timeout=LONG))

        waiting = threading.Thread(target=ask)
        waiting.start()
        until(lambda: b"ddpm_queue_requests 2.0" in httpx.get(url + "/metrics").content)
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(url + "/ready").status_code == 503)
        told(httpx.post(url + "/v1/samples", json={}), 503)
        where = url + before.headers["location"] + "?format=npz"
        until(lambda: httpx.get(where).status_code == 200)
        waiting.join(LONG)
        assert [answer.status_code for answer in answers] == [200]
        assert running.wait(LONG) == 0


@heard
def test_after_kill_9_amid_its_work_it_starts_again_at_the_same_port(model: Path) -> None:
    with process(model, "--capacity", "2", "--max-count", "4096", "--proof", "predictions") as (running, url):
        asked = [
            ("/v1/samples", LENGTHY),
            ("/v1/images/generations", {"n": 200, "stream": True, "partial_images": 3}),
            ("/v2/models/gaussian/infer", {"parameters": LENGTHY}),
        ]
        failed: list[Exception] = []

        def ask(path: str, body: dict[str, Any]) -> None:
            try:
                httpx.post(url + path, json=body, timeout=LONG).raise_for_status()
            except httpx.TransportError as error:
                failed.append(error)

        waiting = [threading.Thread(target=ask, args=each) for each in asked]
        for thread in waiting:
            thread.start()
        kept = httpx.post(url + "/v1/samples", json=LENGTHY, headers={"Prefer": "respond-async"})
        until(lambda: b"ddpm_queue_requests 4.0" in httpx.get(url + "/metrics").content)
        running.kill()
        running.wait(LONG)
        for thread in waiting:
            thread.join(LONG)
        assert len(failed) == len(asked)
        with process(model, "--proof", "off", "--port", url.rsplit(":", 1)[1]) as (_, again):
            assert again == url
            assert httpx.post(again + "/v1/samples", json={"steps": 2}).status_code == 200
            told(httpx.get(again + kept.headers["location"]), 404)


@heard
def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    with process(model, "--max-count", "4096", "--drain-seconds", "1000") as (running, url):
        for _ in range(16):
            httpx.post(url + "/v1/samples", json={"count": 4096}, headers={"Prefer": "respond-async"})
        running.send_signal(signal.SIGINT)
        until(lambda: httpx.get(url + "/ready").status_code == 503)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(LONG) == 0


@heard
@pytest.mark.parametrize(
    ("numbers", "patience"),
    [((signal.SIGTERM,), "0.3"), ((signal.SIGTERM, signal.SIGINT), "1000"), ((signal.SIGHUP,), "0.3")],
)
def test_who_waits_too_long_is_told(model: Path, numbers: tuple[signal.Signals, ...], patience: str) -> None:
    asked = [
        ("/v1/samples", {"count": 4096}, 503, "going down"),
        ("/v1/images/generations", {"n": 4096, "stream": True}, 200, "going down"),
        ("/v2/models/gaussian/infer", {"parameters": {"count": 4096}}, 503, "going down"),
    ]
    with process(model, "--max-count", "4096", "--drain-seconds", patience) as (running, url):
        answers: dict[str, Any] = {}

        def ask(path: str, body: dict[str, Any]) -> None:
            answers[path] = httpx.post(url + path, json=body, timeout=LONG)

        waiting = [threading.Thread(target=ask, args=each[:2]) for each in asked]
        for thread in waiting:
            thread.start()
        until(lambda: b"ddpm_queue_requests 3.0" in httpx.get(url + "/metrics").content)
        for number in numbers:
            running.send_signal(number)
            time.sleep(0.2)
        assert running.wait(LONG) == 0
        assert "Traceback" not in running.stderr.read()
        for thread in waiting:
            thread.join(LONG)
        for path, _, status, part in asked:
            assert answers[path].status_code == status
            assert part in answers[path].text


def test_answers_do_not_wait_for_one_another_on_the_way() -> None:
    with (
        listening("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        closing(listener.accept()[0]) as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def refused_start(model: Path, *arguments: str, **environment: str) -> str:
    """The one line of a server that does not come up."""
    code = "from ddpm_deploy.cli.serve import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(model), "--port", "0", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=LONG,
    )
    assert ran.returncode in (1, 2), ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr


def test_a_model_that_is_not_what_its_proof_says_is_not_served(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    with np.load(proof_path(model)) as arrays:
        content = dict(arrays)
    for name, how, part in (
        ("prediction", "predictions", "what its proof says"),
        ("images", "whole", "dB here"),
    ):
        np.savez(proof_path(other), **content | {name: content[name] + np.float32(0.5)})
        assert part in refused_start(other, "--proof", how)


def test_what_ends_it_before_it_listens_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_deploy.cli.bodies.serve.serve", interrupted)
    ended = CliRunner().invoke(main, [str(ROOT / "ddpm_deploy/doctor/gaussian.onnx")])
    assert (ended.exit_code, ended.stderr) == (130, "Error: interrupted: no request was taken yet\n")


def test_what_cannot_be_served_is_told_in_a_line(model: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert "in use (choose another --host or --port)" in refused_start(model, "--port", port)
    assert "is set, and empty" in refused_start(model, DDPM_SERVE_API_KEY="")
