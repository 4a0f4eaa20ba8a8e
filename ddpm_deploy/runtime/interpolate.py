"""From one image to another through x_t (Ho et al. 2020, section 4.4): both are encoded at a depth, blended there, and
decoded by the reverse chain, which takes away what a blend of pixels would show of both.

    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε      of each image, at the first timestep of the chain
    x̄_t = √ᾱ_t x̄_0 + √(1 - ᾱ_t) ε̄      x̄_0: (1 - λ)·x_0 + λ·x_0'; ε̄: the same on the arc between ε and ε'

Two encoders say what ε is. "noise" draws it from q(x_t | x_0), the same for both images, so that ε̄ = ε and x̄_t is the
paper's (1 - λ)·x_t + λ·x_t'. "ddim" runs DDIM the other way (`solvers.ddim_inversion`), so that the chain comes back to
the images themselves; two such ε are nearly at right angles, and a straight line between them would pass through x̄_t
with too little noise (Song et al. 2021, appendix D.5).

Unless it is told otherwise, all images of a strip are decoded with the noise of sample 0 of the seed: λ alone differs.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Unpack

import msgspec
import numpy as np

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.noise import forward_noise
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Keywords, Request, make_request, unchecked_request
from ddpm_deploy.runtime.sampler import Callback, Sampler
from ddpm_deploy.schedule import Floats
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import ENCODERS, Encoder

COUNT: Final = 9  # images of a strip, where nothing else is said
_EIGHT_BIT_STEPS: Final = 255
_NO_ARC: Final = 1e-6  # sine of an angle under which an arc is a straight line


@dataclass(frozen=True, eq=False)
class Latents:
    """Two images at a depth, each as what is left of it and the noise that is in it.

    ends: x_0 of both, (2, C, H, W). noise: ε of both, (2, C, H, W). alpha_cumprod: ᾱ_t.
    """

    ends: Array
    noise: Floats
    alpha_cumprod: float

    def blended(self, weights: Floats) -> Array:
        """x̄_t for each λ of `weights`, (n,): float32 (n, C, H, W)."""
        ac, (first, last) = self.alpha_cumprod, self.ends.astype(np.float64)
        to_last = weights.reshape(-1, 1, 1, 1)
        image = (1 - to_last) * first + to_last * last
        x: Array = (math.sqrt(ac) * image + math.sqrt(1 - ac) * self._noise(to_last)).astype(np.float32)
        return x

    def _noise(self, to_last: Floats) -> Floats:
        """ε̄, on the arc from one ε to the other, which is a point where they are the same."""
        first, last = self.noise
        lengths = float(np.linalg.norm(first) * np.linalg.norm(last))
        cosine = float(np.vdot(first, last)) / lengths if lengths else 1.0
        angle = math.acos(min(1.0, max(-1.0, cosine)))
        if math.sin(angle) < _NO_ARC:
            line: Floats = (1 - to_last) * first + to_last * last
            return line
        arc = np.sin((1 - to_last) * angle) * first + np.sin(to_last * angle) * last
        blended: Floats = arc / math.sin(angle)
        return blended


@dataclass(frozen=True, eq=False)
class Interpolation:
    """A strip of images from one to another.

    images: (count, C, H, W) in the model's value range. weights: λ of each, (count,), 0 to 1. ends: the originals,
    (2, C, H, W). request: by which the strip was decoded.
    """

    images: Array
    weights: Floats
    ends: Array
    request: Request
    spec: ModelSpec

    @cached_property
    def errors(self) -> tuple[float, float]:
        """How far the first and the last image are from the originals: see `end_errors`."""
        return end_errors(self.images[[0, -1]], self.ends, self.spec)


def interpolate(
    sampler: Sampler,
    first: Array,
    last: Array,
    *,
    count: int = COUNT,
    encoder: Encoder = "noise",
    callback: Callback | None = None,
    **keywords: Unpack[Keywords],
) -> Interpolation:
    """Draw `count` images from `first` to `last`, (C, H, W) each in the model's value range, both ends among them.

    encoder: "noise", from q(x_t | x_0), or "ddim", which comes back to the originals but for its error, which falls
        with the steps and `Interpolation.errors` tells.
    depth, of the keywords: timesteps of diffusion to encode them by, 1 .. T (None: half of T): the deeper, the less the
        images have of the two, and the more of the model. The other keywords are of the chain that decodes, as of
        `Sampler.sample`; for the encoder "ddim" the solver is "ddim" unless another is named. share_until is 0 unless
        it is given, so that all are decoded with the same noise. labels: None is the null class.
    callback: of the decoding, as of `Sampler.sample`.

    Raises SettingError for an argument out of range, and what `Sampler.sample` raises.
    """
    ends = checked_ends(first, last, sampler.spec)
    asked = unchecked_request(count, **keywords)
    request = strip_request(asked, sampler.spec, encoder)
    weights = strip_weights(request)
    start = encoded(sampler, ends, request, encoder).blended(weights)
    images = np.concatenate(list(sampler.draw(request, callback, start=start)))
    return Interpolation(images, weights, ends, request, sampler.spec)


def checked_ends(first: Array, last: Array, spec: ModelSpec) -> Array:
    """The two images as float32 (2, C, H, W). Raises SettingError where one is of another shape, not finite,
    or far out of the model's value range, as pixels from 0 to 255 are."""
    try:
        ends = [np.asarray(image, np.float32) for image in (first, last)]
    except (TypeError, ValueError) as error:
        raise SettingError(f"an image is no array of numbers: {first_line(error)}") from error
    low, high = spec.value_range  # which images of a chain that does not clip leave a little
    for image in ends:
        if image.shape != spec.image_shape:
            raise SettingError(
                f"the images must be finite numbers of the shape {spec.image_shape}, not {image.shape}"
            )
        if not np.isfinite(image).all():
            raise SettingError("the images must be finite numbers, and one has others")
        if image.min() < low - (high - low) or image.max() > high + (high - low):
            raise SettingError(
                f"an image has values from {image.min():.7g} to {image.max():.7g}, and the model's are from {low:.7g} "
                f"to {high:.7g}: bring it to these first"
            )
    return np.stack(ends)


