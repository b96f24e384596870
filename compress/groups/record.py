"""What tracing notes of a forward pass: its ops, and what rules are told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.groups.labels import Axis, Labels
from compress.groups.places import Place

Axes = tuple[Axis, ...]
Key = tuple[str, str, int]  # an op and its place


@dataclass(frozen=True)
class RawCall:
    """A call as the program wrote it, before PyTorch turned it into ops, TracedInts and all."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the function's own name: ``view``, ``chunk``, ``__getitem__``."""
        return str(getattr(self.function, "__name__", ""))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


NO_CALL = RawCall(None, (), {})


@dataclass(frozen=True)
class Step:
    """What one op did in the traced forward; a replay is compared with it."""

    name: str
    outputs: tuple[tuple[tuple[int, ...], Axes], ...]  # shape and labels of each output
    scalars: tuple[float, ...]
    inputs: tuple[Axes, ...]
    place: Place
    value: Any = None  # a number the op gave instead of tensors

    @property
    def key(self) -> Key:
        """Return the op and the line of the program it came from."""
        return (self.name, *self.place)


@dataclass(frozen=True)
class Restricted:
    """An op across channels that can be cut: the masked reference computes it on kept ones only."""

    op: str
    occurrence: int  # among the calls of this op in one forward
    inputs: tuple[tuple[int, Axes], ...]  # position of a tensor argument, its labels
    outputs: tuple[Axes, ...]
    mask_only: bool  # zero the first operand instead of leaving positions out


@dataclass(frozen=True)
class Use:
    """One matrix product or convolution with a weight: what the layer's cost is made of."""

    weight: str
    macs: int  # of the whole batch
    output: Axis
    input: Axis


@dataclass
class Call:
    """One op on its way through the rules."""

    name: str
    func: Any  # the op; the program's function where a call is followed as a whole
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    raw: RawCall

    def argument(self, position: int, default: Any = None) -> Any:
        """Return the positional argument, or ``default`` where the op got fewer."""
        return self.args[position] if position < len(self.args) else default


@dataclass
class TraceRecord:
    """Everything one forward left behind."""

    steps: list[Step] = field(default_factory=list)
    restricted: list[Restricted] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    taken: list[Any] = field(default_factory=list)  # values that the program took out, in order
    touched: dict[str, None] = field(default_factory=dict)  # tensors of the model, in order of use
    indexed: dict[str, Labels] = field(default_factory=dict)  # buffer -> channels it picks from
    occurrences: dict[str, int] = field(default_factory=dict)
