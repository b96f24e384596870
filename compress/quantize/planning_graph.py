"""The graph that ranges are planned on: images alone as inputs, a row for each, any batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorShapeProto, ValueInfoProto, helper, numpy_helper

from compress.errors import QuantizationError
from compress.graph.model import SAME_SCALE, GraphIndex, attribute, captured, graphs_in
from compress.graph.shapes import dims_of, graph_axes
from compress.graph.values import EditableGraph, constant, name_of
from compress.graph.weightless import infer_shapes
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import write_qdq
from compress.quantize.images import Batch, Batches, Feed, by_name, first_batch
from compress.quantize.sessions import CannotRunError, GraphSession, TooLongError, session_of

# Ops after which rows are no longer those of the images: sorted, chosen or positions.
SELECTING = frozenset(
    {"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero", "Unique", "Compress", "Hardmax"}
    | {"Equal"}  # of the largest value, by which the best class or a peak is found
)
LOOP_SECONDS = 5.0  # on one image; a Loop that takes longer is taken never to end


def selected_tensors(graph: GraphIndex) -> set[str]:
    """Return the tensors whose rows are no longer those of the images, by order or by choice."""
    selected: set[str] = set()
    for node in graph.nodes:
        if _selects(graph, node) or selected.intersection(node.input):
            selected.update(node.output)
    return selected


def _selects(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether the rows that ``node`` makes are no longer those of the images.

    A loop that ends by a value, as a decoder of text does, makes as many as it takes. Integers that
    are compared, as the codes of letters that a network reads, choose nothing by themselves.
    """
    if node.op_type == "Equal":
        return all(map(graph.is_float, node.input))
    if node.op_type != "Loop":
        return node.op_type in SELECTING
    body = next(item.g for item in node.attribute if item.name == "body")
    maker = next((each for each in body.node if body.output[0].name in each.output), None)
    return maker is not None and maker.op_type not in ("Identity", "Constant")


def planning_graph(prepared: ModelProto, batches: Batches) -> ModelProto:
    """Return ``prepared``, or a copy on which every input holds one row for each image.

    Inputs that are no images (a threshold, a size) become constants with the value they have in
    the calibration batches. A batch that the inputs leave free and the nodes inside fix is fixed.

    Raises:
        QuantizationError: such an input has another value in another batch, or a Loop does not end.
    """
    graph = GraphIndex(prepared)
    batch = first_batch(batches)
    if batch is None:
        return prepared
    first = {name: np.asarray(array) for name, array in by_name(batch, graph.inputs).items()}
    values = _parameters(graph, batches, first)
    copy = prepared
    if values:
        copy = deepcopy(prepared)
        kept = [value for value in copy.graph.input if value.name not in values]
        del copy.graph.input[:]
        copy.graph.input.extend(kept)
        copy.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    _check_loops(copy, first)
    return _with_true_batch(copy, first)


def judged_tensors(prepared: ModelProto) -> list[str]:
    """Return the float tensors that quantized and float graph are compared on.

    The outputs, before a cast to half precision; of one that is sorted, selected or a position,
    what it was made of: after a different order rows of different objects would be compared. Of one
    that joins tensors, as boxes in pixels and scores up to 1, each of these: the noise of the small
    ones would not be seen.
    """
    graph = GraphIndex(prepared)
    selected = selected_tensors(graph)
    found: list[str] = []
    edge = [output.name for output in prepared.graph.output]
    seen = set(edge)
    while edge:
        name = edge.pop(0)
        if name not in selected:
            maker = graph.producer.get(name)
            if maker is not None and maker.op_type == "Cast" and not graph.is_float(name):
                name = maker.input[0]
            if graph.is_float(name) and name in graph.producer:
                found += [part for part in joined_parts(graph, name) if part not in found]
            continue
        node = graph.producer[name]
        inside = sorted(captured(node) & graph.producer.keys())
        for before in (*graph.data_inputs(node), *inside):
            if before not in seen:
                seen.add(before)
                edge.append(before)
    return found


def joined_parts(graph: GraphIndex, tensor: str) -> list[str]:
    """Return the tensors that ``tensor`` joins, directly or through what only moves values."""
    node = graph.producer.get(tensor)
    while node is not None and _keeps_rows(node) and node.input[0] in graph.producer:
        node = graph.producer[node.input[0]]
    if node is None or node.op_type != "Concat":
        return [tensor]
    data = [name for name in graph.data_inputs(node) if name in graph.producer]
    return [part for name in dict.fromkeys(data) for part in joined_parts(graph, name)] or [tensor]


