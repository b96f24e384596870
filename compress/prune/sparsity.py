"""Sparsity: single weights set to zero, or channels driven there by a penalty (group lasso)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.groups import Network
from compress.modules import evaluating
from compress.modules.inputs import read_batches
from compress.modules.objective import Objective
from compress.prune.criteria.lamp import shares_of_larger
from compress.prune.loss import FittingLoss
from compress.prune.saliency import Batches, run_on_leaves, summed_along
from compress.prune.selection import Ranking, one_budget

Pattern = Literal["unstructured", "2:4"]
Criterion = Literal["l1", "l2", "lamp", "taylor", "random"]


@dataclass(frozen=True)
class SparsityPlan:
    """Which weights stay: one mask for each weight of a convolution or linear layer."""

    masks: Mapping[str, Tensor]  # weight -> bool, True = stays
    pattern: Pattern
    criterion: Criterion

    @property
    def keep_weights(self) -> float:
        """Share of the weights that stay."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / max(1, sum(mask.numel() for mask in self.masks.values()))

    def to_json(self) -> dict[str, Any]:
        """Return what a run records: the share that stays, in all and in each layer."""
        return {
            "pattern": self.pattern,
            "criterion": self.criterion,
            "keep_weights": self.keep_weights,
            "layers": {name: float(mask.float().mean()) for name, mask in self.masks.items()},
        }


def plan_sparsity(
    model: nn.Module,
    *,
    keep_weights: float | None = None,
    pattern: Pattern = "unstructured",
    criterion: Criterion = "l1",
    ranking: Ranking = "global",
    batches: Batches | None = None,
    seed: int = 0,
) -> SparsityPlan:
    """Decide which single weights to zero.

    Magnitudes are divided by the norm of their layer, to be compared globally, as NNCF does it.

    Args:
        model: A trained network. Not modified.
        keep_weights: Share of the weights that stay, in (0, 1]; not for "2:4", which keeps half.
        pattern: "unstructured", or "2:4": of every four weights along the input channels the two
            with the highest score stay. Layers whose inputs are no multiple of four stay dense.
        criterion: What a weight's score is: "l1" and "l2" its magnitude, which order single weights
            alike; "lamp" its square over the sum of the squares in its layer that are not smaller;
            "taylor" the mean square of weight x gradient, which needs ``batches``; "random".
        ranking: "global" compares weights of all layers, "uniform" within each.
        batches: Images (B, C, H, W) and labels (B,), for "taylor".
        seed: Of "random".

    Raises:
        UsageError: options that cannot be right.

    Source: LAMP: Lee et al., ICLR 2021, https://arxiv.org/abs/2010.07611, equation 1. 2:4: Mishra
    et al., Accelerating Sparse Deep Neural Networks, https://arxiv.org/abs/2104.08378, section 3.
    """
    for name, value, kind in (("pattern", pattern, Pattern), ("criterion", criterion, Criterion)):
        if value not in get_args(kind):
            raise UsageError(
                f"{name} is {value!r}, which has no meaning for single weights",
                expected=f"one of {', '.join(get_args(kind))}",
            )
    if (keep_weights is None) != (pattern == "2:4"):
        raise UsageError(
            f"keep_weights is {keep_weights!r} with pattern {pattern!r}",
            expected="a share for unstructured, and none for 2:4, which keeps half",
        )
    if keep_weights is not None:
        one_budget(keep_params=keep_weights)
    found = _scores(model, criterion, batches, seed)
    if pattern == "2:4":
        masks = {name: _two_of_four(score) for name, score in found.items()}
    else:
        masks = _largest(found, float(keep_weights or 1.0), ranking)
    return SparsityPlan(masks, pattern, criterion)


def apply_sparsity(model: nn.Module, plan: SparsityPlan) -> nn.Module:
    """Return a copy of ``model`` with every weight that the plan drops at zero."""
    sparse = copy.deepcopy(model)
    _zero(sparse, plan.masks)
    return sparse


