"""Convolutions, matrix products and what is made of them: ops that make channels and consume them.

Attention and recurrent layers are followed as a whole: what PyTorch makes of them differs by device
and mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compress.groups.calls import tensors_in
from compress.groups.forward import Call, Use
from compress.groups.labels import Alternative, Axis, Labels
from compress.groups.traced_ints import TracedInt
from compress.groups.tracer import Tracer, rule


@rule("convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Output channels are the weight's filters, input channels its columns."""
    x, weight, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    (out,) = call.outputs
    spatial = out.ndim - 2
    axes = tracer.axes(x)
    batch, inputs, *space = axes if len(axes) == out.ndim else (None, *axes)
    slid = _slid(tracer, call, space)
    rows, columns, *kernel = tracer.axes(weight)
    made, taken = (columns, rows) if transposed else (rows, columns)
    if tracer.origin(weight) is None:
        tracer.freeze_each(kernel[:spatial], "it is the kernel's extent of a convolution")
    if groups == 1:
        tracer.unify(inputs, taken, "its input channels are fixed")
    else:
        made = _grouped(tracer, call, inputs, made, taken, transposed=transposed)
    if bias is not None:
        made = tracer.unify(made, tracer.axes(bias)[0], "its bias cannot be cut")
    _weighed(tracer, call, weight, made, inputs if groups < x.shape[-1 - spatial] else None)
    tracer.label(out, (batch if x.ndim == out.ndim else None, made, *slid))
    cost = weight.numel() * math.prod((x if transposed else out).shape[2:]) * out.shape[0]
    _note_use(tracer, call, weight, cost, made, taken)


def _slid(tracer: Tracer, call: Call, space: Sequence[Axis]) -> list[Axis]:
    """Return the labels of the dimensions that a convolution slides along.

    A kernel of one position leaves them alone. One whose output is as long as its input (channel
    attention by a convolution over channels: ECA) slides over the kept channels only.
    """
    x, weight, (out,) = call.args[0], call.args[1], call.outputs
    slid: list[Axis] = []
    restricted = False
    for d, axis in enumerate(space, 2):
        stride = call.args[3][d - 2 if len(call.args[3]) > 1 else 0]
        fixed = call.args[6] or stride != 1 or x.shape[d] != out.shape[d]
        wide = weight.shape[d] > 1
        if axis is not None and (fixed or (wide and call.args[8] > 1)):
            tracer.freeze(axis, "a convolution slides along it")
            axis = None
        restricted |= axis is not None and wide
        slid.append(axis)
    if restricted:
        tracer.restrict(call)
    return slid


def _weighed(tracer: Tracer, call: Call, weight: Tensor, made: Axis, taken: Axis) -> None:
    """Note a layer that makes channels of those it weighs; a constant buffer only sums them."""
    if made is not None:
        tracer.constraints.produced.append(made)
    if tracer.is_constant(weight):
        tracer.reduced(call, [taken])
    else:
        call.is_weighted = True


def _note_use(
    tracer: Tracer, call: Call, weight: Tensor, cost: int, made: Axis, taken: Axis
) -> None:
    name = tracer.origin(weight)
    if name is not None:
        tracer.record.uses.append(Use(name, cost, made, taken))
    is_view = weight._base is not None and tracer.is_own(weight._base)  # transposed or reshaped
    if not tracer.is_own(weight) and (name is None or not is_view):
        tracer.restrict(call, mask_only=True)


def _grouped(
    tracer: Tracer, call: Call, inputs: Axis, made: Axis, taken: Axis, *, transposed: bool
) -> Axis:
    """Tie the channels of a grouped convolution; return the labels of its output."""
    groups, why = call.args[8], "its input channels are fixed"
    in_group, out_group = taken, None
    if transposed:  # the weight is (in, out / groups)
        inputs = tracer.unify(inputs, taken, why)
        in_group, out_group = None, made
        made = tracer.constraints.fresh(call.outputs[0].shape[1])
    if inputs is None or made is None:
        tracer.freeze_each((inputs, made, taken, out_group), why)
        return made
    rows_in, rows_out = inputs.reshape(groups, -1), made.reshape(groups, -1)
    whole = Alternative([_tied(rows_in), _tied(rows_out), (rows_in[:, 0], rows_out[:, 0])])
    same = Alternative([_aligned(rows_in, in_group), _aligned(rows_out, out_group)])
    _choose(tracer, call, whole, same, rows_in)
    return made


