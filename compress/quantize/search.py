"""Method `auto`: layers that spoil the others stay in float; corrections that help all are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from compress import progress
from compress.errors import ModelError
from compress.graph.model import GraphIndex
from compress.measure.macs import node_macs
from compress.qdq.placement import has_int8_kernel, place
from compress.qdq.plan import QuantPlan
from compress.quantize.equalization import is_depthwise
from compress.quantize.images import images_in
from compress.quantize.remedies import refitted_with_headroom
from compress.quantize.sessions import Closeness, mean_db, sqnr_text, weakest_db
from compress.quantize.timing import faster_in_float
from compress.quantize.workbench import Workbench

POOR_DB = 15.0  # of the weakest output: above it nothing is looked for
MOST_LAYERS = 3
MOST_MACS_PCT = 15.0  # of one layer
_WORTH_DB = 2.0  # of the weakest output, for which a layer is worth its time
APART_DB = 0.5  # of all outputs, beyond chance, for which depthwise layers may be in float
# And for which one percent of the MACs may be: products take four times as long in float on CPUs
# with VNNI, more with AMX; in half precision on GPUs, twice.
DB_PER_PCT = {"onnxruntime": 0.05, "openvino": 0.05, "tensorrt": 0.03}
_FIRST_MACS_PCT = 10.0  # of all first layers that may be in float
_PARTS = 4
TRIED = "to see what it costs"


def spare_layers(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the layers in float without which its weakest output is much closer.

    Depthwise layers behind activations that no scale can be moved through, such as SiLU, are
    typical: a few channels take the range, and all others get a step or two. Runs of layers are
    left in float to see what they cost, and the best run is halved until one layer is left; three
    are found in this way at most, and spared for at least 2 dB each. Where the weakest output has
    15 dB and more, ``plan`` is returned as it is.
    """
    if not bench.judge(plan).weakest_db < POOR_DB:
        return plan
    graph = GraphIndex(bench.prepared)
    shares, in_vain = _shares(bench), set[str]()
    with progress.task("Looking for layers that need float"):
        for _ in range(MOST_LAYERS):
            int8 = place(graph, bench.target, plan.float_nodes).weights
            names = [name for name in int8 if name not in in_vain]
            found = _worst_layer(bench, plan, names)
            if found is None:  # no run of layers costs enough
                break
            share = shares.get(next(n.output[0] for n in graph.nodes if n.name == found), 0.0)
            better = plan.keep_float([found], TRIED)
            before, after = bench.judge(plan), bench.judge(better)
            gain = after.weakest_db - before.weakest_db
            closer = gain >= _WORTH_DB and after.gain_over(before) >= _WORTH_DB / 2
            if not closer or share > MOST_MACS_PCT:
                in_vain.add(found)
                continue
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


