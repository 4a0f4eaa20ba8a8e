"""The TensorRT network over stand-ins for the GPU and the engine: whatever of it is not TensorRT or CUDA is real.

The engine's stand-in keeps TensorRT's rules (addresses and shapes are set before it runs, shapes are within the
profile, scratch memory is given) and computes by running the .onnx it would have been built of, at the addresses.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy.engine.load import LoadedEngine
from ddpm_deploy.errors import ArtefactError, BackendError
from ddpm_deploy.gpu import Driver, Gpu
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import LoadSettings, tensorrt
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.backends.tensorrt import TrtNetwork
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from tests.host_device import HostDevice

TRT: Any = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    DataType=SimpleNamespace(FLOAT="float", INT64="int64"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
)
SCRATCH = 1000
PLAN: Any = SimpleNamespace(name="e.plan")
ZEROS = np.zeros((1, 1, 8, 8), np.float32), np.zeros((1, 8), np.float32)


class Engine:
    """ICudaEngine, of an .onnx file."""

    num_io_tensors = 3

    def __init__(self, onnx: Path, profiles: list[tuple[int, int, int]], device: HostDevice) -> None:
        spec = open_model(onnx).spec
        self.device = device
        self.num_optimization_profiles = len(profiles)
        self.profiles = profiles
        self.shapes = {
            "x": spec.image_shape,
            "temb": (spec.embedding.dim,),
            "prediction": spec.prediction_shape,
        }
        self.network = OrtNetwork(open_model(onnx))
        self.ran: list[tuple[int, int]] = []
        self.refuses = ""
        self.config: Config | None = None
        self.log = Log()

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "prediction" else "in"

    def get_tensor_dtype(self, name: str) -> str:
        return "int64" if name == "y" else "float"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return -1, *self.shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *self.shapes[name]) for size in self.profiles[profile]]

    def create_runtime_config(self) -> "Config":
        return Config()

    def create_execution_context(self, config: "Config") -> "Context":
        self.config = config
        assert config.strategy == "user"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        return Context(self)


class Config:
    """IRuntimeConfig."""

    strategy = ""
    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class RtxConfig(Config):
    """IRuntimeConfig of TensorRT-RTX."""

    cache: "Cache | None" = None

    def create_runtime_cache(self) -> "Cache":
        return Cache()

    def set_runtime_cache(self, cache: "Cache") -> bool:
        self.cache = cache
        return True


class Cache:
    """IRuntimeCache: the sizes whose kernels are compiled. It takes nothing but what it wrote."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self.compilations = 0

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"sizes "):
            return False
        self.sizes = {int(size) for size in blob.split()[1:]}
        return True

    def serialize(self) -> bytes:
        return b"sizes " + b" ".join(b"%d" % size for size in sorted(self.sizes))

    def compile(self, rows: int) -> None:
        self.compilations += rows not in self.sizes
        self.sizes.add(rows)