def _choose(
    tracer: Tracer, call: Call, whole: Alternative, same: Alternative, rows: Labels
) -> None:
    """Let whole groups go, or the same positions of every group, as the program allows.

    The number of groups follows in the first case and stays in the second. Which one leaves more
    to cut depends on what comes before and after, a channel shuffle above all, so where both are
    possible they are handed to the constraints.
    """
    groups = call.raw.argument(6, "groups")
    depthwise = rows.shape[1] == 1
    if not isinstance(groups, TracedInt):
        tracer.constraints.pairs.extend(same.pairs)
        if depthwise:
            tracer.freeze(rows.ravel(), "the number of groups is written in the program")
        return
    use = tracer.use_attribute(groups, np.ascontiguousarray(rows[:, 0]))
    whole.uses.extend([use] if use else [])
    if depthwise or use is None:
        tracer.constraints.pairs.extend(whole.pairs)
        tracer.constraints.uses.extend(whole.uses)
    else:
        tracer.constraints.choices.append((whole, same))


def _tied(rows: Labels) -> tuple[Labels, Labels]:
    return rows.ravel(), np.repeat(rows[:, 0], rows.shape[1])


def _aligned(rows: Labels, positions: Axis) -> tuple[Labels, Labels]:
    first = rows[0] if positions is None else positions
    return rows.ravel(), np.tile(first, rows.shape[0])


