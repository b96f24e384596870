"""Layers worth leaving in float: those that spoil the answers, the first, some depthwise ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy

from compress import progress
from compress.errors import ModelError
from compress.graph.model import GraphIndex
from compress.measure.macs import node_macs
from compress.qdq.placement import has_int8_kernel, place
from compress.qdq.plan import QuantPlan
from compress.quantize.equalization import is_depthwise
from compress.quantize.workbench import Workbench

POOR_DB = 15.0  # of the weakest output: above it nothing is looked for
MOST_LAYERS = 3
MOST_MACS_PCT = 15.0  # of one layer
_WORTH_DB = 2.0  # of the weakest output, for which a layer is worth its time
APART_DB = 0.5  # as FIRST_DB, for depthwise layers between ops in float
FIRST_DB = 0.2  # of all outputs, beyond chance, for which the first layers are worth theirs
_FIRST_MACS_PCT = 10.0  # of all of them; so far 0.93 to 1.03 of the int8 network's time
_PARTS = 4
TRIED = "to see what it costs"


def spare_layers(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the layers in float without which its weakest output is much closer.

    Depthwise layers behind activations that no scale can be moved through, such as SiLU, are
    typical: a few channels take the range, and all others get a step or two. Runs of layers are
    left in float to see what they cost, and the best run is halved until one layer is left; up to
    three are spared in this way, each for at least 2 dB. Where the weakest output has 15 dB and
    more, ``plan`` is returned as it is.
    """
    if not bench.judge(plan).weakest_db < POOR_DB:
        return plan
    graph = GraphIndex(bench.prepared)
    shares = _shares(bench)
    with progress.task("Looking for layers that need float"):
        for _ in range(MOST_LAYERS):
            names = list(place(graph, bench.target, plan.float_nodes).weights)
            found = _worst_layer(bench, plan, names)
            if found is None:  # no run of layers costs enough
                break
            share = shares.get(next(n.output[0] for n in graph.nodes if n.name == found), 0.0)
            better = plan.keep_float([found], TRIED)
            before, after = bench.judge(plan), bench.judge(better)
            gain = after.weakest_db - before.weakest_db
            closer = gain >= _WORTH_DB and after.gain_over(before) >= _WORTH_DB / 2
            if not closer or share > MOST_MACS_PCT:
                break
            cost = f", for {share:.2g} % of the MACs" if share else ""
            why = f"an int8 network is {gain:.1f} dB closer without it{cost}"
            plan = plan.keep_float([found], why)
            if after.weakest_db >= POOR_DB:
                break
    return plan


def first_layers(bench: Workbench, plan: QuantPlan) -> list[str]:
    """Return the int8 layers that read the images, or what layers in float made of them.

    None if these together, those in float too, are costly.
    """
    graph = GraphIndex(bench.prepared)
    int8 = set(place(graph, bench.target, plan.float_nodes).weights)
    fresh, rounded = set(graph.inputs), set[str]()
    found = []
    for node in graph.nodes:
        if rounded.intersection(node.input):
            rounded.update(node.output)
        elif fresh.intersection(node.input):
            if graph.weight(node):
                found.append(node)
            (rounded if node.name in int8 else fresh).update(node.output)
    names = [node.name for node in found if node.name in int8]
    shares = _shares(bench) if names else {}
    cost = sum(shares.get(node.output[0], 0.0) for node in found)
    return names if shares and cost <= _FIRST_MACS_PCT else []


def depthwise_layers_apart(bench: Workbench, plan: QuantPlan) -> list[str]:
    """Return the int8 depthwise layers that read what an op in float makes, such as hard-swish.

    One step serves all channels there, as no scale can be moved through such an op, and a few
    channels take the range. Integers are made for that layer alone, which has few products: with
    all of them in float, networks took 0.7 to 1.1 times as long (PP-LCNet, PP-OCR).
    """
    graph = GraphIndex(bench.prepared)
    int8 = set(place(graph, bench.target, plan.float_nodes).weights)
    found = []
    for node in graph.nodes:
        if node.name in int8 and is_depthwise(graph, node):
            maker = graph.producer.get(node.input[0])
            if maker is not None and not has_int8_kernel(graph, maker):
                found.append(node.name)
    return found


def _shares(bench: Workbench) -> dict[str, float]:
    """Return the share of the MACs of each layer, percent, by its output, at the images' size.

    Empty where they cannot be counted.
    """
    sized = deepcopy(bench.prepared)
    del sized.graph.value_info[:]
    for value in sized.graph.input:
        image = bench.fitted.get(value.name)
        dims = value.type.tensor_type.shape.dim[1:]
        for dim, size in zip(dims, () if image is None else image.shape[1:], strict=False):
            dim.dim_value = size
    try:
        macs = node_macs(sized)
    except ModelError:
        return {}
    total = max(1, sum(macs.values()))
    return {name: 100 * each / total for name, each in macs.items()}


def _worst_layer(bench: Workbench, plan: QuantPlan, names: Sequence[str]) -> str | None:
    """Return the layer whose being in float helps most, as far as halving tells.

    None where no run of layers brings what one of them would have to.
    """
    if len(names) < 2:
        return None

    def without(part: Sequence[str]) -> float:
        return bench.screened_db(plan.keep_float(part, TRIED))

    plain = bench.screened_db(plan)
    found = {tuple(part): without(part) for part in _split(names, _PARTS)}
    while True:
        best = max(found, key=lambda part: found[part])
        if found[best] < plain + _WORTH_DB:
            return None
        if len(best) == 1:
            return best[0]
        one, other = _split(best, 2)
        alone = without(one)  # what it does not bring is taken to be the other half's
        found = {tuple(one): alone, tuple(other): found[best] - (alone - plain)}


def _split(names: Sequence[str], count: int) -> list[Sequence[str]]:
    """Return ``names`` in ``count`` runs of nearly the same length, none empty."""
    count = min(count, len(names))
    edges = [len(names) * part // count for part in range(count + 1)]
    return [names[start:end] for start, end in itertools.pairwise(edges)]
