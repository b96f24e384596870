"""Ops that leave channels where they are: pointwise ones, and those on space (pooling, padding)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compress.groups.calls import tensors_in
from compress.groups.forward import Call
from compress.groups.labels import Axis, Labels
from compress.groups.traced_ints import Attribute, TracedInt
from compress.groups.tracer import Tracer, rule


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> None:
    """Nothing is known about this op: every channel it sees must stay."""
    for tensor in tensors_in((*call.args, *call.kwargs.values())):
        tracer.freeze_each(tracer.axes(tensor), f"no rule for the operation {call.name}")


@rule(
    "pointwise hardswish _prelu_kernel prelu copy lerp where masked_fill clamp clamp_min "
    "clamp_max dropout feature_dropout gelu rrelu addcmul addcdiv maximum minimum sub rsub"
)
def pointwise(tracer: Tracer, call: Call) -> None:
    """Broadcast the labels of all operands; operands of one size along a dimension are tied."""
    operands = [t for t in tensors_in((*call.args, *call.kwargs.values())) if t.ndim]
    for out in call.outputs:
        if len(operands) == 1 and operands[0].shape == out.shape:
            tracer.label(out, tracer.axes(operands[0]))
        else:
            tracer.label(out, _broadcast(tracer, call, operands, out))


def _broadcast(tracer: Tracer, call: Call, operands: list[Tensor], out: Tensor) -> list[Axis]:
    """Return the labels of ``out`` whose shape is the operands' broadcast shape."""
    rows = [(t.shape, tracer.axes(t), t.ndim - out.ndim) for t in operands]
    why = f"{call.name} joins it with channels that are fixed"
    axes: list[Axis] = []
    for dim, size in enumerate(out.shape):
        places = [(shape, labels, dim + offset) for shape, labels, offset in rows]
        wide = [labels[at] for shape, labels, at in places if at >= 0 and shape[at] == size > 1]
        axes.append(tracer.tie(wide, why))
    return axes


@rule(
    "detach alias clone contiguous _to_copy lift_fresh lift native_dropout empty_like zeros_like "
    "ones_like full_like rand_like randn_like bernoulli uniform normal fill zero random "
    "rrelu_with_noise _local_scalar_dense exponential alpha_dropout"
)
def same(tracer: Tracer, call: Call) -> None:
    """Outputs have the labels of the first operand."""
    first = call.args[0]
    for out in call.outputs:
        if out is not first and out.shape == first.shape:
            tracer.label(out, tracer.axes(first))


@rule(
    "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_unpool1d "
    "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d reflection_pad1d "
    "replication_pad1d max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d "
    "_adaptive_avg_pool2d adaptive_max_pool2d max_unpool2d upsample_nearest2d "
    "_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d fractional_max_pool2d max_pool3d "
    "max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d "
    "adaptive_max_pool3d upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d "
    "reflection_pad3d replication_pad3d"
)
def along_space(tracer: Tracer, call: Call) -> None:
    """Pooling, resizing, padding along the last dimensions, as many as the name says: ``2d``."""
    x, axes = call.args[0], tracer.axes(call.args[0])
    count = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    tracer.freeze_each(axes[x.ndim - count :], f"{call.name} works along it")
    for out in call.outputs:
        if out.ndim == x.ndim:
            tracer.label(out, [*axes[: x.ndim - count], *(None,) * count])


@rule("constant_pad_nd")
def constant_pad(tracer: Tracer, call: Call) -> None:
    """Zeros put before and after channels become channels that must be cut with their partners."""
    x, pads = call.args[0], call.args[1]
    given = (
        call.raw.argument(1, "pad", pads) if call.raw.name in {"pad", "constant_pad_nd"} else pads
    )
    given = given if isinstance(given, Sequence) and len(given) == len(pads) else pads
    axes: list[Axis] = list(tracer.axes(x))
    for i in range(0, len(pads), 2):
        dim = x.ndim - 1 - i // 2
        axis = axes[dim]
        if axis is None or (pads[i] == 0 and pads[i + 1] == 0):
            continue
        if pads[i] < 0 or pads[i + 1] < 0:
            tracer.freeze(axis, "padding by a negative amount crops it")
            axes[dim] = None
        else:
            before, after = _zeros(tracer, given[i], given[i + 1], pads[i], pads[i + 1])
            axes[dim] = np.concatenate([before, axis, after])
    tracer.label(call.outputs[0], axes)


def _zeros(tracer: Tracer, left: int, right: int, before: int, after: int) -> tuple[Labels, Labels]:
    """Return labels of the zeros on both sides; one number for both sides ties them pairwise."""
    rows = []
    for count, size in ((left, before), (right, after)):
        if isinstance(count, TracedInt):
            labels = tracer.constraints.fresh(size)
            tracer.follow(count, labels)
        else:
            labels = np.zeros(size, np.int32)
        rows.append(labels)
    one = isinstance(left, TracedInt) and isinstance(right, TracedInt) and before == after
    if one and isinstance(left.origin, Attribute) and left.origin == right.origin:  # type: ignore[attr-defined]
        tracer.constraints.unify(rows[0], rows[1])
    return rows[0], rows[1]


@rule("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """``(C r r, H, W) -> (C, H r, W r)``: the r x r channels of one output are tied."""
    *others, channels, height, width = tracer.axes(call.args[0])
    tracer.freeze_each((height, width), "pixel_shuffle works along it")
    if channels is not None:
        rows = channels.reshape(-1, call.args[1] ** 2)
        tracer.constraints.tie(rows.T)
        channels = rows[:, 0].copy() if len(rows) > 1 else None
        if channels is None:
            tracer.freeze(rows.ravel(), "pixel_shuffle makes one channel of them")
    tracer.label(call.outputs[0], [*others, channels, None, None])


@rule("pixel_unshuffle im2col")
def unfold(tracer: Tracer, call: Call) -> None:
    """``(C, H, W)`` to several channels for each of C: a window's places, or r x r pixels."""
    out = call.outputs[0]
    *others, channels, height, width = tracer.axes(call.args[0])
    name = "unfold" if call.name == "im2col" else call.name
    tracer.freeze_each((height, width), f"{name} works along it")
    if channels is not None:
        channels = np.repeat(channels, out.shape[len(others)] // len(channels))
    tracer.label(out, [*others, channels, *(None,) * (out.ndim - len(others) - 1)])


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """``(g, C/g) -> (C/g, g)``: the same positions of every group are tied."""
    x, groups = call.args[0], call.args[1]
    axes: list[Axis] = list(tracer.axes(x))
    if (channels := axes[1]) is not None:
        rows = channels.reshape(groups, -1)
        tracer.constraints.tie(rows)
        axes[1] = np.repeat(rows[0], groups)
    tracer.label(call.outputs[0], axes)


@rule("grid_sampler_2d grid_sampler torchvision::roi_align")
def sampled(tracer: Tracer, call: Call) -> None:
    """Values at places of a grid or regions: the maps' channels go on, the places are fixed."""
    x, places = call.args[:2]
    batch, channels, *space = tracer.axes(x)
    tracer.freeze_each((*space, *tracer.axes(places)), "it is a place in an image")
    out = call.outputs[0]
    rows = None if call.name == "torchvision::roi_align" else batch  # one for each region
    tracer.label(out, [rows, channels, *(None,) * (out.ndim - 2)])
