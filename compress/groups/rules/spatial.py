"""Pooling, interpolation, padding and pixel shuffle: ops on space that leave channels alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.groups.labels import Axis, Labels
from compress.groups.meta_ops import words
from compress.groups.record import Call
from compress.groups.traced_ints import Attribute, TracedInt
from compress.groups.tracer import Rule, Tracer


def over_last(count: int) -> Rule:
    """Return the rule of an op that works along the last ``count`` dimensions."""

    def rule(tracer: Tracer, call: Call) -> None:
        x = call.args[0]
        axes = tracer.axes(x)
        for axis in axes[x.ndim - count :]:
            tracer.freeze(axis, f"{call.name} works along it")
        for out in call.outputs:
            if out.ndim == x.ndim:
                tracer.label(out, [*axes[: x.ndim - count], *(None,) * count])

    return rule


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


def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """``(C r r, H, W) -> (C, H r, W r)``: the r x r channels of one output are tied."""
    x, factor = call.args[0], call.args[1]
    axes: list[Axis] = list(tracer.axes(x))
    channels = axes[-3]
    for axis in axes[-2:]:
        tracer.freeze(axis, "pixel_shuffle works along it")
    if channels is not None:
        rows = channels.reshape(-1, factor * factor)
        tracer.constraints.unify(rows.ravel(), np.repeat(rows[:, 0], rows.shape[1]))
        channels = rows[:, 0].copy() if len(rows) > 1 else None
        if channels is None:
            tracer.freeze(rows.ravel(), "pixel_shuffle makes one channel of them")
    tracer.label(call.outputs[0], [*axes[:-3], channels, None, None])


def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """``(C, H r, W r) -> (C r r, H, W)``: the r x r channels of one input are tied."""
    x, factor = call.args[0], call.args[1]
    axes = tracer.axes(x)
    channels = None if axes[-3] is None else np.repeat(axes[-3], factor * factor)
    for axis in axes[-2:]:
        tracer.freeze(axis, "pixel_unshuffle works along it")
    tracer.label(call.outputs[0], [*axes[:-3], channels, None, None])


def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """``(g, C/g) -> (C/g, g)``: the same positions of every group are tied."""
    x, groups = call.args[0], call.args[1]
    axes: list[Axis] = list(tracer.axes(x))
    if (channels := axes[1]) is not None:
        rows = channels.reshape(groups, -1)
        tracer.constraints.unify(rows.ravel(), np.tile(rows[0], groups))
        axes[1] = np.repeat(rows[0], groups)
    tracer.label(call.outputs[0], axes)


def grid_sample(tracer: Tracer, call: Call) -> None:
    """The image's channels go on; the grid's positions are fixed."""
    x, grid = call.args[:2]
    for axis in (*tracer.axes(x)[2:], *tracer.axes(grid)):
        tracer.freeze(axis, "it is a place in an image")
    out = call.outputs[0]
    tracer.label(out, [*tracer.axes(x)[:2], *(None,) * (out.ndim - 2)])


def roi_align(tracer: Tracer, call: Call) -> None:
    """The maps' channels go on; there is a row for each region."""
    x, regions = call.args[:2]
    for axis in (*tracer.axes(x)[2:], *tracer.axes(regions)):
        tracer.freeze(axis, "it is a place in an image")
    tracer.label(call.outputs[0], [None, tracer.axes(x)[1], None, None])


def unfold(tracer: Tracer, call: Call) -> None:
    """``im2col``: every channel becomes as many as the window has places."""
    x, out = call.args[0], call.outputs[0]
    axes = tracer.axes(x)
    channels = axes[-3]
    for axis in axes[-2:]:
        tracer.freeze(axis, "unfold works along it")
    if channels is not None:
        channels = np.repeat(channels, out.shape[-2] // len(channels))
    tracer.label(out, [*axes[:-3], channels, None])


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"], over_last(1)
    ),
    **dict.fromkeys(
        words(
            "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d "
            "_adaptive_avg_pool2d adaptive_max_pool2d max_unpool2d upsample_nearest2d "
            "_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d "
            "replication_pad2d fractional_max_pool2d"
        ),
        over_last(2),
    ),
    **dict.fromkeys(
        words(
            "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d reflection_pad1d "
            "replication_pad1d max_unpool1d"
        ),
        over_last(1),
    ),
    **dict.fromkeys(
        words(
            "max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d "
            "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d "
            "reflection_pad3d replication_pad3d adaptive_max_pool3d max_pool3d"
        ),
        over_last(3),
    ),
    "constant_pad_nd": constant_pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
    "grid_sampler_2d": grid_sample,
    "grid_sampler": grid_sample,
    "im2col": unfold,
    "torchvision::roi_align": roi_align,
}
