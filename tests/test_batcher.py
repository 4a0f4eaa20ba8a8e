"""The Batcher, held to four invariants under random traffic: what may share a step is explicit; each request's state is
its own; what waits and runs is bounded; results go by identity, never by position."""

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy import Request, Sampler, StepTable
from ddpm_deploy.errors import BackendError, BusyError, DeadlineError, OwnershipError, SettingError
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.serve import Batcher, Handle, Preview
from ddpm_deploy.serve.admission import Admission
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, GaussianNetwork, tiny_spec
from tests.test_guidance import Labelled

ROOT = Path(__file__).parent.parent
SPEC = tiny_spec((1, 4, 4), timesteps=40, network=None)
LONG = 30  # seconds that no test takes: a hang fails


class Gated(GaussianNetwork):
    """A network whose steps happen when the test says so; `rows` are those of each step."""

    def __init__(self, max_batch: int = 4) -> None:
        super().__init__(SPEC, max_batch, 0.3, 0.5)
        self.permits = threading.Semaphore(1 << 20)  # the steps that are measured, and until `hold`
        self.rows: list[int] = []
        self.passed = threading.Semaphore(0)
        self.fails: Exception | None = None

    def hold(self) -> None:
        self.permits, self.passed, self.rows = threading.Semaphore(0), threading.Semaphore(0), []

    def allow(self, steps: int) -> None:
        """Let so many steps happen, and wait for them."""
        for _ in range(steps):
            self.permits.release()
            assert self.passed.acquire(timeout=LONG)

    def predict(self, batch: int) -> None:
        permits = self.permits
        assert permits.acquire(timeout=LONG)
        self.rows.append(batch)
        if self.fails:
            self.passed.release()
            raise self.fails
        super().predict(batch)
        self.passed.release()


class Roomy(Admission):
    """Rows are given as long as there are any, whatever the step time of so small a network."""

    def limits(self) -> tuple[int, int]:
        return self.capacity, self.capacity


@contextmanager
def gated(max_batch: int = 4, **keywords: Any) -> Iterator[tuple[Gated, Batcher]]:
    """A batcher whose network waits for permits; at the end it has all it needs."""
    network = Gated(max_batch)
    with Batcher(network, admission=Roomy, **keywords) as batcher:
        network.hold()
        try:
            yield network, batcher
        finally:
            network.fails = None
            network.permits.release(1 << 20)


def together(batcher: Batcher, *requests: Request) -> list[Any]:
    """Submit requests of which the batcher's thread sees all or none."""
    with batcher._changed:
        return [batcher.submit(request) for request in requests]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(1e-4)


def alone(request: Request, noise: Any = None) -> Array:
    """The images of a request by itself, of Gated's network."""
    with Sampler(GaussianNetwork(SPEC, 4, 0.3, 0.5)) as sampler:
        return np.concatenate(list(sampler.draw(request, noise=noise)))


def same(got: Array, wanted: Array) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


class Sick(Labelled):
    """A conditional network that goes mad for label 2 at late steps, and notes the rows of each step."""

    def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = super().answer(x, t)
        out[(self.memory["y"][: len(x)] == 2) & (t < 5)] = np.nan
        return out


def random_request(rng: np.random.Generator) -> Request:
    """Any: guided and plain, of one image and of more than there is room for, of every solver."""
    solver = rng.choice(["ddpm", "ddim", "dpmpp-2m", "sde-dpmpp-2m"])
    return Request(
        count=int(rng.choice([1, 1, 1, 2, 3, 9])),
        seed=int(rng.integers(2**63)),
        first_index=int(rng.integers(100)),
        steps=int(rng.integers(1, 21)),
        solver=str(solver),  # type: ignore[arg-type]
        labels=tuple(rng.choice(2, size=int(rng.integers(1, 3))).tolist()),
        guidance=(float(rng.uniform(0, 4)),) if rng.random() < 0.4 else (),
    )


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(place: str, seed: int) -> None:
    """Cancels, sick requests and bad noise among others: these get the bits that they get alone."""
    rng = np.random.default_rng(seed)
    inner = Sick(max_batch=8)
    network: Any = inner if place == "host" else DeviceNetwork(inner, HostDevice(seed=seed))
    requests = [random_request(rng) for _ in range(12 if place == "device" else 40)]
    fates = rng.choice(["good", "good", "good", "cancelled", "sick", "bad noise"], size=len(requests))
    handles: list[Handle] = []
    with Batcher(network, capacity=6) as batcher:
        inner.batches.clear()
        for request, fate in zip(requests, fates, strict=True):
            noise = None
            if fate == "sick":
                request = msgspec.structs.replace(request, labels=(2,), solver="ddpm", steps=None)
            if fate == "bad noise":
                noise = failing_noise(request, after=int(rng.integers(0, 8)))
            handles.append(batcher.submit(request, noise=noise, priority=float(rng.integers(-1, 2))))
            if rng.random() < 0.4:
                time.sleep(0.002)
            if fate == "cancelled":
                threading.Timer(float(rng.uniform(0, 0.01)), handles[-1].cancel).start()
    wait(handles, timeout=LONG)
    assert max(inner.batches) <= 6
    with Sampler(Labelled(max_batch=8)) as sampler:
        for request, fate, handle in zip(requests, fates, handles, strict=True):
            if handle.cancelled():
                assert fate == "cancelled"
            elif fate == "sick":
                with pytest.raises(BackendError, match="not finite"):
                    handle.result(0)
            elif fate == "bad noise" and handle.exception(0):
                assert str(handle.exception(0)) == "no more noise"
            else:
                assert handle.request.seed == request.seed
                same(handle.result(0), np.concatenate(list(sampler.draw(request))))
    status = batcher.status()
    assert (status.waiting, status.running, status.rows, status.state) == (0, 0, 0, "closed")
    assert status.submitted == len(requests) == status.completed + status.cancelled + status.failed


