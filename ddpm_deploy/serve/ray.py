"""The service on Ray Serve: replicas on any number of machines behind one address, each with a model and a batcher.

    serve run docs/serve.yaml

`build` makes the application of what the file says under `args`; how many replicas there are, and what each takes of
a machine, it says under `deployments`.

Ray Serve knows requests that somebody waits for. What it does not know of is a request that is kept by an id: so a
call that lasts as long as it (`Replica.hold`) has it counted, for the number of replicas and for the end of one; and a
replica that ends gives the images that it keeps to another (`Replica.adopt`). `elsewhere` finds them.
"""

# ruff: noqa: E402  # that Ray is missing is told in a line

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.dependencies import require

require("ray.serve", "ray-serve")

import ray
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.serve.batcher import Batcher
from ddpm_deploy.serve.elsewhere import ElsewhereError, Moved, NamedResults, PassedOn, maker_of, messages_of
from ddpm_deploy.serve.http import app_without_metrics
from ddpm_deploy.serve.proving import proof_beside, require_proven
from ddpm_deploy.serve.refusals import RefusedError
from ddpm_deploy.serve.results import Kept
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import Settings, keys_of_environment
from ddpm_deploy.words import Backend, Proof, RunPrecision

logger = logging.getLogger(__name__)

NAME: Final = "model"  # of the deployment, in a config file
_ROWS: Final = 64  # of a batch, where nothing is said: no model takes more by itself
_READERS: Final = (
    512  # requests that are no work for the batcher: readers of events, and who asks how far it is
)
_GRACE: Final = 60.0  # seconds in which a replica ends, once its last request must be over
_HEALTH: Final = (
    5.0  # seconds from one look at a replica to the next; it is replaced after three that are bad
)
_PATIENCE: Final = 5.0  # seconds in which other replicas answer a question, and take what one that goes has
_REPORTS: Final = 5.0  # seconds from one report of its numbers to the next


class Args(BaseModel):
    """What a config file says under `args`: the options of `ddpm-serve`, but for those that are Ray's.

    model: the path, from the root, on every machine. threads: CPU threads (None: `num_cpus` of the replica). device:
    None is the GPU, where the replica has one by `num_gpus`. api_keys: better in the variable DDPM_SERVE_API_KEY of
    the machines, as Ray shows these to whoever sees its dashboard.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    capacity: int | None = Field(None, ge=1)
    max_queue: int = Field(256, ge=1, le=1 << 20)
    max_count: int = Settings.max_count
    max_steps: int | None = None
    timeout: float = Settings.timeout
    keep_seconds: float = Settings.keep_seconds
    keep_mb: int = Field(Settings.keep_bytes >> 20, ge=1)
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] | None = Settings.allow_hosts
    proof: Proof = "whole"
    device: str | None = None
    backend: Backend | None = None
    precision: RunPrecision | None = None
    threads: int | None = Field(None, ge=1)

    def settings(self, keys: tuple[str, ...] = ()) -> Settings:
        """The settings of a replica's service. keys: more API keys. Raises SettingError."""
        return Settings(
            name=Path(self.model).stem if self.name is None else self.name,
            max_count=self.max_count,
            max_steps=self.max_steps,
            timeout=self.timeout,
            keep_seconds=self.keep_seconds,
            keep_bytes=self.keep_mb << 20,
            api_keys=(*self.api_keys, *keys),
            allow_origins=self.allow_origins,
            allow_hosts=self.allow_hosts,
        )


def build(args: Args) -> serve.Application:
    """The application, for `serve run` and `serve deploy`. Raises SettingError for what no replica could do."""
    if not Path(args.model).is_absolute():
        raise SettingError(
            f"model is a path on every machine, and begins with /, which {args.model!r} does not"
        )
    args.settings()
    # More than the batcher takes, so that it is the batcher that refuses, with 429 and a time.
    most = (args.capacity or _ROWS) + args.max_queue + _READERS
    deployed = serve.deployment(
        Replica,
        name=NAME,
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=args.timeout + _GRACE,
        health_check_period_s=_HEALTH,
    )
    return deployed.bind(args)