@rule("torchvision::deform_conv2d")
def deformable_convolution(tracer: Tracer, call: Call) -> None:
    """A convolution whose kernel goes to places that are given, the same for parts of its input."""
    x, weight, offset, mask, bias = call.args[:5]
    groups, parts, (out,) = call.args[11], call.args[12], call.outputs
    batch, inputs, *space = tracer.axes(x)
    made, taken = tracer.axes(weight)[:2]
    for places in (offset, mask):
        tracer.freeze_each(tracer.axes(places), "it says where a deformable convolution looks")
    tracer.freeze_each(space, "a convolution slides along it")
    if groups == 1:
        inputs = tracer.unify(inputs, taken, "its input channels are fixed")
    elif inputs is None or made is None:
        tracer.freeze_each((inputs, made, taken), "its input channels are fixed")
    elif inputs.size == groups:  # the number of groups is what the weight's shape makes of them
        tracer.constraints.unify(made, np.repeat(inputs, len(made) // groups))
    else:
        tracer.constraints.pairs += [
            _aligned(inputs.reshape(groups, -1), taken),
            _aligned(made.reshape(groups, -1), None),
        ]
    if inputs is not None:
        tracer.constraints.tie(inputs.reshape(parts, -1))
    made = tracer.unify(made, tracer.axes(bias)[0], "its bias cannot be cut")
    _weighed(tracer, call, weight, made, inputs)
    tracer.label(out, (batch, made, None, None))
    cost = weight.numel() * math.prod(out.shape[2:]) * out.shape[0]
    _note_use(tracer, call, weight, cost, made, taken)


@rule("mm bmm addmm baddbmm")
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
    paired = "a batched product pairs it with something fixed"
    batch = [tracer.unify(a, b, paired) for a, b in zip(batch_left, batch_right, strict=True)]
    axes: list[Axis] = [*batch, rows, columns]
    if isinstance(bias, Tensor) and bias.ndim:
        offset = out.ndim - bias.ndim
        for i, axis in enumerate(tracer.axes(bias)):
            if bias.shape[i] > 1:
                axes[i + offset] = tracer.unify(axes[i + offset], axis, "its bias cannot be cut")
    tracer.label(out, axes)
    cost = out.numel() * left.shape[-1]
    if tracer.origin(right) is not None and tracer.origin(left) is None:
        _weighed(tracer, call, right, columns, inner)
        _note_use(tracer, call, right, cost, columns, inner_right)
    elif tracer.origin(left) is not None and tracer.origin(right) is None:
        _weighed(tracer, call, left, rows, inner)
        _note_use(tracer, call, left, cost, rows, inner_left)
    elif inner is not None:
        tracer.restrict(call, mask_only=True)
        if inner_right is not None and np.array_equal(inner, inner_right):
            tracer.reduced(call, [inner])  # of channels with themselves, as in a norm


@rule("mv dot vdot")
def vector(tracer: Tracer, call: Call) -> None:
    """``mv`` and ``dot``: the last dimension of both is summed over."""
    left, right = call.args[:2]
    inner = tracer.unify(tracer.axes(left)[-1], tracer.axes(right)[-1], "a product sums it")
    tracer.label(call.outputs[0], tracer.axes(left)[:-1])
    if (tracer.origin(left) is None) != (tracer.origin(right) is None):
        weight = right if tracer.origin(left) is None else left
        _weighed(tracer, call, weight, None, inner)
    if inner is not None:
        tracer.restrict(call, mask_only=True)


@rule("scaled_dot_product_attention")
def attention(tracer: Tracer, call: Call) -> None:
    """Softmax of queries (..., N, E) times keys (..., M, E), times values (..., M, V).

    The default scale counts the kept positions of E, and the softmax is over the kept of M.
    """
    out, given = call.outputs[0], list(tensors_in((*call.args, *call.kwargs.values())))
    plain = len(call.args) > 2 and len({tensor.ndim for tensor in call.args[:3]}) == 1
    if not plain or call.raw.argument(7, "enable_gqa", False):
        for tensor in given:
            tracer.freeze_each(tracer.axes(tensor), "attention in which several heads share one")
        return
    queries, keys, values = call.args[:3]
    *batch, rows, inner = tracer.axes(queries)
    *batch_keys, tokens, inner_keys = tracer.axes(keys)
    *batch_values, tokens_values, columns = tracer.axes(values)
    why = "attention lines it up with something fixed"
    inner = tracer.unify(inner, inner_keys, why)
    tokens = tracer.unify(tokens, tokens_values, why)
    for other in (batch_keys, batch_values):
        batch = [tracer.unify(a, b, why) for a, b in zip(batch, other, strict=True)]
    mask = call.raw.argument(3, "attn_mask")
    if isinstance(mask, Tensor):
        for d, side in ((-1, tokens), (-2, rows)):
            if mask.shape[d] > 1:
                tracer.unify(side, tracer.axes(mask)[d], "an attention mask is fixed")
    tracer.label(out, (*batch, rows, columns))
    if inner is not None or tokens is not None:
        tracer.restrict(call)


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(tracer: Tracer, call: Call) -> None:
    """LSTM, GRU and RNN: what the first layer reads can be cut; what a cell remembers stays."""
    x = call.args[0]
    *others, inputs = tracer.axes(x)
    weights = next(list(a) for a in call.args if isinstance(a, list) and len(a) > 1)
    tracer.freeze_each(others, "a recurrent layer goes along it")
    for tensor in tensors_in(call.args[1:]):
        axes = tracer.axes(tensor)
        name = tracer.origin(tensor) or ""
        first = "weight_ih_l0" in name and tensor.ndim == 2
        tracer.freeze_each(axes[: 1 if first else None], "it is the state of a recurrent layer")
        if first:
            tracer.unify(inputs, axes[1], "a recurrent layer reads a fixed number of inputs")
        if tensor.ndim == 2 and name and any(tensor is weight for weight in weights):
            cost = tensor.numel() * (x.numel() // x.shape[-1])
            tracer.record.uses.append(Use(name, cost, axes[0], axes[1]))
    if not any("weight_ih_l0" in (tracer.origin(weight) or "") for weight in weights):
        tracer.freeze(inputs, "the weights of a recurrent layer are computed")
