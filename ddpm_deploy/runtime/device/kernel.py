"""The source of the fused step kernel, with the constants that it shares with NumPy's chain."""

from importlib import resources
from typing import Any, Final

from ddpm_deploy import exponential, noise
from ddpm_deploy.dependencies import pip_install, require
from ddpm_deploy.errors import BackendError, DependencyError, one_line

_NVRTC: Final = "cuda.bindings.nvrtc"
THREADS: Final = 128  # of a block; each makes four numbers
OPTIONS: Final = (
    "--fmad=false",
    "--ftz=false",
    "--std=c++17",
)  # NumPy contracts nothing, and keeps what is tiny


def kernel_source() -> str:
    """step.cu behind definitions of what noise.py and exponential.py are made of."""
    constants: dict[str, float | int | tuple[float, ...]] = {
        "LN_SERIES": noise.LN_SERIES,
        "SIN_PI_SERIES": noise.SIN_PI_SERIES,
        "COS_PI_SERIES": noise.COS_PI_SERIES,
        "LN_2": noise.LN_2,
        "SQRT_HALF_BITS": noise.SQRT_HALF_BITS,
        "EXP_SERIES": exponential.EXP_SERIES,
        "LOG2_E": exponential.LOG2_E,
        "LARGEST": f"{exponential.LARGEST}f",  # type: ignore[dict-item]
    }
    definitions = [
        f"#define {name} {', '.join(map(repr, value)) if isinstance(value, tuple) else value}"
        for name, value in constants.items()
    ]
    source = resources.files("ddpm_deploy.runtime.device").joinpath("step.cu").read_text(encoding="utf-8")
    return "\n".join(definitions) + "\n" + source


def compiled(source: str, architecture: str, extra: str = "gpu") -> bytes:
    """CUDA C as a cubin for an architecture, as "86", by NVRTC, which needs no GPU.

    CuPy's own compilation would add an option that flushes the smallest numbers to zero. Raises DependencyError where
    NVRTC is missing, BackendError where it does not compile.
    """
    nvrtc = require_nvrtc(extra)

    def must(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"NVRTC does not compile the kernel for sm_{architecture}: {result[0].name}")
        return result[1] if len(result) > 1 else None

    program = must(nvrtc.nvrtcCreateProgram(source.encode(), b"step.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{architecture}", *OPTIONS]
    must(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    cubin = bytearray(must(nvrtc.nvrtcGetCUBINSize(program)))
    must(nvrtc.nvrtcGetCUBIN(program, cubin))
    must(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def require_nvrtc(extra: str = "gpu") -> Any:
    """The bindings of NVRTC, whose library loads. Raises DependencyError where either is missing."""
    nvrtc: Any = require(_NVRTC, extra)
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is looked for at the first call
        raise DependencyError(
            f"NVRTC does not load ({one_line(error)}): {pip_install(extra, _NVRTC)}"
        ) from error
    return nvrtc


def blocks(size: int) -> int:
    """How many blocks of the grid a slot of `size` numbers takes."""
    return -(-size // (4 * THREADS))
