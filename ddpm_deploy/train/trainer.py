"""Training: one step at a time, each a function of its number, so that a resumed run is the same run."""

import logging
import math
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ddpm_deploy.errors import BackendError, SettingError, first_line
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train import ema
from ddpm_deploy.train.checkpoint import Checkpoint, StateDict, digest, new_network
from ddpm_deploy.train.data import Dataset
from ddpm_deploy.train.diffusion import Diffusion
from ddpm_deploy.train.settings import Settings
from ddpm_deploy.train.world import ALONE, World, kept_apart
from ddpm_deploy.version import __version__

logger = logging.getLogger(__name__)

_ORDER, _STEP, _START, _NOISE, _DROPOUT = range(5)  # the uses of the seed


class Trainer:
    """A network in training.

    spec: of the network (its provenance is filled in at `checkpoint`). settings: of the training.
    data: with labels, where the spec has classes. device: of the network. compiled: by torch.compile;
        a faster step after a slow first one, and its own rounding.
    world: the processes that train it together; each has all images, and takes its rows of every batch.

    Everything random in step n follows from (seed, n), the noise of a row from (seed, n, row), and the order of the
    images from (seed, epoch): no state of a random generator needs saving, and any number of processes take the same
    steps, up to rounding. Dropout alone differs: its masks follow from the process too.

    Raises SettingError where the batch has not one row for each process.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        data: Dataset,
        device: torch.device,
        *,
        compiled: bool = False,
        world: World = ALONE,
    ) -> None:
        self.spec = spec
        self.settings = msgspec.structs.replace(settings, data_digest=data.digest())
        if settings.amp and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise SettingError("--amp needs a GPU with bfloat16 (Ampere or newer): leave it out")
        self.steps_done = 0
        self.device = device
        self.world = world
        self._rows = world.rows(settings.batch_size)
        torch.manual_seed(_seed(settings.seed, _START))
        self.network = new_network(spec).to(device).train()
        self.average = ema.averaged(self.network)
        # Walking a network for its parameters takes longer than what is done with them.
        self._parameters: list[Tensor] = list(self.network.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self.diffusion = Diffusion(spec, settings.loss).to(device)
        self.optimizer = torch.optim.Adam(self._parameters, lr=settings.learning_rate, fused=True)
        self.compiled = compiled
        self._generator = torch.Generator()
        self.data = data
        self._images = torch.from_numpy(data.images)
        self._labels = None if data.labels is None else torch.from_numpy(data.labels)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    @classmethod
    def resume(
        cls,
        checkpoint: Checkpoint,
        data: Dataset,
        device: torch.device,
        *,
        compiled: bool = False,
        world: World = ALONE,
    ) -> "Trainer":
        """Take training up where a checkpoint left it, whatever number of processes wrote it."""
        trainer = cls(checkpoint.spec, checkpoint.settings, data, device, compiled=compiled, world=world)
        if trainer.settings.data_digest != checkpoint.settings.data_digest:
            logger.warning("the images are not those that this model was trained on so far")
        trainer.network.load_state_dict(checkpoint.raw)
        trainer.average.load_state_dict(checkpoint.ema)
        own = trainer.optimizer.state_dict()  # the groups' settings are ours, not the file's
        trainer.optimizer.load_state_dict(own | {"state": checkpoint.optimizer["state"]})
        trainer.steps_done = checkpoint.step
        return trainer

    @cached_property
    def _predict(self) -> nn.Module:
        """The network as a step calls it; made in the first, as all processes must be there for it."""
        shared = self.world.shared(self.network)
        return torch.compile(shared) if self.compiled else shared  # type: ignore[return-value]

    def advance(self) -> Tensor:
        """Take one training step; returns the loss, a tensor without axes on the device.

        Of several processes, each returns its share of the loss: it is their sum.
        """
        step, settings = self.steps_done, self.settings
        torch.manual_seed(_seed(settings.seed, _STEP, step))
        x0, y = self._batch(step)
        t = torch.randint(self.diffusion.timesteps, (settings.batch_size,))[self._rows].to(self.device)
        if y is not None and settings.label_dropout:
            dropped = torch.rand(settings.batch_size)[self._rows] < settings.label_dropout
            y = torch.where(dropped.to(self.device), self.spec.num_classes, y)
        epsilon = self._noise(step)
        torch.manual_seed(_seed(settings.seed, _DROPOUT, step, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        *others, last = torch.arange(len(x0)).chunk(settings.accumulate)
        with kept_apart(self._predict):
            for part in others:
                loss += self._backward(part, x0, t, epsilon, y)
        loss += self._backward(last, x0, t, epsilon, y)
        self._clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        self.optimizer.step()
        ema.update(self._averages, self._parameters, step, settings.ema_decay)
        self.steps_done += 1
        return loss

    def _backward(self, part: Tensor, x0: Tensor, t: Tensor, epsilon: Tensor, y: Tensor | None) -> Tensor:
        """Add the gradients of a part of the rows; returns its share of the whole batch's loss."""
        some = slice(int(part[0]), int(part[-1]) + 1)
        loss = self._loss(x0[some], t[some], epsilon[some], None if y is None else y[some])
        share = loss * (len(part) / self.settings.batch_size)
        with self.world.reaching():
            # The mean of all processes' gradients is taken, where their sum is wanted.
            (share * self.world.size).backward()  # type: ignore[no-untyped-call]
        return share.detach()

    def _clip_gradients(self) -> None:
        largest = self.settings.grad_clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        # To look at the norm costs a CPU nothing and saves a pass over all gradients; a GPU would have to wait.
        if self.device.type != "cpu" or norm > largest - 1e-3:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, largest, norm)

    def _loss(self, x0: Tensor, t: Tensor, epsilon: Tensor, y: Tensor | None) -> Tensor:
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
                return self.diffusion.loss(self._predict, x0, t, epsilon, y)
        except RuntimeError as error:
            if not self.compiled or "memory" in str(error):
                raise
            raise BackendError(f"torch.compile failed: {first_line(error)}: leave --compile out") from error

    def _batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """This process's images of one step, (B, C, H, W) float32 in [-1, 1], and their labels, (B,)."""
        size, rows = self.settings.batch_size, self._rows
        chosen = [self._image_at(step * size + row) for row in range(rows.start, rows.stop)]
        batch = self._images[chosen].to(self.device)
        x0 = batch.float() * (2 / 255) - 1 if batch.dtype == torch.uint8 else batch
        if self.settings.flip:
            mirrored = torch.rand(size)[rows].to(self.device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        return x0, None if self._labels is None else self._labels[chosen].to(self.device)

    def _noise(self, step: int) -> Tensor:
        """The noise of this process's rows in one step, (B, C, H, W), each from a seed of its own."""
        entropy = np.random.SeedSequence([self.settings.seed, _NOISE, step])
        seeds = entropy.generate_state(self.settings.batch_size)[self._rows]
        epsilon = torch.empty(len(seeds), *self.spec.image_shape)
        for row, seed in zip(epsilon, seeds.tolist(), strict=True):
            row.normal_(generator=self._generator.manual_seed(seed))
        return epsilon.to(self.device)

    def _image_at(self, place: int) -> int:
        """The image at a place in the endless sequence of epochs, each in its own random order."""
        epoch, position = divmod(place, len(self._images))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.settings.seed, _ORDER, epoch]).permutation(
                len(self._images)
            )
        return int(self._order[position])

    def checkpoint(self) -> Checkpoint:
        """The state of the training, to save."""
        average = _on_cpu(self.average.state_dict())
        provenance = msgspec.structs.replace(
            self.spec.provenance,
            digest=digest(average),
            step=self.steps_done,
            ddpm_deploy=__version__,
            torch=str(torch.__version__),
        )
        return Checkpoint(
            spec=msgspec.structs.replace(self.spec, provenance=provenance),
            ema=average,
            raw=_on_cpu(self.network.state_dict()),
            optimizer=self.optimizer.state_dict(),
            step=self.steps_done,
            settings=self.settings,
        )


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of step `step`, from 0: a linear warm-up, then level or along a half cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.decay == "none":
        return settings.learning_rate * warm
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _seed(*entropy: int) -> int:
    """Mix a seed and what it is for into 32 bits, which is what torch's CPU generator takes in."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _on_cpu(state: dict[str, Any]) -> StateDict:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
