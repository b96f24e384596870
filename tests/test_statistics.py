"""Statistics against scipy, statsmodels, torchmetrics and repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import statistics
from compress.errors import UsageError


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 10), (9173, 10_000), (500, 500)])
def test_wilson_interval_equals_statsmodels(successes: int, total: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(successes, total, alpha=0.05, method="wilson")
    assert statistics.wilson_interval(successes, total) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_proportion_and_stays_in_the_unit(
    total: int, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(0, total))
    low, high = statistics.wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_what_is_no_proportion(successes: int, total: int) -> None:
    with pytest.raises(UsageError, match=r"is no proportion.*Expected 0 <= k <= n"):
        statistics.wilson_interval(successes, total)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mid_p_mcnemar_is_the_exact_one_less_half_of_each_tail_outcome(lost: int, won: int) -> None:
    from scipy.stats import binom

    outcomes = np.arange(lost + won + 1)
    probability = binom.pmf(outcomes, lost + won, 0.5)
    distance = np.abs(outcomes - (lost + won) / 2)
    observed = abs(lost - (lost + won) / 2)
    weight = np.where(distance > observed, 1.0, np.where(distance == observed, 0.5, 0.0))
    expected = float((weight * probability).sum())
    if lost + won == 0:
        expected = 1.0
    assert statistics.mcnemar(lost, won) == pytest.approx(expected)


def test_paired_interval_is_near_the_bootstrap_of_many_images() -> None:
    from scipy.stats import bootstrap

    generator = np.random.default_rng(0)
    reference = generator.random(4000) < 0.9
    candidate = np.where(generator.random(4000) < 0.05, ~reference, reference)
    low, high = statistics.accuracy_change_interval(reference, candidate)
    change = candidate.astype(float) - reference.astype(float)
    expected = bootstrap(
        (change,), np.mean, method="percentile", n_resamples=9999, rng=generator
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)


def answers(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    reference = np.repeat([True, True, False, False], [both, lost, won, neither])
    candidate = np.repeat([True, False, True, False], [both, lost, won, neither])
    return reference, candidate


@pytest.mark.parametrize(
    "shares", [(0.9, 0.04, 0.02, 0.04), (0.6, 0.1, 0.05, 0.25), (0.97, 0.01, 0.01, 0.01)]
)
def test_paired_interval_covers_the_truth_as_often_as_it_says(
    shares: tuple[float, float, float, float],
) -> None:
    """Over every outcome of 24 images, each with its multinomial probability."""
    from scipy.stats import multinomial

    total, covered = 24, 0.0
    truth = shares[2] - shares[1]
    for lost in range(total + 1):
        for won in range(total - lost + 1):
            for neither in range(total - lost - won + 1):
                counts = (total - lost - won - neither, lost, won, neither)
                chance = float(multinomial.pmf(counts, total, shares))
                if chance > 1e-9:
                    low, high = statistics.accuracy_change_interval(*answers(*counts))
                    covered += chance * (low <= truth <= high)
    assert covered > 0.93


@pytest.mark.parametrize(("total", "right"), [(153, 77), (153, 138), (250, 125), (1000, 800)])
def test_paired_interval_without_a_flip_is_at_least_the_exact_one(total: int, right: int) -> None:
    """Whatever the accuracy is: the exact bound is of a share of flips that shows none at all."""
    low, high = statistics.accuracy_change_interval(*answers(right, 0, 0, total - right))
    exact = 1 - 0.025 ** (1 / total)
    assert exact < high < 1.1 * exact
    assert low == pytest.approx(-high)


@pytest.mark.parametrize("counts", [(24, 0, 0, 0), (0, 0, 0, 24), (12, 0, 0, 12), (150, 0, 0, 3)])
def test_paired_interval_has_a_width_where_no_image_flips(
    counts: tuple[int, int, int, int],
) -> None:
    low, high = statistics.accuracy_change_interval(*answers(*counts))
    assert low < -0.001 < 0.001 < high
    more = statistics.accuracy_change_interval(*answers(*(100 * count for count in counts)))
    assert low < more[0] < 0 < more[1] < high


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 4)])
def test_paired_interval_refuses_what_is_not_paired(first: int, second: int) -> None:
    with pytest.raises(UsageError, match=r"are no pairs"):
        statistics.accuracy_change_interval(np.ones(first, bool), np.ones(second, bool))


def test_median_interval_equals_scipy_for_blocks_of_one() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).lognormal(size=(300, 1))
    ours = statistics.quantile_interval(values, 0.5, resamples=9999)
    expected = bootstrap(
        (values[:, 0],), np.median, method="percentile", n_resamples=9999, rng=2
    ).confidence_interval
    assert ours == pytest.approx((expected.low, expected.high), rel=0.02)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_quantiles_of_draws_equal_numpy(q: float) -> None:
    blocks = np.random.default_rng(5).lognormal(size=(7, 3))
    drawn = statistics._draws(7, 50, seed=6)
    assert (drawn.sum(1) == 7).all()
    expected = [np.quantile(np.repeat(blocks, counts, axis=0), q) for counts in drawn]
    assert statistics._quantiles(blocks, drawn, q) == pytest.approx(expected)


def test_ratio_interval_covers_the_truth_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        drift = generator.lognormal(sigma=0.3, size=(40, 1))  # a noisy machine, the same for both
        reference = 2.0 * drift * generator.lognormal(sigma=0.05, size=(40, 5))
        candidate = 1.0 * drift * generator.lognormal(sigma=0.05, size=(40, 5))
        low, high = statistics.ratio_interval(reference, candidate, resamples=400, seed=trial)
        hits += low <= 2.0 <= high
    assert hits >= 176  # 95 % of 200 is 190; fewer than 176 has probability 1e-5


def test_ratio_interval_is_narrower_for_paired_rounds() -> None:
    generator = np.random.default_rng(4)
    drift = generator.lognormal(sigma=0.5, size=(50, 1))
    reference, candidate = 2 * drift, 1 * drift
    paired = statistics.ratio_interval(reference, candidate)
    shuffled = statistics.ratio_interval(reference, generator.permutation(candidate))
    assert paired == pytest.approx((2.0, 2.0))
    assert shuffled[1] - shuffled[0] > 0.1


def test_intervals_of_constant_timings_are_points() -> None:
    constant = np.full((10, 4), 3.0)
    assert statistics.quantile_interval(constant, 0.5) == (3.0, 3.0)
    assert statistics.ratio_interval(2 * constant, constant) == (2.0, 2.0)


def test_ratio_interval_refuses_unpaired_and_non_positive_values() -> None:
    with pytest.raises(UsageError, match=r"10 and 9 rounds are no pairs"):
        statistics.ratio_interval(np.ones((10, 1)), np.ones((9, 1)))
    with pytest.raises(UsageError, match=r"positive values"):
        statistics.ratio_interval(np.ones((2, 1)), np.zeros((2, 1)))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_calibration_error_equals_torchmetrics(seed: int, total: int) -> None:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    generator = np.random.default_rng(seed)
    confidence = generator.random(total)
    correct = generator.random(total) < confidence
    expected = binary_calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(correct).long(), n_bins=statistics.BINS
    )
    ours = statistics.calibration_bins(confidence, correct)
    assert sum(ours.answers) == total
    assert ours.error == pytest.approx(float(expected), abs=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_part_below(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "BINS", 2)
    bins = statistics.calibration_bins(np.array([0.5, 0.6]), np.array([True, False]))
    assert bins.answers == (1, 1)
    assert bins.accuracy == (1.0, 0.0)


def test_calibration_error_of_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="at least one answer"):
        statistics.calibration_bins(np.zeros(0), np.zeros(0, bool))


def test_excludes_tells_a_difference_from_none() -> None:
    assert statistics.excludes((1.1, 1.3), 1.0)
    assert not statistics.excludes((0.9, 1.0), 1.0)
