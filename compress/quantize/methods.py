"""The methods: which corrections are made, in which order, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from compress.errors import QuantizationError, UnknownNameError
from compress.qdq.graph import Graph
from compress.qdq.plan import QuantPlan
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import write_qdq
from compress.quantize.batching import with_free_batch
from compress.quantize.bias import correct_biases
from compress.quantize.equalize import equalize
from compress.quantize.fidelity import answers, mean_db, shown, sqnr_each
from compress.quantize.images import Feed, Images
from compress.quantize.nncf_ranges import plan_by_nncf
from compress.quantize.notes import float_parts, of_judging
from compress.quantize.planning import begin_below_zero, make_plan
from compress.quantize.planning_graph import judged_tensors
from compress.quantize.rounding import improve_rounding
from compress.quantize.statistics import Statistics, calibrate
from compress.quantize.weights import search_weight_scales

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

    def equalized(self, plan: QuantPlan, alpha: float) -> QuantPlan:
        """Return ``plan`` with rescalings and the ranges of the rescaled graph."""
        bare = plan.changed(weights={}, biases={})
        step = equalize(self.prepared, bare, self.fitted, alpha)
        if not step.equalization:
            return plan
        rescaled = ModelProto()
        rescaled.CopyFrom(self.prepared)
        apply_corrections(rescaled, step)
        images = self.images
        if images.fixed_batch is not None:
            images = Images(Graph(rescaled), [self.fitted], fewest=1)
        seen = calibrate(rescaled, images, targets=[self.target])
        observer = next(iter(plan.activations.values())).observer
        return step.changed(activations=self.ranges(seen, observer).activations)

    def scaled(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with searched weight scales."""
        return search_weight_scales(self.prepared, plan)

    def corrected(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with corrected biases."""
        return correct_biases(self.prepared, plan, self.fitted)

    def rounded(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with the integers of its weights chosen anew."""
        return improve_rounding(self.prepared, plan, self.fitted)

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
    """Every pass, cheapest first; one is kept if the answers on held-back images come closer."""
    search = _Search(bench)
    if math.isnan(search.best_db):  # nothing can be told apart
        return search.plan.changed(notes=tuple(search.notes))
    if bench.observer is None:
        for observer in ("percentile", "minmax"):
            search.attempt(f"{observer} ranges", bench.ranges(observer=observer))
    search.attempt("weight scales", bench.scaled(search.plan))
    ranges = search.plan
    search.attempt("bias correction", bench.corrected(ranges))
    for alpha in (0.5, 0.25):
        equalized = bench.equalized(ranges, alpha)
        if equalized.equalization:
            search.attempt(
                f"equalization {alpha:g} and bias correction",
                bench.corrected(bench.scaled(equalized)),
            )
    search.attempt(
        "rounding with feedback and bias correction",
        bench.corrected(bench.rounded(search.plan)),
    )
    return search.plan.changed(notes=tuple(search.notes))


class _Search:
    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.plan = bench.ranges()
        self.best_db = bench.fidelity_db(self.plan)
        observer = next(iter(self.plan.activations.values())).observer
        self.notes = [f"{observer} ranges: {shown(self.best_db)}"]

    def attempt(self, what: str, changed: QuantPlan) -> None:
        found_db = self.bench.fidelity_db(changed)
        kept = found_db > self.best_db + _GAIN_DB
        self.notes.append(f"{what}: {shown(found_db)}, {'kept' if kept else 'not kept'}")
        if kept:
            self.plan, self.best_db = changed, found_db


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