def failing_noise(request: Request, after: int) -> Any:
    """The request's own noise, until it fails."""
    from ddpm_deploy.reference import normal

    asked: list[int] = []

    def noise(draw: int) -> Array:
        asked.append(draw)
        if len(asked) > after:
            raise RuntimeError("no more noise")
        first = request.first_index
        return np.stack([normal(request.seed or 0, first + i, draw, (1, 4, 4)) for i in range(request.count)])

    return noise


def test_an_exported_network_under_threads(onnx_path: Path) -> None:
    requests = [Request(count=1 + i % 3, seed=i, steps=2 + i % 5, solver="ddim") for i in range(24)]
    with Sampler.load(onnx_path, max_batch=4) as sampler:
        wanted = [np.concatenate(list(sampler.draw(request))) for request in requests]
        with Batcher(sampler) as batcher, ThreadPoolExecutor(8) as pool:
            with pytest.raises(OwnershipError, match="another thread's call"):
                sampler.sample(1)
            got = list(pool.map(lambda request: batcher.submit(request).result(LONG), requests))
        for images, images_alone in zip(got, wanted, strict=True):
            same(images, images_alone)
        same(sampler.sample(1, seed=0, steps=2, solver="ddim"), wanted[0])  # it is given back


def test_a_caller_s_noise_and_table() -> None:
    request = Request(count=5, seed=3, first_index=2)
    noise = failing_noise(request, after=1 << 20)
    table = msgspec.structs.replace(request, steps=7).table_for(SPEC)
    assert isinstance(table, StepTable)
    with Batcher(Gated()) as batcher:
        handles = [
            batcher.submit(request, noise=noise),
            batcher.submit(msgspec.structs.replace(request, table=table)),
        ]
        same(handles[0].result(LONG), alone(request))
        same(handles[1].result(LONG), alone(msgspec.structs.replace(request, steps=7)))
        wrong = batcher.submit(request, noise=lambda draw: np.zeros((5, 4, 4)))
        with pytest.raises(SettingError, match=r"gave the shape \(5, 4, 4\)"):
            wrong.result(LONG)


def test_one_joins_at_the_next_step_and_leaves_when_it_is_done() -> None:
    with gated() as (network, batcher):
        long = batcher.submit(Request(seed=0, steps=20))
        network.allow(5)
        short = batcher.submit(Request(seed=1, steps=3))
        network.allow(4)  # one may have been under way
        short.result(LONG)
        assert not long.done()
        assert long.running()
        assert 0.4 <= long.progress() <= 0.55
        network.allow(20 - 9)
        same(long.result(LONG), alone(Request(seed=0, steps=20)))
        assert set(network.rows) == {1, 2}  # and the batch is narrow again
        assert network.rows[-5:] == [1] * 5
        assert long.progress() == 1
        assert not long.cancel()


