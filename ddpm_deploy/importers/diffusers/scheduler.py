"""The configuration of a scheduler → the schedule, and the model's own chain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeVar

import msgspec
import numpy as np

from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.importers.diffusers.folder import Configs, convert, word
from ddpm_deploy.importers.flags import DiffusersFlags, names_of
from ddpm_deploy.importers.told import Told
from ddpm_deploy.schedule import (
    Beta,
    BetaSchedule,
    CosineBetas,
    LinearBetas,
    ScaledLinearBetas,
    SigmoidBetas,
    recognise,
)
from ddpm_deploy.spec import Sampling
from ddpm_deploy.words import Prediction, Solver, Spacing, Variance


class SchedulerFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of DDPMScheduler, DDIMScheduler and DPMSolverMultistepScheduler that have a say here.

    What has another default in each is None.
    """

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[Beta, ...], msgspec.Meta(max_length=100_000)] | None = None
    variance_type: str | None = None
    clip_sample: bool | None = None
    clip_sample_range: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    prediction_type: str | None = None
    predict_epsilon: bool = True  # in its place, before 0.10
    timestep_spacing: str | None = None
    steps_offset: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    rescale_betas_zero_snr: bool = False
    # Of DPM-Solver++ alone.
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    use_dynamic_shifting: bool | None = False
    final_sigmas_type: str | None = "zero"
    lambda_min_clipped: float = -np.inf

    @property
    def is_sde(self) -> bool:
        """Whether its solver adds noise."""
        return self.algorithm_type == "sde-dpmsolver++" and self.solver_order == 2

    def refusal(self, multistep: bool) -> str | None:
        """What of it cannot be carried; None: nothing. multistep: whether it is a DPM-Solver++."""
        reasons = {
            "thresholding: its clipping depends on the whole image": self.thresholding,
            "rescale_betas_zero_snr: its last timestep has no signal, which no step can divide by": (
                self.rescale_betas_zero_snr
            ),
            "use_dynamic_shifting: its timesteps depend on the image's size": self.use_dynamic_shifting,
            "use_flow_sigmas: it was trained on another schedule than its betas": self.use_flow_sigmas,
        }
        if multistep:
            reasons |= {
                f"algorithm_type {word(self.algorithm_type)}: only dpmsolver++, and sde-dpmsolver++ of order 2": (
                    self.algorithm_type not in ("dpmsolver++", "deis") and not self.is_sde
                ),
                f"solver_order {word(self.solver_order)}: only 1 and 2 are here": self.solver_order
                not in (1, 2),
                f"solver_type {word(self.solver_type)}: only midpoint is here": (
                    self.solver_order == 2 and self.solver_type == "heun"
                ),
                f"final_sigmas_type {word(self.final_sigmas_type)}: only zero is here": (
                    self.final_sigmas_type not in (None, "zero")
                ),
                "lambda_min_clipped: it begins below T - 1": self.lambda_min_clipped > -1e9,
            } | {
                f"{name}: its timesteps are not whole ones of the training": bool(getattr(self, name))
                for name in self.__struct_fields__
                if name.startswith("use_") and name not in ("use_dynamic_shifting", "use_flow_sigmas")
            }
        return next((reason for reason, found in reasons.items() if found), None)


_PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_VARIANCES: Final[dict[str, Variance]] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_SCHEDULES: Final[dict[str, Callable[[float, float], BetaSchedule]]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
    "squaredcos_cap_v2": lambda start, end: CosineBetas(),
    "sigmoid": SigmoidBetas,
}
_SPACINGS: Final[dict[str, Spacing]] = {name: name for name in ("leading", "trailing", "linspace")}
_DPM_SPACINGS: Final[dict[str, Spacing]] = {
    "leading": "dpm-leading",
    "trailing": "trailing",
    "linspace": "dpm-linspace",
}
Kind = Literal["DDPM", "DDIM", "DPM-Solver++"]
_KINDS: Final[dict[str, Kind]] = {
    "DDPMScheduler": "DDPM",
    "DDPMParallelScheduler": "DDPM",
    "DDIMScheduler": "DDIM",
    "DDIMParallelScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
}
# Solvers that are not here, for the same networks on the same schedules.
_OTHER_SOLVERS: Final = (
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
# Steps of each, and whose number that is.
_STEPS: Final[dict[Kind, tuple[int, str]]] = {
    "DDPM": (1000, "the default of DDPMPipeline"),
    "DDIM": (50, "the default of DDIMPipeline"),
    "DPM-Solver++": (20, "what its documentation shows"),
}
_Value = TypeVar("_Value")


def _known(of: Mapping[str, _Value], value: str, name: str, where: str) -> _Value:
    if value not in of:
        raise ArtefactError(f"{where}: {name} {word(value)} is not supported: only {', '.join(of)} are")
    return of[value]


@dataclass(frozen=True)
class Scheduler:
    """A scheduler's configuration, read. kind: its solver. where: for messages."""

    fields: SchedulerFields
    kind: Kind
    where: str
    words: tuple[str, ...] = ()

    def schedule(self) -> BetaSchedule:
        """By name. Raises ArtefactError where it has none."""
        fields = self.fields
        if fields.trained_betas is None:
            make = _known(_SCHEDULES, fields.beta_schedule, "beta_schedule", self.where)
            return make(fields.beta_start, fields.beta_end)
        if len(fields.trained_betas) != fields.num_train_timesteps:
            raise ArtefactError(
                f"{self.where}: {len(fields.trained_betas)} trained_betas are not of {fields.num_train_timesteps} "
                "num_train_timesteps"
            )
        found = recognise(np.array(fields.trained_betas, np.float64))
        if found is None:
            raise ArtefactError(
                f"{self.where}: its trained_betas are those of no schedule that is known by name, and a ModelSpec "
                "holds only the name"
            )
        return found

    def prediction(self) -> Prediction:
        before = "epsilon" if self.fields.predict_epsilon else "sample"
        kind = self.fields.prediction_type or before
        return _known(_PREDICTIONS, kind, "prediction_type", self.where)

    def clip(self) -> bool | tuple[float, float]:
        """DPM-Solver++ clips nothing."""
        most = self.fields.clip_sample_range
        if self.kind == "DPM-Solver++" or self.fields.clip_sample is False:
            return False
        return True if most == 1.0 else (-most, most)

    def sampling(self) -> Sampling:
        """Its chain, as its own loop runs it."""
        fields, ours = self.fields, self.kind == "DPM-Solver++"
        default = "linspace" if ours else "leading"
        spacing = fields.timestep_spacing or default
        known = _DPM_SPACINGS if ours else _SPACINGS
        solvers: dict[Kind, Solver] = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++": "dpmpp-2m"}
        steps = _STEPS[self.kind][0]
        solver = solvers[self.kind]
        if ours and fields.solver_order == 1:
            solver = "ddim"  # which that is
        elif ours and fields.is_sde:
            solver = "sde-dpmpp-2m"
        return Sampling(
            solver=solver,
            steps=steps if steps < fields.num_train_timesteps else None,
            spacing=_known(known, spacing, "timestep_spacing", self.where),
            offset=fields.steps_offset if spacing == "leading" else 0,
            fixed_stride=self.kind == "DDIM",
            raw_epsilon=True,
            to_first=self.kind == "DDIM" and not fields.set_alpha_to_one,
            noise_to_end=self.kind == "DDPM",
        )

    def said(self, sampling: Sampling) -> str:
        """Of its chain, for people."""
        number, whose = _STEPS[self.kind]
        steps = sampling.steps or f"all {self.fields.num_train_timesteps}"
        why = f": {whose}" if number >= self.fields.num_train_timesteps or sampling.steps else ""
        return f"its own chain is {sampling.solver} of {steps} steps ({self.kind}{why}), {sampling.spacing}"


def read_scheduler(configs: Configs, told: Told[DiffusersFlags]) -> Scheduler:
    """The scheduler's configuration with the flags in place of what they name; without one, what they and we say."""
    flags, found = told.flags, configs.scheduler
    names = [name for name in names_of(DiffusersFlags) if name in SchedulerFields.__struct_fields__]
    given = {name: value for name in names if (value := getattr(flags, name)) is not None}
    if "beta_schedule" in given:
        given["trained_betas"] = None
    if found is None:
        assumed = {
            "num_train_timesteps": told.get("num_train_timesteps", 1000),
            "beta_schedule": told.get("beta_schedule", "linear", "squaredcos_cap_v2", "scaled_linear"),
            "prediction_type": told.get("prediction_type", "epsilon", "v_prediction", "sample"),
            "clip_sample": told.get("clip_sample", True, False),
        }
        return Scheduler(convert(assumed | given, SchedulerFields, configs.name), "DDPM", configs.name)
    name = str(found.get("_class_name", "DDPMScheduler"))
    where, words = f"the scheduler of {configs.name}", []
    if configs.pipeline == "DDIMPipeline":  # whose constructor makes a DDIMScheduler of any
        name = "DDIMScheduler"
    if name not in _KINDS and name not in _OTHER_SOLVERS:
        raise ArtefactError(
            f"{where} is a {word(name)}, which is not supported: save the pipeline with the DDPMScheduler that it was "
            "trained with, or name the folder of its network outside the pipeline, and its schedule by flags"
        )
    if found.get("clip_sample", True) is None:  # null is false there, and a field that is not there is true
        found = found | {"clip_sample": False}
    fields = convert(found | given, SchedulerFields, where)
    kind = _KINDS.get(name, "DDPM")
    if name in _OTHER_SOLVERS:
        words.append(f"its {name} is not here: its schedule is taken, and the chain is ddpm's")
        fields = msgspec.structs.replace(fields, timestep_spacing="leading", steps_offset=0)
        if fields.clip_sample is None:
            fields = msgspec.structs.replace(fields, clip_sample=told.get("clip_sample", True, False))
    if reason := fields.refusal(multistep=kind == "DPM-Solver++"):
        raise ArtefactError(f"{where} cannot be taken: {reason}")
    return Scheduler(fields, kind, where, tuple(words))


def variance_of(read: Scheduler, told: Told[DiffusersFlags], learns: bool, configs: Configs) -> Variance:
    """Of the reverse steps; only DDPM's configuration says it."""
    kind = read.fields.variance_type
    if kind is None and learns:
        kind = told.flags.variance_type or "learned_range"
    elif kind is None and (configs.scheduler or {}).get("_class_name") == "DDPMScheduler":
        kind = "fixed_small"  # the default of its constructor
    elif kind is None:
        kind = told.get("variance_type", "fixed_small", "fixed_large")
    variance = _known(_VARIANCES, kind, "variance_type", read.where)
    if (variance == "learned_range") != learns:
        channels = f"{configs.network.get('in_channels', 3)} in, {configs.network.get('out_channels', 3)} out"
        raise ArtefactError(
            f"{read.where}: variance_type {word(kind)} is not of a network with channels {channels}"
        )
    return variance
