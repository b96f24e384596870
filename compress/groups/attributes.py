"""Attributes of modules that depend on channel counts: which follow a cut, which cannot."""

from __future__ import annotations

import numpy as np

from compress.groups.labels import AttributeUse, Components, Constraints
from compress.groups.network import DependentAttribute
from compress.groups.units import Units


def followers(components: Components, units: Units) -> tuple[DependentAttribute, ...]:
    """Return the attributes that the surgery sets; those that count nothing cuttable are not."""
    found: dict[tuple[str, str], DependentAttribute] = {}
    for use in components.uses:
        row = units.of[use.labels]
        key = (use.attribute.module, use.attribute.name)
        if (row >= 0).any():
            found.setdefault(key, DependentAttribute(*key, row, use.numerator, use.denominator))
    return tuple(found.values())


def conflicts(components: Components) -> list[tuple[AttributeUse, AttributeUse]]:
    """Return pairs of uses that could demand different values of one attribute."""
    first: dict[tuple[str, str], AttributeUse] = {}
    bad = []
    for use in components.uses:
        other = first.setdefault((use.attribute.module, use.attribute.name), use)
        if other is use or (_settled(components, other) and _settled(components, use)):
            continue
        if not _agree(components, other, use):
            bad.append((other, use))
    return bad


def reconcile(constraints: Constraints, first: AttributeUse, second: AttributeUse) -> bool:
    """Tie the channels that two uses count, so that both follow; False if that cannot be."""
    many, few = sorted((first.labels, second.labels), key=len, reverse=True)
    if len(many) % len(few) or not few.all() or not many.all():
        return False
    constraints.unify(many, np.tile(few, len(many) // len(few)))
    return True


def why_fixed(use: AttributeUse) -> str:
    """Return why channels that an attribute counts must stay, if another use fixes them."""
    at = f"{use.attribute.module}.{use.attribute.name}".lstrip(".")
    return f"{at} fixes other channels too, at {use.place}"


def _settled(components: Components, use: AttributeUse) -> bool:
    return all(int(c) in components.reasons for c in np.unique(components.of[use.labels]))


def _agree(components: Components, first: AttributeUse, second: AttributeUse) -> bool:
    mine, times = np.unique(components.of[first.labels], return_counts=True)
    other, other_times = np.unique(components.of[second.labels], return_counts=True)
    proportional = times * len(second.labels), other_times * len(first.labels)
    return np.array_equal(mine, other) and np.array_equal(*proportional)
