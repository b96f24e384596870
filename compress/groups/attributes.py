"""Attributes of modules that must follow the cut, and those that cannot."""

from __future__ import annotations

import numpy as np

from compress.groups.labels import AttributeUse, Components
from compress.groups.network import Follower
from compress.groups.units import Units


def followers(components: Components, units: Units) -> tuple[Follower, ...]:
    """Return the attributes that the surgery sets; those that count nothing cuttable are not."""
    found: dict[tuple[str, str], Follower] = {}
    for use in components.uses:
        row = units.of[use.labels]
        key = (use.attribute.module, use.attribute.name)
        if (row >= 0).any():
            found.setdefault(key, Follower(*key, row, use.numerator, use.denominator))
    return tuple(found.values())


def conflicts(components: Components) -> list[tuple[AttributeUse, str]]:
    """Return uses that demand different values of one attribute: their channels must stay."""
    first: dict[tuple[str, str], AttributeUse] = {}
    bad = []
    for use in components.uses:
        key = (use.attribute.module, use.attribute.name)
        other = first.setdefault(key, use)
        if other is use or (_settled(components, other) and _settled(components, use)):
            continue
        if not _agree(components, other, use):
            why = f"{key[0]}.{key[1]} fixes other channels too, at {other.place}"
            bad += [(other, why), (use, why)]
    return bad


def _settled(components: Components, use: AttributeUse) -> bool:
    return all(int(c) in components.reasons for c in np.unique(components.of[use.labels]))


def _agree(components: Components, first: AttributeUse, second: AttributeUse) -> bool:
    if first.numerator * second.denominator != second.numerator * first.denominator:
        return False
    mine, other = (np.sort(components.of[use.labels]) for use in (first, second))
    return np.array_equal(mine, other)
