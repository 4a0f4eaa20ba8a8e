"""Training images: what is read, how it is scaled, and what is refused."""

import gzip
import io
import json
import logging
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddpm_deploy.errors import DataError
from ddpm_deploy.model_file import open_model

pytest.importorskip("torch")

from ddpm_deploy.cli.train import main as train
from ddpm_deploy.train.checkpoint import Checkpoint
from ddpm_deploy.train.data import Dataset, find_images, read_images
from ddpm_deploy.train.data.pixels import fit


def test_digits_are_the_real_ones() -> None:
    images = read_images(find_images("digits"), (8, 8), 1).images
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)


def png(mode: str, size: tuple[int, int] = (20, 12)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("deep", [True, False])
def test_any_mode_is_read(mode: str, channels: int, deep: bool) -> None:
    image = Image.fromarray(np.full((12, 20), 40_000, np.uint16)) if mode == "I;16" else png(mode)
    if mode in ("I", "F") and not deep:
        with pytest.raises(ValueError, match=r"it holds (floats|32 bits), unlike the others"):
            fit(image, (8, 8), channels)
        return
    pixels, seen = fit(image, (8, 8), channels, deep=deep)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == (np.float32 if deep else np.uint8)
    assert seen.size == (12, 20)
    if mode == "I;16":
        assert (pixels == (40_000 if deep else 40_000 >> 8)).all()


def test_images_are_scaled_by_their_shorter_side_and_cropped_to_the_middle() -> None:
    array = np.zeros((10, 30), np.uint8)
    array[:, 10:20] = 255
    pixels, seen = fit(Image.fromarray(array), (10, 10), 1)
    assert (pixels == 255).all()
    assert seen.is_cropped
    assert not seen.is_enlarged
    pixels, seen = fit(Image.fromarray(array), (10, 30), 1)
    np.testing.assert_array_equal(pixels[0], array)
    assert not seen.is_cropped
    assert fit(Image.fromarray(array), (12, 8), 1)[1].is_enlarged


def test_exif_rotation_is_applied() -> None:
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255  # white above
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # turned a quarter clockwise to be upright
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    ((pixels,), _) = fit(Image.open(buffer), (8, 8), 1)
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    pixels, seen = fit(clear, (8, 8), 3)
    assert (pixels == 255).all()
    assert seen.on_white
    assert not fit(Image.new("RGBA", (8, 8)).convert("RGB"), (8, 8), 3)[1].on_white
    assert (fit(clear, (8, 8), 4)[0] == 0).all()


def test_a_folder_with_subfolders_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "b c").mkdir()
    png("L").save(tmp_path / "b c" / "new\nline.png")
    png("L").save(tmp_path / "A.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    source = find_images(str(tmp_path))
    assert source.count == 2
    assert source.channels() == 1
    assert read_images(source, (4, 4), 1).images.shape == (2, 1, 4, 4)
    png("RGB").save(tmp_path / "c.png")
    assert find_images(str(tmp_path)).channels() == 3


def test_broken_images_are_named_or_skipped(tmp_path: Path) -> None:
    for i in range(3):
        png("RGB").save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    source = find_images(str(tmp_path))
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read: .*1\.png.*--skip-broken"):
        read_images(source, (8, 8), 3)
    assert read_images(source, (8, 8), 3, skip_broken=True).images.shape == (2, 3, 8, 8)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="3 of 3"):
        read_images(find_images(str(tmp_path)), (8, 8), 3, skip_broken=True)


