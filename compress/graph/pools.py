"""Means over space and over windows, written as runtimes compute them in int8."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx import NodeProto

from compress.graph.model import attribute
from compress.graph.values import EditableGraph, constant, maker, set_attribute


def is_spatial_mean(graph: EditableGraph, node: ir.Node) -> bool:
    """Return whether a ReduceMean is one over all of an image: a GlobalAveragePool."""
    image, axes = node.inputs[0], attribute(node, "axes")
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = axes if given is None else given.tolist()
    if image is None or axes is None or graph.rank(image) != 4:
        return False
    return sorted(axis % 4 for axis in axes) == [2, 3]


def write_pool(graph: EditableGraph, node: ir.Node) -> None:
    """Write a mean over space as GlobalAveragePool, which has int8 kernels."""
    if attribute(node, "keepdims", 1):
        graph.substitute(node, "GlobalAveragePool", [node.inputs[0]])
        return
    pooled = graph.add("GlobalAveragePool", [node.inputs[0]], f"{node.outputs[0].name}_pooled")
    pool = maker(pooled)
    if pool is not None:
        pool.name, node.name = node.name, f"{node.name}_flatten"
    graph.substitute(node, "Flatten", [pooled])


def counts_padding(node: NodeProto | ir.Node) -> bool:
    """Return whether an AveragePool divides by the whole window where that holds padding."""
    if not attribute(node, "count_include_pad", 0):
        return False
    rule = attribute(node, "auto_pad", "NOTSET")
    rule = rule.decode() if isinstance(rule, bytes) else rule
    return rule not in ("NOTSET", "VALID") or any(attribute(node, "pads", ()))


def is_ambiguous(node: NodeProto | ir.Node) -> bool:
    """Return whether int8 kernels divide the last windows of an AveragePool by other numbers.

    With ceil_mode they may reach over the edge; with count_include_pad too, ONNX Runtime's integer
    kernel divides by all of the window, its float kernel by what lies in the image and its padding.
    """
    return bool(attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0))


def say_plainly(node: ir.Node) -> None:
    """Clear ceil_mode and count_include_pad of an AveragePool where neither changes anything."""
    if attribute(node, "count_include_pad", 0) and not counts_padding(node):
        set_attribute(node, "count_include_pad", 0)
    if attribute(node, "ceil_mode", 0) and _fits(node):
        set_attribute(node, "ceil_mode", 0)


def _fits(node: ir.Node) -> bool:
    """Return whether the last window ends with the image and its padding, as far as is known."""
    image, kernel = node.inputs[0], list(attribute(node, "kernel_shape", ()))
    sizes = list(image.shape)[2:] if image is not None and image.shape else []
    rule = attribute(node, "auto_pad", "NOTSET")
    if len(sizes) != len(kernel) or rule != "NOTSET" or "dilations" in node.attributes:
        return False
    pads = attribute(node, "pads", [0] * 2 * len(kernel))
    steps = attribute(node, "strides", [1] * len(kernel))
    return all(
        isinstance(size, int) and (size + pads[d] + pads[d + len(kernel)] - kernel[d]) % step == 0
        for d, (size, step) in enumerate(zip(sizes, steps, strict=True))
    )


def is_convolution(node: ir.Node) -> bool:
    """Return whether an AveragePool is a depthwise Conv: all windows have the same divisor."""
    image = node.inputs[0]
    channels = image.shape[1] if image is not None and image.shape else None
    return counts_padding(node) and not is_ambiguous(node) and isinstance(channels, int)


def write_convolution(graph: EditableGraph, node: ir.Node) -> None:
    """Write an AveragePool of which ``is_convolution`` holds as a depthwise Conv.

    All its weights are alike, so that int8 holds them exactly. OpenVINO pools integers and counts
    padding as code 0 where that stands for the smallest value, not for zero.
    """
    image = node.inputs[0]
    if image is None or image.shape is None or not isinstance(image.shape[1], int):
        raise TypeError(f"{node.name} has no known channels")
    kernel = [int(side) for side in attribute(node, "kernel_shape")]
    names = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
    given = {name: attribute(node, name) for name in names if name in node.attributes}
    shape = (image.shape[1], 1, *kernel)
    weight = np.full(shape, 1 / math.prod(kernel), np.float32)
    mean = graph.add_constant(f"{node.name}_mean", weight)
    graph.substitute(node, "Conv", [image, mean], group=shape[0], **given)
