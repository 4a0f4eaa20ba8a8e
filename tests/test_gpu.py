"""What only a GPU can show; skipped where there is none, and run over a pretended one too (test_pretended_cuda.py)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy import Sampler
from ddpm_deploy.dependencies import onnxruntime_has_cuda
from ddpm_deploy.gpu import visible_gpu
from ddpm_deploy.runtime.chain import Chain
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.network import allocate
from ddpm_deploy.runtime.parity import judge
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import Precision
from tests.models import ArrayNetwork
from tests.test_chain import LEARNED_SPEC, LEARNED_TABLES, SPEC, TABLES, reference_images

_GPU = visible_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_GPU is None, reason="no NVIDIA GPU is visible")]
nvidias_network = pytest.mark.skipif(
    _GPU is not None and _GPU.name == "a pretended GPU",
    reason="the pretended GPU runs no network of NVIDIA's",
)


class Echo(ArrayNetwork):
    """ε = x, without a backend; and, where the model learned its variance, v = x."""

    def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
        """x again."""
        return np.concatenate([x] * (self.spec.prediction_shape[0] // x.shape[1]), axis=1)


class EchoNetwork:
    """The same on the GPU, by copies there alone, which can be captured."""

    capturable = True

    def __init__(self, spec: ModelSpec, slots: int, index: int = 0) -> None:
        self.spec, self.device, self.max_batch = spec, Cuda(index), slots
        self.buckets = range(1, slots + 1)
        self.memory = allocate(self.device, spec, slots)

    def enqueue(self, bucket: int) -> None:
        x, prediction = self.memory["x"], self.memory["prediction"]
        channels = x.shape[1]
        for row in range(bucket):
            for first in range(0, prediction.shape[1], channels):
                self.device.copy(x[row], prediction[row, first : first + channels])

    def close(self) -> None:
        """Free the memory."""
        self.memory = {}
        self.device.release()


@pytest.mark.parametrize("name", [*TABLES, *LEARNED_TABLES])
def test_kernel_and_graph_are_the_reference_bit_for_bit(name: str) -> None:
    spec, table = (SPEC, TABLES[name]) if name in TABLES else (LEARNED_SPEC, LEARNED_TABLES[name])
    chain = Chain(EchoNetwork(spec, 3))
    chain.start(np.arange(3), Request(table=table, count=3, seed=7, first_index=5))
    while chain.active.any():
        chain.step()
    images = chain.images(np.arange(3))
    for slot in range(3):
        wanted = reference_images(table, 7, 5 + slot, Echo(spec, 1))
        np.testing.assert_array_equal(images[slot].view(np.uint32), wanted.view(np.uint32))


def test_previews_and_results_on_the_gpu() -> None:
    sampler, host = Sampler(EchoNetwork(SPEC, 4)), Sampler(Echo(SPEC, 4))
    seen: dict[str, list[Array]] = {"gpu": [], "host": []}
    for name, one in (("gpu", sampler), ("host", host)):
        one.sample(3, seed=0, callback=lambda step, x, x0, name=name: seen[name].append(x.copy()))
    np.testing.assert_array_equal(seen["gpu"], seen["host"])
    images = sampler.sample_on_device(3, seed=0)
    np.testing.assert_array_equal(images.get(), host.sample(3, seed=0))
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        assert torch.from_dlpack(images).data_ptr() == images.data.ptr


def test_two_samplers_in_two_threads() -> None:
    wanted = Sampler(Echo(SPEC, 4)).sample(4, seed=1)
    with ThreadPoolExecutor(2) as pool:
        samplers = [Sampler(EchoNetwork(SPEC, 4)) for _ in range(2)]
        for images in pool.map(lambda sampler: sampler.sample(4, seed=1), samplers):
            np.testing.assert_array_equal(images, wanted)


@nvidias_network
def test_onnx_runtime_on_the_gpu(onnx_path: Path) -> None:
    if not onnxruntime_has_cuda():
        pytest.skip("this ONNX Runtime has no CUDA")
    with Sampler.load(onnx_path, device="cuda", backend="onnxruntime", max_batch=4) as sampler:
        assert judge(load_proof(proof_path(onnx_path)), sampler.network).within
        images = sampler.sample(4, steps=50, seed=0)
    with Sampler.load(onnx_path) as host:
        assert abs(images - host.sample(4, steps=50, seed=0)).max() < 1e-3


@nvidias_network
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_built_on_arrival_passes_its_proof(
    exported: dict[Precision, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Sampler.load(exported[precision], device="cuda") as sampler:
        assert judge(load_proof(proof_path(exported[precision])), sampler.network).within
        images = sampler.sample(5, seed=0)
        np.testing.assert_array_equal(sampler.sample(5, seed=0), images)  # replayed, and the same bits
    with Sampler.load(exported["fp32"]) as host:
        assert abs(images - host.sample(5, seed=0)).max() < (1e-3 if precision == "fp32" else 0.1)
