"""How long work tells how far it is, to whoever shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int], None]  # how many steps more are done
# Shows a stage of long work, by its name and length: gives the function that is told of its steps.
Stages = Callable[[str, int], AbstractContextManager[Progress]]


def no_progress(steps: int) -> None:
    """Tell nobody."""


@contextmanager
def silent(label: str, length: int) -> Iterator[Progress]:
    """Show nothing."""
    yield no_progress
