"""A network of the user's own: exported by its factory, weights and spec, and sampled as its own loop samples it."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from ddpm_deploy import ModelSpec, Sampler
from ddpm_deploy.cli import main as ddpm_deploy
from ddpm_deploy.embedding import SinusoidalEmbedding, TimestepItself
from ddpm_deploy.errors import ArtefactError, DdpmDeployError, ParityError, SettingError
from ddpm_deploy.importers.template import TEMPLATE
from ddpm_deploy.onnx_file import OnnxFile
from ddpm_deploy.schedule import CosineBetas
from ddpm_deploy.spec import UNetConfig
from tests.tolerances import TOLERANCES

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ddpm_deploy.export import graph  # noqa: E402
from ddpm_deploy.export.graph import export_onnx  # noqa: E402
from ddpm_deploy.importers.module import load_module, make_network, read_spec, unwrapped  # noqa: E402
from ddpm_deploy.importers.own import OwnNetwork, adapt  # noqa: E402
from ddpm_deploy.train.checkpoint import new_network  # noqa: E402
from ddpm_deploy.train.noise import AddressedRandn  # noqa: E402
from tests.importing import randomise  # noqa: E402

HERE = "tests.test_own_module"
T = 40
COUNT, SEED = 3, 7


class SinusoidalPosEmb(nn.Module):  # type: ignore[misc]
    """As in the annotated tutorial."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, time: Any) -> Any:
        half = self.dim // 2
        embeddings = math.log(10000) / (half - 1)
        embeddings = torch.exp(torch.arange(half, device=time.device) * -embeddings)
        embeddings = time[:, None] * embeddings[None, :]
        return torch.cat((embeddings.sin(), embeddings.cos()), dim=-1)


