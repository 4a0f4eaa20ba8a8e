"""Optional packages: pip lines that name no stranger's package, telemetry that is off, and messages of a length."""

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ddpm_deploy import dependencies
from ddpm_deploy.dependencies import pip_install, require
from ddpm_deploy.errors import DependencyError, SettingError, first_line, one_line

ROOT = Path(__file__).parent.parent
LONG = "it went wrong " * 40


def extras() -> list[str]:
    return metadata.metadata("ddpm-deploy").get_all("Provides-Extra") or []


@pytest.mark.parametrize("extra", extras())
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_pip_line_names_what_an_extra_brings_here(
    monkeypatch: pytest.MonkeyPatch, extra: str, platform: str
) -> None:
    """As packaging reads the same metadata, extras within extras and markers included."""
    monkeypatch.setattr(sys, "platform", platform)
    wanted = set()
    for line in metadata.requires("ddpm-deploy") or []:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker and marker.evaluate({"extra": extra, "sys_platform": platform}):
            wanted.add(str(requirement))
    got = shlex.split(pip_install(extra, "nothing"))
    assert got[:2] == ["pip", "install"]
    assert set(map(str, map(Requirement, got[2:]))) == wanted
    assert "torch<2.14,>=2.13" in wanted or extra not in ("train", "export")


def test_no_hint_names_this_package_as_if_it_were_published() -> None:
    for path in (ROOT / "ddpm_deploy").rglob("*.py"):
        source = path.read_text()
        assert "ddpm-deploy[" not in source, path
        assert "pip install ddpm-deploy" not in source, path
        assert "pip install -U ddpm-deploy" not in source, path


def test_a_source_tree_that_was_not_installed_names_the_missing_package() -> None:
    """Without site-packages there is no metadata."""
    code = "from ddpm_deploy.dependencies import require; require('{}', 'cpu')"
    for module, package in (("PIL.Image", "pillow"), ("onnxruntime", "onnxruntime")):
        environment = {"PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-S", "-c", code.format(module)]
        said = subprocess.run(run, capture_output=True, text=True, env=environment).stderr
        assert said.splitlines()[-1].endswith(f"{module} is not installed: pip install {package}"), said


def test_onnxruntime_is_not_installed_over_that_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here: set[str] = {"onnxruntime-gpu"}
    monkeypatch.setattr(dependencies, "is_installed", lambda name: name in here)
    assert pip_install("cpu", "PIL") == "pip install 'pillow>=11'"
    assert "'onnxruntime-gpu[cuda,cudnn]>=1.28'" in pip_install("gpu", "PIL")


def test_a_package_that_does_not_import_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loquacious.py").write_text(f"raise ImportError({LONG!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError) as caught:
        require("loquacious", "plot")
    assert str(caught.value).endswith(" …): pip install --force-reinstall 'matplotlib>=3.9'")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("short", [one_line, first_line])
def test_foreign_messages_are_cut_at_a_word(short: object) -> None:
    assert callable(short)
    cut = short(ValueError(LONG))
    assert 150 < len(cut) <= 202
    assert cut.endswith((" it …", " went …", " wrong …"))
    assert len(short(ValueError("x" * 1000))) <= 202
    assert short(ValueError(f"open {'/folder' * 100}")).startswith("open /folder/folder")
    assert short(ValueError("  short ")) == "short"
    assert short(ValueError()) == "ValueError"
    assert short(SettingError(LONG.strip())) == LONG.strip()
    assert [one_line(ValueError("a\nb")), first_line(ValueError("a\nb"))] == ["a b", "a"]


# --- what is written beside the outputs -----------------------------------------------------------------

RUN_ALL = """
import json, sys
from ddpm_deploy.cli import main
for command in json.loads(sys.argv[1]):
    assert not main([*command.split(), "-q"], standalone_mode=False), command
"""
WHOLE_WAY = [
    "train digits -o m.pt --steps 2 --batch-size 2 --sample-every 2",
    "export m.pt",
    "verify m.onnx --plot p.png",
    "run m.onnx --steps 2 --count 1",
    "replay m.onnx samples.png",
    "doctor",
]


def run_all(commands: list[str], outputs: Path, **folders: Path | str) -> subprocess.CompletedProcess[str]:
    """Some commands in a process of their own, whose user is somebody new."""
    outputs.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=outputs,
        env=environment | {name: str(path) for name, path in folders.items()},
    )


def test_nothing_is_written_but_outputs_and_the_caches_that_are_told(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for folder in folders.values():
        folder.mkdir()
    said = run_all(WHOLE_WAY, tmp_path / "outputs", **folders)
    assert (said.returncode, said.stderr) == (0, "")
    outputs = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert outputs == {"m.pt", "m.train", "m.onnx", "m.proof.npz", "p.png", "samples.png"}
    written = [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()]
    assert {path.parent for path in written} <= {folders["XDG_CACHE_HOME"] / "matplotlib"}
    assert "`matplotlib/`" in (ROOT / "SECURITY.md").read_text()


def test_a_home_that_cannot_be_written_is_no_matter(tmp_path: Path, onnx_path: Path) -> None:
    (tmp_path / "TMPDIR").mkdir()
    commands = [f"verify {onnx_path} --plot p.png", f"run {onnx_path} --steps 2 --count 1", "doctor"]
    said = run_all(commands, tmp_path / "outputs", HOME="/proc/nowhere", TMPDIR=tmp_path / "TMPDIR")
    assert (said.returncode, said.stderr) == (0, "")
    assert list((tmp_path / "TMPDIR").iterdir()) == []


def test_a_signal_amid_an_import_is_no_broken_package(tmp_path: Path) -> None:
    """Native code turns the KeyboardInterrupt of a signal into an ImportError."""
    (tmp_path / "native.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except KeyboardInterrupt as error:\n"
        "    raise ImportError('initialization failed') from error\n"
    )
    code = (
        "from ddpm_deploy.cli.common import Command; from ddpm_deploy.dependencies import require;"
        "Command('serve', callback=lambda: require('native', 'serve')).main([])"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (said.returncode, said.stderr) == (130, "Error: interrupted\n")


@pytest.mark.parametrize(("typed", "warnings"), [({}, 1), ({"ORT_DISABLE_TELEMETRY": "1"}, 0)])
def test_an_import_that_was_too_early_is_told_once(
    tmp_path: Path, onnx_path: Path, typed: dict[str, str], warnings: int
) -> None:
    code = (
        "import onnxruntime, sys; from ddpm_deploy import Sampler;"
        "[Sampler.load(sys.argv[1]).close() for _ in range(2)]"
    )
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **typed}
    command = [sys.executable, "-c", code, onnx_path]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert said.stderr.count("set ORT_DISABLE_TELEMETRY=1 before that import") == warnings
    assert len(said.stderr.splitlines()) == warnings
    assert bool([path for path in tmp_path.rglob("*") if path.is_file()]) == bool(warnings)
