"""Training by several processes: the same steps as by one, and one voice when something goes wrong."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.errors import BackendError, SettingError
from tests.models import tiny_spec, tiny_trainer
from tests.tolerances import TOLERANCES

torch = pytest.importorskip("torch")

from ddpm_deploy.train import world as worlds  # noqa: E402
from ddpm_deploy.train.data import find_images, read_images  # noqa: E402
from ddpm_deploy.train.settings import PRESETS  # noqa: E402
from ddpm_deploy.train.trainer import Trainer  # noqa: E402
from ddpm_deploy.train.world import ALONE, World  # noqa: E402

BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"]
# That the store is kept by whoever starts the processes, as torchrun says it.
AGENT = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
MODULE = ["-m", "ddpm_deploy.train"]
# Slices of unequal size, in parts, with everything random but dropout.
NEW = [
    *("digits", "--labels", "--label-dropout", "0.3", "--flip"),
    *("--batch-size", "9", "--accumulate", "2", "--steps", "50"),
]
LONG = [
    *("digits", "-o", "m.pt", "--batch-size", "2", "--steps", "100000"),
    *("--save-every", "100000", "--sample-every", "0"),
]


def together(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Train with two processes."""
    return subprocess.run(
        [*TORCHRUN, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=240
    )


def alone(*words: object) -> Result:
    """Train with this one."""
    result = CliRunner().invoke(ddpm_deploy, ["train", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result


def losses(checkpoint: Path) -> dict[int, float]:
    """The means that were logged."""
    with (checkpoint.with_suffix(".train") / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def weights(checkpoint: Path) -> "torch.Tensor":
    content = torch.load(checkpoint, weights_only=True)
    return torch.cat([tensor.flatten() for kind in ("raw", "ema") for tensor in content[kind].values()])


def require_same(checkpoint: Path, other: Path, steps: list[int]) -> None:
    mine, its = losses(checkpoint), losses(other)
    assert list(mine) == list(its) == steps
    limit = TOLERANCES["processes_loss"].limit
    np.testing.assert_allclose([*mine.values()], [*its.values()], rtol=limit)
    a, b = weights(checkpoint), weights(other)
    assert ((a - b).norm() / b.norm()).item() <= TOLERANCES["processes_weights"].limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 50 steps of one process, and these continued to 75."""
    folder = tmp_path_factory.mktemp("distributed")
    alone(*NEW, "-o", folder / "one.pt", "--sample-every", 0)
    alone("--resume", folder / "one.pt", "-o", folder / "one-one.pt", "--steps", 75)
    return folder


def test_two_processes_take_the_steps_of_one_and_one_goes_on(folder: Path) -> None:
    ran = together(folder, *MODULE, *NEW, "-o", "two.pt", "--sample-every", 50)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == (
        "wrote two.pt (step 50); metrics and samples are in two.train\nnext: ddpm-export two.pt\n"
    )
    ours = [line for line in ran.stderr.splitlines() if "torch/distributed" not in line]
    assert len(ours) == 3, ran.stderr  # one voice
    assert ours[1].startswith("50 steps of 9 images 1×8×8 on 2 × cpu · ")
    require_same(folder / "two.pt", folder / "one.pt", [25, 50])
    alone("--resume", folder / "two.pt", "-o", folder / "two-one.pt", "--steps", 75, "--sample-every", 0)
    require_same(folder / "two-one.pt", folder / "one-one.pt", [75])


# --- what ends a training ---------------------------------------------------------------------------


def started(folder: Path, *program: str | Path) -> "subprocess.Popen[str]":
    """A long training by two processes, after some steps."""
    process = subprocess.Popen(
        [*TORCHRUN, *program, *LONG], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = folder / "m.train" / "metrics.csv", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def said_by(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What was written until all had ended; none is to wait for another that has gone."""
    try:
        return process.communicate(timeout=120)
    finally:
        process.terminate()  # which torchrun passes on


def process_of(rank: int, parent: int) -> int:
    """The id of one of the processes that torchrun started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no child of rank {rank}")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_all_and_saves_once(tmp_path: Path) -> None:
    with started(tmp_path, "--no-python", BIN / "ddpm-train") as process:  # by the name of the command
        process.send_signal(signal.SIGINT)  # torchrun passes it on
        out, err = said_by(process)
    assert process.returncode
    assert out.startswith("stopped at step ")
    assert out.endswith(" of 100000; continue with: ddpm-train --resume m.pt\n")
    assert err.count("stopping after this step, with the checkpoint saved\n") == 1
    assert "Error:" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "m.train"]


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="the system does not say whose child is whose"
)
def test_a_process_that_is_killed_is_told_in_one_line(tmp_path: Path) -> None:
    with started(tmp_path, *MODULE) as process:
        os.kill(process_of(1, process.pid), signal.SIGKILL)
        out, err = said_by(process)
    assert process.returncode
    assert not out
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: another process of this training has ended (")
    assert line.endswith("): look for what it said, and continue with --resume where a checkpoint was saved")
    assert err.count("Traceback") == 1  # torchrun's own


def require_alike(zero: list[Any], one: list[Any]) -> None:
    """Both have the same losses and weights, and the losses are those of a process alone."""
    assert zero == one
    trainer = tiny_trainer(ALONE)
    whole = torch.stack([trainer.advance() for _ in range(trainer.settings.steps)]).numpy()
    error = np.abs(np.array(zero[0]) / whole - 1)
    assert len(error) == 50
    assert error.max() <= TOLERANCES["processes_loss"].limit


def test_two_processes_go_on_where_one_stopped_and_one_says_what_is_wrong(
    tmp_path: Path, folder: Path, small_disk: Path
) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.one_of_two", str(rank), tmp_path, small_disk, folder / "one.pt"],
            cwd=Path(__file__).parent.parent,
            env=os.environ | AGENT | {"MASTER_PORT": str(store.port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], said
    zero, one = (json.loads((tmp_path / f"happened-{rank}.json").read_text()) for rank in range(2))
    silent = "ToldElsewhereError: "
    assert (zero["both fail"], one["both fail"]) == ("DataError: no such images", silent)
    assert (zero["one fails"], one["one fails"]) == (silent, "DataError: no such images")
    assert zero["they differ"].startswith(
        "SettingError: process 1 has other images, settings or another checkpoint"
    )
    assert one["they differ"] == silent
    assert zero["same"] == one["same"] == "same"
    require_alike(zero["steps"], one["steps"])
    require_same(tmp_path / "one-two.pt", folder / "one-one.pt", [75])
    assert "m.pt" in zero["full disk"]
    assert not zero["full disk"].startswith(("ToldElsewhereError", "BackendError"))
    assert one["full disk"] == silent
    assert list(small_disk.glob("*.pt")) == []


# --- without other processes --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_alone_says_what_is_wrong_with_the_command_line(
    monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    result = CliRunner().invoke(ddpm_deploy, ["train", "digits", "--steps", "none"])
    assert (result.exit_code, result.output.count("\n")) == (2, int(rank == "0")), result.output


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (
            "[/pytorch/gloo/pair.cc:537] Read error [127.0.0.1]:44731: Connection reset by peer. This is typically …",
            "has ended (Read error [127.0.0.1]:44731: Connection reset by peer): look for what it said",
        ),
        (
            "[/pytorch/gloo/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete",
            "did not answer for 30 minutes (Timed out waiting 1000ms for recv operation to complete)",
        ),
    ],
)
def test_what_is_said_of_a_process_that_is_lost(said: str, what: str) -> None:
    with pytest.raises(BackendError) as caught, ALONE.reaching():
        raise RuntimeError(said)
    assert what in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes"), ALONE.reaching():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_rows_of_all_are_the_batch(size: int) -> None:
    """Each once and in order, with its own noise, image, mirroring and label, however many processes there are."""
    data = read_images(find_images("digits"), (8, 8), 1)
    settings = PRESETS["digits"].settings("digits", batch_size=7, flip=True)

    def drawn(world: World) -> tuple["torch.Tensor", "torch.Tensor"]:
        trainer = Trainer(tiny_spec(), settings, data, torch.device("cpu"), world=world)
        torch.manual_seed(0)
        return trainer._noise(300), trainer._batch(300)[0]

    parts = [drawn(World(rank, size)) for rank in range(size)]
    for whole, slices in zip(drawn(World()), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(slices), whole)
        assert max(map(len, slices)) == World(0, size).most_rows(7)
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_every_row_and_step_has_its_own_noise() -> None:
    data = read_images(find_images("digits"), (8, 8), 1)
    settings = PRESETS["digits"].settings("digits", batch_size=64)
    trainer = Trainer(tiny_spec(), settings, data, torch.device("cpu"))
    noise = torch.cat([trainer._noise(step) for step in range(50)])  # (3200, 1, 8, 8)
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)
    assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 5 / (2 * noise.numel()) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean().item()) < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, and RANK is missing: start all processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "and RANK is 'one', which is no number"),
        ({"WORLD_SIZE": "-2", "RANK": "0"}, "and WORLD_SIZE is '-2', which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 of WORLD_SIZE 2 and .* do not go together"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK 1 of LOCAL_WORLD_SIZE 1 do not"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "do not go together"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "do not go together"),
    ],
)
def test_an_environment_that_makes_no_world(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=problem):
        World.of_environment()
    result = CliRunner().invoke(ddpm_deploy, ["train", "digits", "-o", "never.pt"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output


def test_a_world_of_one_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher of a single process starts it: no port is opened."""
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    world = World.of_environment()
    assert world.launched
    with world.joined():
        assert not torch.distributed.is_initialized()
        assert world.alike(lambda: 3, str) == 3


def test_others_that_do_not_come_are_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "_JOIN", worlds.timedelta(seconds=1))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with (
            pytest.raises(BackendError, match="the 2 processes of this training did not meet at 127"),
            World(1, 2).joined(),
        ):
            pass


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number on its machine; pretended, as there may be none here."""
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(worlds, "torch_device", lambda name: torch.device("cuda" if name == "auto" else name))
    second = World(3, 4, 1, 2)
    assert second.device("auto") == second.device("cuda") == torch.device("cuda:1")
    assert World().device("auto") == torch.device("cuda:0")
    assert World().device("cuda:1") == World(1, 2).device("cuda:1") == torch.device("cuda:1")
    assert second.device("cpu") == torch.device("cpu")
    assert taken == [torch.device(f"cuda:{number}") for number in (1, 1, 0, 1, 1)]
    with pytest.raises(
        SettingError, match="2 processes of this machine cannot share cuda:0: pass --device cuda"
    ):
        second.device("cuda:0")
    with pytest.raises(SettingError, match="3 processes on this machine need a GPU each, and PyTorch sees 2"):
        World(2, 3, 2, 3).device("auto")
    with pytest.raises(SettingError, match="several processes train on cpu or cuda, and not on meta"):
        second.device("meta")
