"""Select units to keep from scores and a budget; knows nothing of networks."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.prune.cost import Counts, Floats

Ranking = Literal["global", "uniform"]
Normalize = Literal["auto", "per_cost", "none", "mean", "max", "gaussian"]

STEPS = 32  # rounds in which what a unit costs is brought up to date


@dataclass(frozen=True)
class CandidateCounts:
    """The counts that one group may keep, and its units in the order in which they are kept.

    Args:
        levels: Allowed counts, ascending; the last is the group's size.
        order: Units by falling score, (C,).
        scores: Scores in that order, (C,).
    """

    levels: Counts
    order: Counts
    scores: Floats

    @property
    def size(self) -> int:
        """Units of the group."""
        return len(self.order)

    def kept(self, count: int) -> Counts:
        """Return the units that are kept, ascending, when ``count`` are."""
        return np.sort(self.order[:count])

    def level_at_most(self, count: float) -> int:
        """Return the largest allowed count up to ``count``, or the smallest there is."""
        position = int(np.searchsorted(self.levels, count + 1e-9, side="right")) - 1
        return int(self.levels[max(position, 0)])


def candidate_counts(scores: Floats, *, step: int, at_least: int) -> CandidateCounts:
    """Return the candidate counts of a group with ``scores``, (C,).

    Args:
        scores: Importance of each unit, higher = keep; ties are kept in order.
        step: Counts below the group's size are multiples of this.
        at_least: Smallest count, before it is rounded up to a multiple of ``step``.
    """
    size = len(scores)
    order = np.argsort(-scores, kind="stable")
    lowest = -(-max(at_least, 1) // step) * step
    levels = np.unique(np.append(np.arange(lowest, size, step), size))
    return CandidateCounts(levels.astype(np.int64), order.astype(np.int64), scores[order])


def normalized(scores: Floats, how: Normalize) -> Floats:
    """Return scores, (C,), that can be compared with those of other groups.

    "mean" and "max" divide by the group's mean or maximum, "gaussian" subtracts the mean and
    divides by the standard deviation, the others leave them as they are.
    """
    tiny = np.finfo(np.float64).tiny
    if how == "mean":
        return scores / max(float(np.abs(scores).mean()), tiny)
    if how == "max":
        return scores / max(float(np.abs(scores).max()), tiny)
    if how == "gaussian":
        spread = float(scores.std())
        standardized: Floats = (scores - scores.mean()) / (spread if spread > 0 else 1.0)
        return standardized
    return scores


class _Blocks:
    """Units that leave together, over all groups: one block leads to the next candidate count."""

    def __init__(
        self, candidates: Sequence[CandidateCounts], cost: Callable[[Counts], int]
    ) -> None:
        self.cost = cost
        group, units, score, share = [], [], [], []
        for number, one in enumerate(candidates):  # blocks of a group in the order they leave in
            sums = np.concatenate(([0.0], np.cumsum(one.scores)))
            upper, lower = one.levels[:0:-1], one.levels[-2::-1]
            group.append(np.full(len(lower), number, dtype=np.int64))
            units.append(upper - lower)
            score.append(np.maximum.accumulate((sums[upper] - sums[lower]) / (upper - lower)))
            share.append((one.size - lower) / one.size)
        self.group, self.units = np.concatenate(group), np.concatenate(units)
        self.score = np.concatenate(score)  # mean score of its units
        self.share_cut = np.concatenate(share)  # of its group, that is gone once the block is

    def without(self, cut: Counts, counts: Counts) -> Counts:
        """Return the counts once blocks are cut."""
        lost = np.bincount(self.group[cut], weights=self.units[cut], minlength=len(counts))
        return counts - lost.astype(np.int64)

    def shortest_prefix(self, left: Counts, counts: Counts, target: float) -> int:
        """Return how many of ``left`` must go, in order, until the cost is at most target."""
        return bisect.bisect_left(
            range(len(left)),
            True,
            key=lambda number: self.cost(self.without(left[:number], counts)) <= target,
        )

    def refill(self, gone: Counts, counts: Counts, budget: float) -> None:
        """Put blocks back, last cut first, while the cost stays within the budget, in place."""
        full: set[int] = set()
        for block in gone[::-1]:
            group = int(self.group[block])
            if group in full:
                continue
            counts[group] += self.units[block]
            if self.cost(counts) > budget:
                counts[group] -= self.units[block]
                full.add(group)
                if len(full) == len(counts):
                    break


def select(
    candidates: Sequence[CandidateCounts],
    cost: Callable[[Counts], int],
    marginal: Callable[[Counts], Floats] | None,
    budget: float,
    ranking: Ranking,
) -> Counts:
    """Return how many units each group keeps: the cost is at most ``budget`` and close to it.

    With "global" ranking the blocks with the lowest score, per unit of cost if ``marginal`` is
    given, go first; what a unit costs is brought up to date ``STEPS`` times on the way. With
    "uniform" every group loses the same share. Then blocks that still fit are put back.

    Args:
        candidates: One for each group.
        cost: What the network costs with the given counts.
        marginal: What one unit of each group costs at given counts; None = score alone decides.
        budget: Largest cost allowed; must be reachable.
        ranking: "global" or "uniform".
    """
    blocks = _Blocks(candidates, cost)
    counts = np.array([one.size for one in candidates], dtype=np.int64)
    gone: list[Counts] = []
    left = np.arange(len(blocks.group))
    start = cost(counts)
    steps = STEPS if marginal is not None and ranking == "global" else 1
    for step in range(1, steps + 1):
        target = start * (budget / start) ** (step / steps) if start > budget else budget
        priority = blocks.share_cut if ranking == "uniform" else blocks.score
        if marginal is not None and ranking == "global":
            weights = np.maximum(marginal(counts), 1e-30)
            priority = priority / weights[blocks.group]
        left = left[np.lexsort((left, priority[left]))]
        number = blocks.shortest_prefix(left, counts, target)
        gone.append(left[:number])
        counts = blocks.without(left[:number], counts)
        left = left[number:]
    blocks.refill(np.concatenate(gone), counts, budget)
    return counts
