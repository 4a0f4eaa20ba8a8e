"""A small Ray of the tests' own, in a process of its own, as it warns, and leaves threads behind.

    with Driver() as ray:
        ray.ask(deploy=path)

As a program it is that process: it reads commands from its standard input, a line of JSON each, and ends with that.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent
CPUS = 4  # as Ray counts them, whatever there are
STORE = 80 << 20  # bytes of Ray's memory for objects


class Driver:
    """Ray, from `with` to its end."""

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="ray")  # short, as sockets' names have 107 characters at most
        self._said = tempfile.TemporaryFile("w+")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # else it writes a token into the home folder
            "RAY_metrics_report_interval_ms": "500",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_driver", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        self._answer()
        return self

    def ask(self, **command: Any) -> Any:
        """One command: deploy=path of a config file, replicas=None, metrics=None."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise AssertionError(f"Ray has ended: {self._said.read()[-3000:]}")
        return json.loads(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def deploy(path: str) -> str:
    """`serve run` in this process, where Ray is already. Gives what it prints."""
    from click.testing import CliRunner
    from ray.serve.scripts import cli

    result = CliRunner().invoke(cli, ["run", "--non-blocking", path])
    return result.output if result.exception is None else f"{result.output}{result.exception!r}"


def replicas(_: None) -> dict[str, Any]:
    """How the application is, and its replicas: their names, states and process ids."""
    from ray.serve.context import _get_global_client

    found: dict[str, Any] = {"status": "", "message": "", "replicas": []}
    client = _get_global_client(raise_if_no_controller_running=False)
    for application in client.get_serve_details()["applications"].values() if client else ():
        found |= {key: application[key] for key in ("status", "message")}
        for deployment in application["deployments"].values():
            found["replicas"] += [
                {"name": replica["replica_id"], "state": replica["state"], "pid": replica.get("pid")}
                for replica in deployment["replicas"]
            ]
    return found


def metrics(_: None) -> str:
    """Where Prometheus reads of this machine."""
    import ray

    node = ray.nodes()[0]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def main() -> None:
    """Run Ray until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    import ray

    ray.init(
        num_cpus=CPUS,
        include_dashboard=False,
        _temp_dir=sys.argv[1],
        log_to_driver=False,
        namespace="serve",
        object_store_memory=STORE,
    )
    commands = {"deploy": deploy, "replicas": replicas, "metrics": metrics}
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        print(json.dumps(commands[name](argument), default=str), file=answers, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
