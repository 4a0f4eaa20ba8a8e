"""How a network is trained: the settings, and the presets that name whole sets of them."""

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import SettingError
from ddpm_deploy.spec import Batch, ModelSpec, Natural, Provenance, Share, UNetConfig
from ddpm_deploy.words import Loss

Positive = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Rate = Annotated[float, msgspec.Meta(gt=0.0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a training run; a checkpoint carries them, so that resuming needs none of them again.

    data: what was trained on: the absolute path, or the word "digits". array: the name of the images' array in an
    .npz; empty where it needed none. data_range: the images' darkest and brightest value, where that was said.
    data_digest: SHA-256 of the images as they were read; empty if not known.
    skip_broken: whether unreadable images were left out.
    loss: what is minimised, see `train.diffusion`.
    steps: where training ends. learning_rate: its peak, reached after `warmup_steps`; from there it
    stays ("none") or falls to zero along a half cosine at the last step ("cosine").
    grad_clip: largest norm of the gradient. ema_decay: of the average. flip: mirror images at random.
    accumulate: parts that a batch is taken in, one after another, to save memory; their gradients add up.
    amp: whether the network runs in mixed precision (bfloat16 where torch's autocast has it).
    labels: whether the model is class-conditional. label_dropout: share of the images whose label is
    replaced by the null class, for classifier-free guidance (Ho & Salimans 2022).
    sample_every: steps between pictures of samples; 0 for none.
    """

    data: str
    array: str = ""
    data_range: tuple[float, float] | None = None
    data_digest: str = ""
    skip_broken: bool = False
    loss: Loss = "simple"
    steps: Positive
    batch_size: Batch
    learning_rate: Rate
    warmup_steps: Natural
    decay: Literal["none", "cosine"]
    grad_clip: Rate = 1.0
    ema_decay: Share
    flip: bool
    accumulate: Batch = 1
    amp: bool = False
    labels: bool = False
    label_dropout: Share = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    save_every: Positive = 1000
    sample_every: Natural = 1000

    def __post_init__(self) -> None:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"a batch of {self.batch_size} does not make {self.accumulate} parts: choose a smaller --accumulate"
            )
        if self.label_dropout and not self.labels:
            raise ValueError("label dropout is for a model with labels")


@dataclass(frozen=True)
class Preset:
    """A network and a training that are known to go well together; the defaults are the paper's for CIFAR-10.

    image_size: height and width. channels: 1 (grey) or 3 (RGB); None: as the images are.
    """

    network: UNetConfig
    image_size: tuple[int, int] = (32, 32)
    channels: int | None = 3
    steps: int = 800_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    decay: Literal["none", "cosine"] = "none"
    ema_decay: float = 0.9999
    flip: bool = True

    def spec(self, data: str, channels: int, image_size: tuple[int, int], **overrides: Any) -> ModelSpec:
        """The spec of a new model of this kind, for images of one height and width, some of its fields in place of the
        defaults.

        Raises SettingError where the network cannot halve the size as often as it must.
        """
        for size in image_size:
            self._require_size(size)
        return ModelSpec(
            image_shape=(channels, *image_size),
            embedding=SinusoidalEmbedding(dim=self.network.channels),
            network=self.network,
            provenance=Provenance(digest="0" * 64, data=data[:200]),
            **overrides,
        )

    def _require_size(self, size: int) -> None:
        divisor = self.network.size_divisor
        if size % divisor == 0:
            return
        below = size // divisor * divisor
        nearest = " or ".join(str(near) for near in (below, below + divisor) if near)
        others = [name for name, preset in PRESETS.items() if size % preset.network.size_divisor == 0]
        takes = f", or --preset {others[0]}, which takes {size}" if others else ""
        raise SettingError(f"image size {size} is not a multiple of {divisor}: choose {nearest}{takes}")

    def settings(self, data: str, **overrides: Any) -> Settings:
        """The settings of a new training, some of them in place of the preset's.

        Raises SettingError where one is out of range.
        """
        mine = {name: value for name, value in vars(self).items() if name in Settings.__struct_fields__}
        steps = overrides.get("steps", self.steps)
        mine["warmup_steps"] = min(self.warmup_steps, steps // 10)  # a short training is not all warm-up
        try:
            return msgspec.convert({"data": data} | mine | overrides, Settings)
        except msgspec.ValidationError as error:
            raise SettingError(f"a setting is out of range: {error}") from error


_SMALL: Final = UNetConfig(
    channels=32,
    widths=(32, 64, 64, 64),
    time_width=128,
    blocks=1,
    attention_levels=(2,),
    groups=8,
    dropout=0.0,
)
PRESETS: Final = {
    "digits": Preset(
        image_size=(8, 8),
        channels=1,
        network=msgspec.structs.replace(_SMALL, widths=(32, 64), attention_levels=()),
        steps=1400,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decay=0.995,
        flip=False,
    ),
    "mnist": Preset(
        channels=1,
        network=msgspec.structs.replace(_SMALL, channels=16, widths=(16, 32, 64, 64)),
        steps=20_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=200,
        decay="cosine",
        ema_decay=0.999,
        flip=False,
    ),
    "small": Preset(
        channels=None,
        network=_SMALL,
        steps=5000,
        batch_size=16,
        learning_rate=5e-4,
        warmup_steps=200,
        decay="cosine",
        ema_decay=0.999,
    ),
    "cifar10": Preset(UNetConfig()),
    "256": Preset(
        image_size=(256, 256),
        network=UNetConfig(widths=(128, 128, 256, 256, 512, 512), attention_levels=(4,), dropout=0.0),
        steps=500_000,
        batch_size=64,
        learning_rate=2e-5,
    ),
}
