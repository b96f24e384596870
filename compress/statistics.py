"""Intervals and tests behind every claim of a difference: pure functions of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError

Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float]

SETTLED_POINTS = 1.0  # a larger loss that is not ruled out is no "no difference"
LEVEL = 0.95  # share of samples whose interval holds the true value
Z95 = NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard deviations from the middle to its ends
BINS = 15  # of confidence, of equal width
RESAMPLES = 1000  # bootstrap draws: the ends of an interval move by 3 % of its width


def wilson_interval(successes: int, total: int) -> Interval:
    """Return the 95 % Wilson score interval of a proportion, both ends in [0, 1].

    Stays inside [0, 1] and keeps its coverage at proportions near 0 and 1, where the normal
    approximation does not.

    Raises:
        UsageError: no trials, or more successes than trials.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference,
    JASA 22, 1927.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= total or total < 1:
        raise UsageError(f"{successes} of {total} is no proportion", expected="0 <= k <= n, n >= 1")
    interval = binomtest(successes, total).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_reference: int, only_candidate: int) -> float:
    """Return the two-sided p-value of McNemar's test on images that only one of two gets right.

    Under the null hypothesis each image on which exactly one of the two is right falls to either
    side like a fair coin. The exact binomial test is too careful when such images are few; mid-p
    counts half of the observed outcome's own probability.

    Source: Fagerland, Lydersen, Laake, The McNemar test for binary matched-pairs data: mid-p and
    asymptotic are better than exact conditional, BMC Medical Research Methodology 13:91, 2013.
    """
    from scipy.stats import binom

    discordant = only_reference + only_candidate
    if discordant == 0:
        return 1.0
    fewer = min(only_reference, only_candidate)
    coin = binom(discordant, 0.5)
    if only_reference == only_candidate:
        return 1.0 - float(coin.pmf(fewer)) / 2
    return min(1.0, 2 * float(coin.cdf(fewer))) - float(coin.pmf(fewer))


def accuracy_change_interval(
    reference_correct: NDArray[np.bool_], candidate_correct: NDArray[np.bool_]
) -> Interval:
    """Return Tango's 95 % score interval of candidate less reference accuracy, in [-1, 1].

    Of N images, told right or wrong in the same order, (N,), ``lost`` are right for the reference
    alone and ``won`` for the candidate alone. The interval holds every change that a score test on
    these pairs does not reject. Without a single flip it is +-z^2 / (N + z^2), never of no width:
    few images cannot show that nothing changed.

    Raises:
        UsageError: no images, or not the same number of them.

    Source: Tango, Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design, Statistics in Medicine 17, 1998.
    """
    if len(reference_correct) != len(candidate_correct) or len(reference_correct) == 0:
        raise UsageError(
            f"{len(reference_correct)} and {len(candidate_correct)} answers are no pairs",
            expected="as many answers of the one as of the other, at least one",
        )
    lost = int((reference_correct & ~candidate_correct).sum())
    won = int((~reference_correct & candidate_correct).sum())
    return _tango(lost, won, len(reference_correct))


def _tango(lost: int, won: int, total: int) -> Interval:
    from scipy.optimize import brentq

    def score(change: float) -> float:
        a = 2.0 * total
        b = (a - won + lost) * change - won - lost
        c = -lost * change * (1 - change)
        share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # lost, if that is true
        variance = total * (2 * share + change * (1 - change))
        distance = won - lost - total * change
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(1e9, distance)

    estimate, tiny = (won - lost) / total, 1e-12
    low = brentq(lambda x: score(x) - Z95, -1.0, estimate - tiny) if estimate > -1 else -1.0
    high = brentq(lambda x: score(x) + Z95, estimate + tiny, 1.0) if estimate < 1 else 1.0
    return float(low), float(high)


def quantile_interval(blocks: Floats, q: float, *, resamples: int = RESAMPLES) -> Interval:
    """Return the 95 % block bootstrap interval of a quantile ``q``, in (0, 1), of all values.

    Values are (R, n), R rounds of n. Rounds are drawn whole, because values within one are not
    independent of each other.
    """
    return _ends(_quantiles(blocks, _draws(len(blocks), resamples, seed=0), q))


