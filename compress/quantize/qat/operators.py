"""ONNX operators, from opset 13 on, as differentiable torch functions: what CNNs are made of.

Each function takes the node's attributes and its inputs (None where one is left out) and returns a
tensor, or a tuple of them. Integer tensors, which are shapes and indices, stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.modules import breaks_channels_last

Attributes = Mapping[str, Any]
Value = Tensor | None
Operator = Callable[..., Any]


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Any:
    """Convolution of 1 to 3 dimensions with ONNX's pads, begin and end apart."""
    rank = x.ndim - 2
    x, padding = _padded(a, x, rank, list(weight.shape[2:]), 0.0)
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    stride, dilation = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    if breaks_channels_last(weight, stride):
        x = x.contiguous()
    return function(x, weight, bias, stride, padding, dilation, a.get("group", 1))


def conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    """Transposed convolution; what ONNX pads at the end only is cut off afterwards."""
    rank = x.ndim - 2
    pads = a.get("pads", [0] * 2 * rank)
    begin, end = pads[:rank], pads[rank:]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    out = function(
        x,
        weight,
        bias,
        a.get("strides", [1] * rank),
        [min(b, e) for b, e in zip(begin, end, strict=True)],
        a.get("output_padding", [0] * rank),
        a.get("group", 1),
        a.get("dilations", [1] * rank),
    )
    for d, (b, e) in enumerate(zip(begin, end, strict=True)):
        low = max(b - e, 0)
        out = out.narrow(2 + d, low, out.shape[2 + d] - low - max(e - b, 0))
    return out


def gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    """Return alpha * x @ weight + beta * bias, either factor transposed."""
    x = x.t() if a.get("transA", 0) else x
    weight = weight.t() if a.get("transB", 0) else weight
    product = torch.mul(x @ weight, a.get("alpha", 1.0))
    return product if bias is None else torch.add(product, bias, alpha=a.get("beta", 1.0))


def max_pool(a: Attributes, x: Tensor) -> Any:
    """Maximum over windows."""
    rank, kernel = x.ndim - 2, a["kernel_shape"]
    x, padding = _padded(a, x, rank, kernel, float("-inf"), largest=True)
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    stride, dilation = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    ceil = bool(a.get("ceil_mode", 0))
    return function(x, kernel, stride, padding, dilation, ceil)


def average_pool(a: Attributes, x: Tensor) -> Any:
    """Mean over windows, padding counted or not."""
    rank, kernel = x.ndim - 2, a["kernel_shape"]
    counted = bool(a.get("count_include_pad", 0))
    stride, ceil = a.get("strides", [1] * rank), bool(a.get("ceil_mode", 0))
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    padded, padding = _padded(a, x, rank, kernel, 0.0, largest=True)
    if counted or padded is x:
        return function(padded, kernel, stride, padding, ceil, counted)
    ones = _padded(a, torch.ones_like(x), rank, kernel, 0.0, largest=True)[0]
    total, count = (function(v, kernel, stride, padding, ceil, True) for v in (padded, ones))
    return total / count


def batch_normalization(
    a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Normalize with stored statistics, in training as well."""
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


def layer_normalization(a: Attributes, x: Tensor, scale: Tensor, bias: Value = None) -> Tensor:
    """Normalize over the dimensions from ``axis`` on."""
    shape = x.shape[a.get("axis", -1) :]
    offset = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, list(shape), scale.expand(shape), offset, a.get("epsilon", 1e-5))


def instance_normalization(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalize each channel of each image."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5))


def group_normalization(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups of channels."""
    groups = a["num_groups"]
    if scale.numel() == groups:  # opset 18: one for each group
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, a.get("epsilon", 1e-5))


