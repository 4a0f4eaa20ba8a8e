"""What the tests allow, in one table, each with what was measured when it was set.

How near a network must come to its reference is in `ddpm_deploy/tolerances.py`.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tolerance:
    """A limit, the largest value measured when it was set (November 2026), and of what."""

    limit: float
    measured: float
    what: str


TOLERANCES: Final = {
    "box_muller": Tolerance(2.5e-7, 1.6e-7, "relative to the radius, against NumPy's float64 log and cos"),
    "gaussian_table": Tolerance(1e-10, 2.9e-12, "relative, mean and variance of the chain's output, float64"),
    "diffusers_betas": Tolerance(3e-7, 1.1e-7, "relative; its betas are float32"),
    "diffusers_embedding": Tolerance(1e-4, 5.1e-5, "its angles are float32"),
    "diffusers_ddpm_bound": Tolerance(
        5e-3, 3.8e-3, "of the bound that float32 coefficients set, whole chains (cosine: 1/√ᾱ reaches 20,291)"
    ),
    "diffusers_ddim": Tolerance(5e-5, 2.7e-5, "whole chains on shared noise, any schedule, clipping and η"),
    "diffusers_inversion": Tolerance(1.5e-6, 7.2e-7, "whole chains of its DDIMInverseScheduler, relative; ε"),
    "inversion_gaussian": Tolerance(
        5e-6,
        1.9e-6,
        "DDIM inversion on Gaussian data against its recursion in float64; 30 to 120 float32 steps",
    ),
    "inversion_undone": Tolerance(
        2e-12, 5.5e-13, "rows of inversion and DDIM in float64, one ε, every prediction"
    ),
    "diffusers_2m": Tolerance(6e-6, 2.9e-6, "whole chains of its DPMSolverMultistepScheduler"),
    "diffusers_2m_cosine": Tolerance(4e-4, 2.0e-4, "the same; 1/√ᾱ reaches 20,291"),
    "diffusers_sde_2m": Tolerance(4e-5, 1.9e-5, "the same of its sde-dpmsolver++, on shared noise"),
    "improved_diffusion_linear": Tolerance(
        6e-7, 3.2e-7, "whole respaced chains, every variance; its tables are float32"
    ),
    "improved_diffusion_cosine": Tolerance(1.3e-6, 6.6e-7, "the same"),
    "improved_diffusion_loss": Tolerance(
        4e-6, 1.7e-6, "L_t and L_hybrid, relative and absolute, t > 0; float32"
    ),
    "improved_diffusion_nll": Tolerance(8e-4, 4.1e-4, "relative, at t = 0, where it has a tanh for Φ"),
    "improved_diffusion_bound": Tolerance(
        4e-6, 1.0e-6, "terms of calc_bpd_loop, relative and absolute; float32"
    ),
    "improved_diffusion_denoised": Tolerance(
        2e-7, 5.3e-8, "its squared errors of x̂0, relative to their root and the factors a, b of x̂0; float32"
    ),
    "improved_diffusion_decoder": Tolerance(
        1.4e-3, 6.9e-4, "its whole bound, relative: its tanh for Φ, in L_0"
    ),
    "bound_of_training": Tolerance(
        1.2e-5, 6.1e-6, "terms of the bound in NumPy and in training, relative; float32"
    ),
    "bound_pt_onnx": Tolerance(
        1e-6, 1.5e-9, "the bound of a trained network in PyTorch and ONNX Runtime, relative"
    ),
    "frechet_scipy": Tolerance(
        1e-6, 3.4e-14, "the Fréchet distance by SciPy's and NumPy's general matrices, relative"
    ),
    "frechet_singular": Tolerance(
        1e-6, 4.4e-16, "the same of fewer images than features, by singular values, relative"
    ),
    "kernel_float32": Tolerance(1e-4, 8.8e-8, "MMD² of features in float32, relative"),
    "inception_features": Tolerance(
        1e-5, 3.1e-7, "torch-fidelity's Inception, relative to the largest feature"
    ),
    "efficientnet_features": Tolerance(
        1e-5, 0, "efficientnet_lite_pytorch's network, relative to the largest feature"
    ),
    "diffusers_replay": Tolerance(8e-5, 3.9e-5, "our float32 chain on its noise, through Sampler"),
    "diffusers_pipeline": Tolerance(
        3e-5, 8.1e-6, "whole chains of its DDPMPipeline on our noise, images in [0, 1]"
    ),
    "openai": Tolerance(
        1e-5, 5.5e-6, "relative RMS of the prediction, both code bases; their angles of t are float32"
    ),
    "openai_chain": Tolerance(
        1e-5, 4.3e-6, "relative RMS of the images of their samplers on our noise, 7 to 50 steps"
    ),
    "imported_prediction": Tolerance(1e-5, 1.8e-6, "relative RMS, diffusers' networks as imported"),
    "imported_ddpm": Tolerance(
        2.6e-4, 1.3e-4, "whole chains of an imported DDPMScheduler; its 1 - ᾱ/ᾱ_prev is of float32"
    ),
    "imported_ddim": Tolerance(4e-6, 2.0e-6, "the same of a DDIMScheduler"),
    "imported_dpm": Tolerance(3e-6, 1.3e-6, "the same of a DPMSolverMultistepScheduler"),
    "diffusers_network": Tolerance(
        1e-5, 1.9e-6, "our U-Net with the same weights, relative to the largest prediction"
    ),
    "monai_network": Tolerance(1e-5, 1.0e-6, "our U-Net with its weights, relative RMS"),
    "monai_chain": Tolerance(
        2e-5, 9.4e-6, "whole chains of its schedulers with tables in float64, relative RMS"
    ),
    "monai_float32": Tolerance(3e-4, 1.5e-4, "the same with its own tables: 1 - ᾱ of 1e-4 in float32"),
    "lucidrains_betas": Tolerance(2e-7, 5.8e-8, "relative; its betas are float32"),
    "lucidrains_chain": Tolerance(1e-6, 5.3e-7, "whole chains of both its samplers, relative RMS"),
    "lucidrains_network": Tolerance(1e-5, 0.0, "its own module with its weights, relative RMS"),
    "lucidrains_onnx": Tolerance(5e-6, 5.3e-7, "whole chains of a trained one in ONNX Runtime, relative RMS"),
    "ho_prediction": Tolerance(
        1e-5, 2.8e-6, "relative RMS at each t, of networks in pesser's, ermongroup's and w86763777's code"
    ),
    "ho_chain": Tolerance(
        6e-5, 2.4e-5, "relative RMS of whole chains of their own samplers, T = 50, float32"
    ),
    "own_module": Tolerance(
        1e-4,
        6.2e-6,
        "whole chains of users' own networks, against their loop in float64 around the original network",
    ),
    "processes_loss": Tolerance(
        1e-5, 3.5e-6, "losses of two processes and of one, relative, as metrics.csv has them"
    ),
    "processes_weights": Tolerance(2e-6, 2.0e-7, "their weights after 75 steps, relative RMS"),
}
