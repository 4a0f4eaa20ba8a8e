"""The Inception-v3 that FID is defined by: that of 2015-12-05 in TensorFlow (Szegedy et al. 2016; Heusel et al. 2017).

It is not torchvision's: average pools count no padding, the last block has a largest in place of an average, and the
images are resized as TensorFlow 1 did. Its parts are called as the files of its weights have them.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES: Final = 2048
SIZE: Final = 299
CLASSES: Final = 1008  # of its last layer, which is left out here


class _Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU; padded to keep the size, unless it is "valid"."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        valid: bool = False,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, width // 2)
        self.conv = nn.Conv2d(before, after, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    """The mean of 3×3 neighbours: at the border, of those that there are."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _At35(nn.Module):
    """A block of 35×35 pixels: 1×1, 5×5, two 3×3, and a pool, side by side."""

    def __init__(self, before: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(before, 64)
        self.branch5x5_1 = _Convolution(before, 48)
        self.branch5x5_2 = _Convolution(48, 64, 5)
        self.branch3x3dbl_1 = _Convolution(before, 64)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3)
        self.branch_pool = _Convolution(before, pooled)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]
        return torch.cat(parts, 1)


class _To17(nn.Module):
    """From 35×35 pixels to 17×17."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(before, 384, 3, stride=2, valid=True)
        self.branch3x3dbl_1 = _Convolution(before, 64)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2, valid=True)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halved(x)], 1)


class _At17(nn.Module):
    """A block of 17×17 pixels, whose 7×7 convolutions are a row and a column each."""

    def __init__(self, before: int, within: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(before, 192)
        self.branch7x7_1 = _Convolution(before, within)
        self.branch7x7_2 = _Convolution(within, within, (1, 7))
        self.branch7x7_3 = _Convolution(within, 192, (7, 1))
        self.branch7x7dbl_1 = _Convolution(before, within)
        self.branch7x7dbl_2 = _Convolution(within, within, (7, 1))
        self.branch7x7dbl_3 = _Convolution(within, within, (1, 7))
        self.branch7x7dbl_4 = _Convolution(within, within, (7, 1))
        self.branch7x7dbl_5 = _Convolution(within, 192, (1, 7))
        self.branch_pool = _Convolution(before, 192)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        parts = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]
        return torch.cat(parts, 1)


class _To8(nn.Module):
    """From 17×17 pixels to 8×8."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(before, 192)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2, valid=True)
        self.branch7x7x3_1 = _Convolution(before, 192)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2, valid=True)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), _halved(x)], 1)


class _At8(nn.Module):
    """A block of 8×8 pixels. averages: whether its pool does, or takes the largest, as that of the last block."""

    def __init__(self, before: int, *, averages: bool) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(before, 320)
        self.branch3x3_1 = _Convolution(before, 384)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Convolution(before, 448)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1))
        self.branch_pool = _Convolution(before, 192)
        self._pool = _average if averages else _largest

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self._pool(x)),
        ]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Images (N, 3, 299, 299), about -1 to 1, as `prepare` makes them → features (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, valid=True)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, valid=True)
        self.Mixed_5b = _At35(192, 32)
        self.Mixed_5c = _At35(256, 64)
        self.Mixed_5d = _At35(288, 64)
        self.Mixed_6a = _To17(288)
        self.Mixed_6b = _At17(768, 128)
        self.Mixed_6c = _At17(768, 160)
        self.Mixed_6d = _At17(768, 160)
        self.Mixed_6e = _At17(768, 192)
        self.Mixed_7a = _To8(768)
        self.Mixed_7b = _At8(1280, averages=True)
        self.Mixed_7c = _At8(2048, averages=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))  # (N, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        return x.mean((2, 3))


def prepare(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) from 0 to 255, in float32 → what the network takes."""
    return (resize_as_tensorflow_1(images, SIZE) - 128) / 128


def resize_as_tensorflow_1(images: Tensor, size: int) -> Tensor:
    """Bilinear, (N, C, H, W) → (N, C, size, size), with pixel i at i·H/size: half a pixel off, and not antialiased.

    The graph of FID's network does so itself, so a figure is FID by this resizing alone.
    """
    *_, height, width = images.shape
    top, bottom, down = _neighbours(height, size, images)
    left, right, across = _neighbours(width, size, images)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _neighbours(had: int, wanted: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each new pixel along an axis: the old one before it, that behind it, and how far it is between them."""
    scale = torch.tensor(had / wanted, dtype=torch.float32, device=like.device)
    place = torch.arange(wanted, dtype=torch.float32, device=like.device) * scale
    before = place.long()
    return before, (before + 1).clamp(max=had - 1), place - before
