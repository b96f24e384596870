"""Transposes, and reshapes of dimensions of 1, that exporters write around layers: cancelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from compress.graph.model import attribute
from compress.graph.values import Array, EditableGraph, constant, maker, set_attribute, set_input

_ALONE = frozenset(  # every number by itself, with limits that are numbers
    {"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Selu", "Celu"}
    | {"Tanh", "Erf", "Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu"}
    | {"Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Cast"}
)
_TOGETHER = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min"})
_MOST_ROUNDS = 16
Order = tuple[int, ...]  # of a Transpose: dimension i of what it makes is order[i] of what it reads


def cancel_transposes(graph: EditableGraph) -> None:
    """Move transposes behind what follows them until they meet their inverse, and drop both.

    Exporters from frameworks whose channels are last write two around every layer. BatchNorm and
    activations between them are no part of the layer then, for runtimes nor for int8. A graph
    that has as many afterwards stays as it was.
    """
    count = sum(1 for _ in graph.of_type("Transpose"))
    if count < 2:
        return
    before = graph.model.clone()
    count += write_as_transposes(graph)
    for _ in range(_MOST_ROUNDS):
        graph.body.sort()
        moved = [_moved(graph, node) for node in graph.nodes if node.graph is graph.body]
        graph.sweep()
        if not any(moved):
            break
    if sum(1 for _ in graph.of_type("Transpose")) >= count:
        graph.model, graph.body = before, before.graph


def _moved(graph: EditableGraph, node: ir.Node) -> bool:
    """Move the transposes before ``node`` behind it, or into it; return whether that was done."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1 or not node.inputs:
        return False
    if node.op_type == "Transpose":
        return _joined(graph, node)
    rule = _RULES.get(node.op_type)
    orders = {order for value in node.inputs if (order := _order_of(maker(value))) is not None}
    return rule is not None and len(orders) == 1 and rule(graph, node, orders.pop())


def _order_of(node: ir.Node | None) -> Order | None:
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    order, given = attribute(node, "perm"), node.inputs[0]
    if order is None and given is not None and given.shape is not None:
        order = range(given.shape.rank())[::-1]
    return None if order is None else tuple(order)


def _joined(graph: EditableGraph, node: ir.Node) -> bool:
    """Let a Transpose of a Transpose do both, or nothing where one undoes the other."""
    before, second = maker(node.inputs[0]), _order_of(node)
    first = _order_of(before)
    if before is None or first is None or second is None:
        return False
    order, source, made = [first[axis] for axis in second], before.inputs[0], node.outputs[0]
    if source is None or (order == sorted(order) and made.is_graph_output()):
        return False
    if order == sorted(order):
        graph.replace(made, source)
    else:
        node.replace_input_with(0, source)
        set_attribute(node, "perm", order)
    return True


