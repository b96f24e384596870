"""Ridge regression is the least squares it stands for, in both of its forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.prune.windows import ENOUGH, PULL, Ridge


def least(seen: Tensor, lack: Tensor) -> np.ndarray:
    """Return D of one group by numpy: rows that ask for D = 0 stand for the ridge."""
    x, wanted = seen.double().numpy(), lack.double().numpy()
    rows, features = x.shape
    r = PULL * max(1.0, ENOUGH * features / rows) * np.square(x).sum() / features
    below = np.sqrt(r) * np.eye(features)
    answer = np.vstack([wanted, np.zeros((features, wanted.shape[1]))])
    return np.linalg.lstsq(np.vstack([x, below]), answer, rcond=None)[0]


@pytest.mark.parametrize("rows", [1, 3, 5, 6, 7, 40, 1000])
@pytest.mark.parametrize("groups", [1, 3])
def test_both_forms_are_least_squares(rows: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    seen = torch.randn(groups, rows, 6, generator=draw)
    ridge = Ridge(rows, 6)
    for _ in range(2):  # what is lacking changes when a layer was fitted once
        lack = torch.randn(groups, rows, 2, generator=draw)
        for some, short in zip(seen.split(4, 1), lack.split(4, 1), strict=True):
            ridge.add(some, short)
        found = ridge.solve()
        assert ridge.rows == rows
        assert ridge.is_solved
        for group in range(groups):
            expected = least(seen[group], lack[group])
            np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_no_number_has_no_solution(rows: int) -> None:
    ridge = Ridge(rows, 6)
    ridge.add(torch.full((1, rows, 6), torch.inf), torch.ones(1, rows, 2))
    assert torch.isnan(ridge.solve()).all()


@pytest.mark.parametrize("rows", [3, 40])
def test_inputs_of_zero_ask_for_no_change(rows: int) -> None:
    ridge = Ridge(rows, 6)
    ridge.add(torch.zeros(1, rows, 6), torch.ones(1, rows, 2))
    assert not ridge.solve().any()