def clip(_: Attributes, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    """Limit values from below and above."""
    if low is None and high is None:
        return x
    return torch.clamp(x, _number(low), _number(high))


def reduce(function: Callable[..., Tensor]) -> Operator:
    """Return an operator that reduces over axes given as attribute or input."""

    def operator(a: Attributes, x: Tensor, axes: Value = None) -> Tensor:
        dims = a.get("axes") if axes is None else axes.tolist()
        if not dims:
            if a.get("noop_with_empty_axes", 0):
                return x
            dims = list(range(x.ndim))
        return function(x, dim=tuple(dims), keepdim=bool(a.get("keepdims", 1)))

    return operator


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """Give another shape; 0 keeps a dimension, -1 is worked out."""
    sizes = [int(s) for s in shape.tolist()]
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(a: Attributes, x: Tensor) -> Tensor:
    """Make a matrix of what is before ``axis`` and the rest."""
    axis = a.get("axis", 1) % (x.ndim + 1)
    rows = int(torch.Size(x.shape[:axis]).numel())
    return x.reshape(rows, -1)


def squeeze(_: Attributes, x: Tensor, axes: Value = None) -> Tensor:
    """Drop dimensions of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def unsqueeze(_: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    """Insert dimensions of size 1."""
    dims = axes.tolist()
    rank = x.ndim + len(dims)
    for d in sorted(d % rank for d in dims):
        x = x.unsqueeze(d)
    return x


def slice_(
    _: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Value = None, steps: Value = None
) -> Tensor:
    """Take a range of some dimensions; a negative step counts down."""
    dims = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, d, step in zip(starts.tolist(), ends.tolist(), dims, strides, strict=True):
        span = range(x.shape[d])[slice(start, end if abs(end) < 2**31 - 1 else None, step)]
        x = x.index_select(d, torch.tensor(list(span), device=x.device))
    return x


def split_parts(a: Attributes, x: Tensor, sizes: Value = None) -> tuple[Tensor, ...]:
    """Cut into parts along one dimension."""
    axis = a.get("axis", 0)
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // a["num_outputs"]), axis)
    return torch.split(x, sizes.tolist(), axis)


def gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Pick entries of one dimension."""
    axis = a.get("axis", 0) % x.ndim
    flat = indices.reshape(-1).to(x.device).long() % x.shape[axis]
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, flat).reshape(shape)


def pad(a: Attributes, x: Tensor, pads: Tensor, value: Value = None, axes: Value = None) -> Tensor:
    """Extend some dimensions by a constant, a mirror image or the edge."""
    amounts = pads.tolist()
    dims = list(range(x.ndim)) if axes is None else [d % x.ndim for d in axes.tolist()]
    half = len(amounts) // 2
    begin = dict(zip(dims, amounts[:half], strict=True))
    end = dict(zip(dims, amounts[half:], strict=True))
    mode = a.get("mode", b"constant").decode()
    around = [v for d in reversed(range(x.ndim)) for v in (begin.get(d, 0), end.get(d, 0))]
    if mode == "constant":
        return F.pad(x, around, value=0.0 if value is None else float(value))
    return F.pad(x, around[: 2 * (x.ndim - 2)], mode={"edge": "replicate"}.get(mode, mode))


def resize(
    a: Attributes, x: Tensor, _region: Value = None, scales: Value = None, sizes: Value = None
) -> Tensor:
    """Scale images by the nearest pixel or bilinearly, with torch's own two conventions."""
    mode = a.get("mode", b"nearest").decode()
    where = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    rank = x.ndim - 2
    size = None if sizes is None or not sizes.numel() else [int(s) for s in sizes.tolist()[2:]]
    factor = None if size is not None or scales is None else scales.tolist()[2:]
    corners = where == "align_corners"
    if mode == "nearest":
        exact = where in ("half_pixel", "pytorch_half_pixel")
        return F.interpolate(x, size, factor, mode="nearest-exact" if exact else "nearest")
    kind = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear"}
    smooth = bool(a.get("antialias", 0))
    return F.interpolate(
        x, size, factor, kind.get((mode, rank), "bicubic"), corners, antialias=smooth
    )


def depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    """Move blocks of channels into space."""
    block = a["blocksize"]
    if a.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    x = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // block**2, h * block, w * block)


def space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    """Move blocks of space into channels."""
    block = a["blocksize"]
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * block**2, h // block, w // block)


