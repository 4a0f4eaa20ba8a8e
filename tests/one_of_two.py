"""One of two processes that train together, for the tests of what each of them sees.

`python -m tests.one_of_two RANK FOLDER SMALL_DISK CHECKPOINT` writes what happened into FOLDER, as JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from ddpm_deploy.errors import DataError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.train.checkpoint import Checkpoint, digest
from ddpm_deploy.train.data import find_images, read_images
from ddpm_deploy.train.session import Session
from ddpm_deploy.train.trainer import Trainer
from ddpm_deploy.train.world import World
from tests.models import tiny_trainer


def fail() -> NoReturn:
    raise DataError("no such images")


def alike(world: World, mine: str | None) -> str:
    """What comes of it where each says its own; None for one that fails."""
    try:
        return world.alike(fail if mine is None else lambda: mine, str)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def steps(world: World) -> list[Any]:
    """The losses and the weights of some steps."""
    trainer = tiny_trainer(world)
    losses = torch.stack([trainer.advance() for _ in range(trainer.settings.steps)])
    return [world.total(losses).tolist(), digest(trainer.network.state_dict())]


def resumed(world: World, path: Path, output: Path, steps: int) -> None:
    """Go on with a checkpoint, and save it."""
    checkpoint = Checkpoint.load(open_model(path))
    settings = msgspec.structs.replace(checkpoint.settings, steps=steps, sample_every=0)
    data = read_images(find_images("digits", labels=True), (8, 8), 1)
    checkpoint = Checkpoint(**{**vars(checkpoint), "settings": settings})
    trainer = Trainer.resume(checkpoint, data, torch.device("cpu"), world=world)
    Session(trainer, output, lambda steps, note: None).run()


def main(rank: int, folder: Path, disk: Path, checkpoint: Path) -> None:
    """Go through all of it; the last thing ends both."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    world, happened = World.of_environment(), dict[str, Any]()
    try:
        with world.joined():
            happened["both fail"] = alike(world, None)
            happened["one fails"] = alike(world, None if rank else "same")
            happened["they differ"] = alike(world, "other" if rank else "same")
            happened["same"] = alike(world, "same")
            happened["steps"] = steps(world)
            resumed(world, checkpoint, folder / "one-two.pt", 75)
            resumed(world, checkpoint, disk / "m.pt", 51)
    except Exception as error:
        happened["full disk"] = f"{type(error).__name__}: {error}"
    (folder / f"happened-{rank}.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(Path, sys.argv[2:]))
