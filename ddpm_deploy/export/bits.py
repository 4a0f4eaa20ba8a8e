"""Whether an exported network gives an image the same bits in a batch as alone, and with more threads.

It need not: ONNX Runtime splits a product among its threads as their number and the product's shape suggest, and where
that changes the order in which it sums, it changes the last bits (see `train.unet.Attention`).
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.stages import Stages, silent

_THREADS: Final = (1, 8, 16)
_BATCH, _SMALL_BATCH = 8, 2  # the latter of images over 128×128, for their memory and time
_LARGE: Final = 128 * 128


def same_bits(
    model: ModelFile, backend: Callable[..., Network] = OrtNetwork, *, stages: Stages = silent
) -> bool:
    """Whether each row of a batch has the bits that it has alone, with 1, 8 and 16 threads of a backend on the CPU.

    model: its file; it is asked for noise, at timesteps and with labels drawn evenly. stages: shows how far it is.
    """
    spec = model.spec
    batch = _BATCH if math.prod(spec.image_shape[1:]) <= _LARGE else _SMALL_BATCH
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *spec.image_shape), np.float32)
    temb = spec.embedding.table(spec.timesteps)[rng.integers(spec.timesteps, size=batch)]
    y = rng.integers(max(1, spec.num_labels), size=batch)
    parts = [slice(batch), *(slice(row, row + 1) for row in range(batch))]
    answers = np.empty((len(_THREADS), 2, batch, *spec.prediction_shape), np.float32)  # together, and alone
    with stages("comparing bits", len(_THREADS) * len(parts)) as progress:
        for threads, (together, alone) in zip(_THREADS, answers, strict=True):
            network = backend(model, threads=threads, max_batch=batch)
            for part in parts:
                (together if part.start is None else alone)[part] = ask(network, x[part], temb[part], y[part])
                progress(1)
            network.close()
    bits = answers.view(np.uint32)
    return bool((bits == bits[0, 1]).all())
