"""Compare two artifacts: predictions, numbers, and the first tensor that differs."""

from compress.evaluate.comparison.bisection import Bisection, bisect
from compress.evaluate.comparison.error_breakdown import BreakdownStep, NetworkForm, chain
from compress.evaluate.comparison.numerical_difference import (
    Drift,
    compare_outputs,
    drifts_of,
    outputs_row,
)
from compress.evaluate.comparison.predictions import (
    ChangedPrediction,
    Comparison,
    against,
    compare_predictions,
)

__all__ = [
    "Bisection",
    "BreakdownStep",
    "ChangedPrediction",
    "Comparison",
    "Drift",
    "NetworkForm",
    "against",
    "bisect",
    "chain",
    "compare_outputs",
    "compare_predictions",
    "drifts_of",
    "outputs_row",
]
