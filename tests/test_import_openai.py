"""OpenAI's checkpoints: golden vectors of both code bases, what their flags say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import LinearBetas, Schedule
from ddpm_deploy.spacings import openai_ddim
from ddpm_deploy.train.network import TorchNetwork
from tests.golden.openai_networks import CASES, FILE, LABELS, SEED, Case, asked
from tests.importing import named_weights, predict, relative_rms
from tests.tolerances import TOLERANCES

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(FILE) as file:
        return dict(file)


def weights(golden: dict[str, Any], name: str) -> State:
    shapes = json.loads(golden[f"{name} shapes"].tobytes())
    return named_weights({key: tuple(shape) for key, shape in shapes.items()})


def read(folder: Path, state: State, flags: dict[str, Any]) -> Imported:
    path = folder / "ema_0.9999_500000.pt"
    torch.save(state, path)
    return import_checkpoint(path, flags)


def prediction(imported: Imported, case: Case) -> Tensor:
    x, t = asked(case)
    return predict(imported, x, t, torch.tensor(LABELS) if case.flags.get("class_cond") else None)


def told(name: str, **flags: Any) -> dict[str, Any]:
    """The flags of a golden case, with others in place of some; None: not told."""
    return {key: value for key, value in {**CASES[name].flags, **flags}.items() if value is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_network_and_its_chain_are_theirs(golden: dict[str, Any], name: str, tmp_path: Path) -> None:
    case = CASES[name]
    imported = read(tmp_path, weights(golden, name), case.flags)
    assert relative_rms(prediction(imported, case), golden[f"{name} prediction"]) < TOLERANCES["openai"].limit

    wanted = golden[f"{name} chain"]
    labels = {"labels": LABELS[:1]} if case.flags.get("class_cond") else {}
    got = Sampler(TorchNetwork(imported.network, imported.spec, max_batch=1)).sample(1, seed=SEED, **labels)
    assert relative_rms(got, wanted) < TOLERANCES["openai_chain"].limit


def test_a_torso_in_half_precision_is_cast_up(golden: dict[str, Any], tmp_path: Path) -> None:
    name = "guided"
    state = weights(golden, name)
    torso = ("input_blocks", "middle_block", "output_blocks")
    half = {k: v.half() if k.startswith(torso) and "layers.0" not in k else v for k, v in state.items()}
    rounded = {key: tensor.float() for key, tensor in half.items()}
    a, b = (prediction(read(tmp_path, one, CASES[name].flags), CASES[name]) for one in (half, rounded))
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    assert 1e-5 < relative_rms(a, golden[f"{name} prediction"]) < 1e-2


def test_what_only_flags_tell_is_said_with_what_else_it_may_be(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    imported = read(tmp_path, weights(golden, "improved"), {})
    assumed = {one.flag: (one.value, one.others) for one in imported.assumed}
    assert assumed == {
        "image_size": (32, ()),  # by the multiples 1, 2, 2, 2
        "num_heads": (4, (1, 2, 8)),
        "diffusion_steps": (1000, (4000,)),
        "noise_schedule": ("linear", ("cosine",)),
        "predict_xstart": (False, (True,)),
        "sigma_small": (False, ()),
        "use_new_attention_order": (False, (True,)),
    }
    assert imported.spec.image_shape == (3, 32, 32)
    whole = told(
        "improved", diffusion_steps=1000, predict_xstart=False, sigma_small=False, noise_schedule="linear"
    )
    assert not read(
        tmp_path, weights(golden, "improved"), {**whole, "use_new_attention_order": False}
    ).assumed


def test_guided_diffusion_is_known_by_what_the_other_has_not(golden: dict[str, Any], tmp_path: Path) -> None:
    def assumed(name: str, **flags: Any) -> dict[str, Any]:
        flags = {"image_size": 8, "diffusion_steps": 4000, **flags}
        return {one.flag: one.value for one in read(tmp_path, weights(golden, name), flags).assumed}

    of_improved = assumed("improved, 4000 cosine")
    assert of_improved["rescale_timesteps"] is True
    assert "num_head_channels" not in of_improved
    assert assumed("improved, 4000 cosine", channel_mult="1,2")["rescale_timesteps"] is False
    of_guided = assumed("guided, old order")
    assert of_guided["rescale_timesteps"] is False
    assert of_guided["num_head_channels"] == -1
    assert assumed("guided, half", num_heads=1).keys() == {
        "rescale_timesteps",
        "noise_schedule",
        "predict_xstart",
    }


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("improved", {"num_channels": 64}, "--num_channels 64 is not what the weights say: they have 32"),
        ("improved", {"num_res_blocks": 3}, "--num_res_blocks 3 .* they have 1"),
        ("improved", {"channel_mult": "1,2,3,4"}, "--channel_mult 1,2,3,4 .* they have 1,2,2,2"),
        (
            "improved",
            {"channel_mult": "", "image_size": 64, "attention_resolutions": None},
            "stand for 1,2,3,4, and the weights have 1,2,2,2",
        ),
        ("improved", {"channel_mult": "1,x"}, "--channel_mult 1,x is not a list of numbers"),
        ("improved", {"attention_resolutions": "4"}, "--attention_resolutions 4 .* they have 4,2"),
        ("improved", {"image_size": 16}, "--attention_resolutions 4,2 .* they have 8,4"),
        ("improved", {"attention_resolutions": ""}, "--attention_resolutions .* is not a list of numbers"),
        ("improved", {"learn_sigma": True}, "--learn_sigma True .* they have False"),
        ("improved", {"class_cond": True}, "--class_cond True .* they have False"),
        ("improved", {"use_scale_shift_norm": False}, "--use_scale_shift_norm False .* they have True"),
        ("improved", {"resblock_updown": True}, "--resblock_updown True .* they have False"),
        ("improved", {"num_heads": 5}, "--num_heads 5 does not divide the widths of the attention .64."),
        ("improved", {"num_heads": 0}, "--num_heads 0 does not divide"),
        ("improved", {"num_head_channels": 48}, "--num_head_channels 48 does not divide"),
        (
            "improved",
            {"num_heads_upsample": 2},
            "--num_heads_upsample 2 is another number than --num_heads 4",
        ),
        ("improved", {"noise_schedule": "sigmoid"}, "--noise_schedule sigmoid is not known"),
        ("improved", {"diffusion_steps": 0}, "--diffusion_steps must be from 1"),
        ("improved", {"diffusion_steps": 10**9}, "--diffusion_steps must be from 1"),
        ("improved", {"timestep_respacing": "1001"}, "1001 is none of 1 to 1000"),
        ("improved", {"timestep_respacing": "ddim300"}, "no whole stride makes 300 steps of 1000"),
        ("improved", {"timestep_respacing": "many"}, "neither a number, as 250"),
        ("improved", {"large_size": 256, "small_size": 64}, "super-resolution, which is not supported"),
        ("improved", {"size": 3}, "--size cannot be told of OpenAI"),
        ("guided", {"class_cond": False}, "--class_cond False .* they have True"),
        ("guided", {"image_size": None, "attention_resolutions": None}, "--image_size is needed"),
    ],
)
def test_a_flag_that_says_other_than_the_weights(
    golden: dict[str, Any], tmp_path: Path, name: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        read(tmp_path, weights(golden, name), told(name, **flags))


@pytest.mark.parametrize("flags", [{"image_size": 9}, {"dropout": 1.5}, {"diffusion_steps": 12}])
def test_what_makes_no_network_is_said_in_one_line(
    golden: dict[str, Any], tmp_path: Path, flags: dict[str, Any]
) -> None:
    flags = {"attention_resolutions": None, "timestep_respacing": None, **flags}
    with pytest.raises((ArtefactError, SettingError)) as error:
        read(tmp_path, weights(golden, "improved"), told("improved", **flags))
    assert len(str(error.value).splitlines()) == 1


def test_multiples_by_themselves_and_as_written(golden: dict[str, Any], tmp_path: Path) -> None:
    flags = told("improved", image_size=32, channel_mult="", attention_resolutions="16,8")
    assert read(tmp_path, weights(golden, "improved"), flags).spec.image_shape == (3, 32, 32)
    read(tmp_path, weights(golden, "improved"), told("improved", channel_mult="1.0, 2, 2,2"))
    read(tmp_path, weights(golden, "improved"), told("improved", num_heads_upsample=-1))


@pytest.mark.parametrize(
    ("flags", "solver", "steps", "spacing", "word"),
    [
        ({}, "ddpm", None, "openai", ""),
        ({"timestep_respacing": ""}, "ddpm", None, "openai", ""),
        ({"timestep_respacing": 250}, "ddpm", 250, "openai", ""),
        ({"timestep_respacing": "ddim25", "use_ddim": "True"}, "ddim", 25, "openai-ddim", ""),
        ({"timestep_respacing": "ddim30"}, "ddpm", 30, "openai-ddim", ""),
        ({"timestep_respacing": "10,10,15"}, "ddpm", None, "openai", "takes all 1000 steps"),
        (
            {"classifier_path": "c.pt", "classifier_scale": "1.0", "classifier_depth": 4},
            "ddpm",
            None,
            "openai",
            "guidance",
        ),
    ],
)
def test_its_chain(
    golden: dict[str, Any],
    tmp_path: Path,
    flags: dict[str, Any],
    solver: str,
    steps: int | None,
    spacing: str,
    word: str,
) -> None:
    imported = read(tmp_path, weights(golden, "improved"), {"image_size": 8, **flags})
    sampling = imported.spec.sampling
    assert (sampling.solver, sampling.steps, sampling.spacing) == (solver, steps, spacing)
    assert len(imported.recognised) == 2 + bool(word)
    assert word in imported.recognised[-1]


@pytest.mark.parametrize(("total", "steps"), [(1000, 25), (1000, 30), (4000, 50), (300, 100), (7, 4)])
def test_the_stride_is_the_least_that_makes_as_many_steps(total: int, steps: int) -> None:
    stride = next(i for i in range(1, total) if len(range(0, total, i)) == steps)
    assert (
        openai_ddim(Schedule(LinearBetas().betas(total)), steps).tolist()
        == list(range(0, total, stride))[::-1]
    )


def without(state: State, *parts: str) -> State:
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


def relatives(golden: dict[str, Any]) -> dict[str, tuple[State, str]]:
    """Weights of networks that are not theirs, or are not supported, and what is said."""
    state, first = weights(golden, "improved"), "input_blocks.0.0.weight"
    learned = weights(golden, "improved, 4000 cosine")
    return {
        "super-resolution": (
            {**state, first: torch.ones(32, 6, 3, 3)},
            "takes 6 channels and gives 3: a super-res",
        ),
        "and learned": ({**learned, first: torch.ones(32, 6, 3, 3)}, "say --learn_sigma False"),
        "classifier": (without(state, "output_blocks"), "is a classifier or an encoder"),
        "signals": ({**state, first: torch.ones(32, 3, 3)}, "of dims 1"),
        "volumes": ({**state, first: torch.ones(32, 3, 3, 3, 3)}, "of dims 3"),
        "pooling": (
            without(state, ".op.", "2.conv."),
            "input_blocks.2 has no weights; .*conv_resample False",
        ),
        "latent": (
            {**state, "middle_block.1.transformer_blocks.0.norm1.weight": torch.ones(1)},
            "attends to a text",
        ),
        "vector": ({**state, "label_emb.0.0.weight": torch.ones(4, 4)}, "by a network .label_emb."),
        "missing": (without(state, "out.2.bias"), "out.2.bias is missing"),
        "stray": ({**state, "proj.weight": torch.ones(1)}, "proj.weight is not of the network"),
        "both": (
            {**without(state, "time_embed.2.b"), "z.weight": torch.ones(1)},
            "time_embed.2.bias .*, z.weight",
        ),
        "cut": (without(state, "output_blocks.7"), "make no levels"),
        "half gone": (without(state, "input_blocks.3."), "input_blocks.3 has no weights"),
        "shape": ({**state, "out.0.weight": torch.ones(31)}, r"out.0.weight is .31,., and .32,. is needed"),
        "scalar": ({**state, "out.2.weight": torch.tensor(1.0)}, "out.2.weight is .., and 4 axes"),
        "empty": ({**state, "time_embed.0.weight": torch.ones(128, 0)}, "and 2 axes of numbers are needed"),
        "odd": (
            {**state, "time_embed.0.weight": torch.ones(128, 1)},
            "what was told of the model makes none",
        ),
        "numbers": (
            {**state, "output_blocks.9999.0.weight": torch.ones(1)},
            "output_blocks.8 has no weights",
        ),
    }


RELATIVES = (
    "super-resolution,and learned,classifier,signals,volumes,pooling,latent,vector,missing,stray,both,cut"
)


@pytest.mark.parametrize(
    "name", [*RELATIVES.split(","), "half gone", "shape", "scalar", "empty", "odd", "numbers"]
)
def test_relatives_and_broken_files_are_refused_by_name(
    golden: dict[str, Any], tmp_path: Path, name: str
) -> None:
    state, message = relatives(golden)[name]
    with pytest.raises((ArtefactError, SettingError), match=message) as error:
        read(tmp_path, state, {"image_size": 8})
    assert len(str(error.value).splitlines()) == 1


def test_the_average_is_known_by_the_name_of_its_file(golden: dict[str, Any], tmp_path: Path) -> None:
    for name, kind in (("ema_0.9999_500000.pt", "ema"), ("model500000.pt", "raw"), ("schema.pt", "raw")):
        torch.save(weights(golden, "improved"), tmp_path / name)
        spec = import_checkpoint(tmp_path / name, CASES["improved"].flags).spec
        assert spec.provenance.weights == kind


def test_what_stands_beside_the_network_is_looked_at(golden: dict[str, Any], tmp_path: Path) -> None:
    """As in a file of latent diffusion, or of a Lightning module that holds its process too."""
    state = {f"model.diffusion_model.{n}": t for n, t in weights(golden, "improved").items()}
    told = CASES["improved"].flags
    betas = torch.linspace(1e-4, 0.02, 1000)
    read(tmp_path, {**state, "betas": betas}, told)
    for other, said in ((betas**0.9, "the betas in .* are not those"), (betas[:-1], "has 999 betas")):
        with pytest.raises(ArtefactError, match=said):
            read(tmp_path, {**state, "betas": other}, told)
    with pytest.raises(ArtefactError, match="an autoencoder .*first_stage_model.encoder.conv_in.weight"):
        read(tmp_path, {**state, "first_stage_model.encoder.conv_in.weight": torch.ones(1)}, told)


def test_images_of_six_channels_if_their_owner_says_so(golden: dict[str, Any], tmp_path: Path) -> None:
    state = {**weights(golden, "improved, 4000 cosine"), "input_blocks.0.0.weight": torch.ones(32, 6, 3, 3)}
    imported = read(tmp_path, state, {"image_size": 8, "learn_sigma": False})
    assert (imported.spec.image_shape[0], imported.spec.variance) == (6, "fixed_large")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("improved", {"num_heads": 2}),
        ("improved", {"use_new_attention_order": True}),
        ("improved, 4000 cosine", {"rescale_timesteps": False}),
        ("guided", {"num_head_channels": 32}),
        ("guided", {"use_new_attention_order": False}),
    ],
)
def test_what_shapes_do_not_tell_is_another_network(
    golden: dict[str, Any], tmp_path: Path, name: str, flags: dict[str, Any]
) -> None:
    imported = read(tmp_path, weights(golden, name), told(name, **flags))
    assert relative_rms(prediction(imported, CASES[name]), golden[f"{name} prediction"]) > 1e-3


OF_HEADS = ("num_heads", "num_head_channels", "use_new_attention_order")  # that hang together


def test_another_reading_of_one_flag_changes_nothing_else(golden: dict[str, Any], tmp_path: Path) -> None:
    for name in ("improved, 4000 cosine", "guided", "guided, half"):
        flags = {"image_size": 8, "diffusion_steps": 4000}
        imported = read(tmp_path, weights(golden, name), flags)
        plain = {one.flag: one.value for one in imported.assumed}
        for one in imported.assumed:
            for value in one.others:
                other = read(tmp_path, weights(golden, name), {**flags, one.flag: value})
                found = {each.flag: each.value for each in other.assumed}
                assert found == {flag: plain[flag] for flag in plain if flag in found}
                assert plain.keys() - found.keys() <= {one.flag, *OF_HEADS}


def test_heads_need_only_divide_what_attends(golden: dict[str, Any], tmp_path: Path) -> None:
    name = "guided, old order"  # its first level has 32 channels, and attention
    with pytest.raises(SettingError, match="does not divide"):
        read(tmp_path, weights(golden, name), told(name, num_heads=None, num_head_channels=64))
    imported = read(tmp_path, weights(golden, "improved"), told("improved", num_head_channels=64))
    assert imported.spec.network is not None
    assert (imported.spec.network.widths[0], imported.spec.network.head_channels) == (32, 64)


def test_the_command_line(golden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from ddpm_deploy.cli.bodies import to_onnx
    from ddpm_deploy.cli.export import main

    found = []
    monkeypatch.setattr(to_onnx, "to_onnx", lambda source, *_: found.append(source.load()))
    path, flags, name = tmp_path / "model000010.pt", tmp_path / "flags.txt", "guided, x0 on one level"
    torch.save({f"module.{key}": tensor for key, tensor in weights(golden, name).items()}, path)
    words = " ".join(f"--{key} {value}" for key, value in CASES[name].flags.items() if key != "num_heads")
    flags.write_text(
        f'MODEL_FLAGS="{words}"\nmpiexec -n 8 python image_sample.py --model_path x.pt $MODEL_FLAGS\n'
    )
    typed = [str(path), "--flags", str(flags), "--num_heads", "2", "--use_fp16", "True", "--batch-size", "16"]
    result = CliRunner().invoke(main, [*typed, "-o", str(tmp_path / "model.onnx")])
    assert result.exit_code == 0, result.output
    [(network, spec)] = found
    assert prediction(Imported(network, spec, ""), CASES[name]).shape == (3, 1, 8, 8)
    assert (spec.prediction, spec.variance, spec.sampling.steps) == ("x0", "fixed_small", 20)


def test_the_last_class_may_stand_for_none(golden: dict[str, Any], tmp_path: Path) -> None:
    """As people train for guidance with code that has no word for it."""
    state, flags = weights(golden, "guided"), CASES["guided"].flags
    plain, guided = (read(tmp_path, state, {**flags, **more}).spec for more in ({}, {"null_class": "true"}))
    assert (plain.num_classes, plain.null_class) == (guided.num_classes + 1, False)
    assert guided.null_class
    assert guided.num_labels == plain.num_labels
    with pytest.raises(SettingError, match="--null_class needs classes"):
        read(tmp_path, weights(golden, "improved"), {"null_class": "true"})
