"""What people pass to a network: example inputs, and batches as loaders give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import DataError, UsageError

IMAGE_KEYS = ("pixel_values", "images", "image", "img", "inputs", "input", "x", "data")
TARGET_KEYS = ("labels", "label", "targets", "target", "y", "masks", "mask", "cls", "class")
Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]  # or a shape
_EXPECTED = "images (B, C, H, W), (images, targets), or a dict like {'images': ..., 'labels': ...}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass, and the targets that belong to them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None

    def __len__(self) -> int:
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        nested = self.args[0] if self.args and isinstance(self.args[0], list) else None
        return len(nested) if nested else next(len(t) for t in leaves if _is_batched(t))

    def to(self, device: torch.device) -> Inputs:
        """Return the same on ``device``, in memory of its own that a network may write into."""

        def moved(value: Any) -> Any:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        return Inputs(*tree_map(moved, (self.args, dict(self.kwargs), self.target)))

    def split(self, size: int) -> Iterator[Inputs]:
        """Yield parts of ``size`` images; what is not one for each image goes to every part."""
        count = len(self)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            yield Inputs(
                tuple(_part(value, rows, count) for value in self.args),
                {name: _part(value, rows, count) for name, value in self.kwargs.items()},
                _part(self.target, rows, count),
            )


def copied(inputs: Any) -> Any:
    """Return inputs with copies of their tensors: a network may write into what it is given."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, inputs)


def example_of(given: Any) -> Any:
    """Return an example input; a shape, such as ``(1, 3, 224, 224)``, becomes random numbers.

    Raises:
        UsageError: it holds no tensor.
    """
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        if not given.numel():
            raise UsageError(
                f"the example input of shape {tuple(given.shape)} is empty",
                expected="an input for one image, (1, C, H, W)",
            )
        return given
    if isinstance(given, Sequence) and given and all(type(size) is int for size in given):
        return torch.randn(tuple(given), generator=torch.Generator().manual_seed(0))
    is_collection = isinstance(given, Mapping | tuple | list)
    found = tree_leaves(dict(given) if isinstance(given, Mapping) else given)
    if not is_collection or not any(isinstance(leaf, Tensor) for leaf in found):
        raise UsageError(
            f"the example input is a {type(given).__name__} without a tensor",
            expected="a tensor (1, C, H, W), its shape, or a tuple or dict of tensors",
        )
    return given


def call_inputs(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a call with ``example_input``.

    Raises:
        UsageError: it holds no tensor.
    """
    example_input = example_of(example_input)
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    return tuple(example_input), {}


def read_batches(batches: Any, example: Any = None) -> Iterator[Inputs]:
    """Yield each batch of ``batches`` as ``read_batch`` reads it; one tensor is one batch.

    Raises:
        UsageError: there is not one batch.
    """
    one = isinstance(batches, Tensor | np.ndarray | Mapping | Inputs)
    if not one and not isinstance(batches, Iterable):
        raise UsageError(
            f"batches is a {type(batches).__name__}", expected="a list of batches, or a loader"
        )
    batch = None
    for batch in [batches] if one else batches:
        yield read_batch(batch, example)
    if batch is None:
        raise UsageError("batches holds no images", fix="Give at least one batch")


def read_batch(batch: Any, example: Any = None) -> Inputs:
    """Return the arguments and targets that a batch holds.

    Read are images alone; (images, targets), where targets may be None; dicts such as
    ``{"pixel_values": ..., "labels": ...}``; and several inputs, with or without targets after
    them, for a network whose ``example`` input is a tuple or dict of several: it says how many, and
    their names.

    Raises:
        DataError: it does not say which parts are inputs.
    """
    if isinstance(batch, Inputs):
        return batch
    batch = _tensors(batch)
    names = list(example) if isinstance(example, Mapping) else None
    count = len(example) if isinstance(example, Mapping | tuple | list) else 1
    values, target = (batch,), None
    if isinstance(batch, Mapping):
        values, target = _of_mapping(batch, names, count)
    elif isinstance(batch, tuple | list) and batch:
        values, target = _of_sequence(batch, names, count)
    elif not isinstance(batch, Tensor):
        raise DataError(f"a batch is {_described(batch)}", expected=_EXPECTED)
    found = Inputs(values, {}, target)
    if names is not None:
        found = Inputs((), dict(zip(names, values, strict=False)), target)
    if len(found.args) + len(found.kwargs) != count:
        raise DataError(
            f"a batch holds {_described(batch)}, the network takes {count} inputs",
            expected=_EXPECTED,
        )
    if not any(_is_batched(leaf) for leaf in tree_leaves((found.args, dict(found.kwargs)))):
        raise DataError(f"a batch holds no images: {_described(batch)}", expected=_EXPECTED)
    return found


Parts = tuple[tuple[Any, ...], Any]  # inputs and targets


def _of_sequence(batch: Sequence[Any], names: list[str] | None, count: int) -> Parts:
    first, *rest = batch
    target = rest[0] if len(rest) == 1 else tuple(rest) or None
    if isinstance(first, Mapping):
        values, own = _of_mapping(first, names, count)
        return values, own if target is None else target
    if count == 1 or isinstance(first, tuple | list):
        return (first,) if count == 1 else tuple(first), target
    if len(batch) in (count, count + 1):
        return tuple(batch[:count]), batch[count] if len(batch) > count else None
    raise DataError(
        f"a batch holds {_described(batch)}, and the network takes {count} inputs",
        expected=f"{count} inputs, or those and the targets",
    )


def _of_mapping(batch: Mapping[str, Any], names: list[str] | None, count: int) -> Parts:
    taken = [name for name in names or IMAGE_KEYS if name in batch]
    if names is None:
        images = [name for name, value in batch.items() if _is_batched(value) and value.ndim > 2]
        taken = taken[:1] or images[:1] if count == 1 else images[:count]
    if len(taken) != count:
        raise DataError(
            f"a batch has the keys {', '.join(map(str, batch))}",
            expected=f"inputs called {', '.join(names or IMAGE_KEYS)}",
            fix="Give the example input as a dict: its keys are the names of the inputs",
        )
    rest = {name: value for name, value in batch.items() if name not in taken}
    known = next((name for name in TARGET_KEYS if name in rest), None)
    target = rest[known] if known is not None else rest or None
    if known is None and len(rest) == 1:
        target = next(iter(rest.values()))
    return tuple(batch[name] for name in taken), target


def _tensors(batch: Any) -> Any:
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch)
    if isinstance(batch, Mapping):
        return {name: _tensors(value) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_tensors(value) for value in batch]
    return batch


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _part(value: Any, rows: slice, count: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _part(each, rows, count) for name, each in value.items()}
    is_row = isinstance(value, list) or _is_batched(value)
    return value[rows] if is_row and len(value) == count else value


def _described(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor {tuple(thing.shape)}"
    if isinstance(thing, Mapping):
        return f"a dict of {', '.join(map(str, thing))}"
    if isinstance(thing, tuple | list):
        return f"{len(thing)} parts ({', '.join(type(each).__name__ for each in thing[:4])})"
    return f"a {type(thing).__name__}"