def _alone(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    if _order_of(maker(node.inputs[0])) is None:
        return False
    if any(value is not None and _size(value) != 1 for value in node.inputs[1:]):
        return False
    _read_before(node, [0])
    return _write_behind(graph, node, order)


def _together(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    """Two values alike, or one and a constant, which is transposed here."""
    turned: dict[int, Array | None] = {}
    for index, value in enumerate(node.inputs):
        if _order_of(maker(value)) is not None:
            continue
        array = constant(value)
        if array is None or array.ndim > len(order):
            return False
        turned[index] = None if array.size == 1 else _undone(array, order)
    for index, array in turned.items():
        if array is not None:
            hint = f"{node.outputs[0].name}_constant"
            node.replace_input_with(index, graph.add_constant(hint, array))
    _read_before(node, [index for index in range(len(node.inputs)) if index not in turned])
    return _write_behind(graph, node, order)


def _undone(array: Array, order: Order) -> Array:
    """Return ``array``, which fits what a Transpose makes, as it fits what that reads."""
    whole = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return np.ascontiguousarray(whole.transpose(np.argsort(order)))


def _concat(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    if any(_order_of(maker(value)) is None for value in node.inputs):
        return False
    set_attribute(node, "axis", order[attribute(node, "axis", 0)])
    _read_before(node, range(len(node.inputs)))
    return _write_behind(graph, node, order)


def _pad(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or len(node.inputs) > 3 or pads.size != 2 * len(order):
        return False
    turned = pads.reshape(2, -1)[:, np.argsort(order)].reshape(-1)
    node.replace_input_with(1, graph.add_constant(f"{node.outputs[0].name}_pads", turned))
    _read_before(node, [0])
    return _write_behind(graph, node, order)


def _slice(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    starts, axes = (constant(given) for given in (*node.inputs, None, None)[1:4:2])
    is_counted = starts is not None and (len(node.inputs) < 4 or axes is not None)
    if starts is None or not is_counted or _order_of(maker(node.inputs[0])) is None:
        return False
    axes = np.arange(starts.size) if axes is None else axes % len(order)
    turned = np.array([order[axis] for axis in axes], np.int64)
    set_input(node, 3, graph.add_constant(f"{node.outputs[0].name}_axes", turned))
    _read_before(node, [0])
    return _write_behind(graph, node, order)


def _mean(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    """A mean over some dimensions; those that are left may be in order without a Transpose."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = attribute(node, "axes") if given is None else given.tolist()
    if axes is None or (given is None and len(node.inputs) > 1):
        return False
    axes = [axis % len(order) for axis in axes]
    left = [old for axis, old in enumerate(order) if axis not in axes]
    keeps = attribute(node, "keepdims", 1)
    if not keeps and left != sorted(left):
        return False
    turned = np.array(sorted(order[axis] for axis in axes), np.int64)
    if given is None:
        set_attribute(node, "axes", turned.tolist())
    else:
        set_input(node, 1, graph.add_constant(f"{node.outputs[0].name}_axes", turned))
    _read_before(node, [0])
    return _write_behind(graph, node, order) if keeps else True


def _size(value: ir.Value) -> int | None:
    array = constant(value)
    return None if array is None else int(array.size)


def _read_before(node: ir.Node, indices: Sequence[int]) -> None:
    for index in indices:
        before = maker(node.inputs[index])
        if before is not None:
            node.replace_input_with(index, before.inputs[0])


def _write_behind(graph: EditableGraph, node: ir.Node, order: Order) -> bool:
    """Let what reads ``node`` read it transposed."""
    made = node.outputs[0]
    behind = graph.add("Transpose", [made], f"{made.name}_transposed", perm=list(order))
    reader = maker(behind)
    behind.type, behind.shape, made.shape = made.type, made.shape, None
    if behind.shape is not None:
        sizes = [behind.shape[axis] for axis in np.argsort(order)]
        made.shape = ir.Shape(sizes)
    graph.replace(made, behind, keep=[reader] if reader is not None else [])
    return True


_RULES: dict[str, Callable[[EditableGraph, ir.Node, Order], bool]] = {
    **dict.fromkeys(_ALONE, _alone),
    **dict.fromkeys(_TOGETHER, _together),
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "ReduceMean": _mean,
}


_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
Picked = Sequence[int | None]  # of each dimension that is made: the one that is read; None: a 1


def drop_reshapes(graph: EditableGraph) -> None:
    """Let what reads a tensor whose shape changed, and changed back, read it as it was.

    A pool, a Squeeze and a Reshape to one pixel again keep runtimes from one kernel for all of it.
    A target that begins with -1 or with a number of images hides the batch.
    """
    for node in graph.of_type(*_RESHAPES):
        made, source, picked = node.outputs[0], node.inputs[0], _picked(node)
        while picked is not None and source is not None and not made.is_graph_output():
            if _is_whole(picked, source):
                graph.replace(made, source)
                break
            before = maker(source)
            inner = _picked(before)
            picked = inner and [None if axis is None else inner[axis] for axis in picked]
            source = before.inputs[0] if before is not None else None
    graph.sweep()


def write_as_transposes(graph: EditableGraph) -> int:
    """Write (B, 1, 1, C) to (B, C, 1, 1) and the like as Transpose; return how many."""
    count = 0
    for node in list(graph.of_type(*_RESHAPES)):
        picked, source = _picked(node), node.inputs[0]
        if picked is None or source is None or source.shape is None or not picked:
            continue
        ones = (axis for axis in range(source.shape.rank()) if axis not in picked)
        if len(picked) == source.shape.rank():
            order = [next(ones) if axis is None else axis for axis in picked]
            graph.substitute(node, "Transpose", [source], perm=order)
            count += 1
    return count


def _picked(node: ir.Node | None) -> Picked | None:
    """Return which dimensions ``node`` hands on, in order, if it changes those of 1 alone."""
    if node is None or node.op_type not in _RESHAPES or node.domain not in ("", "ai.onnx"):
        return None
    given, result = node.inputs[0], node.outputs[0]
    if given is None or given.shape is None or result.shape is None:
        return None
    read, made = given.shape, result.shape
    kept, left = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (read, made))
    pairs = [(read[old], made[new]) for old, new in zip(kept, left, strict=False)]
    known = [pair for pair in pairs if all(isinstance(size, int) and size for size in pair)]
    free = [pair for pair in pairs if not any(isinstance(size, int) for size in pair)]
    # As many numbers are made as are read: one size that is not known is the same in both.
    is_told = len(free) <= 1 and len(known) + len(free) == len(kept) == len(left)
    if not is_told or any(old != new for old, new in known):
        return None
    origin = dict(zip(left, kept, strict=True))
    return [origin.get(axis) for axis in range(len(made))]


def _is_whole(picked: Picked, source: ir.Value) -> bool:
    """Return whether these dimensions are all of ``source``, as they were."""
    shape = source.shape
    return (
        shape is not None
        and len(picked) == len(shape)
        and all(
            axis == place or (axis is None and shape[place] == 1)
            for place, axis in enumerate(picked)
        )
    )
