"""The QuantPlan, which lives beside the writer that carries it out (``compress.qdq``)."""

from __future__ import annotations

from compress.qdq.plan import (
    TARGETS,
    ActivationRange,
    Equalization,
    QuantPlan,
    WeightScales,
    pack_codes,
    unpack_codes,
)

__all__ = [
    "TARGETS",
    "ActivationRange",
    "Equalization",
    "QuantPlan",
    "WeightScales",
    "pack_codes",
    "unpack_codes",
]
