"""Build on arrival: one engine for the machine, whoever asks and however often."""

import fcntl
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_deploy import gpu
from ddpm_deploy.engine import bindings, build, cache
from ddpm_deploy.engine.build import EngineSettings, engine_spec
from ddpm_deploy.engine.cache import built_on_arrival, cache_folder, settings_here, with_timing_cache
from ddpm_deploy.errors import ArtefactError, BackendError, OutputError
from ddpm_deploy.gpu import Driver, Gpu
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.plan import digest_path, trusted
from ddpm_deploy.words import Precision

pytest.importorskip("tensorrt_rtx")

RTX = EngineSettings(flavour="tensorrt-rtx", batches=((1, 2, 2),))
ARRIVE = """
import logging, sys
from ddpm_deploy.engine.build import EngineSettings
from ddpm_deploy.engine.cache import built_on_arrival
from ddpm_deploy.model_file import open_model
logging.basicConfig(level=logging.INFO, format="%(message)s")
print(built_on_arrival(open_model(sys.argv[1]), EngineSettings(flavour="tensorrt-rtx"), lambda plan: plan.path))
"""


def same(plan: ModelFile) -> Path:
    """A loader that does the first thing that one does."""
    trusted(plan.path)
    return plan.path


def test_an_engine_is_built_once_and_said_so(
    exported: dict[Precision, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    assert "is kept for this machine: one is built, once, as" in caplog.text
    assert open_model(first).spec.engine
    written = first.stat().st_mtime_ns
    caplog.clear()
    assert built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path) == first
    assert (first.stat().st_mtime_ns, caplog.text) == (written, "")


def test_what_an_engine_depends_on_is_in_its_name(exported: dict[Precision, Path], tmp_path: Path) -> None:
    others = [
        (exported["fp32"], RTX),
        (exported["fp16"], RTX),
        (exported["fp16"], EngineSettings(flavour="tensorrt-rtx", batches=((1, 1, 2),))),
        (
            exported["fp16"],
            EngineSettings(flavour="tensorrt-rtx", batches=((1, 2, 2),), capabilities=("8.6",)),
        ),
        (exported["fp16"], EngineSettings(flavour="tensorrt-rtx", batches=((1, 2, 2),), level=2)),
        (exported["fp32"], EngineSettings(flavour="tensorrt-rtx", batches=((1, 2, 2),), tf32=True)),
    ]
    assert len(
        {built_on_arrival(open_model(each[0]), each[1], same, folder=tmp_path) for each in others}
    ) == len(others)


def test_the_machine_is_in_its_name(exported: dict[Precision, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU, driver, CUDA, and the versions of TensorRT and of ours: names of machines, of which none is here."""
    machines = [
        Driver(),
        Driver("580", "13.0", (Gpu("A10", "8.6", 1),)),
        Driver("590", "13.0", (Gpu("A10", "8.6", 1),)),
        Driver("580", "13.1", (Gpu("A10", "8.6", 1),)),
        Driver("580", "13.0", (Gpu("A100", "8.0", 1),)),
    ]
    keys = []
    for machine in machines:
        monkeypatch.setattr(cache, "driver", lambda machine=machine: machine)
        keys.append(cache._key(open_model(exported["fp16"]), RTX))
    for version in ("tensorrt_rtx.__version__", "ddpm_deploy.engine.cache.__version__"):
        monkeypatch.setattr(version, "1.8.0")
        keys.append(cache._key(open_model(exported["fp16"]), RTX))
    assert len(set(keys)) == len(machines) + 2


TWO = Driver("580", "13.0", (Gpu("A10", "8.6", 1), Gpu("RTX 5090", "12.0", 1)))


@pytest.mark.parametrize(
    ("max_batch", "profiles"),
    [
        (None, ((1, 1, 1), (2, 8, 8), (9, 64, 64))),
        (100, ((1, 1, 1), (2, 8, 8), (9, 100, 100))),
        (64, ((1, 1, 1), (2, 8, 8), (9, 64, 64))),
    ],
)
def test_an_engine_on_arrival_is_tuned_for_one_a_middle_and_the_largest(
    exported: dict[Precision, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_batch: int | None,
    profiles: tuple[tuple[int, int, int], ...],
) -> None:
    """And takes every batch between, in the engine that is built; of the GPU that it is for."""
    for module in (gpu, bindings):
        monkeypatch.setattr(module, "driver", lambda: TWO)
    how = settings_here(open_model(exported["fp16"]).spec, max_batch, 1)
    assert (how.flavour, how.batches, how.capabilities, how.gpu) == ("tensorrt-rtx", profiles, ("12.0",), 1)
    monkeypatch.setattr(gpu, "driver", Driver)  # nothing is loaded on it
    built = open_model(built_on_arrival(open_model(exported["fp16"]), how, same, folder=tmp_path)).spec.engine
    assert built
    assert (built.batches, built.capabilities) == (profiles, ("12.0",))


def test_a_small_batch_has_as_many_profiles_as_it_has_sizes(
    exported: dict[Precision, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gpu, bindings):
        monkeypatch.setattr(module, "driver", lambda: TWO)
    monkeypatch.setattr(cache, "default_engine_batch", lambda spec: 1)
    wanted = {1: ((1, 1, 1),), 2: ((1, 1, 1), (2, 2, 2)), 4: ((1, 1, 1), (2, 2, 2), (3, 4, 4))}
    for largest, profiles in wanted.items():
        assert settings_here(open_model(exported["fp16"]).spec, largest, 0).batches == profiles


def test_an_engine_is_of_the_gpu_that_was_asked_for(
    exported: dict[Precision, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its spec, its name in the cache, and its timing cache; and two GPUs of a kind share one."""
    onnx = open_model(exported["fp16"])
    for module in (gpu, bindings, cache, build):
        monkeypatch.setattr(module, "driver", lambda: TWO)
    specs = [engine_spec(onnx.spec, EngineSettings(gpu=index), "11.4.0").engine for index in range(2)]
    assert [(spec.gpu, spec.capabilities) for spec in specs if spec] == [
        ("A10", ("8.6",)),
        ("RTX 5090", ("12.0",)),
    ]
    assert cache._key(onnx, RTX) != cache._key(onnx, replace(RTX, gpu=1))
    with pytest.raises(BackendError, match="no NVIDIA GPU has the number 2"):
        settings_here(onnx.spec, None, 2)
    monkeypatch.setattr(cache, "driver", lambda: Driver("580", "13.0", (TWO.gpus[0], TWO.gpus[0])))
    assert cache._key(onnx, RTX) == cache._key(onnx, replace(RTX, gpu=1))


def test_an_engine_that_cannot_be_used_is_built_again_loudly(
    exported: dict[Precision, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    assert "the cached engine cannot be used, and is built again: " in caplog.text
    trusted(plan)  # whole; a second build may be some bytes longer
    digest_path(plan).unlink()
    caplog.clear()
    built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    assert "is missing: an engine is native code" in caplog.text


def test_what_building_again_cannot_mend_is_not_built_again(
    exported: dict[Precision, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No memory left, say; and an engine that was just built is not built again and again."""
    written = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path).stat().st_mtime_ns

    def full(plan: ModelFile) -> Path:
        raise BackendError("the GPU has no memory left")

    def refused(plan: ModelFile) -> Path:
        raise ArtefactError("never")

    with pytest.raises(BackendError, match="no memory left"):
        built_on_arrival(open_model(exported["fp16"]), RTX, full, folder=tmp_path)
    (plan,) = tmp_path.glob("*.plan")
    assert plan.stat().st_mtime_ns == written
    caplog.set_level(logging.INFO)
    caplog.clear()
    with pytest.raises(ArtefactError, match="never"):
        built_on_arrival(open_model(exported["fp16"]), RTX, refused, folder=tmp_path)
    assert caplog.text.count("one is built, once") == 1


def test_loading_does_not_wait_for_others(exported: dict[Precision, Path], tmp_path: Path) -> None:
    """Nor write anything: a cache that is filled may be read-only, and its lock be held."""
    plan = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    with plan.with_suffix(".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path) == plan
    plan.with_suffix(".lock").unlink()
    assert built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path) == plan
    assert not plan.with_suffix(".lock").exists()


def test_a_cache_that_others_may_write_to(exported: dict[Precision, Path], tmp_path: Path) -> None:
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(OutputError, match="others may write to .* chmod go-w"):
        built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=open_to_all)
    built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "planted", ["open folder", "open file", "link", "another's folder", "another's file"]
)
def test_what_others_may_have_planted_is_not_loaded(
    exported: dict[Precision, Path], tmp_path: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with its digest right, in the place where it is looked for: loading it would run it."""
    folder = tmp_path / "cache"
    plan = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=folder)
    if planted == "open folder":
        folder.chmod(0o770)
    elif planted == "open file":
        plan.chmod(0o664)
    elif planted == "link":
        plan.rename(tmp_path / "elsewhere.plan")
        plan.symlink_to(tmp_path / "elsewhere.plan")
    elif os.getuid():
        pytest.skip("files are given to others by root alone")
    else:
        os.chown(folder if planted == "another's folder" else plan, 1234, -1)
    loaded: list[Path] = []
    with pytest.raises(OutputError, match="what is in it is run|may be somebody else's: remove it"):
        built_on_arrival(open_model(exported["fp16"]), RTX, loaded.append, folder=folder)
    assert loaded == []


def test_ones_own_engine_is_loaded_again_whatever_the_umask(
    exported: dict[Precision, Path], tmp_path: Path
) -> None:
    before = os.umask(0o002)
    try:
        plan = built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path / "cache")
        assert built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path / "cache") == plan
    finally:
        os.umask(before)


def test_two_processes_build_it_once(exported: dict[Precision, Path], tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ARRIVE, exported["fp16"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert sum("one is built, once" in err for _, err in answers) == 1
    (plan,) = tmp_path.rglob("*.plan")
    assert str(plan) in answers[0][0]


def test_a_cache_that_cannot_be_written(exported: dict[Precision, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the cache of engines .* cannot be used: .*XDG_CACHE_HOME"):
        built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path / "file" / "engines")


def test_no_space_for_the_cache(exported: dict[Precision, Path], tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            OutputError, match=r"\.plan cannot be written: .*XDG_CACHE_HOME names another place"
        ):
            built_on_arrival(open_model(exported["fp16"]), RTX, same, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.plan*"))


def test_what_cannot_be_built_is_not_kept(exported: dict[Precision, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(exported["fp16"].read_bytes()[:5000])
    with pytest.raises(ArtefactError, match="not a whole .onnx"):
        built_on_arrival(open_model(cut), RTX, same, folder=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.plan"))


def test_where_the_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ddpm-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ddpm-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert cache_folder() == tmp_path / ".cache" / "ddpm-deploy"
    assert with_timing_cache(RTX) == RTX
