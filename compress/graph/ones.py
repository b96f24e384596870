"""Reshapes that move dimensions of 1 alone: no change, or transposes by another name."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from compress.graph.values import EditableGraph, maker

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
Picked = Sequence[int | None]  # of each dimension that is made: the one that is read; None: a 1


def drop_reshapes(graph: EditableGraph) -> None:
    """Let what reads a tensor whose shape changed, and changed back, read it as it was.

    A pool, a Squeeze and a Reshape to one pixel again keep runtimes from one kernel for all of it.
    A target that begins with -1 or with a number of images hides the batch.
    """
    for node in graph.of_type(*_RESHAPES):
        made, source, picked = node.outputs[0], node.inputs[0], _picked(node)
        while picked is not None and source is not None and not made.is_graph_output():
            if _is_whole(picked, source):
                graph.replace(made, source)
                break
            before = maker(source)
            inner = _picked(before)
            picked = inner and [None if axis is None else inner[axis] for axis in picked]
            source = before.inputs[0] if before is not None else None
    graph.sweep()


def write_as_transposes(graph: EditableGraph) -> int:
    """Write (B, 1, 1, C) to (B, C, 1, 1) and the like as Transpose; return how many."""
    count = 0
    for node in list(graph.of_type(*_RESHAPES)):
        picked, source = _picked(node), node.inputs[0]
        if picked is None or source is None or source.shape is None or not picked:
            continue
        ones = (axis for axis in range(source.shape.rank()) if axis not in picked)
        if len(picked) == source.shape.rank():
            order = [next(ones) if axis is None else axis for axis in picked]
            graph.substitute(node, "Transpose", [source], perm=order)
            count += 1
    return count


def _picked(node: ir.Node | None) -> Picked | None:
    """Return which dimensions ``node`` hands on, in order, if it changes those of 1 alone."""
    if node is None or node.op_type not in _RESHAPES or node.domain not in ("", "ai.onnx"):
        return None
    given, result = node.inputs[0], node.outputs[0]
    if given is None or given.shape is None or result.shape is None:
        return None
    read, made = given.shape, result.shape
    kept, left = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (read, made))
    pairs = [(read[old], made[new]) for old, new in zip(kept, left, strict=False)]
    known = [pair for pair in pairs if all(isinstance(size, int) and size for size in pair)]
    free = [pair for pair in pairs if not any(isinstance(size, int) for size in pair)]
    # As many numbers are made as are read: one size that is not known is the same in both.
    is_told = len(free) <= 1 and len(known) + len(free) == len(kept) == len(left)
    if not is_told or any(old != new for old, new in known):
        return None
    origin = dict(zip(left, kept, strict=True))
    return [origin.get(axis) for axis in range(len(made))]


def _is_whole(picked: Picked, source: ir.Value) -> bool:
    """Return whether these dimensions are all of ``source``, as they were."""
    shape = source.shape
    return (
        shape is not None
        and len(picked) == len(shape)
        and all(
            axis == place or (axis is None and shape[place] == 1)
            for place, axis in enumerate(picked)
        )
    )
