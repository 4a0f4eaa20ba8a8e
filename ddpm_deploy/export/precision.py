"""Reduced precision in the graph: which convolutions may work in half, measured before it is decided.

Any torch.nn.Module will do. Its convolutions are cast, and the rest (normalisations, softmaxes, the timestep) stays in
float32. A network may say more of itself:

- `float32_islands`, a mapping from the names of modules to reasons: these convolutions stay in float32 as well;
- `takes_any_type = True` on a convolution: it casts its own input and gives the type of its weight, and what follows
  knows how to go on with that (see `train.unet`). Others get a cast before them and one back to float32 behind.

Then real trajectories decide: `calibrate` runs them on an oracle of half-precision hardware, and what comes too near
the range of the type, or loses too much by rounding, stays in float32 too. So do the convolutions that a network takes
its own type from, where it does not run otherwise, and those with a forward() of their own, where it is too far off.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import BackendError, ParityError, first_line, plural
from ddpm_deploy.runtime.network import default_max_batch
from ddpm_deploy.runtime.parity import StepErrors, Trajectory, teacher_forced, worst
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.stages import Stages, silent
from ddpm_deploy.train.network import TorchNetwork
from ddpm_deploy.words import GraphPrecision

TYPES: Final[dict[GraphPrecision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_ATEN: Final = torch.ops.aten
_CONVOLUTIONS: Final = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HEADROOM: Final = 4.0  # how many times a value may yet grow on other images before it overflows
_ROUNDING: Final = 4.0  # times the type's own epsilon: more means values too small for it
_ATTEMPTS: Final = 8
# Operators that only move numbers: what they give was rounded where it was made.
_MOVES: Final = (
    _ATEN.cat.default,
    _ATEN.clone.default,
    _ATEN.constant_pad_nd.default,
    _ATEN.copy_.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_nearest2d.default,
)


@dataclass(frozen=True)
class Range:
    """What the oracle saw of the reduced tensors that one module made.

    largest: absolute value, before rounding. rounding: RMS of what rounding took away, relative to the
    RMS of the tensor, in the worst of them.
    """

    largest: float
    rounding: float


@dataclass(frozen=True)
class Calibration:
    """What was decided, and why.

    islands: convolutions that stay in float32, each with the reason. convolutions: how many there are.
    ranges: by module. steps: the oracle's prediction against float32, over the trajectories.
    """

    precision: GraphPrecision
    islands: dict[str, str]
    convolutions: int
    ranges: dict[str, Range]
    steps: list[StepErrors]


def standing_islands(network: nn.Module) -> dict[str, str]:
    """The convolutions that the network itself says stay in float32, each with the reason."""
    said: Mapping[str, str] = getattr(network, "float32_islands", {})
    return {inside: reason for name, reason in said.items() for inside in _inside(name, network)}


def convolutions(network: nn.Module) -> list[str]:
    """The names of all convolutions, which alone may work in a reduced precision."""
    return _inside("", network)


def _with_own_forward(network: nn.Module) -> set[str]:
    """The convolutions that compute something else than PyTorch's do: it may depend on the type of what they get."""
    usual = {kind.forward for kind in _CONVOLUTIONS}
    return {
        name
        for name in convolutions(network)
        if type(module := network.get_submodule(name)).forward not in usual
        and not getattr(module, "takes_any_type", False)
    }


def _of_types(network: nn.Module) -> set[str]:
    """The convolutions that a network may take its own type from: its first and last, and those of parts with one."""
    found: set[str] = set()
    for name, module in network.named_modules():
        if name == "" or isinstance(getattr(module, "dtype", None), torch.dtype):
            owners = [own.rpartition(".")[0] for own, _ in module.named_parameters(name)]
            found |= {owners[0], owners[-1]} if owners else set()
    return found.intersection(convolutions(network))


