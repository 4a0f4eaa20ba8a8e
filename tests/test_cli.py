"""The command lines, in process and as processes: what they print, write and refuse."""

import csv
import dataclasses
import importlib
import inspect
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Unpack, get_args, get_type_hints

import click
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.cli.bodies import models, verify
from ddpm_deploy.cli.bodies.chain import ChainOptions, Watch, checked_outputs
from ddpm_deploy.cli.bodies.models import Place, open_network
from ddpm_deploy.cli.bodies.outputs import require_same_model
from ddpm_deploy.cli.common import Command
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.runtime.snapshot import Snapshot
from ddpm_deploy.spec import ChainSettings
from ddpm_deploy.version import __version__

BIN = Path(sys.executable).parent


def call(*arguments: object) -> Result:
    return CliRunner().invoke(ddpm_deploy, [str(a) for a in arguments])


def refused(result: Result, code: int, *parts: str) -> None:
    """One line on stderr, nothing on stdout, no traceback, the right exit code."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0]


# --- the happy paths ------------------------------------------------------------------------------------


COMMANDS = [
    "train",
    "export",
    "verify",
    "run",
    "serve",
    "resume",
    "merge",
    "check",
    "replay",
    "evaluate",
    "inspect",
    "doctor",
    "bench",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_and_version(command: str) -> None:
    for flag in ("--help", "-h"):
        result = call(*filter(None, [command, flag]))
        assert result.exit_code == 0
        assert "Usage" in result.stdout
    assert "Examples:" in result.stdout or not command
    assert __version__ in call(*filter(None, [command, "--version"])).stdout


def test_help_says_defaults_and_ranges_in_words() -> None:
    words = " ".join(call("run", "--help").stdout.split())
    assert (
        "--threads INTEGER CPU threads to use. [default: OMP_NUM_THREADS, or the cores it may use]" in words
    )
    assert "--eta FLOAT Amount of noise that ddim adds at each step. [default: 0; 0 to 1]" in words
    assert "[default: the preset's; above 0 to 1]" in " ".join(call("train", "--help").stdout.split())


def test_help_is_quick_without_numpy() -> None:
    code = (
        "import sys; from ddpm_deploy.cli import main\n"
        f"for command in {COMMANDS}: main([command, '--help'], standalone_mode=False)\n"
        "print([name for name in ('numpy', 'msgspec', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_body_takes_the_options_that_are_declared(name: str) -> None:
    command = importlib.import_module(f"ddpm_deploy.cli.{name}").main
    assert isinstance(command, Command)
    body = getattr(importlib.import_module(f"ddpm_deploy.cli.bodies.{name}"), name)
    taken = set()
    for parameter in inspect.signature(body).parameters.values():
        of_group = parameter.kind == inspect.Parameter.VAR_KEYWORD  # **options: Unpack[a TypedDict]
        taken |= set(get_type_hints(get_args(parameter.annotation)[0])) if of_group else {parameter.name}
    declared = {parameter.name for parameter in command.params if parameter.expose_value}
    # The flags of the dialects, each an option of its own, come together.
    assert taken - {"told"} == declared
    assert ("told" in taken) == (name == "export")


def test_train_export_verify_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way on one's own PNGs, by the words that each command prints for the next."""
    monkeypatch.setattr("ddpm_deploy.train.pictures.LONGEST", math.inf)  # however busy the machine is
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"photo {i}.png")
    model = tmp_path / "m.pt"
    size = ("--preset", "digits", "--channels", "rgb", "--image-size", 8)
    trained = call(
        "train", tmp_path / "photos", "-o", model, *size, "--steps", 6, "--batch-size", 4, "--sample-every", 3
    )
    assert trained.exit_code == 0, trained.output
    assert f"next: ddpm-export {model}" in trained.stdout
    with (tmp_path / "m.train" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[0]["loss"]) > 0
    assert sorted(p.name for p in (tmp_path / "m.train").glob("*.png")) == [
        "samples-000003.png",
        "samples-000006.png",
    ]

    resumed = call("train", "--resume", model, "--steps", 8, "--sample-every", 0)
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(call("inspect", model, "--json").stdout)["provenance"]["step"] == 8

    exported = call("export", model)
    assert exported.exit_code == 0, exported.output
    onnx = tmp_path / "m.onnx"
    assert f"ddpm-verify {model} {onnx}" in exported.stdout
    assert f"ddpm-run {onnx} --steps 1000" in exported.stdout
    assert "an image has the same bits alone and in a batch of 8" in exported.stdout
    said = [json.loads(call("inspect", path, "--json").stdout) for path in (model, onnx)]
    assert said[1] == said[0] | {"same_bits": True}
    assert "image_shape          3, 8, 8" in call("inspect", onnx).stdout

    report, plot = tmp_path / "r.json", tmp_path / "r.png"
    verified = call("verify", model, onnx, "--count", 2, "--steps", 30, "--report", report, "--plot", plot)
    assert verified.exit_code == 0, verified.output
    assert "within tolerance" in verified.stdout
    content = json.loads(report.read_text())
    assert content["within_tolerance"]
    assert content["steps"] == 30
    assert len(content["candidates"][0]["predictions"]) == 30
    with Image.open(plot) as image:
        assert image.size[0] > 500

    for source, output in ((onnx, tmp_path / "a.npz"), (model, tmp_path / "b.npz")):
        ran = call("run", source, "--steps", 20, "--count", 3, "--seed", 5, "--float", "-o", output)
        assert ran.exit_code == 0, ran.output
        assert "3 images, 20 steps, seed 5" in ran.stdout
    np.testing.assert_allclose(
        np.load(tmp_path / "a.npz")["samples"], np.load(tmp_path / "b.npz")["samples"], atol=1e-4
    )


