"""Every tolerance in one table, each with what was measured when it was set.

`ddpm-export` and `ddpm-verify` judge by PARITY; the tests read both.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Parity:
    """How near a network of one precision must come to its reference.

    prediction: RMS of the error of the prediction relative to the RMS of the prediction, as pairs of
        the share of T from which a limit holds, and the limit. The last steps are allowed more: the noise
        that they predict is small beside the image it is in, and so beside what rounding does to that.
    psnr: of the final images of whole chains on the same noise, in dB with the width of the value range
        as peak, worst image.
    measured: what there was when the limits were set, and when.
    """

    prediction: tuple[tuple[float, float], ...]
    psnr: float
    measured: str

    def limit(self, timestep: int, timesteps: int) -> float:
        """What the prediction at one of T timesteps is allowed."""
        return next(limit for share, limit in reversed(self.prediction) if timestep >= share * timesteps)


@dataclass(frozen=True)
class Tolerance:
    """A limit, the largest value measured when it was set (November 2026), and of what."""

    limit: float
    measured: float
    what: str


# Finest first. A reduced precision is judged by what its hardware computes, as the oracle of
# `export.precision` does; ONNX Runtime on a CPU comes nearer.
PARITY: Final[dict[str, Parity]] = {
    "fp32": Parity(
        prediction=((0.0, 5e-6),),
        psnr=110.0,
        measured="2026-11-24, trained digits, 16 images, every t: 2.2e-6 (at t = 0; 3e-7 from 300 up), 127 dB",
    ),
    "tf32": Parity(
        prediction=((0.0, 1.5e-2), (0.1, 2e-3)),
        psnr=70.0,
        measured="2026-11-25, emulated in PyTorch (benches/tf32.py: ten bits of what products read), trained "
        "digits, 4 images, 200 timesteps: 6.1e-3 (at t = 0), 6.4e-4 (from 100 up), 84 dB; not on a GPU",
    ),
    "fp16": Parity(
        prediction=((0.0, 1e-2), (0.1, 5e-3)),
        psnr=60.0,
        measured="2026-11-25, the oracle, trained digits, every t: 2.7e-3 (below 10), 4.0e-4 (from 100 up), 69 dB; "
        "random weights of the cifar10 network: 2.1e-3 at any t, 71 dB",
    ),
    "bf16": Parity(
        prediction=((0.0, 8e-2), (0.1, 4e-2)),
        psnr=42.0,
        measured="2026-11-25, the oracle, trained digits, every t: 2.5e-2 (below 10), 3.1e-3 (from 100 up), 57 dB; "
        "random weights of the cifar10 network: 1.8e-2 at any t, 52 dB",
    ),
}

# Of final images of float32 models that predict the mean, in place of PARITY's: there x' is the prediction itself, and
# each step passes its rounding on whole, where of ε some hundredth of it enters (β/√(1 - ᾱ)): 40 dB.
MEAN_PSNR: Final = 70.0  # 2026-11-25, digits trained for 1000 steps, 4 images: 83 dB

DOCTOR: Final = Tolerance(
    1e-5, 7.5e-7, "the known chain of `ddpm-deploy doctor`, largest error of 49,152 pixels, ONNX Runtime"
)

TOLERANCES: Final = {
    "box_muller": Tolerance(2.5e-7, 1.6e-7, "relative to the radius, against NumPy's float64 log and cos"),
    "gaussian_table": Tolerance(1e-10, 2.9e-12, "relative, mean and variance of the chain's output, float64"),
    "diffusers_betas": Tolerance(3e-7, 1.1e-7, "relative; its betas are float32"),
    "diffusers_embedding": Tolerance(1e-4, 5.1e-5, "its angles are float32"),
    "diffusers_ddpm_bound": Tolerance(
        5e-3, 3.8e-3, "of the bound that float32 coefficients set, whole chains (cosine: 1/√ᾱ reaches 20,291)"
    ),
    "diffusers_ddim": Tolerance(5e-5, 2.7e-5, "whole chains on shared noise, any schedule, clipping and η"),
    "diffusers_2m": Tolerance(6e-6, 2.9e-6, "whole chains of its DPMSolverMultistepScheduler"),
    "diffusers_2m_cosine": Tolerance(4e-4, 2.0e-4, "the same; 1/√ᾱ reaches 20,291"),
    "improved_diffusion_linear": Tolerance(
        6e-7, 3.2e-7, "whole respaced chains, every variance; its tables are float32"
    ),
    "improved_diffusion_cosine": Tolerance(1.3e-6, 6.6e-7, "the same"),
    "improved_diffusion_loss": Tolerance(
        4e-6, 1.7e-6, "L_t and L_hybrid, relative and absolute, t > 0; float32"
    ),
    "improved_diffusion_nll": Tolerance(8e-4, 4.1e-4, "relative, at t = 0, where it has a tanh for Φ"),
    "diffusers_replay": Tolerance(8e-5, 3.9e-5, "our float32 chain on its noise, through Sampler"),
    "diffusers_pipeline": Tolerance(
        3e-5, 8.1e-6, "whole chains of its DDPMPipeline on our noise, images in [0, 1]"
    ),
    "diffusers_network": Tolerance(
        1e-5, 1.9e-6, "our U-Net with the same weights, relative to the largest prediction"
    ),
}
