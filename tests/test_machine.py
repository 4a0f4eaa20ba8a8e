"""What a process may use: threads and memory, asked of this machine and of made ones, and who asks."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ddpm_deploy import machine
from ddpm_deploy.cli import main
from ddpm_deploy.machine import cpu_threads, memory_limit
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.sampler import Sampler


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine of 8 CPUs without limits, in a folder to which they are added."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name in ("cgroups", "cpus"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "cpus")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_affinity_of_a_process_is_heeded() -> None:
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]);"
        "from ddpm_deploy.machine import cpu_threads; print(cpu_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert said.stdout == "1\n", said.stderr


@pytest.mark.parametrize(
    ("typed", "threads"), [("3", 3), ("5,2", 5), (" 4 ", 4), ("0", 8), ("-1", 8), ("x", 8), ("", 8)]
)
def test_omp_num_threads_is_heeded(
    alone: Path, monkeypatch: pytest.MonkeyPatch, typed: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", typed)
    assert cpu_threads() == threads


def test_hyperthreads_are_no_cores(alone: Path) -> None:
    for cpu in range(8):
        write(
            alone / "cpus" / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n"
        )
    assert cpu_threads() == 4


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("", 8),
        ("9900000 100000", 8),
    ],
)
@pytest.mark.parametrize("where", ["", "docker/42", "docker"])
def test_quotas_of_cgroups(alone: Path, limit: str, threads: int, where: str) -> None:
    """Version 2, of the group itself, of the one above it, or in a container, which sees its own as the root."""
    (alone / "membership").write_text("0::/docker/42\n")
    write(alone / "cgroups" / where / "cpu.max", limit)
    assert cpu_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("300000", 3), ("-1", 8)])
@pytest.mark.parametrize("where", ["", "docker/42"])
def test_quotas_of_cgroups_of_version_1(alone: Path, quota: str, threads: int, where: str) -> None:
    (alone / "membership").write_text(
        "5:memory:/docker/42\n4:cpu,cpuacct:/docker/42\n1:name=systemd:/x\n0::/\n"
    )
    write(alone / "cgroups" / "cpu,cpuacct" / where / "cpu.cfs_quota_us", quota)
    write(alone / "cgroups" / "cpu,cpuacct" / where / "cpu.cfs_period_us", "100000")
    assert cpu_threads() == threads


@pytest.mark.parametrize("membership", [None, "", "nonsense\n", "\udcff:x:/\n"])
def test_a_machine_that_says_nothing(alone: Path, membership: str | None) -> None:
    if membership is not None:
        (alone / "membership").write_bytes(membership.encode(errors="surrogateescape"))
    assert cpu_threads() == 8
    assert memory_limit() > 2**28


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/docker/42", "docker/42/memory.max"),
        ("0::/docker/42", "memory.max"),
        ("4:memory:/docker/42", "memory/docker/memory.limit_in_bytes"),
    ],
)
def test_limits_of_memory(alone: Path, line: str, file: str) -> None:
    (alone / "membership").write_text(f"{line}\n")
    whole = memory_limit()
    for text, limit in (("max", whole), (str(2**63 - 4096), whole), ("104857600\n", 100 * 2**20)):
        write(alone / "cgroups" / file, text)
        assert memory_limit() == limit


def test_a_limit_of_the_process_itself_is_heeded() -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (10**9, resource.RLIM_INFINITY))

    code = "from ddpm_deploy.machine import memory_limit; print(memory_limit())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limited)
    assert int(said.stdout) <= 10**9, said.stderr


# --- who asks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "threads"), [(None, 3), (2, 2)])
def test_onnxruntime_has_those_threads(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch, typed: int | None, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = set(Path("/proc/self/task").iterdir())
    network = OrtNetwork(open_model(onnx_path), threads=typed)
    assert len(set(Path("/proc/self/task").iterdir()) - before) == threads - 1  # and the one that asks
    network.close()


@pytest.fixture
def two_of_pytorch() -> Iterator[None]:
    """PyTorch has two threads, and afterwards what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_of_pytorch")
@pytest.mark.parametrize(("typed", "may", "threads"), [(None, "1", 1), (None, "3", 2), (3, "1", 3)])
def test_pytorch_has_no_more_than_those_threads(
    checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch, typed: int | None, may: str, threads: int
) -> None:
    """It keeps what was set before, as that is of the whole process, where it is not too many."""
    monkeypatch.setenv("OMP_NUM_THREADS", may)
    Sampler.load(checkpoint_path, threads=typed).close()
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("two_of_pytorch")
def test_training_has_those_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    command = ["train", "digits", "-o", str(tmp_path / "m.pt"), "--steps", "1", "--batch-size", "1"]
    result = CliRunner().invoke(main, [*command, "--sample-every", "0"])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == 3
