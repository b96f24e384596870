"""Comparisons of answers against counting by hand, scikit-learn and statsmodels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError
from compress.evaluate import accuracy
from compress.evaluate.comparison import compare_predictions
from compress.evaluate.predictions import Predictions


def answered(answers: list[int], labels: list[int], classes: int = 3) -> Predictions:
    logits = 4 * np.eye(classes, dtype=np.float32)[answers]
    return Predictions(logits, np.array(labels))


def noisy(total: int, classes: int, noise: float, seed: int = 0) -> tuple[Predictions, Predictions]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, total)
    logits = generator.normal(size=(total, classes)).astype(np.float32)
    logits[np.arange(total), labels] += 2
    moved = logits + noise * generator.normal(size=logits.shape).astype(np.float32)
    return Predictions(logits, labels), Predictions(moved, labels)


LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
BEFORE = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0]
AFTER_ = [0, 0, 1, 2, 1, 0, 1, 2, 2, 0]  # lost: image 2, 5; won: image 6; other: image 3


def test_flips_are_told_apart_by_hand() -> None:
    found = compare_predictions(answered(BEFORE, LABELS), answered(AFTER_, LABELS), ["a", "b", "c"])
    assert [(flip.index, flip.kind) for flip in found.flips] == [
        (2, "lost"),
        (5, "lost"),
        (6, "won"),
        (3, "other"),
    ]
    assert (found.flips[0].label, found.flips[0].before, found.flips[0].after) == (0, 0, 1)
    sure = 100 * np.exp(4) / (np.exp(4) + 2)
    assert found.flips[0].before_confidence_pct == pytest.approx(sure)
    assert found.agreement_pct == pytest.approx(60)
    assert found.flip_pct == pytest.approx(20)
    assert found.won_pct == pytest.approx(10)
    assert found.top1_change_pct == pytest.approx(-10)


def test_worst_class_is_the_largest_loss_of_recall() -> None:
    reference, candidate = noisy(500, 6, 1.5)
    found = compare_predictions(reference, candidate, list("abcdef"))
    before = {row.name: row.recall_pct for row in accuracy(reference, list("abcdef")).per_class}
    after = {row.name: row.recall_pct for row in accuracy(candidate, list("abcdef")).per_class}
    expected = {name: before[name] - after[name] for name in before}
    assert {drop.name: drop.drop_pct for drop in found.class_drops} == pytest.approx(expected)
    assert found.class_drops[0].drop_pct == pytest.approx(max(expected.values()))
    low, high = found.class_drops[0].drop_ci95
    assert low <= found.class_drops[0].drop_pct <= high


def test_change_of_accuracy_and_its_test_equal_statsmodels() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    reference, candidate = noisy(800, 5, 1.0)
    found = compare_predictions(reference, candidate)
    lost = int((reference.correct & ~candidate.correct).sum())
    won = int((~reference.correct & candidate.correct).sum())
    exact = mcnemar([[0, lost], [won, 0]], exact=True).pvalue
    assert found.top1_p_value <= exact  # mid-p is the less careful of the two
    assert found.top1_p_value == pytest.approx(exact, abs=0.1)
    change = accuracy(candidate).top1_pct - accuracy(reference).top1_pct
    assert found.top1_change_pct == pytest.approx(change)
    assert found.top1_change_ci95[0] <= change <= found.top1_change_ci95[1]


def test_verdicts() -> None:
    labels = [0] * 100
    right, wrong = answered([0] * 100, labels), answered([0] * 80 + [1] * 20, labels)
    assert compare_predictions(right, wrong).verdict == "less accurate"
    assert compare_predictions(wrong, right).verdict == "more accurate"
    few = answered([0] * 97 + [1] * 3, labels)
    assert (
        compare_predictions(right, few).verdict == "100 images cannot rule out a loss of 8.5 points"
    )


def test_few_images_are_not_said_to_show_no_difference() -> None:
    """Seven of 153 images lost and none won would be significant; nine lost and two won are not."""
    labels = [0] * 153
    before = answered([0] * 151 + [1] * 2, labels)
    after = answered([1] * 9 + [0] * 144, labels)
    found = compare_predictions(before, after)
    assert found.top1_change_pct == pytest.approx(-100 * 7 / 153)
    assert found.top1_p_value > 0.05 or found.verdict == "less accurate"
    few = compare_predictions(answered([0] * 153, labels), answered([1] * 4 + [0] * 149, labels))
    low = few.top1_change_ci95[0]
    assert few.verdict == f"153 images cannot rule out a loss of {-low:.1f} points"
    assert few.to_json()["top1_verdict"] == few.verdict
    many = compare_predictions(
        answered([0] * 20_000, [0] * 20_000), answered([0] * 20_000, [0] * 20_000)
    )
    assert many.verdict == "no significant difference"


def test_the_same_answers_differ_in_nothing() -> None:
    reference, _ = noisy(50, 4, 0)
    found = compare_predictions(reference, reference)
    assert (found.agreement_pct, found.flip_pct, found.top1_change_pct) == (100, 0, 0)
    assert found.top1_p_value == 1
    assert found.flips == ()
    assert "sqnr_db" not in found.row()
    assert found.row()["max_abs_diff"] == 0


def test_rows_are_json_and_named_as_the_report_names_them() -> None:
    from compress.report.schema import Result

    row = compare_predictions(*noisy(60, 4, 0.5)).row()
    json.dumps(row, allow_nan=False)
    known = set(Result.model_fields)
    shared = {
        "agreement_pct",
        "agreement_ci95",
        "flip_pct",
        "top1_change_pct",
        "top1_change_ci95",
        "top1_p_value",
        "sqnr_db",
        "worst_class",
        "worst_class_drop_pct",
    }
    assert shared <= known & set(row)
    json.dumps(compare_predictions(*noisy(60, 4, 0.5)).to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: compare_predictions(answered([0], [0], 3), answered([0], [0], 4)),
            r"reference has 3 class outputs, the candidate 4",
        ),
        (
            lambda: compare_predictions(answered([0, 1], [0, 1]), answered([0], [0])),
            r"answered 2 images, the candidate 1",
        ),
        (
            lambda: compare_predictions(answered([0, 1], [0, 1]), answered([0, 1], [0, 2])),
            r"image 1 has label 1 .* and 2 .*same order",
        ),
    ],
)
def test_what_cannot_be_compared_is_explained(attempt: Any, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        attempt()
