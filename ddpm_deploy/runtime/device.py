"""The GPU as a Denoiser needs it: memory, copies and one stream, through CuPy."""

from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import BackendError, first_line


class Device(Protocol):
    """Memory by address, and a stream on which everything happens in order.

    name: for people ("cuda:0"). stream: the handle that TensorRT takes.
    """

    name: str
    stream: int

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory of that shape, with `address` of it; freed with the last reference."""

    def address(self, memory: Any) -> int:
        """Where it starts, a multiple of 256."""

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy the host's rows into the leading rows of the memory."""

    def download(self, memory: Any, host: NDArray[Any]) -> None:
        """Start to copy the leading rows of the memory into the host's."""

    def synchronize(self) -> None:
        """Wait for all that was started."""


class Cuda:
    """The first visible GPU. Follows `Device`.

    Raises DependencyError where CuPy is missing, BackendError where it sees no GPU or has no memory left.
    """

    def __init__(self) -> None:
        self._cupy: Any = require("cupy", "gpu")
        try:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            self.name = f"cuda:{self._cupy.cuda.Device().id}"
        except Exception as error:  # CuPy's own, which needs CuPy to name
            raise BackendError(
                f"CuPy cannot use the GPU: {first_line(error)} (see ddpm-deploy doctor)"
            ) from error
        self.stream = self._stream.ptr

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """New memory of that shape."""
        try:
            with self._stream:
                return self._cupy.zeros(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise BackendError(
                f"the GPU has no memory left: {first_line(error)}; load the model with a smaller max_batch"
            ) from error

    def address(self, memory: Any) -> int:
        """Where it starts."""
        return int(memory.data.ptr)

    def upload(self, host: NDArray[Any], memory: Any) -> None:
        """Start to copy the host's rows into the leading rows of the memory."""
        memory[: len(host)].set(host, stream=self._stream)

    def download(self, memory: Any, host: NDArray[Any]) -> None:
        """Start to copy the leading rows of the memory into the host's."""
        memory[: len(host)].get(stream=self._stream, out=host, blocking=False)

    def synchronize(self) -> None:
        """Wait for all that was started."""
        self._stream.synchronize()
