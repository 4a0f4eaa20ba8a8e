"""Runs on Ray, which is really started: the bytes of one process, whatever is killed meanwhile.

Each test that starts Ray starts its own, in a process of its own: what Ray does to signals, warnings and the end of a
process stays there.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from ddpm_deploy.bulk.manifest import NAME, Manifest
from ddpm_deploy.bulk.ray import Crew, Node, Plan, planned
from ddpm_deploy.bulk.shards import put_shard
from ddpm_deploy.bulk.worker import Folder, Job, Worker
from ddpm_deploy.errors import BackendError, DependencyError, SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.version import __version__
from tests.test_cli import call, refused
from tests.test_shards import MODEL, NAMES, RUN, SLOWER, content, run

pytest.importorskip("ray")
Driver = subprocess.Popen[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of the slower run, by one process."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    run(folder, *SLOWER, "--batch", 1)
    return content(folder)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a name short enough for sockets; nothing may be left in it."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


def started(temporary: Path, folder: Path, *options: object, model: str | Path = MODEL) -> Driver:
    """The slower run on Ray, in a process of its own, in a group of its own, as a shell would start it."""
    code = "from ddpm_deploy.cli.run import main; main()"
    arguments = (model, *RUN, *SLOWER, "--batch", 1, "-o", folder, "--ray", *options)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env=os.environ | {"TMPDIR": str(temporary)},
    )


def ended(driver: Driver, code: int = 0) -> str:
    """What a run said on standard error, once it ended with this code."""
    results, said = driver.communicate(timeout=120)
    assert driver.returncode == code, said
    assert "Traceback" not in said
    assert results.count("\n") == (code == 0)  # the line of what was made
    return said


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, and how each is called."""
    below, lines = {pid: ""}, []
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            lines.append((int(process.name), parent, (process / "cmdline").read_text().replace("\0", " ")))
    for _ in lines:
        new = {own: line for own, parent, line in lines if parent in below and own not in below}
        if not new:
            break
        below |= new
    return {own: line for own, line in below.items() if own != pid}


