"""Labels of single channels: which are cut together, and which must stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compress.groups.traced_ints import Attribute

Labels = npt.NDArray[np.int32]  # one label per position of a dimension; 0 = must stay
Axis = Labels | None  # None: nothing along this dimension can be cut
Pairs = list[tuple[Labels, Labels]]


@dataclass(frozen=True)
class AttributeUse:
    """The program reads an attribute where it must equal ``scale`` x the kept of ``labels``."""

    attribute: Attribute
    labels: Labels
    numerator: int
    denominator: int
    place: str

    @property
    def why_fixed(self) -> str:
        """Why other channels that the attribute counts must stay if this use fixes it."""
        at = f"{self.attribute.module}.{self.attribute.name}".lstrip(".")
        return f"{at} fixes other channels too, at {self.place}"


@dataclass
class Alternative:
    """One way to cut a grouped convolution: channels tied together, attributes that follow."""

    pairs: Pairs = field(default_factory=list)
    uses: list[AttributeUse] = field(default_factory=list)


@dataclass(frozen=True)
class Components:
    """The labels, merged: ``of[label]`` is a component; components that must stay say why."""

    of: npt.NDArray[np.int32]  # (labels,)
    count: int
    reasons: dict[int, str]  # frozen component -> why
    uses: tuple[AttributeUse, ...]

    def conflicts(self) -> list[tuple[AttributeUse, AttributeUse]]:
        """Return pairs of uses that could demand different values of one attribute."""
        first: dict[Attribute, AttributeUse] = {}
        pairs = [(first.setdefault(use.attribute, use), use) for use in self.uses]
        return [(a, b) for a, b in pairs if a is not b and not self._agree(a, b)]

    def _agree(self, first: AttributeUse, second: AttributeUse) -> bool:
        mine, times = np.unique(self.of[first.labels], return_counts=True)
        other, other_times = np.unique(self.of[second.labels], return_counts=True)
        if all(int(component) in self.reasons for component in (*mine, *other)):
            return True  # both stay as they are
        proportional = times * len(second.labels), other_times * len(first.labels)
        return np.array_equal(mine, other) and np.array_equal(*proportional)


class Constraints:
    """Constraints on labels, collected from the rules; ``solve`` merges them by union-find."""

    def __init__(self) -> None:
        self.size = 1  # label 0 is taken: it marks what must stay
        self.pairs: Pairs = []
        self.frozen: list[tuple[Labels, str]] = []
        self.produced: list[Labels] = []
        self.choices: list[tuple[Alternative, Alternative]] = []
        self.uses: list[AttributeUse] = []

    def fresh(self, count: int) -> Labels:
        """Return ``count`` labels that nothing else carries yet."""
        start = self.size
        self.size += count
        return np.arange(start, self.size, dtype=np.int32)

    def unify(self, first: Labels, second: Labels) -> None:
        """Tie two equally long rows of labels together, position by position."""
        if first is not second:
            self.pairs.append((first, second))

    def tie(self, rows: Labels) -> None:
        """Tie the same positions of all ``rows`` together, (rows, positions)."""
        self.unify(rows.ravel(), np.tile(rows[0], len(rows)))

    def freeze(self, labels: Axis, reason: str | Callable[[], str]) -> None:
        """Say that the channels with these labels must stay, and why."""
        if labels is not None and labels.any():
            self.frozen.append((labels, reason if isinstance(reason, str) else reason()))

    def reconcile(self, first: AttributeUse, second: AttributeUse) -> bool:
        """Tie the channels that two uses count, so that both follow; False if that cannot be."""
        many, few = sorted((first.labels, second.labels), key=len, reverse=True)
        if len(many) % len(few) or not few.all() or not many.all():
            return False
        self.unify(many, np.tile(few, len(many) // len(few)))
        return True

    def solve(self) -> Components:
        """Merge all labels; grouped convolutions get the alternative that leaves most to cut."""
        count, of = _merge(self.size, _stack(self.pairs))
        chosen = self._choose(of, count)
        pairs = [(of[a], of[b]) for choice in chosen for a, b in choice.pairs]
        merged, onto = _merge(count, _stack(pairs))
        of = onto[of]
        uses = (*self.uses, *(use for choice in chosen for use in choice.uses))
        return Components(of, merged, self._reasons(of), uses)

    def _reasons(self, of: npt.NDArray[np.int32]) -> dict[int, str]:
        reasons: dict[int, str] = {int(of[0]): "tied to channels that cannot be cut"}
        for labels, reason in self.frozen:
            for component in np.unique(of[labels]).tolist():
                if component != of[0]:
                    reasons.setdefault(component, reason)
        return reasons

    def _choose(self, of: npt.NDArray[np.int32], count: int) -> list[Alternative]:
        if not self.choices:
            return []
        ties = [
            [_stack([(of[a], of[b]) for a, b in side.pairs]) for side in c] for c in self.choices
        ]
        frozen = [labels for labels, _ in self.frozen]
        must_stay = np.unique(of[np.concatenate([np.zeros(1, np.int32), *frozen])])
        makers = np.unique(of[np.concatenate(self.produced)])

        def units(picks: Sequence[int]) -> int:
            both = [ties[i][pick] for i, pick in enumerate(picks)]
            merged, onto = _merge(count, np.concatenate(both, axis=1))
            prunable = np.zeros(merged, bool)
            prunable[onto[makers]] = True
            prunable[onto[must_stay]] = False
            return int(prunable.sum())

        picks = max(([0] * len(ties), [1] * len(ties)), key=units)
        best = units(picks)
        for i in range(len(picks)):
            flipped = [*picks[:i], 1 - picks[i], *picks[i + 1 :]]
            if (score := units(flipped)) > best:
                picks, best = flipped, score
        return [choice[pick] for choice, pick in zip(self.choices, picks, strict=True)]


def _stack(pairs: Pairs) -> npt.NDArray[np.int32]:
    if not pairs:
        return np.zeros((2, 0), np.int32)
    return np.stack([np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])])


def _merge(size: int, pairs: npt.NDArray[np.int32]) -> tuple[int, npt.NDArray[np.int32]]:
    ones = np.ones(pairs.shape[1], np.int8)
    graph = coo_array((ones, (pairs[0], pairs[1])), shape=(size, size))
    count, of = connected_components(graph, directed=False)
    return int(count), of