def test_a_program_in_a_picture_is_not_run(tmp_path: Path) -> None:
    """Pillow goes by content, and would hand PostScript to Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(DataError, match="not an image of a kind that is read"):
        read_images(find_images(str(tmp_path)), (8, 8), 3)
    (tmp_path / "a.png").rename(tmp_path / "a.eps")
    with pytest.raises(DataError, match="holds no images"):
        find_images(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "own", "last"),
    [
        ((5, 8, 9), 1, True),
        ((5, 8, 9, 1), 1, True),
        ((5, 1, 8, 9), 1, False),
        ((5, 8, 9, 3), 3, True),
        ((5, 3, 8, 9), 3, False),
        ((5, 4, 8, 8), 3, False),  # RGBA
        ((5, 8, 9, 2), 2, True),
        ((5, 20, 30, 16), 16, True),
        ((5, 16, 20, 30), 16, False),
        ((5, 5, 8, 8), 5, False),
        ((5, 8, 8, 5), 5, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays(tmp_path: Path, shape: tuple[int, ...], own: int, last: bool, suffix: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / f"x{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez_compressed(path, array)
    source = find_images(str(path))
    assert source.channels() == own
    channels = 4 if 4 in shape else own
    wanted = array[..., None] if array.ndim == 3 else array
    wanted = wanted.transpose(0, 3, 1, 2) if last else wanted
    images = read_images(source, wanted.shape[2:], channels).images
    np.testing.assert_array_equal(images, wanted)


def test_arrays_that_are_no_images(tmp_path: Path) -> None:
    cases = {
        "complex": (np.zeros((5, 8, 8), complex), "complex128 values"),
        "flat": (np.zeros((5, 64), np.uint8), r"shape \(5, 64\)"),
        "planes": (np.zeros((5, 18, 18, 17), np.uint8), "shape"),
        "one image": (np.zeros((48, 64, 3), np.uint8), "one image of 48×64 with 3 channels, or 48 grey ones"),
        "empty": (np.zeros((0, 8, 8), np.uint8), "shape"),
        "objects": (np.array([{}], object), "not a readable array"),
    }
    for name, (array, problem) in cases.items():
        for suffix, save in ((".npy", np.save), (".npz", np.savez)):
            path = tmp_path / f"{name}{suffix}"
            save(path, array)
            with pytest.raises(DataError, match=problem):
                find_images(str(path))
    np.savez(tmp_path / "x.npz", np.zeros((5, 8, 8), np.uint8))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match="not a readable array"):
        find_images(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_array_files_that_are_broken_or_lie(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    array = np.zeros((50, 8, 8), np.uint8)
    np.save(path, array) if suffix == ".npy" else np.savez(path, array)
    whole = path.read_bytes()
    assert b"(50, 8, 8)" in whole
    malformed, lie = (whole.replace(b"(50, 8, 8)", shape) for shape in (b"(9**9,8,8)", b"(99,80,80)"))
    for content in (b"", b"x", whole[:100], whole[:-50], malformed, lie):
        path.write_bytes(content)
        with pytest.raises(DataError):
            read_images(find_images(str(path)), (8, 8), 1)


@pytest.mark.parametrize("name", ["missing", "empty folder", "file.txt", "file.pt"])
def test_data_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError):
        find_images(str(tmp_path / name))


# --- labels -------------------------------------------------------------------------------------------


def class_folders(folder: Path) -> Path:
    for name, grey in (("cat", 0), ("dog", 255), ("dog/puppy", 255)):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), grey).save(folder / name / f"{i}.png")
    return folder


def test_folders_are_classes(tmp_path: Path) -> None:
    source = find_images(str(class_folders(tmp_path / "pets")), labels=True)
    assert source.class_names == ("cat", "dog")
    data = read_images(source, (8, 8), 1, workers=2)
    assert data.labels is not None
    assert data.labels.tolist() == [int(image.max() > 0) for image in data.images] == [0] * 3 + [1] * 6
    (tmp_path / "pets" / ".hidden").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pets" / ".hidden" / "x.png")
    (tmp_path / "birds").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "birds" / "x.png")
    (tmp_path / "pets" / "loop").symlink_to(tmp_path / "pets")
    assert find_images(str(tmp_path / "pets"), labels=True).class_names == ("cat", "dog")
    (tmp_path / "pets" / "bird").symlink_to(tmp_path / "birds")
    assert find_images(str(tmp_path / "pets"), labels=True).class_names == ("bird", "cat", "dog")
    (tmp_path / "pets" / "bird").unlink()
    (tmp_path / "pets" / "cat" / "1.png").write_bytes(b"broken")
    data = read_images(source, (8, 8), 1, skip_broken=True)
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 2 + [1] * 6


def test_arrays_have_labels(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([2, 0, 0, 1], np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    source = find_images(str(tmp_path / "x.npz"), labels=True)
    assert source.num_classes == 3
    assert read_images(source, (8, 8), 1).labels is not None
    digits = find_images("digits", labels=True)
    assert digits.class_names == tuple("0123456789")


def test_labels_that_cannot_be_found(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    np.save(tmp_path / "x.npy", images)
    cases = {"x.npy": "has no labels"}
    for name, labels, problem in (
        ("none", None, "arr_0"),
        ("short", np.zeros(3, int), "whole numbers"),
        ("floats", np.zeros(4), "whole numbers"),
        ("negative", np.array([0, 1, -1, 0]), "from 0 up"),
        ("large", np.array([0, 1, 10**9, 0]), "from 0 up"),
    ):
        arrays = (
            {"arr_0": images, "other": images} if labels is None else {"images": images, "labels": labels}
        )
        np.savez(tmp_path / f"{name}.npz", **arrays)
        cases[f"{name}.npz"] = "labels" if labels is None else problem
    class_folders(tmp_path / "pets")
    Image.new("L", (8, 8)).save(tmp_path / "pets" / "stray.png")
    cases["pets"] = r"stray\.png is in no class"
    for name, problem in cases.items():
        with pytest.raises(DataError, match=problem):
            find_images(str(tmp_path / name), labels=True)


# --- scale ---------------------------------------------------------------------------------------------


def tiffs(folder: Path, *images: np.ndarray[Any, Any]) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.tif")
    return folder


def ramp(low: float, high: float, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


def hot(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Many of an image, with one broken pixel in all."""
    images = np.tile(image, (64, 1, 1))
    images[3, 4, 5] = 1e6
    return images