def _keeps_rows(node: NodeProto) -> bool:
    """Return whether ``node`` moves values alone, and the rows of images stay where they were."""
    order = attribute(node, "perm") if node.op_type == "Transpose" else None
    return node.op_type in SAME_SCALE and (not order or order[0] == 0)


def _parameters(graph: GraphIndex, batches: Batches, first: Feed) -> Feed:
    """Return the values of the inputs that are no images, by name."""
    values = {name: first[name] for name in graph.inputs if graph.is_parameter(name)}
    if not values:
        return {}
    for index, batch in enumerate(() if callable(batches) else batches):
        feed = by_name(batch, graph.inputs)
        for name, value in values.items():
            if not np.array_equal(feed[name], value):
                raise QuantizationError(
                    f"input {name!r} is no image and differs from that of batch 0",
                    where=f"calibration batch {index}",
                    expected="the same value in all batches",
                    fix="Quantize with the value that it will have in use",
                )
    return values


def _check_loops(model: ModelProto, first: Feed) -> None:
    """Raise QuantizationError if the graph has a Loop that does not end on the first image."""
    if not any(node.op_type == "Loop" for each in graphs_in(model.graph) for node in each.node):
        return
    graph = GraphIndex(model)
    free = all((graph.shapes.get(name) or (0,))[0] is None for name in graph.inputs)
    one = {name: first[name][:1] if free else first[name] for name in graph.inputs}
    try:
        session_of(model).run(None, one, seconds=LOOP_SECONDS)
    except TooLongError:
        raise QuantizationError(
            "a Loop of the graph does not end",
            where=f"after {LOOP_SECONDS:g} seconds, on the first image",
            fix="Check the number of its trips and its condition",
        ) from None
    except CannotRunError:
        return  # calibration says on which images


def _with_true_batch(model: ModelProto, first: Feed) -> ModelProto:
    """Return ``model``; a copy with a batch of 1 where the inputs say any and only 1 runs."""
    graph = GraphIndex(model)
    free = [name for name in graph.inputs if (graph.shapes.get(name) or (0,))[0] is None]
    rows = {name: first[name] for name in graph.inputs}
    if not free or not all(array.ndim and len(array) for array in rows.values()):
        return model
    session = session_of(model)
    one = {name: array[:1] for name, array in rows.items()}
    two = {name: np.repeat(array[:1], 2, 0) for name, array in rows.items()}
    if not _runs(session, one) or _runs(session, two):
        return model  # it takes any batch; or none, and calibration says why
    fixed = deepcopy(model)
    for value in fixed.graph.input:
        if value.name in free:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    fixed.graph.ClearField("value_info")
    infer_shapes(fixed)
    warnings.warn(
        "the inputs of the graph leave the batch free and its nodes fix it to 1: images are taken "
        "one by one",
        UserWarning,
        stacklevel=4,
    )
    return fixed


def _runs(session: GraphSession, feed: Feed) -> bool:
    try:
        session.run(None, feed)
    except CannotRunError:
        return False
    return True