class Context:
    """IExecutionContext. What is set while work is captured, or after it was captured, is an error."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._set: dict[str, tuple[int, ...]] = {}
        self._profile = -1
        self._scratch = (0, 0)
        self._ran = False

    def _setting(self) -> None:
        assert self._engine.device._recording is None
        assert not self._ran, "what was captured before would be stale"

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._setting()
        assert stream == HostDevice.stream
        self._profile, self._set = profile, {}
        return self._engine.refuses != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._setting()
        low, _, high = self._engine.profiles[self._profile]
        self._set[name] = shape
        fits = low <= shape[0] <= high and shape[1:] == self._engine.shapes[name]
        return fits and self._engine.refuses != "shape"

    def update_device_memory_size_for_shapes(self) -> int:
        assert self._set.keys() == self._engine.shapes.keys() - {"prediction"}
        (rows,) = {shape[0] for shape in self._set.values()}
        if self._engine.refuses == "scratch" and rows == 1:
            self._engine.log.errors.append("it said so")
            return 0
        return SCRATCH * rows

    def set_device_memory(self, address: int, size: int) -> None:
        self._setting()
        self._scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._setting()
        self._addresses[name] = address
        return self._engine.refuses != "address"

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.refuses != "capture"

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        assert self._engine.device._recording is None or self._ran, "it runs once before it is captured"
        (rows,) = {shape[0] for shape in self._set.values()}
        assert self._scratch[0]
        assert self._scratch[1] >= SCRATCH * rows
        self._ran = True
        self._engine.device.start(lambda: self._compute(rows))
        return self._engine.refuses != "run"

    def _compute(self, rows: int) -> None:
        if isinstance(self._engine.config, RtxConfig) and self._engine.config.cache:
            self._engine.config.cache.compile(rows)
        self._engine.ran.append((self._profile, rows))
        inputs = self._at("x", rows), self._at("temb", rows)
        self._at("prediction", rows)[:] = ask(self._engine.network, *inputs)

    def _at(self, name: str, rows: int) -> NDArray[np.float32]:
        shape = rows, *self._engine.shapes[name]
        pointer = ctypes.cast(self._addresses[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape)


class Log:
    """What TensorRT said."""

    def __init__(self) -> None:
        self.errors: list[str] = []

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
        spec = msgspec.structs.replace(open_model(onnx_path).spec, **changed)
        loaded = LoadedEngine(PLAN, TRT, engine, engine.log)
        return TrtNetwork(loaded, spec, device, max_batch), engine

    return make


@pytest.mark.parametrize(
    ("profiles", "max_batch", "buckets", "ran"),
    [
        ([(1, 4, 4)], None, [(0, 1), (0, 2), (0, 4)], [(0, 4), (0, 1)]),
        ([(1, 6, 6)], None, [(0, 1), (0, 2), (0, 4), (0, 6)], [(0, 6)]),
        ([(4, 4, 4)], None, [(0, 4)], [(0, 4)]),
        ([(1, 1, 1), (4, 4, 4)], None, [(0, 1), (1, 4)], [(1, 4), (0, 1)]),
        ([(4, 4, 4), (2, 2, 2)], None, [(1, 2), (0, 4)], [(0, 4), (1, 2)]),
        ([(1, 1, 1), (8, 8, 8), (64, 64, 64)], 5, [(0, 1), (1, 8)], [(1, 8)]),
        ([(1, 8, 64)], 3, [(0, 1), (0, 2), (0, 3)], [(0, 3), (0, 2)]),
    ],
)
def test_a_chain_is_that_of_onnx_runtime(
    load: Callable[..., tuple[TrtNetwork, Engine]],
    onnx_path: Path,
    profiles: list[tuple[int, int, int]],
    max_batch: int | None,
    buckets: list[tuple[int, int]],
    ran: list[tuple[int, int]],
) -> None:
    """Bit for bit, as the engine's stand-in is; padded, in buckets, or as it is; five images, split where they must."""
    network, engine = load(profiles, max_batch)
    wanted = Sampler(OrtNetwork(open_model(onnx_path))).sample(5, steps=6, seed=3)
    with Sampler(network) as sampler:
        assert list(dict.fromkeys(engine.ran)) == buckets  # each run once when it is loaded
        for _ in range(2):
            engine.ran.clear()
            np.testing.assert_array_equal(sampler.sample(5, steps=6, seed=3), wanted)
            assert list(dict.fromkeys(engine.ran)) == ran
            ask(network, *ZEROS)  # between two chains
    for call in (
        lambda: network.enqueue(1),
        lambda: ask(network, *ZEROS),
        lambda: sampler.sample(1, steps=1),
    ):
        with pytest.raises(BackendError, match="is closed"):
            call()
    network.close()


def test_between_noise_and_images_there_is_the_device_alone(
    load: Callable[..., tuple[TrtNetwork, Engine]],
) -> None:
    """No allocation, no capture, no copy and no waiting between the start and the images, whatever the batch."""
    network, _ = load([(1, 8, 8)], max_batch=4)
    device: Any = network.device
    sampler = Sampler(network)
    sampler.sample(3, steps=50, seed=0)
    for count in (4, 2, 4, 1):
        device.calls.clear()
        sampler.sample(count, steps=50, seed=0)
        between = [call for call in device.calls if call != "mark"]  # which an event is
        assert between == ["upload", "launch", *["replay"] * 50, "fetch", "fetch"]