def read(path: Path, channels: int = 1, **settings: Any) -> Dataset:
    return read_images(find_images(str(path)), (8, 8), channels, **settings)


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ([ramp(0, 0.5), ramp(0.2, 0.9)], (0, 1)),
        ([ramp(-1, 1), ramp(-0.5, 0.25)], (-1, 1)),
        ([ramp(0, 0.9), ramp(0, 1.25)], (0, 1.25)),  # a reflectance with a pixel over 1
        ([ramp(250, 280), ramp(260, 310)], (250, 310)),
        ([ramp(0, 4095, "uint16"), ramp(100, 900, "uint16")], (0, 4095)),
        ([ramp(-1024, 3071, "int32"), ramp(-5, 5, "int32")], (-1024, 3071)),
        ([ramp(0, 200, "int32"), ramp(0, 254, "int32")], (0, 255)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["folder", ".npy", ".npz"])
def test_a_data_set_has_one_scale(
    tmp_path: Path, images: list[np.ndarray[Any, Any]], wanted: tuple[float, float], kind: str
) -> None:
    path = tmp_path / f"x{kind}"
    if kind == "folder":
        tiffs(path, *images)
    else:
        (np.save if kind == ".npy" else np.savez)(path, np.stack(images))
    data = read(path)
    assert data.data_range == wanted
    assert data.images.dtype == np.float32
    exact = 2 * (np.stack(images) - wanted[0]) / (wanted[1] - wanted[0]) - 1
    np.testing.assert_allclose(data.images[:, 0], exact, atol=1e-6)
    # The same from a range that is given, as a resumed training does.
    assert read(path, data_range=data.data_range).digest() == data.digest()


def test_more_than_8_bits_are_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(4096, dtype=np.uint16).reshape(1, 64, 64))
    images = read_images(find_images(str(tmp_path / "x.npy")), (64, 64), 1).images
    assert len(np.unique(images)) == 4096


def test_a_range_that_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_deploy")
    folder = tiffs(tmp_path / "x", ramp(-50, 150))
    assert read(folder, data_range=(0.0, 100.0)).images.min() == -1
    assert re.search("about [45][0-9] % of the values are outside 0 to 100, and clipped to it", caplog.text)
    masks = tiffs(tmp_path / "masks", np.eye(8, dtype=np.uint8))
    data = read(masks, data_range=(0.0, 1.0))
    assert set(np.unique(data.images)) == {-1, 1}
    colours = tmp_path / "colours.npy"
    np.save(colours, np.full((2, 8, 8, 4), (10, 20, 30, 255), np.uint8))
    np.testing.assert_allclose(read(colours, 3, data_range=(10.0, 30.0)).images[0, :, 0, 0], [-1, 0, 1])


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (ramp(0, 15, "uint8"), "the brightest value of all images is 15 of 255: .*--data-range 0 15"),
        (np.eye(8, dtype=np.uint8), "the brightest value of all images is 1 of 255: .*--data-range 0 1"),
        (ramp(250, 255, "uint8"), "all values are from 250 to 255, a small part of 0 to 255"),
        (hot(ramp(0, 1)), "nearly all values are from 0 to 0.95[0-9]*, a small part of 0 to 1000000: "),
        (ramp(0, 255, "uint8"), ""),
    ],
    ids=["15 of 255", "a mask", "bright", "a hot pixel", "all of it"],
)
def test_data_that_hardly_use_their_range_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, image: np.ndarray[Any, Any], told: str
) -> None:
    np.save(tmp_path / "x.npy", image.reshape(-1, 8, 8))
    read(tmp_path / "x.npy")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warnings) == bool(told)
    assert re.search(told, "".join(warnings))


