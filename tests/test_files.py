"""Files: nothing half-written, clear refusals, and specs read out of whole, broken and hostile ones."""

import io
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_deploy.cli import main
from ddpm_deploy.errors import ArtefactError, DdpmDeployError, OutputError, SpecError
from ddpm_deploy.files import atomic, atomic_together, require_file, require_output
from ddpm_deploy.model_file import open_model
from ddpm_deploy.onnx_file import OnnxFile, protobuf_field
from ddpm_deploy.spec import SPEC_KEY, ModelSpec
from tests.models import tiny_spec


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_replaces_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert leftovers(tmp_path) == ["x.bin"]
    with atomic(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert leftovers(tmp_path) == ["x.bin"]


def test_atomic_obeys_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic(tmp_path / "x") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "x"
    link.symlink_to("folder/y")
    with atomic(link) as temporary:
        temporary.write_text("x")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "y").read_text() == "x"


def test_devices_are_no_outputs() -> None:
    with pytest.raises(OutputError, match="not a regular file"):
        require_output(Path("/dev/null"))


def test_a_full_disk_is_one_clear_error(small_disk: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left on device: free some space"),
        atomic(small_disk / "x") as file,
    ):
        file.write_bytes(bytes(1_000_000))
    assert leftovers(small_disk) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing/x.png", "does not exist"), ("folder", "is a folder"), ("file/x.png", "does not exist")],
)
def test_outputs_that_cannot_be_written(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=problem):
        require_output(tmp_path / name)


def test_missing_file_names_its_near_misses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ArtefactError, match=r"does not exist; found model\.onnx beside it"):
        require_file(tmp_path / "model.plan")


def test_names_are_shown_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist") as caught:
        require_file(tmp_path / "a\nb.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError, match="not UTF-8") as caught:
        require_file(tmp_path / "b\udcff.pt")
    str(caught.value).encode()


# --- specs in files ---------------------------------------------------------------------------------


def test_spec_of_a_checkpoint_and_of_its_export(checkpoint_path: Path, onnx_path: Path) -> None:
    spec = open_model(checkpoint_path).spec
    assert open_model(onnx_path).spec == msgspec.structs.replace(spec, same_bits=True)
    assert spec.provenance.step == 40
    assert spec.provenance.data == ""
    assert spec.image_shape == (1, 8, 8)


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
@pytest.mark.parametrize("cut", [1, 10, 100, 1000, -1, -100])
def test_truncated_files(
    tmp_path: Path, checkpoint_path: Path, onnx_path: Path, suffix: str, cut: int
) -> None:
    whole = (checkpoint_path if suffix == ".pt" else onnx_path).read_bytes()
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole[:cut])
    with pytest.raises(ArtefactError):
        assert open_model(path).spec


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_foreign_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    for content in (b"hello", bytes(1000), os.urandom(5000), b"PK\x03\x04" + bytes(100), b"\x80" * 1000):
        path.write_bytes(content)
        with pytest.raises(ArtefactError):
            assert open_model(path).spec


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_flipped_bits_never_surprise(
    tmp_path: Path, checkpoint_path: Path, onnx_path: Path, suffix: str
) -> None:
    whole = (checkpoint_path if suffix == ".pt" else onnx_path).read_bytes()
    path = tmp_path / f"x{suffix}"
    rng = np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with suppress(DdpmDeployError):
            assert open_model(path).spec


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    """A torch file is a zip with a pickle in it; ours only looks for a text in that."""
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {mark}",)

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", pickle.dumps({"a": Bomb(), SPEC_KEY: tiny_spec().to_json()}, protocol=2)
        )
    assert open_model(path).spec
    assert not mark.exists()
    torch = pytest.importorskip("torch")
    from ddpm_deploy.train.checkpoint import Checkpoint

    with pytest.raises(ArtefactError):
        Checkpoint.load(open_model(path))
    torch.save({SPEC_KEY: tiny_spec().to_json(), "format": 1, "ema": Bomb()}, path)
    with pytest.raises(ArtefactError, match="safe"):
        Checkpoint.load(open_model(path))
    assert not mark.exists()


def test_a_pickle_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 27))
    with pytest.raises(ArtefactError, match="not stored as PyTorch stores one"):
        assert open_model(path).spec


