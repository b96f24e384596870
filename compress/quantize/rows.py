"""Inputs and outputs turned so that all begin with the batch, as calibration takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorShapeProto, ValueInfoProto, helper

from compress.errors import QuantizationError
from compress.graph.batch import graph_axes
from compress.graph.model import GraphIndex
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import write_qdq
from compress.quantize.images import Batch, Batches, Feed, by_name

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
