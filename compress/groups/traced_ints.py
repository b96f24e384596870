"""Integers that remember where they came from: an attribute of a module, or a traced shape.

Python code often hard-codes channel counts (``split(x, [8, 8])``, ``view(b, self.groups, ...)``).
While a network is traced its integer attributes and the shapes of its tensors are replaced by
``TracedInt``: an int that computes like any other and keeps its origin through arithmetic, so that
a rule can tell a constant from a number that follows the shape or that the surgery can rewrite.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

from compress.modules import closed_over, with_closure


@dataclass(frozen=True)
class Attribute:
    """An integer kept by a module: ``name`` may be ``a``, ``a.0`` (item) or ``a.<n>`` (closure)."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class TracedDimension:
    """The size of a traced dimension; it follows the cut by itself."""

    labels: np.ndarray[Any, np.dtype[np.int32]]
    counted_by: Callable[[TracedInt], None]  # told of attributes that the program finds equal to it


Origin = Attribute | TracedDimension
_ONE = Fraction(1)


class TracedInt(int):
    """An int with an origin: ``self == scale x origin``, or a sum of such terms.

    ``origin`` is None for a sum of several, and for numbers computed in another way, whose
    ``terms`` are empty.
    """

    origin: Origin | None
    scale: Fraction
    terms: Mapping[Origin, Fraction]

    def __new__(cls, value: int, origin: Origin | None, scale: Fraction = _ONE) -> TracedInt:
        """Return ``value`` with its origin."""
        return cls._sum(value, {} if origin is None else {origin: scale})

    @classmethod
    def _sum(cls, value: int, terms: Mapping[Origin, Fraction]) -> TracedInt:
        count = super().__new__(cls, value)
        count.terms = terms
        count.origin, count.scale = next(iter(terms.items())) if len(terms) == 1 else (None, _ONE)
        return count

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def _mixed(self, value: Any) -> Any:
        return TracedInt(value, None) if isinstance(value, int) else value

    def _plus(self, value: Any, other: Any, sign: int) -> Any:
        if type(other) is int and other == 0:
            return self
        if not isinstance(other, TracedInt) or not self.terms or not other.terms:
            return self._mixed(value)
        terms = dict(self.terms)
        for origin, scale in other.terms.items():
            terms[origin] = terms.get(origin, Fraction(0)) + sign * scale
        return TracedInt._sum(value, {origin: scale for origin, scale in terms.items() if scale})

    def __mul__(self, other: Any) -> Any:
        value = int.__mul__(self, other)
        if type(other) is int and self.origin is not None and other:
            return TracedInt(value, self.origin, self.scale * other)
        return self._mixed(value)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int.__floordiv__(self, other)
        if self.origin is not None and isinstance(other, int) and value * int(other) == self:
            return TracedInt(value, self.origin, self.scale / int(other))
        return self._mixed(value)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._mixed(int.__rfloordiv__(self, other))

    def __add__(self, other: Any) -> Any:
        return self._plus(int.__add__(self, other), other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._plus(int.__sub__(self, other), other, -1)

    def __rsub__(self, other: Any) -> Any:
        return self._mixed(int.__rsub__(self, other))

    def __eq__(self, other: object) -> bool:
        self._meet(other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self._meet(other)
        return int.__ne__(self, other)

    __hash__ = int.__hash__

    def _meet(self, other: object) -> None:
        """Tell a size of the attribute that it is compared with and equals, and is to equal."""
        if not isinstance(other, TracedInt) or not int.__eq__(self, other):
            return
        for size, count in ((self, other), (other, self)):
            if isinstance(size.origin, TracedDimension) and isinstance(count.origin, Attribute):
                whole, scale = len(size.origin.labels), count.scale / size.scale
                size.origin.counted_by(TracedInt(whole, count.origin, scale))

    def __neg__(self) -> TracedInt:
        return TracedInt(int.__neg__(self), self.origin, -self.scale)


_OWN = {"groups", "in_channels", "out_channels", "in_features", "out_features"} | {
    "num_features",
    "num_groups",
    "normalized_shape",
}


def tag_attributes(model: nn.Module) -> None:
    """Replace, in place, the integers that the modules of ``model`` keep by TracedInts.

    Plain ints, items of lists and tuples of ints, and variables that a function kept by a module
    closes over. Of PyTorch's own modules only what programs read from outside is tagged.
    """
    for path, module in model.named_modules():
        own = type(module).__module__.startswith("torch.nn.")
        for name, value in list(module.__dict__.items()):
            if name.startswith("_") or name == "training" or (own and name not in _OWN):
                continue
            module.__dict__[name] = _tagged(value, Attribute(path, name))


def _tagged(value: Any, at: Attribute) -> Any:
    if type(value) is int:
        return TracedInt(value, at)
    if type(value) in {list, tuple} and value and all(type(item) is int for item in value):
        items = [
            TracedInt(item, Attribute(at.module, f"{at.name}.{i}")) for i, item in enumerate(value)
        ]
        return type(value)(items)
    if isinstance(value, types.FunctionType) and value.__closure__:
        return with_closure(
            value,
            lambda name, inner: (
                TracedInt(inner, Attribute(at.module, f"{at.name}.<{name}>"))
                if type(inner) is int
                else inner
            ),
        )
    return value


def read_attribute(module: nn.Module, name: str) -> int | None:
    """Return the integer that an Attribute's name stands for; None where it stands for none."""
    head, _, rest = name.partition(".")
    value = module.__dict__.get(head)
    if head.startswith("_") or head == "training":
        return None
    if rest.startswith("<") and isinstance(value, types.FunctionType):
        value = dict(closed_over(value)).get(rest[1:-1])
    elif rest.isdecimal() and isinstance(value, list | tuple) and int(rest) < len(value):
        value = value[int(rest)]
    elif rest:
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def write_attribute(module: nn.Module, name: str, new: int) -> None:
    """Set the integer that an Attribute's name stands for; lists and functions are copied first."""
    head, _, rest = name.partition(".")
    if not rest:
        setattr(module, head, new)
        return
    value = getattr(module, head)
    if rest.startswith("<"):
        variable = rest[1:-1]
        value = with_closure(value, lambda n, inner: new if n == variable else inner)
    else:
        items = list(value)
        items[int(rest)] = new
        value = type(value)(items)
    setattr(module, head, value)
