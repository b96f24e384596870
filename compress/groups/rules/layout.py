"""Views: the same values under another shape or order of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from compress.groups.forward import Call
from compress.groups.labels import Axes, Axis, Labels
from compress.groups.traced_ints import Attribute, TracedInt
from compress.groups.tracer import Tracer, rule

_AUTOMATIC = -1  # the size follows from the shape: nothing in the program fixes it
_SIZED = {"view", "reshape", "unflatten", "_reshape_alias"}


@rule("permute")
def permute(tracer: Tracer, call: Call) -> None:
    """Dimensions in another order."""
    axes = tracer.axes(call.args[0])
    tracer.label(call.outputs[0], [axes[d] for d in call.args[1]])


@rule("transpose t swapaxes")
def transpose(tracer: Tracer, call: Call) -> None:
    """Two dimensions change places."""
    axes = list(tracer.axes(call.args[0]))
    first, second = call.argument(1, 0), call.argument(2, 1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    tracer.label(call.outputs[0], axes)


@rule("unsqueeze")
def insert_dimension(tracer: Tracer, call: Call) -> None:
    """A dimension of size one more."""
    out = call.outputs[0]
    axes = list(tracer.axes(call.args[0]))
    axes.insert(call.args[1] % out.ndim, None)
    tracer.label(out, axes)


@rule("squeeze")
def drop_dimension(tracer: Tracer, call: Call) -> None:
    """Dimensions of size one less."""
    x, out = call.args[0], call.outputs[0]
    dims = call.argument(1)
    chosen = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % x.ndim for d in chosen if x.ndim and x.shape[d] == 1}
    tracer.label(out, [a for d, a in enumerate(tracer.axes(x)) if d not in gone])


@rule("view reshape _reshape_alias unflatten")
def view(tracer: Tracer, call: Call) -> None:
    """Dimensions split and merged: each block of dimensions with equal products on its own."""
    x, out = call.args[0], call.outputs[0]
    axes = tracer.axes(x)
    sizes = _program_sizes(call, out)
    result: list[Axis] = [None] * out.ndim
    if any(axis is not None for axis in axes):
        for before, after in blocks(tuple(x.shape), tuple(out.shape)):
            _view_block(tracer, call, (x, axes, before), (out, result, after), sizes)
        tracer.label(out, result)
    for axis, size in zip(result, sizes, strict=True):
        if axis is None and size > 1:
            _stays(tracer, size)


def _stays(tracer: Tracer, size: int) -> None:
    """Note that a size in the program is that of a dimension which cannot be cut."""
    if not isinstance(size, TracedInt):
        return
    if isinstance(size.origin, Attribute):
        tracer.follow(size, np.zeros(size, np.int32))
    elif size.origin is not None:
        tracer.freeze(size.origin.labels, "a view of fixed channels has their number")


def _program_sizes(call: Call, out: Tensor) -> Sequence[int]:
    """Return the size of each output dimension as the program gave it; -1 if it did not."""
    raw = call.raw
    if raw.name not in _SIZED:
        return (_AUTOMATIC,) * out.ndim
    given = raw.sizes(2 if raw.name == "unflatten" else 1)
    if raw.name == "unflatten":
        start = raw.argument(1, "dim", 0) % call.args[0].ndim
        rest = out.ndim - start - len(given)
        given = (*(_AUTOMATIC,) * start, *given, *(_AUTOMATIC,) * rest)
    return given if len(given) == out.ndim else (_AUTOMATIC,) * out.ndim


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Return matching runs of dimensions of two shapes with equal products, as short as can be."""
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            elif j < len(after):
                right, j = right * after[j], j + 1
            else:
                left, i = left * before[i], i + 1
            if left == right and (left > 1 or (i == len(before) and j == len(after))):
                break
        found.append((range(start_i, i), range(start_j, j)))
    return found


def _view_block(
    tracer: Tracer,
    call: Call,
    source: tuple[Tensor, Axes, range],
    target: tuple[Tensor, list[Axis], range],
    sizes: Sequence[int],
) -> None:
    x, axes, before = source
    out, result, after = target
    labelled = [d for d in before if axes[d] is not None]
    if not labelled:
        return
    wide = [d for d in after if out.shape[d] > 1]
    if len(labelled) > 1 or not wide:
        why = "a view merges it with another dimension that can be cut"
        tracer.freeze_each((axes[d] for d in labelled), why)
        return
    labels = axes[labelled[0]]
    if labels is None:
        return
    row = labels.reshape([-1 if d == labelled[0] else 1 for d in before])
    grid = np.broadcast_to(row, [x.shape[d] for d in before]).reshape([out.shape[d] for d in wide])
    given = [sizes[d] for d in wide]
    plain = max((n for n in given if type(n) is int and n > 1), default=1)
    if len(labels) % plain == 0 and plain > 1 and tracer.share(call, len(labels), plain):
        given = [_AUTOMATIC if n == plain and type(n) is int else n for n in given]
    at = _carrier(grid, given)
    if at is None:
        tracer.freeze(labels, "a view has the number of channels written in the program")
        return
    carried = np.moveaxis(grid, at, 0).reshape(grid.shape[at], -1)
    if carried.shape[1] > 1 and (carried != carried[:, :1]).any():
        tracer.constraints.tie(carried.T)
    result[wide[at]] = first = np.ascontiguousarray(carried[:, 0])
    follow(tracer, sizes[wide[at]], first, labels)


