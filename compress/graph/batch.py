"""Which dimension of an input or output is the batch: the first, unless sizes say another.

The state of a recurrent network is (layers, batch, width) beside an input of (batch, samples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from compress.graph.shapes import real_inputs

Shape = Sequence[int | str | None]  # None, or free_1 of dimension 1: free, without a name


def leading(shapes: Mapping[str, Shape | None]) -> str:
    """Return the input that begins with the batch, if one does; the first if none is known to.

    It is free there, or of its size all others have some dimension.
    """
    known = {name: shape for name, shape in shapes.items() if shape}
    large = {name: shape for name, shape in known.items() if len(shape) > 1}
    free = (name for name, shape in known.items() if not isinstance(shape[0], int))
    fits = (name for name, own in large.items() if all(own[0] in each for each in large.values()))
    return next((name for names in (free, fits, large) for name in names), next(iter(shapes), ""))


def batch_axis(shape: Shape | None, first: Shape | None) -> int:
    """Return which dimension of ``shape`` is the batch, with which ``first`` begins.

    It has the same name or size, or it alone is free; 0 where no other dimension is alone in this.
    """
    if not shape or not first or shape[0] == first[0]:
        return 0
    batch = first[0]
    if isinstance(batch, int):
        found = [axis for axis, size in enumerate(shape) if size == batch]
    elif batch in _named(first) and batch in _named(shape):
        found = [shape.index(batch)]
    elif isinstance(shape[0], int):
        others = _named(first)  # height or width, as a grid of positions has them
        free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        found = [axis for axis in free if shape[axis] not in others]
    else:
        return 0
    return found[0] if len(found) == 1 else 0


def input_axes(shapes: Mapping[str, Shape | None]) -> dict[str, int]:
    """Return which dimension of each input is the batch, of those that do not begin with it."""
    first = shapes.get(leading(shapes))
    found = {name: batch_axis(shape, first) for name, shape in shapes.items()}
    return {name: axis for name, axis in found.items() if axis}


def graph_axes(model: onnx.ModelProto) -> dict[str, int]:
    """Return which dimension of inputs and outputs is the batch, where it is not the first."""
    shapes = {value.name: _shape_of(value) for value in real_inputs(model)}
    first = shapes.get(leading(shapes))
    outputs = {value.name: batch_axis(_shape_of(value), first) for value in model.graph.output}
    return input_axes(shapes) | {name: axis for name, axis in outputs.items() if axis}


def _named(shape: Shape) -> set[int | str | None]:
    """Return the names of free dimensions that a file gives, not we."""
    return {
        size for axis, size in enumerate(shape) if isinstance(size, str) and size != f"free_{axis}"
    }


def _shape_of(value: onnx.ValueInfoProto) -> Shape | None:
    """Return the sizes of a tensor as the file says them; None where it says nothing."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in kind.shape.dim]
