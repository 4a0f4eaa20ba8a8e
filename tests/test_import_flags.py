"""What another's code is told on its command line: in files, pasted as it stands, and typed."""

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy.errors import SettingError
from ddpm_deploy.importers.flags import FLAGS, MonaiFlags, OpenAIFlags, all_names, names_of
from ddpm_deploy.importers.told import parse, read_flags

# From the README of improved-diffusion, its variables and the lines that use them.
README = """\
# The 64x64 model
MODEL_FLAGS="--image_size 64 --num_channels 128 --num_res_blocks 3
 --learn_sigma True"   # learned
DIFFUSION_FLAGS='--diffusion_steps 4000 --noise_schedule cosine'
export TRAIN_FLAGS="--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment"

CUDA_VISIBLE_DEVICES=0 mpiexec -n 8 python scripts/image_train.py --data_dir path/to/images \\
  $MODEL_FLAGS ${DIFFUSION_FLAGS} $TRAIN_FLAGS && echo done
python scripts/image_sample.py --model_path=/path/to/model.pt $MODEL_FLAGS --batch_size 16 --use_ddim yes
"""
OF_README = {
    "image_size": "64",
    "num_channels": 128,
    "num_res_blocks": 3,
    "learn_sigma": True,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "use_ddim": True,
}


def told(kind: type[Any], content: dict[str, Any]) -> dict[str, Any]:
    """The flags that were told, by name."""
    flags = parse(kind, content, "OpenAI")
    return {n: getattr(flags, n) for n in names_of(kind) if getattr(flags, n) is not None}


def read(tmp_path: Path, text: str, name: str = "flags.txt") -> dict[str, Any]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_flags(path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_their_readme_pasted_as_it_stands(tmp_path: Path, ends: str) -> None:
    assert told(OpenAIFlags, read(tmp_path, README.replace("\n", ends))) == OF_README


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("--image_size 64", {"image_size": "64"}),
        ("--image-size=64", {"image_size": "64"}),
        ("\ufeff--image_size 64", {"image_size": "64"}),
        ("--image_size 64 \\ \n --num_channels 128", {"image_size": "64", "num_channels": "128"}),
        ("--image_size 64\n--num_channels 128", {"image_size": "64", "num_channels": "128"}),
        ("--num_heads_upsample -1", {"num_heads_upsample": "-1"}),
        ("--channel_mult '' --image_size 64", {"channel_mult": "", "image_size": "64"}),
        ("torchrun --nproc_per_node=8 image_train.py --lr 1", {"lr": "1"}),
        ("torchrun --nproc_per_node=8 -m scripts.image_train --lr 1", {"lr": "1"}),
        ("python -m scripts.image_train --lr 1; ls -l | cat", {"lr": "1"}),
        ("--model_path a=b.pt --lr 1", {"model_path": "a=b.pt", "lr": "1"}),
        ("--model_path $CKPT --lr 1", {"model_path": "$CKPT", "lr": "1"}),
        ("X=--lr\\ 1\n", {"lr": "1"}),
        ("cd guided-diffusion\n# nothing\n--lr 1", {"lr": "1"}),
        (
            'F="--lr 1"\nF="$F --dropout 0"\nF+=" --num_heads 2"',
            {"lr": "1", "dropout": "0", "num_heads": "2"},
        ),
        ("–lr 1 —dropout 0 -–num_heads 2", {"lr": "1", "dropout": "0", "num_heads": "2"}),
        ("python x.py --lr 1 > log.txt 2>&1 &\npython x.py --lr 1 2>&1 | tee log", {"lr": "1"}),
        ("python x.py --lr 1 ^\r\n  --dropout 0", {"lr": "1", "dropout": "0"}),
    ],
)
def test_a_command_line(tmp_path: Path, text: str, wanted: dict[str, str]) -> None:
    assert read(tmp_path, text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--image_size", "--image_size has no value"),
        ("--image_size --lr 1", "--image_size has no value"),
        ("--channel_mult 1, 2", "2 is not of the form --name value"),
        ("--image_size 64 --image_size 32", "--image_size is 64 in one place and 32 in another"),
        ("python x.py $MODEL_FLAGS", "no MODEL_FLAGS="),
        ('MODEL_FLAGS="--image_size 64', "No closing quotation"),
        (
            "--dropout 0 python x.py --image_size 64",
            "--dropout stands before x.py: put it on a line of its own",
        ),
        ("# none\n", "no flag stands in it"),
        ("image_size: 64\nnum_heads: 4\n", "no flag stands in it, .* go into a .json or a .toml"),
        ("dict(image_size=64)", "no flag stands in it"),
    ],
)
def test_what_is_no_command_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read(tmp_path, text)