class Block(nn.Module):  # type: ignore[misc]
    """Convolutions with a norm between, to which what is known of the step is added."""

    def __init__(self, channels_in: int, channels: int, emb: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.emb = nn.Linear(emb, channels)
        self.act = nn.SiLU(inplace=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Any, emb: Any) -> Any:
        h = self.act(self.norm(self.conv1(x))) + self.emb(emb)[:, :, None, None]
        return self.conv2(self.dropout(h))


class Tutorial(nn.Module):  # type: ignore[misc]
    """forward(x, t): a U-Net of two levels whose embedding is inside; strided and transposed convolutions."""

    def __init__(self, channels: int = 3, out: int | None = None) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(SinusoidalPosEmb(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
        self.down = Block(channels, 16, 32)
        self.shrink = nn.Conv2d(16, 16, 4, 2, 1)
        self.middle = Block(16, 16, 32)
        self.grow = nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.up = Block(32, 16, 32)
        self.last = nn.Conv2d(16, out or channels, 1)

    def embedded(self, time: Any) -> Any:
        return self.time_mlp(time)

    def forward(self, x: Any, time: Any, y: Any = None) -> Any:
        emb = self.embedded(time) if y is None else self.embedded(time) + self.label(y)
        h = self.down(x, emb)
        middle = self.grow(self.middle(self.shrink(h), emb))
        return self.last(self.up(torch.cat((middle, h), dim=1), emb))


class Looked(Tutorial):
    """forward(x, t) with a learned table of T embeddings, which takes whole numbers; it gives x0, as .sample."""

    def __init__(self) -> None:
        super().__init__(1)
        self.time_mlp = nn.Embedding(T, 32)

    def forward(self, x: Any, step: Any) -> Any:
        return dataclasses.make_dataclass("Output", ["sample"])(super().forward(x, step))


class Dome(nn.Module):  # type: ignore[misc]
    """As dome272's: batch norm, multi-head attention on pixels, bilinear upsampling; t in floats that begin at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.GELU())
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(32, 16))
        self.pool = nn.MaxPool2d(2)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.ln = nn.LayerNorm([16])
        self.ff = nn.Sequential(nn.LayerNorm([16]), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.outc = nn.Conv2d(32, 3, kernel_size=1)

    def forward(self, x: Any, t: Any) -> Any:
        t = t.unsqueeze(-1).type(torch.float)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, 32, 2).float() / 32))
        t = torch.cat([torch.sin(t.repeat(1, 16) * inv_freq), torch.cos(t.repeat(1, 16) * inv_freq)], dim=-1)
        h = self.inc(x)
        low = self.pool(h) + self.emb_layer(t)[:, :, None, None]
        size = low.shape[-1]
        rows = low.view(-1, 16, size * size).swapaxes(1, 2)
        normed = self.ln(rows)
        rows = self.mha(normed, normed, normed)[0] + rows
        rows = self.ff(rows) + rows
        low = rows.swapaxes(2, 1).view(-1, 16, size, size)
        return self.outc(torch.cat([h, self.up(low)], dim=1))


class Conditional(Tutorial):
    """forward(x, t, y), which learned its variance: 2C channels."""

    def __init__(self) -> None:
        super().__init__(3, 6)
        self.label = nn.Embedding(5, 32)

    def forward(self, x: Any, timesteps: Any, classes: Any) -> Any:
        return (super().forward(x, timesteps, classes),)


class Embedded(Tutorial):
    """forward(x, temb): its embedding is made outside."""

    def embedded(self, time: Any) -> Any:
        assert time.shape[1] == 16
        return self.time_mlp[1:](time)


@dataclass(frozen=True)
class Case:
    """A network, what its spec file says beyond the template, and its own loop in numbers.

    feed: what it is given for t. alphas, betas come of T and the schedule; prediction, variance, clip as in the spec.
    """

    make: Callable[[], Any]
    spec: dict[str, str]
    feed: Callable[[Any], Any]
    prediction: str = "epsilon"
    variance: str = "fixed_large"
    clip: bool = True
    labels: tuple[int, ...] | None = None
    channels: int = 3
    size: tuple[int, int] = (8, 8)
    cosine: bool = False


def sines(t: Any) -> Any:
    """improved-diffusion's embedding: cosines first."""
    angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(8).double() / 8)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


CASES = {
    "tutorial": Case(
        Tutorial, {"variance": '"fixed_small"'}, lambda t: t, variance="fixed_small", size=(8, 12)
    ),
    "looked_up": Case(
        Looked,
        {"prediction": '"x0"', "schedule": '"cosine"', "value_range": "[-1, 1]"},
        lambda t: t,
        prediction="x0",
        channels=1,
        cosine=True,
    ),
    "dome": Case(
        Dome,
        {"clip": "false", "embedding": '{ kind = "timestep", offset = 1 }'},
        lambda t: (t + 1).float(),
        clip=False,
    ),
    "conditional": Case(
        Conditional,
        {
            "variance": '"learned_range"',
            "num_classes": "5",
            "class_names": '["a", "b", "c", "d", "e\\u0301"]',
            "embedding": '{ kind = "timestep", scale = 0.025 }',
        },
        lambda t: t.double().mul(0.025).float(),
        variance="learned_range",
        labels=(4, 0, 2),
    ),
    "embedded": Case(
        Embedded,
        {
            "embedding": '{ kind = "sinusoidal", dim = 16, spacing = "half", order = "cos-sin" }',
            "prediction": '"v"',
        },
        sines,
        prediction="v",
    ),
}


# The factories that the command line is told.
tutorial, looked_up, dome, conditional, embedded = (case.make for case in CASES.values())


def spec_text(**told: str) -> str:
    """The template, with other values for some of its keys, and more of them."""
    lines = {line.partition(" ")[0]: line.partition("#")[0] for line in TEMPLATE.splitlines()}
    lines |= {name: f"{name} = {value}" for name, value in ({"timesteps": str(T)} | told).items()}
    return "\n".join(lines.values())


def case_spec(case: Case) -> str:
    height, width = case.size
    return spec_text(**{"image_shape": f"[{case.channels}, {height}, {width}]"} | case.spec)


def ancestral(case: Case, network: Any) -> NDArray[np.float32]:
    """DDPM's algorithm 2 as people write it, around the original network, on the addressed noise."""
    if case.cosine:
        f = torch.cos((torch.arange(T + 1).double() / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alphas = 1 - betas
    bars = torch.cumprod(alphas, 0)
    y = () if case.labels is None else (torch.tensor(case.labels),)
    with torch.no_grad(), AddressedRandn(reversed(range(T)), seed=SEED):
        x = torch.randn(COUNT, case.channels, *case.size).double()
        for t in reversed(range(T)):
            out = network(x.float(), case.feed(torch.full((COUNT,), t)), *y)
            out = getattr(out, "sample", out)
            out = (out[0] if isinstance(out, tuple) else out).double()
            out, v = out[:, : case.channels], out[:, case.channels :]
            before = bars[t - 1] if t else torch.tensor(1.0).double()
            x0 = {
                "epsilon": lambda: (x - (1 - bars[t]).sqrt() * out) / bars[t].sqrt(),  # noqa: B023
                "v": lambda: bars[t].sqrt() * x - (1 - bars[t]).sqrt() * out,  # noqa: B023
                "x0": lambda: out,  # noqa: B023
            }[case.prediction]()
            x0 = x0.clamp(-1, 1) if case.clip else x0
            mean = before.sqrt() * betas[t] * x0 + alphas[t].sqrt() * (1 - before) * x
            mean = mean / (1 - bars[t])
            small = betas[t] * (1 - before) / (1 - bars[t])
            variance = {
                "fixed_small": lambda: small,  # noqa: B023
                "fixed_large": lambda: betas[t],  # noqa: B023
                "learned_range": lambda: torch.exp(
                    (v + 1) / 2 * betas[t].log() + (1 - v) / 2 * small.log()  # noqa: B023
                ),
            }[case.variance]
            x = mean + (variance().sqrt() * torch.randn_like(x.float()) if t else 0)
    return x.float().numpy()


def run(*args: str | Path, code: int = 0) -> Result:
    """Run ddpm-deploy."""
    result = CliRunner().invoke(ddpm_deploy, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result


def refused(*args: str | Path, code: int = 1) -> str:
    """Run a command that must fail in one line."""
    lines = run(*args, code=code).output.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    return errors[0]


@pytest.fixture(autouse=True)
def _at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder; what commands put on the path is of one test."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)


def trained(case: Case, name: str) -> Any:
    """The network with weights that are not trivial; the tutorial's after real steps of training."""
    torch.manual_seed(0)
    network = case.make()
    randomise(network)
    if isinstance(network, Dome):
        network.inc[1].running_mean.normal_()
        network.inc[1].running_var.uniform_(0.5, 2)
    if name == "tutorial":
        optimizer, x = torch.optim.Adam(network.parameters(), 1e-3), torch.rand(16, 3, *case.size) * 2 - 1
        for _ in range(10):
            noise, t = torch.randn_like(x), torch.randint(T, (16,))
            bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)[t][:, None, None, None]
            loss = F.mse_loss(network(bars.sqrt() * x + (1 - bars).sqrt() * noise, t), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_chain_of_its_onnx_is_that_of_its_own_loop(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    network = trained(case, name)
    average = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"model": case.make().state_dict(), "ema": average, "epoch": 3}, "ckpt.pt")
    Path("spec.toml").write_text(case_spec(case))
    said = run("export", f"{HERE}:{name}", "--weights", "ckpt.pt", "--spec", "spec.toml", "-v").output
    takes = {"dome": "int64", "conditional": "float32", "embedded": "embedding"}.get(name, "int64")
    assert takes in said
    labels = case.labels
    with Sampler.load("ckpt.onnx") as sampler:
        assert sampler.spec.provenance.source == f"{HERE}:{name}"
        images = sampler.sample(COUNT, seed=SEED, **({"labels": labels} if labels else {}))
        if labels:
            assert sampler.spec.class_names[4] == "\xe9"  # composed, as labels are
    wanted = ancestral(case, network)
    assert np.abs(wanted).max() > 0.5
    tolerance = TOLERANCES["own_module"].limit * (1 if case.clip else np.abs(wanted).max())
    assert np.abs(images - wanted).max() < tolerance
    assert "within tolerance" in run("verify", "ckpt.onnx").output
    assert "timestep" in run("inspect", "ckpt.onnx").output or name == "embedded"
    run("run", "ckpt.onnx", "--count", "2", "-o", "images.png")


def test_half_precision_needs_to_know_nothing_of_it() -> None:
    """All its convolutions work in half, the transposed one too, and what else there is in float32."""
    case = CASES["tutorial"]
    torch.save(trained(case, "tutorial").state_dict(), "w.pt")
    Path("spec.toml").write_text(case_spec(case))
    told = ["--weights", "w.pt", "--spec", "spec.toml", "--fp16", "--report", "r.json"]
    assert "9 of 9 convolutions work in fp16" in run("export", f"{HERE}:tutorial", *told).output
    assert "grow" in json.loads(Path("r.json").read_text())["ranges"]
    assert "within tolerance" in run("verify", "w.fp16.onnx").output
    wide = OnnxFile(Path("w.fp16.onnx")).meant_float32
    assert wide is not None
    assert not any(word in node for node in wide for word in ("conv", "grow", "network."))


def test_a_function_in_the_current_folder(tmp_path: Path) -> None:
    """As a process; another entry by --key, weights in safetensors, and -o."""
    safetensors = pytest.importorskip("safetensors.torch")
    Path("mine").mkdir()
    Path("mine/nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.time = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1)\n"
        "    def forward(self, x, t):\n"
        "        x *= 0.5\n"  # it writes into what it is given
        "        return self.conv(x) + self.time(t)[:, :, None, None]\n"
        "def build(): return Net()\n"
    )
    torch.manual_seed(0)
    state = {
        "conv.weight": torch.randn(1, 1, 3, 3),
        "conv.bias": torch.randn(1),
        "time.weight": torch.randn(1, 1),
        "time.bias": torch.randn(1),
    }
    safetensors.save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, "w.safetensors"
    )
    Path("spec.toml").write_text(spec_text(image_shape="[1, 8, 8]"))
    command = "from ddpm_deploy.cli.export import main; main()"
    told = ["mine.nets:build", "--weights", "w.safetensors", "--spec", "spec.toml", "-o", "net.onnx"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", command, *told], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "takes x, t (B, 1) in float32" in done.stderr
    assert Path("net.onnx").exists()
    with Sampler.load("net.onnx") as sampler:
        x = torch.randn(1, 1, 8, 8)
        network = make_network("mine.nets:build")
        network.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()})
        from ddpm_deploy.runtime.network import ask

        got = ask(sampler.network, x.numpy(), np.full((1, 1), 3, np.float32))
        with torch.no_grad():
            np.testing.assert_allclose(got, network(x, torch.full((1, 1), 3.0)).numpy(), atol=1e-5)


# What is refused. Each is a factory, and what is said of it; the weights are its own.


class Plain(nn.Module):  # type: ignore[misc]
    """Something small to spoil: `spoil` is what it gives of h, t."""

    def __init__(self, out: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, out, 3, padding=1)

    def forward(self, x: Any, t: Any) -> Any:
        return self.spoil(self.conv(x) + t.view(-1, 1, 1, 1) / T)

    def spoil(self, h: Any) -> Any:
        return h


def spoilt(spoil: Callable[[Any], Any], out: int = 1) -> Callable[[], Any]:
    def make() -> Any:
        network = Plain(out)
        randomise(network)
        network.spoil = spoil
        return network

    return make


class NoTime(Plain):
    def forward(self, x: Any, t: Any) -> Any:
        return self.conv(x)


class NoLabel(Plain):
    def forward(self, x: Any, t: Any, y: Any) -> Any:
        return super().forward(x, t)


class NeedsMore(Plain):
    def forward(self, x: Any, t: Any, context: Any) -> Any:
        return super().forward(x, t)


class StaysInTraining(Plain):
    def train(self, mode: bool = True) -> Any:
        return super().train(True)


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


class Autocast(Plain):
    def forward(self, x: Any, t: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, t)


class Remembers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def spoil(self, h: Any) -> Any:
        self.calls += 1
        return h + self.calls


def depends_on_numbers(h: Any) -> Any:
    return h * 2 if h.sum() > 0 else h


def fixed_batch(h: Any) -> Any:
    return torch.stack([h[i] for i in range(h.shape[0])]) * 2


SPOILT: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "2C": (spoilt(lambda h: h, 2), {}, r'2 channels .* variance = "fixed_large": set "learned_range"'),
    "C": (
        spoilt(lambda h: h),
        {"variance": "learned_range"},
        'must give 2 channels, and it gives 1: set "fixed_large"',
    ),
    "shape": (
        spoilt(lambda h: h[:, :, :-1]),
        {},
        r"gives \(2, 1, 7, 8\) for 2 images, and \(2, 1, 8, 8\) is needed",
    ),
    "loss": (
        spoilt(lambda h: h.mean()),
        {},
        r"gives one number, as a loss, .* makes the network itself, not what trains or samples it",
    ),
    "tuple": (spoilt(lambda h: (h, h)), {}, "gives a tuple of 2, and a tensor is needed"),
    "none": (spoilt(lambda h: None), {}, "gives a NoneType, and a tensor is needed"),
    "time": (NoTime, {}, "does not depend on the timestep: it is the same at t = 0 and t = 39"),
    "label": (NoLabel, {"num_classes": 3}, "does not depend on its label: it is the same for 0 and 2"),
    "more": (NeedsMore, {}, "missing 1 required positional argument: 'context'; it must be forward"),
    "labels": (NoLabel, {}, "argument: 'y'; it must be .* with y where num_classes in the spec is not 0"),
    "rows": (spoilt(lambda h: h - h.mean()), {}, "rows of a batch depend on one another"),
    "norm": (
        spoilt(lambda h: F.batch_norm(h, None, None, training=True)),
        {},
        "as by a batch norm that still trains",
    ),
    "alone": (spoilt(lambda h: h + h.shape[0]), {}, "for an image alone and in a batch differs"),
    "squeeze": (spoilt(lambda h: h.squeeze().unsqueeze(1)), {}, r"fails on x \(1, 1, 8, 8\)|alone"),
    "dropout": (
        spoilt(lambda h: F.dropout(h, 0.1)),
        {},
        "two calls .* as dropout by F.dropout without training=",
    ),
    "memory": (Remembers, {}, "two calls of the network on the same numbers differ"),
    "training": (StaysInTraining, {}, "the network stays in training mode after"),
    "infinite": (spoilt(lambda h: h / 0), {}, "is not finite"),
    "complex": (Complex, {}, "phase is not a dense tensor of real numbers"),
    "table": (Looked, {"embedding": TimestepItself(offset=1.0)}, r"fails on x .* \(21, 40\): IndexError"),
    "if": (
        spoilt(depends_on_numbers),
        {},
        "exporter cannot trace the network: .* must not hang on the numbers",
    ),
    "operator": (
        spoilt(torch.linalg.inv),
        {},
        "cannot trace the network: No ONNX function found for .*linalg_inv",
    ),
    "batch": (spoilt(fixed_batch), {}, "exports for one batch size only|cannot trace"),
}


def plain_spec(**told: Any) -> ModelSpec:
    return ModelSpec(**{"image_shape": (1, 8, 8), "timesteps": T, "embedding": TimestepItself()} | told)


def test_in_python(tmp_path: Path) -> None:
    """The module stays as it is: in half precision, and in training."""
    network = Plain().half().train()
    assert export_onnx(network, plain_spec(), tmp_path / "m.onnx").comparison.within
    assert network.training
    assert network.conv.weight.dtype == torch.float16
    with Sampler.load(tmp_path / "m.onnx") as sampler:
        assert sampler.spec.provenance.digest.strip("0")
        assert sampler.spec.provenance.source == "Plain"


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_found_before_anything_is_written(what: str, tmp_path: Path) -> None:
    make, told, said = SPOILT[what]
    with pytest.raises(DdpmDeployError, match=said) as error:
        export_onnx(make(), plain_spec(**told), tmp_path / "m.onnx")
    assert len(str(error.value)) < 500
    assert not list(tmp_path.iterdir())


def test_a_transformer_has_nothing_for_half_precision(tmp_path: Path) -> None:
    class Dense(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 64)

        def forward(self, x: Any, t: Any) -> Any:
            return self.net(x.flatten(1)).view(-1, 1, 8, 8) + t[:, None, None, None] / T

    with pytest.raises(ParityError, match="it has no convolutions; export it in fp32, or in tf32"):
        export_onnx(Dense(), plain_spec(), tmp_path / "m.onnx", precision="fp16")


def test_a_convolution_that_looks_at_the_type_of_its_input(tmp_path: Path) -> None:
    """As the annotated tutorial's, which standardises its weights with another ε in half precision."""

    class Standardised(nn.Conv2d):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            eps = 1e-5 if x.dtype == torch.float32 else 1e-1
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            var = self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
            return F.conv2d(x, (self.weight - mean) * (var + eps).rsqrt(), self.bias, padding=1)

    class Standard(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = Standardised(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)

        def spoil(self, h: Any) -> Any:
            return self.last(h)

    network = Standard()
    found = export_onnx(network, plain_spec(), tmp_path / "m.onnx", precision="fp16").calibration
    assert found is not None
    assert found.convolutions == 2
    assert list(found.islands) == ["conv"]
    assert found.islands["conv"].startswith("has a forward() of its own: in fp16 the prediction is off by ")


@pytest.mark.parametrize("inside", [False, True])
def test_a_network_that_takes_its_type_from_its_weights(inside: bool, tmp_path: Path) -> None:
    """As diffusers' do, of which the Hugging Face course makes its own."""

    class Typed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.middle, self.time, self.last = nn.Conv2d(1, 1, 1), nn.Linear(1, 1), nn.Conv2d(1, 1, 1)

        @property
        def dtype(self) -> Any:
            return next(self.parameters()).dtype

        def forward(self, x: Any, t: Any) -> Any:
            emb = self.time(t[:, None].to(self.dtype) / T)
            return self.last(self.middle(self.conv(x)) + emb[:, :, None, None])

    class Outer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Linear(1, 1)
            self.typed = Typed()

        def forward(self, x: Any, t: Any) -> Any:
            return self.typed(self.bias(x[..., None])[..., 0], t)

    network = Outer() if inside else Typed()
    found = export_onnx(network, plain_spec(), tmp_path / "m.onnx", precision="fp16").calibration
    assert found is not None
    around = "typed." if inside else ""
    assert set(found.islands) == {f"{around}conv", f"{around}last"}
    assert found.islands[f"{around}conv"] == "the network takes the type that it works in from it"


def test_a_network_that_uses_a_weight_itself_has_no_half_precision(tmp_path: Path) -> None:
    class Itself(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 1)

        def spoil(self, h: Any) -> Any:
            return self.last(F.conv2d(h, self.again.weight, padding=1))

    with pytest.raises(
        ParityError, match="does not run with its convolutions in fp16 .* export it in fp32, or"
    ):
        export_onnx(Itself(), plain_spec(), tmp_path / "m.onnx", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_shared_weights_and_none(tmp_path: Path) -> None:
    class Shared(Plain):
        float32_islands = {"again": "for the test"}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(1, 1, 3, padding=1)
            self.again.weight = self.conv.weight

        def spoil(self, h: Any) -> Any:
            return self.again(h)

    class Nothing(nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, t: Any) -> Any:
            return x * (t[:, None, None, None] / T)

    shared = Shared()
    randomise(shared)
    found = export_onnx(shared, plain_spec(), tmp_path / "m.onnx", precision="fp16")
    assert found.calibration is not None
    assert found.calibration.islands == {"again": "for the test"}
    assert export_onnx(Nothing(), plain_spec(), tmp_path / "n.onnx").comparison.within


def test_a_network_that_no_file_holds_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "adapt", None)
    network = Plain()
    network.register_buffer("large", torch.zeros(1).expand(2**29))
    with pytest.raises(ArtefactError, match="over 2 GiB, more than one ONNX file holds$"):
        export_onnx(network, plain_spec(), tmp_path / "m.onnx")
    network = Plain()
    network.conv.weight = nn.Parameter(torch.zeros(1, 1, 1, 1).expand(2**29, 1, 1, 1))
    with pytest.raises(ArtefactError, match="try --fp16"):
        export_onnx(network, plain_spec(), tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is
def test_what_is_around_a_network_is_taken_off() -> None:
    network = Plain()
    assert unwrapped(nn.DataParallel(torch.compile(network, backend="eager"))) is network
    assert unwrapped(network) is network
    with pytest.raises(ArtefactError, match="TorchScript: give the module that it was compiled from"):
        unwrapped(torch.jit.trace(nn.Identity(), torch.zeros(1)))


def test_networks_that_are_not_whole(tmp_path: Path) -> None:
    network = Plain()
    network.conv = nn.LazyConv2d(1, 3, padding=1)
    with pytest.raises(ArtefactError, match="lazy layers without weights"):
        export_onnx(network, plain_spec(), tmp_path / "m.onnx")
    with pytest.raises(ArtefactError, match="cannot be moved to the CPU"):
        export_onnx(Plain().to("meta"), plain_spec(), tmp_path / "m.onnx")


def test_an_adapted_network_is_not_adapted_again() -> None:
    own, spec = adapt(Plain().eval(), plain_spec())
    assert isinstance(own, OwnNetwork)
    assert adapt(own, spec) == (own, spec)


# Factories.


def raises() -> Any:
    raise RuntimeError("no such file: data.csv")


def exits() -> Any:
    sys.exit("usage: train.py DATA")


def with_arguments(channels: int, width: int = 64) -> Any:
    return Plain()


def gives_text() -> Any:
    return "network"


def tiny() -> Any:
    return Plain()


NUMBER = 3


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (
            f"{HERE}:raises",
            r"raises failed in .*test_own_module.py, line \d+: RuntimeError: no such file: data.csv",
        ),
        (f"{HERE}:exits", "exits failed in .*: SystemExit: usage"),
        (
            f"{HERE}:with_arguments",
            r"needs arguments \(missing a required argument: 'channels'\).* write a function",
        ),
        (f"{HERE}:gives_text", "gives a str, and a torch.nn.Module is needed"),
        (f"{HERE}:tiney", f"{HERE} has no tiney: name a function that makes the network, as .*tiny"),
        (f"{HERE}:NUMBER", "NUMBER in .* is no function"),
        (
            "tests.nothing:build",
            "there is no module tests.nothing: .* run this in the folder that your package is in",
        ),
        ("nothing:build", "there is no module nothing"),
        (
            "half:build",
            "importing half failed in .*half.py, line 1: ModuleNotFoundError: No module named 'einopsy'",
        ),
        (
            "broken:build",
            "importing broken failed in .*broken.py, line 2: ZeroDivisionError: division by zero",
        ),
        ("wrong:build", "importing wrong failed in .*wrong.py, line 1: SyntaxError"),
        ("leaves:build", "importing leaves failed in .*leaves.py, line 1: SystemExit: 2"),
    ],
)
def test_a_factory_that_makes_no_network(factory: str, said: str) -> None:
    Path("half.py").write_text("import einopsy\n")
    Path("broken.py").write_text("\n1 / 0\n")
    Path("wrong.py").write_text("def build(:\n")
    Path("leaves.py").write_text("raise SystemExit(2)\n")
    torch.save(Plain().state_dict(), "w.pt")
    Path("spec.toml").write_text(spec_text())
    line = refused("export", factory, "--weights", "w.pt", "--spec", "spec.toml")
    assert re.search(said, line), line


def test_weights_of_another_network() -> None:
    state = Plain().state_dict()
    torch.save(
        {"net": {"first.weight": torch.zeros(1), **state}, "ema": {"conv.weight": torch.zeros(1)}}, "w.pt"
    )
    with pytest.raises(ArtefactError, match=r"\(ema\) .* conv.bias is missing; other entries .* --key: net$"):
        load_module(f"{HERE}:tiny", Path("w.pt"))
    with pytest.raises(
        ArtefactError, match=r"\(net\) .*: first.weight is not of the network; other entries .*: ema"
    ):
        load_module(f"{HERE}:tiny", Path("w.pt"), "net")
    torch.save({"conv.weight": torch.zeros(1, 1, 5, 5), "conv.bias": torch.zeros(1)}, "w.pt")
    with pytest.raises(ArtefactError, match=r"conv.weight is \(1, 1, 5, 5\), and \(1, 1, 3, 3\) is needed"):
        load_module(f"{HERE}:tiny", Path("w.pt"))
    torch.save({**state, "conv.bias": torch.tensor([math.nan])}, "w.pt")
    with pytest.raises(ArtefactError, match=r"not finite in conv.bias"):
        load_module(f"{HERE}:tiny", Path("w.pt"))
    with pytest.raises(SettingError, match=r"must end in \.pt"):
        load_module(f"{HERE}:tiny", Path("w.onnx"))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "ema_model.module."])
