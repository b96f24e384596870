"""Means, padding, hard-swish and batches of reshapes, written as runtimes compute them in int8."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import attribute
from compress.graph.values import (
    EditableGraph,
    constant,
    is_never_negative,
    is_read_once,
    maker,
    set_attribute,
)

_HARD_SWISH_OPSET = 14  # the first with HardSwish


def join_hard_swish(graph: EditableGraph) -> None:
    """Write x * clip(x + 3, 0, 6) / 6, in any order, as HardSwish.

    Exporters of older opsets write four operators. Quantized one by one they cost more time than
    the convolution before them saves, and each adds its noise. A gate clip(x + 3, 0, 6) / 6 becomes
    HardSigmoid.
    """
    if graph.body.opset_imports.get("", 0) < _HARD_SWISH_OPSET:
        return
    found = [(node, _swish(node), _gate(node)) for node in graph.nodes]
    for node, swish, gate in found:
        if swish is not None:
            graph.substitute(node, "HardSwish", [swish])
        elif gate is not None:
            graph.substitute(node, "HardSigmoid", [gate], alpha=1 / 6)


def _swish(node: ir.Node) -> ir.Value | None:
    whole = _sixth(node)
    product = _made_by(whole, "Mul")
    if product is not None and whole is not None and is_read_once(whole):
        for source, gate in (product.inputs, product.inputs[::-1]):
            if source is not None and _clipped(gate) is source:
                return source
    if node.op_type == "Mul" and all(constant(value) is None for value in node.inputs):
        for source, gate in (node.inputs, node.inputs[::-1]):
            if source is not None and _gated(gate) is source:
                return source
    return None


def _gate(node: ir.Node) -> ir.Value | None:
    return _clipped(_sixth(node))


def _gated(value: ir.Value | None) -> ir.Value | None:
    """Return x where ``value`` is clip(x + 3, 0, 6) / 6 in whatever form."""
    node = maker(value)
    if node is None or node.op_type != "HardSigmoid":
        return None if node is None else _gate(node)
    is_sixth = math.isclose(attribute(node, "alpha", 0.2), 1 / 6, rel_tol=1e-3)
    return node.inputs[0] if is_sixth and attribute(node, "beta", 0.5) == 0.5 else None


def _sixth(node: ir.Node) -> ir.Value | None:
    """Return what ``node`` divides by six, or None."""
    if node.op_type not in ("Div", "Mul") or len(node.inputs) != 2:
        return None
    for position, wanted in ((1, 6.0), (1, 1 / 6), (0, 1 / 6)):
        if (wanted == 6.0) == (node.op_type == "Div") and _is(node.inputs[position], wanted):
            return node.inputs[1 - position]
    return None


def _clipped(value: ir.Value | None) -> ir.Value | None:
    """Return x where ``value`` is clip(x + 3, 0, 6), or None."""
    clip = _made_by(value, "Clip")
    if clip is None or len(clip.inputs) < 3:
        return None
    if not (_is(clip.inputs[1], 0.0) and _is(clip.inputs[2], 6.0)):
        return None
    add = _made_by(clip.inputs[0], "Add")
    for position in (0, 1) if add is not None else ():
        if add is not None and _is(add.inputs[position], 3.0):
            return add.inputs[1 - position]
    return None


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = maker(value)
    return node if node is not None and node.op_type == kind else None


def _is(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return (
        array is not None
        and array.size == 1
        and math.isclose(float(array.reshape(-1)[0]), number, rel_tol=1e-4, abs_tol=1e-9)
    )


def is_spatial_mean(graph: EditableGraph, node: ir.Node) -> bool:
    """Return whether a ReduceMean or AveragePool is one over all of an image."""
    image, axes = node.inputs[0], attribute(node, "axes")
    if node.op_type == "AveragePool":
        sides = list(image.shape)[2:] if image is not None and image.shape else []
        is_padded = attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        is_padded |= any(attribute(node, "pads", ()))
        return len(sides) == 2 and sides == list(attribute(node, "kernel_shape")) and not is_padded
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


def pad_plainly(node: ir.Node) -> None:
    """Write in numbers how a ConvTranspose pads, where it names a rule: no size counts there.

    OpenVINO follows the rule only where it knows the size of the image.
    """
    rule, weight = attribute(node, "auto_pad", "NOTSET"), node.inputs[1]
    if rule == "NOTSET" or "output_shape" in node.attributes or not weight or not weight.shape:
        return
    kernel = np.array(attribute(node, "kernel_shape", list(weight.shape)[2:]), np.int64)
    steps, dilations, more = (
        np.array(attribute(node, name, [usual] * len(kernel)), np.int64)
        for name, usual in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    total = (kernel - 1) * dilations + 1 + more - steps  # an image grows by its strides
    if rule == "VALID":
        total = np.zeros_like(kernel)
    if (total < 0).any():
        return
    smaller, larger = total // 2, total - total // 2
    ends = (smaller, larger) if rule == "SAME_UPPER" else (larger, smaller)
    set_attribute(node, "auto_pad", None)
    set_attribute(node, "pads", np.concatenate(ends).tolist())


def pad_every_axis(graph: EditableGraph, node: ir.Node) -> None:
    """Write a Pad of some axes as one of all.

    ONNX Runtime moves the transposes of its int8 kernels through it as if it were one.
    """
    pads, axes = (constant(value) for value in (*node.inputs, None, None, None)[1:4:2])
    rank = graph.rank(node.inputs[0]) if axes is not None and node.inputs[0] is not None else None
    if pads is not None and axes is not None and rank is not None:
        whole = np.zeros((2, rank), np.int64)
        whole[:, axes % rank] = pads.reshape(2, -1)
        node.replace_input_with(1, graph.add_constant(f"{node.name}_pads", whole.reshape(-1)))
        node.resize_inputs(3)


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


_CARRIES = frozenset({"Unsqueeze", "Squeeze", "Cast", "Identity"})  # one number, as it was


def constant_targets(graph: EditableGraph) -> dict[ir.Node, NDArray[np.int64]]:
    """Return a constant target for each Reshape whose own begins with its batch.

    Exporters write ``x.view(x.size(0), C, -1)`` as Concat(Gather(Shape(t), 0), C, -1). Where t has
    the batch of what is reshaped, the constant (0, C, -1) is the same: 0 keeps the dimension.
    """
    computed = [n for n in graph.of_type("Reshape") if constant(n.inputs[1]) is None]
    if computed:
        graph.infer_shapes()
    targets = {node: _target(node) for node in computed}
    return {node: target for node, target in targets.items() if target is not None}


def keep_batch(graph: EditableGraph) -> None:
    """Give Reshapes their constant targets.

    With a target computed at run time, OpenVINO joins int8 tensors wrongly behind the Reshape.
    """
    for node, target in constant_targets(graph).items():
        set_target(graph, node, target)


def set_target(graph: EditableGraph, node: ir.Node, target: NDArray[np.int64]) -> None:
    """Give a Reshape a constant target."""
    node.replace_input_with(1, graph.add_constant(f"{node.outputs[0].name}_shape", target))


def _target(node: ir.Node) -> NDArray[np.int64] | None:
    concat = maker(node.inputs[1])
    if concat is None or concat.op_type != "Concat" or attribute(node, "allowzero", 0):
        return None
    rest = [_number(value) for value in concat.inputs[1:]]
    tensor = _whose_batch(concat.inputs[0])
    if tensor is None or any(value is None for value in rest):
        return None
    batch = _batch(tensor)
    if tensor is not node.inputs[0] and (not batch or _batch(node.inputs[0]) != batch):
        return None
    return np.concatenate(
        [[0], *(value.reshape(-1) for value in rest if value is not None)]
    ).astype(np.int64)


def _batch(value: ir.Value | None) -> str | None:
    """Return the name of a free first dimension."""
    shape = None if value is None else value.shape
    first = shape[0] if shape else None
    return first.value if isinstance(first, ir.SymbolicDim) else None


def _whose_batch(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor whose first dimension ``value`` holds, or None."""
    node = _before(maker(value), _CARRIES)
    if node is None or node.op_type not in ("Gather", "Slice"):
        return None
    wanted = [0] if node.op_type == "Gather" else [0, 1]  # an index; a start and an end
    values = [_number(given) for given in node.inputs[1 : 1 + len(wanted)]]
    if [v.reshape(-1).tolist() for v in values if v is not None] != [[w] for w in wanted]:
        return None
    shape = _before(maker(node.inputs[0]), {"Cast"})
    is_whole = shape is not None and shape.op_type == "Shape" and not shape.attributes
    return shape.inputs[0] if shape is not None and is_whole else None


