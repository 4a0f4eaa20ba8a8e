"""ddpm-serve: listen, prove the model, and serve it."""

import ipaddress
import signal
import threading
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Final, Unpack

from ddpm_deploy.cli.bodies.models import Place, open_network, require_runnable
from ddpm_deploy.cli.bodies.progress import duration
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import DdpmDeployError, one_line
from ddpm_deploy.files import show
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.chain import Chain, time_step
from ddpm_deploy.runtime.parity import Trajectory
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.serve.batcher import Batcher
from ddpm_deploy.serve.http import app_of
from ddpm_deploy.serve.proving import calls_of, proof_beside, require_proven
from ddpm_deploy.serve.server import Server, listening, url_of
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import KEY_VARIABLE, Settings, keys_of_environment
from ddpm_deploy.signals import handled
from ddpm_deploy.words import Proof

_LONG: Final = 20.0  # seconds of a proof, over which it is said that there is a shorter one


def serve(
    model: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    capacity: int | None,
    max_queue: int,
    max_count: int,
    max_steps: int | None,
    timeout: float,
    keep_seconds: float,
    keep_mb: int,
    max_connections: int,
    drain_seconds: float,
    api_keys: tuple[str, ...],
    allow_origins: tuple[str, ...],
    allow_hosts: tuple[str, ...],
    proof: Proof,
    **place: Unpack[Place],
) -> None:
    """Serve a model until a signal."""
    opened = open_model(model)
    require_runnable(opened, place)
    settings = Settings(
        name=opened.path.stem if name is None else name,
        max_count=max_count,
        max_steps=max_steps,
        timeout=timeout,
        keep_seconds=keep_seconds,
        keep_bytes=keep_mb << 20,
        api_keys=api_keys,
        allow_origins=allow_origins,
        allow_hosts=None if not allow_hosts and (api_keys or not _is_here(host)) else allow_hosts,
    )
    _require_meant(host, settings)
    trajectory = proof_beside(opened, proof)
    with (
        listening(host, port) as listener,
        closing(open_network(opened, capacity, **place)) as network,
    ):
        service = Service(opened.spec, settings)
        server = Server(app_of(service), service, drain_seconds, max_connections)
        opening = _Opening(service, server, network, trajectory, proof, max_queue)
        logger.info("%s at %s", opened.name, url_of(listener))
        _run(server, listener, opening)


def _require_meant(host: str, settings: Settings) -> None:
    """Refuse a key that was meant and is none; warn of a server that anybody may use."""
    keys_of_environment()  # they are among the settings already; an empty variable is not
    if not settings.api_keys and not _is_here(host):
        logger.warning("whoever reaches %s may use this server: set %s to a key", show(host), KEY_VARIABLE)


def _is_here(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run(server: Server, listener: socket, opening: "_Opening") -> None:
    """Answer until a signal, and open the model meanwhile. Raises what went wrong with that."""
    try:
        opening.start()
        with handled([signal.SIGHUP], server.handle_exit):  # the others are uvicorn's own
            server.run(sockets=[listener])
    finally:
        opening.end()
    if opening.error:
        raise opening.error


class _Opening:
    """What happens while the server already answers that it is not ready: the proof, and the batcher.

    error: what went wrong with these; then the server ends.
    """

    def __init__(
        self,
        service: Service,
        server: Server,
        network: Network,
        trajectory: Trajectory | None,
        proof: Proof,
        max_queue: int,
    ) -> None:
        self._service, self._server, self._network = service, server, network
        self._trajectory, self._proof, self._max_queue = trajectory, proof, max_queue
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ddpm-serve opening", daemon=True)
        self._batcher: Batcher | None = None
        self.error: DdpmDeployError | None = None

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def end(self) -> None:
        """Stop it, and close what it opened."""
        self._ended.set()
        self._thread.join()
        if self._batcher:
            self._batcher.close(drain=False)

    def _run(self) -> None:
        try:
            if self._trajectory:
                self._prove(self._trajectory)
            self._service.preparing = "its step time is measured"
            self._batcher = Batcher(self._network, max_queue=self._max_queue)
            self._service.open(self._batcher)
            logger.info("ready")
        except _EndedError:
            pass
        except DdpmDeployError as error:
            self.error = error
            self._server.should_exit = True
        except BaseException as error:
            self.error = DdpmDeployError(f"the model could not be opened: {one_line(error)}")
            self._server.should_exit = True
            raise

    def _prove(self, trajectory: Trajectory) -> None:
        """Raise ParityError where the model does not compute here what its proof says."""
        trajectory = trajectory.first(self._network.max_batch)
        predictions = self._proof == "predictions"
        calls = calls_of(trajectory, self._proof)
        with closing(Chain(self._network)) as chain:
            forecast = calls * time_step(chain, trajectory.count)
        shorter = "" if predictions or forecast < _LONG else " (--proof predictions: seconds)"
        logger.info("checking its proof: about %s%s", duration(forecast), shorter)
        done = 0

        def progress(steps: int) -> None:
            nonlocal done
            done += steps
            self._service.preparing = f"its proof is checked, {100 * done // calls} % done"
            if self._ended.is_set():
                raise _EndedError

        require_proven(trajectory, self._network, self._proof, progress)


class _EndedError(Exception):
    """The server ends before the model is proven."""