def cast(a: Attributes, x: Tensor) -> Tensor:
    """Change the type of a tensor; what becomes integer moves to the CPU."""
    kinds = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}
    return x.to(kinds.get(a["to"], torch.float32))


def prelu(_: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    """Scale what is negative; the slope broadcasts as in ONNX."""
    return torch.where(x < 0, x * slope, x)


def softmax(function: Callable[..., Tensor]) -> Operator:
    """Return Softmax or LogSoftmax over ``axis``."""
    return lambda a, x: function(x, dim=a.get("axis", -1))


def hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    """Return max(0, min(1, alpha * x + beta))."""
    return torch.clamp(x * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1)


def _padded(
    a: Attributes,
    x: Tensor,
    rank: int,
    kernel: Sequence[int],
    value: float,
    *,
    largest: bool = False,
) -> tuple[Tensor, list[int]]:
    """Return the padding for torch, or the input padded already where torch cannot say it."""
    pads = a.get("pads", [0] * 2 * rank)
    automatic = a.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = _same(a, x, rank, kernel, automatic)
    begin, end = list(pads[:rank]), list(pads[rank:])
    too_large = largest and any(2 * p > k for p, k in zip(begin, kernel, strict=True))
    if begin == end and not too_large:
        return x, begin
    around = [v for b, e in zip(reversed(begin), reversed(end), strict=True) for v in (b, e)]
    return F.pad(x, around, value=value), [0] * rank


def _same(
    a: Attributes, x: Tensor, rank: int, kernel: Sequence[int], automatic: bytes
) -> list[int]:
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    begin, end = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        out = -(-size // stride)
        total = max((out - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, rest = total // 2, total - total // 2
        begin.append(small if automatic == b"SAME_UPPER" else rest)
        end.append(rest if automatic == b"SAME_UPPER" else small)
    return begin + end


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(torch.broadcast_tensors(*parts)))  # type: ignore[no-untyped-call]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _global(function: Callable[..., Tensor]) -> Operator:
    return lambda _, x: function(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _plain(function: Callable[..., Tensor]) -> Operator:
    return lambda _, *inputs: function(*inputs)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DepthToSpace": depth_to_space,
    "Div": _plain(_divide),
    "Dropout": lambda _, x, *rest: x,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": lambda _, x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype, device=x.device),
    "Flatten": flatten,
    "Floor": _plain(torch.floor),
    "Gather": gather,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "GroupNormalization": group_normalization,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Log": _plain(torch.log),
    "LogSoftmax": softmax(F.log_softmax),
    "MatMul": _plain(torch.matmul),
    "Max": lambda _, *parts: _stacked(parts).amax(0),
    "MaxPool": max_pool,
    "Min": lambda _, *parts: _stacked(parts).amin(0),
    "Mish": _plain(F.mish),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "PRelu": prelu,
    "Pad": pad,
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": reduce(torch.linalg.vector_norm),
    "ReduceMax": reduce(torch.amax),
    "ReduceMean": reduce(torch.mean),
    "ReduceMin": reduce(torch.amin),
    "ReduceSum": reduce(torch.sum),
    "Relu": _plain(F.relu),
    "Reshape": reshape,
    "Resize": resize,
    "Selu": _plain(F.selu),
    "Shape": lambda a, x: torch.tensor(list(x.shape)[a.get("start", 0) : a.get("end")]),
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": slice_,
    "Softmax": softmax(F.softmax),
    "Softplus": _plain(F.softplus),
    "SpaceToDepth": space_to_depth,
    "Split": split_parts,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": squeeze,
    "Sub": _plain(torch.sub),
    "Sum": lambda _, *parts: _stacked(parts).sum(0),
    "Swish": lambda a, x: x * torch.sigmoid(a.get("alpha", 1.0) * x),
    "Tanh": _plain(torch.tanh),
    "Transpose": lambda a, x: x.permute(a.get("perm", list(range(x.ndim))[::-1])),
    "Unsqueeze": unsqueeze,
    "Where": lambda _, condition, x, y: torch.where(condition, x, y),
}