def test_the_queue_is_bounded(load: Callable[..., tuple[TrtNetwork, Engine]]) -> None:
    """The host is at most a quarter of a second ahead of the device, and does not let it idle."""
    network, engine = load([(1, 1, 1)])
    device: Any = network.device
    behind: list[int] = []
    with Sampler(network) as sampler:
        chain: Any = sampler._chain
        engine.ran.clear()
        chain.start(np.array([0]), Request(seed=0))
        for step in range(50):
            device.start(lambda: time.sleep(0.01))
            chain.step()
            behind.append(step + 1 - len(engine.ran))
        assert device._pending
        chain.clear()
    assert 4 < max(behind) <= 25


@pytest.mark.parametrize(
    ("refuses", "problem"),
    [
        ("shape", "the shape .* of x"),
        ("run", "a batch of 1"),
        ("profile", "profile 0"),
        ("address", "the address of x"),
        ("scratch", "to say how much scratch memory it needs"),
    ],
)
def test_a_refusal_is_an_error(
    load: Callable[..., tuple[TrtNetwork, Engine]], refuses: str, problem: str
) -> None:
    """TensorRT says no by False."""
    with pytest.raises(BackendError, match=f"TensorRT refused {problem}: it said so"):
        Sampler(load([(1, 1, 1), (2, 2, 2)], refuses=refuses)[0])


def test_what_cannot_be_captured_is_started_anew(
    load: Callable[..., tuple[TrtNetwork, Engine]], onnx_path: Path
) -> None:
    network, _ = load([(1, 2, 2)], refuses="capture")
    device: Any = network.device
    wanted = Sampler(OrtNetwork(open_model(onnx_path))).sample(2, steps=3, seed=0)
    np.testing.assert_array_equal(Sampler(network).sample(2, steps=3, seed=0), wanted)
    assert not {"capture", "replay"} & set(device.calls)


def test_what_does_not_fit_is_refused(load: Callable[..., tuple[TrtNetwork, Engine]]) -> None:
    with pytest.raises(ArtefactError, match=r"e\.plan does not fit its ModelSpec"):
        load([(1, 1, 1)], image_shape=(3, 8, 8))
    with pytest.raises(ArtefactError, match="does not fit its ModelSpec: .*'y'"):
        load([(1, 1, 1)], num_classes=2)


def test_too_little_memory_says_which_batch_would_fit(onnx_path: Path) -> None:
    device = HostDevice()
    device.left = 8 * (SCRATCH + 4 * (2 * 64 + 8)) - 1  # one byte short of a batch of 8
    engine: Any = Engine(onnx_path, [(1, 8, 8)], device)
    log: Any = Log()
    loaded = LoadedEngine(PLAN, TRT, engine, log)
    with pytest.raises(BackendError, match="batches of 8 need .* left: load it with max_batch 7"):
        TrtNetwork(loaded, open_model(onnx_path).spec, device)
    TrtNetwork(loaded, open_model(onnx_path).spec, device, max_batch=7)
    device.left = 10
    with pytest.raises(BackendError, match="free some, or use a larger GPU"):
        TrtNetwork(loaded, open_model(onnx_path).spec, device)


class RtxEngine(Engine):
    """ICudaEngine of TensorRT-RTX, which compiles on the GPU."""

    def create_runtime_config(self) -> Config:
        return RtxConfig()


def compilations(onnx_path: Path, kernels: Path, max_batch: int = 4) -> int:
    """How many sizes were compiled to load a network, and to sample."""
    device, log = HostDevice(), Log()
    engine: Any = RtxEngine(onnx_path, [(1, 8, 8)], device)
    loaded = LoadedEngine(PLAN, TRT, engine, log)  # type: ignore[arg-type]
    network = TrtNetwork(loaded, open_model(onnx_path).spec, device, max_batch, kernels)  # type: ignore[arg-type]
    compiled: int = engine.config.cache.compilations
    with Sampler(network) as sampler:
        sampler.sample(3, steps=2, seed=0)
    assert engine.config.cache.compilations == compiled  # nothing is left to be compiled in a chain
    return compiled


