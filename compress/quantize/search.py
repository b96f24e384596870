"""Method `auto`: tries corrections, cheap ones first, and keeps those that help every output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from compress import progress
from compress.qdq.plan import QuantPlan
from compress.quantize.images import Feed
from compress.quantize.sparing import spare_layers
from compress.quantize.sqnr import Closeness, mean_db, sqnr_text, weakest_db
from compress.quantize.workbench import Workbench, images_in

_GAIN_DB = 0.05  # less than this is noise
_MANY = 128  # images, after which others hardly bring larger values
_NEAR_DB = 1.0  # equalization that falls further behind is not tried with another strength
Step = Callable[[QuantPlan, Feed], QuantPlan]
# Effort of each attempt in passes over the images, for the time left.
_RANGES, _BIASES, _ROUNDING = 1, 4, 7


def auto(bench: Workbench) -> QuantPlan:
    """Every pass, cheapest first; one is kept if the outputs come closer and none falls.

    Corrections are tried on a few images; what was kept is made once more at the end, fitted to
    all of them.
    """
    observed = bench.ranges()
    if not observed.activations:  # nothing that the target computes in int8
        return observed
    search = _Search(bench, observed)
    if math.isnan(search.best.found.weakest_db):  # nothing can be told apart
        return search.best.plan.changed(notes=tuple(search.notes))
    search.spare()
    effort = 8 * _RANGES + _BIASES + _ROUNDING
    refit = _BIASES * images_in(bench.all_images()) / images_in(bench.tried)
    with progress.task("Trying corrections", round(effort + refit)) as counter:
        search.counter = counter
        for observer in () if bench.observer else ("percentile", "minmax"):
            if not search.widen(observer):
                break
        freely = _alone(partial(bench.equalized, alpha=0.0))
        search.attempt("equalization in front of depthwise layers", _RANGES, search.best, freely)
        scaled = _alone(bench.scaled)
        search.attempt("weight scales", _RANGES, search.best, scaled)
        ranges = search.best
        for alpha in (0.5, 0.25):  # judged before biases are corrected: a pass less for each
            steps = (_alone(partial(bench.equalized, alpha=alpha)), scaled)
            what = f"equalization {alpha:g}"
            if not search.attempt(what, 2 * _RANGES, ranges, *steps, within_db=_NEAR_DB):
                break
        rescaled = search.best
        search.attempt(
            "rounding with feedback and bias correction", _ROUNDING, rescaled, bench.rounded
        )
        if search.best is rescaled:  # what does less may do no harm
            search.attempt("bias correction", _BIASES, rescaled, bench.corrected)
        return search.refitted()


def _alone(step: Callable[[QuantPlan], QuantPlan]) -> Step:
    """Return a step that needs no images."""
    return lambda plan, _feed: step(plan)


@dataclass(frozen=True)
class Trial:
    """A plan, the steps that make it of plain ranges, and how close it comes."""

    plan: QuantPlan
    steps: tuple[Step, ...]
    found: Closeness

    def exceeds(self, other: Trial, by_db: float = _GAIN_DB) -> bool:
        """Return whether the outputs are closer."""
        return self.found.gain_over(other.found) > by_db

    def falls_below(self, plain: Trial) -> bool:
        """Return whether an output has more noise than with plain ranges."""
        return self.found.falls_below(plain.found, _GAIN_DB)


class _Search:
    counter: progress.ProgressTask

    def __init__(self, bench: Workbench, plan: QuantPlan) -> None:
        self.bench = bench
        self.best = self.plain = Trial(plan, (), bench.judge(plan))
        observer = next(iter(plan.activations.values())).observer
        self.notes = [f"{observer} ranges: {_told(self.best.found)}"]

    def spare(self) -> None:
        """Leave layers in float that spoil every plan; what is tried then is compared with that."""
        plan = spare_layers(self.bench, self.plain.plan)
        spared = plan.float_nodes.keys() - self.plain.plan.float_nodes.keys()
        if spared:
            self.best = self.plain = Trial(plan, (), self.bench.judge(plan))
            told = _told(self.best.found)
            self.notes.append(f"{', '.join(sorted(spared))} in float: {told}, kept")

    def widen(self, observer: str) -> bool:
        """Take ranges that clip less; of few images, unless an output loses more than by chance.

        What few images look alike with, others tell apart: their largest values are larger.
        """
        ranges = self.bench.ranges(observer=observer)
        plan = ranges.changed(float_nodes=self.best.plan.float_nodes)
        found = Trial(plan, (), self.bench.judge(plan))
        many = self.bench.statistics.images >= _MANY
        kept = not found.falls_below(self.best) and (not many or found.exceeds(self.best))
        self.notes.append(f"{observer} ranges: {_told(found.found)}, {'not ' * (not kept)}kept")
        if kept:
            self.best = self.plain = found
        self.counter.advance(_RANGES, note=f"best {_told(self.best.found)}")
        return kept

    def attempt(
        self,
        what: str,
        effort: float,
        start: Trial,
        *steps: Step,
        within_db: float = 0.0,
    ) -> bool:
        """Take further steps from ``start``; keep the result if it is the best so far.

        Args:
            what: Its name in the notes.
            effort: For the time left.
            start: What the steps are taken from.
            steps: Each makes another plan.
            within_db: By how much a result is still near the best.

        Returns:
            Whether it was kept, or falls behind the best by less than ``within_db``.
        """
        plan = start.plan.changed(notes=())
        for step in steps:
            last, plan = plan, step(plan, self.bench.tried)
            if plan is last:  # nothing there to scale
                self.counter.advance(effort)
                return False
        found = Trial(plan, (*start.steps, *steps), self.bench.judge(plan))
        falls = found.falls_below(self.plain)
        kept = not falls and found.exceeds(self.best)
        verdict = "kept" if kept else "not kept" + ": an output falls below plain ranges" * falls
        self.notes += [f"{what}: {_told(found.found)}, {verdict}", *plan.notes]
        near = kept or found.exceeds(self.best, -within_db)
        if kept:
            self.best = found
        self.counter.advance(effort, note=f"best {_told(self.best.found)}")
        return near

    def refitted(self) -> QuantPlan:
        """Return the best plan, made once more with all images where any step is fitted to them."""
        if not self.best.steps:
            return self.best.plan.changed(notes=tuple(self.notes))
        plan, feed = self.plain.plan, self.bench.all_images()
        for step in self.best.steps:
            plan = step(plan, feed)
        found = Trial(plan, self.best.steps, self.bench.judge(plan))
        if found.falls_below(self.plain) or self.best.exceeds(found):  # on images it has seen now
            plan = self.best.plan
        else:
            self.notes.append(f"made again with all {len(next(iter(feed.values())))} images")
        return plan.changed(notes=tuple(dict.fromkeys(self.notes)))


def _told(found: Closeness) -> str:
    """Return the SQNR of one output, or of the weakest and of all together, for people to read."""
    together = sqnr_text(mean_db(found.each_db))
    if len(found.each_db) > 1:
        together = f"weakest output {sqnr_text(weakest_db(found.each_db))}, all together {together}"
    typical = "" if math.isnan(found.mean_db) else f", a typical image {found.mean_db:.2f} dB"
    return f"{together}{typical}"