def test_weights_in_something_larger(prefix: str) -> None:
    """Lightning's module, DataParallel, torch.compile, and an average with its counter."""
    state = Plain().state_dict()
    counter = {"n_averaged": torch.tensor(3)} if prefix.endswith("module.") else {}
    torch.save({"state_dict": {**{f"{prefix}{name}": t for name, t in state.items()}, **counter}}, "w.ckpt")
    network, _ = load_module(f"{HERE}:tiny", Path("w.ckpt"))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_weights_beside_others_in_something_larger() -> None:
    """A diffusion with its buffers, as Lightning saves it, and an average beside what it averages, as ema-pytorch."""
    state, online = Plain().state_dict(), Plain().state_dict()
    around = {"betas": torch.zeros(T), "alphas_cumprod": torch.ones(T)}
    torch.save({"state_dict": under("model.", state) | around, "step": 9}, "w.ckpt")
    network, weights = load_module(f"{HERE}:tiny", Path("w.ckpt"))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert weights.step == 9
    assert weights.described()[-1] == "weights under model.; left aside: betas, alphas_cumprod"
    averager = {"step": torch.tensor(3)} | under("online_model.", online) | under("ema_model.", state)
    torch.save({"model": online, "ema": averager}, "w.pt")
    network, weights = load_module(f"{HERE}:tiny", Path("w.pt"))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert weights.averaged


