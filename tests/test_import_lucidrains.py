"""denoising-diffusion-pytorch's checkpoints: its numbers are in a golden file; the whole runs where it is installed."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_deploy.errors import ArtefactError, DependencyError, SettingError
from ddpm_deploy.importers import lucidrains
from ddpm_deploy.importers.dialects import import_checkpoint
from ddpm_deploy.importers.flags import LucidrainsFlags
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.importers.told import Told
from ddpm_deploy.importers.weights import Weights
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.schedule import CosineBetas, LinearBetas, Schedule, SigmoidAlphas
from ddpm_deploy.spacings import spaced
from tests.golden import lucidrains as golden
from tests.importing import named_weights, predict, relative_rms
from tests.models import ArrayNetwork
from tests.tolerances import TOLERANCES

GOLDEN = np.load(golden.FILE)
KINDS = {"linear": LinearBetas, "cosine": CosineBetas, "sigmoid": SigmoidAlphas}
PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    found = json.loads(GOLDEN[f"shapes {name}"].tobytes())
    return {key: tuple(shape) for key, shape in found.items()}


def unet(name: str = "plain") -> dict[str, Tensor]:
    return named_weights(shapes_of(name))


def buffers(schedule: str = "sigmoid", objective: str = "pred_v", *, cut: bool = False) -> dict[str, Tensor]:
    return {
        "betas": torch.from_numpy(GOLDEN[f"betas {schedule} {golden.T}"]),
        "loss_weight": torch.from_numpy(GOLDEN[f"loss_weight {schedule} {objective} {cut}"]),
    }


def checkpoint(
    network: dict[str, Tensor], beside: dict[str, Tensor], version: Any = "2.3.4"
) -> dict[str, Any]:
    """As its Trainer writes it: the average, and beside it the network as trained, are two of each."""
    diffusion = {**beside, **{f"model.{name}": tensor for name, tensor in network.items()}}
    raw = {name: tensor + 1 if tensor.ndim else tensor for name, tensor in diffusion.items()}
    average = {
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
        **{f"online_model.{name}": tensor for name, tensor in raw.items()},
        **{f"ema_model.{name}": tensor for name, tensor in diffusion.items()},
    }
    return {
        "step": 7,
        "model": raw,
        "opt": {"state": {}, "param_groups": []},
        "ema": average,
        "scaler": None,
        "version": version,
    }


def imported_from(
    folder: Path, content: Any, flags: dict[str, Any] | None = None, key: str | None = None
) -> Imported:
    path = folder / "model-7.pt"
    torch.save(content, path)
    return import_checkpoint(path, {"image_size": 4} if flags is None else flags, key)


class Nothing(nn.Module):
    """Stands for the network where the package is not installed: the spec does not depend on it."""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Without the package: the arguments and weights that it would have been given."""
    seen: list[dict[str, Any]] = []

    def build(arguments: dict[str, Any], network: Weights) -> nn.Module:
        seen.append({**arguments, "state": network.state})
        return Nothing()

    monkeypatch.setattr(lucidrains, "_build", build)
    return seen


@pytest.fixture(scope="session")
def package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return golden.original()
        except ImportError:
            pytest.skip("denoising_diffusion_pytorch is not installed")


# --- what a checkpoint says -----------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.UNETS)
def test_the_arguments_of_unet_are_read_off_its_weights(name: str) -> None:
    wanted = golden.UNETS[name]
    told = Told(LucidrainsFlags(sinusoidal_pos_emb_theta=wanted.get("sinusoidal_pos_emb_theta", 10_000)))
    found = lucidrains.unet_arguments(Weights(name, "", unet(name)), told)
    levels, channels = len(wanted["dim_mults"]), wanted["channels"]
    usual = {
        "init_dim": wanted["dim"],
        "full_attn": (False,) * (levels - 1) + (True,),
        "attn_heads": (4,) * levels,
        "attn_dim_head": (32,) * levels,
        "sinusoidal_pos_emb_theta": 10_000,
        "out_dim": channels * (1 + wanted.get("learned_variance", False)),
    }
    ignored = ("learned_variance", "dropout")
    assert found == usual | {key: value for key, value in wanted.items() if key not in ignored}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("objective", golden.OBJECTIVES)
