"""Another's U-Net of the family → ours: a table of names, and what names cannot say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.files import show
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.spec import ModelSpec, UNetConfig
from ddpm_deploy.train.checkpoint import StateDict, build_network, misfits, new_network
from ddpm_deploy.train.unet import Attention, Downsample, ResBlock, UNet, Upsample

Part = Literal["down", "halve", "middle", "up", "double"]


@dataclass(frozen=True)
class Place:
    """Where a part of the U-Net stands.

    part: a stage on the way down, in the middle or on the way up, or what halves or doubles the resolution behind one.
    level: 0 is the highest resolution. number: among the stages of its level, from 0; of what halves and doubles, how
    many stages stand before it there. position: among all parts of the way down or up, from 0.
    """

    part: Part
    level: int
    number: int
    position: int


def places(config: UNetConfig) -> dict[str, Place]:
    """The parts of our U-Net in order, by the names of their modules."""
    last = len(config.widths) - 1
    down: list[tuple[Part, int, int]] = []
    up: list[tuple[Part, int, int]] = []
    for level in range(last + 1):
        down += [("down", level, number) for number in range(config.blocks)]
        down += [("halve", level, config.blocks)] if level < last else []
    for level in range(last, -1, -1):
        up += [("up", level, number) for number in range(config.blocks + 1)]
        up += [("double", level, config.blocks + 1)] if level else []
    middle: list[tuple[Part, int, int]] = [("middle", last, number) for number in range(2)]
    return {
        f"{way}.{position}": Place(*where, position)
        for way, parts in (("down", down), ("middle", middle), ("up", up))
        for position, where in enumerate(parts)
    }


def in_order(qkv: Tensor, heads: int) -> Tensor:
    """Rows that are in our order already."""
    return qkv


@dataclass(frozen=True)
class Names:
    """A dialect's names for the parts of the U-Net.

    outside: of what stands outside the levels, by our names (conv_in, temb1, temb2, norm_out, conv_out,
        label_embedding).
    block: inside a residual block (norm1, conv1, temb, norm2, conv2, shortcut). attention: inside an attention (norm,
        out, and either qkv or q, k and v).
    block_at, attention_at: what stands before these, for a place; of what halves and doubles by a convolution,
        block_at is that convolution's whole name.
    order: brings the rows of qkv, (3C, …), into ours, all of q, then of k, then of v, each head by head; it is given
        the number of heads.
    """

    outside: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    block_at: Callable[[Place], str]
    attention_at: Callable[[Place], str]
    order: Callable[[Tensor, int], Tensor] = in_order


def build_family(weights: Weights, spec: ModelSpec, names: Names) -> UNet:
    """Our U-Net of the spec with the weights of another's.

    Raises ArtefactError where a tensor is missing, left over, or of another shape, by the names in their file.
    """
    assert spec.network is not None
    try:
        with torch.device("meta"):  # allocates nothing, whatever size the spec claims
            network = new_network(spec)
    except ValueError as error:
        raise ArtefactError(f"{weights.name} makes no network: {error}") from error
    state = _Taking(weights, {name: tensor.shape for name, tensor in network.state_dict().items()})
    for ours, theirs in names.outside.items():
        if f"{ours}.weight" in state.shapes:
            state.take(ours, theirs)
    where, projections = places(spec.network), []
    for name, module in network.named_modules():
        place = where.get(".".join(name.split(".")[:2]))
        if place is None:
            continue
        if isinstance(module, ResBlock):
            before = names.block_at(place)
            for ours, theirs in names.block.items():
                if ours != "temb" and f"{name}.{ours}.weight" in state.shapes:
                    state.take(f"{name}.{ours}", f"{before}.{theirs}")
            width = torch.Size([module.temb_channels, spec.network.time_width])
            projections.append(state.part(f"{before}.{names.block['temb']}", width))
        elif isinstance(module, Attention):
            _take_attention(state, name, module.heads, names, names.attention_at(place))
        elif isinstance(module, Downsample | Upsample):
            state.take(f"{name}.conv", names.block_at(place))
    state.put("temb_projections", projections)
    state.finish()
    return build_network(spec, state.taken)


def _take_attention(state: "_Taking", name: str, heads: int, names: Names, before: str) -> None:
    for ours in ("norm", "out"):
        if f"{name}.{ours}.weight" in state.shapes:
            state.take(f"{name}.{ours}", f"{before}.{names.attention[ours]}")
    whole = state.shapes[f"{name}.qkv.weight"]
    if "qkv" in names.attention:
        parts = [state.part(f"{before}.{names.attention['qkv']}", whole)]
    else:
        third = torch.Size([whole[0] // 3, *whole[1:]])
        parts = [state.part(f"{before}.{names.attention[part]}", third) for part in "qkv"]
    state.put(f"{name}.qkv", parts, lambda tensor: names.order(tensor, heads))


_Pair = tuple[Tensor, Tensor]  # weight and bias


@dataclass
class _Taking:
    """Tensors taken out of their state dict one by one, so that what is missing and left over is known in the end."""

    weights: Weights
    shapes: dict[str, torch.Size]
    taken: StateDict = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)

    def take(self, ours: str, theirs: str) -> None:
        """A module's weight and bias as ours."""
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in self.shapes:
                self.taken[f"{ours}.{kind}"] = self._tensor(f"{theirs}.{kind}", self.shapes[f"{ours}.{kind}"])

    def part(self, theirs: str, shape: torch.Size) -> _Pair:
        """Weight, of the shape, and bias of a module that is a part of one of ours."""
        return self._tensor(f"{theirs}.weight", shape), self._tensor(f"{theirs}.bias", shape[:1])

    def put(
        self, ours: str, parts: list[_Pair], order: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        """One module of ours out of several of theirs."""
        for number, kind in enumerate(("weight", "bias")):
            tensors = [part[number] for part in parts]
            if not any(tensor.is_meta for tensor in tensors):  # one that is missing ends it all in the end
                self.taken[f"{ours}.{kind}"] = order(torch.cat(tensors)).contiguous()

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self.weights.state.get(name)
        self.used.add(name)
        if tensor is None:
            self.missing.append(name)
            return torch.empty(shape, device="meta")
        if not tensor.is_floating_point():
            raise ArtefactError(f"{self.weights.name}: {show(name)} holds whole numbers, and no weights")
        # A 1×1 convolution may be a matrix there.
        if tensor.shape != shape and [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
            raise ArtefactError(
                f"{self.weights.name}: {show(name)} is {tuple(tensor.shape)}, and {tuple(shape)} is needed"
            )
        return tensor.reshape(shape).contiguous()

    def finish(self) -> None:
        """Raise ArtefactError where a tensor is missing or was not used."""
        strays = [name for name in self.weights.state if name not in self.used]
        if said := misfits(self.missing, strays):
            raise ArtefactError(f"the weights in {self.weights.name} are of another network: {said}")
