"""Differences of numbers against formulas, and of sessions output by output."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import EngineError
from compress.evaluate.comparison import Drift, compare_outputs, outputs_row


class Session:
    """Returns given functions of its input under given names."""

    def __init__(self, **outputs: Any) -> None:
        self.outputs = tuple(SimpleNamespace(name=name) for name in outputs)
        self.functions = list(outputs.values())

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return [function(*arrays) for function in self.functions]


def same(x: np.ndarray) -> np.ndarray:
    return x


def doubled(x: np.ndarray) -> np.ndarray:
    return 2 * x


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 10))
def test_sqnr_equals_its_formula(seed: int, noise: float) -> None:
    generator = np.random.default_rng(seed)
    old = generator.normal(size=(3, 7))
    new = old + noise * generator.normal(size=(3, 7))
    drift = Drift.between(old, new)
    expected = 10 * np.log10(np.mean(old**2) / np.mean((old - new) ** 2))
    assert drift.sqnr_db == pytest.approx(expected)
    assert drift.max_abs_diff == pytest.approx(np.abs(old - new).max())
    assert drift.mean_abs_diff == pytest.approx(np.abs(old - new).mean())


def test_a_hundredth_of_the_signal_is_forty_decibels() -> None:
    ones = np.ones(5)
    assert Drift.between(ones, 1.01 * ones).sqnr_db == pytest.approx(40)


def test_drifts_of_batches_add_up_to_that_of_all() -> None:
    generator = np.random.default_rng(0)
    old, new = generator.normal(size=(10, 4)), generator.normal(size=(10, 4))
    parts = Drift.between(old[:3], new[:3]) + Drift.between(old[3:], new[3:])
    whole = Drift.between(old, new)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.max_abs_diff == whole.max_abs_diff
    assert parts.mean_abs_diff == pytest.approx(whole.mean_abs_diff)


def test_equal_and_broken_numbers() -> None:
    old = np.array([1.0, 2.0])
    assert Drift.between(old, old).sqnr_db == math.inf
    assert "sqnr_db" not in Drift.between(old, old).to_json()
    broken = Drift.between(old, np.array([1.0, np.nan]))
    assert (broken.sqnr_db, broken.not_finite) == (-math.inf, 1)
    assert broken.to_json() == {"max_abs_diff": 0.0, "mean_abs_diff": 0.0, "not_finite": 1}
    assert Drift.between(np.zeros(2), old).sqnr_db == -math.inf


def test_int8_differences_do_not_wrap() -> None:
    old, new = np.array([127], np.int8), np.array([-128], np.int8)
    assert Drift.between(old, new).max_abs_diff == 255


def test_outputs_are_matched_by_name() -> None:
    reference, candidate = Session(a=same, b=doubled), Session(b=doubled, a=same)
    drifts = compare_outputs(reference, candidate, [(np.ones((2, 3)),), (np.ones((1, 3)),)])
    assert {name: drift.max_abs_diff for name, drift in drifts.items()} == {"a": 0, "b": 0}
    assert drifts["a"].values == 9


def test_outputs_of_other_names_are_matched_by_position() -> None:
    drifts = compare_outputs(Session(a=same), Session(z=doubled), [(np.ones((2, 3)),)])
    assert drifts["a"].max_abs_diff == 1


@pytest.mark.parametrize(
    ("candidate", "batches", "message"),
    [
        (Session(a=same, b=same), [(np.ones(2),)], r"1 outputs \(a\), the candidate 2 \(a, b\)"),
        (
            Session(a=lambda x: x[None]),
            [(np.ones(2),)],
            r"output 'a': the reference has shape \(2,\), the candidate \(1, 2\)",
        ),
        (Session(a=same), [], "nothing to compare on"),
    ],
)
def test_what_cannot_be_compared_is_explained(candidate: Any, batches: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        compare_outputs(Session(a=same), candidate, batches)


def test_zeros_that_equal_zeros_are_told():
    zeros = np.zeros((2, 3), np.float32)
    assert Drift.between(zeros, zeros).to_json()["zero_reference"] == 1
    assert "zero_reference" not in Drift.between(zeros + 1, zeros + 1).to_json()


def test_outputs_of_other_names_are_compared_by_position():
    scores = [{"logits": np.array([0.0, 1.0, 3.0])}, {"logits": np.array([2.0, 1.0, 0.0])}]
    other = [{"output_0": np.array([0.0, 1.0, 2.0])}, {"output_0": np.array([0.0, 2.0, 1.0])}]
    found = outputs_row(scores, other)
    assert list(found["outputs"]) == ["logits"]
    assert found["agreement_pct"] == 50
