"""The TensorRT Denoiser over stand-ins for the GPU and the engine: whatever of it is not TensorRT or CUDA is real.

The engine's stand-in keeps TensorRT's rules (addresses and shapes are set before it runs, shapes are within the
profile, scratch memory is given) and computes by running the .onnx it would have been built of, at the addresses.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.engine.load import LoadedEngine
from ddpm_deploy.errors import ArtefactError, BackendError
from ddpm_deploy.runtime.network import Mirrored
from ddpm_deploy.runtime.ort import OrtDenoiser
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.runtime.trt import TrtNetwork
from tests.host_device import HostDevice

TRT: Any = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    DataType=SimpleNamespace(FLOAT="float", INT64="int64"),
)
SCRATCH = 1000


class Engine:
    """ICudaEngine and IExecutionContext, of an .onnx file."""

    num_io_tensors = 3
    device_memory_size_v2 = SCRATCH

    def __init__(self, onnx: Path, profiles: list[tuple[int, int, int]], device: HostDevice) -> None:
        spec = read_spec(onnx)
        self._device = device
        self.num_optimization_profiles = len(profiles)
        self._profiles = profiles
        self._shapes = {
            "x": spec.image_shape,
            "temb": (spec.embedding.dim,),
            "prediction": spec.prediction_shape,
        }
        self._network = OrtDenoiser(onnx)
        self._addresses: dict[str, int] = {}
        self._set: dict[str, tuple[int, ...]] = {}
        self.active_optimization_profile = 0
        self.scratch = (0, 0)
        self.ran: list[tuple[int, int]] = []
        self.refuses = ""

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "prediction" else "in"

    def get_tensor_dtype(self, name: str) -> str:
        return "int64" if name == "y" else "float"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return -1, *self._shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *self._shapes[name]) for size in self._profiles[profile]]

    def create_execution_context(self, strategy: str) -> "Engine":
        assert strategy == "user"
        return self

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return self.refuses != "address"

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == HostDevice.stream
        self.active_optimization_profile = profile
        self._set = {}  # as TensorRT forgets them
        return self.refuses != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._profiles[self.active_optimization_profile]
        self._set[name] = shape
        return low <= shape[0] <= high and shape[1:] == self._shapes[name] and self.refuses != "shape"

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        assert self.scratch[0]
        assert self.scratch[1] == SCRATCH
        (rows,) = {shape[0] for shape in self._set.values()}
        profile = self.active_optimization_profile
        self._device.start(lambda: self._compute(profile, rows))
        return self.refuses != "run"

    def _compute(self, profile: int, rows: int) -> None:
        self.ran.append((profile, rows))
        network, at = self._network, self._at
        for buffer, name in ((network.x, "x"), (network.temb, "temb")):
            buffer[:rows] = at(name, rows)
        network.run(rows)
        at("prediction", rows)[:] = network.prediction[:rows]

    def _at(self, name: str, rows: int) -> NDArray[np.float32]:
        shape = rows, *self._shapes[name]
        pointer = ctypes.cast(self._addresses[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape)


class Log:
    """What TensorRT said."""

    def reason(self, otherwise: str) -> str:
        return "it said so"


@pytest.fixture
def load(onnx_path: Path) -> Callable[..., tuple[TrtNetwork, Engine]]:
    def make(
        profiles: list[tuple[int, int, int]], max_batch: int | None = None, **changed: Any
    ) -> tuple[TrtNetwork, Engine]:
        device = HostDevice()
        engine: Any = Engine(onnx_path, profiles, device)
        engine.refuses = changed.pop("refuses", "")
        spec = msgspec.structs.replace(read_spec(onnx_path), **changed)
        log: Any = Log()
        loaded = LoadedEngine(Path("e.plan"), TRT, engine, log)
        return TrtNetwork(loaded, spec, device, max_batch), engine

    return make


@pytest.mark.parametrize(
    ("profiles", "ran"),
    [
        ([(1, 4, 4)], [(0, 4), (0, 1)]),
        ([(4, 4, 4)], [(0, 4)]),
        ([(1, 1, 1), (4, 4, 4)], [(1, 4), (0, 1)]),
        ([(4, 4, 4), (2, 2, 2)], [(0, 4), (1, 2)]),
    ],
)
def test_a_chain_is_that_of_onnx_runtime(
    load: Callable[..., tuple[TrtNetwork, Engine]],
    onnx_path: Path,
    profiles: list[tuple[int, int, int]],
    ran: list[tuple[int, int]],
) -> None:
    """Bit for bit, as the engine's stand-in is; padded, in buckets, or as it is; five images in a four and a one."""
    network, engine = load(profiles)
    denoiser = Mirrored(network)
    assert (denoiser.max_batch, denoiser.device) == (4, "host")
    wanted = Sampler(OrtDenoiser(onnx_path)).sample(5, steps=6, seed=3)
    with Sampler(denoiser) as sampler:
        for _ in range(2):
            np.testing.assert_array_equal(sampler.sample(5, steps=6, seed=3), wanted)
    assert list(dict.fromkeys(engine.ran)) == ran
    with pytest.raises(BackendError, match="is closed"):
        denoiser.run(1)
    denoiser.close()