def test_the_queue_is_bounded() -> None:
    with gated(max_batch=2, max_queue=3) as (network, batcher):
        running = together(batcher, *(Request(seed=i, steps=10) for i in range(2)))
        until(lambda: batcher.status().running == 2)
        waiting = [batcher.submit(Request(seed=i, steps=10)) for i in range(2, 5)]
        with pytest.raises(
            BusyError, match="3 requests are waiting, and no more may: try again in"
        ) as refused:
            batcher.submit(Request(seed=9))
        assert 0 < refused.value.retry_after < LONG
        assert batcher.status().refused == 1
        waiting[1].cancel()  # its place is free at once
        handle = batcher.submit(Request(seed=9, steps=2))
        with pytest.raises(BusyError):
            batcher.submit(Request(seed=9))
        network.permits.release(1000)
        assert not wait([*running, *waiting, handle], LONG).not_done
        same(handle.result(), alone(Request(seed=9, steps=2)))


def test_cancel_frees_the_rows_at_the_next_step() -> None:
    with gated(max_batch=2) as (network, batcher):
        first, guest = together(batcher, Request(seed=0), Request(seed=1, steps=30))
        network.allow(3)
        waiting = batcher.submit(Request(seed=2, steps=2))
        assert batcher.status().waiting == 1
        assert first.cancel()
        assert first.cancel()
        assert first.cancelled()
        with pytest.raises(CancelledError):
            first.result(0)
        network.allow(4)
        same(waiting.result(LONG), alone(Request(seed=2, steps=2)))
        network.allow(30 - 7)
        same(guest.result(LONG), alone(Request(seed=1, steps=30)))
        assert batcher.status().cancelled == 1
        assert wait([first], LONG).done  # whoever waits for it was told


def test_asyncio_is_the_same_future() -> None:
    async def ask(batcher: Batcher, network: Gated) -> Array:
        dropped = asyncio.wrap_future(batcher.submit(Request(count=4, seed=0)))
        kept = asyncio.wrap_future(batcher.submit(Request(count=2, seed=1, steps=4)))
        await asyncio.sleep(0.01)
        dropped.cancel()
        await asyncio.sleep(0.01)  # the loop tells the handle in its next turn
        network.permits.release(1 << 16)
        return await asyncio.wait_for(kept, LONG)

    with gated() as (network, batcher):
        same(asyncio.run(ask(batcher, network)), alone(Request(count=2, seed=1, steps=4)))
        until(lambda: batcher.status().cancelled == 1)


def test_deadlines() -> None:
    with gated(max_batch=1) as (network, batcher):
        with pytest.raises(DeadlineError, match=r"takes about .* s here, and its deadline is 0.00 s"):
            batcher.submit(Request(), deadline=1e-9)
        assert batcher.status().refused == 1
        running = batcher.submit(Request(seed=0, steps=2), deadline=0.5)
        waiting = batcher.submit(Request(seed=1), deadline=0.5)
        time.sleep(0.6)
        neighbour = batcher.submit(Request(seed=2, steps=3), deadline=1000)
        network.permits.release(1000)
        for handle in (running, waiting):
            with pytest.raises(DeadlineError, match="passed before the images were done"):
                handle.result(LONG)
        same(neighbour.result(LONG), alone(Request(seed=2, steps=3)))


@pytest.mark.parametrize("place", ["host", "device"])
def test_previews(place: str) -> None:
    inner = Gated(4)
    network: Any = inner if place == "host" else DeviceNetwork(inner, HostDevice(seed=1))
    request = Request(count=6, seed=5, steps=12)
    wanted: dict[tuple[int, int], Array] = {}
    with Sampler(GaussianNetwork(SPEC, 6, 0.3, 0.5)) as sampler:
        for step, _, x0 in sampler.stream(6, seed=5, steps=12):
            wanted.update({(k, step): image for k, image in enumerate(x0)})
    with Batcher(network) as batcher:
        inner.hold()
        handle, seen = batcher.submit(request), list[Preview]()
        batcher.submit(Request(seed=0, steps=17))
        handle.watch(seen.append, looks=4)
        inner.permits.release(1 << 20)
        handle.result(LONG)
        assert list(handle.previews()) == []  # that is over
    assert len({(look.index, look.step) for look in seen}) == len(seen)
    assert {look.step for look in seen} <= {0, 3, 6, 8}
    assert {look.index for look in seen} >= {4, 5}  # which began after the watcher came
    for look in seen:
        assert look.steps == 12
        assert look.image.dtype == np.float32
        np.testing.assert_allclose(look.image, wanted[look.index, look.step], atol=1e-6)


def test_a_slow_reader_holds_nobody_up() -> None:
    with gated() as (network, batcher):
        handle = batcher.submit(Request(seed=0))
        slow, patient = handle.previews(looks=40), handle.previews(looks=4)
        network.permits.release(1000)
        handle.result(LONG)
        assert len(list(slow)) <= 16
        assert len(list(patient)) == 4
        with pytest.raises(SettingError, match="looks must be from 1 to the 40 steps, not 41"):
            handle.watch(print, 41)


