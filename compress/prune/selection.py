"""How far to prune: one budget, what networks of some widths cost, which units are kept."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from compress.errors import UsageError
from compress.groups import Network
from compress.groups.plan import PrunePlan

Quantity = Literal["macs", "params"]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Ranking = Literal["global", "uniform"]
RoundTo = int | Literal["auto"]
Normalize = Literal["auto", "per_cost", "none", "mean", "max", "gaussian"]

Kind = Literal["macs", "params", "channels", "latency", "latency_ms"]
NAMES: dict[Kind, str] = {
    "macs": "keep_macs",
    "params": "keep_params",
    "channels": "keep_channels",
    "latency": "keep_latency",
    "latency_ms": "latency_ms",
}
BUDGETS = tuple(NAMES.values())
STEPS = 32  # rounds in which what a unit costs is brought up to date


@dataclass(frozen=True)
class Budget:
    """One limit: a share of MACs, parameters, channels (by layer perhaps) or time, or a time."""

    kind: Kind
    value: float | Mapping[str, float]

    @property
    def share(self) -> float:
        """The limit of a budget that is one number."""
        if isinstance(self.value, Mapping):
            raise TypeError("keep_channels has one share for each layer")
        return self.value

    def in_round(self, number: int, rounds: int, done: PrunePlan | None) -> Budget:
        """Return the budget of one of several rounds, of the network that those before it left.

        ``done`` is the joined plan of the rounds before ``number``, which counts from 1; None if
        it is the first.
        """
        if self.kind == "latency_ms" or isinstance(self.value, Mapping):
            return self
        if self.kind == "channels":
            return Budget(self.kind, self.value ** (1 / rounds))
        if done is None:
            left = 1.0
        elif self.kind == "latency":
            left = latency_left(rounds_of(done.about))
        else:
            before, after = (getattr(done, f"{self.kind}_{when}") for when in ("before", "after"))
            left = after / before
        return Budget(self.kind, min(1.0, keep_in_round(self.value, number, rounds) / left))

    def to_json(self) -> dict[str, Any]:
        """Return this budget under the name that the user gave it."""
        value = dict(self.value) if isinstance(self.value, Mapping) else self.value
        return {NAMES[self.kind]: value}


def one_budget(**budgets: float | Mapping[str, float] | None) -> Budget:
    """Return the one budget that is given, by its name among ``BUDGETS``.

    Raises:
        UsageError: none or several are given, or it is out of range.
    """
    given = {k: value for k, name in NAMES.items() if (value := budgets.get(name)) is not None}
    if len(given) != 1:
        named = " and ".join(NAMES[kind] for kind in given)
        raise UsageError(
            f"{named} contradict each other" if given else "no budget says how far to prune",
            expected=f"exactly one of {', '.join(BUDGETS)}",
            fix="Leave one of them" if given else "Give for instance keep_macs=0.5",
        )
    ((kind, value),) = given.items()
    if isinstance(value, Mapping):
        if not value:
            raise UsageError("keep_channels names no layer", fix="Give {layer: share, ...}")
        for layer, share in value.items():
            _check(f"keep_channels[{layer!r}]", share, "channels")
    else:
        _check(NAMES[kind], value, kind)
    return Budget(kind, value)


def _check(name: str, value: object, kind: Kind) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "latency_ms":
        if not is_number or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
            raise UsageError(f"{name} is {value!r}", expected="milliseconds above 0")
    elif not is_number or not 0 < float(value) <= 1:  # type: ignore[arg-type]
        raise UsageError(
            f"{name} is {value!r}",
            expected="the share that is kept, above 0 and at most 1",
            fix="To keep half, write 0.5",
        )


def keep_in_round(keep: float, number: int, rounds: int) -> float:
    """Return the share of the *original* that is kept after round ``number`` of ``rounds``.

    Every round keeps the same share of what it finds, so early rounds cut the most channels and
    late ones the fewest: keep ** (number / rounds), exactly ``keep`` in the last. To plan a round
    on the network that the round before has left, divide by the share that is actually left of it.
    """
    if not 1 <= number <= rounds:
        raise ValueError(f"round {number} of {rounds}")
    return keep if number == rounds else keep ** (number / rounds)


def rounds_of(about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what is known of every round of a plan, the last first."""
    yield about
    if "after" in about:
        yield from rounds_of(about["after"])


