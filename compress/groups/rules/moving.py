"""Concatenation, splitting, slicing, indexing and tensors made in the forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.groups.forward import Call
from compress.groups.labels import Axis, Labels
from compress.groups.rules.layout import copies, follow
from compress.groups.traced_ints import TracedDimension, TracedInt
from compress.groups.tracer import Tracer, rule

_CONSTANT = "has channel counts written in the program"
_BY_NUMBER = "channels are taken by number"


@rule("cat concat")
def cat(tracer: Tracer, call: Call) -> None:
    """Channels one after another; other dimensions are tied."""
    tensors = [t for t in call.args[0] if t.ndim > 1 or t.numel()]
    out = call.outputs[0]
    dim = call.argument(1, 0) % out.ndim
    rows = [tracer.axes(t) for t in tensors]
    axes: list[Axis] = []
    for d in range(out.ndim):
        if d != dim:
            axes.append(tracer.tie([row[d] for row in rows], "cat lines it up with a fixed one"))
        elif all(row[d] is None for row in rows):
            axes.append(None)
        else:
            fixed = [np.zeros(t.shape[d], np.int32) for t in tensors]
            pairs = zip((row[d] for row in rows), fixed, strict=True)
            axes.append(np.concatenate([stays if a is None else a for a, stays in pairs]))
    tracer.label(out, axes)


@rule("stack")
def stack(tracer: Tracer, call: Call) -> None:
    """A new dimension; all others are tied."""
    out = call.outputs[0]
    rows = [tracer.axes(t) for t in call.args[0]]
    why = "stack lines it up with a fixed one"
    axes = [tracer.tie(column, why) for column in zip(*rows, strict=True)]
    axes.insert(call.argument(1, 0) % out.ndim, None)
    tracer.label(out, axes)


@rule("split unsafe_split")
def equal_parts(tracer: Tracer, call: Call) -> None:
    """Parts of one size, the last perhaps shorter: the positions that all have are tied.

    So they stay equally long and, of ``chunk``, as many, where what the last lacks stays.
    """
    x, dim = call.args[0], call.argument(2, 0)
    axis = tracer.axes(x)[dim]
    if axis is not None:
        size = call.args[1]
        is_counted = call.raw.name in {"chunk", "tensor_split"}
        given = size if is_counted else call.raw.argument(1, "split_size")
        fixed = given is not None and not isinstance(given, TracedInt) and call.raw.name == "split"
        last = len(axis) % size
        rows = axis[: len(axis) - last].reshape(-1, size)
        if fixed and tracer.share(call, len(axis), size):
            tracer.constraints.tie(rows)
        elif fixed:
            tracer.freeze(axis, f"split {_CONSTANT}")
        elif not last:
            tracer.constraints.tie(rows)
            follow(tracer, given, rows[0], axis)
        else:
            is_full = call.raw.name == "chunk" and call.raw.argument(1, "chunks") == len(rows) + 1
            common = last if is_full else 0
            tracer.freeze(rows[:, common:].ravel(), "it is split into unequal parts")
            if is_full:
                tracer.constraints.tie(np.vstack([rows[:, :last], axis[-last:]]))
            else:
                tracer.freeze(axis[-last:], "it is split into unequal parts")
    _parts(tracer, call, dim)


@rule("split_with_sizes unsafe_split_with_sizes")
def split_with_sizes(tracer: Tracer, call: Call) -> None:
    """Parts of given sizes: free where the program's numbers can follow, else fixed."""
    x, sizes, dim = call.args[0], call.args[1], call.argument(2, 0)
    axis = tracer.axes(x)[dim]
    if axis is not None:
        given = call.raw.argument(1, "split_size_or_sections") or call.raw.kwargs.get("split_size")
        given = given if isinstance(given, Sequence) and len(given) == len(sizes) else sizes
        starts = np.cumsum([0, *sizes])
        parts = [axis[a:b] for a, b in itertools.pairwise(starts)]
        halves = [g for g in given if isinstance(g, TracedInt) and _of(g, axis)]
        if halves and len(set(sizes)) == 1:
            for part in parts[1:]:
                tracer.constraints.unify(part, parts[0])
        is_plain = any(not isinstance(count, TracedInt) for count in given)
        if is_plain and (shares := tracer.share(call, len(axis), *sizes)):
            _couple(tracer, axis, shares)
            parts = []
        pairs = zip(parts, given, strict=bool(parts))
        for part, count in sorted(
            pairs, key=lambda pair: isinstance(pair[1], TracedInt) and pair[1].origin is None
        ):
            if not isinstance(count, TracedInt) or (count in halves and len(set(sizes)) > 1):
                tracer.freeze(part, f"split {_CONSTANT}")
            else:
                follow(tracer, count, part, axis)
    _parts(tracer, call, dim)