def test_between_noise_and_images_there_is_the_device_alone(
    load: Callable[..., tuple[TrtNetwork, Engine]],
) -> None:
    """No allocation after load; no copy and no waiting between the start and the images."""
    network, _ = load([(1, 8, 8)], max_batch=3)
    device: Any = network.device
    sampler = Sampler(Mirrored(network))
    sampler.sample(3, steps=2, seed=0)
    device.calls.clear()
    sampler.sample(3, steps=50, seed=0)
    assert device.calls == (
        ["upload", "upload", "launch", "replay"]  # the table, the slots; x_T; what was captured before
        + ["replay"] * 49
        + ["download", "download", "synchronize"]
    )
    device.calls.clear()
    sampler.sample(2, steps=50, seed=0)
    assert device.calls == (
        ["upload", "launch", "launch"]  # the slots; x_T; the first step of a batch of two is not captured
        + ["capture", "synchronize", "launch", "replay"]
        + ["replay"] * 48
        + ["download", "download", "synchronize"]
    )


@pytest.mark.parametrize(
    ("refuses", "problem"),
    [("shape", "the shape .* of x"), ("run", "a batch of 2"), ("profile", "profile 1")],
)
def test_a_refusal_is_an_error(
    load: Callable[..., tuple[TrtNetwork, Engine]], refuses: str, problem: str
) -> None:
    """TensorRT says no by False."""
    network, _ = load([(1, 1, 1), (2, 2, 2)], refuses=refuses)
    with pytest.raises(BackendError, match=f"TensorRT refused {problem}: it said so"):
        network.enqueue(2)


def test_what_does_not_fit_is_refused(load: Callable[..., tuple[TrtNetwork, Engine]]) -> None:
    with pytest.raises(BackendError, match="refused the address of x"):
        load([(1, 1, 1)], refuses="address")
    with pytest.raises(ArtefactError, match=r"e\.plan does not fit its ModelSpec"):
        load([(1, 1, 1)], image_shape=(3, 8, 8))
    with pytest.raises(ArtefactError, match="does not fit its ModelSpec: .*'y'"):
        load([(1, 1, 1)], num_classes=2)


def test_too_little_memory_says_which_batch_would_fit(onnx_path: Path) -> None:
    device = HostDevice()
    device.left = SCRATCH + 4 * 8 * (3 * 64 + 8) - 1  # one byte short of a batch of 8
    engine: Any = Engine(onnx_path, [(1, 8, 8)], device)
    log: Any = Log()
    loaded = LoadedEngine(Path("e.plan"), TRT, engine, log)
    with pytest.raises(BackendError, match="batches of 8 need .* build the engine for --max-batch 7"):
        TrtNetwork(loaded, read_spec(onnx_path), device)
    device.left = 10
    with pytest.raises(BackendError, match="free some, or use a larger GPU"):
        TrtNetwork(loaded, read_spec(onnx_path), device)


def test_more_than_the_engines_batch_is_split(load: Callable[..., tuple[TrtNetwork, Engine]]) -> None:
    network, engine = load([(1, 2, 2)], max_batch=64)
    assert network.max_batch == 2
    Sampler(Mirrored(network)).sample(5, steps=2, seed=0)
    assert engine.ran == [(0, 2)] * 4 + [(0, 1)] * 2
