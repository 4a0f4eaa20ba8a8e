"""A row of the table that the benchmarks make."""

from dataclasses import dataclass
from typing import Final

HEAD: Final = "| what | measured | asked | |\n| --- | --- | --- | --- |\n"


@dataclass(frozen=True)
class Row:
    """One figure: what it is, its text, what was asked of it, and whether it is met (None: not asked)."""

    what: str
    measured: str
    asked: str = ""
    met: bool | None = None

    def markdown(self) -> str:
        """As a line of a table."""
        verdict = {True: "met", False: "missed", None: ""}[self.met]
        return f"| {self.what} | {self.measured} | {self.asked} | {verdict} |"