def until(what: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is so."""
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("0*.npz")))


def at_work(driver: Driver) -> list[int]:
    """The processes of the workers that make a shard."""
    return [pid for pid, line in descendants(driver.pid).items() if line.startswith("ray::_Actor.deliver")]


def gone(processes: dict[int, str]) -> bool:
    """Whether none of some processes is there any more, but for names without a process."""
    return not any((Path("/proc") / str(pid) / "exe").exists() for pid in processes)


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if not name.startswith(".")}


# --- Ray, started ----------------------------------------------------------------------------------------


def test_a_worker_that_is_killed(tmp_path: Path, temporary: Path, whole: dict[str, bytes]) -> None:
    driver = started(temporary, tmp_path / "s", "--workers", 2)
    until(lambda: shards_in(tmp_path / "s") and len(at_work(driver)) == 2)
    os.kill(at_work(driver)[0], signal.SIGKILL)
    processes = descendants(driver.pid)
    said = ended(driver)
    assert "2 workers of 1 thread" in said
    assert "a worker was lost while making " in said
    assert content(tmp_path / "s") == whole
    until(lambda: gone(processes), 10)


def test_a_run_that_is_done_needs_no_cluster(tmp_path: Path) -> None:
    """It is told as any other, to programs too."""
    run(tmp_path / "s")
    told = run(tmp_path / "s", "--ray", "127.0.0.1:1")
    assert (told["shards_made"], told["shards_found"], told["images_per_second"]) == (0, 6, 0)


@pytest.mark.usefixtures("ctrl_c")
def test_a_driver_that_is_ended_goes_on(tmp_path: Path, temporary: Path, whole: dict[str, bytes]) -> None:
    """By kill -9, then by Ctrl-C in its terminal: its cluster ends with it, and what is there is not made again."""
    folder = tmp_path / "s"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        driver = started(temporary, folder, "--workers", 2)
        until(lambda driver=driver: shards_in(folder) and at_work(driver))  # type: ignore[misc]
        processes = descendants(driver.pid)
        os.killpg(driver.pid, number)
        said = ended(driver, code)
        until(lambda processes=processes: gone(processes), 20)  # type: ignore[misc]
        if number == signal.SIGINT:
            assert "of 6 shards are there: the same command goes on" in said
            assert said.count("Error: interrupted") == 1
        else:
            for path in temporary.iterdir():
                shutil.rmtree(path)
    there = {path: path.stat().st_ino for path in folder.glob("0*.npz")}
    assert 1 <= len(there) < 6
    ended(started(temporary, folder, "--workers", 2))
    assert {path: path.stat().st_ino for path in there} == there
    assert visible(folder) == whole


def test_a_shard_that_ends_every_worker(tmp_path: Path, temporary: Path) -> None:
    """It is not tried for ever."""
    driver = started(temporary, tmp_path / "s", "--workers", 1)
    killed: set[int] = set()
    while driver.poll() is None and len(killed) < 20:
        for pid in set(at_work(driver)) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.01)
    said = ended(driver, 1)
    assert len(killed) == 3
    assert "Error: 3 workers in turn were lost while making 000000-000079.npz (" in said


def test_a_full_disk(small_disk: Path, temporary: Path) -> None:
    """The error of a worker is the run's, at once and on one line."""
    said = ended(started(temporary, small_disk / "s", "--workers", 1), 1)
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert line.endswith("cannot be written: no space left on device: free some space there")
    assert visible(small_disk / "s").keys() <= {NAME}


# --- a cluster -------------------------------------------------------------------------------------------

START = (
    "-m",
    "ray.scripts.scripts",
    "start",
    "--block",
    "--num-cpus=1",
    "--num-gpus=0",
    "--disable-usage-stats",
)
HIDDEN = 'mount -t tmpfs tmpfs "$0" && exec "$@"'


@contextmanager
def node(*options: object, hidden: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A node of a cluster, with one core. hidden: a folder in whose place it sees an empty one."""
    command = [sys.executable, *START, f"--object-store-memory={80 << 20}", *map(str, options)]
    if hidden:
        command = ["unshare", "--mount", "sh", "-c", HIDDEN, str(hidden), *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if "runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        reader = threading.Thread(target=process.stdout.read)  # or it would wait for one
        reader.start()
        try:
            yield process
        finally:
            processes = descendants(process.pid)
            for pid in (process.pid, *processes):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: gone(processes), 10)
            reader.join()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of one's own, whatever others have on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.mark.usefixtures("token")
def test_two_nodes_of_which_one_is_killed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The second sees neither the model nor the folder: it is sent the one, and its shards come back."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("hiding a folder from a process takes root")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = shutil.copy(MODEL, tmp_path / "m.onnx")
    temporary = tempfile.mkdtemp(prefix="r")
    head = node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}")
    try:
        with head, node(f"--address=127.0.0.1:{port}", hidden=tmp_path) as second:
            driver = started(Path(temporary), tmp_path / "s", f"127.0.0.1:{port}", model=model)
            until(lambda: shards_in(tmp_path / "s") >= 2)
            processes = descendants(second.pid)
            (raylet,) = (pid for pid, line in processes.items() if "/raylet " in line)
            os.kill(raylet, signal.SIGKILL)
            said = ended(driver)
    finally:
        shutil.rmtree(temporary)
    assert "2 workers of 1 thread" in said
    assert "a worker does not have " in said
    assert "a worker was lost while making " in said
    assert content(tmp_path / "s") == whole


# --- without a cluster -----------------------------------------------------------------------------------


def job(model: Path, **other: object) -> Job:
    """To load a model on one thread."""
    plain = Job(
        version=__version__,
        model=str(model),
        digest=open_model(MODEL).digest,
        rows=4,
        device=None,
        backend=None,
        precision=None,
        weights="ema",
        threads=1,
    )
    return replace(plain, **other)  # type: ignore[arg-type]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that is in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Worker()


def test_a_worker_makes_the_shard_of_one_process(tmp_path: Path, worker: Worker) -> None:
    """Where it sees the folder it writes there; where not, the bytes come back."""
    run(tmp_path / "one")
    manifest = Manifest.load(tmp_path / "one")
    opened = worker.open(job(MODEL))
    assert opened
    assert opened.spec == manifest.spec
    assert opened.versions == manifest.versions
    (tmp_path / "two").mkdir()
    with Folder.marked(tmp_path / "two") as folder:
        assert worker.make(folder, manifest, 0) is None
        assert worker.images() == pytest.approx(4)
        data = worker.make(replace(folder, content="another"), manifest, 5)
        assert data
        assert sorted(visible(tmp_path / "two")) == NAMES[:1]
        put_shard(tmp_path / "two", manifest, 5, data)
        for spoilt in (data[:-1], data[:300] + b"?" + data[301:], b""):
            with pytest.raises(BackendError, match=f"{NAMES[4]} came from its worker and "):
                put_shard(tmp_path / "two", manifest, 4, spoilt)
    two = content(tmp_path / "two")
    assert two == {name: content(tmp_path / "one")[name] for name in (NAMES[0], NAMES[5])}


def test_a_folder_that_is_another(tmp_path: Path) -> None:
    with Folder.marked(tmp_path) as folder:
        assert folder.is_seen
        assert not replace(folder, content="another").is_seen
        assert not replace(folder, token="other").is_seen
        assert not replace(folder, path=str(tmp_path / "none")).is_seen
    assert not folder.is_seen
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_sent(tmp_path: Path, worker: Worker) -> None:
    other = tmp_path / "m.onnx"
    assert worker.open(job(other)) is None
    other.write_bytes(b"another")
    assert worker.open(job(other)) is None
    assert worker.open(job(other), MODEL.read_bytes())
    with pytest.raises(BackendError, match="m.onnx did not come whole to "):
        worker.open(job(other), b"another")


def test_a_worker_of_another_version_is_told(worker: Worker) -> None:
    with pytest.raises(
        DependencyError, match=f"has ddpm-deploy {__version__}, and this run is of 9.9: install the"
    ):
        worker.open(job(MODEL, version="9.9"))


@pytest.mark.parametrize(
    ("nodes", "shards", "workers", "threads", "gpu", "plan"),
    [
        ([Node(2)], 100, None, None, None, Plan(2, 1, False)),
        ([Node(64)], 4, None, None, None, Plan(4, 16, False)),
        ([Node(8), Node(8)], 3, None, None, None, Plan(3, 4, False)),  # of 5 threads, two would find room
        ([Node(64)], 1000, None, 8, None, Plan(8, 8, False)),
        ([Node(8), Node(12)], 1000, None, 8, None, Plan(2, 8, False)),
        ([Node(2)], 100, 1, None, None, Plan(1, 2, False)),
        ([Node(4)], 100, 4, None, None, Plan(4, 1, False)),
        ([Node(2)], 100, 64, None, None, Plan(64, 1, False)),  # those that find no room wait for it
        ([Node(0)], 100, None, None, None, Plan(1, 1, False)),
        ([Node(64, 4), Node(64, 4)], 100, None, None, None, Plan(8, 1, True)),
        ([Node(64, 4), Node(64, 4)], 3, None, None, True, Plan(3, 1, True)),
        ([Node(64, 4)], 100, None, None, False, Plan(64, 1, False)),
    ],
)
def test_how_many_workers(
    nodes: list[Node], shards: int, workers: int | None, threads: int | None, gpu: bool | None, plan: Plan
) -> None:
    assert planned(nodes, shards, workers, threads, gpu) == plan


def test_a_cluster_without_room_is_told_with_what_is_asked_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cores are there, and are others'."""
    ray = MagicMock()
    ray.wait.side_effect = [([], []), KeyboardInterrupt]
    monkeypatch.setattr("ddpm_deploy.bulk.ray._ROOM_SECONDS", -1.0)
    crew = Crew(ray, Plan(1, 2, False), open_model(MODEL), MagicMock())
    with caplog.at_level("INFO", "ddpm_deploy"), pytest.raises(KeyboardInterrupt):
        crew.first()
    assert "which takes 2 CPUs of one machine: the cluster may have no room; --threads 1 asks" in caplog.text


def test_workers_that_no_machine_has_room_for() -> None:
    with pytest.raises(SettingError, match="--threads 9: the largest machine of this Ray cluster has 8 CPUs"):
        planned([Node(8), Node(2)], 10, None, 9, None)
    with pytest.raises(SettingError, match="no machine of this Ray cluster has a GPU"):
        planned([Node(8)], 10, None, None, True)


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """The address of who says this to whoever comes, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()

        def serve() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    if answer is not None:
                        connection.sendall(answer)
                    connection.settimeout(5)
                    while connection.recv(1 << 10):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"{host}:{port}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience; and the environment and the machine's address as they are."""
    monkeypatch.setattr("ddpm_deploy.bulk.ray._ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("ddpm_deploy.bulk.ray._LOCAL", ())
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "did not answer within 0 s: is that the address of a Ray cluster's head?"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no Ray cluster's head"),
    ],
)
def test_an_address_where_no_ray_is(tmp_path: Path, answer: bytes | None, problem: str) -> None:
    with listening(answer) as address:
        refused(call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray", address), 1, address, problem)
    told = "does not answer (", "is a Ray cluster's head running there?"
    refused(call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray", address), 1, address, *told)
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "address",
    ["auto", "10.0.0.1", "host:", ":6379", "host:99999", "ray://host:10001", "http://host:8265", "h:٣"],
)
def test_what_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    told = f"{address} is not the address of a Ray cluster's head, as 10.0.0.1:6379"
    refused(call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray", address), 1, told)
    monkeypatch.setenv("RAY_ADDRESS", address)
    refused(call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray"), 1, told)


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (("--shards", "--workers", 2), 2, "--workers goes with --ray: pass --ray too"),
        (("--ray",), 2, "pass --shards too"),
        (("--shards", "--ray", "--workers", 0), 2, "0 is not in the range"),
        (("--shards", "--ray", "--device", "cuda:1"), 1, "so say --device cuda"),
        (("--shards", "--ray", "--shard", "7/6", "--shard-size", 4), 2, "'7/6': parts are numbered"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(
    tmp_path: Path, options: tuple[object, ...], code: int, problem: str
) -> None:
    refused(call("run", MODEL, "--count", 22, "-o", tmp_path / "s", *options), code, problem)
    assert not (tmp_path / "s").exists()


def test_a_temporary_folder_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's sockets would not fit below it."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    (tmp_path / "long").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "long"))
    told = "Ray's sockets need a folder with a shorter name than "
    refused(
        call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray"), 1, told, "set TMPDIR to one of at most 25"
    )
    assert list((tmp_path / "long").iterdir()) == []


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    result = call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray")
    refused(result, 1, "ray is not installed: pip install ")


def test_what_needs_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is done, and a folder of another."""
    monkeypatch.setitem(sys.modules, "ray", None)
    run(tmp_path / "s")
    before = content(tmp_path / "s")
    done = call("run", MODEL, *RUN, "-o", tmp_path / "s", "--ray")
    assert done.exit_code == 0, done.output
    assert "(6 were there)" in done.stdout
    other = call("run", MODEL, *RUN, "--seed", 8, "-o", tmp_path / "s", "--ray")
    refused(other, 1, "is of another run (seed 7, not 8)")
    assert content(tmp_path / "s") == before
