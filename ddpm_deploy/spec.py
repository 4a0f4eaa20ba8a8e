"""ModelSpec: everything that running a model takes to know, as one small JSON that rides inside it.

The same text is in the checkpoint (an entry), in the ONNX file (a metadata property) and in an engine
(the network's name), so one file is enough to run.
"""

import math
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.embedding import Embedding
from ddpm_deploy.errors import SettingError, SpecError, first_line, newer, plural
from ddpm_deploy.files import show
from ddpm_deploy.noise import NOISE_VERSION
from ddpm_deploy.schedule import BetaSchedule, LinearBetas, Schedule
from ddpm_deploy.solvers import StepTable, ddim, ddim_inversion, ddpm, dpmpp_2m, sde_dpmpp_2m
from ddpm_deploy.spacings import spaced
from ddpm_deploy.words import (
    ASKED_SOLVERS,
    MAX_BATCH,
    AskedSolver,
    Flavour,
    Precision,
    Prediction,
    Solver,
    Spacing,
    Variance,
    Weights,
)

SPEC_VERSION: Final = 1
SPEC_KEY: Final = "ddpm_deploy.spec"  # its name in an ONNX file's metadata
ISLANDS_KEY: Final = "ddpm_deploy.float32"  # the nodes of a reduced graph that were meant to stay in float32
SEAL_KEY: Final = "ddpm_deploy.sha256"  # and that of the digest of all before it, in the same place
# TensorRT keeps 4095 characters of a network's name and silently drops a longer one.
MAX_SPEC_BYTES: Final = 3999

_MAX_IMAGE_SIZE: Final = 2**26  # numbers: a quarter of a gigabyte
_MAX_EMBEDDING_SIZE: Final = 2**26

Size = Annotated[int, msgspec.Meta(ge=1, le=16_384)]
Text = Annotated[str, msgspec.Meta(max_length=200)]
Batch = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read from a file, a field that is not known is an error."""


class ChainSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which reverse chain to run; None is as the model's own `Sampling` says.

    steps: 1 .. T. solver, spacing: by name; the solver "fast" is `FAST`. eta: of ddim, 0 to 1. timesteps: that are
    visited, falling, in place of steps and spacing.
    """

    steps: int | None = None
    solver: AskedSolver | None = None
    eta: float | None = None
    spacing: Spacing | None = None
    timesteps: tuple[int, ...] | None = None


DEFAULT_CHAIN: Final = ChainSettings()
# The best chain of 20 steps by docs/quality.md.
FAST: Final = ChainSettings(solver="sde-dpmpp-2m", steps=20, spacing="linspace")


