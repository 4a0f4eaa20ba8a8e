"""What a run writes and says: its own folders, arrays for evaluators and for science, JSON, counted things."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ddpm_deploy import OutputError, SettingError, in_data_range, to_uint8
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.images import Destination, Form, grid, read_pixels
from ddpm_deploy.runtime.preview import Preview
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.spec import FAST, ModelSpec
from tests.models import tiny_spec
from tests.test_cli import call, refused

RUN = ("--steps", 2, "--seed", 5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- folders ------------------------------------------------------------------------------------------


def test_a_run_adds_to_its_own_folder(tmp_path: Path, onnx_path: Path) -> None:
    """Parts of one run, and the same part again, as after an interruption; what a killed run left is passed over."""
    folder = tmp_path / "images"
    for first in (0, 3, 2):
        ran = call("run", onnx_path, *RUN, "--count", 3, "--first-index", first, "-o", folder)
        assert ran.exit_code == 0, ran.output
        (folder / ".ddpm-0123.png").write_bytes(b"half")
    assert [name for name in names(folder) if name[0] != "."] == [f"{i:06d}.png" for i in range(6)]
    whole = call("run", onnx_path, *RUN, "--count", 6, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    for name in names(tmp_path / "whole"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (("--seed", 6), "000000.png, which is of another run (seed 5, not 6)"),
        (("--steps", 3), "000000.png, which is of another run (steps 2, not 3)"),
        (("--solver", "ddim", "--seed", 6), "seed 5, not 6; solver ddpm, not ddim"),
        (("--first-index", 10**6, "--spacing", "linspace"), "spacing leading, not linspace"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, onnx_path: Path, changes: tuple[object, ...], problem: str
) -> None:
    folder = tmp_path / "images"
    assert call("run", onnx_path, *RUN, "--count", 2, "-o", folder).exit_code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = ("run", onnx_path, *RUN, "--count", 1, *changes, "-o", folder)
    refused(call(*other), 1, f"{folder} holds", problem, "choose another folder", "--seed", "--force")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert call(*other, "--force").exit_code == 0
    assert before.keys() <= set(names(folder))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("notes.txt", "notes.txt, which is no picture of ddpm-run"),
        ("000001.png", "000001.png, which is no picture of ddpm-run"),
        ("folder.png", "folder.png, which is no picture of ddpm-run"),
        ("grid.png", "grid.png, which is a grid"),
        ("000009.png", "000009.png, which is 000000.png under another name"),
    ],
)
def test_a_folder_with_other_files_is_refused(
    tmp_path: Path, onnx_path: Path, name: str, problem: str
) -> None:
    folder = tmp_path / "images"
    run = ("run", onnx_path, *RUN, "--count", 1, "-o")
    assert call(*run, folder).exit_code == 0
    match name:
        case "notes.txt":
            (folder / name).touch()
        case "000001.png":
            Image.new("L", (8, 8)).save(folder / name)
        case "folder.png":
            (folder / name).mkdir()
        case "grid.png":
            assert call(*run, folder / name).exit_code == 0
        case _:
            shutil.copy(folder / "000000.png", folder / name)
    refused(call(*run, folder), 1, f"holds {problem}")
    assert call(*run, folder, "--force").exit_code == 0


def test_the_same_pictures_said_in_another_way_are_the_same(tmp_path: Path, onnx_path: Path) -> None:
    run = ("run", onnx_path, *RUN, "--count", 1, "-o", tmp_path / "images", "--solver", "ddim")
    assert call(*run).exit_code == 0
    assert call(*run, "--eta", 0).exit_code == 0
    refused(call(*run, "--eta", 0.5), 1, "of another run (eta 0.0, not 0.5)")


def test_a_run_that_began_later_takes_no_picture_from_another(tmp_path: Path) -> None:
    """Both found an empty folder."""
    spec, samples = tiny_spec(), np.zeros((2, 1, 8, 8), np.float32)
    first, second = (
        Destination(tmp_path / "images", Request(count=2, seed=seed).checked(spec), spec) for seed in (0, 1)
    )
    with first.open() as one, second.open() as other:
        one(samples)
        with pytest.raises(
            OutputError, match=r"holds 000000\.png, which is of another run \(seed 0, not 1\)"
        ):
            other(samples)
        one(samples[:0])


@pytest.mark.parametrize("name", [".npz", ".png"])
def test_a_suffix_alone_is_no_name(tmp_path: Path, onnx_path: Path, name: str) -> None:
    refused(call("run", onnx_path, *RUN, "-o", tmp_path / name), 1, "no name before its suffix")
    assert not list(tmp_path.iterdir())


def test_a_folder_knows_the_weights_and_the_labels(tmp_path: Path, checkpoint_path: Path) -> None:
    """Raw weights are another model than the averaged ones of the same file."""
    folder, run = tmp_path / "raw", ("run", checkpoint_path, *RUN, "--count", 1, "-o", tmp_path / "raw")
    assert call(*run, "--weights", "raw").exit_code == 0
    assert call(*run, "--weights", "raw").exit_code == 0
    refused(call(*run), 1, "000000.png, which is of the model", "and this is")
    spec = msgspec.structs.replace(tiny_spec(), num_classes=3)
    for labels, first, strange in (((0, 2), 0, False), ((0, 2), 7, False), ((2, 0), 0, True), ((), 0, True)):
        request = Request(count=4, seed=1, first_index=first, labels=labels).checked(spec)
        destination = Destination(tmp_path / "labels", request, spec)
        if strange:
            with pytest.raises(OutputError, match="of another run .label"):
                destination.require_own()
        else:
            destination.require_own()
        if not strange:
            write(destination, np.zeros((4, 1, 8, 8), np.float32))
    assert folder.is_dir()


def test_resume_asks_the_same_of_its_folder(tmp_path: Path, onnx_path: Path) -> None:
    from ddpm_deploy.runtime.sampler import Sampler

    with Sampler.load(onnx_path) as sampler:
        for step, *_ in sampler.stream(2, steps=3, seed=1):
            if step == 1:
                sampler.snapshot().save(tmp_path / "s.npz")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").touch()
    resume = ("resume", onnx_path, tmp_path / "s.npz", "-o", tmp_path / "images")
    refused(call(*resume), 1, "holds mine.txt")
    assert call(*resume, "--force").exit_code == 0
    assert names(tmp_path / "images") == ["000000.png", "000001.png", "mine.txt"]
    made = call("resume", onnx_path, tmp_path / "s.npz", "-o", tmp_path / "x.npz", "--rgb", "--json")
    assert json.loads(made.stdout)["seed"] == 1
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 3)
    inside = ("--snapshot", tmp_path / "images" / "s.npz", "-o", tmp_path / "images")
    refused(call("run", onnx_path, *inside), 1, "among the images of this run")


def test_the_text_of_a_picture_is_found_wherever_it_is(tmp_path: Path, onnx_path: Path) -> None:
    """Another program may have moved it behind the pixels."""
    picture = tmp_path / "x.png"
    assert call("run", onnx_path, *RUN, "--count", 1, "-o", picture).exit_code == 0
    content = picture.read_bytes()
    at = content.index(b"tEXt") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    end = content.index(b"IEND") - 4 - length
    rest = content[:at] + content[at + length :]
    picture.write_bytes(rest[:end] + content[at : at + length] + rest[end:])
    assert "the same again" in call("replay", onnx_path, picture).stdout


# --- arrays -------------------------------------------------------------------------------------------


def write(destination: Destination, samples: np.ndarray) -> dict[str, Any]:
    """What an .npz holds, written in two parts."""
    destination.check()
    with destination.open() as put:
        put(samples[:1])
        put(samples[1:])
    return dict(np.load(destination.path)) if destination.path.suffix == ".npz" else {}


def samples_of(spec: ModelSpec, count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, *spec.image_shape)).astype(np.float32)


@pytest.mark.parametrize("form", ["uint8", "float"])
def test_labels_are_beside_the_images(tmp_path: Path, form: Form) -> None:
    """In the order of the images, of which there may be more than memory holds: the labels come after them."""
    spec = msgspec.structs.replace(tiny_spec(), num_classes=3, class_names=("cat", "dog", "cow"))
    for labels, wanted in ((("dog", "cow"), [2, 1, 2, 1, 2]), ((), [1, 2, 0, 1, 2])):
        request = Request(count=5, first_index=7, seed=1, labels=labels).checked(spec)
        found = write(Destination(tmp_path / "x.npz", request, spec, form), samples_of(spec))
        assert list(found) == ["arr_0" if form == "uint8" else "samples", "arr_1"]
        assert found["arr_1"].dtype == np.int64
        assert found["arr_1"].tolist() == wanted
    plain = write(Destination(tmp_path / "x.npz", request, tiny_spec(), form), samples_of(spec))
    assert "arr_1" not in plain


def test_images_in_the_units_of_the_data(tmp_path: Path) -> None:
    images = np.array([-1, 0, 1, 1.5], np.float32).reshape(1, 1, 2, 2)
    found = in_data_range(images, (100.0, 300.0))
    assert found.dtype == np.float32
    assert found.ravel().tolist() == [100, 200, 300, 350]
    assert in_data_range(images, (-5.0, 5.0), (0.0, 1.0)).ravel().tolist() == [-15, -5, 5, 10]
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    back = in_data_range(pixels * np.float32(2 / 255) - 1, (0.0, 255.0))
    np.testing.assert_allclose(back, pixels, atol=1e-4)
    spec = msgspec.structs.replace(tiny_spec(), data_range=(-1024.0, 3071.0), value_range=(0.0, 1.0))
    samples = samples_of(spec)
    request = Request(count=5, seed=1).checked(spec)
    held = write(Destination(tmp_path / "x.npz", request, spec, "data"), samples)["samples"]
    np.testing.assert_allclose(held, samples * 4095.0 - 1024, rtol=1e-5, atol=1e-3)


def test_units_of_the_data_on_the_command_line(tmp_path: Path, onnx_path: Path) -> None:
    out, run = tmp_path / "x.npz", ("run", onnx_path, *RUN, "--count", 2, "-o", tmp_path / "x.npz")
    assert call(*run, "--float").exit_code == 0
    plain = np.load(out)["samples"]
    assert call(*run, "--float", "--in-data-range").exit_code == 0
    np.testing.assert_array_equal(np.load(out)["samples"], in_data_range(plain, (0.0, 255.0)))
    refused(call(*run, "--in-data-range"), 2, "--in-data-range is for unrounded images: pass --float too")
    refused(call(*run, "--float", "-o", tmp_path / "x.png"), 1, "only an .npz holds floats")
    refused(call(*run, "--float", "--in-data-range", "-o", tmp_path / "x"), 1, "only an .npz holds floats")
    refused(call(*run, "--float", "--rgb"), 2, "--rgb is for uint8 images")
    refused(call(*run, "--rgb", "-o", tmp_path / "x.png"), 1, "only an .npz holds grey as RGB")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_for_evaluators_that_need_three_channels(tmp_path: Path, channels: int) -> None:
    spec = tiny_spec((channels, 8, 8))
    samples, request = samples_of(spec), Request(count=5, seed=1).checked(spec)
    destination = Destination(tmp_path / "x.npz", request, spec, "rgb")
    if channels in (2, 4):
        with pytest.raises(Exception, match=f"images of {channels} channels do not become RGB"):
            destination.check()
        return
    found = write(destination, samples)["arr_0"]
    assert found.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(found, np.repeat(to_uint8(samples), 3 // channels, axis=3))


# --- RGBA ---------------------------------------------------------------------------------------------


def test_pictures_of_four_channels(tmp_path: Path) -> None:
    spec = tiny_spec((4, 8, 8))
    samples, request = samples_of(spec), Request(count=5, seed=1).checked(spec)
    pixels = to_uint8(samples)
    write(Destination(tmp_path / "images", request, spec), samples)
    np.testing.assert_array_equal(read_pixels(tmp_path / "images" / "000003.png"), pixels[3])
    write(Destination(tmp_path / "x.png", request, spec), samples)
    np.testing.assert_array_equal(read_pixels(tmp_path / "x.png"), grid(pixels))
    assert grid(pixels)[0, 0].tolist() == [96, 96, 96, 255]
    for suffix in (".png", ".gif"):
        preview = Preview(tmp_path / f"film{suffix}", spec, steps=2)
        preview.check()
        for step in range(2):
            preview.see(step, samples, samples[::-1])
        preview.save()
        with Image.open(preview.path) as film:
            assert film.mode == ("RGBA" if suffix == ".png" else "P")
            if suffix == ".gif":  # on white, as it knows no half-transparent colour
                film.seek(1)
                white = Image.new("RGBA", film.size, "white")
                wanted = Image.alpha_composite(white, Image.fromarray(grid(pixels))).convert("RGB")
                off = np.abs(np.asarray(film.convert("RGB")).astype(int) - np.asarray(wanted))
                assert off.mean() < 8  # of a palette


# --- JSON, names and numbers --------------------------------------------------------------------------


def test_what_was_made_as_json(tmp_path: Path, onnx_path: Path) -> None:
    out = tmp_path / "x.npz"
    ran = call("run", onnx_path, *RUN, "--count", 3, "--first-index", 4, "-o", out, "--json")
    made = json.loads(ran.stdout)
    assert (
        made.items()
        >= {
            "output": str(out),
            "count": 3,
            "steps": 2,
            "seed": 5,
            "first_index": 4,
            "solver": "ddpm",
            "labels": [],
            "model": open_model(onnx_path).spec.provenance.digest,
        }.items()
    )
    assert made["images_per_second"] == pytest.approx(3 / made["seconds"])
    again = call("run", onnx_path, *RUN, "--count", 0, "--json")
    refused(again, 2, "--count")


def test_fast_says_what_it_is(tmp_path: Path, onnx_path: Path) -> None:
    out = tmp_path / "x.png"
    fast = "run", onnx_path, "--solver", "fast", "--count", 1, "--seed", 5, "-o", out
    assert "20 steps of sde-dpmpp-2m" in call(*fast).output
    made = json.loads(call(*fast, "--json").stdout)
    assert (made["solver"], made["steps"], made["spacing"]) == (FAST.solver, FAST.steps, FAST.spacing)
    with Image.open(out) as picture:
        text = json.dumps(picture.text)  # type: ignore[attr-defined]
    assert FAST.solver in text
    assert "fast" not in text


def test_verdicts_as_json(tmp_path: Path, onnx_path: Path, checkpoint_path: Path) -> None:
    report = tmp_path / "r.json"
    compared = ("--steps", 3, "--count", 1, "--json")
    within = call("verify", onnx_path, onnx_path, *compared, "--report", report)
    assert within.exit_code == 0
    assert json.loads(within.stdout) == json.loads(report.read_text())
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    weight = next(t for t in model.graph.initializer if t.name == "conv_out.weight")
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.1)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "off.onnx")
    past = call("verify", checkpoint_path, tmp_path / "off.onnx", *compared)
    assert past.exit_code == 1
    assert json.loads(past.stdout)["within_tolerance"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "{onnx}", "-o", "-"),
        ("run", "{onnx}", "--progress", "-"),
        ("run", "{onnx}", "--snapshot=-"),
        ("run", "-"),
        ("resume", "{onnx}", "s.npz", "-o", "-"),
        ("train", "digits", "-o", "-"),
        ("export", "{onnx}", "-o", "-"),
        ("verify", "{onnx}", "--report", "-"),
    ],
    ids=str,
)
def test_a_dash_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_path: Path, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        call(*(each.format(onnx=onnx_path) for each in arguments)),
        2,
        '"-" is none: ./- is a file of that name',
    )
    assert names(tmp_path) == []


def test_a_file_may_be_named_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("run", onnx_path, *RUN, "--count", 1, "-o", "./-").exit_code == 0
    assert names(tmp_path / "-") == ["000000.png"]


def test_one_of_a_thing_is_one(tmp_path: Path, onnx_path: Path) -> None:
    ran = call("run", onnx_path, "--steps", 1, "--count", 1, "--seed", 0, "-o", tmp_path / "x.npz", "-v")
    assert ran.exit_code == 0, ran.output
    assert "1 image, 1 step, seed 0" in ran.stdout
    verified = call("verify", onnx_path, onnx_path, "--count", 1, "--steps", 1)
    assert "(1 timestep, 1 chain of 1 step)" in verified.stdout
    assert "1 image · 2 chains of 1 step" in verified.stderr
    model = tmp_path / "m.pt"
    trained = call("train", "digits", "-o", model, "--steps", 1, "--batch-size", 1, "--sample-every", 0)
    assert "1 step of 1 image 1×8×8" in trained.stderr
    assert "has its 1 step already" in call("train", "--resume", model, "--steps", 1).stderr
    with pytest.raises(SettingError, match="trained with T = 1 timestep: "):
        Request(steps=2).checked(tiny_spec(timesteps=1))