def test_a_hostile_text_takes_no_time(tmp_path: Path) -> None:
    read(tmp_path, "--a 1\n" * 20_000)
    with pytest.raises(SettingError, match="not a file of flags"):
        read(tmp_path, f"--a 1 {'> ' * 90_000}{'–' * 90_000}{' >' * 90_000} x")
    read(tmp_path, f'X="{"--a 1 " * 50_000}"')
    with pytest.raises(SettingError, match="is not of the form"):
        read(tmp_path, "--a 1 b " * 20_000)
    with pytest.raises(SettingError, match="too large"):
        read(tmp_path, "a" * ((1 << 20) + 1))


def test_a_file_of_values(tmp_path: Path) -> None:
    values = {"image_size": 64, "attention_resolutions": [32, 16], "timestep_respacing": 250, "lr": 1e-4}
    wanted = {"image_size": 64, "attention_resolutions": "32,16", "timestep_respacing": "250"}
    assert told(OpenAIFlags, read(tmp_path, json.dumps(values), "a.json")) == wanted
    toml = "image_size = 64\nattention_resolutions = [32, 16]\ntimestep_respacing = 250\nuse_fp16 = true\n"
    assert told(OpenAIFlags, read(tmp_path, toml, "a.toml")) == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "[1]"), ("a.json", "{"), ("a.json", "[" * 100_000), ("a.toml", "x"), ("a.txt", "\udcff")],
)
def test_a_broken_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SettingError, match="is not a file of flags"):
        read_flags(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ["yes", "TRUE", "t", "y", "1"]]
    + [(t, False) for t in ["No", "false", "f", "n", "0"]],
)
def test_words_of_truth(text: str, value: bool) -> None:
    assert parse(OpenAIFlags, {"learn_sigma": text}, "OpenAI").learn_sigma is value


def test_lists() -> None:
    assert parse(MonaiFlags, {"num_head_channels": "(8, 16)"}, "MONAI").num_head_channels == (8, 16)
    assert parse(OpenAIFlags, {"channel_mult": "1,2"}, "OpenAI").channel_mult == "1,2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_heads": "four"}, "--num_heads four is not a whole number$"),
        ({"num_heads": ""}, "--num_heads '' is not a whole number$"),
        ({"dropout": "x"}, "--dropout x is not a number$"),
        ({"learn_sigma": "maybe"}, "--learn_sigma maybe is not True or False$"),
        ({"channel_mult": [[1]]}, r"--channel_mult \[\[1\]\] is not a text"),
        ({"hidden": 1}, "--hidden cannot be told of OpenAI"),
    ],
)
def test_a_value_that_is_none(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse(OpenAIFlags, content, "OpenAI")


def test_what_is_ignored_is_no_flag_and_may_be_typed() -> None:
    for kind in FLAGS.values():
        assert not kind.ignored & set(names_of(kind))
        assert parse(kind, dict.fromkeys(kind.ignored, "x"), "") == kind()
    assert OpenAIFlags.ignored < set(all_names())


def test_an_empty_file_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "flags.txt"
    path.touch()
    with pytest.raises(SettingError) as refused:
        read_flags(path)
    assert str(refused.value) == f"{path} is empty: it was probably cut short; make it again"
