"""Normalizations, reductions and softmax: ops that look across positions.

Where they look across channels that can be cut, the pruned network computes over the kept ones
only; that is another function than zeroing channels, and the masked reference does the same.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor

from compress.groups.forward import Call
from compress.groups.labels import Axis
from compress.groups.tracer import Tracer, rule


@rule(
    "native_batch_norm batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _batch_norm_no_update _batch_norm_with_update"
)
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Every vector follows the channels; statistics of the batch reduce over all else."""
    x, training = call.args[0], "no_training" not in call.name and call.args[5]
    axes = list(tracer.axes(x))
    for axis in _vectors(tracer, call.args[1:5]):
        axes[1] = tracer.unify(axes[1], axis, "a normalization ties it to fixed statistics")
    tracer.label(call.outputs[0], axes)
    for out in call.outputs[1:]:
        tracer.label(out, (axes[1],) if out.shape == x.shape[1:2] else (None,) * out.ndim)
    if training and any(axis is not None for i, axis in enumerate(axes) if i != 1):
        tracer.restrict(call)


@rule("native_layer_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """Weight and bias follow the normalized dimensions."""
    x, shape = call.args[0], call.args[1]
    axes = list(tracer.axes(x))
    start = x.ndim - len(shape)
    for vector in call.args[2:4]:
        if isinstance(vector, Tensor):
            for i, axis in enumerate(tracer.axes(vector)):
                if x.shape[start + i] > 1:
                    why = "a normalization ties it to fixed weights"
                    axes[start + i] = tracer.unify(axes[start + i], axis, why)
    tracer.label(call.outputs[0], axes)
    for out in call.outputs[1:]:
        tracer.label(out, [*axes[:start], *(None,) * (out.ndim - start)])
    if any(axis is not None for axis in axes[start:]):
        tracer.restrict(call)


@rule("native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """The same positions of every group are tied; the number of groups stays."""
    x, groups = call.args[0], call.args[6]
    batch, channels, *space = tracer.axes(x)
    for axis in _vectors(tracer, call.args[1:3]):
        channels = tracer.unify(channels, axis, "a normalization ties it to fixed weights")
    if channels is not None:
        if groups == len(channels) and groups > 1:
            tracer.freeze(channels, "a group normalization has one channel in each group")
        tracer.constraints.tie(channels.reshape(groups, -1))
        tracer.restrict(call)
    tracer.label(call.outputs[0], (batch, channels, *space))


def _vectors(tracer: Tracer, given: Iterable[Any]) -> Iterator[Axis]:
    """Yield the labels of the vectors of a normalization that there are."""
    return (tracer.axes(vector)[0] for vector in given if isinstance(vector, Tensor))


@rule(
    "mean sum var std var_mean std_mean amax amin max min prod any all logsumexp norm "
    "linalg_vector_norm nansum"
)
def reduction(tracer: Tracer, call: Call) -> None:
    """Reduced dimensions go (or have size one); where they could be cut the reference is told."""
    _label_reduced(tracer, call, _reduced(call, call.args[0]))


@rule("quantile nanquantile")
def quantile(tracer: Tracer, call: Call) -> None:
    """A quantile looks across a dimension as a mean does."""
    x, dim, share = call.args[0], call.raw.argument(2, "dim"), call.raw.argument(1, "q")
    dims = set(range(x.ndim)) if dim is None else {dim % x.ndim}
    _label_reduced(tracer, call, dims, leading=int(isinstance(share, Tensor) and share.ndim))


def _label_reduced(tracer: Tracer, call: Call, dims: set[int], leading: int = 0) -> None:
    """Label the outputs of a reduction over ``dims``, with ``leading`` dimensions before."""
    x = call.args[0]
    axes = tracer.axes(x)
    if any(axes[d] is not None for d in dims):
        tracer.restrict(call)
        tracer.reduced(call, [axes[d] for d in dims])
    if len(call.outputs) == 2 and call.name in {"max", "min"} and dims:
        tracer.positions(call, call.outputs[1], axes[next(iter(dims))])
    _label_without(tracer, call, dims, leading)


def _label_without(tracer: Tracer, call: Call, dims: Container[int], leading: int = 0) -> None:
    """Label the outputs of an op that takes ``dims`` away, or leaves positions without names."""
    x = call.args[0]
    axes = [None if d in dims else axis for d, axis in enumerate(tracer.axes(x))]
    left = [axis for d, axis in enumerate(axes) if d not in dims]
    for out in call.outputs:
        is_kept = out.ndim == x.ndim + leading
        tracer.label(out, [*(None,) * leading, *(axes if is_kept else left)])


def _reduced(call: Call, x: Tensor) -> set[int]:
    if x.ndim == 0:
        return set()
    position = 2 if call.name in {"linalg_vector_norm", "norm"} else 1
    given = call.kwargs.get("dim", call.argument(position))
    if isinstance(given, bool) or given is None or given == []:
        return set(range(x.ndim))
    dims = given if isinstance(given, list | tuple) else [given]
    return {d % x.ndim for d in dims}


@rule("_softmax _log_softmax _safe_softmax softmax cumsum cumprod")
def along(tracer: Tracer, call: Call) -> None:
    """Softmax and cumulative sums: shape and labels stay, values mix along one dimension."""
    x, dim = call.args[0], call.args[1]
    axes = tracer.axes(x)
    tracer.label(call.outputs[0], axes)
    if axes[dim % x.ndim] is not None:
        tracer.restrict(call)


@rule("topk sort argsort argmax argmin kthvalue mode")
def ordering(tracer: Tracer, call: Call) -> None:
    """Sorting and picking by value: positions along the dimension lose their names."""
    x = call.args[0]
    at = 2 if call.name in {"topk", "kthvalue"} else 1
    default = None if call.name in {"argmax", "argmin", "median", "nanmedian"} else -1
    dim = call.kwargs.get("dim", call.argument(at, default))
    dims = range(x.ndim) if dim is None else (dim % max(x.ndim, 1),)
    axes = tracer.axes(x)
    tracer.freeze_each((axes[d] for d in dims), f"{call.name} picks channels by their value")
    _label_without(tracer, call, dims)


@rule("median nanmedian")
def median(tracer: Tracer, call: Call) -> None:
    """The median of all values looks across everything, as a mean does; along one it picks."""
    (reduction if len(call.args) == 1 else ordering)(tracer, call)


@rule("_weight_norm_interface _weight_norm")
def weight_norm(tracer: Tracer, call: Call) -> None:
    """``g * v / |v|``: the norm is over every dimension but one."""
    v, g, dim = call.args[0], call.args[1], call.argument(2, 0)
    axes: list[Axis] = list(tracer.axes(v))
    if g.ndim and v.shape[dim] > 1:
        at = dim if g.ndim == v.ndim else 0
        axes[dim] = tracer.unify(axes[dim], tracer.axes(g)[at], "its weight norm is fixed")
    tracer.label(call.outputs[0], axes)
    for out in call.outputs[1:]:
        tracer.label(out, [axes[dim] if i == dim else None for i in range(out.ndim)])
    tracer.restrict(call)
