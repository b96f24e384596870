"""The tracing modes: one eager forward during which every op passes its labels on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from compress.groups.calls import (
    SILENT,
    TAKERS,
    UNCOMPARED,
    WHOLE,
    FollowedCalls,
    WatchedOps,
    is_pointwise,
    op_name,
    scalars_in,
    tensors_in,
)
from compress.groups.forward import (
    NO_CALL,
    Call,
    Key,
    RawCall,
    Step,
    TraceRecord,
    here,
    program_place,
    rounds_numbers,
)
from compress.groups.labels import Axes, Axis, Constraints, Labels
from compress.groups.network import AttributeUse, Positions, Reduction
from compress.groups.traced_ints import Attribute, TracedDimension, TracedInt

Memory = tuple[int, tuple[int, ...]]
Loose = tuple[Labels, str]  # channels that a tensor is made of, or numbers, and how
_SHAPE = torch.Tensor.shape
_MOST_PARTS = 8  # of which a program takes a share by a rounded number

Rule = Callable[["Tracer", Call], None]
RULES: dict[str, Rule] = {}  # by op; what the modules in compress.groups.rules register


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the ops named.

    "pointwise" is that of pointwise ops without a rule of their own, "unknown" that of others.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


class Tracer(WatchedOps):
    """Runs every op on the meta device and lets its rule pass labels from inputs to outputs.

    ``named`` are the tensors of the model with their names and labels, ``distrusted`` ops whose
    channels must stay, and why ("": whose numbers are fixed), ``constants`` the values of buffers
    of whole numbers.
    """

    def __init__(
        self,
        constraints: Constraints,
        named: Sequence[tuple[Tensor, str, Axes]],
        distrusted: Mapping[Key, str],
        training: bool,
        on: torch.device | None,
        constants: Mapping[str, Positions],
    ) -> None:
        super().__init__(on)
        self._constants = constants
        self.constraints = constraints
        self.record = TraceRecord(training)
        self.raw: list[RawCall] = [NO_CALL]
        self._axes: dict[int, Axes] = {id(t): axes for t, _, axes in named}
        self._origin: dict[int, str] = {id(t): name for t, name, _ in named}
        self._own = dict(self._origin)
        self._fixed = {name for t, name, _ in named if not isinstance(t, nn.Parameter)}
        self._assigned: set[int] = set()  # parameters whose values the program replaced
        self._alive: list[Tensor] = [t for t, _, _ in named]
        self._known = set(self._own)
        self._aliases: dict[Memory, int] = {}  # where a labelled tensor lies -> its identity
        self._loose: dict[int, dict[int, Loose]] = {}  # storage -> by identity of the labels
        self._taken: list[Loose] = []  # channels that numbers which the program took are made of
        self._positions: dict[int, Loose] = {}  # storage of numbers of channels -> those channels
        for tensor, _, _ in named:
            self._register(tensor)
        self._places = {_memory(tensor): name for tensor, name, _ in named}
        self._distrusted = distrusted

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labels of each dimension of ``tensor``."""
        found = self._axes.get(self._identity(tensor))
        return found if found is not None else (None,) * tensor.ndim

    def _identity(self, tensor: Tensor) -> int:
        """Return what a tensor is known by: another object over the same memory is the same.

        ``as_subclass`` and ``nn.Parameter(x)`` make such objects without calling an op.
        """
        if id(tensor) in self._known or not self._aliases:
            return id(tensor)
        return self._aliases.get(_memory(tensor), id(tensor))

    def _register(self, tensor: Tensor) -> None:
        if any(axis is not None for axis in self._axes.get(id(tensor), ())):
            self._aliases[_memory(tensor)] = id(tensor)

    def label(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Give an output its labels."""
        self._axes[id(tensor)] = tuple(axes)

    def origin(self, tensor: Tensor) -> str | None:
        """Return the weight that ``tensor`` is, or was computed from alone; None otherwise."""
        return self._origin.get(self._identity(tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Say whether ``tensor`` is a buffer of the model, or was computed from buffers alone."""
        return self.origin(tensor) in self._fixed

    def is_own(self, tensor: Tensor) -> bool:
        """Say whether ``tensor`` is a parameter or buffer of the model itself."""
        own = self._identity(tensor)
        return own in self._own and own not in self._assigned

    def freeze(self, labels: Axis, why: str) -> None:
        """Keep channels for a reason that the user reads, with the line of their code."""
        self.constraints.freeze(labels, lambda: f"{why} at {here()}")

    def freeze_each(self, axes: Iterable[Axis], why: str) -> None:
        """Keep the channels of several axes, as ``freeze`` does."""
        for axis in axes:
            self.freeze(axis, why)

    def fixed(self, axes: Sequence[Axis], dims: Iterable[int], why: str) -> list[Axis]:
        """Keep the channels along ``dims``; return the labels without them."""
        left = list(axes)
        for d in dims:
            self.freeze(left[d], why)
            left[d] = None
        return left

    def freeze_output(self, tensor: Tensor, why: str) -> None:
        """Keep the channels that an output of the network has, is made of, or numbers."""
        for axis in self.axes(tensor):
            self.constraints.freeze(axis, why)
        storage = _memory(tensor)[0]
        for labels, reduced in self._loose.get(storage, {}).values():
            self.constraints.freeze(labels, f"{reduced}, and {why}")
        if storage in self._positions:
            self.constraints.freeze(*self._positions[storage])

    def freeze_taken(self, why: str) -> None:
        """Keep the channels that numbers are made of which the program took out of tensors."""
        for labels, reduced in self._taken:
            self.constraints.freeze(labels, f"{reduced}, and {why}")

    def reduced(self, call: Call, axes: Iterable[Axis]) -> None:
        """Note that the outputs are made of channels that they do not have.

        Where such an output reaches one of the network before a layer with weights takes it, the
        channels are the network's answer as much as if they had been returned.
        """
        why = f"{call.name} makes one number of its channels at {here()}"
        for out in call.outputs:
            held = self._loose.setdefault(_memory(out)[0], {})
            held.update({id(axis): (axis, why) for axis in axes if axis is not None})

    def positions(self, call: Call, numbers: Tensor, axis: Axis) -> None:
        """Note that ``numbers`` are numbers of channels: if anybody reads them, channels stay."""
        if axis is not None:
            why = f"{call.name} gives their numbers at {here()}"
            self._positions[_memory(numbers)[0]] = (axis, why)

    def _pass_on(self, call: Call, inputs: Sequence[Tensor]) -> None:
        if not self._loose and not self._positions:
            return
        storages = [_memory(tensor)[0] for tensor in inputs]
        if call.name not in SILENT:
            for storage in storages:
                if storage in self._positions:
                    self.constraints.freeze(*self._positions[storage])
        if call.is_weighted:
            return
        for held in [self._loose[s] for s in storages if s in self._loose]:
            if call.name == "_local_scalar_dense":
                self._taken.extend(held.values())
            for out in call.outputs:
                self._loose.setdefault(_memory(out)[0], {}).update(held)

    def unify(self, first: Axis, second: Axis, why: str) -> Axis:
        """Tie two axes of equal length together; where one cannot be cut the other cannot."""
        if first is None or second is None:
            self.freeze(first if second is None else second, why)
            return None
        self.constraints.unify(first, second)
        return first

    def tie(self, axes: Sequence[Axis], why: str) -> Axis:
        """Tie any number of axes together, as ``unify`` does two."""
        return functools.reduce(lambda a, b: self.unify(a, b, why), axes) if axes else None

    def use_attribute(self, count: TracedInt, labels: Labels) -> AttributeUse | None:
        """Return the fact that ``count`` must follow ``labels``; None unless it is an attribute."""
        if not isinstance(count.origin, Attribute) or count < 0:  # -1 is what is left over
            return None
        return AttributeUse(count.origin, labels, count.scale, here())

    def follow(self, count: TracedInt, labels: Labels) -> None:
        """Note that ``count``, where it is an attribute, must follow ``labels``."""
        use = self.use_attribute(count, labels)
        self.constraints.uses.extend([use] if use else [])

    def share(self, call: Call, size: int, *counts: int) -> int:
        """Return of how many equal parts of ``size`` plain numbers may count some; 0 if of none.

        In a program that rounds, they may follow from the width, as ``int(width / 2)`` does. The
        replay shows whether they do; if not, the op is met again with numbers that are fixed.
        """
        key = (call.name, *program_place())
        parts = size // math.gcd(size, *counts)
        if key in self._distrusted or not 1 < parts <= _MOST_PARTS or not rounds_numbers():
            return 0
        self.record.guessed.add(key)
        return parts

    def picked(self, axis: Axis, numbers: Tensor) -> Axis:
        """Return the labels of the channels that ``numbers`` picks; None if all must stay.

        A buffer of the model loses the numbers of channels that go, and counts the others anew.
        """
        (own,) = self.axes(numbers)
        name = self._places.get(_memory(numbers))  # other objects over it are it: Variable(buffer)
        values = self._constants.get(name or "")
        if axis is None or own is None or name is None or values is None or values.min() < 0:
            self.freeze_each((axis, own), "channels are taken by number")
            return None
        before = self.record.indexed.setdefault(name, axis)
        if len(before) != len(axis):
            self.freeze_each((axis, before), "one buffer numbers channels of two layers")
            return None
        self.constraints.unify(before, axis)
        self.constraints.unify(own, axis[values])
        return axis[values]

    def restrict(self, call: Call, *, mask_only: bool = False) -> None:
        """Note that the reference must compute this op on the kept channels only."""
        call.is_reduction, call.mask_only = True, mask_only

    def _reduction(self, call: Call) -> Reduction[Labels]:
        inputs, outputs = (
            {
                i: {d: axis for d, axis in enumerate(self.axes(each)) if axis is not None}
                for i, each in enumerate(tensors)
                if isinstance(each, Tensor)
            }
            for tensors in (call.args, call.outputs)
        )
        name = f"aten.{call.name}.whole" if call.name in WHOLE else str(call.func)
        occurrence = self.record.occurrences[call.name] - 1
        return Reduction(name, occurrence, inputs, outputs, call.mask_only)

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op, then its rule."""
        before = args
        if torch.Tag.inplace_view in func.tags:  # it reshapes its first argument, here as it was
            before = (args[0].detach(), *args[1:])
            self.label(before[0], self.axes(args[0]))
        result = self.run(func, args, kwargs)
        name = op_name(func)
        self._follow(Call(name, func, before, kwargs, (), self.raw[-1]), result)
        return result

    def whole(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call, then the rule that follows it as one op."""
        result = func(*args, **kwargs)
        self._follow(Call(name, func, args, kwargs, (), self.raw[-1]), result)
        return result

    def _follow(self, call: Call, result: Any) -> None:
        name, outputs = call.name, tuple(tensors_in(result))
        call.outputs = outputs
        inputs = list(tensors_in((*call.args, *call.kwargs.values())))
        self.record.occurrences[name] = self.record.occurrences.get(name, 0) + 1
        self._known.update(map(id, outputs))
        self._apply(call, inputs)
        self._pass_on(call, inputs)
        value = result if not outputs and not isinstance(result, Tensor | list | tuple) else None
        self._note(call, inputs, value)

    def assign(self, tensor: Tensor, values: Tensor) -> None:
        """Note that the program writes ``tensor.data = values``: its channels are theirs."""
        mine, theirs = self.axes(tensor), self.axes(values)
        if len(mine) == len(theirs) == tensor.ndim:
            why = "the program sets it from something fixed"
            self.label(tensor, [self.unify(a, b, why) for a, b in zip(mine, theirs, strict=True)])
        else:
            self.freeze_each((*mine, *theirs), "the program gives a tensor another shape")
            self.label(tensor, (None,) * tensor.ndim)
        self._assigned.add(id(tensor))

    def _apply(self, call: Call, inputs: list[Tensor]) -> None:
        if (rule := RULES.get(call.name)) is None:
            rule = RULES["pointwise" if is_pointwise(call.func) else "unknown"]
        rule(self, call)
        if call.is_reduction:
            self.record.reductions.append(self._reduction(call))
        for out in call.outputs:
            if len(self.axes(out)) != out.ndim:  # an op without a rule reshaped it in place
                self.label(out, (None,) * out.ndim)
        why = self._distrusted and self._distrusted.get((call.name, *program_place()))
        for tensor in (*inputs, *call.outputs) if why else ():
            for axis in self.axes(tensor):
                self.constraints.freeze(axis, str(why))

    def _note(self, call: Call, inputs: list[Tensor], value: Any) -> None:
        for out in call.outputs:
            self._register(out)
        origins = [self.origin(t) for t in inputs if t.ndim]
        for tensor in inputs:
            if (own := self._own.get(self._identity(tensor))) is not None:
                self.record.touched.setdefault(own)
        if origins and all(origins):
            largest = max((t for t in inputs if t.ndim), key=Tensor.numel)
            for out in call.outputs:
                self._origin.setdefault(id(out), str(self.origin(largest)))
        self._alive.extend(call.outputs)
        self._alive.extend(inputs)
        if call.name in UNCOMPARED:
            return
        self.record.steps.append(
            Step(
                call.name,
                tuple((tuple(out.shape), self.axes(out)) for out in call.outputs),
                scalars_in(call.name, call.args, call.kwargs),
                tuple(self.axes(t) for t in inputs),
                program_place(),
                value,
            )
        )


def _memory(tensor: Tensor) -> Memory:
    """Return where a tensor lies: its storage, then offset, shape and strides."""
    with torch._C.DisableTorchFunction():  # ops such as set_ come here without a call
        if tensor.layout != torch.strided:
            return id(tensor), ()
        shape = (tensor.storage_offset(), *tensor.size(), *tensor.stride())
        return tensor.untyped_storage()._cdata, shape


class CallWatcher(FollowedCalls):
    """Remembers the program's own calls for the rules, and turns shapes into TracedInts."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self._tracer = tracer

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the program."""
        if getattr(func, "__self__", None) is _SHAPE:
            return torch.Size(self._shape(args[0]))
        if func is torch.Tensor.size:
            return self._size(*args, **kwargs)
        raw = self._tracer.raw
        raw.append(RawCall(func, args, kwargs))
        try:
            result = super().call(func, args, kwargs)
        finally:
            raw.pop()
        if (name := getattr(func, "__name__", "")) in TAKERS:
            self._tracer.freeze_each(self._tracer.axes(args[0]), "the program takes its values")
            self._tracer.record.taken.append(result)
        elif name == "__set__" and func.__self__ is torch.Tensor.data:
            self._tracer.assign(args[0], args[1])
        return result

    def _shape(self, tensor: Tensor) -> Iterator[int]:
        for size, axis in zip(tensor.size(), self._tracer.axes(tensor), strict=True):
            if axis is None:
                yield size
            else:
                counted_by = functools.partial(self._tracer.follow, labels=axis)
                yield TracedInt(size, TracedDimension(axis, counted_by))

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        sizes = tuple(self._shape(tensor))
        return torch.Size(sizes) if dim is None else sizes[dim]
