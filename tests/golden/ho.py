"""What Ho's network says in three code bases, and what their samplers make of it, kept so that no test needs them.

    git clone https://github.com/ermongroup/ddim                  # e8df66c
    git clone https://github.com/pesser/pytorch_diffusion         # 304bdff
    git clone https://github.com/w86763777/pytorch-ddpm           # f804ccb
    python -m tests.golden.ho ddim pytorch_diffusion pytorch-ddpm

writes ho.npz beside this file. The weights are made from names and shapes (`importing.named_weights`), so that the file
holds these and what comes out. Chains are the peers' own, on our addressed noise, T = 50.
"""

import importlib
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_deploy.noise import addressed_noise
from ddpm_deploy.train.noise import AddressedRandn
from tests.importing import named_weights

FILE: Final = Path(__file__).with_suffix(".npz")
TIMESTEPS: Final = [0, 1, 500, 999]  # of the predictions
SEED: Final = 5
SHORT: Final = 50  # T of the chains
BETAS: Final = (1e-4, 0.1)


@dataclass(frozen=True)
class Case:
    """A network. peer: whose. size: height and width of its images. blocks: residual ones a level."""

    peer: str
    size: tuple[int, int]
    ch: int
    ch_mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    channels: int = 3
    timesteps: int = 1000


@dataclass(frozen=True)
class Chain:
    """A whole chain of one of the networks, trained with T = SHORT.

    flags: of ddpm-export. gain: of w86763777's last convolution: of a random network it must be small, or the chain is
    chaotic where its output is the next x, and mostly clipped where it is ε.
    """

    case: str
    flags: dict[str, Any]
    gain: float = 1.0


CASES: Final = {
    "ddim, several": Case("ddim", (8, 8), 32, (1, 2, 2), 2, (0, 1)),
    "ddim, middle alone": Case("ddim", (8, 8), 64, (1, 2), 1, (), channels=1),
    "pesser, last": Case("pesser", (12, 12), 32, (2, 1, 3), 1, (2,)),
    "w86763777, one": Case("w86763777", (8, 12), 32, (1, 2, 2), 2, (1,)),
    "w86763777, all": Case("w86763777", (8, 8), 64, (1, 2), 1, (0, 1), timesteps=1200),
    "w86763777, chains": Case("w86763777", (8, 8), 32, (1, 2), 1, (1,), timesteps=SHORT),
}
CHAINS: Final = [
    Chain("ddim, several", {"sample_type": "generalized"}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 10, "eta": 0.0}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 10, "eta": 1.0}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 20, "skip_type": "quad"}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 20, "skip_type": "quad", "eta": 1.0}),
    Chain("ddim, several", {"sample_type": "ddpm_noisy", "timesteps": 25, "var_type": "fixedsmall"}),
    Chain("ddim, several", {"sample_type": "ddpm_noisy", "timesteps": 20, "skip_type": "quad"}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 10, "beta_schedule": "quad"}),
    Chain("ddim, several", {"sample_type": "generalized", "timesteps": 10, "beta_schedule": "sigmoid"}),
    Chain("ddim, several", {"sample_type": "ddpm_noisy", "timesteps": 10, "beta_schedule": "const"}),
    Chain("pesser, last", {"var_type": "fixedlarge"}),
    Chain("pesser, last", {"var_type": "fixedsmall"}),
    Chain("w86763777, chains", {"var_type": "fixedlarge"}, gain=0.3),
    Chain("w86763777, chains", {"var_type": "fixedsmall"}, gain=0.3),
    Chain("w86763777, chains", {"var_type": "fixedlarge", "mean_type": "xstart"}),
    Chain("w86763777, chains", {"var_type": "fixedsmall", "mean_type": "xprev"}, gain=0.1),
]


def images(case: Case) -> NDArray[np.float32]:
    """The x of its predictions, a row for each of the timesteps: (4, C, H, W)."""
    return addressed_noise(SEED, np.arange(4, dtype=np.uint64), 0, (case.channels, *case.size))


def timesteps(case: Case) -> list[int]:
    """The t of its predictions."""
    return [min(t, case.timesteps - 1) for t in TIMESTEPS]