def test_numbers_that_are_not_finite_are_broken_images(tmp_path: Path) -> None:
    bad = ramp(0, 1)
    bad[0, 0] = np.nan
    folder = tiffs(tmp_path / "x", ramp(0, 1), bad)
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: .*1\.tif \(.*not finite"):
        read(folder)
    assert len(read(folder, skip_broken=True).images) == 1


def test_images_without_a_common_scale_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_deploy")
    folder = tiffs(tmp_path / "x", ramp(0, 255, "uint8"), ramp(0, 1))
    with pytest.raises(DataError, match="8 bits and of floats, which have no scale in common.*--data-range"):
        read(folder)
    assert read(folder, data_range=(0.0, 1.0)).images[1].max() == 1
    both = tiffs(tmp_path / "both", ramp(0, 255, "uint8"), ramp(0, 65535, "uint16"))
    images = read(both).images
    assert images.dtype == np.uint8
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    assert "1 of 2 images have 16 bits, of which the top 8 are used" in caplog.text
    with pytest.raises(DataError, match="all values of all images are 3: there is nothing to learn"):
        read(tiffs(tmp_path / "flat", np.full((8, 8), 3, np.float32)))


# --- shapes and channels -------------------------------------------------------------------------------


def test_what_was_done_to_shapes_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_deploy")
    for i in range(3):
        png("RGB", (20, 12)).save(tmp_path / f"{i}.png")
        png("RGBA", (8, 8)).save(tmp_path / f"small {i}.png")
    read_images(find_images(str(tmp_path)), (12, 12), 3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "for 12×12, 3 of 6 images (as one of 12×20) have other proportions and are cropped to the middle",
        "for 12×12, 3 of 6 images (as one of 8×8) are smaller and are enlarged",
        "3 of 6 images are laid on white where they are transparent: --channels rgba keeps that",
    ]


def test_transparency_is_one_thing_in_folders_and_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 4), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    (tmp_path / "x").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "x" / f"{i}.png")
    for channels in (1, 3, 4):
        folder, array = read(tmp_path / "x", channels), read(tmp_path / "x.npy", channels)
        np.testing.assert_array_equal(folder.images, array.images)
    np.testing.assert_array_equal(array.images, pixels.transpose(0, 3, 1, 2))


def test_channels_that_are_no_colours_stay(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 7), np.uint8))
    with pytest.raises(DataError, match="7 channels of 8 bits, which cannot make the 3"):
        read(tmp_path / "x.npy", 3)
    np.save(tmp_path / "f.npy", np.random.default_rng(0).random((4, 8, 8, 3), np.float32))
    assert read(tmp_path / "f.npy", 1).images.shape == (4, 1, 8, 8)
    with pytest.raises(DataError, match="3 channels of floats, which cannot make the 4"):
        read(tmp_path / "f.npy", 4)


# --- labels and archives -------------------------------------------------------------------------------


def test_names_of_classes_are_composed_and_unique(tmp_path: Path) -> None:
    for name in ("cafe\u0301", "none", "thé"):
        (tmp_path / name).mkdir()
        png("L").save(tmp_path / name / "x.png")
    assert find_images(str(tmp_path), labels=True).class_names == ("café", "none", "thé")
    (tmp_path / "café").mkdir()
    with pytest.raises(DataError, match="two folders of the name café"):
        find_images(str(tmp_path), labels=True)


