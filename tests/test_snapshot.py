"""Snapshots: resumed anywhere, a chain is the uninterrupted one to the bit; and what is refused."""

import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ddpm_deploy.errors import ArtefactError, OwnershipError, SettingError
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.runtime.snapshot import Snapshot, digest
from ddpm_deploy.schedule import CosineBetas
from ddpm_deploy.solvers import StepTable, ddim
from ddpm_deploy.spec import ModelSpec, Provenance
from tests.models import ArrayNetwork, tiny_spec
from tests.test_guidance import Labelled


def model(max_batch: int = 4) -> ArrayNetwork:
    return ArrayNetwork(tiny_spec((1, 4, 4), timesteps=20), max_batch)


def taken(sampler: Sampler, after: int, **settings: Any) -> tuple[Snapshot, np.ndarray]:
    """The snapshot after so many steps, and the images."""
    kept: list[Snapshot] = []

    def callback(step: int, x: np.ndarray, x0: np.ndarray) -> None:
        if step + 1 == after:
            kept.append(sampler.snapshot())

    images = sampler.sample(3, seed=2**64 - 1, first_index=2**40, callback=callback, **settings)
    return kept[0], images


SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 9, "solver": "ddim", "eta": 0.7},
    {"steps": 9, "solver": "dpmpp-2m"},  # needs the last x̂0
    {"table": ddim(tiny_spec(timesteps=20).make_schedule(), np.arange(20)[::-2], stride=2)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("after", [1, 4, -1])
def test_a_resumed_chain_is_the_uninterrupted_one(
    tmp_path: Path, settings: dict[str, Any], after: int
) -> None:
    steps = settings.get("steps", len(settings["table"]) if "table" in settings else 20)
    snapshot, images = taken(Sampler(model()), after % (steps + 1), **settings)
    snapshot.save(tmp_path / "x.npz")
    seen: list[int] = []
    resumed = Sampler(model(3)).resume(
        Snapshot.load(tmp_path / "x.npz"), callback=lambda step, x, x0: seen.append(step)
    )
    np.testing.assert_array_equal(resumed.view(np.uint32), images.view(np.uint32))
    assert seen == list(range(after % (steps + 1), steps))


def test_labels_guidance_and_variance_are_in_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"labels": [2, 0, 3], "guidance": [1.5, 3.0, 0.0]}
    snapshot, images = taken(Sampler(Labelled(variance="learned_range")), 7, **settings)
    snapshot.save(tmp_path / "x.npz")
    again = Snapshot.load(tmp_path / "x.npz")
    assert again.request == snapshot.request
    other = Sampler(Labelled(variance="learned_range"))
    np.testing.assert_array_equal(other.resume(again), images)
    np.testing.assert_array_equal(other.resume(again), images)  # as often as one likes
    with pytest.raises(SettingError, match="3 images in flight: load the model with max_batch 6"):
        Sampler(Labelled(4, variance="learned_range")).resume(again)


def test_what_a_caller_changes_later_is_not_in_it() -> None:
    sampler, scales = Sampler(Labelled()), np.array([1, 2], np.float32)
    stream = sampler.stream(2, seed=5, guidance=scales)
    next(stream)
    snapshot = sampler.snapshot()
    scales[:] = 9
    stream.close()
    np.testing.assert_array_equal(sampler.resume(snapshot), sampler.sample(2, seed=5, guidance=[1, 2]))


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    sampler = Sampler(model())
    for _ in sampler.stream(
        np.uint8(2), steps=np.int64(5), solver="ddim", eta=np.float32(0.5), seed=np.uint64(1)
    ):  # type: ignore[arg-type]
        sampler.snapshot().save(tmp_path / "x.npz")
    assert Snapshot.load(tmp_path / "x.npz").step == 5


def test_another_thread_gets_none() -> None:
    """What it saw would be a step half taken."""
    sampler, problems = Sampler(model()), list[Exception]()

    def ask() -> None:
        try:
            sampler.snapshot()
        except OwnershipError as error:
            problems.append(error)

    def callback(step: int, x: np.ndarray, x0: np.ndarray) -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    sampler.sample(1, steps=2, callback=callback)
    assert len(problems) == 2


def test_a_stream_is_kept_too() -> None:
    sampler = Sampler(model())
    stream = sampler.stream(2, seed=5)
    for step, _, _ in stream:
        if step == 10:
            break
    snapshot = sampler.snapshot()
    stream.close()
    np.testing.assert_array_equal(sampler.resume(snapshot), sampler.sample(2, seed=5))


