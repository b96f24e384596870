"""Cut a network by a plan: the plan as data, the cut, its masked twin, and the proof."""

from compress.surgery.mask import mask_pruning
from compress.surgery.plan import KeptOnly, PrunePlan, make_plan
from compress.surgery.proof import apply_pruning, example_shapes, prove

__all__ = [
    "KeptOnly",
    "PrunePlan",
    "apply_pruning",
    "example_shapes",
    "make_plan",
    "mask_pruning",
    "prove",
]
