"""The proof that travels: a reference's recorded chains in a small file beside the model.

`ddpm-export` writes model.proof.npz with every model; whoever runs the model later, on another machine or
backend, holds it against that with no PyTorch and no checkpoint.
"""

from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from ddpm_deploy.arrays import load_arrays
from ddpm_deploy.errors import ArtefactError, SettingError, first_line, newer
from ddpm_deploy.files import show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.parity import PROOF_CHAIN, Trajectory
from ddpm_deploy.spec import ModelSpec

FORMAT: Final = 1
_TIMESTEPS: Final = (4, 16)  # at least, at most
_BYTES: Final = 800_000  # of x and prediction, where that makes a choice between the two
_LARGEST: Final = 1 << 28
_ARRAYS: Final = ("labels", "timesteps", "x", "prediction", "images")


def proof_path(model: Path) -> Path:
    """Where the proof of a model stands: model.onnx → model.proof.npz."""
    return model.parent / f"{model.stem}.proof.npz"


def as_proof(trajectory: Trajectory) -> Trajectory:
    """What is kept of recorded chains: some of the timesteps, so that a proof for images as CIFAR's is under 1 MB."""
    each = 2 * trajectory.images.nbytes
    return trajectory.thinned(int(np.clip(_BYTES // each, *_TIMESTEPS)))


def write_proof(proof: Trajectory, path: Path) -> None:
    """Write it to a file that is not yet under its name (`files.atomic`)."""
    arrays = {name: getattr(proof, name) for name in _ARRAYS}
    spec = np.frombuffer(proof.spec.to_json().encode(), np.uint8)
    np.savez(path, format=FORMAT, spec=spec, seed=np.uint64(proof.seed), steps=proof.steps, **arrays)


def load_proof(path: Path) -> Trajectory:
    """Read a proof. Raises ArtefactError or SpecError where it is missing, broken, or of a newer version."""
    content = load_arrays(path, _LARGEST, "proof")
    try:
        version = int(content["format"])
        if version > FORMAT:
            raise ArtefactError(newer(show(path), f"proof format {version}", str(FORMAT)))
        trajectory = Trajectory(
            spec=ModelSpec.from_json(content["spec"].tobytes(), show(path)),
            seed=int(content["seed"]),
            steps=int(content["steps"]),
            **{name: content[name] for name in _ARRAYS},
        )
        _require_sound(trajectory)
    except (KeyError, TypeError, ValueError, OverflowError, SettingError) as error:
        raise ArtefactError(f"{show(path)} is not a proof of ddpm-export: {first_line(error)}") from error
    return trajectory


def proof_of(model: ModelFile, path: Path) -> Trajectory:
    """Read the proof of a model. Raises as `load_proof` does, and ArtefactError where it is another model's."""
    proof = load_proof(path)
    theirs, mine = proof.spec.provenance.digest, model.spec.provenance.digest
    if theirs != mine:
        raise ArtefactError(
            f"{show(path)} is the proof of another model: its weights are {theirs[:12]}…, and {model.name} has "
            f"{mine[:12]}…: export it again, which writes its own, or take that file away"
        )
    return proof


def _require_sound(proof: Trajectory) -> None:
    """Raise ValueError unless the arrays have the shapes, types and ranges that their makers gave them."""
    kept, count = len(proof.timesteps), proof.count
    shape = count, *proof.spec.image_shape
    for name, dtype, size in (
        ("labels", "int64", (count,)),
        ("timesteps", "int64", (kept,)),
        ("x", "float32", (kept, *shape)),
        ("prediction", "float32", (kept, count, *proof.spec.prediction_shape)),
        ("images", "float32", shape),
    ):
        array = getattr(proof, name)
        if array.dtype != dtype or array.shape != size or not array.size:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, and {dtype} {size} is needed")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has numbers that are not finite")
    chain = proof.spec.step_table(msgspec.structs.replace(PROOF_CHAIN, steps=proof.steps))
    if not np.isin(proof.timesteps, chain.timesteps).all():
        raise ValueError("its timesteps are not those of its chain")
    if proof.labels.min() < 0 or proof.labels.max() >= max(1, proof.spec.num_labels):
        raise ValueError("its labels are not those of its model")
    if not 0 <= proof.seed < 2**64:
        raise ValueError("its seed is out of range")
