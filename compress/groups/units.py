"""From merged labels to groups: units that touch the same tensors in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.groups.labels import AttributeUse, Axis, Components, Labels
from compress.groups.network import DependentAttribute, Group, Layer, Positions, Role, Slice
from compress.groups.record import Axes
from compress.groups.traced_ints import Attribute

Named = Sequence[tuple[str, Axes]]  # tensors of the model, in order of first use


@dataclass(frozen=True)
class Units:
    """Which unit every label belongs to; -1 where the channel stays."""

    of: npt.NDArray[np.int64]  # (labels,)
    groups: tuple[Group, ...]

    def along(self, axis: Axis) -> Positions | None:
        """Return the units of a dimension; None where it has none."""
        row = None if axis is None else self.of[axis]
        return None if row is None or (row < 0).all() else row

    def followers(self, uses: Iterable[AttributeUse]) -> tuple[DependentAttribute, ...]:
        """Return the attributes that the surgery sets: those that count what can be cut."""
        found: dict[Attribute, DependentAttribute] = {}
        for use in uses:
            row, at = self.of[use.labels], use.attribute
            if (row >= 0).any():
                scale = use.numerator, use.denominator
                found.setdefault(at, DependentAttribute(at.module, at.name, row, *scale))
        return tuple(found.values())


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
    return Units(unit_of[components.of], tuple(groups))


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
