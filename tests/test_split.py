"""Batches in parts on threads of Python's: every row once, the same bits, the faster way, and what goes wrong."""

import os
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.errors import ArtefactError, BackendError
from ddpm_deploy.machine import memory_left, memory_limit, memory_used
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends import onnxruntime as backend
from ddpm_deploy.runtime.backends import split
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.backends.split import Race, Split, worth_splitting
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.sampler import Sampler

ROOT = Path(__file__).parent.parent


def parts_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ddpm-part")]


@pytest.fixture
def model(onnx_path: Path) -> ModelFile:
    """One that says that bits hold, whatever its export found."""
    spec = open_model(onnx_path).spec
    return open_model(onnx_path, msgspec.structs.replace(spec, same_bits=True))


def questions(model: ModelFile, batch: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    temb = model.spec.embedding.table(model.spec.timesteps)[rng.integers(model.spec.timesteps, size=batch)]
    return rng.standard_normal((batch, *model.spec.image_shape), np.float32), temb


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "batches"),
    [(1, []), (2, [4, 6, 8, 10, 11, 12, 13, 14]), (3, [6, 9, 11, 12, 14]), (4, [8, 11, 12]), (8, [])],
)
def test_which_batches_may_be_split(threads: int, batches: list[int]) -> None:
    """Of up to 14 rows: two for each thread, and no thread with much more than its share."""
    assert [batch for batch in range(1, 15) if worth_splitting(batch, threads)] == batches


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_row_is_run_once(threads: int) -> None:
    ran: list[tuple[int, int]] = []
    parts = Split([lambda first, end: ran.append((first, end))] * threads)
    for batch in range(threads, 20):
        ran.clear()
        parts.run(batch)
        assert len(ran) == threads
        assert sorted(row for part in ran for row in range(*part)) == list(range(batch))
    parts.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1])
def test_all_parts_have_ended_when_one_fails(failing: int, error: type[BaseException]) -> None:
    """The next step writes into the memory that they read."""
    ended = []

    def slow(first: int, end: int) -> None:
        time.sleep(0.05)
        ended.append(first)

    def fails(first: int, end: int) -> None:
        raise error("no")

    parts = Split([fails, slow] if failing == 0 else [slow, fails])
    with pytest.raises(error, match="no"):
        parts.run(4)
    assert ended == [2 if failing == 0 else 0]
    parts.close()