@serve.ingress()
class Replica:
    """One copy of the service, in a process of its own."""

    async def __init__(self, args: Args) -> None:  # type: ignore[misc]  # Serve awaits it
        _log_with_serve()
        context = serve.get_replica_context()
        self._name = context.replica_tag
        self._actor = ray.get_runtime_context().get_actor_name() or ""
        self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        self._tasks: set[asyncio.Task[None]] = set()
        await self._named(self._name)  # first, as it takes a while until all know it
        settings = args.settings(keys_of_environment())
        self._batcher = await asyncio.to_thread(_opened, args)
        self._service = Service(self._batcher.spec, settings, self._batcher)
        self._results = NamedResults(settings, self._name, self._counted)
        self._service.results = self._results
        self._in_background(self._report())
        self._app = self._made_app()

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def _named(self, name: str) -> str:
        """Let Serve know this replica by its name: what is asked of the "model" of that name comes here."""
        return name

    def _made_app(self) -> ASGIApp:
        app = app_without_metrics(
            self._service
        )  # which would be those of any one replica: they go to Ray's own

        async def elsewhere(http: HttpRequest, error: Exception) -> Response:
            assert isinstance(error, ElsewhereError)
            return PassedOn(error.id, self)

        app.add_exception_handler(ElsewhereError, elsewhere)
        return app

    def __serve_build_asgi_app__(self) -> ASGIApp:  # what Serve asks for
        return self._app

    async def check_health(self) -> None:
        """Raise BackendError where this replica is to be replaced. It takes no requests before its model is proven, as
        its constructor does that."""
        if self._batcher.status().state in ("failed", "closed"):
            raise BackendError("the batcher has ended")

    async def __del__(self) -> None:
        """The end: nobody waits any more for what was asked here; what is kept is finished, and given to another."""
        if hasattr(self, "_service"):
            self._service.drain()
            while self._service.live:
                await asyncio.sleep(0.05)
            await self._hand_over()
            await asyncio.to_thread(self._batcher.close)
            self._batcher.network.close()

    # --- requests that nobody waits for -----------------------------------------------------------------------

    def _counted(self, kept: Kept) -> None:
        """Have Serve count a request as long as it runs."""

        async def held() -> None:
            with suppress(RayError, RayServeException):  # it is not counted, and goes on
                while not kept.handle.done():
                    if not await self._to(self._name).hold.remote(kept.id):
                        await asyncio.sleep(0.2)  # another was asked, as our name is not known yet

        self._in_background(held())

    async def hold(self, id: str) -> bool:
        """Last until a request is over. False where it is not here."""
        if not self._results.has(id):
            return False
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self._results.get(id).handle.add_done_callback(lambda _: loop.call_soon_threadsafe(over.set))
        await over.wait()
        return True

    async def _hand_over(self) -> None:
        """Give what is kept to a replica that goes on."""
        moved = [Moved.of(kept) for kept in self._results.all() if kept.handle.done()]
        with suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(_PATIENCE):
                while moved and (taken := await self._peers.adopt.remote(moved)):
                    moved = moved[taken:]
        if moved:
            logger.warning("%d results are lost: no other replica took them", len(moved))

    async def adopt(self, moved: list[Moved]) -> int:
        """Keep the results of a replica that goes. Gives how many there was room for."""
        taken = 0
        for each in moved:
            try:
                self._results.put(each.kept())
                taken += 1
            except RefusedError:
                break
        return taken

    # --- what replicas ask one another ------------------------------------------------------------------------

    def _to(self, replica: str, **options: Any) -> Any:
        """A handle whose calls go to one replica, where that takes any."""
        return self._peers.options(multiplexed_model_id=replica, **options)

    async def ask(self, replica: str, id: str, scope: Scope) -> AsyncIterator[Message]:
        """As `elsewhere.Peers`."""
        started = False
        try:
            async for message in self._to(replica, stream=True).answer.remote(id, scope):
                started = True
                yield message
        except (RayError, RayServeException):
            if started:
                raise

    async def answer(self, id: str, scope: Scope) -> AsyncIterator[Message]:
        """What this replica answers to a request that another was asked; nothing, where it is not its to answer."""
        if self._results.has(id) or maker_of(id) == self._name:
            async for message in messages_of(self._app, scope):
                yield message

    async def holder(self, id: str) -> str | None:
        """As `elsewhere.Peers`."""
        try:
            asked = self._peers.broadcast("has", id)
            found = await asked.results_async(timeout_s=_PATIENCE, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return None
        return next((name for name in found if isinstance(name, str)), None)

    async def has(self, id: str) -> str | None:
        """The name of this replica, where it has the results of an id."""
        return self._name if self._results.has(id) else None

    async def lives(self, replica: str) -> bool:
        """As `elsewhere.Peers`."""
        name = self._actor.removesuffix(self._name) + replica

        def there() -> bool:
            try:
                ray.get_actor(name, namespace="serve")
            except ValueError:
                return False
            return True

        return await asyncio.to_thread(there)

    # --- the rest ---------------------------------------------------------------------------------------------

    def _in_background(self, work: Any) -> None:
        """Do something apart from the request in whose midst it begins, which Serve would end it with."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self) -> None:
        """Tell Ray's metrics what `/metrics` of a lone server says, but for the latencies, which Serve has."""
        gauges: dict[str, serve.metrics.Gauge] = {}
        while True:
            for family in self._service.metrics.registry.collect():
                for sample in family.samples if family.type in ("gauge", "counter") else ():
                    if not sample.name.endswith("_created"):
                        gauge = gauges.get(sample.name) or serve.metrics.Gauge(
                            sample.name, family.documentation, tuple(sample.labels)
                        )
                        gauges[sample.name] = gauge
                        gauge.set(sample.value, dict(sample.labels))
            await asyncio.sleep(_REPORTS)


def _opened(args: Args) -> Batcher:
    """The batcher over a model, which has passed its proof."""
    opened = open_model(Path(args.model))
    opened.require_intact()
    proof = proof_beside(opened, args.proof)
    place = _place(args, opened)
    network = load_network(opened, place, backend=args.backend)
    try:
        if proof:
            require_proven(proof.first(network.max_batch), network, args.proof)
        batcher = Batcher(network, max_queue=args.max_queue)
    except BaseException:
        network.close()
        raise
    rows = batcher.status()
    logger.info(
        "%s is ready, on %s with %d threads: %d rows of the batch are open to any, of %d",
        opened.name,
        place.device or "the CPU",
        place.threads,
        rows.width,
        rows.capacity,
    )
    return batcher


def _place(args: Args, model: ModelFile) -> LoadSettings:
    """On what a replica runs its model: on what Ray gave it."""
    given = ray.get_runtime_context().get_assigned_resources()
    on_gpu = given.get("GPU", 0) > 0 and model.kind != "ncnn"
    return LoadSettings(
        device=args.device or ("cuda" if on_gpu else None),
        threads=args.threads or max(1, int(given.get("CPU", 0))),
        max_batch=args.capacity,
        precision=args.precision,
    )


def _log_with_serve() -> None:
    """Have what this package logs in the log of the replica."""
    ours, theirs = logging.getLogger("ddpm_deploy"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.level)
