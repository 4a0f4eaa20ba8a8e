"""Continuous batching against one request at a time and static batches: Poisson arrivals on one Sampler, and simulated.

    python -m benches.serving all MODEL FOLDER        everything, cifar10 as well, and its picture: half an hour
    python -m benches.serving pace MODEL              s(B), and what a simulator makes of it
    python -m benches.serving saturation MODEL        throughput with an endless queue, and the batcher's own cost
    python -m benches.serving latency MODEL LOAD …    50th and 95th percentile at shares of the best throughput
    python -m benches.serving http MODEL              what HTTP adds to a lone request

A network of long steps is simulated by the s(B) that is measured here, and run for a while with shorter requests.
"""

import http.client
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benches.models import export_preset
from benches.serving_picture import write_picture
from benches.simulated import FEWEST, POLICIES, Arrival, Full, saturation, simulate, traffic
from benches.table import HEAD, Row
from ddpm_deploy import Request, Sampler
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.runtime.chain import time_step
from ddpm_deploy.serve import Batcher, Handle
from ddpm_deploy.serve.admission import Admission

CAPACITY: Final = 16
SIZES: Final = (1, 2, 4, 8, 16)
LOADS: Final = (0.3, 0.5, 0.7, 0.9)  # of the best throughput, at which arrivals are real
_ROUNDS, _WINDOW = 3, 5.0  # of each policy with an endless queue, and seconds
_ARRIVALS: Final = 240
_LONGEST: Final = 15.0  # seconds of arrivals: one at a time takes three times as long for them
_LONG_STEPS: Final = (
    50,
    60,
    60.0,
)  # a model of long steps: most steps of a request, requests, seconds of arrivals
_PAIRS: Final = 165  # of requests, of which the first tenth warms up
_WAITING: Final = 200  # requests of a queue that does not end within the window
_SIMULATED: Final = 2000, 5  # requests, seeds
_SIMULATED_LOADS: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# Images a second of 1,000 steps by batch, of the cifar10 network in fp16: docs/gpu.md, where it was run on an H200.
_H200: Final = {1: 0.51, 64: 8.3, 256: 9.8}


@dataclass(frozen=True)
class Point:
    """One policy at one arrival rate: percentiles in seconds, and the simulator's for the same arrivals."""

    policy: str
    load: float
    p50: float
    p95: float
    told_p50: float
    told_p95: float


def measure_pace(sampler: Sampler, rounds: int = 5) -> NDArray[np.float64]:
    """s(B) for B from 0 (as for 1) to CAPACITY, sizes in turn, medians; what lies between is on a line."""
    with sampler.lent() as chain:
        times = [[time_step(chain, size) for size in SIZES] for _ in range(rounds)]
    return np.interp(np.arange(CAPACITY + 1), SIZES, np.median(times, axis=0))


def pace_rows(sampler: Sampler, rounds: int) -> Iterator[Row]:
    """s(B), and what each policy would make of it at every load."""
    table = measure_pace(sampler, rounds)
    text = ", ".join(f"{size}: {table[size] * 1e3:.2f}" for size in SIZES)
    yield Row("s(B) in ms", f"{text} (16 rows yield {16 * table[1] / table[16]:.2f}×)")
    yield from simulated_rows(simulated_p95(table))


def simulated_p95(table: NDArray[np.float64]) -> dict[str, list[float]]:
    """Seconds by policy, at each of _SIMULATED_LOADS, means of several seeds."""
    count, seeds = _SIMULATED

    def p95(policy: type[Admission], load: float) -> float:
        rate = load * saturation(table)
        runs = [simulate(policy, table, traffic(rate, count, seed)) for seed in range(seeds)]
        return float(np.mean([np.percentile(run, 95) for run in runs]))

    policies = {**POLICIES, "full": Full}
    return {name: [p95(policy, load) for load in _SIMULATED_LOADS] for name, policy in policies.items()}


def simulated_rows(told: dict[str, list[float]]) -> Iterator[Row]:
    """95th percentiles at every load, and the share of the best of the others."""
    for i, load in enumerate(_SIMULATED_LOADS):
        share = told["continuous"][i] / min(told["one at a time"][i], told["static batches"][i])
        text = ", ".join(f"{name} {seconds[i]:.3g} s" for name, seconds in told.items())
        what = f"simulated p95 at {load:.0%} of saturation"
        yield Row(what, f"{text}: {share:.2f}× the best of the others", "≤ 1.1", share <= 1.1)


def _endless(sampler: Sampler, policy: type[Admission]) -> tuple[float, float]:
    """Image steps a second with a queue that does not end, and the share of the time outside the chain."""
    requests = [Request(seed=i, steps=arrival.steps) for i, arrival in enumerate(traffic(1.0, _WAITING, 0))]
    with Batcher(sampler, CAPACITY, len(requests), admission=policy) as batcher:
        spent = _timed(batcher)
        handles = [batcher.submit(request) for request in requests]
        done, inside, start = _steps(handles), spent[0], time.perf_counter()
        time.sleep(_WINDOW)
        done, inside, seconds = _steps(handles) - done, spent[0] - inside, time.perf_counter() - start
        batcher.close(drain=False)
    return done / seconds, 1 - inside / seconds