class Around(nn.Module):  # type: ignore[misc]
    """The user's own module around their network, which has the names of its weights without "net."."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Any, t: Any) -> Any:
        return self.net(x, t)


def test_a_module_around_the_network() -> None:
    state = Plain().state_dict()
    torch.save({"ema": under("module.", state), "model": state}, "w.pt")
    network, _ = load_module(f"{HERE}:Around", Path("w.pt"))
    assert all(torch.equal(network.net.state_dict()[name], tensor) for name, tensor in state.items())
    torch.save(under("other.", state), "w.pt")
    with pytest.raises(ArtefactError, match=r"net.conv.weight is missing \(and 1 more\), other.conv.weight"):
        load_module(f"{HERE}:Around", Path("w.pt"))


def test_which_weights_were_taken_is_said() -> None:
    torch.manual_seed(0)
    torch.save({"model": Plain().state_dict(), "ema": Plain().state_dict(), "step": 7}, "w.pt")
    Path("spec.toml").write_text(spec_text(image_shape="[1, 8, 8]"))
    said = run("export", f"{HERE}:tiny", "--weights", "w.pt", "--spec", "spec.toml", "-v").output
    assert "weights of the entry ema, the averaged ones (others, by --key: model)" in said
    assert "are as spec.toml says: --check-images holds them against images" in said
    with Sampler.load("w.onnx") as sampler:
        assert (sampler.spec.provenance.weights, sampler.spec.provenance.step) == ("ema", 7)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("pack/models.py:build", "by its module, not by its file: pack.models:build"),
        ("./models.py:build", "not by its file: models:build"),
        ("pack.models.py:build", "not by its file: pack.models:build"),
        ("../pack/models.py:build", "not by its file: models:build, in the folder ../pack"),
        ("pack.models.build", "neither a file nor a function: .* as my_package.models:build"),
        ("my-pack.models:build", "neither a file nor a function"),
    ],
)
def test_a_function_that_is_named_otherwise(typed: str, said: str) -> None:
    assert re.search(said, refused("export", typed, "--weights", "w.pt", "--spec", "spec.toml", code=2))


def test_a_command_line_is_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that parses its arguments as it is imported has its defaults, and not those of ddpm-export."""
    monkeypatch.setattr(sys, "argv", ["ddpm-export", "--weights", "w.pt"])
    Path("parses.py").write_text(
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--weights', type=int, default=3)\n"
        "assert parser.parse_args().weights == 3\n"
        "from tests.test_own_module import tiny as build\n"
    )
    assert isinstance(make_network("parses:build"), Plain)
    assert sys.argv[1:] == ["--weights", "w.pt"]
    Path("asks.py").write_text("import argparse\n\nargparse.ArgumentParser().parse_args(['--data'])\n")
    with pytest.raises(
        SettingError, match=r"in .*asks.py, line 3: SystemExit: 2; where it reads a command line"
    ):
        make_network("asks:build")