class UNetConfig(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="unet"):
    """The ε-network of the DDPM family; the defaults are the paper's CIFAR-10 network.

    channels: width of the first convolution.
    widths: channels of each level, highest resolution first; each level but the last halves the resolution.
    time_width: of the hidden layers that the timestep's embedding goes through.
    blocks: residual blocks a level going down; one more going up.
    attention_levels: levels (0 = highest resolution) with attention after each block; the middle of
        the network always has it.
    heads: attention heads; `head_channels`, where given, sets their width instead.
    groups, norm_eps: of every GroupNorm.
    padding: of the stride-2 convolutions: "asymmetric" (0, 1, 0, 1) as in the original, or
        "symmetric" (1, 1, 1, 1) as in OpenAI's.
    scale_shift: whether the timestep scales and shifts the second norm (OpenAI), or is added before it.
    resampling_blocks: levels that end in a residual block that halves or doubles the resolution (OpenAI's
        `resblock_updown`), in place of a convolution.
    middle_attention: whether the middle has attention. middle_groups: of its GroupNorm (None: `groups`; 0: it has
        none, as in diffusers where the timestep scales and shifts).
    dropout: in training, before each block's second convolution.
    """

    channels: Size = 128
    widths: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=16)] = (128, 256, 256, 256)
    time_width: Size = 512
    blocks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    attention_levels: tuple[Annotated[int, msgspec.Meta(ge=0, le=15)], ...] = (1,)
    heads: Size = 1
    head_channels: Size | None = None
    groups: Size = 32
    norm_eps: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 1e-6
    padding: Literal["asymmetric", "symmetric"] = "asymmetric"
    scale_shift: bool = False
    resampling_blocks: tuple[Annotated[int, msgspec.Meta(ge=0, le=15)], ...] = ()
    middle_attention: bool = True
    middle_groups: Annotated[int, msgspec.Meta(ge=0, le=16_384)] | None = None
    dropout: Share = 0.1

    @property
    def size_divisor(self) -> int:
        """Heights and widths must be multiples of this, as each level but the last halves them."""
        return int(2 ** (len(self.widths) - 1))

    def require_sound(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless there is such a network for images (C, H, W)."""
        _, height, width = image_shape
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(
                f"images of {height}×{width} cannot be halved {plural(len(self.widths) - 1, 'time')}"
            )
        for channels in (self.channels, *self.widths):
            if channels % self.groups:
                raise ValueError(f"{plural(channels, 'channel')} cannot make {plural(self.groups, 'group')}")
        if self.widths[-1] % (self.middle_groups or 1):
            raise ValueError(
                f"{plural(self.widths[-1], 'channel')} cannot make {plural(self.middle_groups or 1, 'group')}"
            )
        attending = [self.widths[level] for level in self.attention_levels if level < len(self.widths)]
        for channels in attending + [self.widths[-1]] * self.middle_attention:
            if channels % (self.head_channels or self.heads):
                raise ValueError(f"{plural(channels, 'channel')} cannot make whole attention heads")


# Every kind of network there is, told apart by its "kind"; each has a `size_divisor` and `require_sound`.
NetworkConfig = UNetConfig


class Sampling(_Strict, frozen=True, kw_only=True):
    """How the code that a model comes from samples it: the chain where a request names none, and its habits.

    steps (None: all T), solver, eta, spacing: of the chain that runs where nobody says another.
    offset: added to each timestep of a chain of fewer steps than T, by its own spacing (`steps_offset` of diffusers).
    fixed_stride: whether each step goes to t - T // N, whatever timestep comes next: diffusers' DDIM.
    raw_epsilon: whether DDIM goes on with ε as the network gave it where x̂0 was clipped: diffusers.
    to_first: whether DDIM ends at ᾱ_0, and not at 1: diffusers' `set_alpha_to_one` as false.
    noise_to_end: whether DDPM adds noise on its last step too, where that is not from t = 0: diffusers' DDPM.
    """

    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    solver: Solver = "ddpm"
    eta: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    spacing: Spacing = "leading"
    offset: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    fixed_stride: bool = False
    raw_epsilon: bool = False
    to_first: bool = False
    noise_to_end: bool = False


class Provenance(_Strict, frozen=True, kw_only=True):
    """Where the weights come from.

    digest: SHA-256 of the network's parameters, names and values: the model's identity, the same in
        the checkpoint and in whatever is exported from it.
    weights: which of a checkpoint's two sets they are. source: whose checkpoint it was, where not ours.
    """

    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    weights: Weights = "ema"
    step: Natural = 0
    data: Text = ""
    source: Text = ""
    ddpm_deploy: Text = ""
    torch: Text = ""


_UNKNOWN: Final = Provenance(digest="0" * 64)  # until the weights are there


class EngineSpec(_Strict, frozen=True, kw_only=True):
    """What an engine was built by, and for.

    flavour, version: the TensorRT that built it, which must run it too. capabilities: compute capabilities it runs
        on, as "8.6"; none: any that the flavour supports. hardware_compatible: every GPU from Ampere (8.0) on.
    gpu, driver: where it was built.
    batches: smallest, best and largest batch of each profile.
    """

    flavour: Flavour
    version: Text
    capabilities: tuple[Text, ...] = ()
    hardware_compatible: bool = False
    gpu: Text = ""
    driver: Text = ""
    batches: tuple[tuple[Batch, Batch, Batch], ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor that goes into the network or comes out of it.

    shape: of one row, without the batch axis, which every tensor has in front.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]


class ModelSpec(_Strict, frozen=True, kw_only=True):
    """What the runtime must know of a model.

    image_shape: (C, H, W). value_range: of the images the model was trained on. data_range: what the ends of that
        stand for in the units of the data that it was trained on; 0 and 255 of 8-bit images.
    clip: whether x̂0 is clipped to the value range in each step, or the range it is clipped to.
    sampling: how its own code samples it.
    timesteps: T. prediction: what the network gives. variance: of the reverse steps of ancestral sampling; for
        "learned_range" the network gives 2C channels, the second half of them v (see `solvers`).
    num_classes: 0 for an unconditional model. class_names: of each, or none. null_class: whether the label
        num_classes stands for "no class", as in a model trained with label dropout.
    precision: of the network's insides; what goes in and out is always float32.
    same_bits: of an .onnx or a .ncnn file, whether ONNX Runtime or ncnn on a CPU gave the same bits in batches of
        several sizes and with several numbers of threads, when it was exported; None: not tried.
    engine: of an engine alone, how it was built.
    """

    spec_version: int = SPEC_VERSION
    noise_version: int = NOISE_VERSION
    image_shape: tuple[Size, Size, Size]
    value_range: tuple[Annotated[float, msgspec.Meta(ge=-1e6)], Annotated[float, msgspec.Meta(le=1e6)]] = (
        -1.0,
        1.0,
    )
    data_range: tuple[float, float] = (0.0, 255.0)
    clip: bool | tuple[float, float] = True
    timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    schedule: BetaSchedule = msgspec.field(default_factory=LinearBetas)
    prediction: Prediction = "epsilon"
    variance: Variance = "fixed_large"
    sampling: Sampling = Sampling()
    embedding: Embedding
    network: NetworkConfig | None = None
    num_classes: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    class_names: tuple[Text, ...] = ()
    null_class: bool = False
    precision: Precision = "fp32"
    same_bits: bool | None = None
    provenance: Provenance = _UNKNOWN
    engine: EngineSpec | None = None

    def __post_init__(self) -> None:
        lo, hi = self.value_range
        if lo >= hi:
            raise ValueError(f"the value range ({lo}, {hi}) is empty")
        if not -math.inf < self.data_range[0] < self.data_range[1] < math.inf:
            raise ValueError(f"the data range {self.data_range} is empty, or not finite")
        if isinstance(self.clip, tuple) and not self.clip[0] < self.clip[1]:
            raise ValueError(f"the range {self.clip} that x̂0 is clipped to is empty")
        if (steps := self.sampling.steps or 1) > self.timesteps:
            raise ValueError(
                f"its own chain has {plural(steps, 'step')}, and it was trained with {self.timesteps} timesteps"
            )
        # The sizes of the two tables that a chain makes of a spec before it runs anything.
        if math.prod(self.image_shape) > _MAX_IMAGE_SIZE:
            raise ValueError(f"images of the shape {self.image_shape} are larger than any that is supported")
        if self.timesteps * self.embedding.dim > _MAX_EMBEDDING_SIZE:
            raise ValueError(
                f"{plural(self.timesteps, 'embedding')} of {self.embedding.dim} numbers: more than is supported"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"it names {len(self.class_names)} of {plural(self.num_classes, 'class')}")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("two of its classes have the same name")
        if self.null_class and not self.num_classes:
            raise ValueError("it has a null class, and no classes")
        if self.network is not None:
            self.network.require_sound(self.image_shape)

    def to_json(self, room: int = 0) -> str:
        """The text that rides inside the model's files.

        Raises SpecError where, with `room` bytes more, it is too long to ride in an engine.
        """
        text = msgspec.json.encode(self).decode()
        if len(text.encode()) + room > MAX_SPEC_BYTES:
            fewer = ", or build for fewer batches" if self.engine else ""
            raise SpecError(
                f"the ModelSpec takes {len(text.encode())} bytes, and only {MAX_SPEC_BYTES - room} fit in an engine: "
                f"shorten the names of the classes{fewer}"
            )
        return text

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> "ModelSpec":
        """Parse and check it; `source` names the file in errors.

        Raises SpecError where it is malformed, out of range, or of a newer version than this one.
        """
        try:
            versions = msgspec.json.decode(text, type=_Versions)
            if versions.spec_version > SPEC_VERSION or versions.noise_version > NOISE_VERSION:
                got = f"spec version {versions.spec_version}, noise version {versions.noise_version}"
                raise SpecError(newer(source, got, f"{SPEC_VERSION} and {NOISE_VERSION}"))
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise SpecError(f"the ModelSpec in {source} is not valid: {first_line(error)}") from error

    def make_schedule(self) -> Schedule:
        """The forward process the model was trained on."""
        return Schedule(self.schedule.betas(self.timesteps))

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """What x̂0 is clipped to in each step; None: it is not."""
        if isinstance(self.clip, tuple):
            return self.clip
        return self.value_range if self.clip else None

    def completed(self, settings: ChainSettings) -> ChainSettings:
        """The settings of a chain with the model's own in place of those that are None.

        The steps and eta of the model's own chain are of its own solver: another takes all T steps, and no eta.
        Raises SettingError where timesteps are given, and a number of steps or a spacing that is not theirs.
        """
        own = self.sampling
        if settings.solver == "fast":
            settings = self._fast(settings)
        solver = settings.solver or own.solver
        same = solver == own.solver
        eta = own.eta if settings.eta is None and same else settings.eta
        if settings.timesteps is not None:
            if settings.spacing or settings.steps not in (None, len(settings.timesteps)):
                raise SettingError("timesteps are in place of steps and spacing: leave these out")
            return ChainSettings(
                steps=len(settings.timesteps), solver=solver, eta=eta, timesteps=settings.timesteps
            )
        steps = (own.steps if same else None) if settings.steps is None else settings.steps
        return ChainSettings(
            steps=self.timesteps if steps is None else steps,
            solver=solver,
            eta=eta,
            spacing=settings.spacing or own.spacing,
        )

    def _fast(self, settings: ChainSettings) -> ChainSettings:
        """The settings with what FAST stands for, and its steps and spacing where no others are given."""
        settings = msgspec.structs.replace(settings, solver=FAST.solver)
        if settings.timesteps is not None:
            return settings
        steps = min(FAST.steps or 1, self.timesteps) if settings.steps is None else settings.steps
        return msgspec.structs.replace(settings, steps=steps, spacing=settings.spacing or FAST.spacing)

    def step_table(self, settings: ChainSettings = DEFAULT_CHAIN) -> StepTable:
        """The rows of this model's reverse chain.

        Raises SettingError where a setting is out of range or not known.
        """
        settings, own = self.completed(settings), self.sampling
        schedule, prediction, clip = self.make_schedule(), self.prediction, self.clip_range
        timesteps = self._timesteps(schedule, settings)
        if settings.eta is not None and settings.solver != "ddim":
            raise SettingError(f"eta is of the solver ddim, and {settings.solver} has none: leave it out")
        match settings.solver:
            case "ddpm":
                return ddpm(
                    schedule,
                    timesteps,
                    prediction=prediction,
                    variance=self.variance,
                    clip=clip,
                    noise_to_end=own.noise_to_end,
                )
            case "ddim":
                return ddim(
                    schedule,
                    timesteps,
                    prediction=prediction,
                    eta=settings.eta or 0.0,
                    clip=clip,
                    use_clipped_model_output=not own.raw_epsilon,
                    stride=self._stride(settings),
                    to_first=own.to_first,
                )
            case "dpmpp-2m":
                return dpmpp_2m(schedule, timesteps, prediction=prediction, clip=clip)
            case "sde-dpmpp-2m":
                return sde_dpmpp_2m(schedule, timesteps, prediction=prediction, clip=clip)
        raise SettingError(f"solver {settings.solver!r} is not known: choose from {', '.join(ASKED_SOLVERS)}")

    def inversion_table(self, settings: ChainSettings, depth: int | None = None) -> StepTable:
        """The rows that take an image up to where this model's chain of these settings begins, by `ddim_inversion`.

        depth: of a chain that begins at its first timestep under that (None: at its first).
        """
        settings, schedule = self.completed(settings), self.make_schedule()
        table = ddim_inversion(
            schedule,
            self._timesteps(schedule, settings),
            prediction=self.prediction,
            clip=self.clip_range,
            stride=self._stride(settings),
            to_first=self.sampling.to_first,
        )
        return table if depth is None else table.below(depth)

    def _stride(self, settings: ChainSettings) -> int | None:
        """That of every step of DDIM, where it is always the same; of completed settings."""
        return self.timesteps // (settings.steps or 1) if self.sampling.fixed_stride else None

    def _timesteps(self, schedule: Schedule, settings: ChainSettings) -> NDArray[np.int64]:
        """That a chain of completed settings visits."""
        if settings.timesteps is not None:
            try:
                return np.array(settings.timesteps, np.int64)
            except OverflowError as error:
                raise SettingError(
                    f"timesteps must fall from at most {self.timesteps - 1} to 0 or more"
                ) from error
        own, steps = self.sampling, settings.steps or 0
        timesteps = spaced(settings.spacing or own.spacing, schedule, steps)
        if steps < self.timesteps and settings.spacing == own.spacing:
            timesteps = np.minimum(timesteps + own.offset, self.timesteps - 1)
        return timesteps

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network takes, in order: the images x, the timestep's embedding, and the labels y if it has any."""
        x = Tensor("x", "float32", self.image_shape)
        temb = Tensor("temb", "float32", (self.embedding.dim,))
        return (x, temb, Tensor("y", "int64", ())) if self.num_classes else (x, temb)

    @property
    def output(self) -> Tensor:
        """What the network gives."""
        return Tensor("prediction", "float32", self.prediction_shape)

    @property
    def prediction_shape(self) -> tuple[int, int, int]:
        """Of what the network gives for one image: (C, H, W), or (2C, H, W) where it learned the variance."""
        channels, height, width = self.image_shape
        return channels * (2 if self.variance == "learned_range" else 1), height, width

    @property
    def num_labels(self) -> int:
        """Labels that the network knows: its classes and, where it has one, the null class."""
        return self.num_classes + self.null_class

    def label(self, of: int | str) -> int:
        """The label of a class by its name or number; "none" is the null class, unless a class has that name.

        Raises SettingError where there is no such class, or the model has none.
        """
        if not self.num_classes:
            raise SettingError("this model is unconditional: it takes no label")
        if isinstance(of, str):
            of = unicodedata.normalize("NFC", of)  # as the names of the classes are
            if of in self.class_names:
                return self.class_names.index(of)
            if of == "none" and self.null_class:
                return self.num_classes
        if str(of).isdecimal() and len(str(of)) < 10 and int(of) < self.num_labels:
            return int(of)
        names = ", ".join(map(show, self.class_names[:10])) + (", …" if len(self.class_names) > 10 else "")
        numbers = f"0 to {self.num_classes - 1}"
        null = str(self.num_classes) if "none" in self.class_names else "none"
        raise SettingError(
            f"there is no class {of!r}: choose {f'{names}, or {numbers}' if names else numbers}"
            f"{f', or {null} for no class' if self.null_class else ''}"
        )

    def to_builtins(self) -> dict[str, Any]:
        """As plain dicts and lists, for printing."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


class _Versions(msgspec.Struct):
    spec_version: int
    noise_version: int