def _timed(batcher: Batcher) -> list[float]:
    """Adds up the seconds that a batcher spends in its chain: starting images, steps, reading them."""
    chain: Any = batcher._rows.chain
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.perf_counter()
            found = call(*given)
            spent[0] += time.perf_counter() - start
            return found

        return run

    for name in ("start", "step", "images", "broken", "compact"):
        setattr(chain, name, timed(getattr(chain, name)))
    return spent


def _steps(handles: list[Handle]) -> float:
    return sum(handle.progress() * (handle.request.steps or 0) for handle in handles)


def _alone(sampler: Sampler) -> float:
    """Image steps a second of Sampler.sample, one call after the other."""
    done, start = 0, time.perf_counter()
    for i, arrival in enumerate(traffic(1.0, 2000, 0)):
        sampler.sample(1, seed=i, steps=arrival.steps)
        done += arrival.steps
        if time.perf_counter() - start > _WINDOW:
            break
    return done / (time.perf_counter() - start)


def saturation_rows(sampler: Sampler) -> Iterator[Row]:
    """Throughput with an endless queue, the policies in turn."""
    rates: dict[str, list[float]] = {name: [] for name in ("Sampler.sample", *POLICIES)}
    costs = []
    for _ in range(_ROUNDS):
        rates["Sampler.sample"].append(_alone(sampler))
        for name, policy in POLICIES.items():
            rate, cost = _endless(sampler, policy)
            rates[name].append(rate)
            if name == "continuous":
                costs.append(cost)
    for name, each in rates.items():
        yield Row(
            f"image steps a second, {name}",
            f"{statistics.median(each):.0f} ({min(each):.0f} … {max(each):.0f})",
        )
    for other in ("Sampler.sample", "static batches"):
        ratios = [a / b for a, b in zip(rates["continuous"], rates[other], strict=True)]
        got = statistics.median(ratios)
        asked = ("≥ 2.3", got >= 2.3) if other == "Sampler.sample" else ("", None)
        yield Row(
            f"throughput at saturation ÷ {other}",
            f"{got:.2f} ({min(ratios):.2f} … {max(ratios):.2f})",
            *asked,
        )
    cost = statistics.median(costs)
    yield Row(
        "the batcher's own time ÷ the whole, endless queue, capacity 16",
        f"{cost:.2%} ({min(costs):.2%} … {max(costs):.2%})",
        "≤ 3%",
        cost <= 0.03,
    )