def strip_request(asked: Request, spec: ModelSpec, encoder: Encoder) -> Request:
    """The checked request of a strip: with its own defaults in place of what was not asked.

    Raises SettingError where it is out of range, or a label is needed.
    """
    if encoder not in ENCODERS:
        raise SettingError(f"encoder {encoder!r} is not known: choose from {', '.join(ENCODERS)}")
    if asked.table is not None:
        raise SettingError("a strip is decoded by a chain of the model's: leave table out")
    if asked.count < 2:
        raise SettingError(f"a strip has both ends: count must be 2 or more, not {asked.count}")
    if spec.num_classes and not asked.labels and not spec.null_class:
        raise SettingError("this model knows classes alone: say of which the images are to be, by labels")
    own_solver = "ddim" if encoder == "ddim" else None
    return msgspec.structs.replace(
        asked,
        depth=max(1, spec.timesteps // 2) if asked.depth is None else asked.depth,
        share_until=0 if asked.share_until is None else asked.share_until,
        solver=own_solver if asked.solver is None else asked.solver,
        labels=asked.labels or ((spec.num_classes,) if spec.null_class else ()),
    ).checked(spec)


def strip_weights(request: Request) -> Floats:
    """λ of each image of a strip, (count,): 0 to 1, evenly."""
    return np.linspace(0.0, 1.0, request.count)


def encoded(
    sampler: Sampler, ends: Array, request: Request, encoder: Encoder, callback: Callback | None = None
) -> Latents:
    """The two images (2, C, H, W) at the first timestep of the request's chain. callback: of the inversion."""
    spec = sampler.spec
    t = int(request.table_for(spec).timesteps[0])
    ac = float(spec.make_schedule().alphas_cumprod[t])
    if encoder == "noise":
        assert request.seed is not None
        noise = forward_noise(request.seed, np.zeros(1, np.int64), t, spec.image_shape)
        return Latents(ends, np.repeat(noise, 2, axis=0).astype(np.float64), ac)
    x = np.concatenate(list(sampler.draw(inversion_request(request, spec), callback, start=ends)))
    return Latents(ends, (x - math.sqrt(ac) * ends.astype(np.float64)) / math.sqrt(1 - ac), ac)


def inversion_request(request: Request, spec: ModelSpec) -> Request:
    """What takes the two ends of a strip to where it is decoded from, by DDIM inversion, with the labels and the
    guidance that its first and its last image have."""
    labels, scales = request.label_numbers(spec), request.scales()
    return make_request(
        spec,
        2,
        table=spec.inversion_table(request.chain, request.depth),
        seed=request.seed,
        labels=None if labels is None else labels[[0, -1]],
        guidance=None if scales is None else scales[[0, -1]],
    )


def end_errors(decoded: Array, ends: Array, spec: ModelSpec) -> tuple[float, float]:
    """The root mean squared distance of two decoded images from their originals, (2, C, H, W) each, in steps of 8-bit
    images, 0 to 255."""
    low, high = spec.value_range
    squares = (decoded.astype(np.float64) - ends) ** 2
    first, last = np.sqrt(squares.mean(axis=(1, 2, 3))) * _EIGHT_BIT_STEPS / (high - low)
    return float(first), float(last)
