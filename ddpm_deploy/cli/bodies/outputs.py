"""Checks of what a command is to write, made before long work begins."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ddpm_deploy.errors import ArtefactError, OutputError, SettingError
from ddpm_deploy.files import require_output, show
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.proof import load_proof
from ddpm_deploy.words import Precision


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse files that cannot be written, or that would replace one another or a file that is read."""
    taken = list(inputs)
    for path in filter(None, outputs):
        require_output(path)
        require_apart(path, taken)
        taken.append(path)


def require_apart(output: Path, others: Iterable[Path]) -> None:
    """Refuse an output, a file or a folder, that is one of the other files of a command."""
    if os.path.realpath(output) in {os.path.realpath(path) for path in others}:
        raise SettingError(
            f"{show(output)} is another file of this command: choose another name for the output"
        )


def require_same_model(output: Path, digest: str, precision: Precision) -> None:
    """Refuse to replace a file that holds another model or precision."""

    def same() -> bool:
        there = open_model(output).spec
        return there.provenance.digest == digest and there.precision == precision

    require_same(output, same, "holds another model or precision, or is broken")


def require_same(output: Path, same: Callable[[], bool], otherwise: str) -> None:
    """Refuse to replace a file that is not what `same` looks for: there may be no other copy of it.

    otherwise: what is said of it; an ArtefactError of `same` is a no.
    """
    if output.exists():
        with suppress(ArtefactError):
            if same():
                return
        raise OutputError(f"{show(output)} exists and {otherwise}: choose another --output, or pass --force")


def require_same_proof(proof: Path, digest: str) -> None:
    """Refuse to replace the proof of another model."""
    require_same(
        proof,
        lambda: load_proof(proof).spec.provenance.digest == digest,
        "is not the proof of this model",
    )