def _price_db(bench: Workbench, names: Iterable[str]) -> float:
    """Return how many decibels closer outputs must come for the time that layers take in float."""
    shares = _shares(bench)
    outputs = [node.output[0] for node in bench.prepared.graph.node if node.name in names]
    return DB_PER_PCT[bench.target] * sum(shares.get(name, 0.0) for name in outputs)


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

    What helps counts up to 15 dB of each output: a layer that spoils all of them is worse than the
    last one of a single output, which is exact without it. None where no run of layers brings what
    one of them would have to.
    """
    if len(names) < 2:
        return None

    def reached(tried: QuantPlan) -> float:
        each_db = bench.screened(tried).typical_db
        return sum(min(db, POOR_DB) for db in each_db if not math.isnan(db))

    def without(part: Sequence[str]) -> float:
        return reached(plan.keep_float(part, TRIED))

    plain = reached(plan)
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


_GAIN_DB = 0.05  # less than this is noise
_WIDER_DB = 0.5  # of all outputs, that ranges may cost which clip less
_FIRST = 2  # layers in a row that may stay in float at the beginning
_MANY = 128  # images, after which others hardly bring larger values
Step = Callable[[QuantPlan], QuantPlan]
# Effort of each attempt in passes over the images, for the time left.
_RANGES, _BIASES, _ROUNDING = 1, 4, 7


def auto(bench: Workbench) -> QuantPlan:
    """Every pass, cheapest first; one is kept if the outputs come closer and none falls.

    Corrections are tried on a few images; biases are then corrected once more with all of them. To
    choose the integers of weights again as well took up to a quarter of the time and brought no
    more than chance does (seven networks, 16 to 512 images). Layer by layer a network runs with any
    number of images at once: where its batch is fixed, nothing is fitted to them.
    """
    observed = bench.ranges()
    if not observed.activations:  # nothing that the target computes in int8
        return observed
    search = _Search(bench, observed)
    if math.isnan(search.best.found.weakest_db):  # nothing can be told apart
        return search.best.plan.changed(notes=tuple(search.notes))
    search.leave_slow_in_float()
    search.spare()
    effort = 7 * _RANGES + _BIASES + _ROUNDING
    refit = _BIASES * images_in(bench.all_images()) / images_in(bench.tried)
    with progress.task("Trying corrections", round(effort + refit)) as counter:
        search.counter = counter
        wider = ("percentile", "minmax") if bench.statistics.images >= _MANY else ("minmax",)
        for observer in () if bench.observer else wider:
            if not search.widen(observer):
                break
        search.hold_pixels()
        ranges = search.best
        for alpha in (0.5, 0.25, 0.0):  # 0: in front of depthwise layers alone
            search.attempt(
                f"equalization {alpha:g}", _RANGES, ranges, partial(bench.equalized, alpha=alpha)
            )
            if search.best is not ranges:
                break
        ranges = search.best
        what = "rounding with feedback and bias correction"
        if bench.is_free:
            search.attempt(what, _ROUNDING, ranges, partial(bench.rounded, feed=bench.tried))
        if search.best is ranges:  # what does less may do no harm
            search.attempt("weight scales", _RANGES, ranges, bench.scaled)
            correct = partial(bench.corrected, feed=bench.tried)
            if bench.is_free:
                search.attempt("bias correction", _BIASES, search.best, correct)
        search.go_back()
        search.apart_in_float()
        search.first_in_float()
        return search.refitted()


@dataclass(frozen=True)
class Trial:
    """A plan, and how close its outputs come."""

    plan: QuantPlan
    found: Closeness

    def exceeds(self, other: Trial) -> bool:
        """Return whether the outputs are closer."""
        return self.found.gain_over(other.found) > _GAIN_DB

    def falls_below(self, plain: Trial) -> bool:
        """Return whether an output has more noise than with plain ranges."""
        return self.found.falls_below(plain.found, _GAIN_DB)


class _Search:
    counter: progress.ProgressTask

    def __init__(self, bench: Workbench, plan: QuantPlan) -> None:
        self.bench = bench
        self.best = self.plain = self.start = Trial(plan, bench.judge(plan))
        observer = next(iter(plan.activations.values())).observer
        self.notes = [f"{observer} ranges: {_told(self.best.found)}"]
        self.said = 1  # notes before those of plans that are built on ``start``

    def leave_slow_in_float(self) -> None:
        """Leave layers in float that ONNX Runtime computes faster there, by timing it here."""
        shares_pct = _shares(self.bench) if self.bench.target == "onnxruntime" else {}
        if shares_pct:
            plan, ratio = faster_in_float(self.bench, self.plain.plan, shares_pct)
            count = len(plan.float_nodes) - len(self.plain.plan.float_nodes)
            if count:
                self.best = self.plain = Trial(plan, self.bench.judge(plan))
                what = f"layers that int8 slows down ({count}) in float, {ratio:.2f} of the time"
                self.notes.append(f"{what}: {_told(self.best.found)}, kept")

    def spare(self) -> None:
        """Leave layers in float that spoil every plan; what is tried then is compared with that."""
        plan = spare_layers(self.bench, self.plain.plan)
        spared = plan.float_nodes.keys() - self.plain.plan.float_nodes.keys()
        if spared:
            self.best = self.plain = Trial(plan, self.bench.judge(plan))
            told = _told(self.best.found)
            self.notes.append(f"{', '.join(sorted(spared))} in float: {told}, kept")

    def widen(self, observer: str) -> bool:
        """Take ranges that clip less; of few images, unless an output loses more than by chance.

        What few images look alike with, others tell apart: their largest values are larger. That is
        worth no more than ``_WIDER_DB``, however much the images that judge differ.
        """
        ranges = self.bench.ranges(observer=observer)
        plan = ranges.changed(float_nodes=self.best.plan.float_nodes)
        found = Trial(plan, self.bench.judge(plan))
        many = self.bench.statistics.images >= _MANY
        gain = found.found.gain_over(self.best.found)
        kept = not found.falls_below(self.best) and gain > (_GAIN_DB if many else -_WIDER_DB)
        self.notes.append(f"{observer} ranges: {_told(found.found)}, {_kept(kept)}")
        if kept:
            self.best = self.plain = found
        self.counter.advance(_RANGES, note=f"best {_told(self.best.found)}")
        return kept

    def hold_pixels(self) -> None:
        """Let integers hold pixels exactly, whatever that brings by itself.

        Weights rounded to nearest may then shift means more than before; to mend that is what
        corrections are for. Where none of them is kept, the plan without it is there still.
        """
        self.start, self.said = self.best, len(self.notes)
        plan = self.bench.exact(self.best.plan)
        if plan is not self.best.plan:
            self.best = self.plain = Trial(plan, self.bench.judge(plan))
            self.notes.append(f"exact pixels: {_told(self.best.found)}, kept")
        self.counter.advance(_RANGES, note=f"best {_told(self.best.found)}")

    def attempt(self, what: str, effort: float, start: Trial, step: Step) -> None:
        """Take another step from ``start``; keep the result if it is the best so far.

        Notes call it ``what``; ``effort`` is for the time left.
        """
        before = start.plan.changed(notes=())
        plan = step(before)
        if plan is not before:  # else nothing is there to scale
            found = Trial(plan, self.bench.judge(plan))
            falls = found.falls_below(self.plain)
            kept = not falls and found.exceeds(self.best)
            why = ": an output falls below plain ranges" * falls
            self.notes += [f"{what}: {_told(found.found)}, {_kept(kept)}{why}", *plan.notes]
            if kept:
                self.best = found
        self.counter.advance(effort, note=f"best {_told(self.best.found)}")

    def go_back(self) -> None:
        """Take what there was before pixels were held exactly, if nothing since came closer."""
        if self.start.exceeds(self.best):
            self.best = self.start
            since = (note.replace(", kept", ", not kept") for note in self.notes[self.said :])
            self.notes[self.said :] = since

    def apart_in_float(self) -> None:
        """Leave depthwise layers between ops in float there where that surely helps.

        Their noise is not that of their weights but of the one step for all channels that they
        read, which no correction makes smaller.
        """
        if names := depthwise_layers_apart(self.bench, self.best.plan):
            why = "one step for all channels of what it reads is too coarse"
            plan = self.best.plan.keep_float(names, why)
            self.try_in_float(f"depthwise layers ({len(names)})", plan, APART_DB)

    def try_in_float(self, what: str, plan: QuantPlan, least_db: float) -> None:
        """Keep ``plan``, with ``what`` in float, if it is surely closer by ``least_db``."""
        found, best = Trial(plan, self.bench.judge(plan)), self.best.found
        sure = found.found.sure_gain_over(best)
        kept = sure > least_db and not found.found.falls_below(best, _GAIN_DB)
        self.notes.append(f"{what} in float: {_told(found.found)}, {_kept(kept)}")
        if kept:
            self.best = found

    def first_in_float(self) -> None:
        """Leave the first layers in float where that brings answers closer by what it costs.

        All others hear of their noise: the layers that read the images, or these and those that
        read what they make.
        """
        plan = self.best.plan
        for _ in range(_FIRST):
            names = first_layers(self.bench, plan)
            if not names:
                return
            plan = plan.keep_float(names, "all others hear of its noise")
            plan = plan.changed(grids=tuple(g for g in plan.grids if g.node not in names))
            price_db = _price_db(self.bench, plan.float_nodes.keys() - self.best.plan.float_nodes)
            self.try_in_float(", ".join(names), plan, price_db)

    def refitted(self) -> QuantPlan:
        """Return the best plan; biases that were corrected with a few images are so with all.

        Weights get the headroom that they need where products overflow.
        """
        best, bench, feed = self.best, self.bench, self.bench.all_images()
        plan = best.plan
        if bench.overflows:
            plan = refitted_with_headroom(bench, plan, feed)
        elif plan.biases:
            plan = bench.corrected(plan, feed)
        found = Trial(plan, bench.judge(plan))  # on images it has seen now
        longer = plan.weights != best.plan.weights
        if not longer and (found.falls_below(self.plain) or best.exceeds(found)):
            plan = best.plan
        done = ["longer steps where products overflow in 16 bits"] * longer
        if plan is not best.plan and plan.biases:
            done.append(f"biases corrected again with all {images_in(feed)} images")
        if done:
            self.notes.append(f"{' and '.join(done)}: {_told(found.found)}, kept")
        return plan.changed(notes=tuple(dict.fromkeys(self.notes)))


def _kept(is_kept: bool) -> str:
    return "kept" if is_kept else "not kept"


def _told(found: Closeness) -> str:
    """Return the SQNR of one output, or of the weakest and of all together, for people to read."""
    together = sqnr_text(mean_db(found.each_db))
    if len(found.each_db) > 1 and not math.isnan(mean_db(found.each_db)):
        together = f"weakest output {sqnr_text(weakest_db(found.each_db))}, all together {together}"
    typical = "" if math.isnan(found.mean_db) else f", a typical image {found.mean_db:.2f} dB"
    return f"{together}{typical}"
