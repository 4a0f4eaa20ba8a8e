"""The networks that are timed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpm_deploy.export.graph import export_onnx
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.checkpoint import new_network
from ddpm_deploy.train.settings import PRESETS
from ddpm_deploy.train.unet import UNet
from ddpm_deploy.words import GraphPrecision


@dataclass(frozen=True)
class Model:
    """A preset's network with random weights, in torch and exported."""

    name: str
    network: UNet
    spec: ModelSpec
    onnx: Path


def export_preset(
    name: str, folder: Path, image_size: tuple[int, int] | None = None, precision: GraphPrecision = "fp32"
) -> Model:
    """Make it, at the preset's image size if no other is given."""
    network, spec = random_network(name, image_size)
    path = folder / f"{name}.onnx"
    export_onnx(network, spec, path, precision=precision)
    return Model(name, network, spec, path)


def random_network(name: str, image_size: tuple[int, int] | None = None) -> tuple[UNet, ModelSpec]:
    """A preset's network in torch alone. No weight is zero, so that nothing can be skipped."""
    preset = PRESETS[name]
    spec = preset.spec(name, preset.channels or 3, image_size or preset.image_size)
    torch.manual_seed(0)
    network = new_network(spec)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network, spec


def diffusers_pipeline(spec: ModelSpec) -> Any:
    """The same network as a diffusers user would run it: UNet2DModel in a DDPMPipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    config, (channels, size, _) = spec.network, spec.image_shape
    assert config is not None
    levels = range(len(config.widths))
    kinds = ["Attn" if level in config.attention_levels else "" for level in levels]
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=None,
        norm_num_groups=config.groups,
        norm_eps=config.norm_eps,
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    pipeline = DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(variance_type="fixed_large"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