def _carrier(grid: Labels, sizes: Sequence[int]) -> int | None:
    """Return the dimension of ``grid`` along which channels are cut.

    The first of: the only one; one across which nothing new is tied; one whose size follows the
    shape; one whose size is an attribute that can be rewritten. None if all sizes are constants.
    """
    free = [d for d, size in enumerate(sizes) if isinstance(size, TracedInt) or size == _AUTOMATIC]
    if not free:
        return None
    for d in free:
        moved = np.moveaxis(grid, d, 0).reshape(grid.shape[d], -1)
        if (moved == moved[:, :1]).all():
            return d
    follows = [d for d in free if not isinstance(getattr(sizes[d], "origin", None), Attribute)]
    return max(follows or free, key=lambda d: grid.shape[d])


def follow(tracer: Tracer, size: Any, labels: Labels, source: Axis = None) -> None:
    """Note what a size in the program demands of the channels it counts.

    An attribute must be rewritten with them. The shape of another tensor changes by itself, so
    the channels must be cut where that tensor's are: n positions of it for each of these, the
    same in each of n parts, as in ``view(b, heads, c // heads)``. The shape of ``source``, which
    these channels are a part of, demands nothing more.
    """
    if not isinstance(size, TracedInt):
        return
    if size.origin is None:
        _follow_difference(tracer, size, labels)
        return
    if isinstance(size.origin, Attribute):
        tracer.follow(size, labels)
        return
    other = size.origin.labels
    if other is source:
        return
    if len(other) == len(labels):
        tracer.constraints.count_alike(other, labels)
    elif len(other) % len(labels) == 0:
        tracer.constraints.unify(other, np.tile(labels, len(other) // len(labels)))
    elif len(labels) % len(other) == 0:
        tracer.constraints.unify(np.tile(other, len(labels) // len(other)), labels)


def _follow_difference(tracer: Tracer, size: TracedInt, labels: Labels) -> None:
    """``self.a - self.b``: a counts these channels and those that b counts elsewhere."""
    rows, lead = [labels], None
    known = {use.attribute: use.counted for use in tracer.constraints.uses if use.scale == 1}
    for origin, scale in size.terms.items():
        if scale == 1 and lead is None and isinstance(origin, Attribute):
            lead = origin
        elif scale == -1 and isinstance(origin, Attribute) and origin in known:
            rows.append(known[origin])
        else:
            return  # the replay finds out whether the number follows
    if lead is not None:
        follow(tracer, TracedInt(sum(map(len, rows)), lead), np.concatenate(rows))


@rule("as_strided")
def as_strided(tracer: Tracer, call: Call) -> None:
    """The same shape with other strides; anything else is unknown."""
    x, out = call.args[0], call.outputs[0]
    if out.shape == x.shape and (len(call.args) < 4 or not call.args[3]):
        tracer.label(out, tracer.axes(x))
        return
    tracer.freeze_each(tracer.axes(x), "as_strided addresses memory directly")


@rule("expand")
def expand(tracer: Tracer, call: Call) -> None:
    """Size-one dimensions repeated: new channels, all alike, if the program's size can follow."""
    x, out = call.args[0], call.outputs[0]
    given = _repeated(call, out)
    axes: list[Axis] = [None] * out.ndim
    offset = out.ndim - x.ndim
    for dim, size in enumerate(out.shape):
        old = x.shape[dim - offset] if dim >= offset else 1
        if old == size:
            axes[dim] = tracer.axes(x)[dim - offset] if dim >= offset else None
        else:
            axes[dim] = copies(tracer, given[dim], size)
    tracer.label(out, axes)


def _repeated(call: Call, out: Tensor) -> Sequence[int]:
    raw = call.raw
    if raw.name == "expand_as":
        return [TracedInt(size, None) for size in out.shape]
    if raw.name not in {"expand", "repeat", "tile", "broadcast_to"}:
        return tuple(out.shape)
    given = raw.sizes(1)
    return given if len(given) == out.ndim else tuple(out.shape)


def copies(tracer: Tracer, size: int, count: int) -> Axis:
    """Return labels for ``count`` equal positions, None if the program's ``size`` is a constant."""
    if not isinstance(size, TracedInt) or count == 1:
        return None
    labels = tracer.constraints.fresh(count)
    follow(tracer, size, labels)
    return labels


@rule("repeat")
def repeat(tracer: Tracer, call: Call) -> None:
    """Dimensions tiled: each copy of a channel goes with it."""
    x, out = call.args[0], call.outputs[0]
    given = _repeated(call, out)
    axes: list[Axis] = []
    offset = out.ndim - x.ndim
    for dim, times in enumerate(call.args[1]):
        old = tracer.axes(x)[dim - offset] if dim >= offset else None
        if old is not None:
            axes.append(old if times == 1 else np.tile(old, times))
        elif dim >= offset and x.shape[dim - offset] > 1:
            axes.append(None)
        else:
            axes.append(copies(tracer, given[dim], out.shape[dim]))
    tracer.label(out, axes)


@rule("repeat_interleave")
def repeat_interleave(tracer: Tracer, call: Call) -> None:
    """Each channel several times in a row."""
    x, out = call.args[0], call.outputs[0]
    axes: list[Axis] = list(tracer.axes(x))
    times, dim = call.args[1], call.kwargs.get("dim", call.argument(2))
    if isinstance(times, int) and dim is not None:
        axis = axes[dim]
        axes[dim] = None if axis is None else np.repeat(axis, times)
        tracer.label(out, axes)
    else:
        tracer.freeze_each(axes, "repeat_interleave with a tensor of counts")
