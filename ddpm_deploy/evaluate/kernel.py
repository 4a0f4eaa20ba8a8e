"""The kernel distance of two sets of features: KID, where these are Inception's (Bińkowski et al. 2018).

    MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)        over x ≠ x', y ≠ y'
    k(a, b) = (a·b/d + 1)³

It is unbiased for any number of images, and so may be negative. The literature has the mean of random subsets, whose
mean over all subsets is the figure of the whole sets: that is what `kernel_distance` gives.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError
from ddpm_deploy.schedule import Floats
from ddpm_deploy.stages import Progress, no_progress

SUBSETS: Final = 100
SUBSET_SIZE: Final = 1000
_ROWS: Final = 1000  # of the kernel's matrix that are there at a time


@dataclass(frozen=True)
class KernelDistance:
    """MMD² of all features, its standard error as the y are drawn again, and what subsets give.

    subsets_mean, subsets_sd: of `SUBSETS` random ones of `SUBSET_SIZE` images of either side, as papers and
    torch-fidelity write KID; the standard deviation is of one subset, and not the error of the mean. NaN where there
    are not more images than these.
    """

    value: float
    error: float
    subsets_mean: float = math.nan
    subsets_sd: float = math.nan


def kernel_distance(
    x: NDArray[Any], y: NDArray[Any], *, seed: int = 0, progress: Progress = no_progress
) -> KernelDistance:
    """MMD² of features x (n, d) and y (m, d). progress: of `SUBSETS` + 1 steps. Raises DataError for under two."""
    if min(len(x), len(y)) < 2:
        raise DataError(
            f"the kernel distance is of two images or more of either side, not {len(x)} and {len(y)}"
        )
    value, error = _mmd2(x, y)
    progress(1)
    if min(len(x), len(y)) <= SUBSET_SIZE:
        progress(SUBSETS)
        return KernelDistance(value, error)
    random = np.random.Generator(np.random.Philox(seed))
    found = []
    for _ in range(SUBSETS):
        some = (side[np.sort(random.permutation(len(side))[:SUBSET_SIZE])] for side in (x, y))
        found.append(_mmd2(*some)[0])
        progress(1)
    return KernelDistance(value, error, float(np.mean(found)), float(np.std(found, ddof=1)))


def _mmd2(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """The unbiased estimate, and its standard error over y by what each y adds to it, to first order."""
    among_x, among_y = _row_sums(x, x, others=True), _row_sums(y, y, others=True)
    across = _row_sums(y, x)
    n, m = len(x), len(y)
    value = among_x.sum() / (n * (n - 1)) + among_y.sum() / (m * (m - 1)) - 2 * across.sum() / (n * m)
    each = among_y / (m - 1) - across / n
    return float(value), float(2 * np.std(each, ddof=1) / math.sqrt(m))


def _row_sums(a: NDArray[Any], b: NDArray[Any], *, others: bool = False) -> Floats:
    """Σ_j k(a_i, b_j), (len(a),). others: a is b, and each without itself."""
    width, sums = a.shape[1], np.empty(len(a))
    for start in range(0, len(a), _ROWS):
        part = a[start : start + _ROWS]
        kernel = (part @ b.T).astype(np.float64) / width
        kernel += 1
        kernel *= kernel * kernel
        if others:
            kernel[np.arange(len(part)), np.arange(start, start + len(part))] = 0
        sums[start : start + len(part)] = kernel.sum(axis=1)
    return sums
