"""Method `auto`: layers that spoil the others stay in float; corrections that help all are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from compress import progress
from compress.qdq.plan import QuantPlan
from compress.quantize.float_layers import (
    APART_DB,
    FIRST_DB,
    depthwise_layers_apart,
    first_layers,
    spare_layers,
)
from compress.quantize.headroom import refitted_with_headroom
from compress.quantize.images import images_in
from compress.quantize.sqnr import Closeness, mean_db, sqnr_text, weakest_db
from compress.quantize.workbench import Workbench

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
        self.notes.append(f"{observer} ranges: {_told(found.found)}, {'not ' * (not kept)}kept")
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
            verdict = (
                "kept" if kept else "not kept" + ": an output falls below plain ranges" * falls
            )
            self.notes += [f"{what}: {_told(found.found)}, {verdict}", *plan.notes]
            if kept:
                self.best = found
        self.counter.advance(effort, note=f"best {_told(self.best.found)}")

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
        found = Trial(plan, self.bench.judge(plan))
        gain = found.found.sure_gain_over(self.best.found)
        kept = not found.falls_below(self.best) and gain > least_db
        verdict = f"{'not ' * (not kept)}kept"
        self.notes.append(f"{what} in float: {_told(found.found)}, {verdict}")
        if kept:
            self.best = found

    def first_in_float(self) -> None:
        """Leave the first layers in float where that surely brings answers closer.

        All others hear of their noise, and with a few channels they are about as fast in float: the
        layers that read the images, or these and those that read what they make.
        """
        plan = self.best.plan
        for _ in range(_FIRST):
            names = first_layers(self.bench, plan)
            if not names:
                return
            plan = plan.keep_float(names, "all others hear of its noise")
            plan = plan.changed(grids=tuple(g for g in plan.grids if g.node not in names))
            self.try_in_float(", ".join(names), plan, FIRST_DB)

    def refitted(self) -> QuantPlan:
        """Return the best plan; biases that were corrected with a few images are so with all.

        Weights get the headroom that they need where products overflow.
        """
        if self.start.exceeds(self.best):
            self.best = self.start
            since = (note.replace(", kept", ", not kept") for note in self.notes[self.said :])
            self.notes[self.said :] = since
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


def _told(found: Closeness) -> str:
    """Return the SQNR of one output, or of the weakest and of all together, for people to read."""
    together = sqnr_text(mean_db(found.each_db))
    if len(found.each_db) > 1 and not math.isnan(mean_db(found.each_db)):
        together = f"weakest output {sqnr_text(weakest_db(found.each_db))}, all together {together}"
    typical = "" if math.isnan(found.mean_db) else f", a typical image {found.mean_db:.2f} dB"
    return f"{together}{typical}"
