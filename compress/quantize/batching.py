"""A graph of a fixed batch size, made to take any, so that corrections see many images."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from compress.errors import QuantizationError
from compress.graph.shapes import dims_of
from compress.graph.values import EditableGraph, constant, name_of
from compress.graph.weightless import infer_shapes
from compress.quantize.images import Feed
from compress.quantize.sessions import session_of


def with_free_batch(prepared: ModelProto, feed: Feed) -> ModelProto | None:
    """Return ``prepared``, or a copy whose batch is free if it was fixed; names stay as they are.

    Args:
        prepared: A prepared graph. Not modified.
        feed: Images, at least twice as many as the fixed batch, to prove the copy with.

    Returns:
        None where the batch cannot be freed: the copy must answer as the original does.
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
    session = session_of(prepared)
    alone = [session.run(None, part) for part in parts]
    both = {n: np.concatenate([parts[0][n], parts[1][n]]) for n in feed}
    together = session_of(copy).run(None, both)
    wanted = [np.concatenate(pair) for pair in zip(*alone, strict=True)]
    return all(
        got.shape == want.shape and np.allclose(got, want, rtol=1e-3, atol=1e-3)
        for got, want in zip(together, wanted, strict=True)
    )
