"""What a worker does, on whatever machine it is: it opens the model of a run, and makes shards of it.

It knows nothing of Ray, which puts a Worker into a process and calls it.
"""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddpm_deploy.bulk.manifest import Manifest
from ddpm_deploy.bulk.shards import write_shard
from ddpm_deploy.bulk.versions import versions_of
from ddpm_deploy.errors import BackendError, DependencyError, OutputError
from ddpm_deploy.files import create_once, require_output, sha256_of, show
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends import LoadSettings, load_network
from ddpm_deploy.runtime.sampler import EachStep, Sampler
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.version import __version__
from ddpm_deploy.words import Backend, RunPrecision, Weights

_TOKEN_BYTES: Final = 64  # read of a token's file, at most


@dataclass(frozen=True)
class Job:
    """What a worker loads: texts and numbers alone, so that a worker of another version can read which this is.

    model: its absolute path. digest: SHA-256 of that file. rows: of the batch (None: the backend's own). The others are
    as in LoadSettings.
    """

    version: str
    model: str
    digest: str
    rows: int | None
    device: str | None
    backend: Backend | None
    precision: RunPrecision | None
    weights: Weights
    threads: int


@dataclass(frozen=True)
class Opened:
    """What a worker has loaded: the model's spec, the versions of what runs it, and on which machine."""

    spec: ModelSpec
    versions: dict[str, str]
    machine: str


@dataclass(frozen=True)
class Folder:
    """Where shards go: a folder, and the file in it, with what that holds, by which a worker knows that it sees it."""

    path: str
    token: str
    content: str

    @classmethod
    @contextmanager
    def marked(cls, folder: Path) -> "Iterator[Folder]":
        """A folder, in which that file stands meanwhile. Raises OutputError."""
        made = cls(os.fspath(folder.absolute()), f".ddpm-{secrets.token_hex(8)}.here", secrets.token_hex(16))
        file = folder / made.token
        create_once(file, made.content.encode())
        try:
            yield made
        finally:
            file.unlink(missing_ok=True)

    @property
    def is_seen(self) -> bool:
        """Whether this machine sees that very folder, and may write there."""
        try:
            with (Path(self.path) / self.token).open("rb") as file:
                if file.read(_TOKEN_BYTES) != self.content.encode():
                    return False
            require_output(Path(self.path) / "x")
        except (OSError, OutputError):
            return False
        return True


class Worker:
    """Makes shards with one Sampler, one after another; `images` may be asked from another thread."""

    def __init__(self) -> None:
        self._sampler: Sampler | None = None
        self._steps, self._images_a_step = 0, 0.0  # of the shard at hand: those taken

    def open(self, job: Job, model: bytes | None = None) -> Opened | None:
        """Load the model from its path, if the file there is the right one; None where that is not here.

        model: the file's bytes, for a worker that said None before.

        Raises DependencyError where this is another version of ddpm-deploy, and as Sampler.load.
        """
        if job.version != __version__:
            raise DependencyError(
                f"{os.uname().nodename} has ddpm-deploy {show(__version__)}, and this run is of {show(job.version)}: "
                "install the same version on every node of the cluster"
            )
        os.environ["OMP_NUM_THREADS"] = str(job.threads)  # for the libraries that are loaded from here on
        path = Path(job.model)
        if model is None:
            if not _is_here(path, job.digest):
                return None
            self._sampler = _loaded(path, job)
        else:
            with _kept(path.name, model, job.digest) as copy:
                self._sampler = _loaded(copy, job)
        return Opened(self._sampler.spec, versions_of(self._sampler.network), os.uname().nodename)

    def make(self, folder: Folder, manifest: Manifest, number: int) -> bytes | None:
        """Make a shard; give the bytes of its file where this machine does not see the folder, else None.

        Raises as Sampler.draw, and OutputError.
        """
        assert self._sampler is not None
        part = manifest.part(number)
        most = self._sampler.max_batch(bool(part.guidance))
        steps = len(part.table_for(manifest.spec)) * -(-part.count // most)
        self._steps, self._images_a_step = 0, part.count / steps
        samples = self._sampler.draw(part, EachStep(self._passed))
        if folder.is_seen:
            write_shard(Path(folder.path), manifest, number, samples)
            return None
        with tempfile.TemporaryDirectory(prefix="ddpm-") as own:
            return write_shard(Path(own), manifest, number, samples).read_bytes()

    def images(self) -> float:
        """How many images of the shard at hand are made, counted by steps."""
        return self._steps * self._images_a_step

    def _passed(self) -> None:
        self._steps += 1


def _loaded(path: Path, job: Job) -> Sampler:
    model = open_model(path)
    model.require_intact()
    settings = LoadSettings(
        device=job.device,
        threads=job.threads,
        max_batch=job.rows,
        precision=job.precision,
        weights=job.weights,
    )
    return Sampler(load_network(model, settings, backend=job.backend))


@contextmanager
def _kept(name: str, data: bytes, digest: str) -> Iterator[Path]:
    """A file of these bytes, while it is loaded."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise BackendError(f"{show(name)} did not come whole to {os.uname().nodename}")
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def _is_here(path: Path, digest: str) -> bool:
    """Whether this machine can read a file, and it is the right one."""
    try:
        return path.is_file() and sha256_of(path) == digest  # a pipe would be waited for
    except OSError:
        return False
