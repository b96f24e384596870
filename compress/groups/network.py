"""What tracing finds: groups of channels that are cut together, layers with their cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

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
    free in 1..size (whatever must stay equal elsewhere is inside one unit already); ``multiple``
    is what a kept count must be a multiple of.
    """

    name: str  # the layer that makes the channels first, "#2" and so on if it makes several groups
    size: int
    slices: tuple[Slice, ...]
    multiple: int = 1

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

    weight: str  # name in the state dict
    shape: tuple[int, ...]
    macs_per_element: int
    output_dim: int  # dimension of ``weight`` that holds the filters
    input_dim: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole layer for one image."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.macs_per_element


@dataclass(frozen=True)
class Network:
    """A traced network: what can be cut, what cannot and why, and what each layer costs."""

    groups: tuple[Group, ...]  # in the order of execution
    layers: Mapping[str, Layer]  # by name of the weight
    frozen: Mapping[str, str]  # layer -> why its outputs stay, with the line of the user's code
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor of the state dict
    parameters: frozenset[str] = field(default_factory=frozenset)  # names that count as parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the network for one image."""
        return sum(layer.macs for layer in self.layers.values())

    @property
    def params(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(int(np.prod(self.shapes[name], dtype=np.int64)) for name in self.parameters)

    def group(self, name: str) -> Group:
        """Return the group called ``name``; KeyError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