@pytest.mark.parametrize("schedule", golden.SCHEDULES)
def test_schedule_and_objective_are_read_off_the_buffers(
    schedule: str, objective: str, cut: bool, pretended: list[Any], tmp_path: Path
) -> None:
    """With and without min_snr_loss_weight, which cuts the weight of the loss off."""
    content = checkpoint(unet(), buffers(schedule, objective, cut=cut))
    spec = imported_from(tmp_path, content).spec
    assert (spec.timesteps, spec.prediction) == (golden.T, PREDICTIONS[objective])
    assert type(spec.schedule) is KINDS[schedule]
    assert (spec.variance, spec.value_range, spec.clip) == ("fixed_small", (-1.0, 1.0), True)


@pytest.mark.parametrize("timesteps", [golden.T, 1000])
@pytest.mark.parametrize("schedule", golden.SCHEDULES)
def test_schedules_are_its_own(schedule: str, timesteps: int) -> None:
    """To what float32 holds of a β; its sigmoid's ends are computed in float32."""
    ours = lucidrains._schedules(timesteps)[schedule].betas(timesteps)
    theirs = GOLDEN[f"betas {schedule} {timesteps}"]
    assert np.abs(ours / theirs - 1).max() <= TOLERANCES["lucidrains_betas"].limit


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 50, 100, 250, 333, 999, 1000])
def test_its_timesteps_are_ours(steps: int) -> None:
    times = torch.linspace(-1, 999, steps=steps + 1).int().tolist()[:0:-1]
    assert times == spaced("lucidrains", Schedule(LinearBetas().betas(1000)), steps).tolist()


def test_the_average_is_taken_and_key_takes_the_other(pretended: list[Any], tmp_path: Path) -> None:
    content = checkpoint(unet(), buffers())
    imported = imported_from(tmp_path, content)
    assert torch.equal(pretended[0]["state"]["init_conv.bias"], unet()["init_conv.bias"])
    assert "of version 2.3.4" in imported.recognised
    content["model"] |= buffers()  # which its Trainer changes in neither
    imported_from(tmp_path, content, key="model")
    assert torch.equal(pretended[1]["state"]["init_conv.bias"], unet()["init_conv.bias"] + 1)
    assert {one.flag for one in imported.assumed} == {
        "auto_normalize",
        "sampling_timesteps",
        "sinusoidal_pos_emb_theta",
    }


def test_of_the_weights_of_unet_alone_the_rest_is_assumed(pretended: list[Any], tmp_path: Path) -> None:
    """The version is in the names, as its norms had biases before 2.0."""
    imported = imported_from(tmp_path, unet())
    assert imported.recognised[0] == "of version 2.0 or later, by the names of its norms"
    assumed = {one.flag: one.value for one in imported.assumed}
    assert (assumed["objective"], assumed["beta_schedule"], assumed["timesteps"]) == (
        "pred_v",
        "sigmoid",
        1000,
    )
    flags = {"image_size": "4", "objective": "pred_noise", "beta_schedule": "linear", "timesteps": "500"}
    spec = imported_from(tmp_path, unet(), flags).spec
    assert (spec.prediction, spec.timesteps, spec.schedule) == ("epsilon", 500, LinearBetas(0.0002, 0.04))


def test_flags_say_how_it_samples(pretended: list[Any], tmp_path: Path) -> None:
    content = checkpoint(unet(), buffers())
    flags = {
        "image_size": "4x6",
        "sampling_timesteps": "50",
        "ddim_sampling_eta": "0.5",
        "auto_normalize": "false",
    }
    spec = imported_from(tmp_path, content, flags).spec
    own = spec.sampling
    assert (own.solver, own.steps, own.eta, own.spacing) == ("ddim", 50, 0.5, "lucidrains")
    assert (spec.image_shape, spec.value_range, spec.clip_range) == ((1, 4, 6), (0.0, 1.0), (-1.0, 1.0))


# --- chains ---------------------------------------------------------------------------------------


class Answer(ArrayNetwork):
    """The network of the golden chains."""

    def answer(self, x: Array, t: NDArray[np.int64]) -> Array:
        out = golden.answer(x, t)
        learned = self.spec.variance == "learned_range"
        both: Array = np.concatenate([out, golden.variance(x)], axis=1) if learned else out
        return both.astype(np.float32)


def chain(imported: Imported, steps: int) -> Any:
    """Our chain as the spec says, on the golden noise."""
    noise = golden.given(golden.T + 1)
    order = {
        int(t): number
        for number, t in enumerate(spaced("lucidrains", Schedule(LinearBetas().betas(golden.T)), steps))
    }
    return Sampler(Answer(imported.spec, 2)).sample(
        2, noise=lambda draw: noise[order[draw - 1] + 1 if draw else 0]
    )