def _before(node: ir.Node | None, kinds: Container[str]) -> ir.Node | None:
    """Return the first node, from ``node`` on upwards, that is of none of these kinds."""
    while node is not None and node.op_type in kinds:
        node = maker(node.inputs[0])
    return node


def _number(value: ir.Value | None) -> NDArray[np.int64] | None:
    """Return the integers of a constant, or None."""
    array, node = constant(value), maker(value)
    while array is None and node is not None and node.op_type in _CARRIES:
        array, node = constant(node.inputs[0]), maker(node.inputs[0])
    return None if array is None else array.astype(np.int64)


_SWAPPED = [1, 0, 2, 3]  # images and channels


def take_padding(graph: EditableGraph) -> None:
    """Let convolutions and max-pools pad by themselves, where a Pad of zeros is in front of them.

    No runtime pads integers in one kernel with the layer. A pool pads with nothing, which is zero
    among values that are never negative.
    """
    for node in graph.of_type("Conv", "MaxPool"):
        pad = maker(node.inputs[0])
        border = _border(pad) if pad is not None else None
        if pad is None or border is None or not _may_pad(node, border, pad.inputs[0]):
            continue
        own = np.array(attribute(node, "pads", [0] * border.size), np.int64)
        set_attribute(node, "pads", (own + border.reshape(-1)).tolist())
        set_attribute(node, "auto_pad", None)
        node.replace_input_with(0, pad.inputs[0])


