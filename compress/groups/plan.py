"""What to cut, as data: made from kept units, saved as JSON, composed, replayed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress import artifact
from compress.errors import PlanError, RunError, UnknownNameError, first_problem
from compress.groups.network import KeptIndex, Network, Positions, Reduction, stays_at

K = TypeVar("K")
L = TypeVar("L")
T = TypeVar("T")
_SCHEMA, _UNPROVED = 2, 1  # with and without an example input to be proved on
_RUN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
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
            name: {"values": index.values.tolist(), "kept": _to_text(index.kept)}
            for name, index in self.indices.items()
        }
        return {
            "schema": _SCHEMA if "example" in self.about else _UNPROVED,
            "about": dict(self.about),
            "macs": {"before": self.macs_before, "after": self.macs_after},
            "params": {"before": self.params_before, "after": self.params_after},
            "groups": {
                name: {"size": self.group_sizes[name], "kept": _to_text(kept)}
                for name, kept in self.groups.items()
            },
            "tensors": {
                name: {
                    "shape": list(self.shapes[name]),
                    "kept": {str(dim): _to_text(row) for dim, row in sorted(dims.items())},
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
            return _read(_StoredPlan.model_validate(data))
        except ValidationError as error:
            raise PlanError(
                f"not a pruning plan: {first_problem(error)}",
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

        Raises:
            PlanError: ``later`` was made for another network.
        """
        for name, shape in later.shapes.items():
            if name in self.shapes and shape != _left_of(self.shapes[name], self.tensors[name]):
                raise PlanError(
                    "the later plan was made for another network",
                    where=name,
                    expected="a plan for the network that the first plan leaves behind",
                )
        groups = dict(self.groups)  # units that both keep; a regrouped one stays as it was
        for name, row in later.groups.items():
            if name in groups and len(groups[name]) == later.group_sizes[name]:
                groups[name] = groups[name][row]
        indices = {**later.indices, **self.indices}
        for name in self.indices.keys() & later.indices.keys():
            kept = self.indices[name].kept[later.indices[name].kept]
            indices[name] = KeptIndex(self.indices[name].values, kept)
        kept_only = {(item.op, item.occurrence): item for item in self.kept_only}
        for item in later.kept_only:
            if (before := kept_only.get((item.op, item.occurrence))) is not None:
                inputs = _through(before.inputs, item.inputs, _both)
                outputs = _through(before.outputs, item.outputs, _both)
                item = replace(item, inputs=inputs, outputs=outputs)
            kept_only[item.op, item.occurrence] = item
        return replace(
            later,
            groups=groups,
            group_sizes=dict(self.group_sizes),
            tensors=_through(self.tensors, later.tensors, lambda first, then: first[then]),
            shapes={**later.shapes, **self.shapes},
            attributes=_through(self.attributes, later.attributes, lambda _, then: then),
            kept_only=tuple(kept_only.values()),
            macs_before=self.macs_before,
            params_before=self.params_before,
            indices=indices,
            about={**later.about, "after": dict(self.about)},
            is_proved=self.is_proved and later.is_proved,
        )


def _both(first: Kept, then: Kept) -> Kept:
    return Kept(first.size, first.positions[then.positions])


def _through(
    first: Mapping[K, Mapping[L, T]], later: Mapping[K, Mapping[L, T]], both: Callable[[T, T], T]
) -> dict[K, dict[L, T]]:
    """Return what two cuts leave where one or the other cuts; ``both`` says it where both do."""
    result = {key: dict(rows) for key, rows in first.items()}
    for key, rows in later.items():
        mine = result.setdefault(key, {})
        for at, row in rows.items():
            mine[at] = both(mine[at], row) if at in mine else row
    return result