def test_the_template_is_a_spec() -> None:
    Path("spec.toml").write_text(run("export", "--spec-template").stdout)
    spec = read_spec(Path("spec.toml"))
    assert spec == ModelSpec(image_shape=(3, 32, 32), embedding=TimestepItself())


def test_a_spec_may_say_more() -> None:
    Path("spec.toml").write_text(
        spec_text(
            schedule='{ kind = "cosine", s = 0.01 }',
            embedding='{ kind = "sinusoidal", dim = 64, spacing = "half", order = "cos-sin", scale = 2 }',
            clip="[-2, 2]",
            data_range="[0, 1]",
            sampling='{ solver = "ddim", steps = 20, eta = 0.5 }',
            num_classes="2",
            null_class="true",
        )
    )
    spec = read_spec(Path("spec.toml"))
    assert spec.schedule == CosineBetas(s=0.01)
    assert spec.embedding == SinusoidalEmbedding(dim=64, spacing="half", order="cos-sin", scale=2.0)
    assert spec.clip_range == (-2.0, 2.0)
    assert spec.sampling.steps == 20
    assert spec.num_labels == 3


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"predicton": '"v"'}, "predicton is not known, did you mean prediction?"),
        ({"zzzzz": "1"}, "zzzzz is not known: choose from image_shape, timesteps"),
        ({"prediction": '"noise"'}, "prediction: Invalid enum value 'noise'; allowed: epsilon, v, x0, mean"),
        ({"variance": '"learned"'}, "allowed: fixed_small, fixed_large, learned_range"),
        ({"schedule": '"squared"'}, "schedule.*'squared'.*allowed: linear, cosine, sigmoid, scaled_linear"),
        (
            {"schedule": '{ kind = "linear", start = 1 }'},
            "unknown field `start`; allowed: kind, beta_start, beta_end",
        ),
        ({"schedule": '{ kind = "linear", beta_end = 2 }'}, "schedule.beta_end: Expected `float` < 1.0"),
        (
            {"embedding": '{ kind = "sinusoidal" }'},
            "missing required field `dim`; allowed: kind, dim, spacing",
        ),
        ({"embedding": '{ kind = "fourier" }'}, "embedding.*'fourier'.*allowed: timestep, sinusoidal"),
        ({"embedding": '"timestep"'}, "embedding: Expected `object`.*allowed: a table, as"),
        ({"sampling": "{ step = 3 }"}, "unknown field `step`; allowed: steps, solver, eta"),
        ({"sampling": '{ solver = "euler" }'}, "allowed: ddpm, ddim, dpmpp-2m"),
        (
            {"image_shape": "[3, 32]"},
            "image_shape: Expected `array` of length 3.*allowed: channels, height, width",
        ),
        ({"image_shape": '[3, 32, "a"]'}, "image_shape.*allowed: channels, height, width"),
        ({"timesteps": "0"}, "timesteps: .* >= 1; allowed: a whole number from 1 to 100000"),
        ({"value_range": "[1.0, -1.0]"}, r"spec.toml: the value range \(1.0, -1.0\) is empty"),
        ({"class_names": '["a"]'}, "it names 1 of 0 classes"),
        ({"clip": '"yes"'}, "clip: .* allowed: true, false, or two numbers"),
    ],
)
def test_a_spec_that_is_wrong(told: dict[str, str], said: str) -> None:
    Path("spec.toml").write_text(spec_text(**told))
    with pytest.raises(SettingError, match=said):
        read_spec(Path("spec.toml"))


