"""Pictures of a chain on its way: how the images appear in x̂0 (Ho et al. 2020, figure 6)."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import OutputError
from ddpm_deploy.files import atomic, require_output, show
from ddpm_deploy.runtime.images import COLOURS, Pixels, grid, save_png, to_pillow, to_uint8
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.spec import ModelSpec

_FILM: Final = (8, 10)  # images, and looks at each
_ANIMATION: Final = (16, 60)
_FRAME_MS, _LAST_FRAME_MS = 60, 2500


class Preview:
    """A film strip (.png: a row an image, left to right in time) or an animation (.gif) of the first images of a run.

    path: of the file. steps: of the chain, of which those before `first` are not seen. spec: the model's.
    """

    def __init__(self, path: Path, spec: ModelSpec, steps: int, first: int = 0) -> None:
        self.path = path
        self._spec = spec
        self._is_film = path.suffix.lower() == ".png"
        self._most, looks = _FILM if self._is_film else _ANIMATION
        self._last = steps - 1
        self._wanted = set(np.linspace(first, self._last, looks).round().astype(int).tolist())
        self._looks: list[Pixels] = []  # (k, H, W, C) each
        self._done = False

    def check(self) -> None:
        """Raise OutputError where it could not be written: ask this before long work."""
        name = show(self.path)
        if self.path.suffix.lower() not in (".png", ".gif"):
            raise OutputError(f"{name}: progress is shown in a .gif, or a .png (a film strip)")
        if self._spec.image_shape[0] not in COLOURS:
            raise OutputError(f"{name}: images of {self._spec.image_shape[0]} channels cannot be shown")
        require_output(self.path)
        require("PIL.Image", "cpu")

    def wants(self, step: int) -> bool:
        """Whether a step is shown."""
        return not self._done and step in self._wanted

    def see(self, step: int, x: Array, x0: Array) -> None:
        """Keep x̂0 of a step that is shown, and of the last step the image."""
        if not self.wants(step):
            return
        self._done = step == self._last
        look = x if self._done else x0
        self._looks.append(to_uint8(look[: self._most], self._spec.value_range))

    def save(self) -> None:
        """Write what was seen."""
        if self._is_film:
            film = np.stack(self._looks, axis=1)  # (k, looks, H, W, C)
            save_png(grid(film.reshape(-1, *film.shape[2:]), columns=film.shape[1]), self.path, {})
            return
        first, *others = [_opaque(to_pillow(grid(look))) for look in self._looks]
        times = [_FRAME_MS] * len(others) + [_LAST_FRAME_MS]
        with atomic(self.path) as temporary:
            first.save(temporary, save_all=True, append_images=others, duration=times, loop=0)


def _opaque(picture: Any) -> Any:
    """A PIL.Image on white where it is RGBA: a .gif knows no half-transparent colour."""
    if picture.mode != "RGBA":
        return picture
    image_module = require("PIL.Image", "cpu")
    return image_module.alpha_composite(image_module.new("RGBA", picture.size, "white"), picture).convert(
        "RGB"
    )
