"""The configuration of a UNet2DModel → our U-Net and its names there."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_deploy.errors import ArtefactError
from ddpm_deploy.files import show
from ddpm_deploy.importers.diffusers.folder import word
from ddpm_deploy.importers.family import Names, Place
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.spec import ModelSpec, Share, Size, UNetConfig

BlockNames = Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)]


class NetworkFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of UNet2DModel, with the defaults of its constructor."""

    # Without bounds, as msgspec 0.22 crashes on a bounded number or a pair; the ModelSpec has them.
    sample_size: int | tuple[int, int] | None = None
    in_channels: Size = 3
    out_channels: Size = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: Annotated[int, msgspec.Meta(ge=0, le=16_384)] | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: BlockNames = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: BlockNames = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=16)] = (
        224,
        448,
        672,
        896,
    )
    layers_per_block: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: Size | None = 8  # null is one head
    norm_num_groups: Size = 32
    attn_norm_num_groups: Size | None = None
    norm_eps: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    num_train_timesteps: int | None = None  # of a learned embedding alone

    def refusal(self) -> str | None:
        """What of it cannot be carried, and why; None: nothing."""
        blocks = (self.down_block_types, self.up_block_types)
        levels = len(self.block_out_channels)
        reasons = {
            f"down_block_types and up_block_types are not {levels} each, as block_out_channels": any(
                len(names) != levels for names in blocks
            ),
            "center_input_sample: its first convolution sees 2x - 1, which at the padded border is not x": (
                self.center_input_sample
            ),
            f"time_embedding_type {word(self.time_embedding_type)}: only positional is a table of sinusoids": (
                self.time_embedding_type != "positional"
            ),
            f"freq_shift {self.freq_shift}: only 0 and 1 are known": self.freq_shift not in (0, 1),
            f"mid_block_type {word(self.mid_block_type)}: only UNetMidBlock2D is supported": (
                self.mid_block_type != "UNetMidBlock2D"
            ),
            "mid_block_scale_factor other than 1": self.mid_block_scale_factor != 1,
            f"downsample_padding {word(self.downsample_padding)}: only 0 and 1 are known": (
                self.downsample_padding not in (0, 1)
            ),
            "downsample_type and upsample_type: only conv and resnet are known": any(
                kind not in (None, "conv", "resnet") for kind in (self.downsample_type, self.upsample_type)
            ),
            f"act_fn {word(self.act_fn)}: only silu, which is swish, is supported": (
                self.act_fn.lower() not in ("silu", "swish")
            ),
            f"resnet_time_scale_shift {word(self.resnet_time_scale_shift)}: only default and scale_shift are known": (
                self.resnet_time_scale_shift not in ("default", "scale_shift")
            ),
            f"class_embed_type {word(self.class_embed_type)}: only null and timestep are tables of classes": (
                self.class_embed_type not in (None, "timestep")
            ),
            f"in_channels {self.in_channels} and out_channels {self.out_channels}: its input holds more than the "
            "image, or its output less": self.out_channels not in (self.in_channels, 2 * self.in_channels),
        }
        return next((reason for reason, found in reasons.items() if found), None)


# Of each block, whether it has attention, and whether a residual block resamples: None is as downsample_type says.
_DOWN: Final[dict[str, tuple[bool, bool | None]]] = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
_UP: Final[dict[str, tuple[bool, bool | None]]] = {
    "UpBlock2D": (False, False),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, True),
}


def _blocks(
    names: Iterable[str], known: Mapping[str, tuple[bool, bool | None]], resampling: str | None, where: str
) -> tuple[list[bool], list[bool]]:
    """Which levels have attention, and which resample by a residual block."""
    attention, resamples = [], []
    for name in names:
        short = name.removeprefix("UNetRes")  # before 0.1
        if short not in known:
            raise ArtefactError(
                f"{where}: {word(name)} is a block of another network: only {', '.join(known)} are supported"
            )
        attends, by_block = known[short]
        attention.append(attends)
        resamples.append(resampling == "resnet" if by_block is None else by_block)
    return attention, resamples


