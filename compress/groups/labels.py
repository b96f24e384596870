"""Labels of single channels: merged where they are cut together, in groups of alike units."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compress.groups.network import AttributeUse, Group, Layer, Positions, Role, Slice
from compress.groups.traced_ints import Attribute

Labels = npt.NDArray[np.int32]  # one label per position of a dimension; 0 = must stay
Axis = Labels | None  # None: nothing along this dimension can be cut
Axes = tuple[Axis, ...]  # of a tensor
Named = Sequence[tuple[str, Axes]]  # tensors of the model, in order of first use
Pairs = list[tuple[Labels, Labels]]


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
        mine, times = np.unique(self.of[first.counted], return_counts=True)
        other, other_times = np.unique(self.of[second.counted], return_counts=True)
        if all(int(component) in self.reasons for component in (*mine, *other)):
            return True  # both stay as they are
        proportional = times * len(second.counted), other_times * len(first.counted)
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
        self.as_many: Pairs = []

    def fresh(self, count: int) -> Labels:
        """Return ``count`` labels that nothing else carries yet."""
        start = self.size
        self.size += count
        return np.arange(start, self.size, dtype=np.int32)

    def unify(self, first: Labels, second: Labels) -> None:
        """Tie two equally long rows of labels together, position by position."""
        if first is not second:
            self.pairs.append((first, second))

    def count_alike(self, first: Labels, second: Labels) -> None:
        """Let two equally long rows keep equally many: tied, unless they are the same channels.

        Those of a shuffle are, in another order.
        """
        self.as_many.append((first, second))

    def tie(self, rows: Labels) -> None:
        """Tie the same positions of all ``rows`` together, (rows, positions)."""
        self.unify(rows.ravel(), np.tile(rows[0], len(rows)))

    def freeze(self, labels: Axis, reason: str | Callable[[], str]) -> None:
        """Say that the channels with these labels must stay, and why."""
        if labels is not None and labels.any():
            self.frozen.append((labels, reason if isinstance(reason, str) else reason()))

    def reconcile(self, first: Labels, second: Labels) -> bool:
        """Tie channels that one attribute counts, so that it follows; False if that cannot be."""
        many, few = sorted((first, second), key=len, reverse=True)
        if len(many) % len(few) or not few.all() or not many.all():
            return False
        self.unify(many, np.tile(few, len(many) // len(few)))
        return True

    def solve(self) -> Components:
        """Merge all labels; grouped convolutions get the alternative that leaves most to cut."""
        count, of = _merge(self.size, _stack(self.pairs))
        unlike = [(a, b) for a, b in self.as_many if (np.sort(of[a]) != np.sort(of[b])).any()]
        if unlike:
            count, of = _merge(self.size, _stack([*self.pairs, *unlike]))
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


def find_units(
    components: Components, produced: Sequence[Labels], named: Named, layers: Mapping[str, Layer]
) -> tuple[npt.NDArray[np.int64], tuple[Group, ...]]:
    """Return the unit of every label, -1 where the channel stays, and the groups of units.

    Groups are in the order of the layers that make them.
    """
    prunable = np.zeros(components.count, bool)
    for labels in produced:
        prunable[components.of[labels]] = True
    prunable[list(components.reasons)] = False
    keys = [
        (name, dim) for name, axes in named for dim, axis in enumerate(axes) if axis is not None
    ]
    rows = [axis for _, axes in named for axis in axes if axis is not None]
    unit_of = np.full(components.count, -1, np.int64)
    groups: list[Group] = []
    names: dict[str, int] = {}
    offset = 0
    for members, parts in _groups(rows, components, prunable):
        slices = tuple(
            Slice(*keys[slot], index, _role(*keys[slot], layers)) for slot, index in parts
        )
        makers = [s.tensor for s in slices if s.role == "output"]
        if not makers:
            continue
        unit_of[members] = np.arange(offset, offset + len(members))
        offset += len(members)
        name = layer_name(makers[0])
        names[name] = names.get(name, 0) + 1
        number = f"#{names[name]}" if names[name] > 1 else ""
        groups.append(Group(name + number, len(members), slices))
    return unit_of[components.of], tuple(groups)


def _groups(
    rows: Sequence[Labels], components: Components, prunable: npt.NDArray[np.bool_]
) -> Iterator[tuple[Positions, list[tuple[int, Positions]]]]:
    """Yield sets of components that have equally many positions in the same slots.

    A slot is the number of a (tensor, dimension), of which ``rows`` are the labels. Components are
    told apart by the sum of a fixed random number for each of their positions' slot; sets and their
    members are in order of first appearance. With each set come its slots and, for each, the
    positions (members, k).
    """
    component = components.of[np.concatenate([np.zeros(0, np.int32), *rows])].astype(np.int64)
    keep = prunable[component]
    if not keep.any():
        return
    slot = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[keep]
    position = np.concatenate([np.arange(len(row)) for row in rows])[keep]
    component, count = component[keep], components.count
    random = np.random.default_rng(0).integers(1, 2**62, int(slot.max()) + 1, dtype=np.uint64)
    signature = np.zeros(count, np.uint64)
    np.add.at(signature, component, random[slot])
    seen, first = np.unique(component, return_index=True)
    members = seen[np.argsort(first, kind="stable")]
    _, start, inverse = np.unique(signature[members], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(start))[inverse]  # set of each member, by first appearance
    set_of, rank = np.zeros(count, np.int64), np.zeros(count, np.int64)
    set_of[members], rank[members] = order, np.arange(len(members))
    group = set_of[component]
    sort = np.lexsort((position, rank[component], slot, group))
    group, slot, position = group[sort], slot[sort], position[sort]
    by_set = np.split(members[np.argsort(order, kind="stable")], np.cumsum(np.bincount(order))[:-1])
    bounds = np.flatnonzero((np.diff(group) != 0) | (np.diff(slot) != 0)) + 1
    runs = zip(np.concatenate([[0], bounds]), np.split(position, bounds), strict=True)
    parts: list[list[tuple[int, Positions]]] = [[] for _ in by_set]
    for start_of_run, positions in runs:
        number = int(group[start_of_run])
        index = positions.reshape(len(by_set[number]), -1)
        parts[number].append((int(slot[start_of_run]), index))
    yield from zip(by_set, parts, strict=True)


def _role(name: str, dim: int, layers: Mapping[str, Layer]) -> Role:
    layer = layers.get(name)
    if layer is None or dim not in {layer.output_dim, layer.input_dim}:
        return "channel"
    return "output" if dim == layer.output_dim else "input"


_ENDING = re.compile(r"\.(weight(_v|_orig)?|parametrizations\.weight\.original[01]?)$")


def layer_name(tensor: str) -> str:
    """Return the layer that a weight belongs to: its name without ``.weight``."""
    return _ENDING.sub("", tensor)
