"""Which cuts are worth timing: the Pareto front of bytes that cross and MACs of the edge."""

from __future__ import annotations

import numpy as np

from compress.pipeline.split.cutting import Cut, Cuttable

MEASURED = 8  # cut points of the front that are timed


def front(graph: Cuttable) -> list[Cut]:
    """Return cuts that no other beats in both the bytes that cross and the work of the edge.

    Where there are more than ``MEASURED``, so many of them, spread evenly.
    """
    found: dict[int, Cut] = {}
    for tensor in graph.candidates():
        if any(tensor in names for names in graph.reads):
            cut = graph.cut(tensor)
            if cut.crossing and cut.bytes is not None:
                found.setdefault(cut.head, cut)
    chosen: list[Cut] = []
    least = float("inf")
    for cut in sorted(found.values(), key=lambda cut: (cut.head_macs_pct, cut.bytes)):
        if cut.bytes is not None and cut.bytes < least:
            chosen.append(cut)
            least = cut.bytes
    spread = np.unique(np.linspace(0, len(chosen) - 1, min(MEASURED, len(chosen))).round())
    return [chosen[int(number)] for number in spread]
