"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Sampler
from ddpm_deploy.gpu import visible_gpu
from ddpm_deploy.runtime.device import Cuda
from ddpm_deploy.runtime.device_chain import DeviceChain
from ddpm_deploy.runtime.parity import judge
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.spec import Precision
from tests.host_device import HostNetwork
from tests.models import ArrayDenoiser
from tests.test_chain import SPEC, TABLES, reference_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(visible_gpu() is None, reason="no NVIDIA GPU is visible")]


class SteppedNetwork(HostNetwork):
    """A Denoiser of the tests' between two copies: the kernel, the chain and the stream are the GPU's."""

    def enqueue(self, batch: int) -> None:
        names = ("x", "temb")
        for name in names:
            self.device.download(self.memory[name][:batch], getattr(self._denoiser, name)[:batch])
        self.device.synchronize()
        self._denoiser.run(batch)
        self.device.upload(self._denoiser.prediction[:batch], self.memory["prediction"][:batch])


class Uncaptured(Cuda):
    """A GPU whose work is started anew each time, as the network above cannot be captured."""

    def capture(self, work):  # type: ignore[no-untyped-def]
        return work


@pytest.mark.parametrize("name", TABLES)
def test_the_kernel_is_the_reference_bit_for_bit(name: str) -> None:
    chain = DeviceChain(SteppedNetwork(ArrayDenoiser(SPEC, 3), Uncaptured()))  # type: ignore[arg-type]
    chain.start(slice(0, 3), TABLES[name], np.full(3, 7, np.uint64), np.arange(5, 8, dtype=np.uint64))
    while chain.active.any():
        chain.step()
    for slot in range(3):
        np.testing.assert_array_equal(chain.x[slot], reference_images(TABLES[name], 7, 5 + slot))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_built_on_arrival_passes_its_proof(
    exported: dict[Precision, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Sampler.load(exported[precision], device="cuda") as sampler:
        assert judge(load_proof(proof_path(exported[precision])), sampler.denoiser).within
        images = sampler.sample(5, seed=0)
        np.testing.assert_array_equal(sampler.sample(5, seed=0), images)  # replayed, and the same bits
    with Sampler.load(exported["fp32"]) as host:
        assert abs(images - host.sample(5, seed=0)).max() < (1e-3 if precision == "fp32" else 0.1)