def latency_left(rounds: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of the original's latency that was measured when ``rounds`` were planned."""
    facts = (each["latency"] for each in rounds)
    shares: Iterator[float] = (fact["planned_ms"] / fact["original_ms"] for fact in facts)
    return math.prod(shares)


class CostModel:
    """What a network costs when group g keeps ``counts[g]`` units, without cutting anything.

    A group owns the same number of positions k for each of its units along a dimension of a tensor,
    so the length of that dimension is a linear function of the counts, and the size of a tensor is
    a product of at most two such lengths. Exact, and linear in the number of slices.
    """

    def __init__(self, network: Network) -> None:
        shapes, layers, dims = network.shapes, network.layers, network.owned
        self.sizes: Counts = np.array([group.size for group in network.groups], dtype=np.int64)
        tensors = sorted({t for t, _ in dims if t in layers or t in network.parameters})
        # Lengths of the two dimensions that are cut: base + slopes @ counts; 1 where none is.
        self._base, volume = np.ones((2, len(tensors))), np.ones(len(tensors))
        entries: tuple[list[tuple[int, int, int]], ...] = ([], [])
        for row, tensor in enumerate(tensors):
            sides = iter((0, 1))
            for dim, length in enumerate(shapes[tensor]):
                if (owned := dims.get((tensor, dim))) is None:
                    volume[row] *= length
                    continue
                side = next(sides)
                self._base[side, row] = length - sum(k * self.sizes[g] for g, k in owned.items())
                entries[side].extend((row, g, k) for g, k in owned.items())
        tables = (np.array(each, np.float64).reshape(-1, 3).T for each in entries)
        shape = len(tensors), len(self.sizes)
        self._slopes = [
            sparse.csr_array((k, (rows.astype(int), groups.astype(int))), shape=shape)
            for rows, groups, k in tables
        ]
        macs = [layers[t].macs_per_element if t in layers else 0 for t in tensors]
        counted = [t in network.parameters for t in tensors]
        self._factors: dict[Quantity, Floats] = {"macs": volume * macs, "params": volume * counted}
        self._fixed: dict[Quantity, float] = {"macs": 0.0, "params": 0.0}
        self._fixed["macs"] = network.macs - self.total("macs", self.sizes)
        self._fixed["params"] = network.params - self.total("params", self.sizes)

    def total(self, quantity: Quantity, counts: Counts) -> int:
        """Return the MACs of one image, or the parameters, with these counts."""
        first, second = self._lengths(counts)
        return round(float(self._factors[quantity] @ (first * second)) + self._fixed[quantity])

    def marginal(self, quantity: Quantity, counts: Counts) -> Floats:
        """Return what one unit of each group costs, at these counts: (groups,)."""
        factors, (first, second) = self._factors[quantity], self._lengths(counts)
        marginal = self._slopes[0].T @ (factors * second) + self._slopes[1].T @ (factors * first)
        return np.asarray(marginal, dtype=np.float64)

    def _lengths(self, counts: Counts) -> list[Floats]:
        return [
            base + slopes @ counts for base, slopes in zip(self._base, self._slopes, strict=True)
        ]


@dataclass(frozen=True)
class CandidateCounts:
    """The counts that one group may keep, and its units in the order in which they are kept."""

    levels: Counts  # allowed counts, ascending; the last is the group's size
    order: Counts  # units by falling score, (C,)
    scores: Floats  # in that order, (C,)

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


def candidate_counts(
    scores: Floats, *, step: int, at_least: int, below: bool = False
) -> CandidateCounts:
    """Return the candidate counts of a group with ``scores``, (C,), higher = keep; ties in order.

    Counts below the group's size are multiples of ``step``, the smallest that is ``at_least``; with
    ``below`` also the powers of two below ``step``.
    """
    size = len(scores)
    order = np.argsort(-scores, kind="stable")
    lowest = -(-max(at_least, 1) // step) * step
    fewer = [1 << k for k in range(step.bit_length()) if at_least <= 1 << k < min(step, size)]
    levels = np.unique([*(fewer if below else ()), *range(lowest, size, step), size])
    return CandidateCounts(levels.astype(np.int64), order.astype(np.int64), scores[order])


def kept_units(
    network: Network, candidates: Sequence[CandidateCounts], counts: Counts
) -> dict[str, Counts]:
    """Return the units that each group of a network keeps, by its name."""
    choices = zip(network.groups, candidates, counts, strict=True)
    return {group.name: one.kept(count) for group, one, count in choices}


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

    With "global" ranking the blocks with the lowest score go first, per unit of cost if
    ``marginal`` gives it for each group at given counts; what a unit costs is brought up to date
    ``STEPS`` times on the way. With "uniform" every group loses the same share. Then blocks that
    still fit are put back. The budget must be reachable.
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
