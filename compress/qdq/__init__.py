"""From a QuantPlan to the Q/DQ graph that a target runs fast and exactly."""

from __future__ import annotations

from compress.graph.preprocess import prepare, read_onnx
from compress.qdq.plan import TARGETS, ActivationRange, Equalization, QuantPlan, WeightScales
from compress.qdq.writer import write_qdq

__all__ = [
    "TARGETS",
    "ActivationRange",
    "Equalization",
    "QuantPlan",
    "WeightScales",
    "prepare",
    "read_onnx",
    "write_qdq",
]
