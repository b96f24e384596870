"""How close a quantized graph's answers are to the float graph's, on held-back images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress.quantize.images import Feed
from compress.quantize.sessions import session_of, with_outputs


def answers(
    model: ModelProto,
    feed: Feed,
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
) -> list[NDArray[Any]]:
    """Return the outputs for ``feed``, or the tensors ``names``.

    Args:
        model: A float or Q/DQ graph.
        feed: Images, by input name.
        target: Of a Q/DQ graph: "onnxruntime" runs the integer kernels that it would run in use;
            any other computes the Q/DQ arithmetic in float.
        names: Tensors of the graph; its outputs if absent.
    """
    wanted = [output.name for output in model.graph.output] if names is None else list(names)
    session = session_of(with_outputs(model, wanted), float_qdq=target != "onnxruntime")
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else 8
    count = len(next(iter(feed.values()))) // batch * batch if isinstance(fixed, int) else None
    parts = []
    for start in range(0, count or len(next(iter(feed.values()))), batch):
        part = {name: array[start : start + batch] for name, array in feed.items()}
        parts.append(session.run(wanted, part))
    return [np.concatenate(found) for found in zip(*parts, strict=True)]


def sqnr_db(reference: list[NDArray[Any]], candidate: list[NDArray[Any]]) -> float:
    """Return the ratio of signal to quantization noise over all outputs, decibels.

    Every output weighs the same, whatever its magnitude; the higher the better.
    """
    noise = 0.0
    for want, got in zip(reference, candidate, strict=True):
        power = float(np.square(want, dtype=np.float64).sum())
        error = float(np.square(want.astype(np.float64) - got).sum())
        if not math.isfinite(error):
            return -math.inf
        noise += error / max(power, 1e-30) / len(reference)
    return -10 * math.log10(max(noise, 1e-30))
