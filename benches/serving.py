"""Continuous batching against one request at a time and static batches: Poisson arrivals on one Sampler, and simulated.

    python -m benches.serving pace MODEL          s(B)
    python -m benches.serving saturation MODEL    throughput with a queue that never ends, and the batcher's own cost
    python -m benches.serving latency MODEL LOAD  50th and 95th percentile at a share of the best throughput

Each takes under 90 seconds. A model of long steps is simulated by the s(B) that is measured here.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benches.simulated import POLICIES, Arrival, Full, saturation, simulate, traffic
from benches.table import HEAD, Row
from ddpm_deploy import Request, Sampler
from ddpm_deploy.runtime.chain import time_step
from ddpm_deploy.serve import Batcher, Handle
from ddpm_deploy.serve.admission import Admission

CAPACITY: Final = 16
SIZES: Final = (1, 2, 4, 8, 16)
_ROUNDS, _WINDOW = 3, 5.0  # of each policy with an endless queue, and seconds
_ARRIVALS: Final = 240
_LONGEST: Final = 15.0  # seconds of arrivals: one at a time takes three times as long for them
_WAITING: Final = 200  # requests of a queue that does not end within the window
_SIMULATED: Final = 2000, 5  # requests, seeds
_LOADS: Final = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


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
    yield from simulated_rows(table)


def simulated_rows(table: NDArray[np.float64]) -> Iterator[Row]:
    """95th percentiles in seconds at every load, over all seeds."""
    count, seeds = _SIMULATED
    for load in _LOADS:
        policies = {**POLICIES, "full": Full}
        p95 = dict.fromkeys(policies, 0.0)
        for name, policy in policies.items():
            seconds = [
                simulate(policy, table, traffic(load * saturation(table), count, seed))
                for seed in range(seeds)
            ]
            p95[name] = float(np.mean([np.percentile(each, 95) for each in seconds]))
        best = min(p95["one at a time"], p95["static batches"])
        share = p95["continuous"] / best
        text = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in p95.items())
        yield Row(
            f"simulated p95 at {load:.0%} of saturation",
            f"{text}: {share:.2f}× the best of the others",
            "≤ 1.1",
            share <= 1.1,
        )


def _endless(sampler: Sampler, policy: type[Admission]) -> tuple[float, float]:
    """Image steps a second with a queue that does not end, and the share of the time that is not the chain's own."""
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
    """Adds up the seconds that a batcher's chain takes for its steps."""
    chain: Any = batcher._chain
    step, spent = chain.step, [0.0]

    def timed() -> None:
        start = time.perf_counter()
        step()
        spent[0] += time.perf_counter() - start

    chain.step = timed
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
    sampler: Sampler, policy: type[Admission], arrivals: list[Arrival]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds from each arrival to its image, in real time; and s(B) as it was in that time."""
    ended = np.zeros(len(arrivals))

    def note(index: int) -> Any:
        def done(_: object) -> None:
            ended[index] = time.perf_counter()

        return done

    with Batcher(sampler, CAPACITY, len(arrivals), admission=policy) as batcher:
        start = time.perf_counter()
        for i, arrival in enumerate(arrivals):
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            batcher.submit(Request(seed=i, steps=arrival.steps)).add_done_callback(note(i))
    return ended - start - [arrival.at for arrival in arrivals], batcher.pace


def latency_rows(sampler: Sampler, load: float) -> Iterator[Row]:
    """Percentiles at one arrival rate, beside the simulator's for the same arrivals and the s(B) of their time."""
    table = measure_pace(sampler)
    rate = load * saturation(table)
    arrivals = traffic(rate, min(_ARRIVALS, int(_LONGEST * rate)), seed=1)
    p95 = {}
    for name, policy in POLICIES.items():
        real, found = _serve(sampler, policy, arrivals)
        simulated = simulate(policy, found, arrivals)
        p50, p95[name] = np.percentile(real, [50, 95])
        told = np.percentile(simulated, [50, 95])
        yield Row(
            f"{name} at {load:.0%} of saturation ({rate:.1f} requests/s)",
            f"p50 {p50:.3f} s, p95 {p95[name]:.3f} s (simulated {told[0]:.3f}, {told[1]:.3f}: "
            f"off by {told[0] / p50 - 1:+.0%}, {told[1] / p95[name] - 1:+.0%})",
        )
    share = p95["continuous"] / p95["static batches"]
    asked = ("≤ 0.85", share <= 0.85) if load == 0.7 else ("", None)
    yield Row(f"p95 ÷ that of static batches at {load:.0%}", f"{share:.2f}", *asked)


def main() -> None:
    """One part, as rows of a table."""
    part, model, *rest = sys.argv[1:]
    with Sampler.load(model, max_batch=CAPACITY) as sampler:
        rows = {
            "pace": lambda: pace_rows(sampler, int(rest[0]) if rest else 5),
            "saturation": lambda: saturation_rows(sampler),
            "latency": lambda: latency_rows(sampler, float(rest[0])),
        }[part]()
        print(HEAD, end="")
        for row in rows:
            print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
