"""ddpm-deploy doctor: what works on this machine, shown by running it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.cli.common import command
from ddpm_deploy.files import show

if TYPE_CHECKING:
    from ddpm_deploy.gpu import Driver
    from ddpm_deploy.runtime.doctor import Finding

_MARKS: Final = {"works": "works", "builds": "builds", "absent": "-", "broken": "BROKEN"}


@command(
    "What works on this machine, and what mends the rest.",
    """
  ddpm-deploy doctor             packages, driver, GPUs; a known chain on every backend; a verdict
  ddpm-deploy doctor --json      for programs, and for bug reports
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def main(as_json: bool) -> None:
    """Say what is installed and visible, run a chain whose answer is known on every backend, and give a verdict.

    Exits with 1 where something is broken, or nothing runs. Takes seconds, and leaves nothing behind.
    """
    from ddpm_deploy.gpu import driver as ask_driver
    from ddpm_deploy.runtime.doctor import about, installed, problems, run_backends

    packages, driver = installed(), ask_driver()
    if not as_json:
        _show_machine(about(), packages, driver)
    wrong = problems(packages, driver)
    backends = run_backends(packages, driver, (lambda finding: None) if as_json else _show)
    runs = [finding.name for finding in backends if finding.state == "works"]
    broken = [finding.name for finding in (*wrong, *backends) if finding.state == "broken"]
    if as_json:
        _print_json(about(), packages, driver, wrong, backends)
    else:
        for finding in wrong:
            _show(finding)
        click.echo()
        click.echo(f"models run here on: {', '.join(runs) or 'nothing yet'}")
        if broken:
            click.echo(f"broken: {', '.join(dict.fromkeys(broken))}")
    if broken or not runs:
        raise click.exceptions.Exit(1)


def _show_machine(about: str, packages: dict[str, str], driver: "Driver") -> None:
    click.echo(about)
    click.echo(f"  packages   {', '.join(f'{name} {version}' for name, version in packages.items())}")
    if driver.cuda:
        click.echo(f"  driver     NVIDIA {driver.version or '?'}, for CUDA up to {driver.cuda}")
    for gpu in driver.gpus:
        click.echo(
            f"  GPU        {show(gpu.name)}, compute capability {gpu.capability}, {gpu.memory / 2**30:.0f} GiB"
        )
    if driver.problem:
        click.echo(f"  GPU        none: {show(driver.problem)}")
    click.echo()


def _show(finding: "Finding") -> None:
    click.echo(f"  {_MARKS[finding.state]:<7} {finding.name:<18} {show(finding.says)}")
    if finding.mend:
        click.echo(f"  {'':<7} {'':<18} → {show(finding.mend)}")


def _print_json(
    about: str,
    packages: dict[str, str],
    driver: "Driver",
    problems: "list[Finding]",
    backends: "list[Finding]",
) -> None:
    content: dict[str, Any] = {
        "about": about,
        "packages": packages,
        "driver": asdict(driver),
        "problems": [asdict(finding) for finding in problems],
        "backends": [asdict(finding) for finding in backends],
    }
    click.echo(json.dumps(content, indent=2))