def test_no_spec() -> None:
    Path("spec.toml").write_text("image_shape = [3, 32\n")
    with pytest.raises(SettingError, match="is not TOML: .*; ddpm-export --spec-template prints one"):
        read_spec(Path("spec.toml"))
    Path("spec.toml").write_text("image_shape = [3, 32, 32]\n")
    with pytest.raises(SettingError, match="does not tell timesteps, schedule, .*, embedding: ddpm-export"):
        read_spec(Path("spec.toml"))
    with pytest.raises(SettingError, match="spec.json: the name of a spec must end in .toml"):
        Path("spec.json").write_text("{}")
        read_spec(Path("spec.json"))
    with pytest.raises(SettingError, match="does not exist"):
        read_spec(Path("other.toml"))


def test_a_chain_that_amplifies_rounding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As that of a network with random weights that predicts x0: nothing is wrong with its export."""
    config = UNetConfig(channels=8, widths=(8, 16), groups=4, blocks=1, time_width=32, attention_levels=(1,))
    spec = ModelSpec(
        image_shape=(1, 8, 8),
        embedding=SinusoidalEmbedding(dim=8),
        network=config,
        prediction="x0",
        clip=False,
    )
    network = new_network(spec)
    randomise(network, 2)
    for parameter in network.parameters():
        parameter.data.mul_(1.6)
    found = export_onnx(network, spec, tmp_path / "x.onnx")
    assert found.comparison.first_past is None
    assert found.comparison.psnr.min() < 90
    assert "a chain of PyTorch's own, off by as little at each step, ends as far away" in caplog.text
