"""The Fréchet distance of two sets of features, each taken as normally distributed, in float64.

    d² = |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½)        Dowson & Landau 1982; Heusel et al. 2017

With roots R of the covariances, Σ = R Rᵀ, the last trace is the sum of the singular values of R_aᵀ R_b: these keep the
digits that the eigenvalues of a product of covariances lose where one is singular, as of fewer images than features.
Of features only the number, the mean and the sums of products are kept.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.errors import ArtefactError, DataError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.machine import memory_limit
from ddpm_deploy.schedule import Floats

_ROWS: Final = 512  # features that are made float64 at a time
_EPSILON: Final = float(np.finfo(np.float64).eps)
# Of the largest number of a covariance: what rounding to float32 leaves of its symmetry.
_LOPSIDED: Final = 1e-6
_LARGEST: Final = (
    1e100  # of a mean or a covariance: their squares are finite, and those of features far below
)


@dataclass(frozen=True, eq=False)
class Normal:
    """A normal distribution: mean (d,), covariance (d, d), and the number of features that these were found from.

    count: None where a file does not say it.
    """

    mean: Floats
    covariance: Floats
    count: int | None = None

    @property
    def width(self) -> int:
        """d."""
        return len(self.mean)

    @cached_property
    def root(self) -> Floats:
        """R, (d, rank): R Rᵀ is the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        held = values > len(values) * _EPSILON * values[-1]  # below which rounding alone makes some
        root: Floats = vectors[:, held] * np.sqrt(values[held])
        return root

    @property
    def most_rank(self) -> int:
        """What the rank of the covariance can be at most: one less than the features that it is from."""
        return self.width if self.count is None else min(self.width, self.count - 1)


class Moments:
    """The mean and covariance of features that come in parts, each around its own mean: so no digits cancel."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._outer = np.zeros((width, width))

    def add(self, features: NDArray[Any]) -> None:
        """Add features (n, d), n of 1 or more."""
        for start in range(0, len(features), _ROWS):
            part = features[start : start + _ROWS].astype(np.float64)
            mean = part.mean(axis=0)
            part -= mean
            apart, total = mean - self._mean, self.count + len(part)
            self._outer += part.T @ part
            self._outer += np.outer(apart, apart) * (self.count * len(part) / total)  # Chan et al. 1979
            self._mean += apart * (len(part) / total)
            self.count = total

    @property
    def normal(self) -> Normal:
        """The distribution with these moments. Raises DataError where there are not two features."""
        if self.count < 2:
            raise DataError(f"a covariance is of two images or more, and there are {self.count}")
        return Normal(self._mean.copy(), self._outer / (self.count - 1), self.count)


def normal_of(features: NDArray[Any]) -> Normal:
    """The distribution of features (n, d)."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.normal


def frechet_distance(a: Normal, b: Normal) -> float:
    """d² of two distributions of as many numbers; rounding may leave a little below 0 of equal ones."""
    shared = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def standard_error(target: Normal, own: Normal, features: NDArray[Any]) -> float:
    """The standard error of the distance to a target that is held fixed, as other samples would be drawn.

    own: the distribution of all samples. features: (n, d), all of theirs or a random part. To first order, the distance
    of samples is the mean of what each adds to it, and so its error is that of a mean (the infinitesimal jackknife).
    """
    assert own.count is not None
    left, values, _ = np.linalg.svd(target.root.T @ own.root, full_matrices=False)
    held = values > len(values) * _EPSILON * values.max(initial=0.0)
    # cᵀ T c with the map T = R (Rᵀ Σ R)^-½ Rᵀ, by which the samples would be carried to the target.
    carry = target.root @ (left[:, held] / np.sqrt(values[held]))
    adds = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        apart = features[start : start + _ROWS] - own.mean
        along = 2 * apart @ (own.mean - target.mean)
        adds[start : start + len(apart)] = along + (apart**2).sum(1) - ((apart @ carry) ** 2).sum(1)
    return float(np.std(adds, ddof=1) / math.sqrt(own.count))


def bias_by_halves(target: Normal, own: Normal, features: NDArray[Any]) -> float:
    """By how much the distance is too large for the number of samples, about: it falls as one over that.

    features: as of `standard_error`. Half of them are further away by as much as all of them are too far; NaN of fewer
    than four. The number of the target's images has a bias of its own.
    """
    half = len(features) // 2
    if half < 2 or own.count is None:
        return math.nan
    whole = own if len(features) == own.count else normal_of(features)
    halves = [frechet_distance(target, normal_of(part)) for part in (features[::2], features[1::2])]
    return float(np.mean(halves) - frechet_distance(target, whole)) * len(features) / own.count


def load_normal(path: Path) -> Normal:
    """The distribution in a file of reference statistics: an .npz with `mu` (d,) and `sigma` (d, d), as TTUR writes it.

    Other arrays in it are left unread. Raises ArtefactError where it is missing, broken, or no such distribution.
    """
    require_file(path)
    name = show(path)
    try:
        require_honest(path, memory_limit())
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (_read(archive, one) for one in ("mu", "sigma"))
    except ArtefactError:
        raise
    except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
        raise ArtefactError(
            f"{name} is not a readable .npz of reference statistics: {first_line(error)}"
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise ArtefactError(
            f"{name}: mu is {mean.shape} and sigma {covariance.shape}, and (d,) and (d, d) are needed"
        )
    for what, values in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(values).all():
            raise ArtefactError(f"{name}: {what} has numbers that are not finite: make it again")
        if np.abs(values).max() > _LARGEST:
            raise ArtefactError(
                f"{name}: {what} has numbers over {_LARGEST:.0e}, which no features have: make it again"
            )
    _require_covariance(covariance, name)
    return Normal(mean, (covariance + covariance.T) / 2)


def _read(archive: Any, one: str) -> Floats:
    if one not in archive.files:
        held = show(", ".join(archive.files[:5])) or "nothing"
        raise ValueError(f"it holds {held}, and the arrays mu and sigma are needed")
    values = archive[one]
    if values.dtype.kind != "f":
        raise ValueError(f"{one} is of {values.dtype}, and not of floats")
    return values.astype(np.float64)  # type: ignore[no-any-return]


def _require_covariance(covariance: Floats, name: str) -> None:
    """Raise ArtefactError unless a matrix is symmetric and without negative eigenvalues, but for rounding."""
    allowed = _LOPSIDED * np.abs(covariance).max()
    apart = np.abs(covariance - covariance.T).max()
    if apart > allowed:
        raise ArtefactError(f"{name}: sigma is not symmetric (by {apart:.3g}), as a covariance is")
    lowest = np.linalg.eigvalsh(covariance)[0]
    if lowest < -allowed * len(covariance):
        raise ArtefactError(
            f"{name}: sigma has the eigenvalue {lowest:.3g}, and a covariance has none below 0"
        )