@pytest.mark.parametrize("case", golden.CHAINS, ids=str)
def test_chains_are_those_of_its_samplers(
    case: tuple[str, str, int, float], pretended: list[Any], tmp_path: Path
) -> None:
    """All T steps by p_sample_loop, fewer by ddim_sample, from a checkpoint with its buffers."""
    schedule, objective, steps, eta = case
    flags = {"image_size": 4, "sampling_timesteps": steps, "ddim_sampling_eta": eta}
    imported = imported_from(tmp_path, checkpoint(unet(), buffers(schedule, objective)), flags)
    assert (
        relative_rms(chain(imported, steps), GOLDEN[f"chain {case}"]) <= TOLERANCES["lucidrains_chain"].limit
    )


@pytest.mark.parametrize("schedule", golden.SCHEDULES)
def test_chains_of_a_learned_variance_are_its_own(
    schedule: str, pretended: list[Any], tmp_path: Path
) -> None:
    """Its loss is that of ε whatever objective it was told, and so was pred_v's default."""
    beside = buffers(schedule, "pred_v")
    state = {**unet("plain"), "final_conv.weight": torch.ones(2, 8, 1, 1), "final_conv.bias": torch.ones(2)}
    imported = imported_from(tmp_path, checkpoint(state, beside))
    assert (imported.spec.variance, imported.spec.prediction) == ("learned_range", "epsilon")
    error = relative_rms(chain(imported, golden.T), GOLDEN[f"learned {schedule}"])
    assert error <= TOLERANCES["lucidrains_chain"].limit


# --- what is refused ------------------------------------------------------------------------------


def old_unet() -> dict[str, Tensor]:
    """The names of the norms before 2.0."""
    return {
        name.replace("norm.g", "norm.weight") if ".block" in name else name: tensor
        for name, tensor in unet().items()
    }


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [
        (
            "1.7.1",
            old_unet(),
            "is of version 1.7.1 of denoising-diffusion-pytorch, which standardises its weights",
        ),
        ("0.27.3", old_unet(), "which standardises its weights"),
        (
            "1.11.1",
            old_unet(),
            "is of version 1.11.1 of denoising-diffusion-pytorch, whose network is another",
        ),
        ("0.27.2", old_unet(), "whose network is another"),
        (None, old_unet(), "a version before 2.0, by the names of its norms"),
        (5, old_unet(), "a version before 2.0, by the names of its norms"),
        ("1.7.1", unet(), "which standardises its weights"),
        ("2.0.0", old_unet(), "is of version 2.0.0"),
    ],
)
def test_versions_before_2_are_refused(version: Any, state: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=re.escape(said)) as caught:
        imported_from(tmp_path, checkpoint(state, buffers(), version))
    assert "my_package.models:build --weights FILE --spec FILE" in str(caught.value)


