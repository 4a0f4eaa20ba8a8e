"""The other end of a worker: a process that is asked, waited for, and ended."""

import json
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any, Final, Self

from ddpm_deploy.errors import BackendError, first_line

_GRACE: Final = 5.0  # seconds that a worker has to end


class Worker:
    """A process of `worker.serve`, in a module by its name.

    megabytes: the most memory that it had held at its last answer. It is a process group of its own, so that Ctrl-C is
    this process's to handle.
    """

    def __init__(self, module: str = "ddpm_deploy.bench.worker") -> None:
        self.megabytes: float | None = None
        self._started = time.perf_counter()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  `close` does
        self._process = subprocess.Popen(
            # -P: the folder that one stands in is not one to import from.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,
        )

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._started

    def ask(self, question: str, **given: Any) -> Any:
        """The answer. Raises BackendError where the worker could not give one, or died."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps([question, given]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BackendError(self._end())
        said = json.loads(line)
        if "problem" in said:
            raise BackendError(said["problem"])
        self.megabytes = said["megabytes"]
        return said["answer"]

    def _end(self) -> str:
        """What there is to say of a worker that died."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        if code == -9:
            return "its process was killed, as the system does where memory runs out"
        return f"its process ended with {code}" + (f": {first_line(Exception(lines[-1]))}" if lines else "")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(_GRACE)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.kill()
