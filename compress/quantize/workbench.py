"""The quantization context that all methods share: graph, ranges, corrections, SQNR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress.graph.model import GraphIndex
from compress.qdq.plan import QuantPlan, WeightScales
from compress.qdq.writer import write_qdq
from compress.quantize.calibration import Statistics, begin_below_zero, make_quant_plan
from compress.quantize.equalization import equalize
from compress.quantize.images import CalibrationImages, Feed, images_in
from compress.quantize.layerwise import FloatMeans, correct_biases
from compress.quantize.notes import float_parts, of_judging, of_sessions
from compress.quantize.pixels import as_rounded, with_exact_pixels
from compress.quantize.planning_graph import judged_tensors, with_free_batch
from compress.quantize.rounding import improve_rounding, search_weight_scales
from compress.quantize.sessions import Closeness, answers, closeness

FITTED, HELD_BACK = 64, 64  # images that corrections are fitted to, and set aside for judging
TRIED, JUDGED = 16, 32  # as many of these serve while corrections are tried; more if small
_LARGE, _MORE = 3 * 224 * 224 // 4, 4  # values of an image, below which so many times as many do
_HEARD_DB = 18.0  # that a noise may lie below another, which corrections make 8 dB smaller
SCREENED = 4  # images on which many plans are compared, of which one is then judged


@dataclass
class Workbench:
    """The quantization context: everything that a method works with."""

    prepared: ModelProto  # the fp32 graph
    images: CalibrationImages  # all calibration images
    statistics: Statistics  # what the pass over them saw
    target: str  # the runtime the plan is for
    observer: str | Mapping[str, Any] | None  # the user's choice, or None
    exclude: Mapping[str, str]  # nodes to leave in float, and why
    overflows: bool = False  # whether the runtime adds products in 16 bits here
    fitted: Feed = field(default_factory=dict)
    held_back: Feed = field(default_factory=dict)
    tried: Feed = field(default_factory=dict)  # of ``fitted``
    judging: Feed = field(default_factory=dict)
    reference: list[NDArray[Any]] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)  # tensors that are compared
    is_free: bool = True
    float_means: FloatMeans = field(default_factory=dict)
    known: list[tuple[QuantPlan, Closeness]] = field(default_factory=list)  # plans judged before
    safe: list[Mapping[str, WeightScales]] = field(default_factory=list)  # that cannot overflow
    few: Feed = field(default_factory=dict)  # to screen on
    few_reference: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set images aside for judging; let the graph take any number of them."""
        image = next(iter(self.images.feeds(1, limit=1)))
        more = _MORE if sum(array.size for array in image.values()) <= _LARGE else 1
        batch = self.images.fixed_batch or 1
        fitted, held_back, tried, judging = (
            -(-count // batch) * batch
            for count in (FITTED, max(HELD_BACK, more * JUDGED), more * TRIED, more * JUDGED)
        )
        self.fitted, self.held_back = self.images.split(fitted, held_back)
        self.tried = first(self.fitted, tried)
        freed = with_free_batch(self.prepared, self.fitted)
        self.is_free = freed is not None
        self.prepared = freed or self.prepared
        self.judged = judged_tensors(self.prepared)
        self.judging = first(self.held_back, judging)
        self.reference = answers(self.prepared, self.judging, names=self.judged)

    def ranges(self, statistics: Statistics | None = None, observer: str = "mse") -> QuantPlan:
        """Return a plan with the ranges of the user's observer, or of ``observer``."""
        plan = make_quant_plan(
            statistics or self.statistics,
            target=self.target,
            observer=self.observer or observer,
            exclude=self.exclude,
        )
        return begin_below_zero(plan, self.prepared)

    def equalized(self, plan: QuantPlan, alpha: float) -> QuantPlan:
        """Return ``plan`` with rescalings and the ranges of the rescaled graph."""
        bare = plan.changed(weights={}, biases={}, equalization=(), grids=())
        step, seen = equalize(self.prepared, bare, self.statistics, alpha)
        if step.equalization == plan.equalization:
            return plan
        observer = next(iter(plan.activations.values())).observer
        ranges = {**plan.activations, **self.ranges(seen, observer).activations}
        return step.changed(activations=ranges, grids=plan.grids)

    def exact(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with pixels held exactly, where what rounds them now can be heard."""
        found = with_exact_pixels(self.prepared, plan, self.tried)
        read = {node.name: node.input[0] for node in self.prepared.graph.node}
        if found is plan or any(read[grid.node] not in self.judging for grid in found.grids):
            return found
        seen = {name: as_rounded(plan, name, values) for name, values in self.judging.items()}
        got = answers(self.prepared, seen, names=self.judged)
        alone = closeness(self.reference, got, images_in(self.judging)).each_db
        pairs = zip(alone, self.judge(plan).each_db, strict=True)
        return found if any(own < noise + _HEARD_DB for own, noise in pairs) else plan

    def scaled(self, plan: QuantPlan) -> QuantPlan:
        """Return ``plan`` with searched weight scales."""
        return search_weight_scales(self.prepared, plan)

    def corrected(self, plan: QuantPlan, feed: Feed | None = None) -> QuantPlan:
        """Return ``plan`` with corrected biases."""
        return correct_biases(self.prepared, plan, feed or self.fitted, self.float_means)

    def rounded(self, plan: QuantPlan, feed: Feed | None = None) -> QuantPlan:
        """Return ``plan`` with the integers of its weights chosen anew, and corrected biases."""
        return improve_rounding(self.prepared, plan, feed or self.fitted, self.float_means)

    def all_images(self) -> Feed:
        """Return the images that were fitted to and those held back, together."""
        return {n: np.concatenate([a, self.held_back[n]]) for n, a in self.fitted.items()}

    def for_runtime(self) -> Feed:
        """Return all images, those that were held back first."""
        return {n: np.concatenate([self.held_back[n], a]) for n, a in self.fitted.items()}

    def judge(self, plan: QuantPlan) -> Closeness:
        """Return how close the judged tensors come on the images that judge."""
        bare = plan.changed(method="", notes=())
        for known, found in self.known:
            if known == bare:
                return found
        written = write_qdq(self.prepared, plan, checked=False)
        got = answers(written, self.judging, target=self.target, names=self.judged)
        found = closeness(self.reference, got, images_in(self.judging))
        self.known.append((bare, found))
        return found

    def screened(self, plan: QuantPlan) -> Closeness:
        """Return how close the judged tensors come on a few of the images that judge."""
        if not self.few:
            batch = self.images.fixed_batch or 1
            self.few = first(self.judging, -(-SCREENED // batch) * batch)
            self.few_reference = answers(self.prepared, self.few, names=self.judged)
        written = write_qdq(self.prepared, plan, checked=False)
        got = answers(written, self.few, target=self.target, names=self.judged)
        return closeness(self.few_reference, got, images_in(self.few))

    def notes(self, plan: QuantPlan) -> list[str]:
        """Return what else there is to say of ``plan``."""
        judged = []
        if self.judging:
            images = images_in(self.judging)
            judged = of_judging(self.judged, self.reference, self.judge(plan).each_db, images)
        parts = float_parts(GraphIndex(self.prepared), self.target)
        return [*judged, *parts, *of_sessions(self.target)]


def first(feed: Feed, count: int) -> Feed:
    """Return the first ``count`` images of ``feed``."""
    return {name: array[:count] for name, array in feed.items()}
