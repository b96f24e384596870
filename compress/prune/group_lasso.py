"""Group-sparsity: a penalty that drives whole channels to zero before they are cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compress.groups import Network
from compress.modules.objective import Objective


class GroupLasso:
    """The group lasso over the units of a network: the sum of the norms of all units' weights.

    The norm of a unit runs over every parameter entry it owns, in all its layers, so that channels
    that are cut together fade together. Each group's norms are scaled by the root of the number of
    entries in a unit, as in the original, so that wide and narrow layers are pressed alike.

    Args:
        network: What ``trace`` returned for the model that is trained.

    Source: Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006;
    Wen et al., Learning Structured Sparsity in Deep Neural Networks, NIPS 2016,
    https://arxiv.org/abs/1608.03665, section 3.1; units as in Fang et al., DepGraph, CVPR 2023.
    """

    def __init__(self, network: Network) -> None:
        self._groups = [
            (
                group.size,
                [
                    (piece.tensor, piece.dim, torch.as_tensor(piece.index))
                    for piece in group.slices
                    if piece.tensor in network.parameters
                ],
            )
            for group in network.groups
        ]

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty of the weights as they are, a scalar with gradients."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        squares = self._squares(weights)
        terms = []
        for size, places in self._groups:
            device = squares[places[0][0], places[0][1]].device
            total, entries = torch.zeros(size, device=device), 0
            for tensor, dim, index in places:
                total = total + squares[tensor, dim][index.to(device)].sum(1)
                entries += weights[tensor].numel() // weights[tensor].shape[dim] * index.shape[1]
            terms.append(entries**0.5 * (total + 1e-12).sqrt().sum())  # the root has no slope at 0
        return torch.stack(terms).sum()

    def _squares(self, weights: dict[str, nn.Parameter]) -> dict[tuple[str, int], Tensor]:
        """Return the summed squares of each position along each dimension that is cut."""
        wanted = defaultdict(set)
        for _, places in self._groups:
            for tensor, dim, _ in places:
                wanted[tensor].add(dim)
        found = {}
        for tensor, dims in wanted.items():
            square = weights[tensor].square()
            for dim in dims:
                found[tensor, dim] = square.movedim(dim, 0).flatten(1 if square.ndim > 1 else 0)
                if square.ndim > 1:
                    found[tensor, dim] = found[tensor, dim].sum(1)
        return found


class WithGroupLasso:
    """An objective plus ``strength`` times the group lasso."""

    def __init__(self, objective: Objective, lasso: GroupLasso, strength: float) -> None:
        self.objective, self.lasso, self.strength = objective, lasso, strength

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one batch with the penalty, a scalar."""
        return self.objective(model, images, target) + self.strength * self.lasso.penalty(model)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield trainable parameters of the objective."""
        return self.objective.parameters()

    def close(self) -> None:
        """Close the objective."""
        self.objective.close()
