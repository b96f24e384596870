"""Ops that compute values and leave channels where they are: pointwise, on space, across positions.

Where normalizations, reductions and softmax look across channels that can be cut, the pruned
network computes over the kept ones only; that is another function than zeroing channels, and the
masked reference does the same.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence

import numpy as np
from torch import Tensor

from compress.groups.calls import tensors_in, words
from compress.groups.forward import Call
from compress.groups.labels import Axis, Labels
from compress.groups.rules.layout import follow
from compress.groups.traced_ints import Attribute, TracedInt
from compress.groups.tracer import Tracer, rule


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> None:
    """Nothing is known about this op: every channel it sees must stay."""
    for tensor in tensors_in((*call.args, *call.kwargs.values())):
        tracer.freeze_each(tracer.axes(tensor), f"no rule for the operation {call.name}")


@rule(
    "pointwise hardswish _prelu_kernel prelu copy lerp where masked_fill clamp clamp_min "
    "clamp_max dropout feature_dropout gelu rrelu addcmul addcdiv maximum minimum sub rsub complex "
    "polar"
)
def pointwise(tracer: Tracer, call: Call) -> None:
    """Broadcast the labels of all operands; operands of one size along a dimension are tied."""
    operands = [t for t in tensors_in((*call.args, *call.kwargs.values())) if t.ndim]
    why = f"{call.name} joins it with channels that are fixed"
    for out in call.outputs:
        if len(operands) == 1 and operands[0].shape == out.shape:
            tracer.label(out, tracer.axes(operands[0]))
            continue
        rows = [(t.shape, tracer.axes(t), t.ndim - out.ndim) for t in operands]
        axes: list[Axis] = []
        for dim, size in enumerate(out.shape):
            places = [(shape, labels, dim + offset) for shape, labels, offset in rows]
            wide = [labels[at] for shape, labels, at in places if at >= 0 and shape[at] == size > 1]
            axes.append(tracer.tie(wide, why))
        tracer.label(out, axes)


@rule(
    "detach alias clone contiguous _to_copy lift_fresh lift native_dropout empty_like zeros_like "
    "ones_like full_like rand_like randn_like bernoulli uniform normal fill zero random "
    "rrelu_with_noise _local_scalar_dense exponential alpha_dropout _conj _neg_view resolve_conj "
    "resolve_neg"
)
def same(tracer: Tracer, call: Call) -> None:
    """Outputs have the labels of the first operand."""
    first = call.args[0]
    for out in call.outputs:
        if out is not first and out.shape == first.shape:
            tracer.label(out, tracer.axes(first))


_POOLS = words("avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices")


@rule(
    "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d "
    "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d reflection_pad1d "
    "replication_pad1d max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d "
    "_adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
    "_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d fractional_max_pool2d max_pool3d "
    "max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d "
    "adaptive_max_pool3d upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d "
    "reflection_pad3d replication_pad3d"
)
def along_space(tracer: Tracer, call: Call) -> None:
    """Pooling, resizing, padding along the last dimensions, as many as the name says: ``2d``."""
    x, axes = call.args[0], list(tracer.axes(call.args[0]))
    count = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    windows = _windows(call, count)
    for d in range(x.ndim - count, x.ndim):
        size = windows[d - x.ndim + count] if x.shape[d] == call.outputs[0].shape[d] else 0
        if not size:
            tracer.freeze(axes[d], f"{call.name} works along it")
            axes[d] = None
        elif size > 1 and axes[d] is not None:
            tracer.restrict(call)
    for number, out in enumerate(call.outputs):
        tracer.label(out, axes)
        for axis in axes[x.ndim - count :] if number else ():
            tracer.positions(call, out, axis)  # of maxima, counted through all these dimensions


def _windows(call: Call, count: int) -> list[int]:
    """Return how many positions a pooling looks at, one by one, in each of its dimensions.

    0 where it takes steps, or is no such pooling: then it cannot go along channels.
    """
    if call.name not in _POOLS:
        return [0] * count
    given = [call.args[1], call.argument(2) or call.args[1]]
    sizes, steps = ([*each] * count if len(each) == 1 else [*each] for each in given)
    return [size if step == 1 else 0 for size, step in zip(sizes, steps, strict=True)]


@rule("max_unpool2d max_unpool3d")
def unpooled(tracer: Tracer, call: Call) -> None:
    """Values go where the maxima of a pooling were, within their channel: both have the same."""
    x, places = (tracer.axes(each) for each in call.args[:2])
    count = 2 if "2d" in call.name else 3
    tracer.freeze_each((*x[-count:], *places[-count:]), f"{call.name} works along it")
    pairs = zip(x[:-count], places[:-count], strict=True)
    both = [tracer.unify(*pair, f"{call.name} needs a place for each value") for pair in pairs]
    tracer.label(call.outputs[0], [*both, *(None,) * count])


@rule("constant_pad_nd")
def constant_pad(tracer: Tracer, call: Call) -> None:
    """Zeros put before and after channels become channels that must be cut with their partners."""
    x, pads = call.args[0], call.args[1]
    is_own = call.raw.name in {"pad", "constant_pad_nd"}
    given = call.raw.argument(1, "pad", pads) if is_own else pads
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


@rule("pixel_shuffle col2im")
def onto_larger_map(tracer: Tracer, call: Call) -> None:
    """Several channels, or places of a window, to one of C on a larger map: they are tied.

    ``(C r r, H, W) -> (C, H r, W r)``, and fold: ``(C x window, places) -> (C, H, W)``.
    """
    is_fold = call.name == "col2im"
    axes, name = tracer.axes(call.args[0]), "fold" if is_fold else call.name
    *others, channels = axes[: -1 if is_fold else -2]
    tracer.freeze_each(axes[-1 if is_fold else -2 :], f"{name} works along it")
    if channels is not None:
        rows = channels.reshape(-1, math.prod(call.args[2]) if is_fold else call.args[1] ** 2)
        tracer.constraints.tie(rows.T)
        channels = rows[:, 0].copy()
        if len(rows) == 1 and not is_fold:
            tracer.freeze(rows.ravel(), "pixel_shuffle makes one channel of them")
            channels = None
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


@rule("glu")
def gated(tracer: Tracer, call: Call) -> None:
    """One half of the channels times the sigmoid of the other half: both halves are tied."""
    axes: list[Axis] = list(tracer.axes(call.args[0]))
    dim = call.argument(1, -1)
    if (channels := axes[dim]) is not None:
        halves = channels.reshape(2, -1)
        tracer.constraints.tie(halves)
        axes[dim] = halves[0]
    tracer.label(call.outputs[0], axes)


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


@rule(
    "native_batch_norm batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _batch_norm_no_update _batch_norm_with_update"
)
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Every vector follows the channels; statistics of the batch reduce over all else."""
    x, training = call.args[0], "no_training" not in call.name and call.args[5]
    axes = list(tracer.axes(x))
    vectors = [tracer.axes(vector)[0] for vector in tensors_in(call.args[1:5])]
    axes[1] = tracer.tie([axes[1], *vectors], "a normalization ties it to fixed statistics")
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
    why = "a normalization ties it to fixed weights"
    for vector in tensors_in(call.args[2:4]):
        for i, axis in enumerate(tracer.axes(vector), start):
            if x.shape[i] > 1:
                axes[i] = tracer.unify(axes[i], axis, why)
    _follow_normalized(tracer, call, axes[start:])
    tracer.label(call.outputs[0], axes)
    for out in call.outputs[1:]:
        tracer.label(out, [*axes[:start], *(None,) * (out.ndim - start)])
    if any(axis is not None for axis in axes[start:]):
        tracer.restrict(call)


