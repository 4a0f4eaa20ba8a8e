"""A Sampler whose chain is a device's: step.cu over the stand-in for a GPU, with a real network in ONNX Runtime."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, OwnershipError, SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.parity import judge
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.runtime.sampler import Sampler
from tests.host_device import DeviceNetwork, HostDevice
from tests.models import ArrayNetwork, tiny_spec

ROOT = Path(__file__).parent.parent


def on_device(path: Path, max_batch: int = 4) -> Sampler:
    """ONNX Runtime's CPU provider, bound by pointers to memory of the stand-in's."""
    device: Any = HostDevice()
    return Sampler(OrtNetwork(open_model(path), device, max_batch=max_batch, provider="CPUExecutionProvider"))


def on_stand_in(network: ArrayNetwork) -> Sampler:
    """A network of the tests' beside the stand-in's memory."""
    return Sampler(DeviceNetwork(network, HostDevice()))  # type: ignore[arg-type]


@pytest.fixture
def samplers(onnx_path: Path) -> tuple[Sampler, Sampler]:
    return on_device(onnx_path), Sampler(OrtNetwork(open_model(onnx_path), max_batch=4))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "ddim", "eta": 0.5},
        {"solver": "dpmpp-2m"},
        {"first_index": 2**40, "spacing": "trailing"},
    ],
)
def test_a_sampler_draws_the_same_images(samplers: tuple[Sampler, Sampler], settings: dict[str, Any]) -> None:
    device, host = samplers
    for count in (3, 9):
        wanted = host.sample(count, steps=7, seed=5, **settings)
        np.testing.assert_array_equal(device.sample(count, steps=7, seed=5, **settings), wanted)


def test_the_full_chain_is_the_hosts(samplers: tuple[Sampler, Sampler]) -> None:
    device, host = samplers
    np.testing.assert_array_equal(device.sample(2, seed=1), host.sample(2, seed=1))


def test_previews_come_beside_the_chain(samplers: tuple[Sampler, Sampler]) -> None:
    """Each step's x and x̂0, bit for bit, while the next step has been started already."""
    device, _ = samplers
    seen: dict[str, list[tuple[int, Any, Any]]] = {"device": [], "host": []}
    for name, sampler in zip(seen, samplers, strict=True):
        sampler.sample(
            3,
            steps=6,
            seed=2,
            callback=lambda step, x, x0, name=name: seen[name].append((step, x.copy(), x0.copy())),
        )
    for (step, x, x0), (wanted, host_x, host_x0) in zip(seen["device"], seen["host"], strict=True):
        assert step == wanted
        np.testing.assert_array_equal(x, host_x)
        np.testing.assert_array_equal(x0, host_x0)
    calls = device.network.device.calls  # type: ignore[attr-defined]
    first = calls.index("wait")
    assert (
        "launch" in calls[calls.index("copy_out") : first]
    )  # the second step's, before the first is waited for


