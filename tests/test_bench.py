"""ddpm-deploy bench and its processes: every backend has a row, whatever becomes of it; the last line says which."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benches import page
from benches.installed import megabytes_of
from ddpm_deploy.bench import measure
from ddpm_deploy.bench.candidates import Candidate, candidates, not_installed
from ddpm_deploy.bench.measure import Row, advice, contest
from ddpm_deploy.bench.process import Worker
from ddpm_deploy.cli import main
from ddpm_deploy.dependencies import importable
from ddpm_deploy.errors import BackendError
from ddpm_deploy.model_file import open_model
from ddpm_deploy.words import Backend, RunPrecision


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_every_backend_has_a_row_and_the_last_line_says_which(onnx_path: Path, checkpoint_path: Path) -> None:
    result = bench(onnx_path, checkpoint_path, "--batch", "1,2", "--threads", 1)
    assert result.exit_code == 0, result.output
    about, head, *rows, last = result.stdout.splitlines()
    assert about.startswith("ms a step · images/s by 20 steps of sde-dpmpp-2m")
    assert head.split() == ["model", "backend", "batch", "1", "batch", "2", "images/s", "MB", "error"]
    found = {tuple(row.split()[1:3]): row for row in rows}
    assert {("onnxruntime", "fp32"), ("torch", "fp32")} <= found.keys()
    assert found["onnxruntime", "fp32"].endswith("within tolerance")
    assert last.startswith("use ")
    assert "about" in result.stderr


def test_json_has_every_figure(onnx_path: Path) -> None:
    result = bench(onnx_path, "--batch", "2", "--json", "-q")
    content = json.loads(result.stdout)
    first = content["rows"][0]
    assert (first["backend"], first["precision"], first["problem"]) == ("onnxruntime", "fp32", None)
    assert first["error"]["within"]
    assert 0 < first["error"]["relative_rms"] < 5e-6
    assert len(first["seconds_a_step"]["2"]) > 1
    assert first["megabytes"] > 10
    rate = 2 / (first["milliseconds"]["2"] / 1e3 * 20)
    assert first["images_per_second"] == pytest.approx(rate)
    assert content["advice"].startswith("use ")


def test_a_backend_that_fails_is_a_row_that_says_why(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it dies of."""
    model = open_model(onnx_path)
    real = Worker.ask

    def ask(worker: Worker, question: str, **given: Any) -> Any:
        if given.get("backend") == "torch":
            os.kill(worker._process.pid, signal.SIGKILL)
            while worker._process.poll() is None:
                time.sleep(0.01)
        return real(worker, question, **given)

    monkeypatch.setattr(Worker, "ask", ask)
    asked: list[Candidate] = [
        Candidate(model, "tensorrt"),
        Candidate(model, "torch"),
        Candidate(model, "onnxruntime"),
    ]
    with contest(asked, (1,)) as run:
        run.measure()
        refused, killed, fine = run.rows
    assert "GPU" in refused.problem or "pip install" in refused.problem
    assert "its process was killed" in killed.problem
    assert (fine.problem, list(fine.times), fine.sound) == ("", [1], True)


def test_a_worker_answers_through_what_libraries_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud.py").write_text(
        "import os, sys\n"
        "from ddpm_deploy.bench.worker import serve\n"
        "class Loud:\n"
        "    def turn(self, batch, steps):\n"
        "        print('hello'); os.write(1, b'from C\\n'); print('the last words', file=sys.stderr)\n"
        "        if steps: os._exit(3)\n"
        "        return 0.5\n"
        "serve(Loud)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with Worker("loud") as worker:
        worker.ask("make")
        assert worker.ask("turn", batch=1, steps=0) == 0.5
        with pytest.raises(BackendError, match="no attribute 'nothing'"):
            worker.ask("nothing")
        with pytest.raises(BackendError, match="its process ended with 3: the last words"):
            worker.ask("turn", batch=1, steps=1)
        with pytest.raises(BackendError, match="its process ended with 3"):
            worker.ask("turn", batch=1, steps=0)


