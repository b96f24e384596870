"""The first tensor inside two ONNX graphs that differs, found in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from compress.artifact import scratch
from compress.errors import EngineError, UsageError
from compress.evaluate.comparison import Drift, compare_outputs
from compress.graph import files as onnx_file
from compress.graph.model import reads
from compress.graph.shapes import shapes_of
from compress.progress import task
from compress.runtimes import open_session

MIB = 2**20
PLAIN: Mapping[str, Any] = {"onnxruntime": {"optimization": "none"}}  # nothing fused: every tensor

# Makers of no float tensor, whatever is known of it: shape inference knows no Q of a runtime's own
_NO_FLOATS = frozenset({"Constant", "QuantizeLinear", "DynamicQuantizeLinear"})
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
# What counts as divergence, dB: what rounding to this precision explains is not.
_EXPECTED_DB = {"int8": 20.0, "fp16": 40.0, "fp32": 60.0}


@dataclass(frozen=True)
class TensorDrift:
    """One tensor that both graphs compute."""

    name: str
    op: str  # the node of the reference that makes it
    drift: Drift
    drop_db: float  # SQNR lost since the worst of the tensors it is made from

    def to_json(self) -> dict[str, Any]:
        """Return this tensor as JSON-able data."""
        told = {"name": self.name, "op": self.op, **self.drift.to_json()}
        return {**told, "drop_db": self.drop_db} if math.isfinite(self.drop_db) else told


@dataclass(frozen=True)
class Bisection:
    """The first tensor at which two graphs differ, and all tensors compared."""

    first: TensorDrift | None  # first in graph order below the threshold; None: they agree
    steepest: TensorDrift | None  # where most is lost at once
    threshold_db: float
    tensors: tuple[TensorDrift, ...]  # all that were compared, in graph order

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        ends = {"first": self.first, "steepest": self.steepest}
        told = {name: found.to_json() if found else None for name, found in ends.items()}
        tensors = [tensor.to_json() for tensor in self.tensors]
        return {"threshold_db": self.threshold_db, **told, "tensors": tensors}


def bisect(
    reference: Path,
    candidate: Path,
    inputs: Sequence[tuple[NDArray[Any], ...]],
    *,
    threshold_db: float | None = None,
    memory_mib: float = 256.0,
) -> Bisection:
    """Return the first tensor at which ``candidate`` differs from ``reference``.

    **Method:** tensors are matched by name, as quantizing keeps the names of what it quantizes.
    Both graphs are cut so that they end in as many of these tensors as fit ``memory_mib``, run on
    the same images, and so on to the end of the graph. Ending in a tensor keeps a runtime from
    fusing across it, so this shows what the graphs say; a kernel that errs only when fused is
    found by comparing whole sessions.

    Args:
        reference: ONNX file.
        candidate: ONNX file of the same network: quantized, converted, or exported otherwise.
        inputs: Batches of images: for each the arrays both graphs are called with.
        threshold_db: SQNR below which a tensor has parted; by the candidate's precision if absent:
            20 dB for int8, 40 for fp16, 60 for fp32.
        memory_mib: Tensors of one graph held at a time, beyond what a runtime itself needs.

    Raises:
        UsageError: there are no images.
        EngineError: the graphs have no tensor in common, or a tensor has two shapes.
    """
    if not inputs:
        raise UsageError("there is nothing to compare on", expected="at least one batch of images")
    old, new = onnx_file.load(reference), onnx_file.load(candidate)
    if threshold_db is None:
        threshold_db = _EXPECTED_DB[precision_of(new)]
    names = _common_tensors(old, new)
    if not names:
        raise EngineError(
            "the two graphs have no tensor of the same name",
            where=f"{reference} and {candidate}",
            fix="Compare graphs that were made from one export",
        )
    sizes = _bytes_of(old, names, len(inputs[0][0]))
    drifts: dict[str, Drift] = {}
    with task("comparing tensors", len(names)) as counter:
        for portion in _portions(names, sizes, memory_mib * MIB):
            drifts |= _compare_portion((old, new), portion, inputs)
            counter.advance(len(portion))
    tensors = _in_order(old, drifts)
    parted = [tensor for tensor in tensors if tensor.drift.sqnr_db < threshold_db]
    falls = [tensor for tensor in tensors if tensor.drop_db > 0]
    return Bisection(
        first=parted[0] if parted else None,
        steepest=max(falls, key=lambda tensor: tensor.drop_db, default=None),
        threshold_db=threshold_db,
        tensors=tensors,
    )


def precision_of(model: onnx.ModelProto) -> str:
    """Return "int8", "fp16" or "fp32": what the products of a graph are computed in."""
    ops = {node.op_type for node in model.graph.node}
    if ops & {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}:
        return "int8"
    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return "fp16" if any(t.data_type in half for t in model.graph.initializer) else "fp32"


def part_for(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the part of ``model`` that computes ``names``, which become its outputs, in order."""
    producers = {name: node for node in model.graph.node for name in node.output if name}
    needed: set[str] = set()
    open_ends = list(names)
    while open_ends:
        name = open_ends.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in producers:
            open_ends += reads(producers[name])
    shapes, kinds = shapes_of(model)
    outputs = [
        helper.make_tensor_value_info(
            name,
            kinds.get(name, TensorProto.FLOAT),
            [None] * len(shapes[name]) if name in shapes else None,  # the rank, no sizes
        )
        for name in names
    ]
    part = helper.make_graph(
        [node for node in model.graph.node if needed & set(node.output)],
        model.graph.name or "part",
        list(model.graph.input),
        outputs,
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    whole = helper.make_model(part, opset_imports=list(model.opset_import))
    whole.ir_version = model.ir_version
    whole.functions.extend(model.functions)
    return whole


def _common_tensors(old: onnx.ModelProto, new: onnx.ModelProto) -> list[str]:
    """Return the float tensors that nodes of both graphs make, in the order of the first."""
    _, kinds = shapes_of(old)
    _, other_kinds = shapes_of(new)
    made = {
        name
        for node in new.graph.node
        if node.op_type not in _NO_FLOATS
        for name in node.output
        if other_kinds.get(name, TensorProto.FLOAT) in _FLOATS
    }
    return [
        name
        for node in old.graph.node
        if node.op_type not in _NO_FLOATS
        for name in node.output
        if name in made and kinds.get(name, TensorProto.FLOAT) in _FLOATS
    ]


def _bytes_of(model: onnx.ModelProto, names: Sequence[str], batch: int) -> dict[str, int]:
    """Return the size of each tensor; what is not known counts as the largest that is."""
    shapes, _ = shapes_of(model, batch)
    known = {
        name: 4 * math.prod(size or 0 for size in shapes[name])
        for name in names
        if name in shapes and None not in shapes[name]
    }
    largest = max(known.values(), default=MIB)
    return {name: known.get(name, largest) for name in names}


def _portions(names: Sequence[str], sizes: Mapping[str, int], limit: float) -> Iterator[list[str]]:
    """Yield ``names`` in portions of no more than ``limit`` together, at least one name each."""
    portion: list[str] = []
    for name in names:
        if portion and sum(sizes[n] for n in portion) + sizes[name] > limit:
            yield portion
            portion = []
        portion.append(name)
    yield portion


def _compare_portion(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    names: Sequence[str],
    inputs: Sequence[tuple[NDArray[Any], ...]],
) -> dict[str, Drift]:
    with scratch() as folder:
        files = []
        for label, graph in zip(("reference", "candidate"), graphs, strict=True):
            file = folder / f"{label}.onnx"
            onnx.save(
                part_for(graph, names),
                file,
                save_as_external_data=graph.ByteSize() > 2**30,
                location=f"{label}.data",
            )
            files.append(file)
        with open_session(files[0], PLAIN) as old, open_session(files[1], PLAIN) as new:
            return compare_outputs(old, new, inputs)


def _in_order(model: onnx.ModelProto, drifts: Mapping[str, Drift]) -> tuple[TensorDrift, ...]:
    """Return the drifts in graph order, each with what was lost since the tensors before it."""
    reached: dict[str, float] = {}  # SQNR of the worst tensor at or before each
    tensors = []
    for node in model.graph.node:
        before = min((reached[name] for name in node.input if name in reached), default=math.inf)
        for name in node.output:
            if name not in drifts:
                reached[name] = before
                continue
            own = drifts[name].sqnr_db
            reached[name] = own
            drop = before - own if math.isfinite(before) and math.isfinite(own) else 0.0
            tensors.append(TensorDrift(name, node.op_type, drifts[name], float(np.float64(drop))))
    return tuple(tensors)
