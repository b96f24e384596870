"""Numbers of an artifact: size, parameters, MACs, latency, energy, memory."""

from compress.measure.counting import Count, count, count_onnx, node_macs, size_mib
from compress.measure.latency import Bench, Latency, Timing, bench

__all__ = [
    "Bench",
    "Count",
    "Latency",
    "Timing",
    "bench",
    "count",
    "count_onnx",
    "node_macs",
    "size_mib",
]