@contextmanager
def keeping_zeros(model: nn.Module) -> Iterator[None]:
    """Keep the weights at zero that are zero on entry while ``model`` is trained in the block.

    Optimizers with momentum move weights whose gradient is zero, so they are zeroed again before
    every forward and at the end.
    """
    masks = {name: weight.detach() != 0 for name, weight in _weights(model)}
    try:
        with model.register_forward_pre_hook(lambda module, _inputs: _zero(module, masks)):
            yield
    finally:
        _zero(model, masks)


def _zero(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in _weights(model):
            if name in masks:
                weight.mul_(masks[name].to(weight.device))


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the weights of convolutions and linear layers by name, shared ones once."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    owners = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
    return [(name, weight) for name, weight in model.named_parameters() if name in owners]


def _scores(
    model: nn.Module, criterion: Criterion, batches: Batches | None, seed: int
) -> dict[str, Tensor]:
    """Return the importance of every single weight, by the name of its tensor."""
    weights = {name: weight.detach() for name, weight in _weights(model)}
    if criterion == "taylor":
        if batches is None:
            raise UsageError("criterion 'taylor' needs images and labels", fix="Pass batches=")
        return _taylor(model, batches)
    if criterion == "random":
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weight.shape, generator=draw) for name, weight in weights.items()}
    if criterion == "lamp":
        return {
            name: shares_of_larger(weight.double().square().flatten()).reshape(weight.shape)
            for name, weight in weights.items()
        }
    return {name: weight.abs() / weight.norm().clamp_min(1e-30) for name, weight in weights.items()}


def _largest(importance: Mapping[str, Tensor], keep: float, ranking: Ranking) -> dict[str, Tensor]:
    """Return masks that keep the best share ``keep`` of all weights, or of each layer's."""
    if ranking == "uniform":
        return {
            name: _top(found, round(keep * found.numel())) for name, found in importance.items()
        }
    flat = torch.cat([found.flatten() for found in importance.values()])
    sizes = [found.numel() for found in importance.values()]
    chosen = torch.split(_top(flat, round(keep * len(flat))), sizes)
    return {
        name: mask.reshape(found.shape)
        for (name, found), mask in zip(importance.items(), chosen, strict=True)
    }


def _top(found: Tensor, count: int) -> Tensor:
    mask = torch.zeros(found.numel(), dtype=torch.bool, device=found.device)
    mask[torch.argsort(found.flatten(), descending=True, stable=True)[:count]] = True
    return mask.reshape(found.shape)


def _two_of_four(found: Tensor) -> Tensor:
    """Return a mask that keeps two of every four along dimension 1, (O, I, ...)."""
    if found.shape[1] % 4:
        return torch.ones_like(found, dtype=torch.bool)
    last = found.movedim(1, -1)
    fours = last.reshape(*last.shape[:-1], -1, 4)  # (O, ..., I / 4, 4)
    best = torch.argsort(fours, dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def _taylor(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the mean square of weight x gradient, for every weight."""
    names = [name for name, _ in _weights(model)]
    totals: dict[str, Tensor] = {}
    loss, device = FittingLoss(), next(model.parameters()).device
    with evaluating(model):
        for batch in read_batches(batches):
            loss.see(batch.target)
            weights, output = run_on_leaves(model, names, batch.to(device))
            found = torch.autograd.grad(loss(output, batch.target), list(weights.values()))
            for name, gradient in zip(names, found, strict=True):
                square = (weights[name].detach() * gradient).square()
                totals[name] = totals[name] + square if name in totals else square
    return totals


class GroupLasso:
    """The group lasso over the units of a network: the sum of the norms of all units' weights.

    The norm of a unit runs over every parameter entry it owns, in all its layers, so that channels
    that are cut together fade together. Each group's norms are scaled by the root of the number of
    entries in a unit, as in the original, so that wide and narrow layers are pressed alike.

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
        wanted = {place[:2]: None for _, places in self._groups for place in places}
        return {(name, dim): summed_along(weights[name].square(), dim) for name, dim in wanted}


class WithGroupLasso(Objective):
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
