"""Before the first request: whether the model computes on this machine what its proof says."""

import logging
from collections.abc import Sequence

from ddpm_deploy.errors import ParityError
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.parity import StepErrors, Trajectory, judge, teacher_forced
from ddpm_deploy.runtime.proof import proof_of, proof_path
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.stages import Progress, no_progress
from ddpm_deploy.words import Proof

logger = logging.getLogger(__name__)


def proof_beside(model: ModelFile, wanted: Proof) -> Trajectory | None:
    """The proof to check; None where none is wanted, and with a warning where there is none beside the model.

    Raises ArtefactError or SpecError as `runtime.proof.proof_of` does.
    """
    if wanted == "off":
        return None
    path = proof_path(model.path)
    if not path.exists():
        logger.warning(
            "%s has no proof beside it, and is served unproven: ddpm-export writes one", model.name
        )
        return None
    return proof_of(model, path)


def calls_of(proof: Trajectory, wanted: Proof) -> int:
    """How often the network is asked to check so much of a proof."""
    return len(proof.timesteps) + (0 if wanted == "predictions" else proof.steps)


def require_proven(
    proof: Trajectory, network: Network, wanted: Proof, progress: Progress = no_progress
) -> None:
    """Raise ParityError where the model does not compute here what its proof says. progress: as of `judge`."""
    if wanted == "predictions":
        _require_within(teacher_forced(proof, network, progress))
        return
    comparison = judge(proof, network, progress)
    _require_within(comparison.steps)
    if not comparison.within:
        raise ParityError(
            f"the images of its proof come out at {comparison.psnr.min():.1f} dB here, and "
            f"{comparison.tolerance.psnr:.0f} are needed: ddpm-verify says more"
        )


def _require_within(steps: Sequence[StepErrors]) -> None:
    """Refuse predictions past tolerance."""
    past = next((step for step in steps if not step.within), None)
    if past:
        raise ParityError(
            f"the model does not compute here what its proof says: at t = {past.timestep} it is off by "
            f"{past.relative_rms:.1e}, and {past.limit:.1e} is allowed: ddpm-verify says more"
        )
