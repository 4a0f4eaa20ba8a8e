"""ddpm-deploy resume: go on from a snapshot."""

from pathlib import Path
from typing import Unpack

from ddpm_deploy.cli.bodies.chain import ChainOptions, Watch, checked_outputs, write_images
from ddpm_deploy.cli.bodies.models import open_sampler
from ddpm_deploy.errors import SettingError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.snapshot import Snapshot


def resume(model: Path, snapshot: Path, **options: Unpack[ChainOptions]) -> None:
    """Finish the chain in a snapshot and write its images."""
    opened = open_model(model)
    saved = Snapshot.load(snapshot)
    if saved.request.table is not None:
        raise SettingError(
            "this snapshot is of a table made in Python, which a picture cannot name: finish it with Sampler.resume"
        )
    if (
        options["weights"] != "raw"
    ):  # the file's spec is of the averaged weights; Sampler.resume checks the raw ones
        saved.require_fits(opened.spec)
    request, first = saved.request.checked(opened.spec), saved.step
    outputs = checked_outputs(opened, request, options, snapshot, first)
    if outputs.preview and first == len(saved.table):
        raise SettingError(
            "all steps of this chain are done, so there is no progress to show: omit --progress"
        )
    with open_sampler(opened, request, request.count, options) as sampler:
        watch = Watch(sampler, opened, request, outputs, first)
        write_images((sampler.resume(chain, callback=watch) for chain in [saved]), watch)
