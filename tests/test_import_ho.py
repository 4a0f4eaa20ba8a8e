"""Ho's network out of pesser's, ermongroup's and w86763777's checkpoints: what they compute, and their chains.

The references are golden vectors, made beside the originals (`golden.ho`).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec, Sampling, UNetConfig
from ddpm_deploy.train.network import TorchNetwork
from tests.golden.ho import BETAS, CASES, CHAINS, FILE, SEED, SHORT, Chain, images, timesteps
from tests.importing import named_weights, predict, relative_rms
from tests.tolerances import TOLERANCES

TABLE = "time_embedding.timembedding.0.weight"
DDIM, PESSER, LISTS = "ddim, several", "pesser, last", "w86763777, one"


@cache
def golden() -> dict[str, Any]:
    with np.load(FILE) as archive:
        return dict(archive)


@cache
def state(name: str) -> dict[str, Tensor]:
    shapes = {key: tuple(shape) for key, shape in json.loads(str(golden()["shapes"]))[name].items()}
    weights = named_weights(shapes)
    if TABLE in weights:  # its own: a sine, its cosine, a sine, ...
        rows, width = shapes[TABLE]
        sines, cosines = np.split(SinusoidalEmbedding(dim=width, spacing="half").table(rows), 2, axis=1)
        weights[TABLE] = torch.from_numpy(np.stack([sines, cosines], axis=2).reshape(rows, width))
    return weights


def size(name: str) -> str:
    height, width = CASES[name].size
    return f"{height}x{width}"


def imported(
    tmp_path: Path, name: str, content: Any = None, key: str | None = None, **flags: Any
) -> Imported:
    path = tmp_path / "model.pt"
    torch.save(state(name) if content is None else content, path)
    return import_checkpoint(path, {"image_size": size(name), **flags}, key)


@pytest.mark.parametrize("name", CASES)
def test_prediction_is_that_of_the_original(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    out = predict(imported(tmp_path, name), torch.from_numpy(images(case)), torch.tensor(timesteps(case)))
    errors = [relative_rms(*pair) for pair in zip(out, golden()[name], strict=True)]
    assert max(errors) <= TOLERANCES["ho_prediction"].limit


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_a_whole_chain_is_that_of_its_own_sampler(tmp_path: Path, number: int) -> None:
    """The one that runs where nobody names a solver, steps or spacing, on the same noise."""
    chain: Chain = CHAINS[number]
    flags = {"beta_start": BETAS[0], "beta_end": BETAS[1], "num_diffusion_timesteps": SHORT, **chain.flags}
    weights = {n: t * (chain.gain if n == "tail.2.weight" else 1) for n, t in state(chain.case).items()}
    model = imported(tmp_path, chain.case, weights, **flags)
    ours = Sampler(TorchNetwork(model.network, model.spec)).sample(2, seed=SEED)
    if chain.case.startswith("w86763777"):  # which clips its images, in the end alone
        ours = ours.clip(-1, 1)
    theirs = golden()[f"chain {number}"]
    assert relative_rms(ours, theirs) <= TOLERANCES["ho_chain"].limit


def test_a_quadratic_chain_visits_equal_timesteps_once() -> None:
    """Of the two quadratic chains above: theirs have 20 steps, some of which change nothing."""
    spec = imported_spec_of_a_chain(CHAINS[3])
    table = spec.step_table()
    theirs = [int(t) for t in np.linspace(0, np.sqrt(SHORT * 0.8), 20) ** 2]
    assert len(set(theirs)) < len(theirs)
    assert table.timesteps.tolist() == sorted(set(theirs), reverse=True)


def imported_spec_of_a_chain(chain: Chain) -> ModelSpec:
    from ddpm_deploy.importers import ho
    from ddpm_deploy.importers.flags import HoFlags
    from ddpm_deploy.importers.told import Told
    from ddpm_deploy.importers.weights import Weights

    flags = HoFlags(image_size=size(chain.case), num_diffusion_timesteps=SHORT, **chain.flags)
    return ho.read(Weights("model.pt", "", state(chain.case)), Told(flags)).spec


def test_the_network_is_read_off_the_weights(tmp_path: Path) -> None:
    for name, case in CASES.items():
        model = imported(tmp_path, name)
        network = model.spec.network
        assert network is not None
        assert network.widths == tuple(case.ch * mult for mult in case.ch_mult)
        assert (network.channels, network.blocks) == (case.ch, case.blocks)
        assert network.attention_levels == case.attention
        assert model.spec.image_shape == (case.channels, *case.size)
        assert model.spec.timesteps == case.timesteps


def test_each_code_has_its_own_habits(tmp_path: Path) -> None:
    """Where no flag says otherwise: a list is ermongroup's, and samples by DDIM without clipping."""
    theirs = imported(tmp_path, DDIM, [state(DDIM), {}, 3, 5000])
    assert theirs.spec.sampling == Sampling(solver="ddim", eta=0.0)
    assert (theirs.spec.clip, theirs.spec.variance) == (False, "fixed_large")
    assert "DDIM, unclipped" in theirs.recognised[-1]
    plain = imported(tmp_path, DDIM)
    assert (plain.spec.sampling, plain.spec.clip) == (Sampling(), True)
    large = imported(tmp_path, DDIM, image_size=256)
    assert large.spec.variance == "fixed_small"  # as of LSUN
    lists = imported(tmp_path, LISTS)
    assert (lists.spec.sampling, lists.spec.clip) == (Sampling(), False)
    assumed = {assumption.flag: assumption.value for assumption in plain.assumed}
    assert assumed == {
        "num_diffusion_timesteps": 1000,
        "sample_type": "denoise",
        "var_type": "fixedlarge",
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    assert {one.flag for one in lists.assumed} == {*assumed, "mean_type"} - {
        "num_diffusion_timesteps",
        "sample_type",
    }


def test_the_average_of_a_list_is_taken_and_said(tmp_path: Path) -> None:
    raw = {f"module.{name}": tensor + 1 for name, tensor in state(DDIM).items()}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4}]}
    content = [raw, optimizer, 3, 5000, dict(state(DDIM))]
    model = imported(tmp_path, DDIM, content)
    torch.testing.assert_close(model.network.conv_out.bias, state(DDIM)["conv_out.bias"])
    assert model.recognised[0] == "weights of the entry 4, the averaged ones (others, by --key: 0)"
    assert (model.spec.provenance.weights, model.spec.provenance.step) == ("ema", 5000)
    model = imported(tmp_path, DDIM, content, key="0")
    torch.testing.assert_close(model.network.conv_out.bias, state(DDIM)["conv_out.bias"] + 1)
    assert model.spec.provenance.weights == "raw"


