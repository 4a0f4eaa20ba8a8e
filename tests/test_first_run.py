"""The runner of `python -m benches.first_run`, whose parts need a GPU: what one finds stands, whatever others do."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benches.first_run import WORK, Part, interrupted, page, run_parts
from ddpm_deploy import Sampler
from ddpm_deploy.gpu import visible_gpu
from tests.models import ArrayNetwork, tiny_spec

ABOUT = {"gpu": "a GPU", "driver": "1.2", "cuda": "13.0", "packages": {"numpy": "2"}}
SAYS = """import json, subprocess, sys, time
print(json.dumps({"what": "a figure", "measured": "1"}), flush=True)
"""
CODES = {
    "fails": SAYS + "raise SystemExit('it broke')",
    "hangs": SAYS + "print('{\"what', end='', flush=True); subprocess.run(['sleep', '60'])",
    "works": SAYS,
}


def test_what_a_part_found_stands_when_another_fails_or_is_cut_off(tmp_path: Path) -> None:
    output = tmp_path / "first_run.json"
    parts = [Part(name, (sys.executable, "-c", code), 3) for name, code in CODES.items()]
    start = time.perf_counter()
    results = run_parts(parts, ABOUT, output)
    assert time.perf_counter() - start < 30
    written = json.loads(output.read_text())
    assert written["gpu"] == "a GPU"
    outcomes = {part["part"]: part["outcome"] for part in written["parts"]}
    assert outcomes == {"fails": "failed", "hangs": "cut off", "works": "done"}
    for part in written["parts"]:
        assert [row["what"] for row in part["rows"]] == ["a figure"]
    assert written["parts"][0]["said"] == ["it broke"]
    section = page(ABOUT, results)
    assert section.count("| a figure | 1 |") == 3
    assert "it broke" in section
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_the_limits_are_under_eight_minutes() -> None:
    assert sum(limit for _, limit in WORK.values()) < 8 * 60


class Slow(ArrayNetwork):
    """A step takes a while."""

    def predict(self, batch: int) -> None:
        """As ever, later."""
        time.sleep(0.01)
        super().predict(batch)


def test_ctrl_c_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Slow(tiny_spec(), 1))
    monkeypatch.setattr(sampler, "sample_on_device", sampler.sample)  # whose device is the host
    assert re.fullmatch(r"[\d.]+ s, [\d.]+ s", interrupted(sampler, 1, after=0.1).measured)


@pytest.mark.skipif(visible_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.first_run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "no NVIDIA GPU is visible" in result.stderr


def test_a_part_prints_rows_alone() -> None:
    command = [sys.executable, "-m", "benches.first_run", "tests"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows[-1]["what"] == "tests/test_gpu.py"
    assert "skipped" in rows[-1]["measured"] or "passed" in rows[-1]["measured"]
