"""How near a network must come, each figure with what was measured when it was set.

`ddpm-export` and `ddpm-verify` judge by PARITY, and so do the tests, whose own table is `tests/tolerances.py`.
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
        psnr=40.0,
        measured="2026-11-25, the oracle, trained digits, every t: 2.5e-2 (below 10), 3.1e-3 (from 100 up), 57 dB; "
        "random weights of the cifar10 network: 1.8e-2 at any t, 52 dB; 2026-11-26, OpenVINO with AMX, trained "
        "digits, 192 images, every t: 6.6e-2 (below 10), 6.4e-3 (from 100 up), 43 dB, their mean 61",
    ),
}

# Of float32 predictions of networks that are not ours, in place of PARITY's: their operators round as they do, and
# random weights pass it on. 2026-11-26: trained ones 2e-7 to 2e-6, random weights of lucidrains' Unet 6.0e-6.
FOREIGN_PREDICTION: Final = ((0.0, 2e-5),)

# Of final images of float32 models that predict the mean, in place of PARITY's: there x' is the prediction itself, and
# each step passes its rounding on whole, where of ε some hundredth of it enters (β/√(1 - ᾱ)): 40 dB.
MEAN_PSNR: Final = 70.0  # 2026-11-25, digits trained for 1000 steps, 4 images: 83 dB

# Largest error of the images of `ddpm-deploy doctor`'s known chain.
DOCTOR: Final = 1e-5  # November 2026, ONNX Runtime: 7.5e-7, of 49,152 pixels
