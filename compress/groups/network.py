"""What tracing finds: groups of channels that are cut together, layers with their cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from compress.groups.traced_ints import Attribute

T = TypeVar("T")
U = TypeVar("U")
Positions = npt.NDArray[np.int64]
Role = Literal["output", "input", "channel"]


@dataclass(frozen=True)
class Slice:
    """Where the units of one group lie in one tensor.

    ``index[c]`` are the positions along ``dim`` that go when unit ``c`` goes. The role says what
    they are there: ``output`` filters of a producer, ``input`` columns of a consumer, ``channel``
    entries of a per-channel vector (batch normalization, bias, layer scale) or buffer.
    """

    tensor: str  # name in the state dict
    dim: int
    index: Positions  # (C, k)
    role: Role


@dataclass(frozen=True)
class Group:
    """``size`` units; each can be cut, alone, with everything that depends on it.

    Units are in the order of the channels of the first layer that makes them. Kept counts are
    free in 1..size: whatever must stay equal elsewhere is inside one unit already.
    """

    name: str  # the layer that makes the channels first, "#2" and so on if it makes several groups
    size: int
    slices: tuple[Slice, ...]

    @property
    def width(self) -> int:
        """Channels of the first producer that one unit stands for."""
        return next(int(s.index.shape[1]) for s in self.slices if s.role == "output")


@dataclass(frozen=True)
class Layer:
    """A weight that costs multiply-accumulates: a convolution's or a matrix product's.

    MACs of the layer = number of weight elements x ``macs_per_element``, for a batch of one, with
    the uses of a shared weight summed.
    """

    shape: tuple[int, ...]  # of the weight
    macs_per_element: int
    output_dim: int  # dimension that holds the filters
    input_dim: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole layer for one image."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.macs_per_element


@dataclass(frozen=True)
class AttributeUse:
    """The program reads an attribute where ``scale`` x it must equal the kept of some channels."""

    attribute: Attribute
    counted: npt.NDArray[Any]  # (P,) labels of channels; then units over all groups, -1: it stays
    scale: Fraction
    place: str  # in the program

    @property
    def why_fixed(self) -> str:
        """Why other channels that the attribute counts must stay if this use fixes it."""
        at = f"{self.attribute.module}.{self.attribute.name}".lstrip(".")
        return f"{at} fixes other channels too, at {self.place}"


@dataclass(frozen=True)
class KeptIndex:
    """A buffer whose values are numbers of channels, some of which are cut."""

    values: Positions  # before the cut, at all its positions
    kept: Positions  # the channels that stay: value v becomes the rank of v among them

    def after(self) -> Positions:
        """Return the values in the pruned network, at all positions; 0 for channels that go."""
        new = np.zeros(max(int(self.values.max()), int(self.kept.max())) + 1, np.int64)
        new[self.kept] = np.arange(len(self.kept))
        return np.asarray(new[self.values])


@dataclass(frozen=True)
class Reduction(Generic[T]):
    """An op that looks across channels which can be cut: it sees the kept ones only.

    ``inputs`` maps the position of a tensor argument to {dimension: what is known of it}: labels,
    then units, then what is kept; ``outputs`` that of an output. With ``mask_only`` the inputs are
    zeroed at cut positions, else they are left out. With ``numbers`` it is given a number that the
    program computes from channel counts: the masked reference gives it the pruned network's.
    """

    op: str
    occurrence: int  # which call of this op in one forward, counted from 0
    inputs: Mapping[int, Mapping[int, T]]
    outputs: Mapping[int, Mapping[int, T]]
    mask_only: bool = False
    numbers: bool = False

    def map(self, change: Callable[[T], U | None]) -> Reduction[U]:
        """Return it with ``change`` of all that is known; without dimensions where that is None."""

        def changed(sides: Mapping[int, Mapping[int, T]]) -> dict[int, dict[int, U]]:
            found = {
                i: {d: new for d, row in dims.items() if (new := change(row)) is not None}
                for i, dims in sides.items()
            }
            return {i: dims for i, dims in found.items() if dims}

        sides = changed(self.inputs), changed(self.outputs)
        return Reduction(self.op, self.occurrence, *sides, self.mask_only, self.numbers)


@dataclass(frozen=True)
class Network:
    """A traced network: what can be cut, what cannot and why, and what each layer costs."""

    groups: tuple[Group, ...]  # in the order of execution
    layers: Mapping[str, Layer]  # by name of the weight
    frozen: Mapping[str, str]  # layer -> why its outputs stay, with the line of the user's code
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor of the state dict
    parameters: frozenset[str]  # names of ``shapes`` that count as parameters
    followers: tuple[AttributeUse, ...] = ()  # attributes that the surgery sets
    reductions: tuple[Reduction[Positions], ...] = ()
    side_outputs: tuple[str, ...] = ()  # attributes that the forward leaves cut channels on
    # Buffers that pick channels: the unit of each channel they may pick, -1: it stays; their values
    indices: Mapping[str, tuple[Positions, Positions]] = field(default_factory=dict)

    def kept_units(self, keep: Mapping[str, Positions]) -> npt.NDArray[np.bool_]:
        """Return, for the units of all groups in a row, which are kept, (sum of sizes,)."""
        units = [(np.arange(group.size), group.name) for group in self.groups]
        rows = [np.isin(every, keep.get(name, every)) for every, name in units]
        return np.concatenate([np.zeros(0, bool), *rows])

    def kept_positions(self, keep: Mapping[str, Positions]) -> dict[str, dict[int, Positions]]:
        """Return, for every tensor and dimension that loses something, the positions that stay."""
        stays: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        for group in self.groups:
            gone = np.ones(group.size, bool)
            gone[keep.get(group.name, slice(None))] = False
            if not gone.any():
                continue
            for part in group.slices:
                key = (part.tensor, part.dim)
                if key not in stays:
                    stays[key] = np.ones(self.shapes[part.tensor][part.dim], bool)
                stays[key][part.index[gone].ravel()] = False
        kept: dict[str, dict[int, Positions]] = {}
        for (tensor, dim), mask in stays.items():
            kept.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
        return kept

    @functools.cached_property
    def owned(self) -> dict[tuple[str, int], dict[int, int]]:
        """Tensor and dimension -> positions that each group, by number, owns for each unit."""
        found: dict[tuple[str, int], dict[int, int]] = {}
        for number, group in enumerate(self.groups):
            for piece in group.slices:
                owned = found.setdefault((piece.tensor, piece.dim), {})
                owned[number] = owned.get(number, 0) + piece.index.shape[1]
        return found

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the network for one image."""
        return sum(layer.macs for layer in self.layers.values())

    @property
    def params(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(int(np.prod(self.shapes[name], dtype=np.int64)) for name in self.parameters)


def stays_at(units: Positions, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which positions stay: those of kept units, and those of none (-1)."""
    return np.append(kept, True)[units]