def _of(count: TracedInt, axis: Labels) -> bool:
    return isinstance(count.origin, TracedDimension) and count.origin.labels is axis


def _parts(tracer: Tracer, call: Call, dim: int) -> None:
    axes = list(tracer.axes(call.args[0]))
    axis, start = axes[dim], 0
    for out in call.outputs:
        if axis is not None:
            axes[dim] = axis[start : start + out.shape[dim]]
            start += out.shape[dim]
        tracer.label(out, axes)


@rule("slice narrow")
def slicing(tracer: Tracer, call: Call) -> None:
    """``x[:, a:b:s]``: positions before a bound keep their number, or the bound follows."""
    x, out = call.args[0], call.outputs[0]
    dim = call.argument(1, 0) % x.ndim
    axes = list(tracer.axes(x))
    axis = axes[dim]
    if axis is not None:
        size, step = len(axis), call.argument(4, 1)
        start, stop, _ = slice(call.argument(2), call.argument(3)).indices(size)
        given = _bounds(call, dim, x.ndim)
        if given is None and call.raw.name == "tensor_split":
            _couple(tracer, axis, size // max(out.shape[dim], 1))
        else:
            for bound, value in zip(given or (None, None), (start, stop), strict=True):
                if 0 < value < size and not (step > 1 and value == start < step):
                    _bound(tracer, call, axis, value, bound)
        if step > 1 and (start >= step or stop < size or size % step):
            tracer.freeze(axis, f"a slice takes one in {step} channels")
        elif step > 1:
            tracer.constraints.tie(axis.reshape(-1, step).T)
        axes[dim] = axis[start:stop:step]
    tracer.label(out, axes)


def _bounds(call: Call, dim: int, ndim: int) -> tuple[Any, Any] | None:
    """Return start and stop of a slice as the program wrote them."""
    raw = call.raw
    if raw.name == "narrow":
        start, length = raw.argument(2, "start"), raw.argument(3, "length")
        return start, length if start == 0 else start + length
    if raw.name not in {"__getitem__", "__setitem__"} or len(raw.args) < 2:
        return None
    index = raw.args[1] if isinstance(raw.args[1], tuple) else (raw.args[1],)
    used = [i for i in index if i is not None and i is not Ellipsis]
    position = 0
    for item in index:
        if item is Ellipsis:
            position += raw.args[0].ndim - len(used)
        elif item is not None:
            # Integers before this slice were applied already and took their dimensions along.
            shift = raw.args[0].ndim - ndim
            if position - shift == dim and isinstance(item, slice):
                return item.start, item.stop
            position += 1
    return None


def _bound(tracer: Tracer, call: Call, axis: Labels, value: int, given: Any) -> None:
    if type(given) is int and (shares := tracer.share(call, len(axis), value)):
        _couple(tracer, axis, shares)
    elif not isinstance(given, TracedInt):
        negative = isinstance(given, int) and given < 0
        tracer.freeze(axis[value:] if negative else axis[:value], f"a slice {_CONSTANT}")
    elif _of(given, axis) and given.scale not in {0, 1}:
        _couple(tracer, axis, given.scale.denominator)
    else:
        follow(tracer, given, axis[value:] if given < 0 else axis[:value], axis)


def _couple(tracer: Tracer, axis: Labels, parts: int) -> None:
    """Tie the same positions of ``parts`` equal parts."""
    if parts < 2 or len(axis) % parts:
        tracer.freeze(axis, "it is sliced into unequal parts")
    else:
        tracer.constraints.tie(axis.reshape(parts, -1))


@rule("unfold")
def windows(tracer: Tracer, call: Call) -> None:
    """Windows along one dimension, each laid out in a new last one."""
    axes = tracer.fixed(tracer.axes(call.args[0]), [call.args[1]], "windows slide along it")
    tracer.label(call.outputs[0], [*axes, None])


@rule("select unbind")
def select_index(tracer: Tracer, call: Call) -> None:
    """One position of a dimension, or each on its own: that dimension must stay as it is."""
    x, dim = call.args[0], call.argument(1, 0)
    axes = list(tracer.axes(x))
    tracer.freeze(axes[dim], f"{call.name} takes channels by number")
    del axes[dim]
    for out in call.outputs:
        tracer.label(out, axes)


@rule("index_select")
def index_select(tracer: Tracer, call: Call) -> None:
    """Positions by a tensor of numbers: that dimension must stay, or the numbers follow."""
    x, dim, numbers = call.args[:3]
    axes = list(tracer.axes(x))
    if numbers.ndim == 1:
        axes[dim] = tracer.picked(axes[dim], numbers)
    else:
        axes = tracer.fixed(axes, [dim], _BY_NUMBER)
    tracer.label(call.outputs[0], axes)


@rule("index")
def index(tracer: Tracer, call: Call) -> None:
    """Advanced indexing: indexed dimensions must stay, the others go on where that is simple."""
    x, indices = call.args[0], call.args[1]
    out = call.outputs[0]
    axes = list(tracer.axes(x))
    used = [d for d, i in enumerate(indices) if i is not None]
    simple = len(used) == 1 and indices[used[0]].ndim == 1 and out.ndim == x.ndim
    if simple and indices[used[0]].dtype not in {torch.bool, torch.uint8}:
        axes[used[0]] = tracer.picked(axes[used[0]], indices[used[0]])
        tracer.label(out, axes)
        return
    for d in used:
        tracer.freeze_each(tracer.axes(indices[d]), "it is used as an index")
    tracer.freeze_each((axes[d] for d in used), _BY_NUMBER)
    left = [axis for d, axis in enumerate(axes) if d not in used]
    at = used[0] if used[-1] - used[0] < len(used) else 0  # the front, if they are not neighbours
    if any(indices[d].dtype in {torch.bool, torch.uint8} and indices[d].ndim > 1 for d in used):
        tracer.freeze_each(axes, "it is indexed by a mask")
    else:
        tracer.label(out, [*left[:at], *(None,) * (out.ndim - len(left)), *left[at:]])


@rule("gather")
def gathered(tracer: Tracer, call: Call) -> None:
    """Positions along one dimension by numbers; the others are those of the numbers."""
    x, dim, numbers = call.args[:3]
    dim = dim % max(x.ndim, 1)
    rows, picked = tracer.axes(x), list(tracer.axes(numbers))
    for d, axis in enumerate(rows):
        if d == dim or x.shape[d] != numbers.shape[d]:
            tracer.freeze_each((axis, picked[d]), _BY_NUMBER)
            picked[d] = None
        else:
            picked[d] = tracer.unify(axis, picked[d], "gather lines it up with fixed numbers")
    tracer.label(call.outputs[0], picked)


@rule("diagonal")
def diagonal(tracer: Tracer, call: Call) -> None:
    """Equal positions of two dimensions, in a new last one: both dimensions are tied."""
    x, (out,) = call.args[0], call.outputs
    axes, dims = list(tracer.axes(x)), [call.argument(2, 0) % x.ndim, call.argument(3, 1) % x.ndim]
    first, second = (axes[d] for d in dims)
    kept = None
    if call.argument(1, 0) == 0 and x.shape[dims[0]] == x.shape[dims[1]]:
        kept = tracer.unify(first, second, "a diagonal lines it up with something fixed")
    else:
        tracer.freeze_each((first, second), "a diagonal takes a part of it")
    tracer.label(out, [*(axis for d, axis in enumerate(axes) if d not in dims), kept])


@rule("slice_scatter")
def slice_written(tracer: Tracer, call: Call) -> None:
    """A tensor of which a slice is replaced: what is written has the channels of that slice."""
    x, part = call.args[:2]
    dim = call.argument(2, 0) % x.ndim
    axes, given = list(tracer.axes(x)), list(tracer.axes(part))
    step = call.argument(5, 1)
    start, stop, _ = slice(call.argument(3), call.argument(4)).indices(x.shape[dim])
    axis, why = axes[dim], "it is written over channels that are fixed"
    if axis is not None:
        bounds = call.raw.argument(3, "start"), call.raw.argument(4, "end")
        for bound, value in zip(bounds, (start, stop), strict=True):
            if 0 < value < len(axis):
                _bound(tracer, call, axis, value, bound)
        if step > 1:
            tracer.freeze(axis, f"a slice takes one in {step} channels")
    for d, own in enumerate(axes):
        written = own if own is None or d != dim else own[start:stop:step]
        both = tracer.unify(written, given[d], why)
        axes[d] = own if d == dim else both
    tracer.label(call.outputs[0], axes)


@rule("select_scatter")
def position_written(tracer: Tracer, call: Call) -> None:
    """A tensor of which one position is replaced: its dimension stays, the others are tied."""
    x, part, dim = call.args[:3]
    _written(tracer, call, [dim % x.ndim], list(tracer.axes(part)))


@rule("index_add index_copy index_fill index_reduce")
def rows_written(tracer: Tracer, call: Call) -> None:
    """Rows that are replaced by number: their dimension stays, the others are tied."""
    dim, given = call.args[1] % call.args[0].ndim, call.args[3]
    rows = list(tracer.axes(given)) if isinstance(given, Tensor) and given.ndim else None
    if rows is not None:
        tracer.freeze(rows.pop(dim), _BY_NUMBER)
    tracer.freeze_each(tracer.axes(call.args[2]), _BY_NUMBER)
    _written(tracer, call, [dim], rows)


def _written(tracer: Tracer, call: Call, dims: Sequence[int], given: list[Axis] | None) -> None:
    """Label an output: the first operand's channels, those along ``dims`` are fixed.

    ``given`` are the labels, along the others, of what is written; None where it is one number.
    """
    axes = tracer.fixed(tracer.axes(call.args[0]), dims, _BY_NUMBER)
    others = [d for d in range(len(axes)) if d not in dims]
    for d, axis in zip(others, given or (), strict=False):
        axes[d] = tracer.unify(axes[d], axis, "it is written over channels that are fixed")
    tracer.label(call.outputs[0], axes)


@rule("scatter scatter_add scatter_reduce")
def scattered(tracer: Tracer, call: Call) -> None:
    """Values that go to numbered places along one dimension; all else is lined up with them."""
    x, dim, numbers = call.args[0], call.args[1] % max(call.args[0].ndim, 1), call.args[2]
    values = call.argument(3, call.kwargs.get("src"))
    tensors = [x, numbers, *([values] if isinstance(values, Tensor) and values.ndim else [])]
    rows, axes = [tracer.axes(each) for each in tensors], list(tracer.axes(x))
    for d in range(x.ndim):
        column = [row[d] for row in rows]
        if d == dim or len({each.shape[d] for each in tensors}) > 1:
            tracer.freeze_each(column, _BY_NUMBER)
            axes[d] = None
        else:
            axes[d] = tracer.tie(column, "scatter lines it up with fixed numbers")
    tracer.label(call.outputs[0], axes)


@rule("index_put")
def put(tracer: Tracer, call: Call) -> None:
    """``x[numbers] = values``: like ``index``; ``x[mask] = number`` is pointwise."""
    x, indices, values = call.args[:3]
    used = [d for d, each in enumerate(indices) if each is not None]
    masks = [indices[d] for d in used if indices[d].dtype in {torch.bool, torch.uint8}]
    if masks and len(used) == 1 and masks[0].ndim == x.ndim and values.numel() == 1:
        pairs = zip(tracer.axes(x), tracer.axes(masks[0]), strict=True)
        why = "a mask of something fixed says where it is written"
        tracer.label(call.outputs[0], [tracer.unify(*pair, why) for pair in pairs])
        return
    for each in (indices[d] for d in used):
        tracer.freeze_each(tracer.axes(each), "it is used as an index")
    if masks or len(used) > 1 or indices[used[0]].ndim != 1:
        tracer.freeze_each((*tracer.axes(x), *tracer.axes(values)), "it is written by number")
        tracer.label(call.outputs[0], (None,) * x.ndim)
        return
    given: list[Axis] = [*(None,) * (x.ndim - values.ndim), *tracer.axes(values)]
    tracer.freeze(given.pop(used[0]), _BY_NUMBER)
    wide = [False] * (x.ndim - values.ndim) + [size > 1 for size in values.shape]
    del wide[used[0]]
    own = [axis for d, axis in enumerate(tracer.axes(x)) if d not in used]
    _written(tracer, call, used, [g if w else o for g, w, o in zip(given, wide, own, strict=True)])


@rule("zeros ones full empty rand randn new_zeros new_ones new_full new_empty")
def made(tracer: Tracer, call: Call) -> None:
    """Zeros, ones and the like: channels that can be cut if the program's size can follow."""
    out = call.outputs[0]
    if call.raw.name in {"feature_dropout", "feature_alpha_dropout", "pad"}:
        # noise for each channel, or room for a circular padding: its size is the input's
        axes = tracer.axes(call.raw.args[0])
        sizes = zip(axes, call.raw.args[0].shape, out.shape, strict=True)
        tracer.label(out, [axis if size == now > 1 else None for axis, size, now in sizes])
        return
    given = call.raw.args[1 if call.name.startswith("new_") else 0 :]
    given = given or (call.raw.kwargs.get("size"),)
    if len(given) >= 1 and isinstance(given[0], Sequence):
        given = tuple(given[0])
    if len(given) < out.ndim or call.name.removeprefix("new_") not in call.raw.name:
        return
    tracer.label(out, [copies(tracer, given[d], size) for d, size in enumerate(out.shape)])


@rule("flip")
def flip(tracer: Tracer, call: Call) -> None:
    """Positions in reverse order."""
    axes = list(tracer.axes(call.args[0]))
    for d in call.args[1]:
        axis = axes[d]
        axes[d] = None if axis is None else np.ascontiguousarray(axis[::-1])
    tracer.label(call.outputs[0], axes)


@rule(
    "arange linspace eye scalar_tensor randint randperm empty_strided numel sym_size new_tensor "
    "as_tensor tensor"
)
def nothing(tracer: Tracer, call: Call) -> None:
    """Outputs carry no channels."""
