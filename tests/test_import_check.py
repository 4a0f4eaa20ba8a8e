"""Readings of a checkpoint compared on images, with a network whose loss is known in closed form."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from ddpm_deploy.cli import main
from ddpm_deploy.embedding import TimestepItself
from ddpm_deploy.errors import DataError, SettingError
from ddpm_deploy.importers.check import compare
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.importers.template import TEMPLATE
from ddpm_deploy.importers.told import Assumption
from ddpm_deploy.schedule import CosineBetas, LinearBetas
from ddpm_deploy.spec import ModelSpec, UNetConfig

VARIANCE = 0.16  # of the images
SHAPE = (1, 8, 8)


class Optimal(nn.Module):
    """E[ε | x_t] of images that are independent normal numbers."""

    alphas: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.register_buffer("alphas", torch.from_numpy(spec.make_schedule().alphas_cumprod))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        here = self.alphas[temb[:, 0].long()][:, None, None, None]
        return ((1 - here).sqrt() * x / (here * VARIANCE + 1 - here)).float()


def spec_of(**fields: Any) -> ModelSpec:
    return ModelSpec(**{"image_shape": SHAPE, "embedding": TimestepItself(), **fields})


def model(assumed: ModelSpec) -> Imported:
    others = {
        "prediction": ("epsilon", "v", "x0"),
        "schedule": ("linear", "cosine"),
        "scale": (1.0, 0.9),
    }
    return Imported(
        Optimal(spec_of()),
        assumed,
        "Gauss",
        (),
        tuple(Assumption(flag, None, these) for flag, these in others.items()),
    )


def told(assumed: ModelSpec) -> Any:
    schedules = {"linear": LinearBetas(), "cosine": CosineBetas()}

    def read(flags: Mapping[str, Any]) -> Imported:
        changed = {name: schedules.get(value, value) for name, value in flags.items() if name != "scale"}
        if "scale" in flags:
            changed["embedding"] = TimestepItself(scale=flags["scale"])
        fields = {"prediction": assumed.prediction, "schedule": assumed.schedule, **changed}
        return Imported(Optimal(spec_of()), spec_of(**fields), "Gauss")

    return read


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("images") / "normal.npy"
    pixels = np.random.default_rng(0).normal(0, VARIANCE**0.5, (400, *SHAPE[1:]))
    np.save(path, np.clip(np.rint(127.5 + 127.5 * pixels), 0, 255).astype(np.uint8))
    return str(path)


def test_the_right_reading_has_the_loss_of_theory_and_no_other_is_better(images: str) -> None:
    own, *others = compare(model(spec_of()), told(spec_of()), images)
    alphas = spec_of().make_schedule().alphas_cumprod[np.linspace(0, 999, 18).astype(int)[1:-1]]
    theory = (alphas * VARIANCE / (alphas * VARIANCE + 1 - alphas)).mean()
    assert own.loss == pytest.approx(theory, rel=0.02)
    assert not any(fit.better for fit in others)
    verdicts = {(fit.flag, fit.value): fit.worse for fit in others}
    assert verdicts == {
        ("prediction", "epsilon"): False,
        ("prediction", "v"): True,
        ("prediction", "x0"): True,
        ("schedule", "linear"): False,
        ("schedule", "cosine"): True,
        ("scale", 1.0): False,
        ("scale", 0.9): True,
    }


def test_a_wrong_reading_is_told_from_the_right_one(images: str) -> None:
    assumed = spec_of(prediction="v")
    own, *others = compare(model(assumed), told(assumed), images)
    assert own.loss is not None
    (best,) = [fit for fit in others if fit.better and fit.value == "epsilon"]
    assert best.loss is not None
    assert best.loss < own.loss
    assert min(fit.loss or math.inf for fit in others) == best.loss


def test_a_reading_that_makes_no_network_is_told(images: str) -> None:
    def read(flags: Mapping[str, Any]) -> Imported:
        raise SettingError("64 channels cannot make 5 heads")

    _, *others = compare(model(spec_of()), read, images)
    assert {(fit.loss, fit.why) for fit in others} == {(None, "64 channels cannot make 5 heads")}


def test_too_few_images(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(DataError, match="has one image"):
        compare(model(spec_of()), told(spec_of()), str(tmp_path / "one.npy"))


@pytest.mark.parametrize("null_class", [True, False])
def test_labels_that_are_not_the_models_are_told(
    images: str, null_class: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Labelled(Optimal):
        def forward(self, x: Tensor, temb: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            assert set(y.tolist()) == {3 if null_class else 0}
            return super().forward(x, temb)

    spec = spec_of(num_classes=3, null_class=null_class)
    compare(Imported(Labelled(spec), spec, "Gauss"), told(spec), images)
    assert "has not the model's 3 classes" in caplog.text


def test_the_last_class_may_be_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where a network of ten classes embeds eleven: the images have the labels of the ten."""

    class Labelled(Optimal):
        def forward(self, x: Tensor, temb: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            assert set(y.tolist()) == {0, 1, 2}
            return super().forward(x, temb)

    rng = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / label / f"{number}.png")
    spec = spec_of(num_classes=4)
    compare(Imported(Labelled(spec), spec, "Gauss"), told(spec), str(tmp_path))
    assert "has not the model's" not in caplog.text
    assert "one class less than the model" in caplog.text