@pytest.mark.parametrize(("whole", "in_parts"), [(1.0, 0.5), (0.5, 1.0)])
def test_the_faster_way_wins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole: float, in_parts: float
) -> None:
    """By a clock of the test's; the first calls of each are slow, and one later call is too."""
    caplog.set_level("INFO")
    calls: list[str] = []
    now = [0.0]
    number = count()

    def way(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += 100.0 if next(number) in (0, 1, 4) else seconds

    parts = Split([lambda first, end: way("parts", in_parts)])
    monkeypatch.setattr(split.time, "perf_counter", lambda: now[0])
    race = Race(4, parts, lambda batch: way("whole", whole))
    answers = [race.run() for _ in range(8)]
    assert calls == ["parts", "whole"] * 4
    assert answers == [None] * 7 + [in_parts < whole]
    (line,) = caplog.messages
    assert line.endswith("it is divided" if in_parts < whole else "it stays whole")
    assert (
        f"a batch of 4 takes {whole * 1000:.1f} ms whole, and {in_parts * 1000:.1f} ms divided among" in line
    )
    parts.close()


# --- in ONNX Runtime ----------------------------------------------------------------------------------------


def decide(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """Let a race end so."""
    run = Race.run

    def decided(race: Race) -> bool | None:
        return faster if run(race) is not None else None

    monkeypatch.setattr(Race, "run", decided)


@pytest.mark.parametrize("faster", [True, False])
def test_a_split_network_gives_the_same_bits(
    model: ModelFile, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    decide(monkeypatch, faster)
    network, plain = OrtNetwork(model, threads=2, max_batch=12), OrtNetwork(model, threads=1, max_batch=12)
    for batch in (1, 8, 12, *[8] * 10, 12, 5, 1):
        x, temb = questions(model, batch)
        np.testing.assert_array_equal(ask(network, x, temb), ask(plain, x, temb))
    assert (network._split is not None) == faster
    assert network._whole is not None  # opened again for one image, where it was not kept
    assert bool(parts_running()) == faster
    assert plain._split is None
    network.close()
    assert not parts_running()
    with pytest.raises(BackendError, match="closed"):
        ask(network, x, temb)


def test_a_chain_while_its_ways_take_turns(model: ModelFile) -> None:
    images = [
        Sampler(OrtNetwork(model, threads=threads, max_batch=8)).sample(10, steps=12, seed=1)
        for threads in (1, 2)
    ]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("says", [None, False])
def test_a_network_whose_bits_do_not_hold_is_not_split(onnx_path: Path, says: bool | None) -> None:
    """Which way is the faster may turn out otherwise the next time: that must not show."""
    spec = msgspec.structs.replace(open_model(onnx_path).spec, same_bits=says)
    network = OrtNetwork(open_model(onnx_path, spec), threads=2, max_batch=8)
    ask(network, *questions(network._model, 8))
    assert network._split is None


def test_another_file_in_its_place_is_not_opened(tmp_path: Path, onnx_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_path.read_bytes())
    spec = msgspec.structs.replace(open_model(path).spec, same_bits=True)
    network = OrtNetwork(open_model(path, spec), threads=2, max_batch=8)
    question = questions(network._model, 8)
    (tmp_path / "other.onnx").write_bytes(b"of another model")
    (tmp_path / "other.onnx").replace(path)
    wanted = ask(OrtNetwork(open_model(onnx_path), max_batch=8), *question)
    np.testing.assert_array_equal(ask(network, *question), wanted)
    assert network._split is None


def test_another_file_in_its_place_after_the_split_has_won(
    tmp_path: Path, onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session with all threads is freed by then, and what is left of the model runs a single image too."""
    decide(monkeypatch, True)
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_path.read_bytes())
    spec = msgspec.structs.replace(open_model(path).spec, same_bits=True)
    network = OrtNetwork(open_model(path, spec), threads=2, max_batch=8)
    for _ in range(9):
        ask(network, *questions(network._model, 8))
    assert network._whole is None
    path.write_bytes(b"of another model")
    question = questions(network._model, 1)
    wanted = ask(OrtNetwork(open_model(onnx_path), max_batch=8), *question)
    np.testing.assert_array_equal(ask(network, *question), wanted)
    assert network._whole is None


def test_memory_that_is_short_is_left_alone(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10 << 20 < memory_used() < memory_limit()
    assert 0 < memory_left() < memory_limit()
    monkeypatch.setattr(backend, "memory_left", lambda: memory_used() // 2)
    network = OrtNetwork(model, threads=2, max_batch=8)
    for _ in range(3):
        ask(network, *questions(model, 8))
    assert network._split is None


def test_a_second_session_that_does_not_open_is_no_failure(
    model: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = OrtNetwork(model, threads=2, max_batch=8)
    plain = OrtNetwork(model, threads=1, max_batch=8)

    def fails(model: ModelFile, providers: list[Any], threads: int) -> None:
        raise ArtefactError("bad allocation")

    monkeypatch.setattr(backend, "_open", fails)
    for _ in range(2):
        np.testing.assert_array_equal(ask(network, *questions(model, 8)), ask(plain, *questions(model, 8)))
    assert network._split is None


def test_a_part_that_fails_is_told(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    network = OrtNetwork(model, threads=2, max_batch=8)
    question = questions(model, 8)
    ask(network, *question)
    run = backend._Bound.run

    def fails(bound: Any, first: int, end: int) -> None:
        if first:
            raise RuntimeError("bad allocation\nand more")
        run(bound, first, end)

    with monkeypatch.context() as patch:
        patch.setattr(network._split, "_others", [lambda first, end: fails(None, first, end)])
        with pytest.raises(BackendError, match=r"failed on a batch of 8: bad allocation \(a smaller batch"):
            ask(network, *question)
    np.testing.assert_array_equal(
        ask(network, *question), ask(OrtNetwork(model, threads=1, max_batch=8), *question)
    )
    network.close()


FORKED = """
import os, signal, sys
import msgspec
from ddpm_deploy import Sampler
from ddpm_deploy.model_file import open_model
spec = msgspec.structs.replace(open_model(sys.argv[1]).spec, same_bits=True)
sampler = Sampler.load(sys.argv[1], threads=2, spec=spec, max_batch=8)
wanted = sampler.sample(8, steps=2, seed=0)
sampler.network._race = None  # it is over, and the split has won
assert (sampler.sample(8, steps=2, seed=0) == wanted).all()
assert sampler.network._split is not None
child = os.fork()
if not child:
    if sys.argv[2] == "let go":
        del sampler
    sys.exit(7)  # as an interpreter ends
signal.alarm(30)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert (sampler.sample(8, steps=2, seed=0) == wanted).all()  # the parent goes on
"""


@pytest.mark.parametrize("use", ["let go", "nothing"])
def test_a_fork_of_a_process_ends(onnx_path: Path, use: str) -> None:
    command = [sys.executable, "-c", FORKED, str(onnx_path), use]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}  # of a fork beside threads
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
