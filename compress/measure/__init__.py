"""Numbers of an artifact: size, parameters, MACs, latency, energy, memory."""

from compress.measure.latency import Bench, Latency, Timing, bench
from compress.measure.macs import (
    Count,
    complete_shapes,
    count_module,
    count_onnx,
    node_macs,
    onnx_params,
    size_mib,
    zero_weights_pct,
)
from compress.measure.memory import Memory, activations_mib, memory, weights_mib
from compress.measure.methods import METHODS, methods_of

__all__ = [
    "METHODS",
    "Bench",
    "Count",
    "Latency",
    "Memory",
    "Timing",
    "activations_mib",
    "bench",
    "complete_shapes",
    "count_module",
    "count_onnx",
    "memory",
    "methods_of",
    "node_macs",
    "onnx_params",
    "size_mib",
    "weights_mib",
    "zero_weights_pct",
]
