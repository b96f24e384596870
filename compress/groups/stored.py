"""A pruning plan as it lies on disk: the JSON's schema, checked, and positions as text."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import PlanError
from compress.groups import Positions

_RUN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def to_text(positions: Positions) -> str:
    """Return ascending positions as runs."""
    if not len(positions):
        return ""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return ",".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def from_text(text: str, size: int) -> Positions:
    """Return the positions that ``to_text`` wrote.

    Raises:
        PlanError: the text is no such row, is empty, or leaves the range 0..size-1.
    """
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


class Part(BaseModel):
    """A part of the file: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StoredCounts(Part):
    """A number before and after the cut."""

    before: Count
    after: Count


class StoredGroup(Part):
    """Units of a group that are kept, as text."""

    size: Size
    kept: str


class StoredTensor(Part):
    """Positions of a tensor that are kept, by dimension, as text."""

    shape: Annotated[tuple[Size, ...], Field(max_length=16)]
    kept: dict[Dim, str]

    @model_validator(mode="after")
    def _dimensions_exist(self) -> StoredTensor:
        if self.kept and max(self.kept) >= len(self.shape):
            raise ValueError(f"dimension {max(self.kept)} of a tensor of {len(self.shape)}")
        return self


class StoredKeptOnly(Part):
    """An op that looks across cut channels."""

    op: Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")]
    occurrence: Count
    mask_only: bool
    numbers: bool = False
    inputs: Side
    outputs: Side


class StoredIndex(Part):
    """A buffer whose values are numbers of channels."""

    values: Annotated[tuple[Size, ...], Field(min_length=1)]
    kept: str


class StoredPlan(Part):
    """The content of a plan's file."""

    version: Literal[1, 2] = Field(alias="schema")  # 2: says what its network takes
    about: dict[str, Any]
    macs: StoredCounts
    params: StoredCounts
    groups: dict[str, StoredGroup]
    tensors: dict[str, StoredTensor]
    attributes: dict[str, dict[str, Count]]
    kept_only: tuple[StoredKeptOnly, ...]
    frozen: dict[str, str]
    indices: dict[str, StoredIndex] = {}

    @model_validator(mode="after")
    def _can_be_proved(self) -> StoredPlan:
        if self.version > 1 and "example" not in self.about:
            raise ValueError("about.example is missing: what its network takes")
        return self

    @model_validator(mode="after")
    def _sizes_are_bounded(self) -> StoredPlan:
        total = sum(group.size for group in self.groups.values())
        total += sum(t.shape[d] for t in self.tensors.values() for d in t.kept)
        sides = [side for item in self.kept_only for side in (item.inputs, item.outputs)]
        total += sum(row[0] for side in sides for dims in side.values() for row in dims.values())
        if total > MOST_POSITIONS:
            raise ValueError(f"{total} positions, more than {MOST_POSITIONS}")
        return self