def test_a_checkpoint_of_pytorch_ddpm_is_taken_whole(tmp_path: Path) -> None:
    raw = {name: tensor if name == TABLE else tensor + 1 for name, tensor in state(LISTS).items()}
    content = {
        "net_model": raw,
        "ema_model": state(LISTS),
        "sched": {"last_epoch": 7},
        "optim": {"state": {}, "param_groups": []},
        "step": 7000,
        "x_T": torch.zeros(64, 3, 8, 12),
    }
    model = imported(tmp_path, LISTS, content)
    torch.testing.assert_close(model.network.conv_out.bias, state(LISTS)["tail.2.bias"])
    assert (model.spec.provenance.weights, model.spec.provenance.step) == ("ema", 7000)
    # Its trainer's whole state: the network under model., and the schedule's buffers beside it.
    content = {f"model.{name}": tensor for name, tensor in state(LISTS).items()} | {
        "betas": torch.linspace(1e-4, 0.02, 1000).double()
    }
    model = imported(tmp_path, LISTS, content)
    assert model.recognised[0] == "weights under model.; left aside: betas"


def test_its_own_table_of_timesteps_is_checked(tmp_path: Path) -> None:
    """Another number of timesteps, other frequencies and another order are each seen."""
    weights = dict(state(LISTS))
    table = weights[TABLE]
    assert imported(tmp_path, LISTS, {**weights, TABLE: table.half()}).spec.timesteps == 1000
    halves = torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)
    for wrong in (table.roll(1, 0), halves, table[:, :-2], table * 1.01):
        with pytest.raises(ArtefactError, match="not the table of timesteps that pytorch-ddpm makes"):
            imported(tmp_path, LISTS, {**weights, TABLE: wrong.contiguous()})
    with pytest.raises(SettingError, match="--num_diffusion_timesteps 4000 is not what the weights say"):
        imported(tmp_path, LISTS, num_diffusion_timesteps=4000)


