"""Padding and dilation that exporters write around a layer, written as the layer's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compress.graph.model import attribute
from compress.graph.values import (
    EditableGraph,
    constant,
    is_never_negative,
    is_read_once,
    maker,
    set_attribute,
)

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
