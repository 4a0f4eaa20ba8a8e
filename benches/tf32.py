"""What TF32 costs a trained network, emulated: ten bits of what convolutions and matrix products read.

    python -m benches.tf32 demo/digits.pt

Prints the largest error of the prediction in two ranges of t, and the PSNR of whole chains: the figures of
docs/precision.md and of the tolerance table.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.parity import judge, record
from ddpm_deploy.train.checkpoint import load_network
from ddpm_deploy.train.network import TorchNetwork

_ATEN: Final = torch.ops.aten
# Which of their arguments are multiplied.
_READ: Final[dict[Any, tuple[int, int]]] = {
    _ATEN.convolution.default: (0, 1),
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
}


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = _READ.get(operator, (-1, -1))
        rounded = (_round(arg) if place in read else arg for place, arg in enumerate(args))
        return operator(*rounded, **(kwargs or {}))


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest with ten bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class _Tf32(TorchNetwork):
    def predict(self, batch: int) -> None:
        """The network, its products' operands rounded."""
        with _Rounding():  # type: ignore[no-untyped-call]
            super().predict(batch)


def main() -> None:
    """Print the figures of one checkpoint."""
    network, spec = load_network(open_model(sys.argv[1]))
    reference = record(TorchNetwork(network, spec, max_batch=4), count=4, keep=200)
    result = judge(reference, _Tf32(network, msgspec.structs.replace(spec, precision="tf32"), max_batch=4))
    early = max(step.relative_rms for step in result.steps if step.timestep < spec.timesteps / 10)
    late = max(step.relative_rms for step in result.steps if step.timestep >= spec.timesteps / 10)
    print(
        f"below T/10: {early:.1e}, above: {late:.1e}, worst image {result.psnr.min():.0f} dB, within: {result.within}"
    )


if __name__ == "__main__":
    main()
