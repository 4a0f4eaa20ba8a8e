"""Pictures of a training's samples, that never hold it up for long."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ddpm_deploy.errors import BackendError, OutputError, plural
from ddpm_deploy.runtime.images import COLOURS, Pixels, grid, save_png, to_uint8
from ddpm_deploy.runtime.network import time_call
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.train.trainer import Trainer

logger = logging.getLogger(__name__)

LONGEST: Final = 60.0  # seconds of a picture
IMAGES: Final = 16
_STEPS: Final = 100


class Pictures:
    """Draws samples of a network in training, of the averaged weights and always the same seed.

    At the start it times the network and says what a picture will cost; one that would take longer than LONGEST gets
    fewer images, or is not drawn at all. stopped: asked after each step of a picture's chain, which ends where it
    says True.
    """

    def __init__(self, trainer: Trainer, stopped: Callable[[], bool]) -> None:
        self._trainer, self._stopped = trainer, stopped
        self._network = TorchNetwork(trainer.average, trainer.spec, device=str(trainer.device))
        self._steps = min(_STEPS, trainer.spec.timesteps)
        self.images = self._affordable()

    def draw(self, path: Path) -> None:
        """Draw one, unless it costs too much or is stopped."""
        if not self.images:
            return

        def watch(step: int, x: Array, x0: Array) -> None:
            if self._stopped():
                raise _StoppedError

        spec = self._trainer.spec
        text = {"step": self._trainer.steps_done, "seed": 0, "solver": "ddpm", "steps": self._steps}
        try:
            images = Sampler(self._network).sample(self.images, steps=self._steps, seed=0, callback=watch)
            save_png(_as_grid(to_uint8(images, spec.value_range)), path, text)
        except _StoppedError:
            logger.info("the picture of step %d is not drawn", self._trainer.steps_done)
        except (BackendError, OutputError) as error:  # a picture is not worth the training
            logger.warning("%s; training goes on", error)

    def _affordable(self) -> int:
        """How many images a picture has. One is timed first, so that a large network does not take long even here."""
        one = self._seconds(1)
        if one > LONGEST:
            logger.info(
                "no pictures of samples are drawn: one of a single image would take about %s here",
                _about(one),
            )
            return 0
        images, takes = IMAGES, self._seconds(IMAGES)
        whole = takes
        while images > 1 and takes > LONGEST:
            images = max(1, min(images - 1, int(images * LONGEST / takes)))
            takes = self._seconds(images)
        fewer = f": with {IMAGES} it would take {_about(whole)}" if images < IMAGES else ""
        count, time = plural(images, "image"), _about(takes)
        logger.info("each picture of samples has %s and takes about %s%s", count, time, fewer)
        return images

    def _seconds(self, images: int) -> float:
        """What a picture takes, by the faster of two calls of the network, as a machine may be busy for a moment."""
        batch = min(images, self._network.max_batch)
        call = min(time_call(self._network, batch) for _ in range(2))
        return call * self._steps * -(-images // batch)


def _as_grid(pixels: Pixels) -> Pixels:
    """Samples (N, H, W, C) as one picture; of channels that are no colours, each is a grey one, a sample a row."""
    count, height, width, channels = pixels.shape
    if channels in COLOURS:
        return grid(pixels)
    return grid(pixels.transpose(0, 3, 1, 2).reshape(count * channels, height, width, 1), columns=channels)


class _StoppedError(Exception):
    """The training is to stop."""


def _about(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