def test_a_class_without_images_is_an_error(tmp_path: Path) -> None:
    class_folders(tmp_path / "pets")
    (tmp_path / "pets" / "emu").mkdir()
    (tmp_path / "pets" / "emu" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match="the class emu has no images"):
        find_images(str(tmp_path / "pets"), labels=True)
    (tmp_path / "pets" / "emu" / "x.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="of the class emu, no image can be read"):
        read_images(find_images(str(tmp_path / "pets"), labels=True), (8, 8), 1, skip_broken=True)


def test_what_is_left_out_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm_deploy")
    png("L", (8, 8)).save(tmp_path / "x.png")
    for i in range(12):
        (tmp_path / f"broken {i:02d}.png").write_bytes(b"broken")
        (tmp_path / f"{i}.txt").write_text("x")
    read(tmp_path, skip_broken=True)
    other, broken = (record.getMessage() for record in caplog.records)
    assert other == "12 files are of other kinds and left out (.txt)"
    assert broken.startswith("12 of 13 images cannot be read and are left out: ")
    assert broken.count("broken ") == 10
    assert "broken 09.png (it is not an image of a kind that is read); and" in broken
    assert broken.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("images", "labels", "chosen"),
    [
        ("x_train", "y_train", "x_train"),
        ("train_images", "train_labels", "train_images"),
        ("X", "y", "X"),
        ("arr_0", "arr_1", ""),
        ("images", "labels", ""),
    ],
)
def test_arrays_by_name(tmp_path: Path, images: str, labels: str, chosen: str) -> None:
    path = tmp_path / "x.npz"
    arrays = {images: np.ones((4, 8, 8), np.uint8), labels: np.array([[2], [0], [0], [1]], np.uint8)}
    np.savez(path, **arrays, other=np.zeros((9, 8, 8), np.uint8))
    if chosen:
        with pytest.raises(
            DataError, match=f"it holds the arrays {images}, {labels}, other, and none is named images"
        ):
            find_images(str(path))
    source = find_images(str(path), labels=True, array=chosen)
    assert source.count == 4
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 0, 1]
    with pytest.raises(DataError, match="no \\.npz"):
        find_images("digits", array="x_train")


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images.idx3-ubyte"])
def test_idx_files(tmp_path: Path, packed: bool, name: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 9), np.uint8)
    labels = np.array([3, 1, 4, 1, 0], np.uint8)
    name += ".gz" * packed
    pack = gzip.compress if packed else bytes
    (tmp_path / name).write_bytes(pack(idx(images)))
    with pytest.raises(DataError, match="has no labels: they are in a file beside it"):
        find_images(str(tmp_path / name), labels=True)
    (tmp_path / name.replace("images", "labels").replace("idx3", "idx1")).write_bytes(pack(idx(labels)))
    source = find_images(str(tmp_path / name), labels=True)
    assert source.labels is not None
    assert source.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(read_images(source, (8, 9), 1).images[:, 0], images)
    for content in (idx(images)[:-1], idx(images) + b"x", idx(images)[:6], b"\0\0\x08\3" + b"\xff" * 12):
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(DataError, match="not a whole idx file"):
            find_images(str(tmp_path / name))