def test_there_is_none_of_nothing_and_none_of_foreign_noise() -> None:
    sampler = Sampler(model())
    with pytest.raises(SettingError, match="no chain is under way"):
        sampler.snapshot()
    with pytest.raises(SettingError, match="noise of the caller's own"):
        taken(sampler, 3, noise=lambda draw: np.zeros((3, 1, 4, 4), np.float32))
    with pytest.raises(SettingError, match="no chain is under way"):
        sampler.snapshot()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"provenance": Provenance(digest="a" * 64)},
            "of the model 000000000000…, and this is aaaaaaaaaaaa…",
        ),
        ({"image_shape": (1, 8, 8)}, "of images"),
        ({"timesteps": 10}, "20 steps were asked for"),
        ({"schedule": CosineBetas()}, "of another table"),
        ({"prediction": "v"}, "of another table"),
        ({"value_range": (0.0, 1.0)}, "of another table"),
    ],
)
def test_a_snapshot_of_another_model_is_refused(spec: dict[str, Any], problem: str) -> None:
    snapshot, _ = taken(Sampler(model()), 3)
    other: ModelSpec = msgspec.structs.replace(tiny_spec((1, 4, 4), timesteps=20), **spec)
    with pytest.raises(SettingError, match=problem):
        Sampler(ArrayNetwork(other, 4)).resume(snapshot)


def changed(path: Path, out: Path, **changes: Any) -> Path:
    """A snapshot with some of its entries, or parts of `about`, in place of its own; None: without."""
    content = dict(np.load(path))
    about = msgspec.json.decode(content["about"].tobytes())
    about |= {name: value for name, value in changes.items() if name in about}
    content["about"] = np.frombuffer(msgspec.json.encode(about), np.uint8)
    content |= {name: value for name, value in changes.items() if name not in about}
    np.savez(out, **{name: value for name, value in content.items() if value is not None})
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"x": None},
        {"about": np.frombuffer(b"{}", np.uint8)},
        {"about": np.array([1.0])},
        {"x": np.full((3, 1, 4, 4), np.nan, np.float32)},
        {"x": np.zeros((3, 1, 4, 4))},
        {"x0": np.zeros((2, 1, 4, 4), np.float32)},
        {"x": np.zeros((0, 1, 4, 4), np.float32), "x0": np.zeros((0, 1, 4, 4), np.float32)},
        {"rows": np.zeros((20, 12))},
        {"rows": np.full((20, 12), np.nan)},
        {"rows": np.zeros((0, 12))},
        {"rows": np.array(1.0)},
        {"about": np.frombuffer(b'{"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}", np.uint8)},
        {"rows": np.zeros((20, 11))},
        {"table": "0" * 64},
        {"step": 21},
        {"step": -1},
        {"step": "one"},
        {"request": {"count": 2}},
        {"request": {"count": 3}},  # without a seed
        {"request": {"count": 3, "seed": 0, "solver": "euler"}},
        {"request": {"count": 3, "seed": 0, "guidance": ["a"]}},
        {"request": 7},
        {"x": np.array([{}], dtype=object)},
    ],
    ids=str,
)
def test_snapshots_that_are_broken_or_lie(tmp_path: Path, change: dict[str, Any]) -> None:
    snapshot, _ = taken(Sampler(model()), 3)
    snapshot.save(tmp_path / "x.npz")
    Snapshot.load(changed(tmp_path / "x.npz", tmp_path / "same.npz"))
    with pytest.raises(ArtefactError, match="snapshot"):
        Snapshot.load(changed(tmp_path / "x.npz", tmp_path / "y.npz", **change))


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"first_index": 2**64 - 2}, {"labels": [7]}, {"guidance": [2.0]}, {"steps": 10**9}],
)
def test_requests_that_no_model_has(tmp_path: Path, change: dict[str, Any]) -> None:
    snapshot, _ = taken(Sampler(model()), 3)
    snapshot.save(tmp_path / "x.npz")
    request = snapshot.request.to_builtins() | change
    lie = changed(tmp_path / "x.npz", tmp_path / "y.npz", request=request)
    with pytest.raises(SettingError):
        Sampler(model()).resume(Snapshot.load(lie))


def test_rows_that_are_not_those_of_the_settings_are_refused(tmp_path: Path) -> None:
    """Another table of the caller's own, that says it follows from settings: its pictures would not say the truth."""
    snapshot, _ = taken(Sampler(model()), 3)
    snapshot.save(tmp_path / "x.npz")
    rows = snapshot.table.rows * 1.01
    lie = changed(tmp_path / "x.npz", tmp_path / "y.npz", rows=rows, table=digest(StepTable(rows)))
    with pytest.raises(SettingError, match="of another table"):
        Sampler(model()).resume(Snapshot.load(lie))


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    snapshot, _ = taken(Sampler(model()), 3)
    snapshot.save(tmp_path / "x.npz")
    for change in ({"format": 2, "request": {"solver": "unknown"}}, {"noise_version": 9, "step": "one"}):
        with pytest.raises(ArtefactError, match="newer ddpm-deploy"):
            Snapshot.load(changed(tmp_path / "x.npz", tmp_path / "y.npz", **change))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-200])
    with pytest.raises(ArtefactError, match="not a whole snapshot"):
        Snapshot.load(tmp_path / "cut.npz")


def test_tables_of_different_rows_have_different_digests() -> None:
    schedule = tiny_spec().make_schedule()
    digests = {digest(ddim(schedule, [9, 4, 0], eta=eta)) for eta in (0.0, 0.5, 1.0)}
    assert len(digests) == 3