class _Peers:
    """The three, imported from checkouts."""

    def __init__(self, ddim: str, pesser: str, w86763777: str) -> None:
        # What their scripts import and their networks do not need.
        for name in (
            "tqdm",
            "torchvision",
            "torchvision.utils",
            "requests",
            "datasets",
            "functions.ckpt_util",
        ):
            sys.modules[name] = types.ModuleType(name)
        for module, names in (
            ("datasets", ("get_dataset", "data_transform", "inverse_data_transform")),
            ("functions.ckpt_util", ("get_ckpt_path",)),
            ("tqdm", ("tqdm",)),
        ):
            for name in names:
                setattr(sys.modules[module], name, None)
        sys.path[:0] = [ddim, pesser, w86763777]
        self.ddim = importlib.import_module("models.diffusion")
        self.runner = importlib.import_module("runners.diffusion")
        self.pesser = importlib.import_module("pytorch_diffusion.diffusion")
        self.w86763777 = importlib.import_module("model")
        self.w86763777_diffusion = importlib.import_module("diffusion")

    def network(self, case: Case) -> torch.nn.Module:
        """One of their networks, with weights by name; a table of timesteps stays as they made it."""
        resolutions = [case.size[0] // 2**level for level in case.attention]
        if case.peer == "w86763777":
            network = self.w86763777.UNet(
                case.timesteps, case.ch, case.ch_mult, case.attention, case.blocks, 0.1
            )
        else:
            shape = {
                "ch": case.ch,
                "out_ch": case.channels,
                "ch_mult": case.ch_mult,
                "num_res_blocks": case.blocks,
                "attn_resolutions": resolutions,
                "dropout": 0.1,
                "in_channels": case.channels,
                "resamp_with_conv": True,
            }
            if case.peer == "pesser":
                network = self.pesser.Model(**shape, resolution=case.size[0])
            else:
                config = SimpleNamespace(
                    model=SimpleNamespace(**shape, type="simple"),
                    data=SimpleNamespace(image_size=case.size[0]),
                    diffusion=SimpleNamespace(num_diffusion_timesteps=1000),
                )
                network = self.ddim.Model(config)
        table = network.state_dict().get("time_embedding.timembedding.0.weight")
        weights = named_weights(shapes(network))
        if table is not None:
            weights["time_embedding.timembedding.0.weight"] = table
        network.load_state_dict(weights)
        return network.eval()

    def chain(self, chain: Chain, network: torch.nn.Module) -> torch.Tensor:
        """The images of a chain, two of them."""
        case, flags = CASES[chain.case], chain.flags
        x = torch.from_numpy(
            addressed_noise(SEED, np.arange(2, dtype=np.uint64), 0, (case.channels, *case.size))
        )
        if case.peer == "w86763777":
            return self._w86763777(network, x, flags, chain.gain)
        return (self._ddim if case.peer == "ddim" else self._pesser)(network, x, flags)

    def _ddim(self, network: Any, x: torch.Tensor, flags: dict[str, Any]) -> torch.Tensor:
        betas = self.runner.get_beta_schedule(
            flags.get("beta_schedule", "linear"),
            beta_start=BETAS[0],
            beta_end=BETAS[1],
            num_diffusion_timesteps=SHORT,
        )
        args = {"skip_type": "uniform", "timesteps": SHORT, "eta": 0.0, **flags}
        runner = SimpleNamespace(
            args=SimpleNamespace(**args), num_timesteps=SHORT, betas=torch.from_numpy(betas).float()
        )
        visited = self._sequence(runner, x, network)
        with _Noise(visited):
            result: torch.Tensor = self.runner.Diffusion.sample_image(runner, x, network)
        return result

    def _sequence(self, runner: Any, x: torch.Tensor, network: Any) -> list[int]:
        """The timesteps that it visits, some of them twice: it makes them inside."""
        seen: list[int] = []

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(int(t[0]))
            return torch.zeros_like(x)

        with _OnCpu():
            self.runner.Diffusion.sample_image(runner, x, watched)
        return seen

    def _pesser(self, network: Any, x: torch.Tensor, flags: dict[str, Any]) -> torch.Tensor:
        peer = self.pesser.Diffusion.__new__(self.pesser.Diffusion)
        peer.init_diffusion_parameters(
            beta_schedule="linear",
            beta_start=BETAS[0],
            beta_end=BETAS[1],
            num_diffusion_timesteps=SHORT,
            model_var_type=flags["var_type"],
        )
        peer.model, peer.device = network, torch.device("cpu")
        with _Noise(list(reversed(range(SHORT)))):
            result: torch.Tensor = peer.denoise(len(x), x=x)
        return result

    def _w86763777(self, network: Any, x: torch.Tensor, flags: dict[str, Any], gain: float) -> torch.Tensor:
        # Its own check of mean_type lets epsilon alone pass, as a comma is missing there.
        sampler = self.w86763777_diffusion.GaussianDiffusionSampler(
            network, *BETAS, SHORT, mean_type="epsilon", var_type=flags["var_type"]
        )
        sampler.mean_type = flags.get("mean_type", "epsilon")
        last = network.tail[-1].weight.data
        whole = last.clone()
        last.mul_(gain)
        with torch.no_grad(), _Noise(list(reversed(range(SHORT)))):
            result: torch.Tensor = sampler(x)
        last.copy_(whole)
        return result


class _OnCpu(torch.overrides.TorchFunctionMode):
    """A code base that moves tensors to "cuda" by that name stays where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[1:] == ("cuda",):
            return args[0]
        return func(*args, **(kwargs or {}))


class _Noise:
    """Our noise, for a sampler that is given x_T, on a CPU."""

    def __init__(self, timesteps: list[int]) -> None:
        self._modes = AddressedRandn(timesteps, seed=SEED), _OnCpu()

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()
        torch.randn(1, 4)  # what it gives first is x_T

    def __exit__(self, *problem: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*problem)


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of its weights, by name."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def main(*checkouts: str) -> None:
    """Write the file."""
    peers, content, known = _Peers(*checkouts), {}, {}
    for name, case in CASES.items():
        network, t = peers.network(case), torch.tensor(timesteps(case))
        with torch.no_grad():
            content[name] = network(torch.from_numpy(images(case)), t).numpy()
        known[name] = shapes(network)
        for number, chain in enumerate(CHAINS):
            if chain.case == name:
                content[f"chain {number}"] = peers.chain(chain, network).numpy()
    content["shapes"] = np.array(json.dumps(known))
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main(*sys.argv[1:])
