"""The methods: which corrections are made, in which order, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress import progress
from compress.errors import QuantizationError, UnknownNameError
from compress.graph.model import Graph
from compress.qdq.plan import QuantPlan
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import write_qdq
from compress.quantize.batching import with_free_batch
from compress.quantize.bias import correct_biases
from compress.quantize.calibration import Statistics, calibrate
from compress.quantize.equalization import equalize
from compress.quantize.images import Feed, Images
from compress.quantize.nncf import plan_by_nncf
from compress.quantize.notes import float_parts, of_judging
from compress.quantize.planning_graph import judged_tensors
from compress.quantize.ranges import begin_below_zero, make_plan
from compress.quantize.rounding import improve_rounding
from compress.quantize.sqnr import answers, mean_db, shown, sqnr_each
from compress.quantize.weight_scales import search_weight_scales

FITTED, HELD_BACK = 64, 64  # images that corrections are fitted to, and judged by
_GAIN_DB = 0.05  # less than this is noise


@dataclass
class Workbench:
    """What every method works with.

    Args:
        prepared: The fp32 graph.
        images: All calibration images.
        statistics: What the pass over them saw.
        target: The runtime the plan is for.
        observer: The user's choice, or None.
        exclude: Nodes to leave in float, and why.
    """

    prepared: ModelProto
    images: Images
    statistics: Statistics
    target: str
    observer: str | Mapping[str, Any] | None
    exclude: Mapping[str, str]
    fitted: Feed = field(default_factory=dict)
    held_back: Feed = field(default_factory=dict)
    reference: list[NDArray[Any]] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)  # tensors that are compared
    is_free: bool = True

    def __post_init__(self) -> None:
        """Set images aside for judging; let the graph take any number of them."""
        self.fitted, self.held_back = self.images.split(FITTED, HELD_BACK)
        freed = with_free_batch(self.prepared, self.fitted)
        self.is_free = freed is not None
        self.prepared = freed or self.prepared
        self.judged = judged_tensors(self.prepared)
        self.reference = answers(self.prepared, self.held_back, names=self.judged)

    def ranges(self, statistics: Statistics | None = None, observer: str = "mse") -> QuantPlan:
        """Return a plan with the ranges of the user's observer, or of ``observer``."""
        plan = make_plan(
            statistics or self.statistics,
            target=self.target,
            observer=self.observer or observer,
            exclude=self.exclude,
        )
        return begin_below_zero(plan, self.prepared)

    def equalized(self, plan: QuantPlan, alpha: float, feed: Feed | None = None) -> QuantPlan:
        """Return ``plan`` with rescalings and the ranges of the rescaled graph."""
        feed = feed or self.fitted
        bare = plan.changed(weights={}, biases={})
        step = equalize(self.prepared, bare, feed, alpha)
        if not step.equalization:
            return plan
        rescaled = ModelProto()
        rescaled.CopyFrom(self.prepared)
        apply_corrections(rescaled, step)
        images = self.images
        if images.fixed_batch is not None:
            images = Images(Graph(rescaled), [feed], fewest=1)
        seen = calibrate(rescaled, images, targets=[self.target])
        observer = next(iter(plan.activations.values())).observer
        return step.changed(activations=self.ranges(seen, observer).activations)

    def scaled(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with searched weight scales."""
        return search_weight_scales(self.prepared, plan)

    def corrected(self, plan: QuantPlan, feed: Feed | None = None) -> QuantPlan:
        """Return ``plan`` with corrected biases."""
        return correct_biases(self.prepared, plan, feed or self.fitted)

    def rounded(self, plan: QuantPlan, feed: Feed | None = None) -> QuantPlan:
        """Return ``plan`` with the integers of its weights chosen anew."""
        return improve_rounding(self.prepared, plan, feed or self.fitted)

    def all_images(self) -> Feed:
        """Return the images that were fitted to and those held back, together."""
        return {n: np.concatenate([a, self.held_back[n]]) for n, a in self.fitted.items()}

    def fidelity_db(self, plan: QuantPlan) -> float:
        """Return the SQNR of the answers on the images held back."""
        return mean_db(self.each_db(plan))

    def each_db(self, plan: QuantPlan) -> list[float]:
        """Return the SQNR of each judged tensor on the images held back."""
        written = write_qdq(self.prepared, plan)
        found = answers(written, self.held_back, target=self.target, names=self.judged)
        return sqnr_each(self.reference, found)

    def notes(self, plan: QuantPlan) -> list[str]:
        """Return what else there is to say of ``plan``."""
        images = len(next(iter(self.held_back.values()), ()))
        judged = of_judging(images, self.judged, self.each_db(plan)) if images else []
        return [*judged, *float_parts(Graph(self.prepared), self.target)]


Method = Callable[[Workbench], QuantPlan]


def plain(bench: Workbench) -> QuantPlan:
    """Ranges only."""
    return bench.ranges()


def bias_correction(bench: Workbench) -> QuantPlan:
    """Ranges, weight scales by search, biases corrected layer by layer."""
    return bench.corrected(bench.scaled(bench.ranges()))


def equalization(bench: Workbench, alpha: float = 0.5) -> QuantPlan:
    """Channels equalized, then as in bias-correction."""
    return bench.corrected(bench.scaled(bench.equalized(bench.ranges(), alpha)))


def rounding(bench: Workbench) -> QuantPlan:
    """Weights rounded with feedback, then biases corrected."""
    return bench.corrected(bench.rounded(bench.ranges()))


def nncf(bench: Workbench) -> QuantPlan:
    """Ranges and biases of NNCF, written by our writer."""
    plan = plan_by_nncf(bench.prepared, bench.fitted, bench.ranges())
    return begin_below_zero(plan, bench.prepared)


def auto(bench: Workbench) -> QuantPlan:
    """Every pass, cheapest first; one is kept if the answers on held-back images come closer.

    What was kept is made once more at the end, fitted to all images.
    """

    def corrected(plan: QuantPlan, feed: Feed) -> QuantPlan:
        return bench.corrected(plan, feed)

    def scaled(plan: QuantPlan, feed: Feed) -> QuantPlan:
        return bench.scaled(plan)

    def rounded(plan: QuantPlan, feed: Feed) -> QuantPlan:
        return bench.rounded(plan, feed)

    search = _Search(bench)
    if math.isnan(search.best.db):  # nothing can be told apart
        return search.best.plan.changed(notes=tuple(search.notes))
    with progress.task("Trying corrections", 7) as counter:
        search.counter = counter
        for observer in ("percentile", "minmax") if bench.observer is None else ():
            search.attempt(f"{observer} ranges", search.plain, partial(_ranged, bench, observer))
        search.attempt("weight scales", search.best, scaled)
        ranges = search.best
        search.attempt("bias correction", ranges, corrected)
        for alpha in (0.5, 0.25):
            steps = (partial(_equalized, bench, alpha), scaled, corrected)
            search.attempt(f"equalization {alpha:g} and bias correction", ranges, *steps)
        rounding_steps = (rounded, corrected)
        what = "rounding with feedback and bias correction"
        search.attempt(what, search.best, *rounding_steps)
    return search.refitted()


Step = Callable[[QuantPlan, Feed], QuantPlan]


def _ranged(bench: Workbench, observer: str, plan: QuantPlan, feed: Feed) -> QuantPlan:
    return bench.ranges(observer=observer)


def _equalized(bench: Workbench, alpha: float, plan: QuantPlan, feed: Feed) -> QuantPlan:
    return bench.equalized(plan, alpha, feed)


@dataclass(frozen=True)
class _Trial:
    """A plan, the steps that make it of plain ranges, and its SQNR on images held back."""

    plan: QuantPlan
    steps: tuple[Step, ...]
    db: float


class _Search:
    counter: progress.Task

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        plan = bench.ranges()
        self.best = self.plain = _Trial(plan, (), bench.fidelity_db(plan))
        observer = next(iter(plan.activations.values())).observer
        self.notes = [f"{observer} ranges: {shown(self.best.db)}"]

    def attempt(self, what: str, start: _Trial, *steps: Step) -> None:
        """Take further steps from ``start``; keep the result if it is the best so far."""
        plan = start.plan.changed(notes=())
        for step in steps:
            before, plan = plan, step(plan, self.bench.fitted)
            if plan is before:  # nothing there to scale
                self.counter.advance()
                return
        found_db = self.bench.fidelity_db(plan)
        kept = found_db > self.best.db + _GAIN_DB
        self.notes += [f"{what}: {shown(found_db)}, {'kept' if kept else 'not kept'}", *plan.notes]
        if kept:
            self.best = _Trial(plan, (*start.steps, *steps), found_db)
        self.counter.advance(note=f"best {shown(self.best.db)}")

    def refitted(self) -> QuantPlan:
        """Return the best plan, made once more with all images where any step is fitted to them."""
        plan, feed = self.bench.ranges(), self.bench.all_images()
        for step in self.best.steps:
            plan = step(plan, feed)
        found_db = self.bench.fidelity_db(plan)
        if found_db < self.best.db - _GAIN_DB:  # on images that it has seen now
            plan = self.best.plan
        elif self.best.steps:
            self.notes.append(f"made again with all {len(next(iter(feed.values())))} images")
        return plan.changed(notes=tuple(dict.fromkeys(self.notes)))


METHODS: Mapping[str, Method] = {
    "auto": auto,
    "plain": plain,
    "bias-correction": bias_correction,
    "equalization": equalization,
    "rounding": rounding,
    "nncf": nncf,
}


def check_method(method: str) -> None:
    """Raise UnknownNameError unless there is such a method."""
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)


def plan_by(method: str, bench: Workbench) -> QuantPlan:
    """Return the plan that ``method`` makes.

    Raises:
        UnknownNameError: there is no such method.
        QuantizationError: it needs a free batch size, and the graph's cannot be freed.
    """
    check_method(method)
    if not bench.is_free and method == "auto":
        note = "ranges only: the batch size is fixed in the graph, and corrections need a free one"
        made = plain(bench)
        return made.changed(method=method, notes=(note, *bench.notes(made)))
    if not bench.is_free and method != "plain":
        raise QuantizationError(
            f"method {method!r} needs a free batch size, and this graph fixes it",
            fix="Export the network with a dynamic batch, or use method 'plain'",
        )
    made = METHODS[method](bench)
    return made.changed(method=method, notes=(*made.notes, *bench.notes(made)))
