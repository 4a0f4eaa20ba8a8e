"""A server under twice the load that it has room for, from clients good and bad, for minutes: nothing that it took is
lost, every answer is right, its memory stays, and its own numbers agree in the end.

    python -m benches.soak MODEL [--minutes 10] [--seed 0] [--backend openvino [--precision bf16]]

The server is `ddpm-serve` in a process of its own, on a real port. Good clients together want twice as many images at a
time as its batch has rows, over every route, and compare each answer with `Sampler.sample` of the same request. Others
call requests off, leave at every stage, send what is malformed or too large, read slowly or never, and trickle.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benches.client import LONG, Answer, Connection
from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.runtime.images import grid
from ddpm_deploy.spec import ModelSpec

CAPACITY: Final = 16
OVERLOAD: Final = 2  # times the rows of the batch that good clients want at a time
MOST_GROWTH: Final = 0.05  # of the server's memory, after it is warm
_MAX_QUEUE: Final = 4  # so few that it is often full
_MAX_COUNT: Final = 16
_KEEP: Final = ("--keep-seconds", "20", "--keep-mb", "32")
_CASES: Final = 40
_WARM: Final = 1 / 3  # of the time: caches and heaps fill up
_LOOK: Final = 0.5  # seconds between two looks at the memory
_HEADER: Final = "Inference-Header-Content-Length"
_STEPS: Final = (1, 4, 8, 16, 30, 60)
_BAD_BODIES: Final = (
    b"",
    b"[]",
    b"\xff\xfe",
    b'{"count": NaN}',
    b'{"count": 0}',
    b'{"count": 1, "count": 1}',
    b'{"steps": 1e9}',
    b'{"seed": "x"}',
    b'{"labels": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"unknown": 1}',
    b"{" * 60_000,
)
_NO_HTTP: Final = (
    b"\0" * 99 + b"\r\n\r\n",
    b"HELLO\r\n\r\n",
    b"GET /\xff HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01" * 40,
)


@dataclass(frozen=True)
class Case:
    """A request, and the images that it must give."""

    fields: dict[str, Any]
    images: NDArray[np.float32]
    pixels: NDArray[np.uint8]


def make_cases(model: Path, seed: int, place: dict[str, Any]) -> list[Case]:
    """Requests of all kinds that a model takes, and what a Sampler of its own makes of them.

    place: keywords of `Sampler.load`.
    """
    rng, made = random.Random(seed), []
    with Sampler.load(model, threads=1, **place) as sampler:
        for _ in range(_CASES):
            fields = _fields(rng, sampler.spec)
            images = sampler.sample(**fields)
            made.append(Case(fields, images, to_uint8(images, sampler.spec.value_range)))
    return made


def _fields(rng: random.Random, spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "count": rng.choice((1, 1, 1, 2, 3, 5, _MAX_COUNT)),
        "seed": rng.randrange(2**53),
        "steps": min(rng.choice(_STEPS), spec.timesteps),
        "solver": rng.choice(("ddpm", "ddim", "dpmpp-2m")),
    }
    if spec.num_classes and rng.random() < 0.5:
        fields["labels"] = rng.randrange(spec.num_classes)
    if spec.null_class and rng.random() < 0.5:
        fields["guidance"] = rng.choice((0.0, 1.5, 4.0))
    return fields


class WrongError(Exception):
    """The server did what it should not."""


class BusyError(Exception):
    """The server said that it is full, and when to come again."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass
