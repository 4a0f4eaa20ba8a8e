"""Every tolerance in one table, each with what was measured when it was set.

`ddpm-export` and `ddpm-verify` judge by PARITY; the tests read both.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Parity:
    """How near a network of one precision must come to its reference.

    prediction: RMS of the error of the prediction relative to the RMS of the prediction, at every t.
    psnr: of the final images of whole chains on the same noise, in dB at peak 2 ([-1, 1]), worst image.
    """

    prediction: float
    psnr: float


@dataclass(frozen=True)
class Tolerance:
    """A limit, the largest value measured when it was set, and where."""

    limit: float
    measured: float
    what: str


PARITY: Final = {"fp32": Parity(prediction=5e-6, psnr=110.0)}

TOLERANCES: Final[dict[str, Tolerance]] = {}
