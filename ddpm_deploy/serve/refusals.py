"""How a service says no: one exception, made of any error that a caller can cause."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from ddpm_deploy.errors import (
    BackendError,
    BusyError,
    DdpmDeployError,
    DeadlineError,
    SettingError,
    one_line,
)


class ErrorFields(TypedDict):
    """What an error says of itself."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(TypedDict):
    """An answer that is an error, and an event."""

    error: ErrorFields


@dataclass(eq=False)
class RefusedError(Exception):
    """An answer that is an error.

    status: of HTTP. message: one line, for people. code: one word, for programs. param: the field of the body that is
    at fault. headers: of the answer.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The word that OpenAI's clients know for it."""
        match self.status:
            case 401 | 403:
                return "authentication_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
        return "invalid_request_error"

    def to_builtins(self) -> ErrorAnswer:
        """As an answer has it, and an event."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None) -> RefusedError:
    """A request that cannot be done as it was asked, whoever asks and whenever."""
    return RefusedError(422, message, "invalid_value", param)


def busy(message: str, seconds: float) -> RefusedError:
    """One that may be asked again in so many seconds."""
    return RefusedError(429, message, "busy", headers=retry_after(seconds))


def unready(message: str, seconds: float = 1.0) -> RefusedError:
    """A service that does not take requests at this time."""
    return RefusedError(503, message, "unavailable", headers=retry_after(seconds))


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again, in whole seconds."""
    return {"Retry-After": str(max(1, math.ceil(min(seconds, 3600.0))))}


def refusal_of(error: BaseException) -> RefusedError:
    """What is said of an error. One of another's library is told by its name alone."""
    match error:
        case RefusedError():
            return error
        case BusyError():
            return busy(str(error), error.retry_after)
        case DeadlineError():
            return RefusedError(504, str(error), "late")
        case SettingError():
            return invalid(one_line(error))
        case BackendError():
            return RefusedError(500, one_line(error), "backend")
        case DdpmDeployError():
            return RefusedError(500, one_line(error), "internal")
    return RefusedError(500, f"the service failed ({type(error).__name__}): its log says more", "internal")
