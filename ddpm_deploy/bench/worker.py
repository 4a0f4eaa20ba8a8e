"""The process of one contestant: it loads, takes a turn when it is told to, and says what it took.

What is asked comes as JSON, a line each, on standard input; what is answered goes, a line each, to the standard output
that the process was started with. What libraries print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from ddpm_deploy.errors import one_line
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.network import bucket_of
from ddpm_deploy.runtime.parity import teacher_forced, worst
from ddpm_deploy.runtime.proof import load_proof
from ddpm_deploy.runtime.request import Request

# Calls in which a backend tries its ways to run a batch size.
_TRIES: Final = {"onnxruntime": 8}
_STATUS: Final = Path("/proc/self/status")


class Contestant(Protocol):
    """What takes turns."""

    def turn(self, batch: int, steps: int) -> float:
        """Seconds that a step of a batch takes, over so many of them (or 0), after one that is not counted."""


class Backend:
    """A model in one of our backends, as the chain runs it. batches: that are to come, ascending."""

    def __init__(
        self, path: str, backend: str, precision: str | None, threads: int | None, batches: list[int]
    ) -> None:
        given: dict[str, Any] = {"precision": precision} if precision else {}
        settings = LoadSettings(threads=threads, max_batch=batches[-1], **given)
        name: Any = backend
        self.network: Any = load_network(open_model(path), settings, backend=name)
        self.chain = Chain(self.network)
        self._tries, self._met = _TRIES.get(backend, 0), {1}

    def turn(self, batch: int, steps: int) -> float:
        """Steps of the recommended chain, from its start."""
        chain, slots = self.chain, np.arange(batch)
        chain.clear()
        self._try(batch)
        request = Request(count=batch, seed=0, solver="fast").checked(self.network.spec)
        chain.start(slots, request)
        chain.step()
        chain.images(slots)  # where a device is still at work, this waits for it
        start = time.perf_counter()
        for _ in range(steps):
            chain.step()
        chain.images(slots)
        return (time.perf_counter() - start) / max(steps, 1)

    def _try(self, batch: int) -> None:
        """Let the backend try its ways to run a batch size, where it meets that for the first time."""
        for _ in range(0 if batch in self._met else self._tries):
            self.network.enqueue(bucket_of(self.network, batch))
        self._met.add(batch)

    def error(self, proof: str, images: int) -> dict[str, Any]:
        """Of its predictions, against so many images of a proof: the worst of the timesteps there."""
        recorded = load_proof(Path(proof)).first(min(images, self.network.max_batch))
        found = worst(teacher_forced(recorded, self.network))
        return {
            "timestep": found.timestep,
            "relative_rms": found.relative_rms,
            "limit": found.limit,
            "within": found.within,
        }


def serve(make: Callable[..., Contestant]) -> None:
    """Answer until standard input ends: first what `make` is given, then questions by name."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant: Any = None
    for line in sys.stdin:
        try:
            question, given = json.loads(line)
            answer = None
            if question == "make":
                contestant = make(**given)
            else:
                answer = getattr(contestant, question)(**given)
            said = {"answer": answer, "megabytes": megabytes()}
        except Exception as error:  # whatever a library raises, its row says why
            said = {"problem": one_line(error)}
        print(json.dumps(said), file=out, flush=True)


def megabytes() -> float | None:
    """The most memory that this process has held; None where the system does not say."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    serve(Backend)
