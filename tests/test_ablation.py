"""`python -m benches.ablation`: each variant trains, what was found is kept, and the table says what failed."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from benches import ablation
from benches.ablation import BEST, SEEDS, VARIANTS, Figure, Run, Summary, new_trainer, table, work
from benches.quality.data import Part, Real
from ddpm_deploy.errors import BackendError
from ddpm_deploy.train.data import Dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
PART = Part(IMAGES, np.zeros(40, np.int64))
REAL = Real("digits", Path("none.onnx"), PART, PART, PART, 40)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_trains_on_what_it_says(variant: ablation.Variant) -> None:
    trainer = new_trainer(Run(variant, 0), Dataset(IMAGES), torch.device("cpu"))
    assert torch.isfinite(trainer.advance())
    spec, settings = trainer.spec, trainer.settings
    assert (spec.prediction, spec.variance, settings.loss) == (
        variant.prediction,
        variant.variance,
        variant.loss,
    )


def test_variants_of_a_seed_see_the_same_images_and_noise() -> None:
    """So that differences are paired: networks of one shape begin alike too."""
    first, second = (
        new_trainer(Run(variant, 1), Dataset(IMAGES), torch.device("cpu"))
        for variant in (BEST, VARIANTS[1])  # of the same outputs
    )
    assert (first._batch(3)[0] == second._batch(3)[0]).all()
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_was_found_is_kept_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(run: Run, real: Real) -> None:
        trained.append(run)
        if run.seed == 1:
            raise BackendError("the loss is not finite by step 25")
        run.file(".onnx").touch()

    monkeypatch.setattr(ablation, "_FOLDER", tmp_path)
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "train_judge", lambda known: None)
    monkeypatch.setattr(ablation, "judge_run", lambda run, real, judge: Figure(10.0 + run.seed, 0.5, 4.0))
    runs = [Run(BEST, seed) for seed in SEEDS]
    first = work(runs, REAL)
    next(first)  # trained, and then it is stopped
    first.close()
    assert len(list(work(runs, REAL))) == 4
    assert trained == runs
    assert list(work(runs, REAL)) == []
    found = [run.figure for run in runs]
    assert found == [
        Figure(10.0, 0.5, 4.0),
        Figure(failed="the loss is not finite by step 25"),
        Figure(12.0, 0.5, 4.0),
    ]


def test_the_table_has_intervals_of_the_seeds_and_says_what_failed() -> None:
    figures = {variant: [Figure(20.0 + seed, 0.8, 5.0 + seed / 10) for seed in SEEDS] for variant in VARIANTS}
    figures[VARIANTS[0]] = [Figure(100.0, 0.1, 9.0), Figure(failed="it broke"), Figure(120.0, 0.1, 9.0)]
    figures[VARIANTS[1]] = [Figure(31.0 + seed, 0.8, 5.0) for seed in SEEDS]
    said = table([Summary(variant, found) for variant, found in figures.items()], 14.0)
    broken, fixed, *_ = said.splitlines()[3:]
    assert broken.count("–") == 4
    assert "- μ̃, L, learned: it broke" in said
    # The mean of 31, 32 and 33, and Student's 4.303 times 1/√3.
    assert "| 32.0 ± 2.5 | +11.0 ± 0.0 |" in fixed
    assert "| 21.0 ± 2.5 |  | 80% ± 0% | 5.100 ± 0.248 | 3.17 |" in said