FLAGS_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (DDIM, {"beta_schedule": "jsd"}, "--beta_schedule jsd is not known: choose from linear, quad, sigmoid"),
    (DDIM, {"beta_start": 0.5, "beta_end": 0.1}, "must rise between 0 and 1"),
    (DDIM, {"beta_end": float("nan")}, "must rise between 0 and 1"),
    (DDIM, {"var_type": "learned"}, "--var_type learned is not known: choose from fixedlarge, fixedsmall"),
    (DDIM, {"mean_type": "xstart"}, "--mean_type xstart is not what the weights say"),
    (LISTS, {"mean_type": "v"}, "--mean_type v is not known: choose from epsilon, xstart, xprev"),
    (LISTS, {"eta": 0.0}, "--eta is of ermongroup's ddim"),
    (DDIM, {"timesteps": 10}, "--timesteps: of --sample_type generalized or ddpm_noisy; say which"),
    (DDIM, {"sample_type": "pndm"}, "--sample_type pndm is not known"),
    (DDIM, {"sample_type": "ddpm_noisy", "eta": 1.0}, "ddpm_noisy has none"),
    (DDIM, {"sample_type": "generalized", "eta": 1.5}, "--eta 1.5 must be from 0 to 1"),
    (DDIM, {"sample_type": "generalized", "timesteps": 0}, "choose from 1 to 1000"),
    (DDIM, {"sample_type": "generalized", "timesteps": 300}, "strides of 3 then, which leave a rest"),
    (DDIM, {"sample_type": "generalized", "skip_type": "log"}, "--skip_type log is not known"),
    (DDIM, {"image_size": 9}, "images of 9×9 cannot be halved 2 times"),
    (DDIM, {"num_diffusion_timesteps": 0}, "what was told of the model makes none"),
    (DDIM, {"num_diffusion_timesteps": 10**9}, "what was told of the model makes none"),
    (DDIM, {"beta_1": 0.1}, "--beta_1 cannot be told of Ho"),
]


@pytest.mark.parametrize(("name", "flags", "said"), FLAGS_REFUSED)
def test_flags_that_make_no_such_model(tmp_path: Path, name: str, flags: dict[str, Any], said: str) -> None:
    with pytest.raises((SettingError, ArtefactError), match=said) as caught:
        imported(tmp_path, name, **flags)
    assert "\n" not in str(caught.value)


def test_uniform_timesteps_that_divide_t_are_all_of_its_own(tmp_path: Path) -> None:
    """Its code goes on to the end by T // N: 600 of 1000 are all, and 250 are 250."""
    for asked, got in ((600, 1000), (250, 250), (1, 1)):
        model = imported(tmp_path, DDIM, sample_type="generalized", timesteps=asked)
        stride = 1000 // asked
        assert model.spec.step_table().timesteps.tolist() == list(range(0, 1000, stride))[::-1]
        assert model.spec.sampling.steps == got


def _without(name: str, *starts: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state(name).items() if not key.startswith(starts)}


OTHERS: list[tuple[str, dict[str, Tensor], str]] = [
    (
        "no convolutions",
        {
            key: tensor
            for key, tensor in state(DDIM).items()
            if ".downsample." not in key and ".upsample." not in key
        },
        "resamp_with_conv: false",
    ),
    ("no middle attention", _without(DDIM, "mid.attn_1"), "mid.attn_1.norm.weight is missing"),
    ("one more", {**state(DDIM), "logvar": torch.zeros(1000)}, "logvar is not of the network"),
    (
        "attention after one block",
        _without(DDIM, "down.0.attn.1"),
        "down.0.attn.1.norm.weight is missing",
    ),
    (
        "a learned variance",
        {**state(DDIM), "conv_out.bias": torch.zeros(6)},
        "conv_out.bias is .6,., and .3,. is needed",
    ),
    ("no levels", _without(DDIM, "down."), "down.0.block.0.conv1.weight is missing"),
    ("no block", _without(LISTS, "downblocks.0"), "downblocks.0.block1.2.weight is missing"),
    ("axes", {**state(DDIM), "conv_in.weight": torch.zeros(32)}, "4 axes are needed"),
    (
        "a huge width",
        {**state(DDIM), "conv_in.weight": torch.zeros(10**6, 3, 0, 0)},
        "what was told of the model makes none",
    ),
    (
        "levels without end",
        {**state(DDIM), **{f"down.{n}.block.0.conv1.weight": torch.zeros(32, 0, 1, 1) for n in range(40)}},
        "what was told of the model makes none",
    ),
]


@pytest.mark.parametrize(("weights", "said"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_another_network_is_refused_by_name(tmp_path: Path, weights: dict[str, Tensor], said: str) -> None:
    name = LISTS if "head.weight" in weights else DDIM
    with pytest.raises((ArtefactError, SettingError), match=said) as caught:
        imported(tmp_path, name, weights)
    assert "\n" not in str(caught.value)


def test_the_cifar10_network_is_our_own(tmp_path: Path) -> None:
    """The graph of an imported one is that of our own, as both are one configuration of one network."""
    spec = imported(tmp_path, DDIM).spec
    assert spec.network is not None
    ours = msgspec.structs.replace(
        UNetConfig(), channels=32, widths=(32, 64, 64), time_width=128, attention_levels=(0, 1), dropout=0.0
    )
    assert spec.network == ours