def test_a_watcher_that_raises_ends_its_request_alone() -> None:
    def bad(preview: Preview) -> None:
        raise ZeroDivisionError("mine")

    with gated() as (network, batcher):
        handle, neighbour = (batcher.submit(Request(count=1, seed=i)) for i in range(2))
        handle.watch(bad)
        network.permits.release(1000)
        with pytest.raises(ZeroDivisionError, match="mine"):
            handle.result(LONG)
        same(neighbour.result(LONG), alone(Request(seed=1)))


def test_a_network_that_fails_once() -> None:
    """All in flight fail, those who wait go on."""
    with gated(max_batch=2) as (network, batcher):
        running = together(batcher, *(Request(seed=i) for i in range(2)))
        network.allow(3)
        waiting = batcher.submit(Request(seed=2, steps=5))
        network.fails = RuntimeError("out of memory")
        network.allow(1)
        network.fails = None
        network.permits.release(1000)
        for handle in running:
            with pytest.raises(BackendError, match="the network failed: out of memory"):
                handle.result(LONG)
        same(waiting.result(LONG), alone(Request(seed=2, steps=5)))
        assert batcher.status().state == "open"


def test_a_network_that_is_gone() -> None:
    """Nobody waits for what will not come, and the next is told."""
    with gated(max_batch=2) as (network, batcher):
        handles = [batcher.submit(Request(seed=i)) for i in range(5)]
        network.fails = BackendError("the GPU has fallen off the bus")
        network.permits.release(1000)
        for handle in handles:
            with pytest.raises(BackendError, match="the GPU has fallen off the bus"):
                handle.result(LONG)
        until(lambda: batcher.status().state == "failed")
        with pytest.raises(BackendError, match="this batcher ended, as its network failed: the GPU"):
            batcher.submit(Request())


def test_a_network_that_never_worked() -> None:
    network = Gated()
    network.fails = BackendError("no")
    with pytest.raises(BackendError, match="no"):
        Batcher(network)
    with Sampler(Gated()) as sampler, Batcher(sampler), pytest.raises(OwnershipError):
        Batcher(sampler)


@pytest.mark.parametrize("drain", [True, False])
def test_closing(drain: bool) -> None:
    with gated(max_batch=2) as (network, batcher):
        handles = together(batcher, *(Request(seed=i, steps=8) for i in range(6)))
        network.allow(2)
        threading.Timer(0.05, network.permits.release, [1000]).start()
        batcher.close(drain=drain)
        assert all(handle.done() for handle in handles)
        assert [handle.cancelled() for handle in handles] == [not drain] * 6
        batcher.close()
        with pytest.raises(BackendError, match="this batcher is closed"):
            batcher.submit(Request())


def test_closing_has_an_end() -> None:
    with gated(max_batch=2) as (network, batcher):
        handle = batcher.submit(Request(seed=0))
        threading.Timer(0.2, network.permits.release, [1]).start()
        batcher.close(timeout=0.05)
        assert handle.cancelled()
    with pytest.raises(KeyError), Batcher(GaussianNetwork(SPEC, 4, 0.3, 0.5)) as batcher:
        late = batcher.submit(Request(count=100000))
        raise KeyError
    assert late.cancelled()


def test_a_callback_may_ask_again_and_close() -> None:
    with Batcher(GaussianNetwork(SPEC, 2, 0.3, 0.5)) as batcher:
        handles: list[Handle] = []

        def again(_: object) -> None:
            handles.append(batcher.submit(Request(seed=1, steps=2)))
            handles[-1].add_done_callback(lambda _: batcher.close())

        batcher.submit(Request(seed=0, steps=2)).add_done_callback(again)
        until(lambda: batcher.status().state == "closed")
    same(handles[0].result(0), alone(Request(seed=1, steps=2)))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"request": Request(steps=41)}, "choose from 1 to 40"),
        ({"request": Request(guidance=(2.0,))}, "guidance needs a model that knows the null class"),
        ({"request": Request(count=10**18)}, "do not fit in memory"),
        ({"request": {"count": 1}}, "submit takes a Request, not dict"),
        ({"priority": float("nan")}, "priority must be a number from -1000 to 1000, not nan"),
        ({"priority": True}, "priority must be a number"),
        ({"deadline": -1}, "deadline must be a number from 0 to 1000000000, not -1"),
        ({"deadline": "soon"}, "deadline must be a number"),
        ({"noise": 3}, "noise must be a function, not int"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with Batcher(GaussianNetwork(SPEC, 2, 0.3, 0.5)) as batcher, pytest.raises(SettingError, match=problem):
        batcher.submit(**{"request": Request(), **arguments})


@pytest.mark.parametrize("keywords", [{"capacity": 0}, {"capacity": 5}, {"max_queue": 0}, {"capacity": True}])
def test_a_batcher_that_is_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="must be a whole number from 1 to"):
        Batcher(GaussianNetwork(SPEC, 4, 0.3, 0.5), **keywords)