def test_verify_exits_1_past_tolerance(tmp_path: Path, checkpoint_path: Path, onnx_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    weight = next(t for t in model.graph.initializer if t.name == "conv_out.weight")
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.001), weight.name)
    )
    onnx.save(model, tmp_path / "off.onnx")
    result = call("verify", checkpoint_path, tmp_path / "off.onnx", "--steps", 20)
    assert result.exit_code == 1
    assert "PAST TOLERANCE" in result.stdout
    assert next(line for line in result.stdout.splitlines() if "first t past" in line).split()[-1] == "950"


def test_an_edited_model_is_told(tmp_path: Path, checkpoint_path: Path, onnx_path: Path) -> None:
    """A flipped bit in the weights: run refuses it, verify says so and compares all the same."""
    content = bytearray(onnx_path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "m.onnx"
    damaged.write_bytes(content)
    refused(call("run", damaged), 1, "is not what ddpm-export wrote: damaged, or edited since")
    compared = call("verify", checkpoint_path, damaged, "--steps", 3)
    assert "it is damaged, or was edited" in compared.stderr
    assert "tolerance" in compared.stdout.lower()


def test_a_model_with_nan_is_refused_by_the_name_of_the_tensor(
    tmp_path: Path, checkpoint_path: Path, onnx_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    weight = next(t for t in model.graph.initializer if t.name == "conv_out.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[5] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "m.onnx")
    refused(call("verify", checkpoint_path, tmp_path / "m.onnx"), 1, "not finite in conv_out.weight")


def test_the_ladder(tmp_path: Path, checkpoint_path: Path) -> None:
    """Half precision by its default name, all of it in one table, and the advice at the end."""
    from ddpm_deploy.train.checkpoint import Checkpoint

    model, full, half = (tmp_path / name for name in ("m.pt", "m.onnx", "m.fp16.onnx"))
    whole = Checkpoint.load(open_model(checkpoint_path))
    spec = msgspec.structs.replace(whole.spec, timesteps=60)
    dataclasses.replace(whole, spec=spec).save(model)
    report = tmp_path / "r.json"
    assert call("export", model).exit_code == 0
    exported = call("export", model, "--fp16", "--report", report)
    assert exported.exit_code == 0, exported.output
    assert "31 of 33 convolutions work in fp16; in float32 stay\n  conv_in: reads x\n" in exported.stdout
    assert "slower than the fp32 one" in exported.stdout
    content = json.loads(report.read_text())
    assert content["islands"].keys() == {"conv_in", "conv_out"}
    assert len(content["oracle"]) == 60
    result = call("verify", model, full, half, "--steps", 30, "--report", report)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert str(half) in lines[1]
    assert any(line.split()[-4:] == ["110", "dB", "60", "dB"] for line in lines)
    assert any(line.startswith("choose ") for line in lines)
    assert [c["name"] for c in json.loads(report.read_text())["candidates"]] == [str(full), str(half)]
    assert call("run", half, "--steps", 3, "--count", 2, "-o", tmp_path / "x.png").exit_code == 0


def test_a_model_against_its_proof(tmp_path: Path, onnx_path: Path) -> None:
    model, proof = tmp_path / "m.onnx", tmp_path / "m.proof.npz"
    shutil.copy(onnx_path, model)
    refused(call("verify", model), 1, "has no proof beside it")
    shutil.copy(onnx_path.with_suffix(".proof.npz"), proof)
    assert call("verify", model).exit_code == 0
    refused(call("verify", model, "--steps", 3), 2, "a proof has its own")
    refused(call("verify", model, onnx_path, "--proof", proof), 2, "--proof is for a single model")
    with np.load(proof) as archive:
        content = dict(archive)
    spec = json.loads(content["spec"].tobytes())
    spec["provenance"]["digest"] = "0" * 64
    np.savez(proof, **content | {"spec": np.frombuffer(json.dumps(spec).encode(), np.uint8)})
    refused(call("verify", model), 1, "is the proof of another model")
    proof.write_bytes(b"PK")
    refused(call("verify", model), 1, "is not a whole proof")


def test_a_reference_that_takes_fewer_images_is_compared_on_those(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine that was built for a small batch."""

    def small(model: ModelFile, max_batch: int | None = None, **place: Unpack[Place]) -> Network:
        return open_network(model, 2, **place)

    monkeypatch.setattr(verify, "open_network", small)
    result = call("verify", onnx_path, onnx_path, "--count", 4, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "2 of 4 images are compared" in result.stderr
    assert "2 chains of 3 steps)" in result.stdout


def test_a_seed_that_was_not_given_is_printed(tmp_path: Path, onnx_path: Path) -> None:
    first = call("run", onnx_path, "--steps", 3, "--count", 1, "-o", tmp_path / "a.npz")
    seed = first.stdout.split("seed ")[1].split(",")[0]
    call("run", onnx_path, "--steps", 3, "--count", 1, "--seed", seed, "-o", tmp_path / "b.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"])


@pytest.mark.parametrize("output", ["grid.png", "folder"])
def test_a_picture_is_made_again(tmp_path: Path, onnx_path: Path, output: str) -> None:
    arguments = ("--steps", 9, "--count", 3, "--seed", 5, "--first-index", 2**40)
    assert call("run", onnx_path, *arguments, "-o", tmp_path / output).exit_code == 0
    picture = tmp_path / output if output == "grid.png" else tmp_path / output / f"{2**40 + 1}.png"
    again = call("replay", onnx_path, picture)
    assert again.exit_code == 0, again.output
    assert "9 steps, seed 5: the same again" in again.stdout

    with Image.open(picture) as image:
        info = PngInfo()
        info.add_text("ddpm_deploy", image.text["ddpm_deploy"])  # type: ignore[attr-defined]
        edited = np.array(image)
        edited[edited.shape[0] // 2, 3] ^= 128
        Image.fromarray(edited).save(tmp_path / "edited.png", pnginfo=info)
    other = call("replay", onnx_path, tmp_path / "edited.png")
    assert other.exit_code == 1
    assert "not the same in 1 pixel, by up to 128 of 255" in other.stdout


def test_a_picture_names_the_weights_that_made_it(tmp_path: Path, checkpoint_path: Path) -> None:
    picture, raw = tmp_path / "x.png", ("--weights", "raw")
    settings = ("--steps", 3, "--count", 1, "--seed", 1)
    assert call("run", checkpoint_path, *raw, *settings, "-o", picture).exit_code == 0
    assert "the same again" in call("replay", checkpoint_path, picture, *raw).stdout
    refused(call("replay", checkpoint_path, picture), 1, "was made by the model")


def test_guidance_that_does_not_fit_in_a_batch_is_refused(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def single(model: ModelFile, max_batch: int | None = None, **place: Unpack[Place]) -> Network:
        return open_network(model, 1, **place)

    monkeypatch.setattr(models, "open_network", single)
    result = call("run", pets / "m.onnx", "--guidance", 2, "-o", tmp_path / "x.png")
    refused(result, 1, "this model's batch has one row")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pets/cat and pets/dog, m.pt trained on them and m.onnx: labels, v, and a learned variance."""
    folder = tmp_path_factory.mktemp("pets")
    for name in ("cat", "dog"):
        (folder / "pets" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), 255 * (name == "dog")).save(folder / "pets" / name / f"{i}.png")
    kind = ("--labels", "--loss", "hybrid", "--prediction", "v", "--schedule", "cosine")
    size = ("--preset", "digits", "--steps", 30, "--batch-size", 8, "--sample-every", 0)
    trained = call("train", folder / "pets", *kind, "-o", folder / "m.pt", *size)
    assert trained.exit_code == 0, trained.output
    exported = call("export", folder / "m.pt")
    assert exported.exit_code == 0, exported.output
    return folder


def test_what_was_trained_is_in_the_model(pets: Path) -> None:
    spec = json.loads(call("inspect", pets / "m.onnx", "--json").stdout)
    assert (spec["num_classes"], spec["class_names"], spec["null_class"]) == (2, ["cat", "dog"], True)
    assert (spec["prediction"], spec["variance"], spec["schedule"]["kind"]) == (
        "v",
        "learned_range",
        "cosine",
    )
    verified = call("verify", pets / "m.onnx")
    assert verified.exit_code == 0, verified.output


def test_class_conditional_models(tmp_path: Path, pets: Path) -> None:
    """Images of one class, and what a label changes."""
    model, onnx = pets / "m.pt", pets / "m.onnx"

    def images(*arguments: object, source: Path = onnx) -> np.ndarray:
        ran = call("run", source, *arguments, "--steps", 20, "--seed", 3, "--float", "-o", tmp_path / "x.npz")
        assert ran.exit_code == 0, ran.output
        return np.asarray(np.load(tmp_path / "x.npz")["samples"])

    cats, dogs = (images("--count", 4, "--label", name) for name in ("cat", "1"))
    assert np.abs(cats - dogs).max() > 1e-3
    by_turns = images("--count", 4)
    np.testing.assert_array_equal(by_turns, images("--count", 4, "--label", "cat", "--label", "dog"))
    np.testing.assert_array_equal(by_turns[::2], cats[::2])
    np.testing.assert_array_equal(by_turns[1::2], dogs[1::2])
    np.testing.assert_array_equal(by_turns[3:], images("--count", 1, "--first-index", 3))
    assert np.abs(images("--count", 4, "--label", "none") - cats).max() > 1e-3
    np.testing.assert_allclose(images("--count", 4, "--label", "cat", source=model), cats, atol=1e-4)

    drawn = ("run", onnx, "--steps", 5, "--count", 3, "--label", "dog", "-o", tmp_path / "dogs.png")
    assert call(*drawn).exit_code == 0
    assert "the same again" in call("replay", onnx, tmp_path / "dogs.png").stdout
    guided = images("--count", 4, "--label", "cat", "--guidance", 4)
    assert np.abs(guided - cats).max() > 1e-3
    np.testing.assert_allclose(
        images("--count", 4, "--label", "cat", "--guidance", 4, source=model), guided, atol=1e-3
    )
    np.testing.assert_array_equal(
        guided, images("--count", 4, "--label", "cat", "--guidance", 4, "--batch", 1)
    )
    assert call(*drawn, "--guidance", 2.5).exit_code == 0
    assert "the same again" in call("replay", onnx, tmp_path / "dogs.png").stdout
    refused(call("run", onnx, "--guidance", "nan"), 1, "guidance must be from -1000 to 1000")
    refused(
        call("run", onnx, "--label", "cow"),
        1,
        "no class 'cow': choose cat, dog, or 0 to 1, or none for no class",
    )
    refused(call("run", onnx, "--label", "-1"), 1, "no class '-1'")
    shutil.copytree(pets / "pets", tmp_path / "pets")
    shutil.copy(model, tmp_path)
    (tmp_path / "pets" / "cow").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pets" / "cow" / "0.png")
    model = tmp_path / model.name
    refused(
        call("train", tmp_path / "pets", "--resume", model, "--steps", 40),
        1,
        "the classes in",
        "are not those",
    )


def test_pictures_that_cannot_be_made_again(tmp_path: Path, onnx_path: Path) -> None:
    def picture(name: str, text: str | None) -> Path:
        info = PngInfo()
        if text is not None:
            info.add_text("ddpm_deploy", text)
        Image.new("L", (8, 8)).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    origin = {"model": "0" * 64, "is_grid": True, "request": {"count": 1, "steps": 3, "seed": 1}}
    many = origin | {"request": {"count": 10**9}}
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        tmp_path / "missing.png": "does not exist",
        tmp_path / "text.png": "not a whole PNG",
        picture("plain.png", None): "does not say where it came from",
        picture("list.png", "[]"): "does not say where it came from",
        picture("many.png", json.dumps(many)): "cannot hold 1000000000 images",
        picture("other.png", json.dumps(origin)): "was made by the model 000000000000…",
    }
    for path, problem in cases.items():
        refused(call("replay", onnx_path, path), 1, problem)


def test_quiet_and_verbose(tmp_path: Path, onnx_path: Path) -> None:
    """As processes, since logging is a process's own."""
    command = [BIN / "ddpm-run", onnx_path, "--steps", "2", "--count", "1", "-o", tmp_path / "x.png"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 image · 2 steps · about" in said.stderr
    quiet = subprocess.run([*command, "-q"], capture_output=True, text=True, check=True)
    assert quiet.stderr == ""
    assert quiet.stdout.startswith(f"{tmp_path / 'x.png'}: 1 image, 2 steps")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_training_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    model = tmp_path / "m.pt"
    command = [
        BIN / "ddpm-train",
        "digits",
        "-o",
        model,
        "--steps",
        "100000",
        "--sample-every",
        "0",
        "--batch-size",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "m.train" / "metrics.csv"
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and len(metrics.read_text().splitlines()) > 1) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"continue with: ddpm-train --resume {model}" in stdout
    step = json.loads(call("inspect", model, "--json").stdout)["provenance"]["step"]
    assert step >= 25
    resumed = call("train", "--resume", model, "--steps", step + 2)
    assert resumed.exit_code == 0, resumed.output


def test_killed_training_resumes_as_if_it_had_not_been(tmp_path: Path) -> None:
    """kill -9 between two saves: what the last one holds goes on to the weights of the whole run."""
    command = [BIN / "ddpm-train", "digits", "--sample-every", "0", "--batch-size", "2", "--save-every", "40"]
    killed, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    process = subprocess.Popen([*command, "-o", killed, "--steps", "150"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    step = json.loads(call("inspect", killed, "--json").stdout)["provenance"]["step"]
    assert step in (40, 80, 120)
    subprocess.run([BIN / "ddpm-train", "--resume", killed], check=True, capture_output=True)
    subprocess.run([*command, "-o", whole, "--steps", "150"], check=True, capture_output=True)
    digests = [
        json.loads(call("inspect", path, "--json").stdout)["provenance"]["digest"] for path in (killed, whole)
    ]
    assert digests[0] == digests[1]


def test_an_interrupted_chain_goes_on_from_its_snapshot(tmp_path: Path, pets: Path) -> None:
    """Ctrl-C in one process, the rest in another, on another backend: the image is that of the whole chain."""
    settings = ("--count", 3, "--seed", 5, "--guidance", 2, "--first-index", 7)
    process = subprocess.Popen(
        [BIN / "ddpm-run", pets / "m.pt", *map(str, settings), "--snapshot", "s.npz", "-o", "x.png"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("guidance takes two rows of the batch") for line in lines)
    time.sleep(0.1)  # the next thing it does is to wait for signals; the chain takes seconds
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"ddpm-deploy resume {pets / 'm.pt'} s.npz -o x.png\n" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz"]
    resumed = call("resume", pets / "m.onnx", tmp_path / "s.npz", "-o", tmp_path / "x.png")
    assert resumed.exit_code == 0, resumed.output
    assert "3 images, 1000 steps, seed 5" in resumed.stdout
    # A part of it was PyTorch's: a pixel may round to the next of its 256 levels, which replay lets pass.
    assert call("replay", pets / "m.onnx", tmp_path / "x.png").exit_code == 0


def test_snapshots_that_cannot_be_gone_on_with(tmp_path: Path, onnx_path: Path, pets: Path) -> None:
    kept: list[Snapshot] = []
    with Sampler.load(onnx_path) as sampler:
        table = sampler.spec.step_table(ChainSettings(steps=3))
        sampler.sample(2, table=table, callback=lambda step, x, x0: kept.append(sampler.snapshot()))
        sampler.sample(2, steps=3, callback=lambda step, x, x0: kept.append(sampler.snapshot()))
    own, done, cut, empty = (tmp_path / f"{name}.npz" for name in ("own", "done", "cut", "empty"))
    kept[0].save(own)
    kept[-1].save(done)
    cut.write_bytes(done.read_bytes()[:-100])
    empty.touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for arguments, code, problem in (
        (("missing.npz",), 1, "does not exist"),
        ((tmp_path,), 1, "is a folder"),
        ((empty,), 1, "is empty"),
        ((cut,), 1, "not a whole snapshot"),
        ((onnx_path,), 1, "not a whole snapshot"),
        ((own,), 1, "finish it with Sampler.resume"),
        ((done, "--steps", 3), 2, "No such option"),
        ((done, "--progress", tmp_path / "p.gif"), 1, "no progress to show"),
        ((done, "--progress", done), 1, "another file"),
        ((done, "-o", done), 1, "another file of this command"),
    ):
        refused(call("resume", onnx_path, *arguments), code, problem)
    for arguments, code, problem in (
        (("--snapshot", onnx_path), 1, "another file of this command"),
        (("--snapshot", tmp_path / "x.png"), 1, "must end in .npz"),
        (("--snapshot", cut), 1, "--snapshot would replace it"),
        (("--progress", tmp_path / "images" / "1.png", "-o", tmp_path / "images"), 1, "among the images"),
        (("--progress", tmp_path / "loop" / "1.png", "-o", tmp_path / "images"), 1, "loop"),
        (("--snapshot", "missing/x.npz"), 1, "does not exist"),
        (("--snapshot", tmp_path / "s.npz", "--count", 100), 1, "a snapshot holds one batch"),
        (("--guidance", 2), 1, "needs a model that knows the null class"),
        (("--progress", "x.jpg"), 1, ".gif, or a .png"),
        (("--progress", "samples.png"), 1, "another file of this command"),
        (("--backend", "torch"), 1, "is not a checkpoint"),
        (("--backend", "tensorrt"), 1, "no NVIDIA GPU"),
    ):
        refused(call("run", onnx_path, *arguments), code, problem)
    refused(call("resume", pets / "m.onnx", done), 1, "this snapshot is of the model")
    assert call("resume", onnx_path, done, "-o", tmp_path / "x.png").exit_code == 0


def test_a_chain_that_is_done_when_it_is_stopped_goes_on_to_its_images(
    tmp_path: Path, onnx_path: Path
) -> None:
    """As Ctrl-C finds it on a GPU, which takes further steps before one is seen. Asking does not move the bar."""
    model, path, moved = open_model(onnx_path), tmp_path / "s.npz", []
    request = Request(count=2, steps=3, seed=0).checked(model.spec)
    options: ChainOptions = {
        "output": tmp_path / "x.npz",
        "as_float": True,
        "in_data_range": False,
        "rgb": False,
        "progress": None,
        "force": False,
        "as_json": False,
        **dict.fromkeys(get_type_hints(Place)),  # type: ignore[typeddict-item]
    }
    outputs, kept = checked_outputs(model, request, options, path), []
    with Sampler.load(onnx_path) as sampler:
        deque(sampler.draw(request, lambda step, x, x0: kept.append(sampler.snapshot())), maxlen=0)
        watch = Watch(sampler, model, request, outputs)
        watch.advance = moved.append
        assert not watch.wants(1)
        watch.stop()
        assert watch.wants(1)
        assert not watch.wants(2)  # the last step
        assert moved == []
        watch.passed(1)
        assert moved == [1]
        sampler.snapshot = lambda: kept[-1]  # type: ignore[method-assign]
        watch(1, kept[1].x, kept[1].x0)
        assert not path.exists()
        sampler.snapshot = lambda: kept[1]  # type: ignore[method-assign]
        with pytest.raises(click.exceptions.Exit):
            watch(1, kept[1].x, kept[1].x0)
    assert Snapshot.load(path).step == 2


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_progress_shows_the_images_appear(tmp_path: Path, onnx_path: Path, suffix: str) -> None:
    film, out = tmp_path / f"film{suffix}", tmp_path / "x.png"
    ran = call("run", onnx_path, "--steps", 30, "--count", 70, "--seed", 1, "--progress", film, "-o", out)
    assert ran.exit_code == 0, ran.output
    with Image.open(film) as picture, Image.open(out) as grid:
        first = np.asarray(picture.convert("L"))[2:66, 2:66].astype(int)
        if suffix == ".gif":
            assert picture.n_frames == 30
            picture.seek(29)
            last = np.asarray(picture.convert("L"))[2:66, 2:66]
        else:
            assert picture.size == (10 * 66 + 2, 8 * 66 + 2)
            last = np.asarray(picture)[2:66, -66:-2]
        assert np.abs(last.astype(int) - np.asarray(grid)[2:66, 2:66]).max() <= 1
        assert np.abs(first - last).max() > 10
    refused(
        call("replay", onnx_path, film),
        1,
        "does not say where it came from" if suffix == ".png" else "not a whole PNG",
    )


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_run_leaves_nothing(tmp_path: Path, onnx_path: Path) -> None:
    command = [BIN / "ddpm-run", onnx_path, "--count", "5000", "-o", tmp_path / "x.npz"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the forecast
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def bad_files(folder: Path, whole: Path) -> dict[str, Path]:
    """What may stand where a model is expected."""
    content = whole.read_bytes()
    files = {
        "missing": None,
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "foreign": b"GIF89a" + bytes(100),
        "pickle": pickle.dumps(Bomb()),
    }
    paths = {}
    for name, data in files.items():
        paths[name] = folder / f"{name}{whole.suffix}"
        if data is not None:
            paths[name].write_bytes(data)
    paths["folder"] = folder / f"folder{whole.suffix}"
    paths["folder"].mkdir()
    return paths


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "foreign", "pickle", "folder"])
@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_bad_models(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_path: Path,
    onnx_path: Path,
    suffix: str,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = bad_files(tmp_path, checkpoint_path if suffix == ".pt" else onnx_path)[kind]
    before = sorted(tmp_path.iterdir())
    refused(call("inspect", bad), 1, kind)
    refused(call("run", bad, "-o", "x.png"), 1, kind)
    refused(call("verify", bad, onnx_path), 1, kind)
    refused(call("verify", onnx_path, bad, "--report", "r.json"), 1, kind)
    refused(call("export", bad, "-o", "x.onnx"), 1, kind)
    if suffix == ".pt":
        refused(call("train", "--resume", bad), 1, kind)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--steps", 0], 2, "--steps"),
        (["--steps", -1], 2, "--steps"),
        (["--steps", "many"], 2, "--steps"),
        (["--steps", 1001], 1, "choose from 1 to 1000"),
        (["--count", 0], 2, "--count"),
        (["--count", 10**12], 2, "--count"),
        (["--seed", -1], 2, "--seed"),
        (["--batch", 0], 2, "--batch"),
        (["--solver", "euler"], 2, "--solver"),
        (["--label", "cat"], 1, "unconditional: it takes no label"),
        (["--device", "tpu"], 1, "device 'tpu'"),
        (["-o", "x.bmp"], 1, ".bmp"),
        (["-o", "missing/x.png"], 1, "does not exist"),
        (["-o", "/proc/x.png"], 1, "/proc/x.png"),
        (["--float"], 1, "only an .npz holds floats"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_bad_arguments_of_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    onnx_path: Path,
    arguments: list[object],
    code: int,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(call("run", onnx_path, *arguments), code, problem)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([], 2, "DATA is missing"),
        (["missing"], 1, "does not exist"),
        (["empty"], 1, "holds no images"),
        (["broken"], 1, "broken/a.png"),
        (["empty.npy"], 1, "is empty"),
        (["pickle.npz"], 1, "not a readable array"),
        (["digits", "--steps", 0], 2, "--steps"),
        (["digits", "--learning-rate", "nan"], 1, "out of range"),
        (["digits", "-o", "/dev/null.pt"], 1, "cannot be written")
        if os.getuid()
        else (["digits", "-o", "x"], 1, ".pt"),
        (["digits", "-o", "x.onnx"], 1, "must end in .pt"),
        (["digits", "-o", "missing/x.pt"], 1, "does not exist"),
        (["digits", "--image-size", 9], 1, "choose 8 or 10"),
        (["digits", "--device", "tpu"], 1, "device 'tpu'"),
        (["digits", "--preset", "imagenet"], 2, "--preset"),
        (["--resume", "x.pt", "--batch-size", 3], 2, "--batch-size cannot change"),
        (["--resume", "missing.pt"], 1, "does not exist"),
        (["digits", "--label-dropout", 0.1], 2, "--label-dropout is for a model with --labels"),
        (["digits", "--accumulate", 33], 1, "does not make 33 parts"),
        (["digits", "--loss", "hybrid", "--variance", "fixed-small"], 1, "this one is fixed_small"),
        (["digits", "--variance", "learned_range"], 1, "simple does not train a learned_range variance"),
        (["digits", "--variance", "learned"], 2, "'learned' is not one of"),
        (["digits", "--prediction", "score"], 2, "'score' is not one of"),
        (["--resume", "x.pt", "--loss", "vlb"], 2, "--loss cannot change"),
        (["empty", "--labels"], 1, "holds no images"),
    ],
)
def test_bad_arguments_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    before = sorted(tmp_path.rglob("*"))
    refused(call("train", *arguments), code, problem)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "model.pb"], "must end in .onnx or .plan"),
        (["-o", "missing/x.onnx"], "does not exist"),
    ],
)
def test_bad_arguments_of_export(checkpoint_path: Path, arguments: list[object], problem: str) -> None:
    refused(call("export", checkpoint_path, *arguments), 1, problem)


def test_export_does_not_replace_another_model(tmp_path: Path, checkpoint_path: Path) -> None:
    """Without --force; and names with spaces can be pasted."""
    output = tmp_path / "my model.onnx"
    output.write_text("another")
    refused(call("export", checkpoint_path, "-o", output), 1, "holds another model", "--force")
    assert output.read_text() == "another"
    exported = call("export", checkpoint_path, "-o", output, "--force")
    assert exported.exit_code == 0
    assert f"ddpm-run '{output}'" in exported.stdout
    refused(call("export", checkpoint_path, "-o", output, "--fp16"), 1, "holds another model or precision")
    require_same_model(output, open_model(checkpoint_path).spec.provenance.digest, "fp32")


def test_training_does_not_replace_a_model(tmp_path: Path, checkpoint_path: Path) -> None:
    before = checkpoint_path.read_bytes()
    refused(call("train", "digits", "-o", checkpoint_path), 1, "exists", "--resume", "--force")
    assert checkpoint_path.read_bytes() == before


def test_resuming_keeps_the_settings(tmp_path: Path) -> None:
    from ddpm_deploy.train.checkpoint import Checkpoint

    model = tmp_path / "m.pt"
    options = ("--batch-size", 2, "--save-every", 7, "--sample-every", 0, "--no-flip", "--seed", 9)
    assert call("train", "digits", "-o", model, "--steps", 2, *options).exit_code == 0
    first = Checkpoint.load(open_model(model)).settings
    assert call("train", "--resume", model, "--steps", 3).exit_code == 0
    second = Checkpoint.load(open_model(model)).settings
    assert (first.save_every, first.sample_every, first.seed) == (7, 0, 9)
    assert second == msgspec.structs.replace(first, steps=3)


def test_raw_weights_are_verified_as_such(tmp_path: Path, checkpoint_path: Path) -> None:
    raw = tmp_path / "raw.onnx"
    exported = call("export", checkpoint_path, "-o", raw, "--weights", "raw")
    assert exported.exit_code == 0, exported.output
    assert f"ddpm-verify {checkpoint_path} {raw} --weights raw" in exported.stdout
    assert call("verify", checkpoint_path, raw, "--weights", "raw", "--steps", 10).exit_code == 0
    averaged = call("verify", checkpoint_path, raw, "--steps", 10)
    assert averaged.exit_code == 1
    assert "are not the reference's" in averaged.stderr


def test_a_mistake_names_the_command_that_was_typed() -> None:
    assert "(see ddpm-deploy run --help)" in call("run", "--steps", 0, "x.onnx").stderr


def test_terminated_run_leaves_nothing(tmp_path: Path, onnx_path: Path) -> None:
    command = [BIN / "ddpm-run", onnx_path, "--count", "5000", "-o", tmp_path / "x.npz"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the forecast
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; what was there before stays."""
    model = tmp_path / "m.pt"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from ddpm_deploy.cli.train import main; main()"
    )
    options = ["digits", "-o", str(model), "--steps", "1", "--batch-size", "2", "--sample-every", "0"]
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"Error: {model} cannot be written: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_reports_do_not_replace_models(tmp_path: Path, onnx_path: Path) -> None:
    before = onnx_path.read_bytes()
    refused(call("verify", onnx_path, onnx_path, "--report", onnx_path), 1, "another file of this command")
    proof = onnx_path.with_suffix(".proof.npz")
    refused(call("verify", onnx_path, "--report", proof), 1, "another file of this command")
    refused(call("run", onnx_path, "--steps", 2, "-o", proof), 1, "another file of this command")
    refused(call("verify", onnx_path, onnx_path, "--report", tmp_path / "r", "--plot", tmp_path / "r"), 1)
    assert onnx_path.read_bytes() == before


LOOPS = {
    "train": (
        ("{loop}", "-o", "x.pt"),
        ("digits", "-o", "{loop}.pt"),
        ("digits", "-o", "{loop}/x.pt"),
        ("--resume", "{loop}.pt"),
        ("--resume", "{loop}/x.pt"),
        ("{loop}.npz", "-o", "x.pt"),
        ("{loop}/x", "-o", "x.pt"),
    ),
    "export": (
        ("{loop}.pt",),
        ("{pt}", "-o", "{loop}.onnx"),
        ("{pt}", "-o", "{loop}/x.onnx"),
        ("{pt}", "-o", "{loop}.plan"),
        ("{pt}", "-o", "x.onnx", "--report", "{loop}.json"),
        ("{onnx}", "--rtx", "-o", "{loop}.plan"),
        ("{onnx}", "--timing-cache", "{loop}.cache"),
    ),
    "verify": (
        ("{loop}.onnx",),
        ("{onnx}", "{loop}.onnx"),
        ("{onnx}", "--proof", "{loop}.npz"),
        ("{onnx}", "--report", "{loop}.json"),
        ("{onnx}", "--plot", "{loop}.png"),
        ("{onnx}", "--plot", "{loop}/x.png"),
    ),
    "run": (
        ("{loop}.onnx",),
        ("{loop}/x.plan",),
        ("{onnx}", "-o", "{loop}.png"),
        ("{onnx}", "-o", "{loop}.npz"),
        ("{onnx}", "-o", "{loop}"),
        ("{onnx}", "-o", "{loop}/x.png"),
        ("{onnx}", "-o", "{loop}/x/"),
        ("{onnx}", "--progress", "{loop}.gif"),
        ("{onnx}", "--progress", "{loop}/x.gif"),
        ("{onnx}", "-o", "{loop}", "--progress", "{loop}/x.gif"),
        ("{onnx}", "--snapshot", "{loop}.npz"),
        ("{onnx}", "--snapshot", "{loop}/x.npz"),
    ),
    "resume": (
        ("{loop}.onnx", "x.npz"),
        ("{onnx}", "{loop}.npz"),
        ("{onnx}", "{loop}/x.npz"),
    ),
    "replay": (
        ("{loop}.onnx", "x.png"),
        ("{onnx}", "{loop}.png"),
    ),
    "inspect": (("{loop}.pt",), ("{loop}.plan",), ("{loop}/x.onnx",)),
}


@pytest.mark.parametrize(
    ("command", "arguments"), [(name, each) for name, several in LOOPS.items() for each in several], ids=str
)
def test_links_that_go_round_in_circles(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_path: Path,
    onnx_path: Path,
    command: str,
    arguments: tuple[str, ...],
) -> None:
    """Given as any path that a command takes: one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".pt", ".onnx", ".plan", ".npz", ".json", ".png", ".gif", ".cache"):
        Path(f"loop{suffix}").symlink_to(f"other{suffix}")
        Path(f"other{suffix}").symlink_to(f"loop{suffix}")
    before = sorted(tmp_path.rglob("*"))
    names = {"loop": "loop", "pt": checkpoint_path, "onnx": onnx_path}
    refused(call(command, *(each.format_map(names) for each in arguments)), 1, "loop")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_name_is_a_mistake(onnx_path: Path) -> None:
    refused(call("run", onnx_path, "-o", ""), 2, "the name is empty")


def test_an_export_is_exported_no_further_than_to_an_engine(onnx_path: Path) -> None:
    refused(call("export", onnx_path, "-o", "x.onnx"), 1, "the name of an engine must end in .plan")
    refused(call("export", onnx_path.with_suffix(".proof.npz")), 1, "is not a model file by its name")


@pytest.mark.parametrize("closed", ["2>&-", ">/dev/full"])
def test_streams_that_are_closed_or_full(tmp_path: Path, onnx_path: Path, closed: str) -> None:
    command = f"{BIN}/ddpm-run {onnx_path} --steps 2 --count 1 -o {tmp_path}/x.png {closed}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert result.returncode == (0 if closed == "2>&-" else 1)
    assert (tmp_path / "x.png").exists()


def test_changed_images_are_told_on_resume(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, rng.integers(0, 256, (6, 8, 8), np.uint8))
    model = tmp_path / "m.pt"
    options = ("--preset", "digits", "--steps", 1, "--sample-every", 0)
    assert call("train", tmp_path / "a.npy", "-o", model, *options).exit_code == 0
    assert "are not those" not in call("train", "--resume", model, "--steps", 2).stderr
    assert "are not those" in call("train", tmp_path / "b.npy", "--resume", model, "--steps", 3).stderr


def test_a_finished_training_asks_how_far_to_go(checkpoint_path: Path) -> None:
    refused(call("train", "--resume", checkpoint_path), 1, "has its 40 steps already", "--steps")
