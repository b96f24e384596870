"""Post-training int8: ranges from one pass over calibration images, corrections, Q/DQ graphs."""

from __future__ import annotations

from compress.qdq import QuantPlan, write_qdq
from compress.quantize.api import quantize_onnx, quantize_targets
from compress.quantize.calibration import Statistics, calibrate, make_quant_plan

__all__ = [
    "QuantPlan",
    "Statistics",
    "calibrate",
    "make_quant_plan",
    "quantize_onnx",
    "quantize_targets",
    "write_qdq",
]