def test_a_loss_of_a_network_that_knows_nothing_of_the_images_is_told(
    images: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a wrong flag was told, so that nothing is left to compare with."""

    class Nothing(Optimal):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return torch.zeros_like(x)

    spec = spec_of()
    compare(Imported(Optimal(spec), spec, "Gauss"), told(spec), images)
    assert not caplog.text
    (own,) = compare(Imported(Nothing(spec), spec, "Gauss"), told(spec), images)
    assert own.loss == pytest.approx(1, rel=0.02)
    assert "something that was told or assumed of it is wrong" in caplog.text


def test_what_is_of_sampling_alone_is_not_tried(images: str) -> None:
    """Of our own network, which a spec describes wholly."""

    class Counted(Optimal):
        calls = 0

        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(x, temb)

    config = UNetConfig(channels=32, widths=(32,), time_width=32, blocks=1, attention_levels=())
    spec = spec_of(network=config, prediction="epsilon")

    def read(flags: Mapping[str, Any]) -> Imported:
        return Imported(Counted(spec), msgspec.structs.replace(spec, **flags), "Gauss")

    assumed = (Assumption("variance", "fixed_large", ("fixed_small",)), Assumption("clip", True, (False,)))
    own, *others = compare(Imported(Counted(spec), spec, "Gauss", (), assumed), read, images)
    assert Counted.calls == 16
    assert [(fit.loss, fit.better, fit.worse) for fit in others] == [(own.loss, False, False)] * 2


OWN = """
import torch


class Optimal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Conv2d(1, 1, 1)  # of no account
        self.register_buffer("alphas", torch.zeros(1000, dtype=torch.float32))

    def forward(self, x, t):
        here = self.alphas[t][:, None, None, None]
        return (1 - here).sqrt() * x / (here * 0.16 + 1 - here) + 0 * self.weight(x)
"""


def test_the_spec_of_ones_own_network_is_held_against_images(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("closed_form.py").write_text(OWN)
    names: dict[str, Any] = {}
    exec(compile(OWN, "closed_form.py", "exec"), names)
    network = names["Optimal"]()
    network.alphas.copy_(torch.from_numpy(spec_of().make_schedule().alphas_cumprod))
    torch.save(network.state_dict(), "ckpt.pt")
    told = TEMPLATE.replace("[3, 32, 32]", "[1, 8, 8]")
    command = ["export", "closed_form:Optimal", "--weights", "ckpt.pt", "--spec", "spec.toml", "-o", "x.onnx"]
    for wrong, right in (
        ('prediction = "v"', 'prediction = "epsilon"'),
        ('schedule = "cosine"', 'schedule = "linear"'),
    ):
        Path("spec.toml").write_text(re.sub(rf"(?m)^{wrong.split()[0]} = \S+", wrong, told))
        refused = CliRunner().invoke(main, [*command, "--check-images", images])
        assert refused.exit_code == 1, refused.output
        assert f"in the spec, {right} fits" in refused.stderr
        assert not Path("x.onnx").exists()
    Path("spec.toml").write_text(told)
    assert CliRunner().invoke(main, [*command, "--check-images", images]).exit_code == 0
