"""One of two processes that train together, in which the tests of them have things go wrong, one after another.

`python -m tests.one_of_two RANK FOLDER SMALL_DISK PORTS...` writes what happened into FOLDER, as JSON. (A process for
each case would spend its time on importing PyTorch.)
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from torch import distributed

from ddpm_deploy.cli.train import main
from ddpm_deploy.errors import BackendError
from ddpm_deploy.train import world
from ddpm_deploy.train.checkpoint import digest
from ddpm_deploy.train.world import World
from tests.models import tiny_trainer

rank, folder, disk = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ports = iter(sys.argv[4:])  # a store that a failed training left behind is not to be met again
happened: dict[str, object] = {}


def images(name: str, seed: int) -> Path:
    """Eight images in a file of this process's own."""
    path = folder / f"{name}-{rank}.npy"
    np.save(path, np.random.default_rng(seed).integers(0, 256, (8, 8, 8, 1), np.uint8))
    return path


def train(case: str, data: str | Path, *options: str, output: Path = folder / "new.pt") -> None:
    """Run the command line, and keep its exit code and what it printed."""
    os.environ["MASTER_PORT"] = next(ports)
    result = CliRunner().invoke(
        main,
        [str(data), "-o", str(output), "--preset", "digits", "--steps", "1", "--sample-every", "0", *options],
    )
    if distributed.is_initialized():
        distributed.destroy_process_group()  # as the end of the process would
    broke = None if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    happened[case] = [result.exit_code, result.output, broke]


def late() -> None:
    """The other process does not answer."""
    os.environ["MASTER_PORT"] = next(ports)
    world._ANSWER = timedelta(seconds=1)
    try:
        with World.of_environment().joined():
            if rank:
                time.sleep(3)
            World.of_environment().any(False)
    except (BackendError, world.ToldElsewhereError) as error:
        happened["late"] = [type(error).__name__, str(error)]
    distributed.destroy_process_group()


def alike() -> None:
    """Each takes the steps, and says what the losses were and what its weights are."""
    os.environ["MASTER_PORT"] = next(ports)
    together = World.of_environment()
    with together.joined():
        trainer = tiny_trainer(together)
        losses = torch.stack([trainer.advance() for _ in range(trainer.settings.steps)])
        happened["alike"] = [together.total(losses).tolist(), digest(trainer.network.state_dict())]


if __name__ == "__main__":
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    (folder / "there.pt").touch()
    ours = images("one", 0)
    train("no data", folder / "nowhere")
    train("no data in process 1", ours if rank == 0 else folder / "nowhere")
    train("other data in process 1", images("other", rank))
    train("a mistyped option", ours, "--steps", "none")
    train("a mistaken option", ours, "--label-dropout", "0.5")
    train("an output that exists", ours, output=folder / "there.pt")
    train("a small batch", ours, "--batch-size", "1")
    train("one GPU", ours, "--device", "cuda:0")
    train("a full disk", ours, output=disk / "m.pt")
    late()
    alike()
    (folder / f"happened-{rank}.json").write_text(json.dumps(happened))
