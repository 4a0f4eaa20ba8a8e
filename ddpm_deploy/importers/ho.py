"""Ho's network in PyTorch: pesser's pytorch_diffusion, ermongroup's ddim, and w86763777's pytorch-ddpm.

The first two have one network, by the same names, and differ in how they sample it. The third has names of its own,
and other conventions, which its names alone tell: frequencies, norms, padding. Its table of the timesteps is among its
weights, and is compared with ours.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Final, Literal, TypeVar

import numpy as np
import torch

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError, plural
from ddpm_deploy.importers.family import Names, Place, build_family
from ddpm_deploy.importers.flags import HoFlags
from ddpm_deploy.importers.imported import Imported, new_spec
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.schedule import BetaSchedule, LinearBetas, ScaledLinearBetas, SigmoidBetas
from ddpm_deploy.spec import ModelSpec, Sampling, UNetConfig
from ddpm_deploy.words import Prediction, Variance

V = TypeVar("V")

NAME: Final = "Ho"
_TABLE: Final = (
    "time_embedding.timembedding.0.weight"  # of pytorch-ddpm: (T, D), a sine, its cosine, a sine, ...
)
_SAME_TABLE: Final = 5e-3  # averaging moves it by up to 1.7e-4, and bfloat16 rounds it by 2e-3
_VARIANCES: Final[dict[str, Variance]] = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_MEANS: Final[dict[str, Prediction]] = {"epsilon": "epsilon", "xstart": "x0", "xprev": "mean"}
_SPACINGS: Final[dict[str, Literal["leading", "quad"]]] = {"uniform": "leading", "quad": "quad"}
_SAMPLERS: Final = {
    "generalized": "sampled by DDIM, unclipped, as ermongroup's code does",
    "ddpm_noisy": "sampled with noise of variance β, whatever var_type is, as ermongroup's code does",
    "denoise": "sampled by all of its timesteps with noise, as pesser's code does",
}


@dataclass(frozen=True)
class _Code:
    """What one of the two networks is, beside its weights."""

    title: str
    names: Names
    spacing: Literal["half-1", "half"]
    norm_eps: float
    padding: Literal["asymmetric", "symmetric"]


def _at(place: Place) -> str:
    match place.part:
        case "middle":
            return f"mid.block_{place.number + 1}"
        case "halve":
            return f"down.{place.level}.downsample.conv"
        case "double":
            return f"up.{place.level}.upsample.conv"
    return f"{place.part}.{place.level}.block.{place.number}"


def _attention_at(place: Place) -> str:
    return "mid.attn_1" if place.part == "middle" else _at(place).replace(".block.", ".attn.")


def _listed_at(place: Place) -> str:
    match place.part:
        case "middle":
            return f"middleblocks.{place.number}"
        case "down" | "up":
            return f"{place.part}blocks.{place.position}"
    return f"{'down' if place.part == 'halve' else 'up'}blocks.{place.position}.main"


_LEVELS: Final = _Code(
    title="Ho's network as in pesser's pytorch_diffusion and ermongroup's ddim",
    names=Names(
        outside={
            "temb1": "temb.dense.0",
            "temb2": "temb.dense.1",
            "conv_in": "conv_in",
            "norm_out": "norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "temb": "temb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "shortcut": "nin_shortcut",
        },
        attention={"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"},
        block_at=_at,
        attention_at=_attention_at,
    ),
    spacing="half-1",
    norm_eps=1e-6,
    padding="asymmetric",
)
_LISTS: Final = _Code(
    title="Ho's network as in w86763777's pytorch-ddpm",
    names=Names(
        outside={
            "temb1": "time_embedding.timembedding.1",
            "temb2": "time_embedding.timembedding.3",
            "conv_in": "head",
            "norm_out": "tail.0",
            "conv_out": "tail.2",
        },
        block={
            "norm1": "block1.0",
            "conv1": "block1.2",
            "temb": "temb_proj.1",
            "norm2": "block2.0",
            "conv2": "block2.3",
            "shortcut": "shortcut",
        },
        attention={"norm": "group_norm", "q": "proj_q", "k": "proj_k", "v": "proj_v", "out": "proj"},
        block_at=_listed_at,
        attention_at=lambda place: f"{_listed_at(place)}.attn",
    ),
    spacing="half",
    norm_eps=1e-5,
    padding="symmetric",
)


def recognises(names: Collection[str]) -> bool:
    """Whether weights of these names are of this dialect."""
    return _TABLE in names or ("temb.dense.0.weight" in names and "conv_in.weight" in names)


def read(weights: Weights, told: Told[HoFlags]) -> Imported:
    """The network and spec of a state dict.

    Raises ArtefactError where the weights are not those of such a network; SettingError where a flag is needed,
    or says other than they do.
    """
    lists = _TABLE in weights
    code = _LISTS if lists else _LEVELS
    height, width = told.image_size()
    embedding = SinusoidalEmbedding(dim=_shape(weights, code, "temb1", 2)[1], spacing=code.spacing)
    timesteps = (
        told.agrees("num_diffusion_timesteps", weights.shape(_TABLE, 2)[0])
        if lists
        else told.get("num_diffusion_timesteps", 1000)
    )
    sampler, how = ("", _plain(told)) if lists else _sampler(weights, told, timesteps)
    large = lists or height < 256  # LSUN's are the others
    variance = told.get("var_type", "fixedlarge" if large else "fixedsmall")
    spec = new_spec(
        image_shape=(_shape(weights, code, "conv_in", 4)[1], height, width),
        timesteps=timesteps,
        schedule=_schedule(told),
        prediction=_prediction(told, lists),
        variance="fixed_large" if sampler == "ddpm_noisy" else _choice("var_type", variance, _VARIANCES),
        clip=sampler in ("ddpm_noisy", "denoise"),
        sampling=how,
        embedding=embedding,
        network=_config(weights, code),
    )
    own = _with_our_table(weights, spec) if lists else weights
    said = "sampled by all of its timesteps with noise, unclipped, as its code does"
    return Imported(
        build_family(own, spec, code.names),
        spec,
        code.title,
        (_described(spec), _SAMPLERS.get(sampler, said)),
        tuple(told.assumed),
    )


def _shape(weights: Weights, code: _Code, ours: str, axes: int) -> tuple[int, ...]:
    return weights.shape(f"{code.names.outside[ours]}.weight", axes)


def _config(weights: Weights, code: _Code) -> UNetConfig:
    """The network's shape: all that the weights say of it."""

    def stage(level: int, number: int, blocks: int) -> Place:
        return Place("down", level, number, level * (blocks + 1) + number)

    def width_at(place: Place) -> str:
        return f"{code.names.block_at(place)}.{code.names.block['conv1']}.weight"

    blocks = len(list(takewhile(lambda number: width_at(stage(0, number, 0)) in weights, count())))
    levels = len(list(takewhile(lambda level: width_at(stage(level, 0, blocks)) in weights, count())))
    if not levels:
        raise ArtefactError(f"{weights.name} is not whole: {width_at(stage(0, 0, 0))} is missing")
    if levels > 1 and f"{code.names.block_at(Place('halve', 0, blocks, blocks))}.weight" not in weights:
        raise ArtefactError(
            f"{weights.name} halves its images without weights (resamp_with_conv: false), which is not supported, or "
            "it is not whole"
        )
    first = [stage(level, 0, blocks) for level in range(levels)]
    norm = f"{code.names.attention['norm']}.weight"
    return UNetConfig(
        channels=_shape(weights, code, "conv_in", 4)[0],
        widths=tuple(weights.shape(width_at(place), 4)[0] for place in first),
        time_width=_shape(weights, code, "temb1", 2)[0],
        blocks=blocks,
        attention_levels=tuple(
            place.level for place in first if f"{code.names.attention_at(place)}.{norm}" in weights
        ),
        norm_eps=code.norm_eps,
        padding=code.padding,
        dropout=0.0,
    )