def with_free_batch(prepared: ModelProto, feed: Feed) -> ModelProto | None:
    """Return ``prepared``, or a copy whose batch is free if it was fixed; names stay as they are.

    None where it cannot be freed: the copy must answer as the original does to ``feed``, at least
    twice as many images as the fixed batch.
    """
    first = dims_of(prepared.graph.input[0])
    fixed = first[0] if first else None
    if fixed is None:
        return prepared
    copy = _with_free_reshapes(prepared, fixed)
    for value in (*copy.graph.input, *copy.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == fixed:
            dims[0].dim_param = "batch"
    copy.graph.ClearField("value_info")
    try:
        infer_shapes(copy)
        return copy if _agrees(prepared, copy, feed, fixed) else None
    except (QuantizationError, ValueError):
        return None


def _with_free_reshapes(prepared: ModelProto, fixed: int) -> ModelProto:
    graph = EditableGraph(prepared)
    for node in graph.of_type("Reshape"):
        target = constant(node.inputs[1])
        if target is not None and target.size and target[0] == fixed:
            freed = np.array([0, *target[1:]], np.int64)  # 0 = as the input has it
            hint = f"{name_of(node.inputs[1])}_free"
            node.replace_input_with(1, graph.add_constant(hint, freed))
    return graph.to_model()


def _agrees(prepared: ModelProto, copy: ModelProto, feed: Feed, fixed: int) -> bool:
    parts = [{n: a[i : i + fixed] for n, a in feed.items()} for i in (0, fixed)]
    if any(len(array) < fixed for array in parts[1].values()):
        return False
    names = [o.name for o in prepared.graph.output if o.type.HasField("tensor_type")]
    session = session_of(prepared)
    alone = [session.run(names, part) for part in parts]
    both = {n: np.concatenate([parts[0][n], parts[1][n]]) for n in feed}
    together = session_of(copy).run(names, both)
    wanted = [np.concatenate(pair) for pair in zip(*alone, strict=True)]
    return bool(names) and all(
        got.shape == want.shape and np.allclose(got, want, rtol=1e-3, atol=1e-3)
        for got, want in zip(together, wanted, strict=True)
    )


_TURNED = ", batch first"  # what the name of such an input or output ends with


@dataclass(frozen=True)
class Rows:
    """Which inputs and outputs do not begin with the batch, as states of LSTMs do not.

    A graph to plan on begins with a Transpose of each such input, and ends in one of each such
    output; what is between has its names. The file that is written has none of them.
    """

    prepared: ModelProto  # as it is in the file
    axes: Mapping[str, int]  # the dimension that is the batch

    @property
    def inputs(self) -> list[str]:
        """All inputs, in the order of the file."""
        return GraphIndex(self.prepared).inputs

    @cached_property
    def shapes(self) -> dict[str, TensorShapeProto]:
        """Shapes of inputs and outputs; the file itself need not say those of its outputs."""
        values = (*self.prepared.graph.input, *self.prepared.graph.output)
        return {value.name: value.type.tensor_type.shape for value in values}

    @classmethod
    def of(cls, prepared: ModelProto) -> Rows:
        """Return where the batch is in the inputs and outputs of a prepared graph."""
        return cls(prepared, graph_axes(prepared))

    def first(self, model: ModelProto) -> ModelProto:
        """Return ``model``, or a copy whose inputs and outputs begin with the batch."""
        if not self.axes:
            return model
        turned = deepcopy(model)
        graph = turned.graph
        before = [self._turn(value, is_input=True) for value in self._found(graph.input)]
        after = [self._turn(value, is_input=False) for value in self._found(graph.output)]
        nodes = [*before, *graph.node, *after]
        del graph.node[:]
        graph.node.extend(nodes)
        return turned

    def first_of_each(self, batches: Batches) -> Batches:
        """Return ``batches`` for the graph that ``first`` returns."""
        if not self.axes.keys() & set(self.inputs):
            return batches
        if callable(batches):
            return lambda: self._each(batches())
        return list(self._each(batches))

    def put_back(self, plan: QuantPlan, written: ModelProto) -> tuple[QuantPlan, ModelProto]:
        """Return a plan and its Q/DQ graph for the graph as it was, before ``first``."""
        if not self.axes:
            return plan, written
        own = {n: each for n, each in plan.activations.items() if not n.endswith(_TURNED)}
        plan = plan.changed(
            activations=own,
            notes=tuple(line.replace(_TURNED, "") for line in plan.notes),
            trials=tuple(line.replace(_TURNED, "") for line in plan.trials),
        )
        return plan, write_qdq(self.prepared, plan)

    def _each(self, batches: Iterable[Batch]) -> Iterator[Feed]:
        inputs = self.inputs
        for index, batch in enumerate(batches):
            feed = by_name(batch, inputs, index)
            turned = feed.keys() & self.axes.keys()
            yield {name: np.asarray(feed[name]) for name in feed.keys() - turned} | {
                name + _TURNED: self._turned(name, np.asarray(feed[name]), index) for name in turned
            }

    def _turned(self, name: str, array: NDArray[Any], index: int) -> NDArray[Any]:
        axis = self.axes[name]
        if array.ndim <= axis:
            raise QuantizationError(
                f"has shape {array.shape}",
                where=f"calibration batch {index}, input {name!r}",
                expected=f"the batch in dimension {axis}",
            )
        return np.moveaxis(array, axis, 0)

    def _found(self, values: Iterable[ValueInfoProto]) -> list[ValueInfoProto]:
        return [value for value in values if value.name in self.axes]

    def _turn(self, value: ValueInfoProto, *, is_input: bool) -> NodeProto:
        """Turn an input or output of a graph; return the Transpose between it and what it was."""
        name, shape = value.name, value.type.tensor_type.shape
        known = self.shapes[name]
        order = [self.axes[name], *(a for a in range(len(known.dim)) if a != self.axes[name])]
        value.name = name + _TURNED
        shape.CopyFrom(TensorShapeProto(dim=[known.dim[axis] for axis in order]))
        if not is_input:
            return helper.make_node("Transpose", [name], [value.name], value.name, perm=order)
        back = [int(axis) for axis in np.argsort(order)]
        return helper.make_node("Transpose", [value.name], [name], value.name, perm=back)
