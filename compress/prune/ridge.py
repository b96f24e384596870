"""Ridge regression over samples that come in batches, in whichever form is smaller."""

from __future__ import annotations

import torch
from torch import Tensor

PULL = 1e-2  # r, as a share of the inputs' mean square, where the samples are ENOUGH
ENOUGH = 64  # samples for each feature; with fewer r is larger by as much


class Ridge:
    """Finds the change D of weights that minimizes |X D - L|^2 + r |D|^2, group by group.

    X (G, rows, F) is what a layer sees, L (G, rows, O) what its answers lack. D is
    (X'X + r)^-1 X'L and, the same, X'(XX' + r)^-1 L: with fewer rows than features the second is
    solved, and nothing is larger than X.

    Source: Hoerl and Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems,
    Technometrics 12, 1970; the second form is from Saunders et al., Ridge Regression Learning
    Algorithm in Dual Variables, ICML 1998.
    """

    def __init__(self, rows: int, features: int) -> None:
        """Expect at most so many samples of so many features."""
        self.rows = 0
        self._features = features
        self._is_wide = rows < features
        self._seen: list[Tensor] = []  # X, where it is wide
        self._squares: Tensor | float = 0.0  # X'X of others
        self._wanted: list[Tensor] = []  # L, or X'L
        self._factor: Tensor | None = None

    @property
    def is_solved(self) -> bool:
        """Say whether the samples are known, and only what is lacking is still taken."""
        return self._factor is not None

    def add(self, seen: Tensor, lack: Tensor) -> None:
        """Take the samples of one batch; after a solution the same again, with other lacks."""
        self._wanted.append(lack if self._is_wide else (seen.mT @ lack).double())
        if self.is_solved:
            return
        self.rows += seen.shape[1]
        if self._is_wide:
            self._seen.append(seen)
        else:
            self._squares = self._squares + (seen.mT @ seen).double()

    def solve(self) -> Tensor:
        """Return D (G, F, O) in float64, NaN where there is none, and forget what was lacking."""
        seen = torch.cat(self._seen, 1) if self._is_wide else None
        if self._factor is None:
            squares = self._squares if seen is None else (seen @ seen.mT).double()
            self._factor = self._decomposed(torch.as_tensor(squares))
        wanted = sum(self._wanted) if seen is None else torch.cat(self._wanted, 1).double()
        self._wanted.clear()
        found = torch.cholesky_solve(torch.as_tensor(wanted), self._factor)
        return found if seen is None else seen.mT.double() @ found

    def _decomposed(self, squares: Tensor) -> Tensor:
        """Return the Cholesky factor of X'X + r or XX' + r: (G, N, N)."""
        diagonal = squares.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(1, keepdim=True) / self._features
        pull = PULL * max(1.0, ENOUGH * self._features / self.rows)
        diagonal += pull * mean.clamp_min(1e-12)
        factor: Tensor
        factor, fault = torch.linalg.cholesky_ex(squares)
        factor[fault > 0] = torch.nan
        return factor
