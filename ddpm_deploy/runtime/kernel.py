"""The source of the fused step kernel, with the constants that it shares with NumPy's chain."""

from importlib import resources
from typing import Final

import numpy as np

from ddpm_deploy import exponential, noise

THREADS: Final = 128  # of a block; each makes four numbers
OPTIONS: Final = ("--fmad=false", "--std=c++17")  # no contraction: NumPy has none

# As `struct Slot` of step.cu.
SLOT: Final = np.dtype(
    [
        ("row", np.int32),
        ("end", np.int32),
        ("key", np.uint32, 2),
        ("sample", np.uint32, 2),
        ("arrived", np.uint32),
        ("broken", np.uint32),
    ]
)


def kernel_source() -> str:
    """step.cu behind definitions of what noise.py and exponential.py are made of."""
    constants: dict[str, float | int | tuple[float, ...]] = {
        "LN_SERIES": noise.LN_SERIES,
        "SIN_PI_SERIES": noise.SIN_PI_SERIES,
        "COS_PI_SERIES": noise.COS_PI_SERIES,
        "LN_2": noise.LN_2,
        "SQRT_HALF_BITS": noise.SQRT_HALF_BITS,
        "EXP_SERIES": exponential.EXP_SERIES,
        "LOG2_E": exponential.LOG2_E,
        "LARGEST": f"{exponential.LARGEST}f",  # type: ignore[dict-item]
    }
    definitions = [
        f"#define {name} {', '.join(map(repr, value)) if isinstance(value, tuple) else value}"
        for name, value in constants.items()
    ]
    source = resources.files("ddpm_deploy.runtime").joinpath("step.cu").read_text(encoding="utf-8")
    return "\n".join(definitions) + "\n" + source


def blocks(size: int) -> int:
    """How many blocks of the grid a slot of `size` numbers takes."""
    return -(-size // (4 * THREADS))