def _serve(
    sampler: Sampler, policy: type[Admission], arrivals: Sequence[Arrival]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds from each arrival to its image, in real time; and s(B) as it was in that time.

    Sizes that did not come are as the batcher takes them to be, as much slower or faster as their neighbours were.
    """
    ended, steps = np.zeros(len(arrivals)), defaultdict[int, list[float]](list)

    class Noted(policy):  # type: ignore[misc, valid-type]
        """It, and what each step took."""

        def stepped(self, seconds: float) -> None:
            steps[self.rows].append(seconds)
            super().stepped(seconds)

    def note(index: int) -> Any:
        def done(_: object) -> None:
            ended[index] = time.perf_counter()

        return done

    with Batcher(sampler, CAPACITY, len(arrivals), admission=Noted) as batcher:
        start = time.perf_counter()
        for i, arrival in enumerate(arrivals):
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            batcher.submit(Request(seed=i, steps=arrival.steps)).add_done_callback(note(i))
        told = batcher.pace
    sizes = sorted(steps)
    slower = np.interp(range(CAPACITY + 1), sizes, [np.mean(steps[size]) / told[size] for size in sizes])
    return ended - start - [arrival.at for arrival in arrivals], told * slower


def latencies(sampler: Sampler, load: float, arrivals: Sequence[Arrival]) -> Iterator[Point]:
    """Of each policy, at one arrival rate."""
    for name, policy in POLICIES.items():
        real, table = _serve(sampler, policy, arrivals)
        told = simulate(policy, table, arrivals)
        yield Point(name, load, *np.percentile(real, [50, 95]), *np.percentile(told, [50, 95]))


def latency_rows(points: Sequence[Point], rate: float, most: float | None = None) -> Iterator[Row]:
    """Percentiles at one arrival rate, beside the simulator's for the same arrivals and the s(B) of their time.

    most: what is asked of the last row, if anything is.
    """
    for point in points:
        yield Row(
            f"{point.policy} at {point.load:.0%} of saturation ({rate:.1f} requests/s)",
            f"p50 {point.p50:.3f} s, p95 {point.p95:.3f} s (simulated {point.told_p50:.3f}, {point.told_p95:.3f}: "
            f"off by {point.told_p50 / point.p50 - 1:+.0%}, {point.told_p95 / point.p95 - 1:+.0%})",
        )
    p95 = {point.policy: point.p95 for point in points}
    share = p95.pop("continuous") / min(p95.values())
    asked = (f"≤ {most}", share <= most) if most else ("", None)
    yield Row(f"p95 ÷ the best of the others at {points[0].load:.0%}", f"{share:.2f}", *asked)


def _arrivals(table: NDArray[np.float64], load: float) -> tuple[float, list[Arrival]]:
    """Requests a second, and the requests."""
    rate = load * saturation(table)
    return rate, traffic(rate, min(_ARRIVALS, int(_LONGEST * rate)), seed=1)


def _long_arrivals(table: NDArray[np.float64], load: float) -> tuple[float, list[Arrival]]:
    """The same of a model whose steps are long: requests of fewer steps."""
    most, count, seconds = _LONG_STEPS
    rate = load * saturation(table, most)
    return rate, traffic(rate, min(count, int(seconds * rate)), 1, most)


def http_rows(sampler: Sampler) -> Iterator[Row]:
    """What HTTP adds to a lone request on an idle server: pairs with `submit` to the same batcher, in one process."""
    import uvicorn  # which no other part needs

    from ddpm_deploy.serve.http import create_app

    def asked(seed: int) -> float:
        start = time.perf_counter()
        client.request("POST", "/v1/samples", json.dumps({"seed": str(seed), "steps": FEWEST}))
        answer = client.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        return time.perf_counter() - start

    def submitted(seed: int) -> float:
        start = time.perf_counter()
        batcher.submit(Request(seed=seed, steps=FEWEST)).result()
        return time.perf_counter() - start

    listener = socket.create_server(("127.0.0.1", 0))
    with Batcher(sampler, CAPACITY) as batcher:
        server = uvicorn.Server(uvicorn.Config(create_app(batcher), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = http.client.HTTPConnection(*listener.getsockname())
        pairs = np.array([(submitted(seed), asked(seed)) for seed in range(_PAIRS)])[_PAIRS // 10 :]
        client.close()
        server.should_exit = True
        thread.join()
    alone, added = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
    low, middle, high = np.percentile(added, [25, 50, 75]) * 1e3
    yield Row(f"a request of {FEWEST} steps by submit", f"{np.median(alone) * 1e3:.1f} ms")
    yield Row("HTTP adds", f"{middle:.1f} ms (quartiles {low:.1f} … {high:.1f})", "≤ 5 ms", bool(middle <= 5))


def h200() -> NDArray[np.float64]:
    """s(B) of the cifar10 network there, for B up to 64; between what was measured it lies on a line."""
    seconds = [batch / (1000 * rate) for batch, rate in _H200.items()]
    return np.interp(np.arange(65), [*_H200], seconds)


def everything(model: str, folder: str) -> Iterator[Row]:
    """A model, the cifar10 network, the projection, and the picture of all."""
    panels = []
    with Sampler.load(model, max_batch=CAPACITY) as sampler:
        yield from http_rows(sampler)
        yield from saturation_rows(sampler)
        points = []
        for load in LOADS:
            rate, arrivals = _arrivals(measure_pace(sampler), load)
            found = list(latencies(sampler, load, arrivals))
            yield from latency_rows(found, rate, 0.85 if load == 0.7 else None)
            points += found
        table = measure_pace(sampler)
        panels.append((f"{Path(model).stem}, {cpu_threads()} cores", table, points))
    with tempfile.TemporaryDirectory() as made:
        long = export_preset("cifar10", Path(made)).onnx
        sampler = Sampler.load(long, max_batch=CAPACITY)
    with sampler:
        table = measure_pace(sampler, 3)
        rate, arrivals = _long_arrivals(table, 0.7)
        yield from latency_rows(list(latencies(sampler, 0.7, arrivals)), rate, 1.1)
        panels.append((f"cifar10, {cpu_threads()} cores (simulated)", table, []))
    panels.append(("cifar10, fp16, on an H200 (projected)", h200(), []))
    drawn = []
    for name, table, points in panels:
        told = simulated_p95(table)
        yield Row(name, f"s(1) {table[1] * 1e3:.2f} ms, s({len(table) - 1}) {table[-1] * 1e3:.2f} ms")
        yield from simulated_rows(told)
        drawn.append(
            {"name": name, "loads": _SIMULATED_LOADS, "told": told, "points": [*map(asdict, points)]}
        )
    Path(folder, "serving.json").write_text(json.dumps(drawn))
    write_picture(drawn, Path(folder, "serving-latency.png"))


def _parts(part: str, model: str, rest: list[str]) -> Iterator[Row]:
    with Sampler.load(model, max_batch=CAPACITY) as sampler:
        if part == "pace":
            yield from pace_rows(sampler, int(rest[0]) if rest else 5)
        elif part == "saturation":
            yield from saturation_rows(sampler)
        elif part == "http":
            yield from http_rows(sampler)
        for load in map(float, rest if part == "latency" else ()):
            rate, arrivals = _arrivals(measure_pace(sampler), load)
            yield from latency_rows(list(latencies(sampler, load, arrivals)), rate)


def main() -> None:
    """One part, as rows of a table."""
    part, model, *rest = sys.argv[1:]
    print(HEAD, end="")
    for row in everything(model, *rest) if part == "all" else _parts(part, model, rest):
        print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