def test_what_was_compiled_is_kept_for_the_next_process(
    onnx_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, in a folder of one's own; a larger batch adds to it; what does not fit is made anew, and that is said."""
    kernels = tmp_path / "kernels" / "x.kernels"
    assert [compilations(onnx_path, kernels) for _ in range(2)] == [3, 0]
    written = kernels.stat().st_mtime_ns
    assert compilations(onnx_path, kernels, 2) == 0
    assert kernels.stat().st_mtime_ns == written
    assert [compilations(onnx_path, kernels, 8) for _ in range(2)] == [1, 0]
    assert (kernels.parent.stat().st_mode & 0o777, kernels.stat().st_mode & 0o777) == (0o700, 0o600)
    assert [path.name for path in kernels.parent.iterdir()] == ["x.kernels"]
    assert caplog.text == ""
    kernels.write_bytes(b"of another driver")
    assert compilations(onnx_path, kernels) == 3
    assert "the kept kernels are not used, and are compiled again: it said so" in caplog.text
    assert compilations(onnx_path, kernels) == 0


def test_kernels_that_others_may_have_written_are_not_run(
    onnx_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And none are kept where they may write, or nothing can be; it runs all the same."""
    kernels = tmp_path / "kernels" / "x.kernels"
    compilations(onnx_path, kernels)
    kernels.parent.chmod(0o777)
    assert [compilations(onnx_path, kernels) for _ in range(2)] == [3, 3]
    assert "the kept kernels are not used, and are compiled again: others may write to" in caplog.text
    assert "the compiled kernels were not kept: others may write to" in caplog.text
    (tmp_path / "file").touch()
    assert compilations(onnx_path, tmp_path / "file" / "x.kernels") == 3


class SecondGpu(HostDevice):
    """A device that knows whether it is the thread's own."""

    index = 1
    depth = 0

    @contextmanager
    def here(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class Placed:
    """An object of TensorRT's, which is touched and freed only while its device is the thread's."""

    misplaced: ClassVar[list[str]] = []

    def __init__(self, inner: Any, device: SecondGpu, of: object = None) -> None:
        vars(self).update(_inner=inner, _device=device, _of=of)  # what made it lives as long

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not self._device.depth:
            self.misplaced.append(name)
        return self._called(found) if callable(found) else found

    def _called(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            plain = [vars(each)["_inner"] if isinstance(each, Placed) else each for each in arguments]
            result = method(*plain)
            return Placed(result, self._device, self) if isinstance(result, Config | Context) else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __del__(self) -> None:
        if not self._device.depth:
            self.misplaced.append(f"the end of {type(self._inner).__name__}")


def test_tensorrt_works_on_the_networks_own_device(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From loading to freeing, on the GPU that was asked for, whatever the thread's own is."""
    device = SecondGpu()
    spec = open_model(onnx_path).spec
    asked: list[int] = []

    def load_engine(plan: Any, index: int, here: Callable[[], Any]) -> LoadedEngine:
        asked.append(index)
        with here():
            engine = Engine(onnx_path, [(1, 4, 4)], device)
            return LoadedEngine(plan, trt, Placed(engine, device), engine.log)  # type: ignore[arg-type]

    trt = SimpleNamespace(**vars(TRT), __version__="11.4.0")
    two = Driver("580.65", "13.0", (Gpu("A10", "8.6", 1), Gpu("RTX 5090", "12.0", 1)))
    monkeypatch.setattr(tensorrt, "Cuda", lambda index, extra: asked.append(index) or device)
    monkeypatch.setattr(tensorrt, "load_engine", load_engine)
    monkeypatch.setattr("ddpm_deploy.engine.cache.driver", lambda: two)
    head = SimpleNamespace(flavour="tensorrt")
    plan: Any = SimpleNamespace(kind="plan", name="e.plan", spec=spec, digest="0" * 64, head=head)
    network = TrtNetwork.open(plan, LoadSettings(device="cuda:1"))
    with Sampler(network) as sampler:
        sampler.sample(3, steps=2, seed=0)
    assert asked == [1, 1]
    assert Placed.misplaced == []
