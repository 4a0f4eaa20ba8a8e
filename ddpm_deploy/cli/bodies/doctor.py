"""ddpm-deploy doctor: look at this machine, and say what works on it."""

import json
from dataclasses import asdict
from typing import Any, Final

import click

from ddpm_deploy.doctor.backends import Finding, about, cuda_of, installed, problems, run_backends
from ddpm_deploy.files import show
from ddpm_deploy.gpu import Driver
from ddpm_deploy.gpu import driver as ask_driver

_MARKS: Final = {"works": "works", "builds": "builds", "absent": "-", "broken": "BROKEN"}


def doctor(as_json: bool) -> None:
    """Print what is installed and visible, what each backend made of a known chain, and a verdict."""
    packages, driver = installed(), ask_driver()
    cuda = {name: major for name, version in packages.items() if (major := cuda_of(name, version))}
    found: dict[str, Any] = {"about": about(), "packages": packages, "cuda": cuda, "driver": driver}
    if not as_json:
        _show_machine(**found)
    wrong = problems(packages, driver)
    backends = []
    for finding in run_backends(packages, driver):
        backends.append(finding)
        if not as_json:
            _show(finding)
    runs = [finding.name for finding in backends if finding.state == "works"]
    broken = [finding.name for finding in (*wrong, *backends) if finding.state == "broken"]
    if as_json:
        found |= {"problems": wrong, "backends": backends}
        click.echo(json.dumps(found, indent=2, default=asdict))
    else:
        for finding in wrong:
            _show(finding)
        click.echo(f"\nmodels run here on: {', '.join(runs) or 'nothing yet'}")
        if broken:
            click.echo(f"broken: {', '.join(dict.fromkeys(broken))}")
    if broken or not runs:
        raise click.exceptions.Exit(1)


def _show_machine(about: str, packages: dict[str, str], cuda: dict[str, int], driver: Driver) -> None:
    named = [
        f"{name} {version}" + (f" (CUDA {cuda[name]})" if name in cuda else "")
        for name, version in packages.items()
    ]
    lines = [about, f"  packages   {', '.join(named)}"]
    if driver.cuda:
        lines.append(f"  driver     NVIDIA {driver.version or '?'}, for CUDA up to {driver.cuda}")
    for gpu in driver.gpus:
        what = f"{show(gpu.name)}, compute capability {gpu.capability}, {gpu.memory / 2**30:.0f} GiB"
        lines.append(f"  GPU        {what}")
    if driver.problem:
        lines.append(f"  GPU        none: {show(driver.problem)}")
    click.echo("\n".join(lines) + "\n")


def _show(finding: Finding) -> None:
    click.echo(f"  {_MARKS[finding.state]:<7} {finding.name:<18} {show(finding.says)}")
    if finding.mend:
        click.echo(f"  {'':<7} {'':<18} → {show(finding.mend)}")
