"""What a chain adds to its network: each solver's step, a learned variance, a start."""

import statistics
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
import onnxruntime

from benches.models import Model
from benches.table import Row
from benches.timing import ROUNDS, Block, interleave, median, ratio
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.network import HostNetwork
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import DEFAULT_CHAIN, ChainSettings
from ddpm_deploy.words import SOLVERS

BLOCK: Final = 8  # steps in a row, before the next candidate's turn


def measure(model: Model, *, batch: int) -> Iterator[Row]:
    """Rows for one network at one batch size."""
    yield from _against_one_another(model, batch, f"{model.name}, batch {batch}")
    yield _building(model)


class _Still(HostNetwork):
    """A network that takes no time: what is left is the chain's own."""

    def predict(self, batch: int) -> None:
        """Leave the prediction as it is."""


def learned_variance(model: Model, *, batch: int, limit: float) -> Row:
    """What a learned variance adds to a step, over the time of the network."""
    learned = msgspec.structs.replace(model.spec, variance="learned_range")
    network = _bare_block(model, batch)
    # Each behind the network, which leaves the caches to none of them.
    blocks = {
        "network": network,
        "fixed": _chain_block(_Still(model.spec, batch), batch),
        "network again": network,
        "learned": _chain_block(_Still(learned, batch), batch),
    }
    times = interleave(blocks, BLOCK)
    share = (median(times["learned"]) - median(times["fixed"])) / median(times["network"])
    label = f"{model.name}, batch {batch}: what a learned variance adds ÷ the network"
    return Row(label, f"{share:.2%}", f"≤ {limit:.0%}", share <= limit)


def admission(model: Model, slots: int = 64) -> Iterator[Row]:
    """Starting one image in a slot and the step after it, for the dearest slot over slot 0; alone, and among others."""
    request = Request(seed=1).checked(model.spec)
    for among in (False, True):
        chain = Chain(_Still(model.spec, slots))
        if among:
            chain.start(np.arange(slots), Request(count=slots, seed=0).checked(model.spec))
        seconds: dict[int, list[float]] = {slot: [] for slot in (0, 1, slots // 2, slots - 1)}
        for _ in range(10 * ROUNDS):
            for slot, times in seconds.items():
                chain.stop(np.array([slot]))
                start = time.perf_counter()
                chain.start(np.array([slot]), request)
                chain.step()
                times.append(time.perf_counter() - start)
        medians = {slot: statistics.median(times) for slot, times in seconds.items()}
        ratio_to_first = max(medians.values()) / medians[0]
        where = "among others" if among else "alone"
        label = f"{model.name}: starting an image in the dearest of {slots} slots, and a step ÷ in slot 0, {where}"
        cost = f"{ratio_to_first:.2f} ({medians[0] * 1e3:.2f} ms)"
        yield Row(label, cost, "≤ 1.5", ratio_to_first <= 1.5)


def _against_one_another(model: Model, batch: int, label: str) -> Iterator[Row]:
    """A step of each solver, its noise and all, against one of ancestral sampling."""
    solvers = SOLVERS
    blocks = {
        solver: _chain_block(
            OrtNetwork(open_model(model.onnx), max_batch=batch), batch, ChainSettings(solver=solver)
        )
        for solver in solvers
    }
    times = interleave(blocks, BLOCK)
    for solver in solvers[1:]:
        met = abs(median(times[solver]) / median(times["ddpm"]) - 1) <= 0.02
        yield Row(
            f"{label}: a step of {solver} ÷ of ddpm", ratio(times[solver], times["ddpm"]), "1.00 ± 0.02", met
        )


def _building(model: Model) -> Row:
    """The slowest of the solvers' tables at T = 1000."""
    spec, slowest = model.spec, 0.0
    for solver in SOLVERS:
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            spec.step_table(ChainSettings(solver=solver))
            times.append(time.perf_counter() - start)
        slowest = max(slowest, median(times))
    return Row(
        "building a table of 1000 steps, the slowest solver",
        f"{slowest * 1e3:.1f} ms",
        "≤ 5 ms",
        slowest <= 5e-3,
    )


def _chain_block(network: Network, batch: int, settings: ChainSettings = DEFAULT_CHAIN) -> Block:
    """BLOCK steps on in a chain of all timesteps, which is long enough for all rounds."""
    chain = Chain(network)
    request = Request(count=batch, seed=0, solver=settings.solver).checked(network.spec)
    chain.start(np.arange(batch), request)

    def block() -> None:
        for _ in range(BLOCK):
            chain.step()

    return block


def _bare_block(model: Model, batch: int) -> Block:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_threads()
    # As ours: threads that spin on after their turn would slow down whoever comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.onnx, options, providers=["CPUExecutionProvider"])
    feeds = {
        "x": np.random.default_rng(0).standard_normal((batch, *model.spec.image_shape), np.float32),
        "temb": model.spec.embedding.table(1)[[0] * batch],
    }

    def block() -> None:
        for _ in range(BLOCK):
            session.run(None, feeds)

    return block
