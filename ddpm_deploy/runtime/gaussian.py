"""A DDPM whose every answer is known: data N(μ, σ²), the optimal ε-network in closed form, twelve steps.

It is what `ddpm-deploy doctor` runs on a backend that it was never on. For Gaussian data the best ε-network is affine
in x (E[ε | x_t] of Ho et al. 2020's forward process),

    ε(x, t) = √(1-ᾱ)·(x - √ᾱ·μ) / (ᾱ·σ² + 1-ᾱ) = p(t)·x + q(t)

so whole chains can be followed in two numbers, their mean and variance, without a network and without a table.
"""

import math
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.artefact import protobuf_field
from ddpm_deploy.embedding import SinusoidalEmbedding
from ddpm_deploy.noise import AddressedNoise
from ddpm_deploy.schedule import LinearBetas
from ddpm_deploy.spec import SPEC_KEY, ModelSpec, Provenance

MEAN: Final = 0.3
STD: Final = 0.4

# Twelve timesteps that the embedding keeps well apart: p and q are then linear functions of it, to 1e-6.
SPEC: Final = ModelSpec(
    image_shape=(3, 16, 16),
    value_range=(-100.0, 100.0),  # nothing is clipped, as a clipped chain is not affine
    timesteps=12,
    schedule=LinearBetas(beta_start=0.02, beta_end=0.8),
    embedding=SinusoidalEmbedding(dim=64, max_period=6.0),
    provenance=Provenance(digest="0" * 64, data="N(0.3, 0.16), in closed form"),
)

_FLOAT, _INT64 = 1, 7  # of TensorProto.DataType
_IR_VERSION, _OPSET = 10, 21


def coefficients() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and q of each t, (T,)."""
    ac = SPEC.make_schedule().alphas_cumprod
    p = np.sqrt(1 - ac) / (ac * STD**2 + 1 - ac)
    return p, -p * np.sqrt(ac) * MEAN


def moments() -> tuple[float, float]:
    """The mean and variance of each pixel of the full ancestral chain's images, by recursion from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for slope, shift, sigma in _steps():
        mean, variance = slope * mean + shift, slope**2 * variance + sigma**2
    return float(mean), float(variance)


def exact_images(count: int, seed: int) -> NDArray[np.float64]:
    """The images of the full chain on the addressed noise, in float64 and without a network: (count, C, H, W)."""
    noise = AddressedNoise(count, math.prod(SPEC.image_shape))
    noise.assign(slice(0, count), np.full(count, seed, np.uint64), np.arange(count, dtype=np.uint64))

    def draw(number: int) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = noise.fill(np.full((1, count), number))[0].astype(np.float64)
        return drawn

    x = draw(0)
    for t, (slope, shift, sigma) in zip(reversed(range(SPEC.timesteps)), _steps(), strict=True):
        x = slope * x + shift + (sigma * draw(t + 1) if sigma else 0.0)
    return x.reshape(count, *SPEC.image_shape)


def _steps() -> list[tuple[float, float, float]]:
    """x ← slope·x + shift + σ·z of each step from t = T-1 to 0: Ho's equation 11, with σ² = β and none at t = 0."""
    betas, ac = SPEC.make_schedule().betas, SPEC.make_schedule().alphas_cumprod
    p, q = coefficients()
    steps = []
    for t in reversed(range(SPEC.timesteps)):
        share, root = betas[t] / math.sqrt(1 - ac[t]), math.sqrt(1 - betas[t])
        sigma = math.sqrt(betas[t]) if t else 0.0
        steps.append(((1 - share * p[t]) / root, -share * q[t] / root, sigma))
    return steps


def write_onnx(path: Path) -> None:
    """The network as an .onnx file with its ModelSpec; written by hand, as running a model does not take `onnx`.

    prediction = x·unsqueeze(temb @ P) + unsqueeze(temb @ Q), P and Q the interpolation of p and q.
    """
    table = SPEC.embedding.table(SPEC.timesteps).astype(np.float64)
    weights = {
        name: np.linalg.lstsq(table, values[:, None], rcond=None)[0].astype(np.float32)  # (D, 1)
        for name, values in zip("PQ", coefficients(), strict=True)
    }
    nodes = [
        _node("MatMul", ["temb", "P"], "p"),
        _node("MatMul", ["temb", "Q"], "q"),
        _node("Unsqueeze", ["p", "axes"], "slope"),
        _node("Unsqueeze", ["q", "axes"], "shift"),
        _node("Mul", ["x", "slope"], "scaled"),
        _node("Add", ["scaled", "shift"], "prediction"),
    ]
    constants = [_tensor(name, _FLOAT, value) for name, value in weights.items()]
    constants.append(_tensor("axes", _INT64, np.array([2, 3], np.int64)))
    graph = b"".join(protobuf_field(1, node) for node in nodes)
    graph += protobuf_field(2, b"gaussian") + b"".join(protobuf_field(5, constant) for constant in constants)
    graph += protobuf_field(11, _value("x", SPEC.image_shape))
    graph += protobuf_field(11, _value("temb", (SPEC.embedding.dim,)))
    graph += protobuf_field(12, _value("prediction", SPEC.prediction_shape))
    entry = protobuf_field(1, SPEC_KEY.encode()) + protobuf_field(2, SPEC.to_json().encode())
    opset = protobuf_field(8, protobuf_field(1, b"") + _number(2, _OPSET))
    path.write_bytes(_number(1, _IR_VERSION) + opset + protobuf_field(7, graph) + protobuf_field(14, entry))


def _node(operator: str, inputs: list[str], output: str) -> bytes:
    ends = b"".join(protobuf_field(1, name.encode()) for name in inputs) + protobuf_field(2, output.encode())
    return ends + protobuf_field(3, output.encode()) + protobuf_field(4, operator.encode())


def _tensor(name: str, kind: int, value: NDArray[np.generic]) -> bytes:
    shape = b"".join(_number(1, size) for size in value.shape)
    return shape + _number(2, kind) + protobuf_field(8, name.encode()) + protobuf_field(9, value.tobytes())


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    """An input or output, float32, of a batch of any size."""
    sizes = [protobuf_field(2, b"batch"), *(_number(1, size) for size in shape)]
    dimensions = b"".join(protobuf_field(1, size) for size in sizes)
    tensor = protobuf_field(1, _number(1, _FLOAT) + protobuf_field(2, dimensions))
    return protobuf_field(1, name.encode()) + protobuf_field(2, tensor)


def _number(field: int, value: int) -> bytes:
    """A protobuf field of a number below 2¹⁴."""
    low, high = value & 0x7F, value >> 7
    return bytes([field << 3, *([low | 0x80, high] if high else [low])])