class Visitors:
    """All who come. name: of the model. did: how often what was done. wrong: what the server did wrong.

    had: requests whose images were had, and how many images. left: those that may have been taken, by somebody who
    went before the end.
    """

    address: tuple[str, int]
    name: str
    cases: list[Case]
    rng: random.Random
    end: float
    did: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    had: int = 0
    images: int = 0
    left: int = 0
    left_images: int = 0

    async def come(self) -> None:
        """All of them, until the time is up; each ends what it is at."""
        wanted, good = 0.0, []
        mean = statistics.mean(case.fields["count"] for case in self.cases)
        while wanted < OVERLOAD * CAPACITY:
            good.append(self._again(self._good(), busy=True))
            wanted += mean
        bad = [self._again(self._bad()) for _ in range(4)]
        lasting = [
            self._again(iter([what] * 10_000)) for what in (self.trickles_a_head, self.trickles_a_body)
        ]
        slow = [self._again(iter([self.reads_slowly] * 10_000)) for _ in range(2)]
        await asyncio.gather(*good, *bad, *lasting, *slow)

    def _good(self) -> Iterator[Callable[[], Awaitable[None]]]:
        ways = (self.waits, self.comes_back, self.watches, self.as_openai, self.streams, self.infers)
        return (self.rng.choice(ways) for _ in itertools.count())

    def _bad(self) -> Iterator[Callable[[], Awaitable[None]]]:
        ways = (self.cancels, self.leaves, self.leaves, self.malforms, self.oversends, self.never_reads)
        return (self.rng.choice(ways) for _ in itertools.count())

    async def _again(self, ways: Iterator[Callable[[], Awaitable[None]]], *, busy: bool = False) -> None:
        """One visitor, who comes again and again."""
        for way in ways:
            if time.monotonic() > self.end:
                return
            try:
                await way()
                self.did[way.__name__] += 1
            except BusyError as error:
                self.did["told to come later"] += 1
                await asyncio.sleep(min(error.seconds, 1.0) * self.rng.random())
            except (AssertionError, ConnectionError, TimeoutError, WrongError, ValueError, KeyError) as error:
                self.wrong.append(f"{way.__name__}: {type(error).__name__} {error}"[:300])
            if not busy:
                await asyncio.sleep(0.1 * self.rng.random())

    def _open(self, receive_buffer: int | None = None) -> Awaitable[Connection]:
        return Connection.open(self.address, receive_buffer=receive_buffer)

    # Those who want images, and get them.

    async def waits(self) -> None:
        """Two requests of one connection, for files."""
        async with await self._open() as connection:
            for kind in ("x-npz", "png"):
                case = self.rng.choice(self.cases)
                body = json.dumps(case.fields).encode()
                accept = "image/png" if kind == "png" else "application/x-npz"
                answer = taken(await connection.ask("POST", "/v1/samples", body, Accept=accept), 200)
                if kind == "png":
                    self._check(_pixels(answer.body), grid(case.pixels), case)
                else:
                    with np.load(io.BytesIO(answer.body)) as arrays:
                        self._check(arrays["arr_0"], case.pixels, case)

    async def comes_back(self) -> None:
        """Somebody who does not wait, and asks again."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection:
            where = await self._accepted(connection, case)
            while True:
                answer = await connection.ask("GET", where)
                if answer.status == 200:
                    break
                taken(answer, 202)
                await asyncio.sleep(0.05)
            status = answer.json()
            if status["status"] != "done":
                raise WrongError(f"accepted, and {status['status']}: {status.get('error')}")
            self._check_pngs([image["png"] for image in status["images"]], case)
            taken(await connection.ask("DELETE", where), 204)

    async def watches(self) -> None:
        """One who watches, and fetches the images from another connection."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection, await self._open() as other:
            where = await self._accepted(connection, case)
            answer = taken(await connection.ask("GET", where + "/events?previews=4"), 200)
            names = re.findall(r"^event: (\w+)$", answer.body.decode(), re.MULTILINE)
            if names[0] != "status" or names[-1] != "done" or set(names[1:-1]) - {"preview"}:
                raise WrongError(f"events {names}")
            found = taken(await other.ask("GET", where + "?format=npz"), 200)
            with np.load(io.BytesIO(found.body)) as arrays:
                self._check(arrays["arr_0"], case.pixels, case)

    async def as_openai(self) -> None:
        """As OpenAI's clients ask."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection:
            body = json.dumps(_as_openai(case)).encode()
            answer = taken(await connection.ask("POST", "/v1/images/generations", body), 200)
            self._check_pngs([image["b64_json"] for image in answer.json()["data"]], case)

    async def streams(self) -> None:
        """The same with previews."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection:
            body = json.dumps({**_as_openai(case), "stream": True, "partial_images": 2}).encode()
            answer = taken(await connection.ask("POST", "/v1/images/generations", body), 200)
            told = [
                json.loads(data) for data in re.findall(r"^data: (.*)$", answer.body.decode(), re.MULTILINE)
            ]
            ended = [data for data in told if data.get("type") == "image_generation.completed"]
            self._check_pngs([data["b64_json"] for data in ended], case)

    async def infers(self) -> None:
        """As Triton's clients ask, in binary: the floats, to the bit."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection:
            answer = taken(await connection.ask("POST", self._infer(), **_infer_of(case)), 200)
            length = int(answer.headers[_HEADER.lower()])
            tensors = {each["name"]: each for each in json.loads(answer.body[:length])["outputs"]}
            size = tensors["images"]["parameters"]["binary_data_size"]
            found = np.frombuffer(answer.body[length : length + size], "<f4")
            self._check(found.reshape(case.images.shape), case.images, case)

    async def reads_slowly(self) -> None:
        """Floats as JSON, some at a time."""
        case = max(self.rng.sample(self.cases, 4), key=lambda case: case.images.size)
        async with await self._open(receive_buffer=4096) as connection:
            await connection.begin("POST", self._infer(), json.dumps({"parameters": case.fields}).encode())
            answer = taken(await connection.answer(pause=0.02, piece=2048), 200)
            data = next(each["data"] for each in answer.json()["outputs"] if each["name"] == "images")
            self._check(np.array(data, np.float32).reshape(case.images.shape), case.images, case)

    def _infer(self) -> str:
        return f"/v2/models/{self.name}/infer"

    async def _accepted(self, connection: Connection, case: Case) -> str:
        body = json.dumps(case.fields).encode()
        answer = taken(await connection.ask("POST", "/v1/samples", body, Prefer="respond-async"), 202)
        return answer.headers["location"]

    def _check(self, found: NDArray[Any], right: NDArray[Any], case: Case) -> None:
        self.had += 1
        self.images += case.fields["count"]
        if found.shape != right.shape or found.tobytes() != right.tobytes():
            raise WrongError(f"wrong images of {case.fields}")

    def _check_pngs(self, pngs: list[str], case: Case) -> None:
        self._check(np.stack([_pixels(base64.b64decode(png)) for png in pngs]), case.pixels, case)

    # Those who do not mean it.

    def _leaves(self, case: Case) -> None:
        self.left += 1
        self.left_images += case.fields["count"]

    async def cancels(self) -> None:
        """One who asks, and calls it off."""
        case = self.rng.choice(self.cases)
        async with await self._open() as connection:
            where = await self._accepted(connection, case)
            self._leaves(case)
            await asyncio.sleep(0.1 * self.rng.random())
            taken(await connection.ask("DELETE", where), 204)
            taken(await connection.ask("GET", where), 404)

    async def leaves(self) -> None:
        """One who goes at some stage: with a part of the head, of the body, while he waits, amid the answer."""
        case = self.rng.choice(self.cases)
        body = json.dumps({**_as_openai(case), "stream": True, "partial_images": 3}).encode()
        length = f"Content-Length: {len(body)}\r\n\r\n"
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n{length}".encode()
        whole = head + body
        async with await self._open() as connection:
            stage = self.rng.choice(("connected", "head", "body", "waiting", "answer"))
            if stage in ("head", "body"):
                first, last = (1, len(head)) if stage == "head" else (len(head), len(whole))
                await connection.send(whole[: self.rng.randrange(first, last)])
            elif stage != "connected":
                self._leaves(case)
                await connection.begin("POST", "/v1/images/generations", body)
                if stage == "answer":
                    await connection.head(piece=self.rng.randrange(1, 400))
            await asyncio.sleep(0.1 * self.rng.random())

    async def malforms(self) -> None:
        """One whose body, or all of it, is not as it should be."""
        async with await self._open() as connection:
            if self.rng.random() < 0.3:
                await connection.send(self.rng.choice(_NO_HTTP))
                if not await connection.closed(LONG):
                    raise WrongError("what is no HTTP is listened to")
                return
            path = self.rng.choice(("/v1/samples", "/v1/images/generations", self._infer()))
            answer = await connection.ask("POST", path, self.rng.choice(_BAD_BODIES))
            if answer.status not in (400, 413, 422):
                raise WrongError(f"a malformed body at {path}: {answer.status}")
            taken(await connection.ask("PUT", "/v1/samples"), 405)
            taken(await connection.ask("GET", "/v1/samples/" + "x" * 22), 404)

    async def oversends(self) -> None:
        """One whose body has no end."""
        async with await self._open() as connection:
            if self.rng.random() < 0.5:
                head = (
                    b"POST /v1/samples HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1099511627776\r\n\r\n"
                )
            else:
                head = b"POST /v1/samples HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            with contextlib.suppress(ConnectionError):  # it is closed before all is sent
                await connection.send(head)
                for _ in range(256):
                    await connection.send(b"1000\r\n" + b" " * 4096 + b"\r\n")
            if not await connection.closed(LONG):
                raise WrongError("a body without an end is read on")

    async def never_reads(self) -> None:
        """One who asks for previews, and reads none."""
        case = self.rng.choice(self.cases)
        async with await self._open(receive_buffer=4096) as connection:
            self._leaves(case)
            body = json.dumps({**_as_openai(case), "stream": True, "partial_images": 3}).encode()
            await connection.begin("POST", "/v1/images/generations", body)
            await asyncio.sleep(2 * self.rng.random())

    async def trickles_a_head(self) -> None:
        """A byte of a head now and then: it is let go."""
        async with await self._open() as connection:
            await self._trickle(connection, b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000)

    async def trickles_a_body(self) -> None:
        """The same of a body."""
        async with await self._open() as connection:
            await connection.send(
                b"POST /v1/samples HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
            )
            await self._trickle(connection, b" " * 1000)

    async def _trickle(self, connection: Connection, data: bytes) -> None:
        closed = asyncio.ensure_future(connection.closed(LONG))
        with contextlib.suppress(ConnectionError):
            for i in range(len(data)):
                if closed.done():
                    break
                await connection.send(data[i : i + 1])
                await asyncio.sleep(0.5)
        if not await closed:
            raise WrongError("one who trickles is not let go")


def taken(answer: Answer, status: int) -> Answer:
    """An answer of this status. Raises BusyError where it is one of a full queue."""
    if answer.status == 429:
        raise BusyError(float(answer.headers["retry-after"]))
    if answer.status != status:
        raise WrongError(f"{answer.status} instead of {status}: {answer.body[:200]!r}")
    return answer


def _pixels(png: bytes) -> NDArray[np.uint8]:
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


def _as_openai(case: Case) -> dict[str, Any]:
    """The same request in OpenAI's words."""
    fields = case.fields
    said = {"n": fields["count"], "seed": fields["seed"], "num_inference_steps": fields["steps"]}
    said |= {"solver": fields["solver"], "prompt": str(fields.get("labels", ""))}
    return said | ({"guidance_scale": fields["guidance"]} if "guidance" in fields else {})


