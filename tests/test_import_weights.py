"""Foreign files: which tensors are taken of what they hold, and what becomes of those that are broken or hostile."""

import argparse
import io
import json
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.weights import Weights, load_tensors, read_weights

STATE = {
    "conv_in.weight": torch.arange(54.0).reshape(2, 3, 3, 3),
    "conv_in.bias": torch.tensor([0.5, -0.5]),
    "norm.num_batches_tracked": torch.tensor(7),
}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
Content = Any


def knows(names: Collection[str]) -> bool:
    return "conv_in.weight" in names


def saved(path: Path, content: Content) -> Path:
    """A file of the kind that its name says; `.old` before the suffix: of PyTorch before 1.6."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=".old" not in path.name)
    return path


def same(weights: Weights, state: dict[str, Tensor] = STATE) -> bool:
    return list(weights.state) == list(state) and all(
        torch.equal(weights.state[name], tensor) for name, tensor in state.items()
    )


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FILES = ("m.pt", "m.old.pt", "m.ckpt", "m.old.pth", "m.bin", "m.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_files_of_every_kind(tmp_path: Path, file: str) -> None:
    weights = read_weights(saved(tmp_path / file, STATE))
    assert (weights.key, weights.others, weights.described()) == ("", (), ())
    assert {name: tuple(tensor.shape) for name, tensor in weights.state.items()} == {
        name: tuple(tensor.shape) for name, tensor in STATE.items()
    }
    assert weights.state["norm.num_batches_tracked"].dtype == torch.int64


WRAPPED: list[tuple[Content, str]] = [
    (STATE, ""),
    (under("module."), ""),
    (under("_orig_mod.module."), ""),
    (under("module._orig_mod."), ""),
    (under("model."), "model."),
    (under("unet."), "unet."),
    (under("module.denoise_fn."), "module.denoise_fn."),
    ({**under("model.diffusion.net."), "betas": torch.ones(4)}, "model.diffusion.net."),
    (under("online_model.", OTHER) | under("ema_model."), "ema_model."),
]


@pytest.mark.parametrize(("content", "around"), WRAPPED)
def test_what_stands_before_the_names_is_taken_off(tmp_path: Path, content: Content, around: str) -> None:
    weights = read_weights(saved(tmp_path / "m.pt", content), knows=knows)
    assert same(weights)
    assert weights.around == around
    assert set(weights.aside) == {name for name in content if around and not name.startswith(around)}


def test_a_networks_own_names_stay_where_nothing_is_looked_for(tmp_path: Path) -> None:
    """A network of the user's own may well have all its weights under one name."""
    assert list(read_weights(saved(tmp_path / "m.pt", under("model."))).state) == list(under("model."))


ENTRIES: list[tuple[Content, str, tuple[str, ...]]] = [
    ({"state_dict": STATE, "epoch": 3}, "state_dict", ()),
    ({"model": OTHER, "ema": STATE}, "ema", ("model",)),
    ({"net_model": OTHER, "ema_model": STATE, "x_T": torch.zeros(2)}, "ema_model", ("net_model",)),
    ({"model": OTHER, "model_ema": STATE}, "model_ema", ("model",)),
    ({"net": OTHER, "shadow": STATE}, "shadow", ("net",)),
    ({"net": OTHER, "ema_0.9999": STATE}, "ema_0.9999", ("net",)),
    ({"net": OTHER, "EMA": {"model": STATE}}, "EMA.model", ("net",)),
    ({"schema": STATE, "cinema": OTHER}, "schema", ("cinema",)),  # names that only hold the letters
    ({"ema": {"online_model": OTHER, "ema_model": STATE}}, "ema.ema_model", ("ema.online_model",)),
    ([OTHER, {"state": {}}, 1, 2, STATE], "4", ("0",)),
    ([STATE, {"state": {}}, 1, 2], "0", ()),
    ({"a": {"b": {"c": STATE}}}, "a.b.c", ()),
    ({"vae": {"encoder.weight": torch.ones(3)}, "unet": STATE}, "unet", ("vae",)),  # the one that is known
    ({"optimizer": {"w.weight": torch.ones(3)}, "model": STATE}, "model", ()),
    ({1: STATE}, "1", ()),
]


