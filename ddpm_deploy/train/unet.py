"""The ε-network of the DDPM family: one U-Net, forward(x, temb), written to be exported.

It follows Ho et al. 2020 (appendix B) and their code; `UNetConfig` says how a relative differs. Plain
operators only: attention is two matrix products and a softmax, with q scaled before the first, so that
half precision does not overflow there.

Precision follows the weights: each convolution works in the type of its own weight and hands that on,
and a block gives what its last convolution gives. So `export.precision` makes a half-precision network by
casting the weights of some convolutions, and what must stay in float32 (the normalisations, the softmax,
the timestep, the convolutions in `UNet.float32_islands`) says so here, where in a float32 network it costs nothing.
"""

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_deploy.spec import UNetConfig


class Conv2d(nn.Conv2d):
    """A convolution in the type of its weight, whatever comes in."""

    takes_any_type: Final = True  # what follows it here goes on in that type: see `export.precision`

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C, H', W')."""
        if not torch.is_autocast_enabled(x.device.type):  # it chooses the type, and would undo ours
            x = x.to(self.weight.dtype)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """A normalisation in float32, as squares above 256 overflow half precision."""

    def forward(self, x: Tensor, gives: torch.dtype = torch.float32) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), in the type of the convolution that comes next."""
        return super().forward(x.float()).to(gives)


class ResBlock(nn.Module):
    """norm, SiLU, conv; the timestep; norm, SiLU, dropout, conv; plus the (projected) input.

    scale: of the resolution: ½ and 2 halve and double it before the first convolution, and that of the input too.
    """

    def __init__(self, config: UNetConfig, channels_in: int, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.scale_shift = config.scale_shift
        self.temb_channels = 2 * channels if config.scale_shift else channels
        self.norm1 = GroupNorm(config.groups, channels_in, eps=config.norm_eps)
        self.conv1 = Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = GroupNorm(config.groups, channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.shortcut = Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, C_in, H, W) and this block's own slice of the projected temb → (B, C, scale·H, scale·W)."""
        first, second = self.conv1.weight.dtype, self.conv2.weight.dtype
        h = F.silu(self.norm1(x, first))
        if self.scale < 1:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.scale > 1:
            h, x = _doubled(h), _doubled(x)
        h = self.conv1(h)
        temb = temb[:, :, None, None]  # (B, C or 2C, 1, 1)
        if self.scale_shift:
            scale, shift = temb.to(second).chunk(2, dim=1)
            h = self.norm2(h, second) * (1 + scale) + shift
        else:
            h = self.norm2(h + temb.to(h.dtype), second)
        h = self.conv2(self.dropout(F.silu(h)))
        result: Tensor = (self.shortcut(x) + h).to(h.dtype)
        return result


class Attention(nn.Module):
    """Self-attention over the pixels, residual. groups: of its normalisation; 0 for none."""

    def __init__(self, config: UNetConfig, channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        self.norm = GroupNorm(groups, channels, eps=config.norm_eps) if groups else None
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        _, channels, height, width = x.shape
        head = channels // self.heads
        normed = x if self.norm is None else self.norm(x, self.qkv.weight.dtype)
        qkv = self.qkv(normed).reshape(-1, 3 * self.heads, head, height * width)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, heads, head, HW)
        q = q * head**-0.5
        weights = torch.softmax((q.transpose(2, 3) @ k).float(), dim=3).to(v.dtype)  # (B, heads, HW, HW)
        # A product that is no wider than tall: ONNX Runtime splits others among its threads along their columns, and
        # sums in another order then, so that an image would depend on the batch and the number of threads.
        tall = height * width >= head
        h = (weights @ v.transpose(2, 3)).transpose(2, 3) if tall else v @ weights.transpose(2, 3)
        h = self.out(h.reshape(-1, channels, height, width))  # from (B, heads, head, HW)
        result: Tensor = (x + h).to(h.dtype)
        return result


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if config.padding == "asymmetric" else (1, 1, 1, 1)
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H/2, W/2)."""
        result: Tensor = self.conv(F.pad(x, self.pad))
        return result


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        result: Tensor = self.conv(_doubled(x))
        return result


def _doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, 2H, 2W): each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Stage(nn.Module):
    """A residual block, with attention after it where its level has it.

    groups: of the attention's normalisation (None: the network's; 0: it has none).
    """

    def __init__(
        self,
        config: UNetConfig,
        channels_in: int,
        channels: int,
        attention: bool,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.block = ResBlock(config, channels_in, channels)
        groups = config.groups if groups is None else groups
        self.attention = Attention(config, channels, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C, H, W)."""
        result: Tensor = self.attention(self.block(x, temb))
        return result


