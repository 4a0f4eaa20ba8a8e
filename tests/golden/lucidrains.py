"""What denoising-diffusion-pytorch computes, kept so that the tests need neither the package nor torchvision.

    pip download --no-deps denoising-diffusion-pytorch==2.3.4 einops==0.8.2
    unzip 'denoising_diffusion_pytorch*.whl' -d peer; unzip 'einops*.whl' -d peer
    PYTHONPATH=peer python -m tests.golden.lucidrains

writes lucidrains.npz beside this file: the buffers of GaussianDiffusion, whole chains of its two samplers, and the
shapes and predictions of its Unet. Its buffers are float32, and so are its chains.
"""

import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.importing import named_weights

FILE: Final = Path(__file__).with_suffix(".npz")
SHAPE: Final = (2, 1, 4, 4)
T: Final = 200
SCHEDULES: Final = ("linear", "cosine", "sigmoid")
OBJECTIVES: Final = ("pred_noise", "pred_x0", "pred_v")
# (schedule, objective, sampling_timesteps, ddim_sampling_eta)
CHAINS: Final = [
    (schedule, objective, steps, eta)
    for schedule in SCHEDULES
    for objective in OBJECTIVES
    for steps, eta in ((T, 0.0), (50, 0.0), (30, 0.7))
]
UNETS: Final[dict[str, dict[str, Any]]] = {
    "plain": {"dim": 8, "dim_mults": (1, 2), "channels": 1},
    "each": {
        "dim": 8,
        "init_dim": 12,
        "dim_mults": (1, 2, 3),
        "channels": 3,
        "full_attn": (False, True, False),
        "attn_heads": (1, 2, 3),
        "attn_dim_head": (8, 4, 6),
        "sinusoidal_pos_emb_theta": 1000,
    },
    "learned": {
        "dim": 8,
        "dim_mults": (2, 1),
        "channels": 2,
        "learned_variance": True,
        "full_attn": (True, False),
        "dropout": 0.1,
    },
}
TIMESTEPS: Final = (0, 1, 17, 500, 999)
_STUBS: Final = ("torchvision", "accelerate", "ema_pytorch", "scipy.optimize", "pytorch_fid.inception")


class _Anything(types.ModuleType):
    """A module that has whatever is imported from it, and does nothing."""

    __path__: Final[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def without_training() -> Iterator[None]:
    """For a while, modules that do nothing stand in for what the package imports only to train with."""
    names = [*_STUBS, "scipy", "pytorch_fid", "pytorch_fid.fid_score"]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: _Anything(name) for name in names})
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def original() -> Any:
    """The package. Raises ImportError where it, or einops, is not there."""
    with without_training():
        import denoising_diffusion_pytorch
    return denoising_diffusion_pytorch


def given(count: int) -> NDArray[np.float32]:
    """The normal numbers of a case, (count, *SHAPE): x_T, then those of each step in order."""
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


def inputs(channels: int) -> NDArray[np.float32]:
    """Noise for TIMESTEPS, (len(TIMESTEPS), channels, 8, 8)."""
    shape = (len(TIMESTEPS), channels, 8, 8)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def answer(x: Any, t: Any) -> Any:
    """What the networks of the chains say: nothing in particular, of x and of t (B,)."""
    return 0.9 * x + 0.3 * (t / T).reshape(-1, 1, 1, 1) - 0.2 * x * x


def variance(x: Any) -> Any:
    """v of those that learned it: all of [-1, 1], and some way past it."""
    return 1.2 - (x * 0.7) ** 2


def _chain(diffusion: Any) -> NDArray[np.float32]:
    """The last x of one of its chains on the given noise, before it is scaled to [0, 1]."""
    import torch

    noise = iter(torch.from_numpy(given(T + 1)))
    randn, randn_like = torch.randn, torch.randn_like
    torch.randn = lambda *size, **kind: next(noise)
    torch.randn_like = lambda x: next(noise)
    diffusion.unnormalize = lambda x: x
    try:
        x: NDArray[np.float32] = diffusion.sample(SHAPE[0]).numpy()
    finally:
        torch.randn, torch.randn_like = randn, randn_like
    return x


def _network(channels: int, learned: bool) -> Any:
    import torch

    class Network(torch.nn.Module):
        self_condition = False

        def __init__(self) -> None:
            super().__init__()
            self.channels, self.out_dim = channels, channels * (1 + learned)

        def forward(self, x: Any, t: Any, condition: Any = None) -> Any:
            out = answer(x, t)
            return torch.cat([out, variance(x)], dim=1) if learned else out

    return Network()


def main() -> None:
    """Write the file."""
    import torch

    peer = original()
    content: dict[str, NDArray[Any]] = {}
    for schedule in SCHEDULES:
        for total in (T, 1000):
            diffusion = peer.GaussianDiffusion(
                _network(1, False), image_size=4, timesteps=total, beta_schedule=schedule
            )
            content[f"betas {schedule} {total}"] = diffusion.betas.numpy()
        for objective in OBJECTIVES:
            for cut in (False, True):
                diffusion = peer.GaussianDiffusion(
                    _network(1, False),
                    image_size=4,
                    timesteps=T,
                    beta_schedule=schedule,
                    objective=objective,
                    min_snr_loss_weight=cut,
                )
                content[f"loss_weight {schedule} {objective} {cut}"] = diffusion.loss_weight.numpy()
    for schedule, objective, steps, eta in CHAINS:
        diffusion = peer.GaussianDiffusion(
            _network(1, False),
            image_size=4,
            timesteps=T,
            sampling_timesteps=steps,
            ddim_sampling_eta=eta,
            beta_schedule=schedule,
            objective=objective,
        )
        content[f"chain {(schedule, objective, steps, eta)}"] = _chain(diffusion)
    for schedule in SCHEDULES:  # of those that learned their variance: its DDIM of these does not run
        diffusion = peer.LearnedGaussianDiffusion(
            _network(1, True), image_size=4, timesteps=T, beta_schedule=schedule, objective="pred_noise"
        )
        content[f"learned {schedule}"] = _chain(diffusion)
    for name, arguments in UNETS.items():
        network = peer.Unet(**arguments).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        network.load_state_dict(named_weights(shapes))
        x, t = torch.from_numpy(inputs(arguments["channels"])), torch.tensor(TIMESTEPS)
        with torch.no_grad():
            content[f"prediction {name}"] = network(x, t).numpy()
        content[f"shapes {name}"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
