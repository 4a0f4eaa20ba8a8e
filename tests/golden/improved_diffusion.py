"""What improved-diffusion computes, kept so that the tests need no checkout of it.

    git clone https://github.com/openai/improved-diffusion      # 1bc7bbb, the last one
    python -m tests.golden.improved_diffusion improved-diffusion

writes improved_diffusion.npz beside this file: the timesteps of its respacing, whole chains, its losses and
bounds.
The peer keeps its tables in float32; everything else here is float64.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.words import Prediction

FILE: Final = Path(__file__).with_suffix(".npz")
SHAPE: Final = (2, 1, 4, 4)
SPACED: Final = [(1000, 250), (1000, 50), (1000, 20), (1000, 7), (1000, 1), (4000, 100), (300, 299)]
SCHEDULES: Final = ("linear", "cosine")
VARIANCES: Final = ("fixed_small", "fixed_large", "learned_range")
PREDICTIONS: Final[tuple[Prediction, ...]] = ("epsilon", "x0", "mean")
CHAINS: Final = list(itertools.product(SCHEDULES, VARIANCES, (1000, 250, 50, 7), (True, False)))
LOSSES: Final = [
    (schedule, prediction, variance, loss)
    for schedule, prediction in itertools.product(SCHEDULES, PREDICTIONS)
    for variance, loss in (
        ("fixed_small", "vlb"),
        ("fixed_large", "vlb"),
        ("learned_range", "vlb"),
        ("learned_range", "hybrid"),
    )
]
BOUND_IMAGES: Final = 3
BOUND_STEPS: Final = [0, 1, 2, 3, 17, 49, 500, 999]  # of which the terms are kept, and the sum of all
# Of a mean that is predicted, a respaced chain has another meaning there.
BOUNDS: Final = [
    (schedule, prediction, variance, steps, clip)
    for schedule, prediction, variance in itertools.product(SCHEDULES, PREDICTIONS, VARIANCES)
    for steps, clip in ((1000, True), (50, True), (50, False))
    if prediction == "epsilon" or (steps == 1000) == (prediction == "mean")
]
LOSS_TIMESTEPS: Final = [0, 1, 2, 17, 500, 999]


def learned(x: Any) -> Any:
    """v of the golden networks: all of [-1, 1], and some way past it."""
    return 1.2 - (x * 0.7) ** 2


def given(count: int) -> NDArray[np.float64]:
    """The normal numbers of a case, (count, *SHAPE)."""
    return np.random.default_rng(0).standard_normal((count, *SHAPE))


def loss_inputs() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """x_0 with numbers at both ends of [-1, 1], ε, and what the network says, each (len(LOSS_TIMESTEPS), 1, 4, 4)."""
    rng = np.random.default_rng(1)
    shape = len(LOSS_TIMESTEPS), *SHAPE[1:]
    x0 = (rng.integers(-3, 260, shape).clip(0, 255) / 127.5) - 1
    return x0, rng.standard_normal(shape), rng.standard_normal(shape)


def bound_images() -> NDArray[np.uint8]:
    """8-bit images, the darkest and the brightest values among them."""
    shape = BOUND_IMAGES, *SHAPE[1:]
    values: NDArray[np.uint8] = (
        np.random.default_rng(2).integers(-60, 316, shape).clip(0, 255).astype(np.uint8)
    )
    return values


class _Peer:
    """improved-diffusion, imported from a checkout."""

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, checkout)
        import torch
        from improved_diffusion import gaussian_diffusion, losses, respace  # type: ignore[import-not-found]

        self.torch, self.module, self.respace, self.losses = torch, gaussian_diffusion, respace, losses

    def diffusion(
        self, schedule: str, steps: int, prediction: Prediction, variance: str, loss: str = "MSE"
    ) -> Any:
        """One of its processes, T = 1000."""
        mean = {"epsilon": "EPSILON", "x0": "START_X", "mean": "PREVIOUS_X"}[prediction]
        return self.respace.SpacedDiffusion(
            use_timesteps=self.respace.space_timesteps(1000, [steps]),
            betas=self.module.get_named_beta_schedule(schedule, 1000),
            model_mean_type=self.module.ModelMeanType[mean],
            model_var_type=self.module.ModelVarType[variance.upper()],
            loss_type=self.module.LossType[loss],
        )

    def chain(self, schedule: str, variance: str, steps: int, clip: bool) -> NDArray[np.float64]:
        """The last x of a chain whose ε is the optimal one of the tests' Gaussian data."""
        from tests.test_solvers import SCHEDULES as OURS
        from tests.test_solvers import network

        def model(x: Any, t: Any) -> Any:
            out = network("epsilon", x.numpy(), int(t[0]), OURS[schedule])
            both = np.concatenate([out, learned(x.numpy())], axis=1) if variance == "learned_range" else out
            return self.torch.from_numpy(both)

        noise = self.torch.from_numpy(given(steps + 1))
        draws = iter(noise[1:])
        self.module.th.randn_like = lambda x: next(draws)
        diffusion = self.diffusion(schedule, steps, "epsilon", variance)
        x: NDArray[np.float64] = diffusion.p_sample_loop(
            model, SHAPE, noise=noise[0], clip_denoised=clip, device="cpu"
        ).numpy()
        return x

    def loss(self, schedule: str, prediction: Prediction, variance: str, kind: str) -> NDArray[np.float64]:
        """L_vlb, or the vlb term of L_hybrid before its weight, at LOSS_TIMESTEPS: bits a dimension."""
        x0, epsilon, out = map(self.torch.from_numpy, loss_inputs())
        both = self.torch.cat([out, learned(out)], dim=1) if variance == "learned_range" else out
        diffusion = self.diffusion(
            schedule, 1000, prediction, variance, "KL" if kind == "vlb" else "RESCALED_MSE"
        )
        terms = diffusion.training_losses(
            lambda x, t: both, x0, self.torch.tensor(LOSS_TIMESTEPS), noise=epsilon
        )
        value: NDArray[np.float64] = terms["loss"].numpy()
        return value

    def bound(
        self, schedule: str, prediction: Prediction, variance: str, steps: int, clip: bool
    ) -> NDArray[np.float64]:
        """What `calc_bpd_loop` finds of the tests' Gaussian network on our noise, in the mean over the images.

        (2, k + 2): the terms of BOUND_STEPS, then L_T and the bound; there the squared error of x̂0, then 0 and L_0 with
        the normal distribution in place of its tanh.
        """
        from ddpm_deploy.noise import forward_noise
        from tests.test_solvers import SCHEDULES as OURS
        from tests.test_solvers import network

        def model(x: Any, t: Any) -> Any:
            out = network(prediction, x.numpy(), int(t[0]), OURS[schedule])
            both = np.concatenate([out, learned(x.numpy())], axis=1) if variance == "learned_range" else out
            return self.torch.from_numpy(both)

        diffusion = self.diffusion(schedule, steps, prediction, variance)
        indices = np.arange(BOUND_IMAGES)

        def noise(t: int) -> Any:
            return self.torch.from_numpy(forward_noise(0, indices, t, SHAPE[1:]).astype(np.float64))

        visited = iter(sorted(self.respace.space_timesteps(1000, [steps]), reverse=True))
        self.module.th.randn_like = lambda x: noise(next(visited))
        x0 = self.torch.from_numpy(bound_images() / 127.5 - 1)
        found = diffusion.calc_bpd_loop(model, x0, clip_denoised=clip)
        terms, squares, prior, total = (
            found[name].numpy().mean(axis=0) for name in ("vb", "xstart_mse", "prior_bpd", "total_bpd")
        )
        kept = [-1 - step for step in BOUND_STEPS if step < steps]  # its steps fall
        exact = self._exact_decoder(diffusion, model, x0, noise(0), clip)
        return np.array([[*terms[kept], prior, total], [*squares[kept], 0.0, exact]])

    def _exact_decoder(self, diffusion: Any, model: Any, x0: Any, epsilon: Any, clip: bool) -> float:
        """L_0 with the normal distribution."""
        t = self.torch.zeros(len(x0), dtype=self.torch.long)
        approximate = self.losses.approx_standard_normal_cdf
        self.losses.approx_standard_normal_cdf = self.torch.special.ndtr
        found = diffusion._vb_terms_bpd(model, x0, diffusion.q_sample(x0, t, epsilon), t, clip_denoised=clip)
        self.losses.approx_standard_normal_cdf = approximate
        return float(found["output"].mean())


def main(checkout: str) -> None:
    """Write the file."""
    peer = _Peer(checkout)
    content = {
        f"spaced {total} {steps}": np.array(sorted(peer.respace.space_timesteps(total, [steps])))
        for total, steps in SPACED
    }
    for case in CHAINS:
        content[f"chain {case}"] = peer.chain(*case)
    for case in LOSSES:
        content[f"loss {case}"] = peer.loss(*case)
    for case in BOUNDS:
        content[f"bound {case}"] = peer.bound(*case)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main(sys.argv[1])
