"""Service: what all routes share: the batcher, once there is one, what is kept, what is counted, and waiting for images
as long as somebody waits for them."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest

from ddpm_deploy.errors import BackendError, DdpmDeployError, DeadlineError, SettingError
from ddpm_deploy.runtime.images import COLOURS
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.serve.batcher import Batcher, Status
from ddpm_deploy.serve.bodies import GoneError, SamplesBody, to_request
from ddpm_deploy.serve.handle import Handle
from ddpm_deploy.serve.metrics import Metrics
from ddpm_deploy.serve.refusals import RefusedError, busy, invalid, refusal_of, unready
from ddpm_deploy.serve.results import Results
from ddpm_deploy.serve.settings import Settings
from ddpm_deploy.spec import ModelSpec


class Service:
    """One model behind routes. It may be made before its batcher is: `open` brings that.

    preparing: what it does until then, for people.
    """

    def __init__(self, spec: ModelSpec, settings: Settings, batcher: Batcher | None = None) -> None:
        self.spec, self.settings = spec, settings
        self.preparing = "it is starting"
        self.results = Results(settings)
        self.metrics = Metrics(self.status)
        self._batcher = batcher
        self._draining = False
        self._live: set[Handle] = set()

    def open(self, batcher: Batcher) -> None:
        """Take requests from now on."""
        self._batcher = batcher

    def drain(self) -> None:
        """Take no more requests; those that were taken are done."""
        self._draining = True

    def call_off(self) -> None:
        """End all that was taken and is not over."""
        for handle in list(self._live):
            handle.cancel()

    @property
    def live(self) -> int:
        """Requests that were taken and are not over."""
        return len(self._live)

    @property
    def drained(self) -> bool:
        """Whether all that was taken is over, and was had by who asked for it."""
        return not self.live and not self.results.unfetched()

    @property
    def shows_pictures(self) -> bool:
        """Whether the model's images are such as a PNG holds."""
        return self.spec.image_shape[0] in COLOURS

    @property
    def takes_guidance(self) -> bool:
        """Whether there is room for the two rows of a guided image."""
        return self.spec.null_class and (self._batcher is None or self._batcher.capacity > 1)

    def status(self) -> Status | None:
        """The batcher's, None before there is one."""
        return self._batcher.status() if self._batcher else None

    def require_ready(self) -> Batcher:
        """The batcher. Raises RefusedError where requests are not taken."""
        if self._draining:
            raise unready("this server is going down: ask another")
        if self._batcher is None:
            raise unready(f"not yet: {self.preparing}")
        if self._batcher.status().state != "open":
            raise unready("the batcher has ended: this server needs a restart", 60)
        return self._batcher

    def submit(self, body: SamplesBody, route: str, names: Mapping[str, str] | None = None) -> Handle:
        """Ask for the images that a body asks for. Raises RefusedError, naming the field.

        names: as of `bodies.to_request`.
        """
        batcher = self.require_ready()
        request = to_request(body, self.spec, self.settings, names)
        deadline = self.settings.timeout if body.deadline is None else body.deadline
        began = time.perf_counter()
        try:
            handle = batcher.submit(request, deadline=min(deadline, self.settings.timeout))
        except DeadlineError as error:
            raise self._late(batcher, error, body.deadline is not None) from error
        except SettingError as error:
            raise invalid(str(error), "deadline" if "deadline" in str(error) else "count") from error
        except BackendError as error:
            raise unready(str(error)) from error
        except DdpmDeployError as error:
            raise refusal_of(error) from error
        self._live.add(handle)
        handle.add_done_callback(lambda done: self._over(done, route, began))  # type: ignore[arg-type]  # it is the handle
        return handle

    @staticmethod
    def _late(batcher: Batcher, error: DeadlineError, asked: bool) -> Exception:
        """On an idle server it is the request that is too long, on a busy one the load."""
        status = batcher.status()
        if status.waiting or status.running:
            return busy(str(error), 1)
        return invalid(str(error), "deadline" if asked else "steps")

    def _over(self, handle: Handle, route: str, began: float) -> None:
        """In the batcher's thread."""
        self._live.discard(handle)
        if not handle.cancelled() and handle.exception() is None:
            self.metrics.done(route, handle.request.count, time.perf_counter() - began)

    async def images(self, http: HttpRequest, handle: Handle) -> Array:
        """Wait for the images of a request as long as its caller does.

        Raises GoneError where he has gone: then it is called off at the next step; RefusedError where it failed.
        """
        waiting = asyncio.wrap_future(handle)
        gone = asyncio.ensure_future(until_gone(http))
        try:
            either: list[asyncio.Future[Any]] = [waiting, gone]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise GoneError
            return waiting.result()
        except asyncio.CancelledError:
            if waiting.cancelled():  # by somebody else: the server that goes down
                raise called_off() from None
            raise
        except DdpmDeployError as error:
            raise refusal_of(error) from error
        finally:
            gone.cancel()
            handle.cancel()


def called_off() -> RefusedError:
    """What is said of a request that the server ended, as it goes down."""
    return unready("this server is going down, and this request was called off: ask another")


async def until_gone(http: HttpRequest) -> None:
    """Wait until a caller, whose body was read, closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