def _follow_normalized(tracer: Tracer, call: Call, axes: Sequence[Axis]) -> None:
    """Let the sizes that a program says it normalizes follow those dimensions."""
    sizes = call.raw.argument(1, "normalized_shape")
    for size, axis in zip(sizes if isinstance(sizes, Sequence) else (), axes, strict=False):
        if axis is not None:
            follow(tracer, size, axis)


@rule("native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """The same positions of every group are tied and the number of groups stays.

    Where every channel is a group, the number follows the channels.
    """
    x, groups = call.args[0], call.args[6]
    batch, channels, *space = tracer.axes(x)
    vectors = [tracer.axes(vector)[0] for vector in tensors_in(call.args[1:3])]
    channels = tracer.tie([channels, *vectors], "a normalization ties it to fixed weights")
    if channels is not None and groups == len(channels) > 1:
        count = call.raw.argument(1, "num_groups")
        if isinstance(count, TracedInt):
            follow(tracer, count, channels)
            for statistics in call.outputs[1:]:
                tracer.label(statistics, (batch, channels))
        else:
            tracer.freeze(channels, "a group normalization has one channel in each group")
    elif channels is not None:
        tracer.constraints.tie(channels.reshape(groups, -1))
        tracer.restrict(call)
    tracer.label(call.outputs[0], (batch, channels, *space))


@rule(
    "mean sum var std var_mean std_mean amax amin max min prod any all logsumexp norm "
    "linalg_vector_norm nansum"
)
def reduction(tracer: Tracer, call: Call) -> None:
    """Reduced dimensions go (or have size one); where they could be cut the reference is told."""
    x = call.args[0]
    dim = call.kwargs.get("dim", call.argument(2 if "norm" in call.name else 1))
    if isinstance(dim, bool) or dim is None or dim == [] or not x.ndim:
        dim = range(x.ndim)
    dims = [dim] if isinstance(dim, int) else dim
    if call.raw.name == "rms_norm":  # which PyTorch computes by a mean
        _follow_normalized(tracer, call, [tracer.axes(x)[d] for d in dims])
    _label_reduced(tracer, call, {d % x.ndim for d in dims})


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


@rule(
    "_softmax _log_softmax _safe_softmax softmax cumsum cumprod logcumsumexp local_response_norm "
    "renorm"
)
def along(tracer: Tracer, call: Call) -> None:
    """Shape and labels stay, and values mix along some dimensions: those of kept channels.

    In a response norm they are those of neighbouring channels, in a limit on the norm of filters
    (renorm) all but one.
    """
    axes = list(tracer.axes(call.args[0]))
    tracer.label(call.outputs[0], axes)
    if call.name == "renorm":
        del axes[call.args[2]]
    else:
        axes = [axes[1 if call.name == "local_response_norm" else call.args[1]]]
    if any(axis is not None for axis in axes):
        tracer.restrict(call)


@rule("tril triu rot90 roll _fft_r2c _fft_c2r _fft_c2c")
def plane(tracer: Tracer, call: Call) -> None:
    """Triangles, turns, shifts and Fourier transforms leave channels along other dimensions."""
    x, why = call.args[0], f"{call.name} works along it"
    dims: Iterable[int] = (-2, -1)
    if call.name == "rot90":
        dims = call.argument(2, (0, 1))
    elif call.name == "roll":
        dims, why = call.argument(2, []) or range(x.ndim), "channels are shifted by a number"
    elif call.name.startswith("_fft"):
        dims, why = call.args[1], "a Fourier transform works along it"
    tracer.label(call.outputs[0], tracer.fixed(tracer.axes(x), dims, why))


@rule("view_as_real view_as_complex")
def complex_view(tracer: Tracer, call: Call) -> None:
    """Complex numbers as pairs of real ones, in a last dimension of two, or pairs as numbers."""
    axes = tracer.axes(call.args[0])
    if call.name == "view_as_real":
        tracer.label(call.outputs[0], [*axes, None])
    else:
        tracer.freeze(axes[-1], "its numbers are parts of one complex number")
        tracer.label(call.outputs[0], axes[:-1])


@rule("topk sort argsort argmax argmin kthvalue mode cummax cummin")
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
