"""Checkpoints whose weights come from elsewhere, and the devices they go to: what is taken, and what is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy.errors import ArtefactError, SettingError
from ddpm_deploy.model_file import open_model

torch = pytest.importorskip("torch")

from ddpm_deploy.train.checkpoint import Checkpoint, load_network  # noqa: E402
from ddpm_deploy.train.network import torch_device  # noqa: E402

State = dict[str, Any]


def changed(source: Path, path: Path, change: Callable[[State], State]) -> Path:
    content = torch.load(source, weights_only=True)
    torch.save(content | {kind: change(content[kind]) for kind in ("ema", "raw")}, path)
    return path


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_of_data_parallel_are_taken(tmp_path: Path, checkpoint_path: Path, wrapper: str) -> None:
    def wrap(state: State) -> State:
        return {f"{wrapper}{name}": tensor for name, tensor in state.items()}

    path = changed(checkpoint_path, tmp_path / "m.pt", wrap)
    wanted, got = (Checkpoint.load(open_model(p)) for p in (checkpoint_path, path))
    for mine, theirs in ((got.ema, wanted.ema), (got.raw, wanted.raw)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    network, _ = load_network(open_model(path))
    assert torch.equal(network.conv_in.weight, wanted.ema["conv_in.weight"])


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("conv_in.weight"), "conv_in.weight is missing"),
        (without("conv_in.weight", "conv_in.bias"), r"conv_in.weight is missing \(and 1 more\)"),
        (lambda state: state | {"a": torch.zeros(1)}, "a is not of the network"),
        (
            lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
            r"temb1.weight is missing \(and 113 more\), net.temb1.weight is not of the network \(and 113 more\)",
        ),
        (
            lambda state: state | {"conv_in.weight": torch.zeros(8, 3, 3, 3)},
            r"conv_in.weight is \(8, 3, 3, 3\), and \(8, 1, 3, 3\) is needed",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_first(
    tmp_path: Path, checkpoint_path: Path, change: Callable[[State], State], says: str
) -> None:
    path = changed(checkpoint_path, tmp_path / "m.pt", change)
    with pytest.raises(ArtefactError, match=f"m.pt does not fit its own ModelSpec: {says}$"):
        Checkpoint.load(open_model(path))


@pytest.mark.parametrize("name", ["foo", "mps", "meta", "mkldnn", "hpu", "xpu:3", "", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_in_a_sentence(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(SettingError, match=r"^PyTorch cannot use device '.*' here.*: choose cpu") as caught:
        torch_device(name)
    assert len(str(caught.value)) < 120