class Watch:
    """A callback that wants every third step."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.seen: list[tuple[int, float]] = []

    def wants(self, step: int) -> bool:
        self.asked.append(step)
        return step % 3 == 0

    def __call__(self, step: int, x: Any, x0: Any) -> None:
        self.seen.append((step, float(abs(x).sum() + abs(x0).sum())))


def test_steps_that_are_not_wanted_are_not_copied(samplers: tuple[Sampler, Sampler]) -> None:
    watches = [Watch(), Watch()]
    for sampler, watch in zip(samplers, watches, strict=True):
        sampler.sample(2, steps=8, seed=0, callback=watch)
    device, host = watches
    assert device.seen == host.seen
    assert [step for step, _ in host.seen] == [0, 3, 6]
    assert device.asked == host.asked == list(range(8))
    assert samplers[0].network.device.calls.count("copy_out") == 3  # type: ignore[attr-defined]


def test_two_samplers_in_two_threads(onnx_path: Path) -> None:
    """Each on a device of its own here, as on a stream of its own there."""
    wanted = Sampler(OrtNetwork(open_model(onnx_path))).sample(3, steps=5, seed=0)
    with ThreadPoolExecutor(2) as pool:
        samplers = [on_device(onnx_path) for _ in range(2)]
        for images in pool.map(lambda sampler: sampler.sample(3, steps=5, seed=0), samplers):
            np.testing.assert_array_equal(images, wanted)


def test_a_device_that_fails_leaves_the_sampler_free(samplers: tuple[Sampler, Sampler]) -> None:
    device, _ = samplers
    gpu = device.network.device  # type: ignore[attr-defined]

    def fails(host: Any, memory: Any) -> None:
        raise BackendError("the GPU failed: an illegal address")

    def break_it(step: int, x: Any, x0: Any) -> None:
        gpu.upload = fails
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(BackendError, match="an illegal address"):
            device.sample(2, steps=4, seed=0, callback=break_it)


def test_raising_in_a_callback_stops_a_device_too(samplers: tuple[Sampler, Sampler]) -> None:
    device, host = samplers

    def stop(step: int, x: Any, x0: Any) -> None:
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        device.sample(3, steps=6, seed=2, callback=stop)
    np.testing.assert_array_equal(device.sample(3, steps=6, seed=2), host.sample(3, steps=6, seed=2))


def test_a_stream_and_a_snapshot_cross_from_device_to_host_and_back(
    samplers: tuple[Sampler, Sampler],
) -> None:
    device, host = samplers
    wanted = host.sample(3, steps=8, seed=4)
    for one, other in ((device, host), (host, device)):
        stream = one.stream(3, steps=8, seed=4)
        for step, x, _ in stream:
            assert x.shape == (3, 1, 8, 8)
            if step == 3:
                snapshot = one.snapshot()
        np.testing.assert_array_equal(x, wanted)
        assert snapshot.step == 4
        np.testing.assert_array_equal(other.resume(snapshot), wanted)


def test_a_snapshot_in_a_callback_is_of_one_moment(samplers: tuple[Sampler, Sampler]) -> None:
    """On a device that is one step later, and goes on to the same images."""
    device, host = samplers
    taken: list[Any] = []
    wanted = device.sample(
        2,
        steps=8,
        seed=4,
        callback=lambda step, x, x0: taken.append(device.snapshot()) if step == 2 else None,
    )
    assert taken[0].step == 4
    np.testing.assert_array_equal(host.resume(taken[0]), wanted)


def test_noise_of_a_callers_own_runs_there_too(samplers: tuple[Sampler, Sampler]) -> None:
    device, host = samplers

    def noise(draw: int) -> Any:
        return np.random.default_rng(draw).standard_normal((3, 1, 8, 8)).astype(np.float32)

    wanted = host.sample(3, steps=5, noise=noise)
    np.testing.assert_array_equal(device.sample(3, steps=5, noise=noise), wanted)


def test_images_stay_on_the_device(samplers: tuple[Sampler, Sampler]) -> None:
    device, host = samplers
    images = device.sample_on_device(3, steps=5, seed=1)
    assert images.base is not None  # the chain's own memory
    np.testing.assert_array_equal(images, host.sample(3, steps=5, seed=1))
    calls = device.network.device.calls  # type: ignore[attr-defined]
    assert calls.count("fetch") == 1  # of what the slots say of themselves
    for sampler, arguments, problem in (
        (host, {}, "runs on cpu, and not on a GPU"),
        (device, {"count": 5}, "5 images are more than one batch: choose 1 to 4"),
    ):
        with pytest.raises(SettingError, match=problem):
            sampler.sample_on_device(**{"count": 3, "steps": 5, **arguments})


def test_parity_judges_a_device(onnx_path: Path) -> None:
    """By the chain that runs there; a batch below the proof's is held against as many of its images."""
    for max_batch in (4, 2):
        with on_device(onnx_path, max_batch) as sampler:
            comparison = judge(load_proof(proof_path(onnx_path)), sampler.network)
        assert comparison.within
        assert len(comparison.psnr) == max_batch


def test_numbers_that_are_not_finite_are_told(onnx_path: Path) -> None:
    class Broken(ArrayNetwork):
        def predict(self, batch: int) -> None:
            """Not a number."""
            self.memory["prediction"][:batch] = np.nan

    sampler = on_stand_in(Broken(tiny_spec(network=None), 2))
    with pytest.raises(BackendError, match="not finite, so the images are worthless"):
        sampler.sample(2, steps=3, seed=0)
    with pytest.raises(BackendError, match="not finite"):
        sampler.sample_on_device(2, steps=3, seed=0)


def test_labels_reach_the_device() -> None:
    class Labelled(ArrayNetwork):
        def predict(self, batch: int) -> None:
            """As ever, with the label added."""
            super().predict(batch)
            label = self.memory["y"][:batch, None, None, None].astype(np.float32)
            self.memory["prediction"][:batch] += label * np.float32(0.1)

    spec = msgspec.structs.replace(tiny_spec(network=None), num_classes=3, null_class=True)
    device, host = on_stand_in(Labelled(spec, 6)), Sampler(Labelled(spec, 6))
    for settings in ({"labels": [2, 0, 1]}, {}, {"guidance": 2.0}, {"labels": [2, 0, 1]}):
        wanted = host.sample(3, steps=5, seed=0, **settings)  # type: ignore[arg-type]
        np.testing.assert_array_equal(device.sample(3, steps=5, seed=0, **settings), wanted)  # type: ignore[arg-type]
        left = device.sample_on_device(3, steps=5, seed=0, **settings)  # type: ignore[arg-type]
        np.testing.assert_array_equal(left, wanted)


