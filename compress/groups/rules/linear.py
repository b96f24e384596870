"""Convolutions and matrix products: the ops that make channels and consume them."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from compress.groups.counts import Attribute, Count
from compress.groups.labels import Alternative, Axis, Labels
from compress.groups.tracer import Call, Rule, Tracer, Use

_MIXED = "the number of groups is a constant of the program"


def convolution(tracer: Tracer, call: Call) -> None:
    """Output channels are the weight's filters, input channels its columns."""
    x, weight, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    (out,) = call.outputs
    spatial = out.ndim - 2
    batch, inputs, *space = _padded(tracer.axes(x), out.ndim)
    for axis in space:
        tracer.freeze(axis, "a convolution slides along it")
    rows, columns, *kernel = tracer.axes(weight)
    made, taken = (columns, rows) if transposed else (rows, columns)
    for axis in kernel[: spatial if tracer.origin(weight) is None else 0]:
        tracer.freeze(axis, "it is the kernel's extent of a convolution")
    if groups == 1:
        tracer.unify(inputs, taken, "its input channels are fixed")
    else:
        made = _grouped(tracer, call, inputs, made, taken, transposed=transposed)
    if bias is not None:
        made = tracer.unify(made, tracer.axes(bias)[0], "its bias cannot be cut")
    _produced(tracer, made)
    tracer.label(out, (batch if x.ndim == out.ndim else None, made, *(None,) * spatial))
    cost = weight.numel() * math.prod((x if transposed else out).shape[2:]) * out.shape[0]
    _note_use(tracer, call, weight, cost, made, taken)


def _padded(axes: tuple[Axis, ...], ndim: int) -> tuple[Axis, ...]:
    return axes if len(axes) == ndim else (None, *axes)


def _produced(tracer: Tracer, made: Axis) -> None:
    if made is not None:
        tracer.ledger.produced.append(made)


def _note_use(
    tracer: Tracer, call: Call, weight: Tensor, cost: int, made: Axis, taken: Axis
) -> None:
    name = tracer.origin(weight)
    if name is not None:
        tracer.record.uses.append(Use(name, cost, made, taken))
    if not tracer.is_own(weight) and (name is None or not _plain(tracer, weight, name)):
        tracer.restrict(call, mask_only=True)


def _plain(tracer: Tracer, weight: Tensor, name: str) -> bool:
    """Say whether ``weight`` is only a transposed or reshaped view of the parameter."""
    return weight._base is not None and tracer.is_own(weight._base)


def _grouped(
    tracer: Tracer, call: Call, inputs: Axis, made: Axis, taken: Axis, *, transposed: bool
) -> Axis:
    """Tie the channels of a grouped convolution; return the labels of its output.

    Whole groups can go (the number of groups follows), or the same positions of every group (it
    stays). Which one leaves more to cut depends on what follows, a channel shuffle above all, so
    both are handed to the ledger.
    """
    x, groups = call.args[0], call.args[8]
    out_channels = call.outputs[0].shape[1]
    ledger = tracer.ledger
    if transposed:  # (in, out / groups): the columns are the positions within a group
        positions, filters = made, taken
        made = ledger.fresh(out_channels)
        if filters is not None:
            inputs = tracer.unify(inputs, filters, "its input channels are fixed")
        if positions is None and out_channels // groups > 1:
            tracer.freeze(made, "its weight cannot be cut")
        per_group_in, per_group_out = None, positions
    else:
        per_group_in, per_group_out = taken, None
    if inputs is None or made is None:
        why = "its input channels are fixed"
        for axis in (inputs, made, taken, per_group_out):
            tracer.freeze(axis, why)
        return made
    rows_in, rows_out = inputs.reshape(groups, -1), made.reshape(groups, -1)
    whole = Alternative([_tied(rows_in), _tied(rows_out), (rows_in[:, 0], rows_out[:, 0])])
    same = Alternative(
        [
            _aligned(rows_in, per_group_in),
            _aligned(rows_out, per_group_out),
        ]
    )
    raw = call.raw.argument(6, "groups")
    origin = raw.origin if isinstance(raw, Count) else None
    if isinstance(origin, Attribute):
        use = tracer.use_attribute(raw, rows_in[:, 0].copy())
        whole.uses.extend([use] if use else [])
    single = x.shape[1] == groups and out_channels == groups
    if not isinstance(raw, Count) and call.raw.name.startswith("conv"):
        ledger.pairs.extend(same.pairs)
        if x.shape[1] == groups:
            tracer.freeze(inputs, _MIXED)
    elif x.shape[1] == groups or (raw is not None and origin is None):
        ledger.pairs.extend(whole.pairs)
        ledger.uses.extend(whole.uses)
        if not single:
            _keep_within(tracer, per_group_in, per_group_out)
    else:
        ledger.choices.append((whole, same))
    return made


def _keep_within(tracer: Tracer, *axes: Axis) -> None:
    for axis in axes:
        tracer.freeze(axis, "channels within a group of a convolution stay with the group")


def _tied(rows: Labels) -> tuple[Labels, Labels]:
    return rows.ravel(), np.repeat(rows[:, 0], rows.shape[1])


def _aligned(rows: Labels, positions: Axis) -> tuple[Labels, Labels]:
    first = rows[0] if positions is None else positions
    return rows.ravel(), np.tile(first, rows.shape[0])


def matmul(tracer: Tracer, call: Call) -> None:
    """``(..., n, k) @ (..., k, m)``: k is summed over, n and m go on."""
    bias, left, right = (
        call.args[:3] if call.name in {"addmm", "baddbmm"} else (None, *call.args[:2])
    )
    (out,) = call.outputs
    *batch_left, rows, inner_left = tracer.axes(left)
    *batch_right, inner_right, columns = tracer.axes(right)
    why = "a matrix product sums it with something fixed"
    inner = tracer.unify(inner_left, inner_right, why)
    batch = [
        tracer.unify(a, b, "a batched product pairs it with something fixed") if a is not b else a
        for a, b in zip(batch_left, batch_right, strict=True)
    ]
    axes: list[Axis] = [*batch, rows, columns]
    if isinstance(bias, Tensor) and bias.ndim:
        offset = out.ndim - bias.ndim
        for i, axis in enumerate(tracer.axes(bias)):
            if bias.shape[i] > 1:
                axes[i + offset] = tracer.unify(axes[i + offset], axis, "its bias cannot be cut")
    tracer.label(out, axes)
    cost = out.numel() * left.shape[-1]
    if tracer.origin(right) is not None and tracer.origin(left) is None:
        _produced(tracer, columns)
        _note_use(tracer, call, right, cost, columns, inner_right)
    elif tracer.origin(left) is not None and tracer.origin(right) is None:
        _produced(tracer, rows)
        _note_use(tracer, call, left, cost, rows, inner_left)
    elif inner is not None:
        tracer.restrict(call, mask_only=True)


def vector(tracer: Tracer, call: Call) -> None:
    """``mv`` and ``dot``: the last dimension of both is summed over."""
    left, right = call.args[:2]
    inner = tracer.unify(tracer.axes(left)[-1], tracer.axes(right)[-1], "a product sums it")
    tracer.label(call.outputs[0], tracer.axes(left)[:-1])
    if inner is not None:
        tracer.restrict(call, mask_only=True)


RULES: dict[str, Rule] = {
    "convolution": convolution,
    "mm": matmul,
    "bmm": matmul,
    "addmm": matmul,
    "baddbmm": matmul,
    "mv": vector,
    "dot": vector,
}