def changed(**tensors: Any) -> dict[str, Tensor]:
    return {**unet(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            changed(init_conv__weight=torch.ones(8, 2, 7, 7)),
            "conditioned on its own last x̂0 (self_condition)",
        ),
        (changed(init_conv__weight=torch.ones(8, 3, 7, 7)), "takes 3 channels and gives 1"),
        (changed(init_conv__weight=torch.ones(8, 1, 7)), "no network of images, as a Unet1D"),
        (changed(time_mlp__0__weights=torch.ones(8)), "logarithm of the signal-to-noise ratio"),
        (changed(classes_emb__weight=torch.ones(3, 8)), "classifier_free_guidance"),
        (changed(time_mlp__1__weight=torch.ones(3, 8)), "is not whole"),
        (changed(downs__0__2__mem_kv=torch.ones(3)), "downs.0.2.mem_kv is (3,)"),
        ({k: v for k, v in unet().items() if k != "final_conv.weight"}, "final_conv.weight is missing"),
    ],
)
def test_other_networks_of_the_package_are_refused_by_name(
    state: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=re.escape(said)):
        imported_from(tmp_path, checkpoint(state, buffers()))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"betas": torch.linspace(0.1, 0.2, golden.T) ** 3}, "of no schedule that is known"),
        ({"betas": torch.zeros(0)}, "betas is (0,)"),
        ({"betas": torch.ones(2, 100)}, "betas is (2, 100)"),
        ({"loss_weight": torch.linspace(1, 2, golden.T)}, "of none of the objectives"),
        ({"loss_weight": torch.ones(3)}, "loss_weight is (3,)"),
        ({"betas": torch.full((golden.T,), float("nan"))}, "not finite"),
    ],
)
def test_buffers_that_are_not_its_own_are_refused(
    beside: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=re.escape(said)):
        imported_from(tmp_path, checkpoint(unet(), {**buffers(), **beside}))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"image_size": None}, "--image_size is needed"),
        ({"image_size": "5"}, "must be multiples of 2"),
        ({"objective": "pred_x0"}, "they have pred_v"),
        ({"beta_schedule": "linear"}, "they have sigmoid"),
        ({"timesteps": "1000"}, "they have 200"),
        ({"dim_mults": "1,2,4"}, "they have (1, 2)"),
        ({"dim": "16"}, "they have 8"),
        ({"attn_heads": "8"}, "they have (4,)"),
        ({"self_condition": "true"}, "they have False"),
        ({"sampling_timesteps": "201"}, "not from 1 to 200"),
        ({"sampling_timesteps": "0"}, "not from 1 to 200"),
        ({"sampling_timesteps": "50", "ddim_sampling_eta": "2"}, "sampling.eta"),
        ({"dropout": "0.1"}, "--dropout cannot be told of lucidrains"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    flags = {name: value for name, value in {"image_size": "4", **told}.items() if value is not None}
    with pytest.raises(SettingError, match=re.escape(said)):
        imported_from(tmp_path, checkpoint(unet(), buffers()), flags)


def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    with pytest.raises(DependencyError, match="pip install .*denoising[-_]diffusion[-_]pytorch"):
        imported_from(tmp_path, checkpoint(unet(), buffers()))


# --- with the package -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.UNETS)
def test_predictions_are_its_own(name: str, package: Any, tmp_path: Path) -> None:
    """Also those of the golden file, made by version 2.3.4."""
    theta = golden.UNETS[name].get("sinusoidal_pos_emb_theta", 10_000)
    flags = {"image_size": 8, "sinusoidal_pos_emb_theta": theta}
    imported = imported_from(tmp_path, unet(name), flags)
    x = torch.from_numpy(golden.inputs(golden.UNETS[name]["channels"]))
    error = relative_rms(predict(imported, x, torch.tensor(golden.TIMESTEPS)), GOLDEN[f"prediction {name}"])
    assert error <= TOLERANCES["lucidrains_network"].limit


def test_weights_that_do_not_fit_their_own_shapes_are_refused(package: Any, tmp_path: Path) -> None:
    for state, said in (
        (changed(mid_attn__mem_kv=torch.ones(2, 3, 4, 32)), "mid_attn.mem_kv is (2, 3, 4, 32)"),
        (changed(top__weight=torch.ones(3)), "top.weight is not of the network"),
        ({k: v for k, v in unet().items() if k != "ups.0.0.mlp.1.bias"}, "ups.0.0.mlp.1.bias is missing"),
    ):
        with pytest.raises(ArtefactError, match=re.escape(said)):
            imported_from(tmp_path, checkpoint(state, buffers()))


def test_a_trained_model_exports_and_samples_as_there(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training steps: checkpoint → .onnx → ONNX Runtime, against its p_sample_loop and ddim_sample."""
    from ddpm_deploy.export.graph import export_onnx

    torch.manual_seed(0)
    diffusion = package.GaussianDiffusion(
        package.Unet(dim=8, dim_mults=(1, 2), channels=1), image_size=8, timesteps=40
    )
    diffusion.load_state_dict({f"model.{name}": tensor for name, tensor in unet().items()}, strict=False)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3)
    for _ in range(5):
        loss = diffusion(torch.rand(4, 1, 8, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    diffusion.eval()
    state = diffusion.state_dict()
    beside = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    network = {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}
    imported = imported_from(tmp_path, checkpoint(network, beside), {"image_size": 8})
    export_onnx(imported.network, imported.spec, tmp_path / "model.onnx")

    draws = torch.randn(41, 2, 1, 8, 8)
    with Sampler.load(tmp_path / "model.onnx", backend="onnxruntime") as sampler:
        for steps, chain in ((40, {}), (7, {"solver": "ddim", "steps": 7, "eta": 0.5})):
            order = {
                int(t): number
                for number, t in enumerate(spaced("lucidrains", Schedule(LinearBetas().betas(40)), steps))
            }
            mine = sampler.sample(
                2, noise=lambda draw, o=order: draws[o[draw - 1] + 1 if draw else 0].numpy(), **chain
            )
            diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, steps < 40
            diffusion.ddim_sampling_eta = 0.5
            drawn = iter(draws)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *size, d=drawn, **kind: next(d))
                patch.setattr(torch, "randn_like", lambda x, d=drawn: next(d))
                theirs = diffusion.sample(2) * 2 - 1
            assert relative_rms(mine, theirs) <= TOLERANCES["lucidrains_onnx"].limit
