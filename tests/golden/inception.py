"""What torch-fidelity's Inception makes of images, kept so that the tests need neither its package nor its weights.

    pip download --no-deps torch-fidelity==0.4.0        # and unpack the wheel into a folder, say fidelity
    python -m tests.golden.inception fidelity

writes inception.npz beside this file. Its weights are random ones, which `weights` makes of their names and shapes
anywhere. Its package imports torchvision, which its Inception does not need and which does not load beside every
PyTorch: so its modules are imported without the package's own first lines.

Kept of each of the images of `images`: 2048 features; and what its `interpolate_bilinear_2d_like_tensorflow1x` makes of
those of `resized`.
"""

import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tests.importing import named_weights

FILE: Final = Path(__file__).with_suffix(".npz")
SIZES: Final = ((8, 8), (40, 33), (299, 299), (300, 512))
# Height and width of an image, and the size that it becomes.
RESIZED: Final = (((8, 8), 29), ((32, 20), 29), ((61, 40), 29), ((29, 29), 29), ((1, 1), 5))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of every name but those of counters, at which signals neither vanish nor grow."""
    state = named_weights(shapes, seed=21)
    for name, tensor in state.items():
        if name.endswith("running_var"):
            state[name] = 0.7 + tensor.abs()
        elif tensor.ndim == 4:
            state[name] = tensor * 1.2
    return state


def images(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Two images (2, 3, H, W) of that size."""
    return np.random.default_rng(size).integers(0, 256, (2, 3, *size), dtype=np.uint8)


def resized(size: tuple[int, int]) -> torch.Tensor:
    """An image (1, 1, H, W) of that size, in float32."""
    return torch.from_numpy(images(size)[:1, :1].astype(np.float32))


def _module(folder: Path, name: str) -> Any:
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(folder / "torch_fidelity")]
    sys.modules.setdefault("torch_fidelity", package)
    return importlib.import_module(f"torch_fidelity.{name}")


def main(folder: Path) -> None:
    """Write the golden file."""
    theirs = _module(folder, "feature_extractor_inceptionv3")
    shapes = _shapes(theirs)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "weights.pth")
        torch.save(weights(shapes), path)
        network = theirs.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    features = [network(torch.from_numpy(images(size)))[0].numpy() for size in SIZES]
    resize = _module(folder, "interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    for made in features:
        print(made.mean(), made.std(), np.abs(made[0] - made[1]).mean())
    np.savez_compressed(
        FILE,
        names=np.array(list(shapes)),
        shapes=np.array([",".join(map(str, shape)) for shape in shapes.values()]),
        features=np.stack(features),
        **{
            f"resized_{number}": resize(resized(size), size=(to, to), align_corners=False).numpy()
            for number, (size, to) in enumerate(RESIZED)
        },
    )


def _shapes(theirs: Any) -> dict[str, tuple[int, ...]]:
    """Of the weights that its network has, without any file of them."""
    load = torch.nn.Module.load_state_dict
    found: dict[str, tuple[int, ...]] = {}

    def seen(module: torch.nn.Module, state: object) -> None:
        found.update(
            {
                name: tuple(tensor.shape)
                for name, tensor in module.state_dict().items()
                if not name.endswith("num_batches_tracked")
            }
        )

    torch.nn.Module.load_state_dict = seen  # type: ignore[method-assign,assignment]
    try:
        with tempfile.NamedTemporaryFile() as file:
            torch.save({}, file.name)
            theirs.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=file.name)
    finally:
        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