def _infer_of(case: Case) -> dict[str, Any]:
    """The same in the Open Inference Protocol, its count and seed in binary."""
    rest = {name: value for name, value in case.fields.items() if name not in ("count", "seed")}
    size = {"binary_data_size": 8}
    inputs = [
        {"name": "count", "shape": [1], "datatype": "INT64", "parameters": size},
        {"name": "seed", "shape": [1], "datatype": "UINT64", "parameters": size},
    ]
    head = json.dumps({"inputs": inputs, "parameters": {**rest, "binary_data_output": True}}).encode()
    raw = np.array([case.fields["count"]], "<i8").tobytes() + np.array([case.fields["seed"]], "<u8").tobytes()
    return {"body": head + raw, _HEADER.replace("-", "_"): str(len(head))}


# --- the server, from outside -------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(model: Path, place: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """ddpm-serve in a process, ready, and its address; stopped by SIGTERM."""
    code = "from ddpm_deploy.cli.serve import main; main()"
    limits = ["--capacity", str(CAPACITY), "--max-queue", str(_MAX_QUEUE), "--max-count", str(_MAX_COUNT)]
    limits += [word for name, value in place.items() for word in (f"--{name}", value)]
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(model), "--port", "0", "--threads", "1", *limits, *_KEEP],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr
    try:
        lines = list(itertools.takewhile(lambda line: line != "ready\n", running.stderr))
        found = re.search(r"http://([\d.]+):(\d+)", "".join(lines))
        if not found:
            raise WrongError(f"the server did not start: {''.join(lines)}")
        yield running, (found[1], int(found[2]))
        running.send_signal(signal.SIGTERM)
        _, rest = running.communicate(timeout=LONG)
        if running.returncode or "Traceback" in rest:
            raise WrongError(f"the server ended with {running.returncode}: {rest[-2000:]}")
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def memory_of(process: int) -> int:
    """Bytes of a process's own: what it wrote, not the files that it maps."""
    text = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0])


