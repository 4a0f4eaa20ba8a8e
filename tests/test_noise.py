"""The noise: published vectors, the reference bit for bit, golden bits, and that it is normal."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy import noise, reference
from ddpm_deploy.noise import AddressedNoise
from tests.tolerances import TOLERANCES

GOLDEN = Path(__file__).parent / "golden" / "noise-v1.npz"
ALL_ONES = 0xFFFFFFFF

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def addressed(seeds: list[int], indices: list[int], draws: list[int], elements: int) -> NDArray[np.float32]:
    source = AddressedNoise(len(seeds), elements)
    source.assign(slice(0, len(seeds)), np.array(seeds, np.uint64), np.array(indices, np.uint64))
    out = np.empty((len(seeds), 1, source.width), np.float32)
    source.fill(slice(0, len(seeds)), np.array(draws)[:, None], out)
    return out[:, 0, :elements]


def golden_cases() -> NDArray[np.float32]:
    """Values over the whole range of addresses: seeds and indices past 32 bits, high draws and blocks."""
    seeds = [0, 1, 2**32, 2**64 - 1]
    indices = [0, 2**32 + 5, 7, 2**64 - 1]
    return np.stack(
        [addressed(seeds, indices, [draw] * 4, 3 * 32 * 32)[:, ::7] for draw in (0, 1, 500, 1000)]
    )


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    philox = noise._Philox(())
    philox.even[:], philox.start[:] = counter[0::2], counter[1::2]
    philox.run(noise._round_keys(np.array(key, np.uint32)))
    (r0, r2), (r1, r3) = philox.even_low, philox.odd_low
    assert (r0, r1, r2, r3) == words
    assert reference.philox4x32(counter, key) == words


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (3, 40, 36)])
def test_noise_equals_the_reference_bit_for_bit(shape: tuple[int, int, int]) -> None:
    seeds, indices, draws = [3, 2**63 + 11, 3], [0, 2**40, 1], [0, 1000, 17]
    got = addressed(seeds, indices, draws, int(np.prod(shape)))
    for row, address in zip(got, zip(seeds, indices, draws, strict=True), strict=True):
        np.testing.assert_array_equal(row.reshape(shape), reference.normal(*address, shape))


def test_noise_does_not_depend_on_the_batch() -> None:
    """Slots share tiles in many ways: 40 slots of 100 blocks need four whole tiles and one cut short."""
    seeds, indices, draws = list(range(40)), list(range(100, 140)), list(range(40))
    together = addressed(seeds, indices, draws, 400)
    for k in (0, 9, 10, 39):
        np.testing.assert_array_equal(together[k], addressed([k], [100 + k], [k], 400)[0])


def test_a_slot_takes_up_its_new_address() -> None:
    source = AddressedNoise(3, 16)
    source.assign(slice(0, 3), np.array([1, 1, 1], np.uint64), np.array([0, 1, 2], np.uint64))
    source.assign(slice(1, 2), np.array([9], np.uint64), np.array([77], np.uint64))
    source.move(1, 0)
    out = np.empty((3, 1, 16), np.float32)
    source.fill(slice(0, 3), np.array([[4], [5], [6]]), out)
    for slot, address in enumerate([([9], [77], [4]), ([9], [77], [5]), ([1], [2], [6])]):
        np.testing.assert_array_equal(out[slot, 0], addressed(*address, 16)[0])


def test_golden_bits() -> None:
    """If this fails, images change for every seed: that takes a new noise_version."""
    golden = np.load(GOLDEN)["noise"]
    np.testing.assert_array_equal(golden_cases().view(np.uint32), golden.view(np.uint32))


def cpu_of_numpy() -> Any:
    """The module that knows which instructions NumPy uses; version 1 has it elsewhere."""
    modules = sys.modules
    return modules.get("numpy._core._multiarray_umath") or modules["numpy.core._multiarray_umath"]


def test_golden_bits_on_a_lesser_cpu() -> None:
    """The bits do not depend on NumPy's choice of instructions."""
    code = (
        "import numpy as np; from tests.test_noise import GOLDEN, cpu_of_numpy, golden_cases; "
        "cpu = cpu_of_numpy(); "
        "assert not any(cpu.__cpu_features__[name] for name in cpu.__cpu_dispatch__); "
        "assert (golden_cases().view('u4') == np.load(GOLDEN)['noise'].view('u4')).all()"
    )
    cpu = cpu_of_numpy()
    disabled = " ".join(name for name in cpu.__cpu_dispatch__ if cpu.__cpu_features__.get(name))
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled}
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_box_muller_is_exact_to_rounding() -> None:
    """Against the definition in float64 with NumPy's own logarithm and cosine, over extreme words too."""
    rng = np.random.default_rng(0)
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, ALL_ONES, 2**30, 3 * 2**30], np.uint32)
    r0 = np.concatenate([np.repeat(edges, 8), rng.integers(0, 2**32, 2000, np.uint32)])
    r1 = np.concatenate([np.tile(edges, 8), rng.integers(0, 2**32, 2000, np.uint32)])
    got = np.array([reference.box_muller(int(a), int(b)) for a, b in zip(r0, r1, strict=True)])
    u0, u1 = (r0 + 0.5) / 2**32, (r1 + 0.5) / 2**32
    radius = np.sqrt(-2 * np.log(u0))
    wanted = np.stack([radius * np.cos(2 * np.pi * u1), radius * np.sin(2 * np.pi * u1)], axis=1)
    error = np.abs(got - wanted) / np.maximum(radius[:, None], 1e-3)
    assert error.max() <= TOLERANCES["box_muller"].limit


def test_noise_is_standard_normal() -> None:
    """Moments, tails and independence of neighbours, over a million numbers: five standard errors."""
    z = addressed([5] * 16, list(range(16)), [1] * 16, 65536).astype(np.float64).ravel()
    n = z.size
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((np.abs(z) > 3).mean() - 0.0026998) < 5 * (0.0027 / n) ** 0.5
    for lag in (1, 2, 3, 4, 65536):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / (n - lag) ** 0.5


def test_noise_of_several_steps_is_that_of_each() -> None:
    source = AddressedNoise(3, 20)
    assert source.lookahead > 4
    source.assign(slice(0, 3), np.array([1, 1, 2], np.uint64), np.array([0, 1, 2], np.uint64))
    draws = np.array([[9, 8, 7], [5, 4, 3], [7, 6, 5]])
    out = np.empty((3, 3, 20), np.float32)
    source.fill(slice(0, 3), draws, out)
    for step in range(3):
        wanted = addressed([1, 1, 2], [0, 1, 2], draws[:, step].tolist(), 20)
        np.testing.assert_array_equal(out[:, step], wanted)
    np.testing.assert_array_equal(
        noise.addressed_noise(1, np.arange(2, dtype=np.uint64), 4, (4, 5)).reshape(2, 20),
        addressed([1, 1], [0, 1], [4, 4], 20),
    )