def unet_config(fields: NetworkFields, where: str) -> UNetConfig:
    """The network's shape. Raises ArtefactError where ours has none like it."""
    down, halving = _blocks(fields.down_block_types, _DOWN, fields.downsample_type, where)
    up, doubling = _blocks(reversed(fields.up_block_types), _UP, fields.upsample_type, where)
    last = len(down) - 1
    for what, ways in (("attention", zip(down, up, strict=True)), ("resampling", _both(halving, doubling))):
        for level in (number for number, (one, other) in enumerate(ways) if one != other):
            raise ArtefactError(
                f"{where}: the {what} of {show(fields.down_block_types[level])} on the way down is not that of "
                f"{show(fields.up_block_types[last - level])} on the way up, which is not supported"
            )
    scale_shift = fields.resnet_time_scale_shift == "scale_shift"
    # The middle's attention has a norm of its own number of groups, or with scale_shift none.
    groups = fields.attn_norm_num_groups or (0 if scale_shift else None)
    return UNetConfig(
        channels=fields.block_out_channels[0],
        widths=fields.block_out_channels,
        time_width=fields.time_embedding_dim or 4 * fields.block_out_channels[0],
        blocks=fields.layers_per_block,
        attention_levels=tuple(level for level, there in enumerate(down) if there),
        head_channels=fields.attention_head_dim,
        groups=fields.norm_num_groups,
        norm_eps=fields.norm_eps,
        padding="symmetric" if fields.downsample_padding else "asymmetric",
        scale_shift=scale_shift,
        resampling_blocks=tuple(
            level
            for level in range(last + 1)
            if (level < last and halving[level]) or (level > 0 and doubling[level])
        ),
        middle_attention=fields.add_attention,
        middle_groups=groups if fields.add_attention else None,
        dropout=fields.dropout,
    )


def _both(halving: list[bool], doubling: list[bool]) -> Iterable[tuple[bool, bool]]:
    """How each level halves and doubles: the first only halves, and the last only doubles."""
    yield from [(halving[0], halving[0]), *zip(halving[1:-1], doubling[1:-1], strict=True)]


def unet_names(config: UNetConfig, old: bool) -> Names:
    last = len(config.widths) - 1

    def block_at(place: Place) -> str:
        conv = "" if place.level in config.resampling_blocks else ".conv"
        match place.part:
            case "down":
                return f"down_blocks.{place.level}.resnets.{place.number}"
            case "halve":
                return f"down_blocks.{place.level}.downsamplers.0{conv}"
            case "middle":
                return f"mid_block.resnets.{place.number}"
            case "up":
                return f"up_blocks.{last - place.level}.resnets.{place.number}"
            case "double":
                return f"up_blocks.{last - place.level}.upsamplers.0{conv}"

    def attention_at(place: Place) -> str:
        return block_at(place).replace("resnets", "attentions")

    projections = {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
    if not old:
        projections = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    return Names(
        outside={
            "temb1": "time_embedding.linear_1",
            "temb2": "time_embedding.linear_2",
            "label_embedding": "class_embedding",
            "conv_in": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "temb": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "shortcut": "conv_shortcut",
        },
        attention={"norm": "group_norm", **projections},
        block_at=block_at,
        attention_at=attention_at,
    )


_TABLE_MOST: Final = 2**26  # numbers in a table of classes


def with_class_table(weights: Weights, spec: ModelSpec) -> Weights:
    """With the classes' embedding as a table, where the network makes it of sinusoids: MLP(sinusoid(k)) for k < N."""
    assert spec.network is not None
    width, state = spec.network.time_width, dict(weights.state)
    if spec.num_classes * width > _TABLE_MOST:
        raise ArtefactError(f"{weights.name}: a table of {spec.num_classes} classes is larger than supported")
    layers: list[Tensor] = []
    for layer, shape in (("linear_1", (width, spec.embedding.dim)), ("linear_2", (width, width))):
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            name = f"class_embedding.{layer}.{kind}"
            if (got := weights.shape(name)) != wanted:
                raise ArtefactError(f"{weights.name}: {show(name)} is {got}, and {wanted} is needed")
            layers.append(state.pop(name).double())
    sinusoids = torch.from_numpy(spec.embedding.table(spec.num_classes)).double()
    hidden = F.silu(F.linear(sinusoids, *layers[:2]))
    state["class_embedding.weight"] = F.linear(hidden, *layers[2:]).float()
    return dataclasses.replace(weights, state=state)
