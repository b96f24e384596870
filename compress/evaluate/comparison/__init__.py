"""Two artifacts side by side: the same answers, the same numbers, and if not, from where on."""

from compress.compare.answers import Comparison, Flip, against, compare
from compress.compare.bisection import Bisection, bisect
from compress.compare.chain import Link, Step, chain
from compress.compare.drift import Drift, compare_outputs
from compress.compare.outputs import drifts_of, outputs_row

__all__ = [
    "Bisection",
    "Comparison",
    "Drift",
    "Flip",
    "Link",
    "Step",
    "against",
    "bisect",
    "chain",
    "compare",
    "compare_outputs",
    "drifts_of",
    "outputs_row",
]
