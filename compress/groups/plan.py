"""What to cut, as data: made from kept units, saved as JSON, composed, replayed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from compress import artifact
from compress.errors import PlanError, RunError, UnknownNameError
from compress.groups.network import KeptIndex, Network, Positions, Reduction, stays_at
from compress.groups.stored import (
    LARGEST_SIZE,
    StoredPlan,
    from_text,
    to_text,
)

_SCHEMA, _UNPROVED = 2, 1  # with and without an example input to be proved on
Dims = Mapping[int, Positions]


class Kept(NamedTuple):
    """What stays of one dimension."""

    size: int  # before the cut
    positions: Positions


KeptOnly = Reduction[Kept]  # the masked reference computes it over what stays


@dataclass(frozen=True)
class PrunePlan:
    """What to cut, exactly: JSON-able, the same for the same network, settings and seed."""

    groups: Mapping[str, Positions]  # group -> units kept, ascending
    group_sizes: Mapping[str, int]
    tensors: Mapping[str, Dims]  # tensor -> dimension -> positions kept; only those that lose some
    shapes: Mapping[str, tuple[int, ...]]  # of those tensors before the cut
    attributes: Mapping[str, Mapping[str, int]]  # module -> attribute -> new value
    kept_only: tuple[KeptOnly, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    frozen: Mapping[str, str]  # layer -> why it could not be cut
    indices: Mapping[str, KeptIndex] = field(default_factory=dict)  # buffers that number channels
    about: Mapping[str, Any] = field(default_factory=dict)  # criterion, settings, seed, example
    is_proved: bool = field(default=True, compare=False)  # False: from a file, to be proved first

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Places of the outputs whose channels stay; all if None."""
        named = self.about.get("outputs")
        return tuple(named) if named else None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able data; rows of positions are text like ``0-3,5``."""
        indices = {
            name: {"values": index.values.tolist(), "kept": to_text(index.kept)}
            for name, index in self.indices.items()
        }
        return {
            "schema": _SCHEMA if "example" in self.about else _UNPROVED,
            "about": dict(self.about),
            "macs": {"before": self.macs_before, "after": self.macs_after},
            "params": {"before": self.params_before, "after": self.params_after},
            "groups": {
                name: {"size": self.group_sizes[name], "kept": to_text(kept)}
                for name, kept in self.groups.items()
            },
            "tensors": {
                name: {
                    "shape": list(self.shapes[name]),
                    "kept": {str(dim): to_text(row) for dim, row in sorted(dims.items())},
                }
                for name, dims in self.tensors.items()
            },
            "attributes": {module: dict(values) for module, values in self.attributes.items()},
            "kept_only": [_write_kept_only(item) for item in self.kept_only],
            "frozen": dict(self.frozen),
            **({"indices": indices} if indices else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrunePlan:
        """Return the plan that ``to_json`` wrote.

        Raises:
            PlanError: a key is absent, of another kind, or its positions make no sense.
        """
        try:
            return _read(StoredPlan.model_validate(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise PlanError(
                f"not a pruning plan: {place}: {first['msg']}",
                expected="the JSON that PrunePlan.save writes",
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON in one step; the same plan gives the same bytes."""
        artifact.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Return the plan in a file.

        Raises:
            PlanError: the file is absent, no JSON, or no plan.
        """
        try:
            return cls.from_json(artifact.read_json(Path(path)))
        except RunError as error:
            raise PlanError(error.what, where=error.where) from None
        except PlanError as error:
            raise error.within(str(path)) from None

    def then(self, later: PrunePlan) -> PrunePlan:
        """Return the one plan that does what this plan and then ``later`` do.

        Args:
            later: A plan made for the network that this plan leaves behind.

        Raises:
            PlanError: ``later`` was made for another network.
        """
        return _compose(self, later)


def make_prune_plan(network: Network, keep: Mapping[str, Any], **about: Any) -> PrunePlan:
    """Turn kept units into a plan; groups that ``keep`` leaves out stay whole.

    Args:
        network: What ``trace`` returned.
        keep: Group name -> indices of kept units, in any order, at least one each.
        about: What the plan should remember: criterion, settings, seed. JSON-able.

    Raises:
        PlanError: indices out of range or repeated, nothing kept, ``about`` is not JSON-able.
        UnknownNameError: no such group.
    """
    chosen = {name: _checked(network, name, kept) for name, kept in keep.items()}
    chosen = {g.name: chosen.get(g.name, np.arange(g.size)) for g in network.groups}
    try:
        remembered = json.loads(json.dumps(about, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PlanError(f"what the plan should remember is not JSON: {error}") from None
    units = network.kept_units(chosen)

    def kept_of(row: Positions) -> Kept:
        return Kept(len(row), np.flatnonzero(stays_at(row, units)))

    reductions = [reduction.map(kept_of) for reduction in network.reductions]
    tensors = network.kept_positions(chosen)
    attributes: dict[str, dict[str, int]] = {}
    for use in network.followers:
        stay = stays_at(use.counted, units)
        if not stay.all():
            new = int(stay.sum()) // use.scale
            attributes.setdefault(use.attribute.module, {})[use.attribute.name] = new
    picks = [(pick, stays_at(pick.units, units)) for pick in network.indices]
    return PrunePlan(
        groups=chosen,
        group_sizes={g.name: g.size for g in network.groups},
        tensors=tensors,
        shapes={name: network.shapes[name] for name in tensors},
        attributes=attributes,
        kept_only=tuple(each for each in reductions if each.numbers or _is_cut(each)),
        macs_before=network.macs,
        macs_after=sum(
            math.prod(_left_of(layer.shape, tensors.get(name, {}))) * layer.macs_per_element
            for name, layer in network.layers.items()
        ),
        params_before=network.params,
        params_after=sum(
            math.prod(_left_of(network.shapes[name], tensors.get(name, {})))
            for name in network.parameters
        ),
        frozen=dict(network.frozen),
        indices={
            pick.tensor: KeptIndex(pick.values, np.flatnonzero(stay))
            for pick, stay in picks
            if not stay.all()
        },
        about=remembered,
    )


def _checked(network: Network, name: str, kept: Any) -> Positions:
    sizes = {group.name: group.size for group in network.groups}
    if name not in sizes:
        raise UnknownNameError("group", name, sizes)
    size = sizes[name]
    row = np.sort(np.asarray(kept, np.int64).ravel())
    if not len(row):
        raise PlanError("no channel would be left", where=name, expected=f"1 to {size} units")
    if row[0] < 0 or row[-1] >= size or (np.diff(row) == 0).any():
        raise PlanError(
            "kept units are repeated or out of range", where=name, expected=f"some of 0..{size - 1}"
        )
    return row


def _left_of(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    """Return the shape that a cut leaves of ``shape``."""
    return tuple(len(dims[d]) if d in dims else size for d, size in enumerate(shape))


def _is_cut(reduction: KeptOnly) -> bool:
    """Say whether an op loses some of the channels that it looks across."""
    rows = (kept for dims in reduction.inputs.values() for kept in dims.values())
    return any(len(kept.positions) < kept.size for kept in rows)


def _write_kept_only(item: KeptOnly) -> dict[str, Any]:
    inputs, outputs = (
        {
            str(i): {str(d): [kept.size, to_text(kept.positions)] for d, kept in dims.items()}
            for i, dims in sides.items()
        }
        for sides in (item.inputs, item.outputs)
    )
    numbers = {"numbers": True} if item.numbers else {}
    about = {"op": item.op, "occurrence": item.occurrence, "mask_only": item.mask_only, **numbers}
    return {**about, "inputs": inputs, "outputs": outputs}


def _read(stored: StoredPlan) -> PrunePlan:
    return PrunePlan(
        groups={name: from_text(g.kept, g.size) for name, g in stored.groups.items()},
        group_sizes={name: g.size for name, g in stored.groups.items()},
        tensors={
            name: {dim: from_text(row, t.shape[dim]) for dim, row in t.kept.items()}
            for name, t in stored.tensors.items()
        },
        shapes={name: t.shape for name, t in stored.tensors.items()},
        attributes=stored.attributes,
        kept_only=tuple(
            Reduction(**dict(item)).map(lambda row: Kept(row[0], from_text(row[1], row[0])))
            for item in stored.kept_only
        ),
        macs_before=stored.macs.before,
        macs_after=stored.macs.after,
        params_before=stored.params.before,
        params_after=stored.params.after,
        frozen=stored.frozen,
        indices={
            name: KeptIndex(np.asarray(i.values, np.int64), from_text(i.kept, LARGEST_SIZE))
            for name, i in stored.indices.items()
        },
        about=stored.about,
        is_proved=False,
    )


def _compose(first: PrunePlan, later: PrunePlan) -> PrunePlan:
    for name, shape in later.shapes.items():
        if name in first.shapes and shape != _left_of(first.shapes[name], first.tensors[name]):
            raise PlanError(
                "the later plan was made for another network",
                where=name,
                expected="a plan for the network that the first plan leaves behind",
            )
    tensors = {name: dict(dims) for name, dims in first.tensors.items()}
    for name, dims in later.tensors.items():
        mine = tensors.setdefault(name, {})
        for dim, row in dims.items():
            mine[dim] = mine[dim][row] if dim in mine else row
    attributes = {module: dict(values) for module, values in first.attributes.items()}
    for module, values in later.attributes.items():
        attributes.setdefault(module, {}).update(values)
    groups = dict(first.groups)  # units that both keep; a regrouped one stays as it was
    for name, row in later.groups.items():
        if name in groups and len(groups[name]) == later.group_sizes[name]:
            groups[name] = groups[name][row]
    indices = {**later.indices, **first.indices}
    for name in first.indices.keys() & later.indices.keys():
        mine_kept = first.indices[name].kept[later.indices[name].kept]
        indices[name] = KeptIndex(first.indices[name].values, mine_kept)
    return PrunePlan(
        groups=groups,
        group_sizes=dict(first.group_sizes),
        tensors=tensors,
        shapes={**later.shapes, **first.shapes},
        attributes=attributes,
        kept_only=_compose_kept_only(first.kept_only, later.kept_only),
        macs_before=first.macs_before,
        macs_after=later.macs_after,
        params_before=first.params_before,
        params_after=later.params_after,
        frozen=dict(later.frozen),
        indices=indices,
        about={**later.about, "after": dict(first.about)},
        is_proved=first.is_proved and later.is_proved,
    )


def _compose_kept_only(
    first: tuple[KeptOnly, ...], later: tuple[KeptOnly, ...]
) -> tuple[KeptOnly, ...]:
    found = {(item.op, item.occurrence): item for item in first}
    for item in later:
        before = found.get((item.op, item.occurrence))
        if before is not None:
            sides = _through(before.inputs, item.inputs), _through(before.outputs, item.outputs)
            item = dataclasses.replace(item, inputs=sides[0], outputs=sides[1])
        found[item.op, item.occurrence] = item
    return tuple(found.values())


Sides = Mapping[int, Mapping[int, Kept]]


def _through(first: Sides, later: Sides) -> Sides:
    """Return what stays after two cuts."""
    result = {i: dict(dims) for i, dims in first.items()}
    for i, dims in later.items():
        mine = result.setdefault(i, {})
        for d, kept in dims.items():
            before = mine.get(d)
            mine[d] = Kept(before.size, before.positions[kept.positions]) if before else kept
    return result