def test_an_error_past_tolerance_is_told(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Worker.ask

    def ask(worker: Worker, question: str, **given: Any) -> Any:
        answer = real(worker, question, **given)
        return answer | {"within": False} if question == "error" else answer

    monkeypatch.setattr(Worker, "ask", ask)
    result = bench(onnx_path, "--batch", "1")
    assert result.exit_code == 1
    assert "PAST 5e-06" in result.stdout
    assert result.stdout.splitlines()[-1] == "use none of them: none ran within tolerance"


def test_a_batch_size_that_would_take_minutes_is_left_out_unless_it_is_asked_for(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_LONGEST", 0.0)
    one = [Candidate(open_model(onnx_path), "onnxruntime")]
    with contest(one) as run:
        assert (run.batches, sorted(run.left_out)) == ((1,), [4, 16])
    with contest(one, (1, 4)) as run:
        assert (run.batches, run.left_out) == ((1, 4), {})


def test_what_is_not_installed_has_its_pip_line(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    models = [open_model(onnx_path)]
    assert [found.backend for found in candidates(models)] == ["onnxruntime"]
    assert {backend: "openvino" in line for backend, line in not_installed(models).items()} == {
        "openvino": True
    }


def test_refusals(tmp_path: Path, onnx_path: Path) -> None:
    foreign = tmp_path / "x.safetensors"
    foreign.write_bytes(b"\0" * 64)
    for arguments, said in (
        ([tmp_path / "none.onnx"], "does not exist"),
        ([foreign], "make an .onnx of it with ddpm-export"),
    ):
        result = bench(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert said in result.stderr
    assert bench(onnx_path, "--batch", "4,1").exit_code == 2
    assert bench().exit_code == 2


def row(onnx: Path, backend: Backend, asked: RunPrecision | None, seconds: float, **more: Any) -> Row:
    error = {"within": True, "relative_rms": 1e-7, "limit": 5e-6, "timestep": 0}
    return Row(Candidate(open_model(onnx), backend, asked), times={1: [seconds]}, **{"error": error, **more})


def test_advice(onnx_path: Path) -> None:
    """By speed among what is exact; less precision is named beside it, and what failed or errs never."""
    usual = row(onnx_path, "onnxruntime", None, 0.10)
    quick = row(onnx_path, "openvino", "fp32", 0.05)
    reduced = row(onnx_path, "openvino", "bf16", 0.02)
    name = open_model(onnx_path).name
    assert advice([usual]).startswith(f"use {name} --backend onnxruntime: none is clearly faster here")
    said = f"use {name} --backend openvino --precision fp32: 2.0 times as fast as onnxruntime, within the tolerance"
    assert advice([usual, quick]).startswith(said)
    both = advice([usual, quick, reduced])
    assert both.startswith(said)
    assert both.endswith("--precision bf16: 5.0 times as fast, within the tolerance of bf16")
    wrong = row(onnx_path, "openvino", "fp32", 0.01, error={**(usual.error or {}), "within": False})
    failed = row(onnx_path, "openvino", "fp32", 0.01, problem="it failed")
    assert advice([usual, wrong, failed]) == advice([usual])
    assert "unknown" in advice([usual, row(onnx_path, "openvino", "fp32", 0.05, error=None)])
    assert advice([failed]).startswith("use none")


@pytest.mark.skipif(not importable("packaging"), reason="packaging reads markers")
def test_installed_size_is_of_all_that_a_package_needs() -> None:
    numpy, onnxruntime = megabytes_of(["numpy"]), megabytes_of(["onnxruntime"])
    assert numpy
    assert onnxruntime
    assert 10 < numpy < onnxruntime
    assert megabytes_of(["numpy", "onnxruntime"]) == onnxruntime
    assert megabytes_of(["no-such-package"]) is None


def test_two_commands_write_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Old\n")
    monkeypatch.setattr(page, "PAGE", path)
    page.write_section("peers\n")
    page.write_head("# New\n")
    page.write_section("newer peers\n")
    head, _, section = path.read_text().partition("<!-- made by python -m benches.peers_speed -->")
    assert (head, section) == ("# New\n\n", "\n\nnewer peers\n")