def ratio_interval(
    reference: Floats, candidate: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the paired 95 % block bootstrap interval of median(reference) / median(candidate).

    Values are positive, (R, n) and (R, m). Round i of the one was timed beside round i of the
    other, so rounds are drawn in pairs: what slows the machine down for a while hits both and
    leaves the ratio alone.

    Raises:
        UsageError: the number of rounds differs or is zero, or a value is not positive.

    Source: Davison, Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    if len(reference) != len(candidate) or reference.size == 0 or candidate.size == 0:
        raise UsageError(f"{len(reference)} and {len(candidate)} rounds are no pairs of rounds")
    if min(reference.min(), candidate.min()) <= 0:
        raise UsageError("a ratio needs positive values", expected="values > 0")
    drawn = _draws(len(reference), resamples, seed)
    return _ends(_quantiles(reference, drawn, 0.5) / _quantiles(candidate, drawn, 0.5))


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions in bins of equal width of confidence; empty bins are left out."""

    confidence: tuple[float, ...]  # mean of each part, in [0, 1]
    accuracy: tuple[float, ...]  # share of right answers of each part
    answers: tuple[int, ...]  # in each part

    @property
    def error(self) -> float:
        """Expected calibration error, in [0, 1]: how far confidence is from being right.

        The mean over answers of the distance between a part's accuracy and its mean confidence.

        Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599, equation 3.
        """
        parts = zip(self.confidence, self.accuracy, self.answers, strict=True)
        return sum(n * abs(sure - right) for sure, right, n in parts) / sum(self.answers)


def calibration_bins(confidence: Floats, correct: NDArray[np.bool_]) -> CalibrationBins:
    """Return accuracy against confidence in the given answers, (N,) each, in ``BINS`` bins.

    Raises:
        UsageError: there are no answers.
    """
    if len(confidence) == 0:
        raise UsageError("a calibration error needs at least one answer")
    edges = np.linspace(0, 1, BINS + 1)
    part = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    answers = np.bincount(part, minlength=BINS)
    used = answers > 0
    sure = np.bincount(part, confidence, minlength=BINS)[used] / answers[used]
    right = np.bincount(part, correct.astype(np.float64), minlength=BINS)[used] / answers[used]
    return CalibrationBins(
        tuple(sure.tolist()), tuple(right.tolist()), tuple(answers[used].tolist())
    )


def excludes(interval: Interval, value: float) -> bool:
    """Return whether ``value`` lies outside ``interval``: whether there is a difference."""
    return not interval[0] <= value <= interval[1]


def undecided(images: int | None, bounds: Interval) -> str | None:
    """Return what an insignificant change leaves open: "153 images cannot rule out a loss of ...".

    None where its 95 % interval, points, rules out a loss of more than ``SETTLED_POINTS``.
    """
    if bounds[0] >= -SETTLED_POINTS:
        return None
    few = "the images" if images is None else f"{images} image{'s' * (images != 1)}"
    return f"{few} cannot rule out a loss of {-bounds[0]:.1f} points"


def _draws(rounds: int, resamples: int, seed: int) -> NDArray[np.int32]:
    """Return how often each round is drawn, (resamples, rounds)."""
    even = np.full(rounds, 1 / rounds)
    return np.random.default_rng(seed).multinomial(rounds, even, size=resamples).astype(np.int32)


def _quantiles(blocks: Floats, drawn: NDArray[np.int32], q: float) -> Floats:
    """Return a quantile of each draw of rounds, (resamples,), in bounded memory.

    The values are sorted once; in a draw each counts as often as its round was drawn, so the
    running total of these counts is the rank.
    """
    order = np.argsort(blocks, axis=None)
    values, origin = blocks.ravel()[order], order // blocks.shape[1]
    rank = q * (blocks.size - 1)
    low, share = int(rank), rank - int(rank)
    found = np.empty(len(drawn))
    step = max(1, 2_000_000 // blocks.size)
    for at in range(0, len(drawn), step):
        ranks = np.cumsum(drawn[at : at + step, origin], axis=1, dtype=np.int32)
        lower = values[(ranks > low).argmax(axis=1)]
        upper = values[(ranks > min(low + 1, blocks.size - 1)).argmax(axis=1)]
        found[at : at + step] = lower + share * (upper - lower)
    return found


def _ends(values: Floats) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