def test_an_onnx_file_of_another_maker(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out])), tmp_path / "x.onnx"
    )
    with pytest.raises(SpecError, match="carries no ModelSpec"):
        assert open_model(tmp_path / "x.onnx").spec


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("writes", [require_output, lambda path: atomic(path).__enter__()])
def test_a_signal_while_a_file_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: Callable[[Path], object]
) -> None:
    """It comes when the file is there, and nobody knows yet that it is to be removed."""
    close = os.close
    monkeypatch.setattr(os, "close", lambda file: (close(file), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        writes(tmp_path / "x.npz")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("holds", [["model_index.json"], ["scheduler/s.json", "unet/config.json"]])
@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_a_folder_of_diffusers_is_told_from_other_folders(
    tmp_path: Path, command: str, holds: list[str]
) -> None:
    """By what diffusers writes: the index of a pipeline, or the folders of its parts."""
    said = CliRunner().invoke(main, [command, str(tmp_path)])
    assert (said.exit_code, "is a folder, and a file is needed" in said.stderr) == (1, True)
    for name in holds:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    said = CliRunner().invoke(main, [command, str(tmp_path)])
    assert (said.exit_code, said.stdout) == (1, "")
    assert "was not made by ddpm-train: ddpm-export makes an .onnx of another's checkpoint" in said.stderr


NAN = protobuf_field(9, np.array([1, np.nan], np.float32).tobytes()) + protobuf_field(8, b"weight")
DATA_TYPE = bytes([2 << 3])  # the tag of a number in field 2


@pytest.mark.parametrize(
    ("data_type", "found"),
    [
        (DATA_TYPE + b"\x01", "weight"),
        (DATA_TYPE + b"\x81\x00", "weight"),  # 1 again, in more bytes than it needs
        (DATA_TYPE + b"\x07", None),  # int64
        (b"", None),  # no type, which ONNX Runtime refuses
    ],
)
def test_numbers_that_are_not_finite_are_found_by_the_type_of_their_tensor(
    tmp_path: Path, data_type: bytes, found: str | None
) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(protobuf_field(7, protobuf_field(5, data_type + NAN)))
    assert OnnxFile(path).non_finite == found


@pytest.mark.parametrize(
    "data_type",
    [protobuf_field(2, b""), DATA_TYPE, DATA_TYPE + b"\x81" * 11],
    ids=["a text without letters", "no number", "a number without end"],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_tensor_whose_type_is_no_number_is_no_whole_file(
    tmp_path: Path, data_type: bytes, last: bool
) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(protobuf_field(7, protobuf_field(5, NAN + data_type if last else data_type + NAN)))
    with pytest.raises(ArtefactError, match=r"not a whole \.onnx file"):
        assert OnnxFile(path).non_finite


@pytest.mark.parametrize("name", ["x.txt", "x", "x.plan"])
def test_names_that_are_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(io.BytesIO(b"x").read())
    with pytest.raises(ArtefactError):
        assert open_model(tmp_path / name).spec


@pytest.mark.usefixtures("ctrl_c")
def test_files_that_belong_together_get_their_names_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal between the two names waits for the second."""
    one, two = tmp_path / "one", tmp_path / "two"
    replace, names = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        names.append(target.name)
        if len(names) == 1:
            signal.raise_signal(signal.SIGINT)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_together(one, two) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert names == ["one", "two"]
    assert (one.read_text(), two.read_text()) == ("new", "new")
    with pytest.raises(ZeroDivisionError), atomic_together(one, two) as temporaries:
        temporaries[0].write_text("newer")
        raise ZeroDivisionError
    assert one.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_links_that_go_round_in_circles_are_no_output(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="loop cannot be written: too many levels of symbolic links"):
        require_output(tmp_path / "loop")


def test_a_model_is_opened_once(
    onnx_path: Path, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a command line down: its file is walked once, and its ModelSpec read once."""
    walked: list[Path] = []
    read: list[str] = []
    walk, parse = OnnxFile.__init__, ModelSpec.from_json.__func__  # type: ignore[attr-defined]

    def walks(self: OnnxFile, path: Path) -> None:
        walked.append(path)
        walk(self, path)

    def reads(cls: type[ModelSpec], text: str | bytes, source: str) -> ModelSpec:
        read.append(source)
        spec: ModelSpec = parse(cls, text, source)
        return spec

    monkeypatch.setattr(OnnxFile, "__init__", walks)
    monkeypatch.setattr(ModelSpec, "from_json", classmethod(reads))
    run = ["run", "-q", "--steps", "2", "--count", "2", "--seed", "0", "-o", tmp_path / "x.png"]
    for words, files in (
        ([*run, onnx_path], [onnx_path]),
        (["replay", "-q", onnx_path, tmp_path / "x.png"], [onnx_path]),
        (["inspect", onnx_path], [onnx_path]),
        (["run", "-q", checkpoint_path, *run[2:]], [checkpoint_path]),
        (["verify", "-q", checkpoint_path, onnx_path, "--steps", "2"], [checkpoint_path, onnx_path]),
    ):
        walked.clear()
        read.clear()
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        assert read == list(map(str, files))
        assert walked == [path for path in files if path.suffix == ".onnx"]