ZEROS = np.zeros((1, 1, 8, 8), np.float32), np.zeros((1, 8), np.float32)


def test_a_closed_model_is_told(onnx_path: Path) -> None:
    sampler = on_device(onnx_path)
    sampler.close()
    sampler.close()
    for call in (lambda: sampler.sample(1, steps=2), lambda: ask(sampler.network, *ZEROS)):
        with pytest.raises(BackendError, match="is closed: load it again"):
            call()


FORKED = """
import os, signal, sys
from ddpm_deploy import Sampler
from ddpm_deploy.errors import OwnershipError
path, threads, use = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sampler = Sampler.load(path, threads=threads)
sampler.sample(2, steps=2, seed=0)
stream = sampler.stream(2, steps=3, seed=0)
next(stream)
child = os.fork()
if not child:
    if use == "sample":
        try:
            sampler.sample(1, steps=2)
        except OwnershipError as error:
            print(error)
    if use == "read on":
        try:
            next(stream)
        except OwnershipError as error:
            print(error)
    if use == "close":
        sampler.close()
    if use == "let go":
        del sampler
    sys.exit(7)  # as an interpreter ends
signal.alarm(30)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert len(list(stream)) == 2  # the parent goes on
"""


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("use", ["sample", "read on", "close", "let go", "nothing"])
def test_a_fork_of_a_process_ends_whatever_it_does(onnx_path: Path, threads: int, use: str) -> None:
    """As gunicorn --preload forks one; a sampler that it inherits is refused in one line."""
    command = [sys.executable, "-c", FORKED, onnx_path, str(threads), use]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    assert ("was forked after the model was loaded" in result.stdout) == (use in ("sample", "read on"))


def test_a_forked_process_is_refused_on_a_device_too(onnx_path: Path) -> None:
    with on_device(onnx_path) as sampler:
        child = os.fork()
        if not child:
            try:
                sampler.sample(1, steps=2)
            except OwnershipError as error:
                os._exit(0 if "was forked after the model was loaded" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


LEFT_OPEN = """
import atexit, os, sys
from ddpm_deploy.runtime.sampler import Sampler
from tests.models import ArrayNetwork, tiny_spec

class Network(ArrayNetwork):
    def close(self):
        print("closed", self.name, os.getpid() == parent, flush=True)
        super().close()

def loaded(name):
    network = Network(tiny_spec(network=None), 2)
    network.name = name
    return Sampler(network)

parent = os.getpid()
kept, closed, dropped = loaded("kept"), loaded("closed"), loaded("dropped")
atexit.register(print, "the library's own exit", flush=True)  # as CuPy registers, imported by another backend
late = loaded("late")
closed.close()
del dropped
images = late.iter_samples(2, steps=2)
next(images)  # and still open
if not (child := os.fork()):
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("end", flush=True)
"""


def test_what_is_open_is_closed_at_the_end_of_the_process() -> None:
    """Once, before the backend's libraries end, in the process that loaded it, and not in its fork."""
    command = [sys.executable, "-c", LEFT_OPEN]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    start, end = said.index("closed closed True"), said.index("end")
    assert said[start + 1 : end] == ["the library's own exit"]  # of the fork
    assert sorted(said[end + 1 : -1]) == ["closed kept True", "closed late True"]
    assert said[-1] == "the library's own exit"


def test_onnx_runtime_that_falls_back_to_the_cpu_is_refused(onnx_path: Path) -> None:
    """It does so without a word."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(
        BackendError, match="cannot use its CUDAExecutionProvider here, and would run on the CPU"
    ):
        OrtNetwork(open_model(onnx_path), HostDevice())  # type: ignore[arg-type]


def test_what_onnx_runtime_prints_is_logged(
    onnx_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of a build for CUDA on a machine without its libraries: stdout is for results."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr("ddpm_deploy.runtime.backends.onnxruntime.onnxruntime_has_cuda", lambda: True)
    caplog.set_level("INFO")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(BackendError, match="cannot use"),
    ):
        OrtNetwork(open_model(onnx_path), HostDevice())  # type: ignore[arg-type]
    assert "ONNX Runtime: Failed to load libcu" in caplog.text
    assert capfd.readouterr().out == ""


def test_a_graph_that_does_not_fit_is_refused_on_a_device_too(onnx_path: Path, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(tiny_spec((3, 8, 8)))
    with pytest.raises(ArtefactError, match="does not fit its ModelSpec"):
        OrtNetwork(open_model(onnx_path, spec), HostDevice(), provider="CPUExecutionProvider")  # type: ignore[arg-type]


def test_cuda_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import fails as where it is not installed
    with pytest.raises(DependencyError, match=r"cupy is not installed: pip install .*'tensorrt-rtx>=1.3'"):
        Cuda(extra="rtx")