def test_guidance_needs_two_rows() -> None:
    with Batcher(Labelled(), capacity=1) as batcher, pytest.raises(SettingError, match="give it capacity 2"):
        batcher.submit(Request(guidance=(2.0,)))


def test_nothing_grows_with_time() -> None:
    """What is over is freed at once, with no collector's help."""
    gc.collect()
    gc.disable()
    try:
        with Batcher(GaussianNetwork(SPEC, 4, 0.3, 0.5)) as batcher:
            gone = []
            for seed in range(50):
                handle = batcher.submit(Request(count=3, seed=seed, steps=3), deadline=1000)
                next(handle.previews(1), None)
                if seed % 3:
                    handle.result(LONG)
                elif seed % 2:
                    handle.cancel()
                gone.append(weakref.ref(handle))
            del handle
            batcher.submit(Request(seed=1, steps=2)).result(LONG)
            until(lambda: not any(reference() for reference in gone))
            kept = [batcher._live, batcher._timed, batcher._watched, batcher._leaving, batcher._rows]
            until(lambda: not any([*kept, batcher._admission.seats, batcher._admission.waiting]))
    finally:
        gc.enable()


FORKED = """
import os, signal, sys
from ddpm_deploy import Request, Sampler
from ddpm_deploy.errors import OwnershipError
from ddpm_deploy.serve import Batcher
sampler = Sampler.load(sys.argv[1], threads=2, max_batch=4)
batcher = Batcher(sampler)
handle = batcher.submit(Request(seed=0, steps=40))
if not (child := os.fork()):
    for use in (lambda: batcher.submit(Request()), batcher.status, lambda: Batcher(sampler)):
        try:
            use()
        except OwnershipError as error:
            print(error)
    batcher.close()
    with Sampler.load(sys.argv[1], max_batch=2) as own, Batcher(own) as served:
        print(served.submit(Request(seed=0, steps=2)).result().shape)
    sys.exit(7)
signal.alarm(30)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert handle.result().shape == (1, 1, 8, 8)
batcher.submit(Request(seed=0))  # and it is left open
"""


def test_it_is_made_after_a_fork(onnx_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKED, onnx_path], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("was forked after the model was loaded") == 3
    assert result.stdout.splitlines()[-1] == "(1, 1, 8, 8)"


@pytest.mark.parametrize("place", ["host", "device"])
def test_numbers_that_are_not_finite_end_a_request_long_before_its_chain_does(place: str) -> None:
    class Mad(ArrayNetwork):
        """One that goes mad for label 2, of a long chain."""

        def answer(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
            out = super().answer(x, t)
            out[self.memory["y"][: len(x)] == 2] = np.nan
            return out

    spec = msgspec.structs.replace(tiny_spec((1, 4, 4), timesteps=1000), num_classes=3)
    network: Any = Mad(spec, 4) if place == "host" else DeviceNetwork(Mad(spec, 4), HostDevice(seed=0))
    with Batcher(network, admission=Roomy) as batcher:
        good, sick = together(batcher, Request(steps=100, labels=(1,), seed=1), Request(labels=(2,), seed=1))
        with pytest.raises(BackendError, match="not finite"):
            sick.result(LONG)
        assert batcher.status().steps < 100
        with Sampler(ArrayNetwork(spec, 4)) as sampler:
            same(good.result(LONG), sampler.sample(1, steps=100, labels=1, seed=1))


def test_it_needs_no_web_server() -> None:
    heavy = "('fastapi', 'uvicorn', 'torch', 'onnxruntime')"
    code = f"import sys, ddpm_deploy.serve as s; s.Batcher; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert ran.stdout.strip() == "[]", ran.stderr


def test_the_page_s_program(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/serving.md's ten lines, as they stand."""
    monkeypatch.chdir(onnx_path.parent)  # which has a model.onnx
    (text,) = re.findall(
        r"^```python\n(from .*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(compile(text, "serving.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1] == "image 0, step 15 of 20"
    with Sampler.load(onnx_path) as sampler:
        same(names["image"], sampler.sample(1, steps=20, seed=2))
