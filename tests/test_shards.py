"""Runs in shards: the bytes of one process whatever made them, and what is missing, altered, hostile or another's."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.bulk.manifest import (
    LARGEST_SHARD,
    MOST_SHARDS,
    NAME,
    Manifest,
    default_shard_size,
    require_shard_folder,
)
from ddpm_deploy.bulk.merge import merge
from ddpm_deploy.bulk.shards import _seal, state, write_shard
from ddpm_deploy.errors import ArtefactError, DdpmDeployError, OutputError, SettingError
from ddpm_deploy.files import create_once
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.images import Destination, Form
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec, Provenance
from tests.models import ArrayNetwork, tiny_spec
from tests.test_cli import call, refused

# A model that the package brings, of images 3×16×16 and 12 timesteps; it needs no PyTorch. Its range is so wide that
# only floats tell its images apart.
MODEL = Path(__file__).parent.parent / "ddpm_deploy" / "doctor" / "gaussian.onnx"
SETTINGS = ("--steps", 2, "--seed", 7, "--count", 22)
RUN = (*SETTINGS, "--shards", "--shard-size", 4)  # six shards, the last of two images
SLOWER = ("--float", "--steps", 12, "--count", 440, "--shard-size", 80)  # six shards too
NAMES = [f"{i:06d}-{min(i + 3, 21):06d}.npz" for i in range(0, 22, 4)]


def run(folder: Path, *options: object) -> Any:
    """Run the shards of MODEL into a folder; what it says as JSON."""
    result = call("run", MODEL, *RUN, "-o", folder, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checked(folder: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and the findings of a check."""
    result = call("check", folder, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole run."""
    run(tmp_path / "shards")
    return tmp_path / "shards"


# --- the same bytes --------------------------------------------------------------------------------------


def test_parts_in_any_order_are_the_run(tmp_path: Path, folder: Path) -> None:
    """One process, and four parts, last first and one of them twice: the same files; merged, that of no shards."""
    for path in folder.iterdir():
        path.unlink()
    run(folder, "--float")
    assert sorted(content(folder)) == [*NAMES, NAME]
    made = [run(tmp_path / "parts", "--float", "--shard", f"{part}/4") for part in (4, 2, 1, 2, 3)]
    assert [each["shards_made"] for each in made] == [1, 2, 2, 0, 1]
    assert content(tmp_path / "parts") == content(folder)

    plain, merged = tmp_path / "plain.npz", tmp_path / "merged.npz"
    assert call("run", MODEL, *SETTINGS, "--float", "-o", plain).exit_code == 0
    told = call("merge", tmp_path / "parts", "-o", merged)
    assert told.exit_code == 0, told.output
    assert "22 images of 6 shards" in told.stdout
    assert merged.read_bytes() == plain.read_bytes()

    code, found = checked(folder)
    assert code == 0
    assert found["digest"] in told.stdout
    assert found["digest"] in call("check", folder).stdout
    assert (found["shards"], found["whole"], found["missing"], found["altered"]) == (6, 6, [], [])


def test_what_comes_next_is_what_is_missing(tmp_path: Path) -> None:
    """Parts are joined once all are there."""
    for part, told in (
        ("1/4", "4 shards of other parts are yet to come"),
        ("2/4", "2 shards of other parts are yet to come"),
        ("3/4", "1 shard of other parts is yet to come"),
        ("4/4", "join them with: ddpm-deploy merge "),
    ):
        result = call("run", MODEL, *RUN, "-o", tmp_path / "s", "--shard", part, "-v")
        assert result.exit_code == 0
        assert told in result.stderr
        assert result.stderr.count("shards of other parts") + result.stderr.count("join them") <= 1


@pytest.mark.parametrize("form", [(), ("--rgb",), ("--float",), ("--float", "--in-data-range")], ids=str)
def test_every_form_merges_to_what_a_plain_run_writes(tmp_path: Path, form: tuple[str, ...]) -> None:
    first = ("--first-index", 2**64 - 22)
    run(tmp_path / "s", *form, *first)
    assert f"{2**64 - 22}-{2**64 - 19}.npz" in content(tmp_path / "s")
    assert call("run", MODEL, *SETTINGS, *form, *first, "-o", tmp_path / "plain.npz").exit_code == 0
    assert call("merge", tmp_path / "s", "-o", tmp_path / "m.npz").exit_code == 0
    assert (tmp_path / "m.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


@pytest.mark.parametrize("labels", [(), (2, 0)])
def test_labels_are_those_of_the_whole(tmp_path: Path, labels: tuple[int, ...]) -> None:
    spec = msgspec.structs.replace(tiny_spec(), num_classes=3)
    request = Request(count=11, seed=1, first_index=4, labels=labels, steps=2).checked(spec)
    manifest = Manifest(spec=spec, request=request, shard_size=4)
    with Sampler(LabelledNetwork(spec, 8)) as sampler:
        for number in manifest.numbers():
            write_shard(tmp_path, manifest, number, sampler.draw(manifest.part(number)))
        with Destination(tmp_path / "plain.npz", request, spec).open() as write:
            for samples in sampler.draw(request):
                write(samples)
    merge(tmp_path, manifest, tmp_path / "m.npz", lambda _: None)
    assert (tmp_path / "m.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()
    turns = labels or (0, 1, 2)
    with np.load(tmp_path / "m.npz") as merged:
        assert merged["arr_1"].tolist() == [turns[i % len(turns)] for i in range(4, 15)]
        assert (merged["arr_0"].dtype, merged["arr_0"].shape) == (np.uint8, (11, 8, 8, 1))


class LabelledNetwork(ArrayNetwork):
    """A network whose answer depends on the label."""

    def predict(self, batch: int) -> None:
        """Predict, larger for a larger label."""
        super().predict(batch)
        self.memory["prediction"][:batch] *= 1 + self.memory["y"][:batch, None, None, None]


def test_archives_name_no_time(folder: Path, tmp_path: Path) -> None:
    assert call("merge", folder, "-o", tmp_path / "m.npz").exit_code == 0
    for path in (folder / NAMES[0], tmp_path / "m.npz"):
        with zipfile.ZipFile(path) as archive:
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_shard_is_an_npz_that_a_shell_can_check(folder: Path) -> None:
    with np.load(folder / NAMES[5]) as shard:
        assert {name: array.shape for name, array in shard.items()} == {"arr_0": (2, 16, 16, 3)}
    command = f'head -c -64 "{folder / NAMES[5]}" | sha256sum | cut -c -64'
    digest = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    assert (folder / NAMES[5]).read_bytes().endswith(digest.encode())


def process(folder: Path, *options: object) -> "subprocess.Popen[str]":
    """A slower run in a process of its own."""
    code = "from ddpm_deploy.cli.run import main; main()"
    arguments = (MODEL, *RUN, *SLOWER, "--batch", 1, "-o", folder, *options)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(running: "subprocess.Popen[str]", folder: Path, shards: int) -> None:
    """Wait until so many shards are there."""
    limit = time.monotonic() + 60
    while len(list(folder.glob("0*.npz"))) < shards:
        assert time.monotonic() < limit
        assert running.poll() is None
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_was_ended_twice_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It ends with the same bytes, and what was there is not made again."""
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    for shards in (1, 3):
        running = process(ended)
        wait_for(running, ended, shards)
        running.send_signal(number)
        _, said = running.communicate()
        assert running.returncode == code, said
        assert "Traceback" not in said
    there = {path: path.stat().st_ino for path in ended.glob("0*.npz")}
    assert 3 <= len(there) < 6
    last = run(ended, *SLOWER)
    assert last["shards_found"] == len(there)
    assert {path: path.stat().st_ino for path in there} == there
    run(whole, *SLOWER)
    hidden = {name for name in content(ended) if name.startswith(".")}
    assert {n: data for n, data in content(ended).items() if n not in hidden} == content(whole)
    if number != signal.SIGKILL:
        assert not hidden


def test_two_processes_at_the_same_time(tmp_path: Path) -> None:
    both = [process(tmp_path / "both") for _ in range(2)]
    for running in both:
        _, said = running.communicate()
        assert running.returncode == 0, said
    run(tmp_path / "one", *SLOWER)
    assert content(tmp_path / "both") == content(tmp_path / "one")


def test_a_file_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(number: int) -> None:
        create_once(tmp_path / "x", bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    first = (tmp_path / "x").read_bytes()
    assert first == first[:1] * 1000

    def no_links(*_: object) -> None:
        raise PermissionError("this file system has none")

    monkeypatch.setattr(os, "link", no_links)
    write(100)
    assert (tmp_path / "x").read_bytes() == first
    create_once(tmp_path / "y", b"content")
    assert sorted(content(tmp_path)) == ["x", "y"]
    assert (tmp_path / "y").read_bytes() == b"content"


def test_merging_takes_a_few_megabytes(tmp_path: Path) -> None:
    spec = tiny_spec((3, 512, 512))
    request = Request(count=60, seed=0, steps=1).checked(spec)
    manifest = Manifest(spec=spec, request=request, shard_size=20)
    for number in manifest.numbers():
        write_shard(tmp_path, manifest, number, [np.zeros((20, 3, 512, 512), np.float32)])
    tracemalloc.start()
    try:
        merge(tmp_path, manifest, tmp_path / "m.npz", lambda _: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "m.npz").stat().st_size > 60 * 3 * 512 * 512
    assert peak < 10e6


def test_names_of_versions_are_shown_in_one_line(folder: Path) -> None:
    fields = json.loads((folder / NAME).read_text())
    fields["versions"]["x\n\x1b[31m"] = "1"
    (folder / NAME).write_text(json.dumps(fields))
    said = call("run", MODEL, *RUN, "-o", folder)
    assert said.exit_code == 0
    assert "x\\n\\x1b[31m 1, here none" in said.stderr


def test_merging_says_what_helps_with_a_shard_of_other_samples(folder: Path, tmp_path: Path) -> None:
    (folder / NAMES[0]).write_bytes((folder / NAMES[1]).read_bytes())
    said = call("merge", folder, "-o", tmp_path / "m.npz")
    assert said.exit_code == 1
    assert "move that file away" in said.output
    (folder / NAMES[0]).unlink()
    run(folder)
    assert call("merge", folder, "-o", tmp_path / "m.npz").exit_code == 0


# --- faults ----------------------------------------------------------------------------------------------


def flip(place: int) -> Callable[[Path], None]:
    """What changes a bit of a file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    damage.__name__ = f"flip {place}"
    return damage


def cut(path: Path) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """Leave nothing in a file."""
    path.write_bytes(b"")


def longer(path: Path) -> None:
    """Let it go on for a terabyte, of a hole."""
    os.truncate(path, 1 << 40)


def retyped(path: Path) -> None:
    """Another array, under a right seal: as nobody does but on purpose."""
    comment = zipfile.ZipFile(path).comment
    np.savez(path, arr_0=np.zeros((4, 16, 16, 3), np.float32))
    _seal(path, comment[:-64])


def compressed(path: Path) -> None:
    """A small file that unpacks to much, under a right seal."""
    comment = zipfile.ZipFile(path).comment
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        file = io.BytesIO()
        np.lib.format.write_array(file, np.zeros((4, 16, 16, 3), np.uint8))
        archive.writestr("arr_0.npy", file.getvalue() + bytes(100_000_000))
    _seal(path, comment[:-64])


DAMAGES = [flip(300), flip(10), flip(-1), flip(-100), flip(-180), cut, empty, longer, retyped, compressed]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_altered_shard_is_told_and_made_again(
    tmp_path: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    before, path = content(folder), folder / NAMES[2]
    damage(path)
    code, found = checked(folder)
    assert (code, found["altered"], found["missing"], found["digest"]) == (1, [NAMES[2]], [], None)
    people = call("check", folder)
    assert people.exit_code == 1
    assert "5 of 6 shards are whole" in people.stdout
    output = tmp_path / "m.npz"
    output.write_text("before")
    refused(call("merge", folder, "-o", output), 1, NAMES[2], "the same ddpm-run --shards makes it again")
    assert output.read_text() == "before"
    again = call("run", MODEL, *RUN, "-o", folder)
    assert again.exit_code == 0
    assert f"{NAMES[2]} " in again.stderr
    assert "it is made again" in again.stderr
    assert content(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.npz", "shards"]


def test_a_missing_shard_is_told(tmp_path: Path, folder: Path) -> None:
    for name in (NAMES[1], NAMES[4]):
        (folder / name).unlink()
    code, found = checked(folder)
    assert (code, found["missing"], found["whole"]) == (1, [NAMES[1], NAMES[4]], 4)
    refused(call("merge", folder, "-o", tmp_path / "m.npz"), 1, f"lacks 2 of 6 shards, {NAMES[1]} first")
    assert run(folder)["shards_made"] == 2
    assert checked(folder)[0] == 0


def test_what_is_no_file_is_no_shard(folder: Path) -> None:
    """Neither is waited for: a pipe would be, for ever."""
    for name, make in ((NAMES[0], os.mkfifo), (NAMES[1], os.mkdir)):
        (folder / name).unlink()
        make(folder / name)
    (folder / NAMES[2]).unlink()
    (folder / NAMES[2]).symlink_to("nowhere")
    assert checked(folder)[1]["altered"] == NAMES[:3]


def test_shards_of_another_run_are_not_replaced(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "other", "--seed", 8)
    shutil.copy(tmp_path / "other" / NAMES[1], folder / NAMES[1])
    shutil.copy(folder / NAMES[3], folder / NAMES[4])
    before = content(folder)
    result = call("check", folder)
    assert result.exit_code == 1
    assert f"{NAMES[1]} is of another run" in result.stdout
    assert f"{NAMES[4]} holds other samples: 4 from 12 on" in result.stdout
    assert checked(folder)[1]["foreign"] == [NAMES[1], NAMES[4]]
    refused(call("merge", folder, "-o", tmp_path / "m.npz"), 1, f"{NAMES[1]} is of another run")
    refused(call("run", MODEL, *RUN, "-o", folder), 1, f"{NAMES[1]} is of another run", "move that file away")
    assert content(folder) == before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--seed", 8), "seed 7, not 8"),
        (("--steps", 3), "steps 2, not 3"),
        (("--solver", "ddim", "--eta", 0.5), "solver ddpm, not ddim; eta none, not 0.5"),
        (("--count", 23), "count 22, not 23"),
        (("--first-index", 1), "first_index 0, not 1"),
        (("--shard-size", 5), "shard size 4, not 5"),
        (("--float",), "form uint8, not float"),
        (("--share-until", 0), "share_until none, not 0"),
    ],
    ids=str,
)
def test_a_folder_of_another_run_is_refused(folder: Path, options: tuple[object, ...], problem: str) -> None:
    before = content(folder)
    told = f"is of another run ({problem}): choose another folder"
    refused(call("run", MODEL, *RUN, "-o", folder, *options), 1, told)
    assert content(folder) == before


def test_a_folder_of_a_run_that_shared_its_noise_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    assert call("run", MODEL, *RUN, "-o", folder, "--share-until", 0).exit_code == 0
    refused(call("run", MODEL, *RUN, "-o", folder), 1, "is of another run (share_until 0, not none)")


def test_a_folder_of_another_model_is_refused(folder: Path) -> None:
    mine = Manifest.load(folder)
    other = msgspec.structs.replace(mine.spec, provenance=Provenance(digest="1" * 64))
    retold = msgspec.structs.replace(mine.spec, value_range=(-1.0, 2.5))
    known = msgspec.structs.replace(mine.spec, same_bits=True)
    for spec, problem in (
        (other, f"model {mine.spec.provenance.digest[:12]}…, not 111111111111…"),
        (retold, "the same weights, and other settings of the model"),
    ):
        with pytest.raises(OutputError) as caught:
            Manifest(spec=spec, request=mine.request, shard_size=4).joined(folder, own_seed=True)
        assert f"is of another run ({problem})" in str(caught.value)
    same = Manifest(spec=known, request=mine.request, shard_size=4).joined(folder, own_seed=True)
    assert same.run == mine.run


def test_without_a_seed_it_is_that_of_the_run_that_is_there(tmp_path: Path) -> None:
    unseeded = (
        "run",
        MODEL,
        "--steps",
        2,
        "--count",
        22,
        "--shards",
        "--shard-size",
        4,
        "-o",
        tmp_path / "s",
    )
    assert call(*unseeded, "--shard", "1/2").exit_code == 0
    assert call(*unseeded, "--shard", "2/2").exit_code == 0
    assert checked(tmp_path / "s")[0] == 0


def test_another_version_is_told(folder: Path) -> None:
    manifest = json.loads((folder / NAME).read_text())
    manifest["versions"]["onnxruntime"] = "1.0.0\n"
    (folder / NAME).write_text(json.dumps(manifest))
    said = call("run", MODEL, *RUN, "-o", folder).stderr
    assert "this run was begun with onnxruntime 1.0.0\\n, here " in said


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (("--shard", "0/4"), 2, "'0/4': parts are numbered from 1 to the last"),
        (("--shard", "5/4"), 2, "'5/4': parts are numbered from 1"),
        (("--shard", "1/0"), 2, "parts are numbered from 1"),
        (("--shard", "-1/4"), 2, "'-1/4' is not of the form 3/16"),
        (("--shard", "3"), 2, "'3' is not of the form 3/16"),
        (("--shard", "9" * 30 + "/4"), 2, "not of the form 3/16"),
        (("--shard", "1/7"), 1, "the run has 6 shards: choose at most that many parts"),
        (("--shard-size", 0), 2, "0 is not in the range"),
        (("--count", 10**7, "--shard-size", 1), 1, "10000000 images in shards of 1 are 10000000 files"),
        (("--count", 10**8), 2, "100000000 is not in the range"),
        (
            ("--count", 10**7, "--shard-size", 10**7),
            1,
            "more than is kept in memory: choose a --shard-size of at most",
        ),
        (("--first-index", 2**64 - 21), 1, "first_index must be from 0 to 2^64 - count"),
        (("--snapshot", "s.npz"), 2, "--snapshot is not for --shards"),
        (("--progress", "p.png"), 2, "--progress and --force are not for --shards"),
        (("--force",), 2, "--progress and --force are not for --shards"),
        (("-o", "x.npz"), 1, "x.npz: shards go to a folder"),
        (("-o", "file"), 1, "file: shards go to a folder"),
        (("-o", "none/out"), 1, "the folder none does not exist"),
        (("-o", "other"), 1, f"other holds notes.txt, and no {NAME}"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], code: int, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    refused(call("run", MODEL, *RUN, "-o", "out", *options), code, problem)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "other"]


def test_options_of_shards_need_shards(tmp_path: Path) -> None:
    for option in (("--shard", "1/2"), ("--shard-size", 4)):
        refused(call("run", MODEL, *SETTINGS, "-o", tmp_path / "x", *option), 2, "pass --shards too")


def test_outputs_of_merge(tmp_path: Path, folder: Path) -> None:
    before = content(folder)
    refused(call("merge", folder, "-o", folder / NAMES[0]), 1, "is one of the shards")
    refused(call("merge", folder, "-o", tmp_path / "x.png"), 1, "must end in .npz")
    refused(call("merge", folder, "-o", tmp_path / "none" / "x.npz"), 1, "does not exist")
    assert content(folder) == before
    assert call("merge", folder, "-o", folder / "samples.npz").exit_code == 0
    assert checked(folder)[0] == 0


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    for command in ("check", "merge"):
        refused(call(command, tmp_path), 1, f"holds no {NAME}: it is no folder of ddpm-run --shards")
        refused(call(command, tmp_path / "none"), 1, "does not exist")
        refused(call(command, MODEL), 1, NAME)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """One line; the shards that are there are whole, and it goes on once there is room."""
    many = ("--count", 120, "--shard-size", 12)
    refused(
        call("run", MODEL, *RUN, *many, "-o", small_disk / "s"),
        1,
        "no space left on device: free some space there",
    )
    code, found = checked(small_disk / "s")
    assert code == 1
    assert found["whole"] > 3
    assert not found["altered"]
    assert not [name for name in content(small_disk / "s") if name.startswith(".")]
    run(tmp_path / "s", *many)
    (small_disk / "s").rename(small_disk / "t")
    refused(
        call("merge", tmp_path / "s", "-o", small_disk / "m.npz"), 1, "m.npz cannot be written: no space left"
    )
    assert [path.name for path in small_disk.iterdir()] == ["t"]


# --- manifests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, "was written by a newer ddpm-deploy (manifest format 2; this one knows 1)"),
        ({"format": "1"}, "Expected `int`"),
        ({"shard_size": 10**30}, "NAME is not a whole manifest"),
        ({"shard_size": 2**62}, "the shard size must be from 1 to 22"),
        ({"shard_size": 0}, "the shard size must be from 1 to 22"),
        ({"shard_size": -4}, "the shard size must be from 1 to 22"),
        ({"shards": 10**9}, "6 shards, not 1000000000"),
        ({"form": "../../x"}, "Invalid enum value"),
        ({"request": {"count": 2**62, "seed": 1}}, "1152921504606846976 files"),
        ({"request": {"count": 2**62, "seed": 1}, "shard_size": 1}, "4611686018427387904 files"),
        ({"request": {"count": 22, "seed": -1}}, "seed must be from 0"),
        ({"request": {"count": 22}}, "the request is not complete"),
        ({"request": {"count": 22, "seed": 1, "labels": ["../x"]}}, "it takes no label"),
        ({"request": {"count": 22, "seed": 1, "guidance": [2.0]}}, "guidance needs a model that knows"),
        ({"request": 3}, "Expected `object`"),
        ({"spec": {"image_shape": [10**9, 1, 1]}}, "is not valid"),
        ({"spec": None}, "is not valid"),
        ({"folder": "../../etc"}, "unknown field `folder`"),
        ({"versions": {"a": [1]}}, "Expected `str`"),
    ],
    ids=str,
)
def test_a_hostile_manifest_is_one_line(folder: Path, change: dict[str, Any], problem: str) -> None:
    told = json.loads((folder / NAME).read_text())
    if isinstance(change.get("request"), dict):
        told["request"] |= {"seed": None} | change["request"]
        change = {name: value for name, value in change.items() if name != "request"}
    told |= change
    (folder / NAME).write_text(json.dumps(told))
    before = content(folder)
    for arguments in (("check", folder), ("merge", folder), ("run", MODEL, *RUN, "-o", folder)):
        refused(call(*arguments), 1, problem.replace("NAME", NAME))
    assert content(folder) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff" * 100, b"[" * 100_000, b'{"format": 1}'], ids=len)
def test_a_broken_manifest_is_one_line(folder: Path, text: bytes) -> None:
    (folder / NAME).write_bytes(text)
    for arguments in (("check", folder), ("merge", folder), ("run", MODEL, *RUN, "-o", folder)):
        refused(call(*arguments), 1, NAME)
    assert (folder / NAME).read_bytes() == text


def test_cut_manifests(folder: Path) -> None:
    whole = (folder / NAME).read_bytes()
    for length in range(0, len(whole) - 3, 13):
        (folder / NAME).write_bytes(whole[:length])
        with pytest.raises(ArtefactError):
            Manifest.load(folder)


def test_a_manifest_of_a_hole_is_not_read(folder: Path) -> None:
    os.truncate(folder / NAME, 1 << 40)
    refused(call("check", folder), 1, "is larger than a manifest")


def test_a_manifest_says_it_all(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.spec == open_model(MODEL).spec
    assert (manifest.request.count, manifest.request.seed, manifest.request.steps) == (22, 7, 2)
    assert (manifest.shard_size, manifest.count, manifest.form) == (4, 6, "uint8")
    assert {"ddpm-deploy", "device", "numpy", "onnxruntime"} <= set(manifest.versions)
    assert [manifest.shard_name(number) for number in manifest.numbers()] == NAMES
    assert sorted(n for part in (1, 2, 3, 4) for n in manifest.numbers((part, 4))) == list(range(6))
    (folder / NAME).unlink()
    assert manifest.joined(tmp := folder.parent / "new", own_seed=True) == manifest
    assert Manifest.load(tmp).to_json() == manifest.to_json()


def test_names_sort_as_samples_do() -> None:
    spec = tiny_spec()
    request = Request(count=40, seed=0, first_index=999_980).checked(spec)
    manifest = Manifest(spec=spec, request=request, shard_size=10)
    names = [manifest.shard_name(number) for number in manifest.numbers()]
    assert names == sorted(names)
    assert names[-1] == "1000010-1000019.npz"


def test_sizes_of_shards() -> None:
    assert default_shard_size(tiny_spec()) == 256
    assert default_shard_size(tiny_spec((3, 256, 256))) == 256
    assert default_shard_size(tiny_spec((3, 1024, 1024))) == 21
    assert default_shard_size(tiny_spec((1, 4096, 4096))) == 4
    spec = tiny_spec((3, 512, 512))
    largest = LARGEST_SHARD // (4 * 3 * 512 * 512)
    request = Request(count=MOST_SHARDS * largest, seed=0, steps=1).checked(spec)
    assert Manifest(spec=spec, request=request, shard_size=largest).count == MOST_SHARDS
    with pytest.raises(SettingError, match="more than is kept in memory"):
        Manifest(spec=spec, request=request, shard_size=largest + 1)


@pytest.mark.parametrize(("channels", "form"), [(2, "rgb"), (4, "rgb")])
def test_forms_that_images_do_not_have(channels: int, form: Form) -> None:
    spec: ModelSpec = tiny_spec((channels, 8, 8))
    with pytest.raises(DdpmDeployError, match=f"images of {channels} channels do not become RGB"):
        Manifest(spec=spec, request=Request(seed=0).checked(spec), shard_size=1, form=form)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    require_shard_folder(tmp_path)
    (tmp_path / ".hidden").touch()
    require_shard_folder(tmp_path)
    (tmp_path / "x.npz").mkdir()
    require_shard_folder(tmp_path / "x.npz")  # a folder that is there may have any name
    with pytest.raises(OutputError, match=f"holds x.npz, and no {NAME}"):
        require_shard_folder(tmp_path)


def test_a_shard_that_vanishes_is_missing(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert state(folder, manifest, 0).condition == "whole"
    (folder / NAMES[0]).unlink()
    assert state(folder, manifest, 0).condition == "missing"
