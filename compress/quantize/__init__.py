"""Post-training int8: ranges from one pass over calibration images, corrections, Q/DQ graphs."""

from __future__ import annotations

from compress.qdq import QuantPlan, write_qdq
from compress.quantize.planning import make_plan
from compress.quantize.statistics import Statistics, calibrate
from compress.quantize.verb import quantize_onnx, quantize_targets

__all__ = [
    "QuantPlan",
    "Statistics",
    "calibrate",
    "make_plan",
    "quantize_onnx",
    "quantize_targets",
    "write_qdq",
]
