"""What a network returns, read in one way everywhere: the tensors inside, whatever holds them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ModelError, UsageError
from compress.modules import evaluating

Leaf = TypeVar("Leaf")

_PLAIN = (
    numbers.Number, str, bytes, type(None), np.ndarray, np.generic, enum.Enum, type,
    types.ModuleType, torch.dtype, torch.device, torch.Size, torch.layout,
)  # fmt: skip
_INTERNAL = ("__dict__", "__weakref__")
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


def leaves(output: Any) -> list[tuple[str, Any]]:
    """Return every tensor, number, array and text that ``output`` holds, with its place in it.

    Tensors are found in sequences, mappings, dataclasses, objects with attributes, iterators
    (which this consumes: call it once, where the network runs) and closures. Places read like
    ``logits``, ``1`` or ``boxes.0``; that of a bare tensor is empty.

    Raises:
        ModelError: it holds an object that cannot be looked into.
    """
    return list(_walk(output, "", {}))


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors that ``output`` holds with their places: the main one, then the others.

    The main one is what is called ``logits``, else the first one of floating-point numbers that is
    no scalar. Outputs of ONNX files and sessions are in this order, too.
    """
    found = [(place, leaf) for place, leaf in leaves(output) if isinstance(leaf, Tensor)]
    numbers = [one for one in found if one[1].ndim and one[1].is_floating_point()]
    named = [one for one in numbers if one[0] == "logits"]
    main = next(iter((*named, *numbers)), None)
    return found if main is None else [main, *(one for one in found if one is not main)]


def returned(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Return the tensors that ``model`` gives for an example in eval mode, by their places."""
    with evaluating(model), torch.no_grad():
        return dict(named_tensors(model(example)))


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors that ``output`` holds: the main one, then the others in their order."""
    return [tensor for _, tensor in named_tensors(output)]


def chosen_outputs(
    found: Sequence[tuple[str, Leaf]], outputs: Sequence[str] | None, *, where: str = ""
) -> list[tuple[str, Leaf]]:
    """Return those of ``found``, places with what is there, that ``outputs`` name: all if None.

    ``1`` stands for ``1.boxes`` and ``1.feats.0`` as well.

    Raises:
        UsageError: a name is no place; the message lists all.
    """
    if outputs is None:
        return list(found)
    for name in outputs:
        if not any(_is_at(place, name) for place, _ in found):
            known = [
                f"{place or '0'} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else place
                for place, leaf in found
            ]
            raise UsageError(
                f"the network has no output {name!r}",
                where=where,
                expected=f"one of: {', '.join(known) or 'none'}",
            )
    return [(place, leaf) for place, leaf in found if any(_is_at(place, n) for n in outputs)]


def as_places(outputs: Iterable[str | int] | str | int | None) -> tuple[str, ...] | None:
    """Return places of outputs as texts, whether one or several are given."""
    several = (outputs,) if isinstance(outputs, str | int) else outputs
    return None if several is None else tuple(map(str, several))


def _is_at(place: str, name: str) -> bool:
    place = place or "0"  # the one tensor of a network that returns no more
    return place == name or place.startswith(f"{name}.")


def heads_of(output: Any) -> list[Tensor]:
    """Return the main output of a network, then auxiliary ones of its shape.

    Raises:
        ModelError: the network returns no floating-point tensor.
    """
    found = tensors_of(output)
    main = found[0] if found else None
    if main is None or not main.is_floating_point():
        raise ModelError(
            f"the network returns {_kind(output)} that holds no tensor of numbers",
            expected="a tensor, or a tuple, dict or object that holds one",
        )
    extra = (tensor for tensor in found[1:] if tensor.is_floating_point())
    return [main, *(tensor for tensor in extra if tensor.shape == main.shape)]


def logits_of(output: Any) -> Tensor:
    """Return the main output of a network, as ``heads_of`` finds it."""
    return heads_of(output)[0]


def _walk(value: Any, place: str, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:  # one tensor in the guise of another
            yield from _walk(getattr(value, name), _join(place, name), seen)
        return
    if isinstance(value, (Tensor, *_PLAIN)):
        yield place, value
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # alive, so that no identity is used twice
    for name, part in _parts(value, place):
        yield from _walk(part, _join(place, name), seen)


def _parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, by names."""
    if isinstance(value, torch.nn.Module):
        yield from value.state_dict(keep_vars=True).items()
        return
    if isinstance(value, _FUNCTIONS):
        yield from _captured(value)
        return
    items, attributes = _items(value), _attributes(value)
    if items is None and not attributes and not hasattr(value, "__dict__"):
        raise ModelError(
            f"the network returns an object of type {_kind(value)}, which cannot be looked into",
            where=f"output {place}" if place else "",
            expected="tensors, in tuples, lists, dicts, dataclasses or objects with attributes",
            fix="Wrap the network in a module that returns the tensors themselves",
        )
    items = items or []
    yield from items
    held = {id(part) for _, part in items}
    yield from ((name, part) for name, part in attributes if id(part) not in held)


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a collection holds, by key, field or position; None if it is no collection."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, Iterable):
        parts = list(value)
        names = getattr(value, "_fields", None) or [str(number) for number in range(len(parts))]
        return list(zip(names, parts, strict=True))
    return None


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return the attributes of an object: of its ``__dict__``, its slots and its fields."""
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    names = [name for row in slots for name in ((row,) if isinstance(row, str) else row)]
    names += [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    return [(name, part) for name, part in found.items() if name not in _INTERNAL]


def _captured(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function holds on to: closed-over variables, defaults, bound arguments."""
    if isinstance(function, functools.partial):
        yield from (("func", function.func), ("args", function.args), ("kw", function.keywords))
        return
    owner = getattr(function, "__self__", None)
    yield "self", owner
    inner = getattr(function, "__func__", function)
    yield "defaults", getattr(inner, "__defaults__", None)
    names = getattr(getattr(inner, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(inner, "__closure__", None) or (), strict=True):
        yield name, cell.cell_contents


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
