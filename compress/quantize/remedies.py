"""What may mend a Q/DQ graph that a runtime computes wrongly: longer steps, layers in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.graph.model import GraphIndex, tail
from compress.qdq.plan import QuantPlan, WeightScales
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import default_scales, scale_axis
from compress.quantize.headroom import with_headroom
from compress.quantize.workbench import Workbench

WHY = "the runtime computes it wrongly in int8"
Remedy = Callable[[Workbench, QuantPlan], QuantPlan]


def seven_bits(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with steps of weights twice as long, and biases that make up for it."""
    graph = GraphIndex(apply_corrections(bench.prepared, plan))
    scales = {}
    for node in graph.nodes:
        value = graph.constant(node.input[1]) if graph.weight(node) else None
        if value is not None:
            axis = scale_axis(node, value.ndim)
            doubled = 2 * default_scales(value, axis)
            scales[node.input[1]] = WeightScales(axis, tuple(float(s) for s in doubled))
    coarser = plan.changed(weights=scales)
    return bench.corrected(coarser) if plan.biases else coarser


def transposed_in_float(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with all transposed convolutions in float, their biases as they were."""
    nodes = GraphIndex(bench.prepared).nodes
    return plan.keep_float([n.name for n in nodes if n.op_type == "ConvTranspose"], WHY)


def ends_in_float(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the last layers in float, their biases as they were."""
    return plan.keep_float(last_layers(GraphIndex(bench.prepared)), WHY)


def last_layers(graph: GraphIndex) -> list[str]:
    """Return the weighted ops of ``graph`` that no other one follows."""
    made = tail(graph.nodes)
    return [
        node.name
        for node in graph.nodes
        if graph.weight(node)
        and all(made.issuperset(reader.output) for reader, _ in graph.readers[node.output[0]])
    ]


SAID: dict[Remedy, str] = {
    with_headroom: "weights whose products overflow in 16 bits have longer steps",
    seven_bits: "weights have 7 bits, as int8 kernels of CPUs without VNNI need",
    transposed_in_float: "transposed convolutions are left in float",
    ends_in_float: "the last layers are left in float",
}
LADDER: tuple[tuple[Remedy, ...], ...] = (
    (with_headroom,),
    (transposed_in_float,),
    (with_headroom, transposed_in_float),
    (seven_bits,),
    (ends_in_float,),
    (with_headroom, ends_in_float),
    (seven_bits, ends_in_float),
    (with_headroom, transposed_in_float, ends_in_float),
)


MOST_ALONE = 3  # layers found one by one; after them all that follow the next are taken


def needed_in_float(
    layers: Sequence[str], is_right: Callable[[Sequence[str]], bool]
) -> list[str] | None:
    """Return few of ``layers`` that, left in float, make a graph right; None if all do not.

    The last layer is looked for from which on all must be in float; it alone is taken, and the
    search goes on with those after it. Each costs as many questions, put to ``is_right``, as
    ``len(layers)`` has bits. Layers are in the order in which the graph computes them.
    """
    if not is_right(layers):
        return None
    taken: list[str] = []
    start = 0
    while True:
        right, wrong = start, len(layers)  # in float from there on: is right, is wrong
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_right([*taken, *layers[middle:]]):
                right = middle
            else:
                wrong = middle
        if right == len(layers) - 1 or len(taken) == MOST_ALONE:
            return [*taken, *layers[right:]]
        taken.append(layers[right])
        start = right + 1
        if is_right(taken):
            return taken


def most_asked(layers: Sequence[str]) -> int:
    """Return how often ``needed_in_float`` asks at most."""
    return 1 + (MOST_ALONE + 1) * (len(layers).bit_length() + 1)