def _with_our_table(weights: Weights, spec: ModelSpec) -> Weights:
    """The weights for an embedding with all sines first, and without pytorch-ddpm's own table of it.

    Raises ArtefactError where that is another than ours.
    """
    name = f"{_LISTS.names.outside['temb1']}.weight"
    stored, linear = weights.state[_TABLE], weights.state[name]
    ours = spec.embedding.table(spec.timesteps)
    theirs = (
        np.stack(np.split(ours, 2, axis=1), axis=2).reshape(ours.shape) if ours.shape[1] % 2 == 0 else ours
    )
    if stored.shape != ours.shape or np.abs(stored.numpy() - theirs).max() > _SAME_TABLE:
        raise ArtefactError(
            f"{weights.name}: {_TABLE} is not the table of timesteps that pytorch-ddpm makes, and the network may "
            "differ from its in more: name the function that makes it, as in ddpm-export my_package.models:build"
        )
    state = {key: tensor for key, tensor in weights.state.items() if key != _TABLE}
    state[name] = torch.cat([linear[:, 0::2], linear[:, 1::2]], dim=1)
    return replace(weights, state=state)


def _schedule(told: Told[HoFlags]) -> BetaSchedule:
    name = told.get("beta_schedule", "linear", "quad", "sigmoid")
    start, end = told.get("beta_start", 1e-4), told.get("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise SettingError(f"--beta_start {start} and --beta_end {end} must rise between 0 and 1")
    kinds: dict[str, BetaSchedule] = {
        "linear": LinearBetas(start, end),
        "quad": ScaledLinearBetas(start, end),
        "sigmoid": SigmoidBetas(start, end),
        "const": LinearBetas(end, end),
    }
    return _choice("beta_schedule", name, kinds)


def _prediction(told: Told[HoFlags], lists: bool) -> Prediction:
    """What the network gives. pesser's and ermongroup's gives ε alone."""
    if lists:
        return _choice("mean_type", told.get("mean_type", "epsilon", "xstart", "xprev"), _MEANS)
    told.agrees("mean_type", "epsilon")
    return "epsilon"


def _plain(told: Told[HoFlags]) -> Sampling:
    """pytorch-ddpm's own chain: every timestep. Raises SettingError where a flag asks for another."""
    for name in ("sample_type", "skip_type", "timesteps", "eta"):
        if getattr(told.flags, name) is not None:
            raise SettingError(
                f"--{name} is of ermongroup's ddim, and this is a checkpoint of pytorch-ddpm: leave it out; ddpm-run "
                "has --steps, --solver, --spacing and --eta for any model"
            )
    return Sampling()


def _sampler(weights: Weights, told: Told[HoFlags], timesteps: int) -> tuple[str, Sampling]:
    """Which of the two codes' samplers is the model's own, and its chain.

    ermongroup's checkpoints are lists and pesser's are not; without `generalized` or `ddpm_noisy` told, that decides.
    """
    ermongroup = isinstance(weights.content, list)
    name = told.get("sample_type", "generalized" if ermongroup else "denoise")
    _choice("sample_type", name, _SAMPLERS)
    flags = told.flags
    if name == "denoise":
        if typed := [
            f"--{one}" for one in ("skip_type", "timesteps", "eta") if getattr(flags, one) is not None
        ]:
            raise SettingError(f"{', '.join(typed)}: of --sample_type generalized or ddpm_noisy; say which")
        return name, Sampling()
    if name == "ddpm_noisy" and flags.eta is not None:
        raise SettingError("--eta is of --sample_type generalized, and ddpm_noisy has none: leave it out")
    spacing = _choice("skip_type", flags.skip_type or "uniform", _SPACINGS)
    steps = flags.timesteps
    if steps is not None and not 1 <= steps <= timesteps:
        raise SettingError(
            f"--timesteps {steps}: choose from 1 to {timesteps}, as many as it was trained with"
        )
    if steps is not None and spacing == "leading":
        steps = _uniform(timesteps, steps)
    eta = flags.eta or 0.0
    if not 0 <= eta <= 1:
        raise SettingError(f"--eta {eta} must be from 0 to 1")
    if name == "ddpm_noisy":
        return name, Sampling(steps=steps, solver="ddpm", spacing=spacing)
    return name, Sampling(steps=steps, solver="ddim", eta=eta, spacing=spacing)


def _uniform(timesteps: int, steps: int) -> int:
    """How many steps ermongroup's code takes for `--timesteps steps`: every (T // steps)-th timestep, to the end.

    Raises SettingError where these are no spacing of ours, as T // steps does not divide T.
    """
    stride = timesteps // steps
    if timesteps % stride:
        raise SettingError(
            f"--timesteps {steps}: its code goes by strides of {stride} then, which leave a rest of its {timesteps} "
            f"timesteps, and no spacing here is that: choose a divisor of {timesteps}"
        )
    return timesteps // stride


def _choice(flag: str, value: str, known: Mapping[str, V]) -> V:
    """What a flag's value stands for. Raises SettingError where it is not known."""
    if value not in known:
        raise SettingError(f"--{flag} {value} is not known: choose from {', '.join(known)}")
    return known[value]


def _described(spec: ModelSpec) -> str:
    network = spec.network
    assert network is not None
    where = ["in the middle", *(f"at level {level}" for level in network.attention_levels)]
    return (
        f"{plural(len(network.widths), 'level')} of {', '.join(map(str, network.widths))} channels, "
        f"{plural(network.blocks, 'block')} each; attention {', '.join(where)}"
    )
