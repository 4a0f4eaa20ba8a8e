"""How long work will take, and how much of it is done."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import click

from ddpm_deploy.cli.common import logger

_LOG_SECONDS: Final = 15.0


Advance = Callable[[int, str | None], None]  # steps more that are done, and a note


def _logged(label: str, length: int) -> Advance:
    """Progress where there is no terminal: a line in the log every 15 seconds, with the time left."""
    done, start = 0, time.monotonic()
    due = start + _LOG_SECONDS

    def advance(steps: int, note: str | None) -> None:
        nonlocal done, due
        done += steps
        if time.monotonic() > due:
            now = time.monotonic()
            due, left = now + _LOG_SECONDS, duration((now - start) * (length - done) / max(done, 1))
            logger.info("%s: %d of %d · %s left%s", label, done, length, left, f" · {note}" if note else "")

    return advance


@contextmanager
def progress(label: str, length: int) -> Iterator[Advance]:
    """Show the progress of long work; gives the function to call when steps are done, `advance(steps, note)`.

    It is a bar on a terminal, with the time left, lines in the log elsewhere, and nothing under --quiet.
    """
    if sys.stderr is None or not sys.stderr.isatty() or logger.level > logging.INFO:
        yield _logged(label, length)
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, show_pos=True, item_show_func=lambda note: note
    ) as bar:
        latest = ""

        def advance(steps: int, note: str | None) -> None:
            nonlocal latest
            latest = note or latest  # click forgets a note when a step comes without one
            with suppress(OSError):  # the terminal may have gone
                bar.update(steps, latest)

        yield advance


@contextmanager
def stage(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of long work as `progress` does, without notes."""
    with progress(label, length) as advance:
        yield lambda steps: advance(steps, None)


def duration(seconds: float) -> str:
    """Write seconds for people: 0.8 s, 71 s, 12 min, 3.4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def peak_memory() -> str:
    """Write the most memory that this process has held, for people; "" where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return f" · {peaks[0] / 1000:.0f} MB" if peaks else ""
