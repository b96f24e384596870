"""Cuts of an ONNX graph: what crosses, also in int8, the graphs of both parts, which to time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, helper

from compress.errors import UsageError, did_you_mean
from compress.graph.model import reads
from compress.graph.shapes import real_inputs, shapes_of
from compress.measure import complete_shapes, node_macs

MEASURED = 8  # cut points of the front that are timed
OPSET = 11  # DynamicQuantizeLinear


@dataclass(frozen=True)
class Cut:
    """A way to split the nodes of a graph: what is computed before ``tensor``, and the rest."""

    tensor: str
    crossing: tuple[str, ...]  # tensors that the tail needs from the head, inputs of the graph last
    bytes: int | None  # of them, for one image; None where a shape is not known
    head_macs_pct: float
    head: int = field(repr=False)  # nodes of the head, as bits


class Parts(NamedTuple):
    """The graphs on both sides of a cut."""

    head: ModelProto
    tail: ModelProto


class Cuttable:
    """An ONNX graph, and who depends on whom in it."""

    def __init__(self, model: ModelProto) -> None:
        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self.inputs = [value.name for value in real_inputs(self.model)]
        self.outputs = [value.name for value in graph.output]
        self.shapes, self.kinds = complete_shapes(model)
        self.reads = [reads(node) for node in graph.node]
        self.maker = {name: n for n, node in enumerate(graph.node) for name in node.output if name}
        self._macs = node_macs(model, self.shapes)
        self._declare_shapes()
        self._names = {*self.maker, *constants, *self.inputs}
        self._before: list[int] = []  # of each node: itself and all it depends on, as bits
        self._live = 0  # nodes that depend on an input of the graph, as bits
        for number, names in enumerate(self.reads):
            makers = [self.maker[name] for name in names if name in self.maker]
            bits = 1 << number
            for maker in makers:
                bits |= self._before[maker]
            self._before.append(bits)
            if bits & self._live or not names.isdisjoint(self.inputs):
                self._live |= 1 << number

    def candidates(self) -> list[str]:
        """Return the tensors that depend on the graph's inputs, in order."""
        return [name for name, maker in self.maker.items() if self._live >> maker & 1]

    def cut(self, tensor: str) -> Cut:
        """Return the cut before which ``tensor`` is computed.

        Raises:
            UsageError: there is no such tensor, or nothing would be left for the tail.
        """
        known = self.candidates()
        if tensor not in known:
            what = "is an input or a constant" if tensor in self._names else "is no tensor of it"
            raise UsageError(
                f"cannot be cut at {tensor!r}, which {what}{did_you_mean(tensor, known)}",
                expected=f"the output of a node, such as {known[len(known) // 2]!r}"
                if known
                else "a graph that computes something with its inputs",
            )
        bits = self._before[self.maker[tensor]] & self._live
        rest = self._live & ~bits
        if not rest:
            raise UsageError(
                f"cut at {tensor!r}, nothing is left for the tail",
                fix="Name a tensor that other nodes compute with",
            )
        needed, made = self._read_by(rest), self._made_by(bits)
        crossing = tuple(name for name in (*made, *self.inputs) if name in needed)
        work = sum(self._macs.get(name, 0) for name in made)
        share = 100 * work / max(1, sum(self._macs.values()))
        return Cut(tensor, crossing, self.size(crossing), share, bits)

    def _declare_shapes(self) -> None:
        """Write down shapes that inference cannot tell: a runtime asks for those of inputs."""
        graph, (inferred, _) = self.model.graph, shapes_of(self.model)
        sizes = next(v for v in graph.input if v.name in self.inputs).type.tensor_type.shape.dim
        batch = "batch" if sizes and sizes[0].dim_value < 1 else None
        for name in self.maker:
            shape = self.shapes.get(name) or (None,)
            if None in shape or None not in inferred.get(name, (None,)):
                continue
            declared = shape if batch is None else (batch, *shape[1:])
            for value in [value for value in graph.value_info if value.name == name]:
                graph.value_info.remove(value)
            graph.value_info.append(helper.make_tensor_value_info(name, self.kinds[name], declared))

    def size(self, tensors: Sequence[str]) -> int | None:
        """Return the bytes of tensors for one image; None where a shape is not known."""
        total = 0
        for name in tensors:
            shape = self.shapes.get(name)
            if shape is None or None in shape or not self.kinds.get(name):
                return None
            count = math.prod(size or 1 for size in shape)
            total += count * helper.tensor_dtype_to_np_dtype(self.kinds[name]).itemsize
        return total

    def floats(self, cut: Cut) -> list[str]:
        """Return what crosses in float from the head, and could cross in int8."""
        made = [name for name in cut.crossing if name not in self.inputs]
        return [name for name in made if self.kinds.get(name) == TensorProto.FLOAT]

    def parts(self, cut: Cut) -> Parts:
        """Return both graphs: the head gives what crosses, and outputs that it has computed.

        Raises:
            UsageError: the type of a tensor that crosses is not known.
        """
        for name in cut.crossing:
            if not self.kinds.get(name):
                raise UsageError(
                    f"cannot be cut at {cut.tensor!r}: the type of {name!r}, which crosses too, is "
                    "not known",
                    fix="Cut elsewhere, or export the network again with shapes",
                )
        made, used = self._made_by(cut.head), self._read_by(cut.head)
        sent = [name for name in cut.crossing if name in made]
        own = [name for name in self.outputs if name in made and name not in sent]
        inputs = [name for name in self.inputs if name in used]
        shared = [name for name in cut.crossing if name not in made]
        later = [name for name in self.outputs if name not in made]
        return Parts(
            self._extracted("head", inputs, [*sent, *own]),
            self._extracted("tail", [*shared, *sent], later),
        )

    def _made_by(self, nodes: int) -> list[str]:
        return [name for name, maker in self.maker.items() if nodes >> maker & 1]

    def _read_by(self, nodes: int) -> set[str]:
        return set[str]().union(*(names for n, names in enumerate(self.reads) if nodes >> n & 1))

    def _extracted(self, name: str, inputs: list[str], outputs: list[str]) -> ModelProto:
        """Return the graph between tensors, with the constants and functions that it needs."""
        whole = ir.from_proto(self.model)
        graph = ir.convenience.extract(whole.graph, inputs, outputs)
        graph.name = name
        part = ir.Model(
            graph,
            ir_version=whole.ir_version,
            producer_name=whole.producer_name,
            functions=list(whole.functions.values()),
            metadata_props=whole.metadata_props if name == "head" else None,
        )
        return ir.to_proto(part)