async def _watch_memory(process: int, seen: list[int]) -> None:
    while True:
        seen.append(memory_of(process))
        await asyncio.sleep(_LOOK)


def growth_of(seen: list[int]) -> tuple[float, float]:
    """Memory once warm and at the end, in bytes: the medians of a sixth of the looks each."""
    warm, part = int(len(seen) * _WARM), max(1, len(seen) // 6)
    return statistics.median(seen[warm : warm + part]), statistics.median(seen[-part:])


async def _numbers(address: tuple[str, int]) -> dict[str, float]:
    """What /metrics says, once nothing runs or waits."""
    end = time.monotonic() + LONG
    while True:
        async with await Connection.open(address) as connection:
            text = (await connection.ask("GET", "/metrics")).body.decode()
        found = {name: float(value) for name, value in re.findall(r"^([^#\s]+) (\S+)$", text, re.MULTILINE)}
        if found["ddpm_queue_requests"] + found["ddpm_images_running"] + found["ddpm_slots_in_use"] == 0:
            return found
        if time.monotonic() > end:
            raise WrongError(f"the queue is not empty: {found}")
        await asyncio.sleep(0.1)


def disagreements(numbers: dict[str, float], visitors: Visitors) -> Iterator[str]:
    """Where the server's own numbers are not what its visitors saw."""
    done = numbers['ddpm_requests_total{outcome="completed"}']
    cancelled = numbers['ddpm_requests_total{outcome="cancelled"}']
    images = numbers["ddpm_images_total"]
    latencies = sum(value for name, value in numbers.items() if name.startswith("ddpm_request_seconds_count"))
    if numbers['ddpm_requests_total{outcome="failed"}']:
        yield "requests failed"
    if not visitors.had <= done <= visitors.had + visitors.left:
        yield f"{done:.0f} done, but {visitors.had} had, and {visitors.left} left to themselves"
    if cancelled > visitors.left or done + cancelled > visitors.had + visitors.left:
        yield f"{done:.0f} done and {cancelled:.0f} cancelled of {visitors.had} and {visitors.left}"
    if not visitors.images <= images <= visitors.images + visitors.left_images:
        yield f"{images:.0f} images made, {visitors.images} had"
    if latencies != done:
        yield f"{latencies:.0f} latencies of {done:.0f} requests"
    if any(name.startswith('ddpm_http_answers_total{status="5') for name in numbers):
        yield f"answers of 5xx: {numbers}"


async def _soaked(address: tuple[str, int], visitors: Visitors, process: int) -> list[int]:
    seen: list[int] = []
    watching = asyncio.ensure_future(_watch_memory(process, seen))
    await visitors.come()
    watching.cancel()
    visitors.wrong.extend(disagreements(await _numbers(address), visitors))
    return seen


def soak(model: Path, seconds: float, seed: int = 0, **place: str) -> tuple[str, list[str]]:
    """Serve a model and let them come for so many seconds: a line that says what happened, and all that went wrong.

    place: where and by what it runs, as `Sampler.load` and ddpm-serve call it.
    """
    cases = make_cases(model, seed, place)
    with serving(model, place) as (running, address):
        end = time.monotonic() + seconds
        visitors = Visitors(address, model.stem, cases, random.Random(seed), end)
        seen = asyncio.run(_soaked(address, visitors, running.pid))
    warm, last = growth_of(seen)
    growth = last / warm - 1
    if growth > MOST_GROWTH:
        visitors.wrong.append(f"memory grew by {growth:.1%}, from {warm / 1e6:.1f} to {last / 1e6:.1f} MB")
    did = ", ".join(f"{name.replace('_', ' ')} {times}" for name, times in sorted(visitors.did.items()))
    line = (
        f"{seconds / 60:.1f} min at {OVERLOAD}× the capacity of {CAPACITY}: {visitors.had} requests had their "
        f"{visitors.images} images, each right; {visitors.left} were left ({did}); memory {warm / 1e6:.1f} → "
        f"{last / 1e6:.1f} MB ({growth:+.1%}); queue empty, metrics agree"
    )
    return line, visitors.wrong


def main() -> None:
    """Soak a model, and exit with 1 where something went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend")
    parser.add_argument("--precision")
    asked = parser.parse_args()
    place = {name: value for name in ("backend", "precision") if (value := getattr(asked, name))}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    line, wrong = soak(asked.model, 60 * asked.minutes, asked.seed, **place)
    print(line if not wrong else f"WRONG {len(wrong)} times; {line}")
    print(*wrong[:20], sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
