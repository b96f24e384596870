"""The places where a graph can be split, as a table for the terminal and as a chart."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from compress.terminal import table

if TYPE_CHECKING:
    from rich.table import Table

    from compress.pipeline.split import Place, Split

PARTS = {  # of the time: its label, its colour
    "head_ms": ("head, edge", "#0b6e4f"),
    "link_ms": ("link", "#7a7a7a"),
    "tail_ms": ("tail, server", "#3f6fb0"),
}
LONGEST = 34  # letters of a tensor's name on the chart


def split_table(split: Split) -> Table:
    """Return the places as a table for the terminal."""
    kept = "int8 at the cut" if split.int8 else "equal to the whole"
    caption = (
        f"{split.head} and {split.tail}: {kept}, difference {split.difference:.1g} of the largest "
        f"output; what crosses: {', '.join(split.cut.crossing)}; one image, link "
        f"{split.link_mbps:g} Mbit/s, edge {split.edge_slowdown:g} x as slow as this machine"
    )
    numbers = ("head MACs %", "KiB that cross", "head ms", "link ms", "tail ms", "sum ms")
    rows = []
    for place in split.places:
        times = (place.head_ms, place.link_ms, place.tail_ms, place.total_ms)
        sizes = (f"{place.head_macs_pct:.1f}", f"{place.bytes / 1024:.1f}")
        rows.append([_marked(place, split), *sizes, *(f"{time:.2f}" for time in times)])
    return table(["cut at", *numbers], rows, caption=caption, numbers=numbers)


def _marked(place: Place, split: Split) -> str:
    return place.name + " *" * (place.name == split.cut.tensor)


def split_chart(split: Split) -> str:
    """Return the front as SVG: where the time goes at each place, the edge's work rising."""
    import matplotlib as mpl

    mpl.use("agg", force=False)
    from matplotlib.figure import Figure

    order = sorted(split.places, key=lambda place: (-place.head_macs_pct, -place.bytes))
    figure = Figure(figsize=(7, 1.4 + 0.32 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(order))
    for name, (label, color) in PARTS.items():
        values = np.array([getattr(place, name) for place in order])
        axes.barh(range(len(order)), values, left=left, color=color, label=label)
        left = left + values
    for row, (place, end) in enumerate(zip(order, left, strict=True)):
        axes.text(end, row, f" {end:.1f} ms, {place.bytes / 1024:.0f} KiB", va="center", fontsize=8)
    names = [_marked(place, split) for place in order]
    axes.set_yticks(
        range(len(order)), [n if len(n) < LONGEST else f"...{n[4 - LONGEST :]}" for n in names]
    )
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, 1.3 * float(left.max()))
    axes.set_xlabel(f"ms for one image, link {split.link_mbps:g} Mbit/s")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
