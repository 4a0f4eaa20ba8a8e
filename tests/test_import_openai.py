"""OpenAI's checkpoints: golden vectors of both code bases, what their flags say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ddpm_deploy.errors import ArtefactError, SettingError  # noqa: E402
from ddpm_deploy.importers.dialects import import_checkpoint  # noqa: E402
from ddpm_deploy.importers.imported import Imported  # noqa: E402
from ddpm_deploy.runtime.sampler import Sampler  # noqa: E402
from ddpm_deploy.spacings import openai_ddim  # noqa: E402
from ddpm_deploy.train.network import TorchNetwork  # noqa: E402
from tests.golden.openai_networks import CASES, CLASSES, FILE, LABELS, SEED, Case, asked  # noqa: E402
from tests.importing import named_weights, predict, relative_rms  # noqa: E402
from tests.tolerances import TOLERANCES  # noqa: E402

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