@pytest.mark.parametrize(("content", "key", "others"), ENTRIES, ids=[case[1] for case in ENTRIES])
def test_the_entry_that_is_taken(tmp_path: Path, content: Content, key: str, others: tuple[str, ...]) -> None:
    """The averaged one where there is one by its name; the first that is known; and any by --key."""
    path = saved(tmp_path / "m.pt", content)
    weights = read_weights(path, knows=knows)
    assert (weights.key, weights.others) == (key, others)
    assert same(weights)
    assert same(read_weights(path, key), STATE)
    assert key in weights.described()[0]
    for other in others:
        assert read_weights(path, other).key == other
    with pytest.raises(SettingError, match=f"no weights under --key none of these: choose from .*{key}"):
        read_weights(path, "none of these")


def test_an_average_that_has_no_names_is_told(tmp_path: Path) -> None:
    listed = {"model": STATE, "ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}}
    flat = under("model.net.") | {"model_ema.netconv_inweight": torch.ones(2)}
    for content in (listed, flat):
        weights = read_weights(saved(tmp_path / "m.pt", content), knows=knows)
        assert not weights.averaged
        assert re.fullmatch("not averaged: (ema|model_ema.*) seems to hold .*", weights.described()[-1])
    for content in ({"model": STATE, "ema_rate": 0.9}, {"model": STATE, "ema": OTHER}):
        weights = read_weights(saved(tmp_path / "m.pt", content), knows=knows)
        assert "not averaged" not in " ".join(weights.described())
    both = under("model.") | under("ema.module.", OTHER)
    weights = read_weights(saved(tmp_path / "m.pt", both), knows=knows)
    assert weights.averaged
    assert weights.around == "ema.module."


def test_steps_of_the_training(tmp_path: Path) -> None:
    steps: list[tuple[Content, int]] = [
        ({"model": STATE, "step": 12}, 12),
        ({"state_dict": STATE, "global_step": 9}, 9),
        ([STATE, {}, 1, 30, STATE], 30),
        ({"model": STATE, "step": -1}, 0),
        ({"model": STATE, "step": 1 << 60}, 0),
        ({"model": STATE, "step": "many"}, 0),
        ({"model": STATE, "step": True}, 0),
        (STATE, 0),
    ]
    for content, step in steps:
        assert read_weights(saved(tmp_path / "m.pt", content)).step == step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_numbers_of_every_kind_are_read_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    content = {"a.weight": nn.Parameter(torch.ones(3, 3).to(dtype)), "n": torch.tensor([True, False])}
    state = read_weights(saved(tmp_path / "m.pt", content)).state
    assert state["a.weight"].dtype == torch.float32
    assert not state["a.weight"].requires_grad
    assert state["n"].dtype == torch.bool


def test_tensors_that_share_a_storage_or_are_turned(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    content = {"a.weight": whole, "b.weight": whole, "c.weight": whole.t()[1:]}
    state = read_weights(saved(tmp_path / "m.pt", content)).state
    torch.testing.assert_close(state["c.weight"], whole.t()[1:])


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("file", ["m.pt", "m.old.pt"])
def test_objects_are_named_and_not_made(tmp_path: Path, file: str) -> None:
    objects: list[tuple[Any, str]] = [
        (_Runs(), "exec"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ]
    for held, name in objects:
        path = saved(tmp_path / file, {"model": STATE, "args": held})
        with pytest.raises(
            ArtefactError, match=f"object of {name}, and code would run .* save the weights alone"
        ):
            read_weights(path)


def _expanded() -> Content:
    return {"a.weight": torch.zeros(1).expand(10_000, 10_000)}


def _many_of_one() -> Content:
    whole = torch.zeros(100_000)
    return {f"{n}.weight": whole for n in range(100)}


def _circle() -> Content:
    circle: dict[str, Any] = {}
    circle.update({f"n{n}": circle for n in range(300)}, list=[circle] * 100)
    return circle


def _deep() -> Content:
    deep: Any = STATE
    for _ in range(150):
        deep = [deep]
    return deep


NO_WEIGHTS = "holds no weights by name"
BROKEN = "not a whole, safe file of weights"  # what the old reader makes of what it does not know
NOT_DENSE = "a.weight is not a dense tensor"
HOSTILE: list[tuple[str, Callable[[], Content], str]] = [
    ("expanded", _expanded, "a.weight is larger than the file"),
    ("many of one", _many_of_one, "together larger than the file"),
    ("circle", _circle, NO_WEIGHTS),
    ("deep", _deep, NO_WEIGHTS),
    ("nothing", lambda: {}, NO_WEIGHTS),
    ("a tensor", lambda: torch.ones(3), NO_WEIGHTS),
    ("no text", lambda: {1: torch.ones(3), "a.weight": torch.ones(3)}, NO_WEIGHTS),
    ("names of pairs", lambda: {(1, 2): STATE}, NO_WEIGHTS),
    ("a list of tensors", lambda: [torch.ones(3)] * 9, NO_WEIGHTS),
    ("sparse", lambda: {"a.weight": torch.eye(3).to_sparse()}, NOT_DENSE),
    ("rows", lambda: {"a.weight": torch.eye(3).to_sparse_csr()}, NOT_DENSE),
    ("meta", lambda: {"a.weight": torch.empty(1 << 40, device="meta")}, NOT_DENSE),
    ("nested", lambda: {"a.weight": torch.nested.nested_tensor([torch.ones(3)])}, f"{NOT_DENSE}|{BROKEN}"),
    ("complex", lambda: {"a.weight": torch.ones(3, dtype=torch.complex64)}, "not of real numbers"),
    ("wide integers", lambda: {"a.weight": torch.ones(3).to(torch.uint16)}, f"real numbers|{BROKEN}"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["m.pt", "m.old.pt"])
@pytest.mark.parametrize(("make", "said"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_contents_that_are_no_weights(
    tmp_path: Path, file: str, make: Callable[[], Content], said: str
) -> None:
    path = saved(tmp_path / file, make())
    with pytest.raises(ArtefactError, match=said) as caught:
        read_weights(path, knows=knows)
    assert "\n" not in str(caught.value)


def test_thousands_of_entries_and_long_names(tmp_path: Path) -> None:
    many = {f"{n}": {"a.weight": torch.zeros(0)} for n in range(1000)}
    assert len(read_weights(saved(tmp_path / "m.pt", many), knows=knows).others) < 100
    names = {f"{'module.' * 500}{n}.weight": torch.zeros(0) for n in range(500)}
    assert len(read_weights(saved(tmp_path / "m.pt", names), knows=knows).state) == 500
    flat = {f"{n}.{n}.{n}.{n}.weight": torch.zeros(0) for n in range(5_000)}
    assert len(read_weights(saved(tmp_path / "m.safetensors", flat), knows=knows).state) == 5_000


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """It may unpack to any size."""
    whole, packed = saved(tmp_path / "m.pt", STATE), tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(ArtefactError, match="compressed"):
        read_weights(packed)


def test_a_damaged_number_is_seen(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", STATE)
    data = path.read_bytes()
    place = data.index(struct.pack("<3f", 10.0, 11.0, 12.0))
    path.write_bytes(data[:place] + b"\x7f" + data[place + 1 :])
    with pytest.raises(ArtefactError, match="damaged"):
        read_weights(path)


def test_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for header in (
        {"a.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
        {"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]}},
        {"a.weight": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
    ):
        text = json.dumps(header).encode()
        for length in (len(text), 1 << 60, 3):
            path.write_bytes(struct.pack("<Q", length) + text + bytes(4))
            with pytest.raises(ArtefactError, match="not a whole, safe file of weights"):
                read_weights(path)
    old = saved(tmp_path / "m.old.pt", {"a.weight": torch.ones(77)})
    data = old.read_bytes()
    assert data.count(b"M\x00") or data.count(b"KM")  # 77 as a pickle has it
    for lie in (b"J\xff\xff\xff\x7f", b"\x8a\x06" + b"\xff" * 5 + b"\x7f"):
        old.write_bytes(data.replace(b"KM", lie))
        with pytest.raises(ArtefactError):
            read_weights(old)


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_cut_short_or_spoilt(tmp_path: Path, file: str) -> None:
    """Each is one typed line, or weights that are checked by name and shape later."""
    path = saved(tmp_path / file, STATE)
    data, spoils = path.read_bytes(), random.Random(7)
    for length in {1, 9, 60, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(ArtefactError, match="cut short|not a whole, safe file") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    for _ in range(40):
        spoilt = bytearray(data)
        for _ in range(spoils.choice([1, 3, 20])):
            spoilt[spoils.randrange(len(spoilt))] = spoils.randrange(256)
        path.write_bytes(spoilt)
        with suppress(ArtefactError):
            read_weights(path, knows=knows)
    path.write_bytes(bytes(spoils.randrange(256) for _ in range(2000)))
    with pytest.raises(ArtefactError):
        load_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match="empty"):
        read_weights(path)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("word/document.xml", "<w/>")
    path = tmp_path / "m.pt"
    path.write_bytes(archive.getvalue())
    with pytest.raises(ArtefactError, match=r"an archive of files .word/document.xml. .* unpack it"):
        read_weights(path)


def _script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda: b"<!DOCTYPE html>\n<html>", "a page of text .*download it again"),
        (lambda: b'{"error":"Repository not found"}', "a page of text .*download it again"),
        (lambda: b"\x1f\x8b" + bytes(99), "an archive of files: unpack it"),
        (lambda: bytes(257) + b"ustar" + bytes(999), "an archive of files: unpack it"),
        (lambda: pickle.dumps({"ema": nn.Linear(2, 2)}), "a pickle of Python objects, as EDM's"),
        (_script, "a program of TorchScript, and not weights: save them alone"),
        (lambda: b"PK\x03\x04" + bytes(99), "cut short"),
        (lambda: b"Access denied\n", "not a whole, safe file of weights: Unsupported|name it .pt"),
    ],
)
def test_files_of_other_kinds_are_named(
    tmp_path: Path, file: str, make: Callable[[], bytes], said: str
) -> None:
    (tmp_path / file).write_bytes(make())
    with pytest.raises(ArtefactError, match=said) as caught:
        read_weights(tmp_path / file)
    assert "PyTorch 2.6" not in str(caught.value)


def test_a_file_is_read_by_what_it_begins_with(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", STATE).rename(tmp_path / "m.pt")
    assert set(read_weights(tmp_path / "m.pt").state) == set(STATE)
    saved(tmp_path / "n.pt", STATE).rename(tmp_path / "n.safetensors")
    with pytest.raises(ArtefactError, match="where torch.save wrote it, name it .pt"):
        read_weights(tmp_path / "n.safetensors")


def test_a_shape_is_checked_before_it_is_used(tmp_path: Path) -> None:
    weights = read_weights(saved(tmp_path / "m.pt", STATE))
    assert weights.shape("conv_in.weight", 4) == (2, 3, 3, 3)
    with pytest.raises(ArtefactError, match="conv_in.bias is .2,., and 4 axes are needed"):
        weights.shape("conv_in.bias", 4)
    with pytest.raises(ArtefactError, match="conv_out.weight is missing"):
        weights.shape("conv_out.weight", 4)