def _border(pad: ir.Node) -> NDArray[np.int64] | None:
    """Return how many zeros ``pad`` adds around images, (2, dimensions); None if it does more."""
    pads, value, axes = (constant(given) for given in (*pad.inputs, None, None, None)[1:4])
    is_zero = (
        len(pad.inputs) < 3 or pad.inputs[2] is None or (value is not None and not value.any())
    )
    by_zeros = attribute(pad, "mode", "constant") == "constant" and is_zero
    if pad.op_type != "Pad" or pads is None or axes is not None or not by_zeros:
        return None
    ends = pads.reshape(2, -1)
    return None if ends[:, :2].any() or (ends < 0).any() else ends[:, 2:]


def _may_pad(node: ir.Node, border: NDArray[np.int64], image: ir.Value | None) -> bool:
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    if node.op_type == "Conv":
        return True
    kernel = attribute(node, "kernel_shape")
    own = np.array(attribute(node, "pads", [0] * border.size), np.int64).reshape(2, -1)
    whole = not attribute(node, "ceil_mode", 0) and len(node.outputs) == 1
    return whole and bool((border + own < kernel).all()) and is_never_negative(image)


def take_dilation(graph: EditableGraph) -> None:
    """Write a convolution over every second pixel, as TensorFlow Lite does it, as a dilated one.

    The pixels of one image become several images (SpaceToBatch), and are put together again.
    """
    for node in graph.of_type("Conv"):
        apart, together = _read_apart(node), _put_together(node)
        if apart is None or together is None:
            continue
        (image, step), (whole, back) = apart, together
        plain = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        given = [attribute(node, name, (0,)) for name in ("pads", "strides", "dilations")]
        is_dense = not any(given[0]) and all(set(each) <= {0, 1} for each in given[1:])
        if step != back or not plain or not is_dense:
            continue
        set_attribute(node, "dilations", [step, step])
        node.replace_input_with(0, image)
        made = node.outputs[0]
        made.shape = None
        graph.substitute(whole, "Transpose", [made], perm=_SWAPPED)


def _read_apart(node: ir.Node) -> tuple[ir.Value, int] | None:
    """Return the images whose pixels ``node`` reads apart, and how far apart."""
    found = list(_upwards(node, ("Transpose", "SpaceToDepth", "Transpose")))
    if len(found) < 3 or not _swaps(found[0], found[2]) or found[2].inputs[0] is None:
        return None
    return found[2].inputs[0], attribute(found[1], "blocksize")


def _put_together(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the node that alone puts pixels that ``node`` makes together, and how far apart."""
    swap = _only_reader(node)
    whole = _only_reader(swap) if swap is not None else None
    if swap is None or whole is None or whole.op_type != "DepthToSpace" or not _swaps(swap):
        return None
    return (
        (whole, attribute(whole, "blocksize")) if attribute(whole, "mode", "DCR") == "DCR" else None
    )


def _upwards(node: ir.Node, kinds: tuple[str, ...]) -> Iterator[ir.Node]:
    for kind in kinds:
        before = maker(node.inputs[0])
        if before is None or before.op_type != kind:
            return
        yield before
        node = before


def _only_reader(node: ir.Node) -> ir.Node | None:
    made = node.outputs[0]
    return made.consumers()[0] if is_read_once(made) else None


def _swaps(*nodes: ir.Node) -> bool:
    return all(
        node.op_type == "Transpose" and list(attribute(node, "perm", ())) == _SWAPPED
        for node in nodes
    )
