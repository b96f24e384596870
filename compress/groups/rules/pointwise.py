"""Pointwise ops: positions that are combined are cut together."""

from __future__ import annotations

from torch import Tensor

from compress.groups.labels import Axis
from compress.groups.meta_ops import tensors_in, words
from compress.groups.record import Call
from compress.groups.tracer import Rule, Tracer


def pointwise(tracer: Tracer, call: Call) -> None:
    """Broadcast the labels of all operands; operands of one size along a dimension are tied."""
    operands = [t for t in tensors_in((*call.args, *call.kwargs.values())) if t.ndim]
    for out in call.outputs:
        if len(operands) == 1 and operands[0].shape == out.shape:
            tracer.label(out, tracer.axes(operands[0]))
        else:
            tracer.label(out, broadcast(tracer, call, operands, out))


def broadcast(tracer: Tracer, call: Call, operands: list[Tensor], out: Tensor) -> list[Axis]:
    """Return the labels of ``out`` whose shape is the operands' broadcast shape."""
    axes: list[Axis] = []
    rows = [(t.shape, tracer.axes(t), t.ndim - out.ndim) for t in operands]
    for dim, size in enumerate(out.shape):
        axis: Axis = None
        first = True
        for shape, labels, offset in rows:
            at = dim + offset
            if size == 1 or at < 0 or shape[at] != size:
                continue
            mine = labels[at]
            if first:
                axis, first = mine, False
            elif mine is not axis:
                axis = tracer.unify(axis, mine, _fixed(call))
        axes.append(axis)
    return axes


def _fixed(call: Call) -> str:
    return f"{call.name} joins it with channels that are fixed"


def same(tracer: Tracer, call: Call) -> None:
    """Outputs have the labels of the first operand."""
    first = call.args[0]
    for out in call.outputs:
        if out is not first and out.shape == first.shape:
            tracer.label(out, tracer.axes(first))


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(
        words(
            "hardswish _prelu_kernel prelu copy lerp where masked_fill clamp clamp_min "
            "clamp_max dropout feature_dropout gelu rrelu addcmul addcdiv maximum minimum sub "
            "rsub"
        ),
        pointwise,
    ),
    **dict.fromkeys(
        words(
            "detach alias clone contiguous _to_copy lift_fresh lift native_dropout empty_like "
            "zeros_like ones_like full_like rand_like randn_like bernoulli uniform normal "
            "fill zero random rrelu_with_noise _local_scalar_dense exponential alpha_dropout"
        ),
        same,
    ),
}
