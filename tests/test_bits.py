"""The promise of bits: an image is the same in every batch and with any number of threads, where the export says so."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec, UNetConfig
from ddpm_deploy.words import Precision
from tests.models import tiny_spec

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from ddpm_deploy.export.bits import same_bits  # noqa: E402
from ddpm_deploy.export.graph import describe, export_onnx, trace  # noqa: E402
from ddpm_deploy.train.checkpoint import new_network  # noqa: E402
from ddpm_deploy.train.settings import PRESETS  # noqa: E402


def written(folder: Path, spec: ModelSpec) -> Path:
    """A network with random weights, none of them zero, as ddpm-export writes it, without its checks."""
    torch.manual_seed(0)
    network = new_network(spec).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    path = folder / "m.onnx"
    onnx.save(trace(network, spec), path)
    describe(path, spec)
    return path


@pytest.mark.parametrize(("size", "widths"), [(24, (8, 64)), (48, (8, 8, 64))])
def test_an_image_has_its_bits_in_every_batch_and_with_any_threads(
    tmp_path: Path, size: int, widths: tuple[int, ...]
) -> None:
    """Attention over 144 pixels, as wide as the default network's, in less of a network."""
    config: UNetConfig = PRESETS["small"].network
    config = msgspec.structs.replace(config, channels=8, widths=widths, attention_levels=())
    path = written(tmp_path, tiny_spec((3, size, size), network=config))
    images: dict[tuple[int, str], Any] = {}
    for threads in (1, 2, 3):
        with Sampler.load(path, threads=threads) as sampler:
            images[threads, "of four"] = sampler.sample(4, steps=4, seed=0)[3]
            images[threads, "alone"] = sampler.sample(1, first_index=3, steps=4, seed=0)[0]
    first = images[1, "alone"].view(np.uint32)
    assert [which for which, image in images.items() if (image.view(np.uint32) != first).any()] == []
    assert same_bits(open_model(path))


def test_an_export_says_whether_bits_hold(exported: dict[Precision, Path]) -> None:
    """Of bfloat16 it does not, as nobody runs that on a CPU."""
    said = {precision: open_model(path).spec.same_bits for precision, path in exported.items()}
    assert said == {"fp32": True, "fp16": True, "bf16": None}
    assert all(open_model(path).intact for path in exported.values())


class Wide(torch.nn.Module):  # type: ignore[misc]
    """Another's network, whose second product of attention is wider than tall."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 192, 3, padding=1)
        self.temb = torch.nn.Linear(8, 192)
        self.last = torch.nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, x: Any, temb: Any) -> Any:
        h = self.first(x) + self.temb(temb)[:, :, None, None]
        q, k, v = h.flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k / 8, dim=2)
        return self.last((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


def test_a_network_whose_bits_do_not_hold_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec, path = tiny_spec((1, 12, 12), timesteps=60, network=None), tmp_path / "m.onnx"
    export = export_onnx(Wide().eval(), spec, path)
    x = np.random.default_rng(0).standard_normal((8, 1, 12, 12), np.float32)
    temb, answers = spec.embedding.table(60)[:8], []
    for threads in (1, 8):
        network = OrtNetwork(open_model(path), threads=threads, max_batch=8)
        answers += [ask(network, x, temb), *(ask(network, x[i:][:1], temb[i:][:1]) for i in range(8))]
    whole, whole_too = answers[0], answers[9]
    alone, alone_too = np.concatenate(answers[1:9]), np.concatenate(answers[10:])
    differs = any((other != whole).any() for other in (whole_too, alone, alone_too))
    assert open_model(path).spec.same_bits is export.same_bits is not differs
