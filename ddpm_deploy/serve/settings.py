"""What whoever runs a service decides: its limits, who may use it, and for how long results are kept."""

import math
import os
import re
from dataclasses import dataclass
from typing import Final

from ddpm_deploy.errors import SettingError

KEY_VARIABLE: Final = "DDPM_SERVE_API_KEY"  # of the environment: one key, or several with spaces between them
MOST_PREVIEWS: Final = 32  # looks at one image on its way
WRITE_SECONDS: Final = 30.0  # in which a client takes something of what is sent to it
BODY_SECONDS: Final = 10.0  # in which a body arrives, once its head has
HEAD_SECONDS: Final = 10.0  # in which a head arrives, once somebody connected
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
_HOST: Final = re.compile(r"[^/:\sA-Z]+")


@dataclass(frozen=True)
class Settings:
    """Of one service. Raises SettingError for a value out of its range.

    name: of the model, in answers and paths. max_count: images of one request. max_steps: of its chain (None: as the
    model has them). max_body: bytes of a request. timeout: seconds from a request to its images. keep_seconds,
    keep_bytes: for how long, and in how much memory, the images of requests that nobody waits for are kept.
    api_keys: one of which a caller must show; none: anybody may ask. allow_origins: other sites whose pages may ask, as
    https://example.org. allow_hosts: names by which it may be called, besides the names and addresses of this machine
    (None: any), so that no other site's name can be made to lead here.
    """

    name: str = "ddpm"
    max_count: int = 64
    max_steps: int | None = None
    max_body: int = 1 << 16
    timeout: float = 600.0
    keep_seconds: float = 600.0
    keep_bytes: int = 1 << 28
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("max_count", "max_steps", "max_body", "timeout", "keep_seconds", "keep_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name} must be more than 0, not {value!r}")
        if not self.name or "/" in self.name:
            raise SettingError(f"the name of a model stands in paths: {self.name!r} cannot")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise SettingError("an API key is empty, or has other characters than ASCII: choose another")
        for origin in self.allow_origins:  # browsers send exactly this
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    f"{origin!r} is no origin: write it as https://example.org, in lower case and without a path"
                )
        for host in self.allow_hosts or ():
            if not _HOST.fullmatch(host):
                raise SettingError(
                    f"{host!r} is no name of a host: write it as images.example.org, in lower case and without a port"
                )


def keys_of_environment() -> tuple[str, ...]:
    """The API keys in KEY_VARIABLE. Raises SettingError where that was meant to be one, and is empty."""
    keys = os.environ.get(KEY_VARIABLE)
    if keys is not None and not keys.strip():
        raise SettingError(f"{KEY_VARIABLE} is set, and empty: give it a key, or unset it to serve without")
    return tuple((keys or "").split())