def front(graph: Cuttable) -> list[Cut]:
    """Return cuts that no other beats in both the bytes that cross and the work of the edge.

    Where there are more than ``MEASURED``, so many of them, spread evenly.
    """
    found: dict[int, Cut] = {}
    for tensor in graph.candidates():
        if any(tensor in names for names in graph.reads):
            cut = graph.cut(tensor)
            if cut.crossing and cut.bytes is not None:
                found.setdefault(cut.head, cut)
    chosen: list[Cut] = []
    least = float("inf")
    for cut in sorted(found.values(), key=lambda cut: (cut.head_macs_pct, cut.bytes)):
        if cut.bytes is not None and cut.bytes < least:
            chosen.append(cut)
            least = cut.bytes
    spread = np.unique(np.linspace(0, len(chosen) - 1, min(MEASURED, len(chosen))).round())
    return [chosen[int(number)] for number in spread]


def check_opset(model: ModelProto) -> None:
    """Check that a graph can hold what quantizes at run time.

    Raises:
        UsageError: it is older.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        raise UsageError(
            f"int8 at the cut needs opset {OPSET}, the file has {opset}",
            fix="Export it again with a newer opset, or split it without int8",
        )


def quantize_between(parts: Parts, tensors: Sequence[str]) -> None:
    """Let ``tensors`` cross as uint8 with scale and zero point; both graphs are changed."""
    head, tail = (part.graph for part in parts)
    rest = list(tail.node)
    del tail.node[:]
    for name in tensors:
        packed, scale, zero = _packed(name)
        scalars = [f"{scale}_scalar", f"{zero}_scalar"]
        head.node.append(helper.make_node("DynamicQuantizeLinear", [name], [packed, *scalars]))
        # scale and zero point get a dimension that sessions want
        head.node.extend(_reshaped(name, [1], zip(scalars, (scale, zero), strict=True)))
        tail.node.extend(_reshaped(name, [], zip((scale, zero), scalars, strict=True)))
        tail.node.append(helper.make_node("DequantizeLinear", [packed, *scalars], [name]))
        _rename(head.output, name)
        _rename(tail.input, name)
    tail.node.extend(rest)


def _rename(values: Any, name: str) -> None:
    """Put what crosses for a float tensor in its place: values, scale and zero point."""
    packed, scale, zero = _packed(name)
    value = next(each for each in values if each.name == name)
    value.name, value.type.tensor_type.elem_type = packed, TensorProto.UINT8
    values.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, [1]))
    values.append(helper.make_tensor_value_info(zero, TensorProto.UINT8, [1]))


def _packed(name: str) -> tuple[str, str, str]:
    return f"{name}_uint8", f"{name}_scale", f"{name}_zero_point"


def _reshaped(name: str, dims: list[int], pairs: zip[tuple[str, str]]) -> list[NodeProto]:
    """Return what gives each of some tensors other dimensions."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(dims)], dims)
    return [
        helper.make_node("Constant", [], [f"{name}_dims"], value=shape),
        *(helper.make_node("Reshape", [old, f"{name}_dims"], [new]) for old, new in pairs),
    ]