def reduce(network: nn.Module, precision: GraphPrecision, islands: Iterable[str]) -> nn.Module:
    """A copy of the network whose convolutions, but for `islands`, work in the given precision."""
    reduced = copy.deepcopy(network)
    for name in set(_inside("", reduced)).difference(islands):
        module = reduced.get_submodule(name)
        for own, parameter in list(module.named_parameters(recurse=False)):
            # Its own, as an island may share it.
            setattr(module, own, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        module.to(TYPES[precision])
        if not getattr(module, "takes_any_type", False):
            # Its class changes, and not the module: the names of the weights and of what was seen stay.
            kind = type(module)
            module.__class__ = type(f"Reduced{kind.__name__}", (_Reduced, kind), {})
    return reduced


class _Reduced(nn.Module):
    """A convolution that works in the type of its weight and gives back that of its input.

    To be put before a kind of convolution, among the bases of a class.
    """

    weight: Tensor

    def forward(self, input: Tensor, *size: Any) -> Tensor:
        """As the convolution; size: of what a transposed one gives."""
        result: Tensor = super().forward(input.to(self.weight.dtype), *size).to(input.dtype)
        return result


def calibrate(
    network: nn.Module, trajectory: Trajectory, precision: GraphPrecision, *, stages: Stages = silent
) -> Calibration:
    """Decide which convolutions stay in float32, by the oracle on what the float32 network was asked.

    stages: shows how far it is; there are more than one where something has to stay in float32.

    Raises ParityError where no choice of them brings the oracle within tolerance, or all would have to stay.
    """
    islands, all_of_them = standing_islands(network), convolutions(network)
    largest = max(trajectory.count, default_max_batch(trajectory.spec))
    for _ in range(_ATTEMPTS):
        _require_some(all_of_them, islands, precision)
        oracle = Oracle(network, trajectory.spec, precision, islands, max_batch=largest)
        try:
            with stages(f"calibrating {precision}", len(trajectory.timesteps)) as progress:
                steps = teacher_forced(trajectory, oracle, progress)
        except BackendError as error:
            islands |= _read_for_their_type(error, network, islands, precision)
            continue
        ranges = oracle.ranges()
        found = unsafe(ranges, network, TYPES[precision]) or _too_far(
            worst(steps), network, islands, precision
        )
        if not found:
            return Calibration(precision, islands, len(all_of_them), ranges, steps)
        if found.keys() <= islands.keys():
            break
        islands = found | islands
    raise ParityError(
        f"the network does not fit {precision}: tensors overflow it with "
        f"{plural(len(islands), 'convolution')} in float32 already; {_instead(precision)}"
    )


def _require_some(all_of_them: list[str], islands: Mapping[str, str], precision: GraphPrecision) -> None:
    """Raise ParityError where no convolution is left to work in the precision."""
    if not all_of_them:
        raise ParityError(
            f"nothing of this network fits {precision}: it has no convolutions; export it in fp32, or in tf32 for "
            "an engine (--precision)"
        )
    if islands.keys() >= set(all_of_them):
        raise ParityError(
            f"nothing of this network fits {precision}: all its convolutions must stay in float32; "
            f"{_instead(precision)}"
        )


def _read_for_their_type(
    error: BackendError, network: nn.Module, islands: Mapping[str, str], precision: GraphPrecision
) -> dict[str, str]:
    """The convolutions that a network which does not run in two types takes its own from, each with the reason."""
    if "type" not in str(error):
        raise error
    types = _of_types(network) - islands.keys()
    if not types:
        raise ParityError(
            f"the network does not run with its convolutions in {precision} ({first_line(error)}): its "
            "forward() casts by the type of a weight, or uses that of a convolution itself; "
            f"{_instead(precision)}"
        ) from error
    return dict.fromkeys(sorted(types), "the network takes the type that it works in from it")


def _too_far(
    most: StepErrors, network: nn.Module, islands: Mapping[str, str], precision: GraphPrecision
) -> dict[str, str]:
    """Where the prediction is past tolerance, the convolutions with a forward() of their own, which may be to blame.

    Raises ParityError where there are none.
    """
    if most.within:
        return {}
    own = _with_own_forward(network) - islands.keys()
    if not own:
        raise ParityError(
            f"hardware that rounds to {precision} would be off by {most.relative_rms:.1e} of the prediction's "
            f"RMS at t = {most.timestep}, and {most.limit:.0e} is allowed: {_instead(precision)}"
        )
    reason = f"has a forward() of its own: in {precision} the prediction is off by {most.relative_rms:.1e}"
    return dict.fromkeys(sorted(own), reason)


def _instead(precision: GraphPrecision) -> str:
    """What to do with a network that a precision is not for."""
    engines = "tf32 or bf16" if precision == "fp16" else "tf32"
    return f"export it in fp32, or in {engines} for an engine (--precision)"


def unsafe(ranges: dict[str, Range], network: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """The convolutions that make tensors which do not fit the type, each with the reason."""
    limit = torch.finfo(dtype).max / _HEADROOM
    found: dict[str, str] = {}
    for name, seen in ranges.items():
        if not seen.largest <= limit:  # NaN included
            reason = f"reaches {seen.largest:.3g}, past a quarter of the type's {torch.finfo(dtype).max:.3g}"
        elif not seen.rounding <= _ROUNDING * torch.finfo(dtype).eps:
            reason = (
                f"loses {seen.rounding:.1e} of its RMS by rounding: its values are too small for the type"
            )
        else:
            continue
        found |= dict.fromkeys(_convolutions(name, network), reason)
    return found


def _convolutions(name: str, network: nn.Module) -> list[str]:
    """The convolutions that decide the type of what a module makes: its own, or those it stands among."""
    while not (inside := _inside(name, network)) and name:
        name = name.rpartition(".")[0]
    return inside


def _inside(name: str, network: nn.Module) -> list[str]:
    """The convolutions in a module, or the module itself where it is one; "" is the network."""
    return [
        f"{name}.{child}".strip(".")
        for child, module in network.get_submodule(name).named_modules()
        if isinstance(module, _CONVOLUTIONS)
    ]


class Oracle(TorchNetwork):
    """A reduced network as hardware of its precision computes it, on a CPU.

    Each operator runs in float32, and its result is rounded to the type that it has in the network. What
    is past the type's range stays at its end, so that the range of what follows can still be told.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        precision: GraphPrecision,
        islands: Iterable[str],
        *,
        max_batch: int,
    ) -> None:
        reduced = reduce(network, precision, islands)
        super().__init__(reduced, msgspec.structs.replace(spec, precision=precision), max_batch=max_batch)
        self._rounding = _Rounding(network, reduced, TYPES[precision])

    def ranges(self) -> dict[str, Range]:
        """What was seen so far, by the name of the innermost module that made it."""
        return {
            name: Range(largest.item(), rounding.sqrt().item())
            for name, (largest, rounding) in self._rounding.seen.items()
        }

    def predict(self, batch: int) -> None:
        """Predict for the leading rows."""
        with self._rounding:
            super().predict(batch)


class _Rounding(TorchDispatchMode):
    """Runs every operator of a reduced network in float32, and rounds its result and the weights."""

    def __init__(self, network: nn.Module, reduced: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._max = torch.finfo(dtype).max
        self._modules: list[str] = [""]
        # By module: the largest value and the worst squared relative rounding. Tensors, as reading a
        # number out of each would cost as much as the network.
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for (name, before), after in zip(network.named_modules(), reduced.modules(), strict=True):
            after.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name))
            after.register_forward_hook(self._leave)
            if isinstance(after, _CONVOLUTIONS) and after.weight.dtype == self._dtype:
                for whole, rounded in zip(before.parameters(), after.parameters(), strict=True):
                    rounded.data.copy_(self._round(name, whole.data))

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        module = self._modules[-1]
        if func is _ATEN._to_copy.default:
            narrows = kwargs.get("dtype") == self._dtype
            return self._round(module, args[0].float()) if narrows else func(*args, **kwargs)
        dtypes = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # A mixture with float32 comes out as float32.
        if func.is_view or func in _MOVES or dtypes != {self._dtype}:
            return func(*args, **kwargs)
        assert not func._schema.is_mutable, f"{func} would change a copy"
        args, kwargs = tree_map_only(Tensor, lambda t: t.float(), (args, kwargs))
        return tree_map_only(Tensor, lambda t: self._round(module, t), func(*args, **kwargs))

    def _round(self, module: str, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        rounded = tensor.clamp(-self._max, self._max).to(self._dtype)
        largest = tensor.abs().amax()
        unit = largest.clamp_min(torch.finfo(torch.float32).tiny)  # so that no square leaves float32
        lost, whole = (rounded.float() - tensor) / unit, tensor / unit
        error = lost.square().sum() / whole.square().sum().clamp_min(1e-30)
        largest_before, error_before = self.seen.get(module, (largest, error))
        self.seen[module] = torch.maximum(largest_before, largest), torch.maximum(error_before, error)
        return rounded


def widened(model: Any) -> Any:
    """An onnx.ModelProto with float32 in place of its bfloat16, which ONNX Runtime lacks on a CPU.

    It computes what the original would without rounding between operators: as ONNX Runtime does with
    float16 on a CPU, this checks structure and weights.
    """
    onnx = require("onnx", "export")
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    wider = copy.deepcopy(model)
    del wider.graph.value_info[:]
    for tensor in wider.graph.initializer:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in wider.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == narrow:
                attribute.i = wide
    return wider
