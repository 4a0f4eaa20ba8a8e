"""What the tests of the importers share: weights that are not trivial, and how near two predictions are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_deploy.importers.imported import Imported


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, biases and norms too, and every buffer of numbers of a norm, values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:  # about as large as what comes in
                parameter.copy_(noise * (1.4 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))


def named_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights by name that are the same wherever they are made, so that a golden file need not hold them."""
    state = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        noise = np.random.default_rng([seed, number]).standard_normal(shape).astype(np.float32)
        one = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        scale = 0.2 if len(shape) < 2 else (1.4 / max(1, int(np.prod(shape[1:])))) ** 0.5
        state[name] = torch.from_numpy(noise * np.float32(scale) + np.float32(one))
    return state


@torch.no_grad()
def predict(imported: Imported, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """What the imported network says of x (B, C, H, W) at the timesteps t (B,)."""
    table = torch.from_numpy(imported.spec.embedding.table(imported.spec.timesteps))
    inputs = (x, table[t]) if y is None else (x, table[t], y)
    result: Tensor = imported.network.eval()(*inputs)
    return result


def relative_rms(got: Tensor | NDArray[np.float32], wanted: Tensor | NDArray[np.float32]) -> float:
    """RMS of the difference, relative to the RMS of what is wanted."""
    a, b = (torch.as_tensor(value).double() for value in (got, wanted))
    return float(((a - b).square().mean() / b.square().mean()).sqrt())
