"""From merged labels to groups: units that touch the same tensors in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.groups.labels import Components, Labels
from compress.groups.network import Group, Layer, Positions, Role, Slice
from compress.groups.record import Axes

Named = Sequence[tuple[str, Axes]]  # tensors of the model, in order of first use


@dataclass(frozen=True)
class Units:
    """Which unit every label belongs to; -1 where the channel stays."""

    of: npt.NDArray[np.int64]  # (labels,)
    groups: tuple[Group, ...]

    @property
    def count(self) -> int:
        """Return the number of units of all groups together."""
        return sum(group.size for group in self.groups)


@dataclass(frozen=True)
class _Slots:
    """All positions of all tensors whose component can be cut, flattened."""

    slot: Positions  # (P,) number of the (tensor, dim)
    position: Positions  # (P,)
    component: Positions  # (P,)


def find_units(
    components: Components, produced: Sequence[Labels], named: Named, layers: Mapping[str, Layer]
) -> Units:
    """Return the groups of units that can be cut, in the order of the layers that make them."""
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
    for members, parts in _groups(_slots(rows, components, prunable), components.count):
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
    return Units(unit_of[components.of], tuple(groups))


def _slots(
    rows: Sequence[Labels], components: Components, prunable: npt.NDArray[np.bool_]
) -> _Slots:
    if not rows:
        empty = np.zeros(0, np.int64)
        return _Slots(empty, empty, empty)
    slot = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    position = np.concatenate([np.arange(len(row)) for row in rows])
    component = components.of[np.concatenate(rows)].astype(np.int64)
    keep = prunable[component]
    return _Slots(slot[keep], position[keep], component[keep])


def _groups(slots: _Slots, count: int) -> Iterator[tuple[Positions, list[tuple[int, Positions]]]]:
    """Yield sets of components that have equally many positions in the same slots.

    Components are told apart by the sum of a fixed random number for each of their positions'
    slot; sets and their members are in order of first appearance. With each set come its slots
    and, for each, the positions (members, k).
    """
    if not len(slots.slot):
        return
    random = np.random.default_rng(0).integers(1, 2**62, int(slots.slot.max()) + 1, dtype=np.uint64)
    signature = np.zeros(count, np.uint64)
    np.add.at(signature, slots.component, random[slots.slot])
    seen, first = np.unique(slots.component, return_index=True)
    members = seen[np.argsort(first, kind="stable")]
    _, start, inverse = np.unique(signature[members], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(start))[inverse]  # set of each member, by first appearance
    set_of, rank = np.zeros(count, np.int64), np.zeros(count, np.int64)
    set_of[members], rank[members] = order, np.arange(len(members))
    group = set_of[slots.component]
    rows = np.lexsort((slots.position, rank[slots.component], slots.slot, group))
    group, slot, position = group[rows], slots.slot[rows], slots.position[rows]
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


_ENDINGS = (
    ".weight",
    ".weight_v",
    ".weight_orig",
    ".parametrizations.weight.original",
    ".parametrizations.weight.original0",
    ".parametrizations.weight.original1",
)


def layer_name(tensor: str) -> str:
    """Return the layer that a weight belongs to: its name without ``.weight``."""
    for ending in _ENDINGS:
        if tensor.endswith(ending):
            return tensor.removesuffix(ending)
    return tensor
