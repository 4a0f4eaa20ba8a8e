"""What a run writes and says: folders that are its own, arrays for evaluators and for science, JSON, numbers of things."""

from pathlib import Path

from tests.test_cli import call


def test_one_of_a_thing_is_one(tmp_path: Path, onnx_path: Path) -> None:
    ran = call("run", onnx_path, "--steps", 1, "--count", 1, "--seed", 0, "-o", tmp_path / "x.npz", "-v")
    assert ran.exit_code == 0, ran.output
    assert "1 image, 1 step, seed 0" in ran.stdout
    verified = call("verify", onnx_path, onnx_path, "--count", 1, "--steps", 1)
    assert "(1 timestep, 1 chain of 1 step)" in verified.stdout
    assert "1 image · 2 chains of 1 step" in verified.stderr
    labels = call(
        "train", "digits", "-o", tmp_path / "m.pt", "--steps", 1, "--batch-size", 1, "--sample-every", 0
    )
    assert "1 step of 1 image 1×8×8" in labels.stderr
    again = call("train", "--resume", tmp_path / "m.pt", "--steps", 1)
    assert "has its 1 step already" in again.stderr