class UNet(nn.Module):
    """The ε-network: prediction = forward(x, temb).

    config: its shape. image_channels: C of x. temb_dim: D of temb, the sinusoidal embedding.
    out_channels: of the prediction. num_labels: that y may take; 0 for an unconditional network.
    """

    # In float32 they cost next to nothing, and halve the error at small t, where the noise to be predicted is
    # itself hardly larger than the rounding of x.
    float32_islands: ClassVar[Mapping[str, str]] = {"conv_in": "reads x", "conv_out": "makes the prediction"}

    def __init__(
        self, config: UNetConfig, image_channels: int, temb_dim: int, out_channels: int, num_labels: int = 0
    ) -> None:
        super().__init__()
        self.temb1 = nn.Linear(temb_dim, config.time_width)
        self.temb2 = nn.Linear(config.time_width, config.time_width)
        self.label_embedding = nn.Embedding(num_labels, config.time_width) if num_labels else None
        self.conv_in = Conv2d(image_channels, config.channels, 3, padding=1)

        # Going down, what each module gives is kept; going up, each stage takes one back.
        self.down = nn.ModuleList()
        channels, skips = config.channels, [config.channels]
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                self.down.append(Stage(config, channels, width, level in config.attention_levels))
                channels = width
                skips.append(channels)
            if level < len(config.widths) - 1:
                resamples = level in config.resampling_blocks
                self.down.append(
                    ResBlock(config, channels, channels, 0.5) if resamples else Downsample(config, channels)
                )
                skips.append(channels)

        self.middle = nn.ModuleList(
            [
                Stage(config, channels, channels, config.middle_attention, config.middle_groups),
                Stage(config, channels, channels, attention=False),
            ]
        )

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(config, channels + skips.pop(), width, level in config.attention_levels))
                channels = width
            if level > 0:
                resamples = level in config.resampling_blocks
                self.up.append(ResBlock(config, channels, channels, 2.0) if resamples else Upsample(channels))

        self.norm_out = GroupNorm(config.groups, channels, eps=config.norm_eps)
        self.conv_out = Conv2d(channels, out_channels, 3, padding=1)
        # The timestep's projections for all blocks are one matrix product, split.
        self.temb_splits = [m.temb_channels for m in self.modules() if isinstance(m, ResBlock)]
        self.temb_projections = nn.Linear(config.time_width, sum(self.temb_splits))
        self._initialise()

    def _initialise(self) -> None:
        """As Ho's code: Xavier uniform, and zero where a residual branch or the network ends."""
        for module in self.modules():
            if isinstance(module, Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, temb: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), temb (B, D) and, of a conditional network, y (B,) → (B, out_channels, H, W)."""
        temb = self.temb2(F.silu(self.temb1(temb)))
        if self.label_embedding is not None:
            temb = temb + self.label_embedding(y)
        temb = F.silu(temb)
        projections = iter(self.temb_projections(temb).split(self.temb_splits, dim=1))

        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else module(h, next(projections))
            skips.append(h)
        for stage in self.middle:
            h = stage(h, next(projections))
        for module in self.up:
            if isinstance(module, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h) if isinstance(module, Upsample) else module(h, next(projections))
        result: Tensor = self.conv_out(F.silu(self.norm_out(h, self.conv_out.weight.dtype)))
        return result