def archive(path: Path, folder: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for file in sorted(folder.rglob("*")):
            made.write(file, f"{inside}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("inside", ["", "pets/"])
def test_archives_are_read_as_their_folders(tmp_path: Path, inside: str) -> None:
    folder = class_folders(tmp_path / "pets")
    path = archive(tmp_path / "pets.zip", folder, inside)
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("__MACOSX/cat/._0.png", b"x")
    for labels in (False, True):
        one, other = (find_images(str(place), labels=labels) for place in (folder, path))
        assert one.class_names == other.class_names
        assert read_images(one, (8, 8), 1).digest() == read_images(other, (8, 8), 1, workers=4).digest()
    (folder / "emu").mkdir()
    with pytest.raises(DataError, match="the class emu has no images"):
        find_images(str(archive(tmp_path / "more.zip", folder)), labels=True)


def test_archives_that_are_broken_or_lie(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", class_folders(tmp_path / "pets"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a whole \.zip archive"):
        find_images(str(path))
    at = whole.index(b"IDAT") + 4
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"1 of 9 images cannot be read: cat/0\.png in .*CRC"):
        read_images(find_images(str(path)), (8, 8), 1)
    with zipfile.ZipFile(path, "w") as empty:
        empty.writestr("notes.txt", "x")
    with pytest.raises(DataError, match="holds no images"):
        find_images(str(path))


@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_stylegan(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "x"
    (folder / "00000").mkdir(parents=True)
    for i in range(3):
        png("RGB").save(folder / "00000" / f"img{i:08d}.png")
    names = [f"00000/img{i:08d}.png" for i in range(3)]
    for labels, wanted in (
        ([[name, i] for name, i in zip(names, (1, 0, 2), strict=True)], [1, 0, 2]),
        (None, [0, 0, 0]),  # by the folders
        ([[names[0], 1]], "has no label for"),
        ([[name, [0.5, 1.0]] for name in names], "does not hold labels"),
        ([[name, 10**30] for name in names], "labels"),
    ):
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        path = archive(tmp_path / "x.zip", folder) if packed else folder
        if isinstance(wanted, str):
            with pytest.raises(DataError, match=wanted):
                find_images(str(path), labels=True)
        else:
            source = find_images(str(path), labels=True)
            assert source.labels is not None
            assert source.labels.tolist() == wanted


# --- by the command line -------------------------------------------------------------------------------


def call(*arguments: object) -> Result:
    quick = ["--sample-every", 0, "--device", "cpu", "--workers", 1]
    return CliRunner().invoke(train, [str(a) for a in (*quick, *arguments)])


NEW = ("--preset", "digits", "--steps", 1, "--batch-size", 2)


def trained(path: Path) -> Checkpoint:
    return Checkpoint.load(open_model(path))


def test_training_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tiffs(tmp_path / "scans", *(ramp(-100, 300 + i) for i in range(3))), tmp_path / "m.pt"
    monkeypatch.chdir(tmp_path)
    assert call("scans", "-o", model, "--image-size", 8, *NEW).exit_code == 0
    assert trained(model).spec.data_range == (-100, 302)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = call("--resume", model, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "not those that this model was trained on" not in result.output
    assert trained(model).settings.data == str(folder)
    folder.rename(tmp_path / "moved")
    result = call("--resume", model, "--steps", 3)
    assert result.exit_code == 1
    assert "scans does not exist" in result.output
    assert f"name it, as in ddpm-train DATA --resume {model}" in result.output
    result = call(tmp_path / "moved", "--resume", model, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "not those" not in result.output


def test_standard_input_is_no_data(tmp_path: Path) -> None:
    result = call("-", "-o", tmp_path / "m.pt")
    assert result.exit_code == 2
    assert "not from standard input" in result.stderr


def test_options_of_the_data(tmp_path: Path) -> None:
    arrays = {"x_train": np.full((4, 6, 10, 3), 200, np.uint8), "y_train": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "x.npz", **arrays, x_test=np.zeros((2, 6, 10), np.uint8))
    model = tmp_path / "m.pt"
    chosen = (
        "--array",
        "x_train",
        "--labels",
        "--image-size",
        "6x10",
        "--channels",
        "rgba",
        "--data-range",
        0,
        200,
    )
    result = call(tmp_path / "x.npz", "-o", model, *NEW, *chosen, "--json", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "checkpoint": str(model),
        "metrics": str(tmp_path / "m.train" / "metrics.csv"),
        "step": 1,
        "steps": 1,
        "loss": pytest.approx(1, abs=0.9),
        "images": 4,
        "processes": 1,
        "data_range": [0, 200],
        "class_names": [],
    }
    checkpoint = trained(model)
    assert checkpoint.spec.image_shape == (4, 6, 10)
    assert checkpoint.spec.data_range == (0, 200)
    assert checkpoint.spec.num_classes == 2
    result = call("--resume", model, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "not those" not in result.output
    for wrong, told in (
        (("--image-size", "6x"), "neither a size"),
        (("--image-size", "0x8"), "neither a size"),
        (("--data-range", 5, 5), "the smaller one first"),
        (("--data-range", "nan", 5), "the smaller one first"),
        (("--array", "z"), "none is named z"),
        (("--image-size", 7), "image size 7 is not a multiple of 2: choose 6 or 8"),
    ):
        result = call(tmp_path / "x.npz", "-o", tmp_path / "new.pt", *NEW, "--array", "x_train", *wrong)
        assert result.exit_code in (1, 2)
        assert told in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("channels", [2, 5])
def test_channels_of_an_array_are_trained(tmp_path: Path, channels: int) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((4, 8, 8, channels), np.float32))
    result = call(tmp_path / "x.npy", "-o", tmp_path / "m.pt", *NEW, "--image-size", 8, "--sample-every", 1)
    assert result.exit_code == 0, result.output
    assert trained(tmp_path / "m.pt").spec.image_shape == (channels, 8, 8)
    with Image.open(tmp_path / "m.train" / "samples-000001.png") as picture:
        assert picture.size[0] == channels * 66 + 2


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    for name in ("none", "wave"):
        (tmp_path / "signs" / name).mkdir(parents=True)
        png("L", (8, 8)).save(tmp_path / "signs" / name / "x.png")
    result = call(tmp_path / "signs", "--labels", "-o", tmp_path / "m.pt", *NEW)
    assert result.exit_code == 0, result.output
    spec = trained(tmp_path / "m.pt").spec
    assert spec.null_class
    assert spec.label("none") == 0
    assert spec.label("2") == 2  # no class


# --- other people's files ------------------------------------------------------------------------------


def turned(values: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """As EXIF defines it: what an image is that is stored as `values`."""
    flips = {2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T, 6: values[::-1].T}
    return flips.get(orientation, {7: values[::-1, ::-1].T, 8: values[:, ::-1].T, 1: values}.get(orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("dtype", "suffix"), [("uint8", "tif"), ("uint16", "tif"), ("uint8", "png"), ("uint16", "png")]
)
def test_turned_images_are_upright(tmp_path: Path, orientation: int, dtype: str, suffix: str) -> None:
    values = np.arange(96).reshape(8, 12).astype(dtype)
    folder = tmp_path / "x"
    folder.mkdir()
    extra: dict[str, Any] = {"tiffinfo": {274: orientation}}
    if suffix == "png":
        exif = Image.Exif()
        exif[274] = orientation
        extra = {"exif": exif}
    Image.fromarray(values).save(folder / f"a.{suffix}", **extra)
    wanted = turned(values, orientation)
    for place in (folder, archive(tmp_path / "x.zip", folder)):
        images = read_images(find_images(str(place)), wanted.shape, 1, data_range=(0.0, 95.0)).images
        np.testing.assert_allclose((images[0, 0] + 1) / 2 * 95, wanted, atol=1e-3)


def test_a_large_photograph_on_its_side_keeps_its_lines(tmp_path: Path) -> None:
    stored = np.zeros((400, 1600), np.uint8)
    stored[:, ::4] = stored[:, 1::4] = 255  # lines across the upright image, two pixels thick
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    images = read_images(find_images(str(tmp_path)), (1600, 400), 1).images
    assert images.std() > 90


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array([0, 1, 1e300]), "larger than float32 can hold"),
        (1e8 + np.arange(10.0), "differ in digits that float32 does not keep"),
        (10**9 + np.arange(60), "differ in digits that float32 does not keep"),
    ],
    ids=["1e300", "floats", "integers"],
)
def test_numbers_that_float32_cannot_hold_are_refused(
    tmp_path: Path, array: np.ndarray[Any, Any], told: str
) -> None:
    np.save(tmp_path / "x.npy", np.resize(array, (1, 8, 8)))
    with pytest.raises(DataError, match=told):
        read(tmp_path / "x.npy", data_range=(1e9, 1e9 + 60) if array.dtype.kind == "i" else None)


def test_a_range_that_is_given_holds_for_all_bits(tmp_path: Path) -> None:
    folder = tiffs(tmp_path / "x", ramp(0, 255, "uint8"), ramp(0, 247, "uint16"))
    data = read(folder, data_range=(0.0, 255.0))
    np.testing.assert_allclose(
        data.images[:, 0], 2 * np.stack([ramp(0, 255, "uint8"), ramp(0, 247, "uint16")]) / 255 - 1, atol=1e-6
    )


def test_a_broken_image_has_no_say_in_the_scale(tmp_path: Path) -> None:
    folder = tiffs(tmp_path / "x", ramp(0, 4095, "uint16"), ramp(0, 100, "uint16"))
    png("L").save(folder / "broken.png")
    whole = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    data = read(folder, skip_broken=True)
    assert data.data_range == (0, 4095)
    (folder / "broken.png").unlink()
    assert read(folder, known_range=data.data_range).digest() == data.digest()


def test_a_name_has_no_say_in_the_scale(tmp_path: Path) -> None:
    folder = tiffs(tmp_path / "x", ramp(0, 4095, "uint16"))
    (folder / "0.tif").rename(folder / "0.jpg")
    assert read(folder).data_range == (0, 4095)
    Image.fromarray(ramp(0, 1)).save(folder / "1.tif")
    (folder / "1.tif").rename(folder / "1.jpg")
    with pytest.raises(DataError, match="16 bits and of floats, which have no scale in common"):
        read(folder)


@pytest.mark.parametrize("nothing", [-9999, 65535, 1e20])
def test_numbers_that_stand_for_no_data_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nothing: float
) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((8, 16, 16)).astype(np.float32)
    images[rng.random(images.shape) < 0.05] = nothing
    np.save(tmp_path / "x.npy", images)
    read(tmp_path / "x.npy")
    assert "nearly all values are from " in caplog.text
    caplog.clear()
    np.save(tmp_path / "x.npy", (images > 0.5).astype(np.float32))  # nor is a mask of two values
    read(tmp_path / "x.npy")
    assert not caplog.text


def tiff(values: np.ndarray[Any, Any], **tags: int) -> bytes:
    """A TIFF of one strip, little-endian, with what Pillow does not write."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: values.nbytes, 339: 1} | {int(name[1:]): value for name, value in tags.items()}
    head = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return head + values.tobytes() + struct.pack("<H", len(entries)) + listed + bytes(4)


def test_what_tiffs_say_of_their_numbers(tmp_path: Path) -> None:
    unsigned = np.linspace(0, 4e9, 64).reshape(8, 8).astype("<u4")
    dark = ramp(0, 65535, "<u2")
    for name, content, wanted in (
        ("unsigned", tiff(unsigned), unsigned),
        ("inverted", tiff(dark, t262=0), 65535 - dark),
        ("signed", tiff(ramp(-1000, 1000, "<i2"), t339=2), ramp(-1000, 1000, "<i2")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tif").write_bytes(content)
        data = read(tmp_path / name)
        low, high = data.data_range
        np.testing.assert_allclose(
            (data.images[0, 0].astype(float) + 1) / 2 * (high - low) + low, wanted, atol=(high - low) * 1e-6
        )
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "a.tif").write_bytes(tiff(ramp(-100, 100, "int8"), t339=2))
    with pytest.raises(DataError, match="signed 8-bit numbers"):
        read(tmp_path / "bytes")


def test_a_pgm_is_of_16_bits(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + ramp(0, 65535, ">u2").tobytes())
    png("L", (8, 8)).save(tmp_path / "b.png")
    assert find_images(str(tmp_path)).depths() == {"8 bits", "16 bits"}
    np.testing.assert_array_equal(read(tmp_path).images[0, 0], ramp(0, 65535, "uint16") >> 8)


def test_archives_of_other_tools(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets")
    path = tmp_path / "x.zip"
    for prefix, separator in (("pets/", "/"), ("/pets/", "/"), ("../", "/"), ("pets\\", "\\"), ("", "\\")):
        with zipfile.ZipFile(path, "w") as made:
            made.writestr("README.txt", "pets")
            for file in folder.rglob("*.png"):
                info = zipfile.ZipInfo("x")
                info.filename = prefix + str(file.relative_to(folder)).replace("/", separator)
                made.writestr(info, file.read_bytes())
        source = find_images(str(path), labels=True)
        assert source.class_names == ("cat", "dog"), prefix
        assert source.count == 9
    with zipfile.ZipFile(path, "w") as made:
        for name in ("café", "thé"):
            made.writestr(f"{name}/x.png", (folder / "cat" / "0.png").read_bytes())
    unsaid = bytearray(path.read_bytes())  # Info-ZIP writes UTF-8, and no flag that says so
    for mark, offset in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        at = unsaid.find(mark)
        while at >= 0:
            unsaid[at + offset] &= ~0x08
            at = unsaid.find(mark, at + 1)
    path.write_bytes(unsaid)
    assert find_images(str(path), labels=True).class_names == ("café", "thé")


def test_links_to_nothing_are_broken_images(tmp_path: Path) -> None:
    png("L").save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "fetched later.png")
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: .*b\.png"):
        read(tmp_path)


def test_the_order_of_images_is_that_of_composed_names(tmp_path: Path) -> None:
    digests = set()
    for form, accent in (("nfc", "é"), ("nfd", "e\u0301")):
        folder = tmp_path / form
        folder.mkdir()
        for i, name in enumerate((accent, "f", "z")):
            Image.new("L", (8, 8), 40 * i).save(folder / f"{name}.png")
        digests.add(read(folder).digest())
    assert len(digests) == 1


def test_broken_gzip_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(bytes.fromhex("1f8b0800000000000003") + b"\xff" * 50)
    with pytest.raises(DataError, match="is not a folder"):
        find_images(str(tmp_path / "x.gz"))


def test_new_data_of_a_training_may_have_another_array(tmp_path: Path) -> None:
    images, model = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8), tmp_path / "m.pt"
    np.savez(tmp_path / "x.npz", x_train=images, other=images)
    np.savez(tmp_path / "y.npz", x_new=images, other=images)
    np.save(tmp_path / "x.npy", images)
    assert call(tmp_path / "x.npz", "--array", "x_train", "-o", model, *NEW).exit_code == 0
    for data in (("--resume", model), (tmp_path / "x.npy",), (tmp_path / "y.npz", "--array", "x_new"), ()):
        steps = trained(model).step + 1
        result = call(*data, "--resume", model, "--steps", steps)
        assert result.exit_code == 0, result.output
        assert "not those" not in result.output


def test_an_empty_name_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png("L").save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert call("").exit_code == 2