def make_prune_plan(network: Network, keep: Mapping[str, Any], **about: Any) -> PrunePlan:
    """Turn kept units into a plan; groups that ``keep`` leaves out stay whole.

    ``keep`` has the kept units by the name of the group, in any order, at least one each; ``about``
    is JSON-able: what the plan should remember, as criterion, settings and seed.

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

    kept_only = []
    for reduction in network.reductions:
        item = reduction.map(kept_of)
        rows = [kept for dims in item.inputs.values() for kept in dims.values()]
        if item.numbers or any(len(kept.positions) < kept.size for kept in rows):
            kept_only.append(item)
    tensors = network.kept_positions(chosen)

    def left_of(name: str) -> int:
        return math.prod(_left_of(network.shapes[name], tensors.get(name, {})))

    indices = {}
    for name, (row, values) in network.indices.items():
        stay = stays_at(row, units)
        if not stay.all():
            indices[name] = KeptIndex(values, np.flatnonzero(stay))
    return PrunePlan(
        groups=chosen,
        group_sizes={g.name: g.size for g in network.groups},
        tensors=tensors,
        shapes={name: network.shapes[name] for name in tensors},
        attributes=_attributes(network, units),
        kept_only=tuple(kept_only),
        macs_before=network.macs,
        macs_after=sum(left_of(n) * one.macs_per_element for n, one in network.layers.items()),
        params_before=network.params,
        params_after=sum(map(left_of, network.parameters)),
        frozen=dict(network.frozen),
        indices=indices,
        about=remembered,
    )


def _attributes(network: Network, kept: npt.NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """Return the attributes to rewrite: module -> attribute -> new value."""
    new: dict[str, dict[str, int]] = {}
    for use in network.followers:
        stay = stays_at(use.counted, kept)
        if not stay.all():
            value = int(stay.sum()) // use.scale
            new.setdefault(use.attribute.module, {})[use.attribute.name] = value
    return new


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


def _write_kept_only(item: KeptOnly) -> dict[str, Any]:
    numbers = {"numbers": True} if item.numbers else {}
    about: dict[str, Any] = {"op": item.op, "occurrence": item.occurrence}
    about |= {"mask_only": item.mask_only, **numbers}
    for name in ("inputs", "outputs"):
        about[name] = {
            str(i): {str(d): [kept.size, _to_text(kept.positions)] for d, kept in dims.items()}
            for i, dims in getattr(item, name).items()
        }
    return about


def _to_text(positions: Positions) -> str:
    """Return ascending positions as runs."""
    if not len(positions):
        return ""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return ",".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _from_text(text: str, size: int) -> Positions:
    """Return the positions that ``_to_text`` wrote."""
    ends = []
    for part in text.split(","):
        match = _RUN.fullmatch(part)
        if match is None:
            raise PlanError(f"{text!r} is no row of positions", expected='text like "0-3,5,7-9"')
        ends += [int(match[1]), int(match[2] or match[1])]
    starts, stops = ends[::2], ends[1::2]
    is_ascending = all(a <= b for a, b in zip(starts, stops, strict=True)) and all(
        a < b for a, b in zip(stops[:-1], starts[1:], strict=True)
    )
    if not is_ascending or stops[-1] >= size:
        raise PlanError(f"positions {text!r} are not ascending within 0..{size - 1}")
    runs = [np.arange(a, b + 1) for a, b in zip(starts, stops, strict=True)]
    return np.concatenate(runs).astype(np.int64)


LARGEST_SIZE = 2**22  # positions of one dimension: the inputs of a linear layer after a flatten
MOST_POSITIONS = 2**27  # of all dimensions together, 1 GiB of indices

Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Dim = Annotated[int, Field(ge=0, le=16)]
Index = Annotated[int, Field(ge=0, le=64)]
Side = dict[Index, dict[Dim, tuple[Size, str]]]  # argument -> dimension -> size and kept positions


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class _StoredCounts(_Part):
    before: Count
    after: Count


class _StoredGroup(_Part):
    size: Size
    kept: str


class _StoredTensor(_Part):
    shape: Annotated[tuple[Size, ...], Field(max_length=16)]
    kept: dict[Dim, str]

    @model_validator(mode="after")
    def _dimensions_exist(self) -> _StoredTensor:
        if self.kept and max(self.kept) >= len(self.shape):
            raise ValueError(f"dimension {max(self.kept)} of a tensor of {len(self.shape)}")
        return self


class _StoredKeptOnly(_Part):
    op: Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")]
    occurrence: Count
    mask_only: bool
    numbers: bool = False
    inputs: Side
    outputs: Side


class _StoredIndex(_Part):
    values: Annotated[tuple[Size, ...], Field(min_length=1)]
    kept: str


class _StoredPlan(_Part):
    """The content of a plan's file."""

    version: Literal[1, 2] = Field(alias="schema")  # 2: says what its network takes
    about: dict[str, Any]
    macs: _StoredCounts
    params: _StoredCounts
    groups: dict[str, _StoredGroup]
    tensors: dict[str, _StoredTensor]
    attributes: dict[str, dict[str, Count]]
    kept_only: tuple[_StoredKeptOnly, ...]
    frozen: dict[str, str]
    indices: dict[str, _StoredIndex] = {}

    @model_validator(mode="after")
    def _can_be_proved_and_is_bounded(self) -> _StoredPlan:
        if self.version > 1 and "example" not in self.about:
            raise ValueError("about.example is missing: what its network takes")
        total = sum(group.size for group in self.groups.values())
        total += sum(t.shape[d] for t in self.tensors.values() for d in t.kept)
        sides = [side for item in self.kept_only for side in (item.inputs, item.outputs)]
        total += sum(row[0] for side in sides for dims in side.values() for row in dims.values())
        if total > MOST_POSITIONS:
            raise ValueError(f"{total} positions, more than {MOST_POSITIONS}")
        return self


def _read(stored: _StoredPlan) -> PrunePlan:
    return PrunePlan(
        groups={name: _from_text(g.kept, g.size) for name, g in stored.groups.items()},
        group_sizes={name: g.size for name, g in stored.groups.items()},
        tensors={
            name: {dim: _from_text(row, t.shape[dim]) for dim, row in t.kept.items()}
            for name, t in stored.tensors.items()
        },
        shapes={name: t.shape for name, t in stored.tensors.items()},
        attributes=stored.attributes,
        kept_only=tuple(
            Reduction(**dict(item)).map(lambda row: Kept(row[0], _from_text(row[1], row[0])))
            for item in stored.kept_only
        ),
        macs_before=stored.macs.before,
        macs_after=stored.macs.after,
        params_before=stored.params.before,
        params_after=stored.params.after,
        frozen=stored.frozen,
        indices={
            name: KeptIndex(np.asarray(i.values, np.int64), _from_text(i.kept, LARGEST_SIZE))
            for name, i in stored.indices.items()
        },
        about=stored.about,
        is_proved=False,
    )
