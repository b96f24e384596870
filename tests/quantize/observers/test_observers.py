"""Histograms are exact in any order; every observer against brute force or a closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress import plugins
from compress.errors import UsageError
from compress.qdq.plan import ActivationRange
from compress.qdq.writer import quantizer
from compress.quantize.observers import BINS, Histogram

OBSERVERS = plugins.names("observers")


def seen(values, parts: int = 1, order=None) -> Histogram:
    histogram = Histogram()
    pieces = np.array_split(np.asarray(values, np.float32), parts)
    for index in order if order is not None else range(parts):
        part = pieces[index]
        histogram.add(part, float(part.min()), float(part.max()))
    return histogram


def samples(kind: str) -> np.ndarray:
    random = np.random.default_rng(3)
    return {
        "normal": random.standard_normal(40_000),
        "relu": np.maximum(random.standard_normal(40_000), 0),
        "skewed": random.standard_normal(40_000) + 2,
        "outlier": np.append(random.standard_normal(40_000), 60.0),
        "tiny": random.standard_normal(40_000) * 1e-6,
        "sparse": random.standard_normal(40_000) * (random.random(40_000) < 0.01),
        "negative": -np.abs(random.standard_normal(40_000)),
    }[kind].astype(np.float32)


KINDS = ("normal", "relu", "skewed", "outlier", "tiny", "sparse", "negative")


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_batches_do_not_change_a_histogram(kind):
    values = samples(kind) * np.geomspace(0.01, 9, len(samples(kind)), dtype=np.float32)
    whole = seen(values)
    for order in (range(7), range(6, -1, -1), (3, 0, 6, 1, 5, 2, 4)):
        parts = seen(values, 7, order)
        assert parts.exponent == whole.exponent
        np.testing.assert_array_equal(parts.counts, whole.counts)
        assert (parts.low, parts.high) == (whole.low, whole.high)


@pytest.mark.parametrize("kind", KINDS)
def test_histogram_counts_what_numpy_counts(kind):
    values = samples(kind)
    histogram = seen(values, 3)
    width = 2.0**histogram.exponent
    edges = np.arange(-BINS + 1, BINS) * width
    assert histogram.total == len(values)
    inside = ((values >= edges[BINS]) & (values < edges[BINS + 1])).sum()
    assert histogram.counts[BINS] == inside
    assert histogram.counts[BINS - 1] == (np.abs(values) < width).sum()
    assert np.abs(values).max() < BINS * width <= 2 * np.abs(values).max() * (1 + 1e-6)
    centers, counts = histogram.bins()
    np.testing.assert_allclose((centers * counts).sum(), values.sum(), atol=width * len(values))


def test_only_zeros_then_values():
    histogram = seen(np.zeros(10))
    histogram.add(np.array([1.0, -2.0], np.float32), -2.0, 1.0)
    assert histogram.counts[BINS - 1] == 10 and histogram.total == 12


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_contract_of_observers(name, kind, symmetric):
    observer = plugins.create("observers", name)
    values = samples(kind)
    low, high = observer(seen(values), symmetric=symmetric)
    assert low <= 0 <= high and high - low > 0
    assert np.isfinite([low, high]).all()
    if symmetric:
        assert low == -high
    largest = np.abs(values).max() * (1 + 1e-6)
    assert -largest <= low and high <= largest  # never wider than what was seen
    assert observer(seen(values, 5, (4, 2, 0, 1, 3)), symmetric=symmetric) == (low, high)
    assert plugins.documentation("observers", name)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_tensor_of_zeros_gets_a_positive_scale(name):
    observer = plugins.create("observers", name)
    low, high = observer(seen(np.zeros(100)), symmetric=False)
    limit = observer(seen(np.zeros(100)), symmetric=True)[1]
    for target in ("onnxruntime", "tensorrt"):
        assert quantizer(ActivationRange(low, high, limit), target).scale > 0


def test_minmax_keeps_everything_and_zero():
    observer = plugins.create("observers", "minmax")
    assert observer(seen([1.0, 4.0]), symmetric=False) == (0.0, 4.0)
    assert observer(seen([-3.0, 2.0]), symmetric=False) == (-3.0, 2.0)
    assert observer(seen([-3.0, 2.0]), symmetric=True) == (-3.0, 3.0)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_is_that_of_numpy(percentile):
    values = samples("normal")
    observer = plugins.create("observers", {"percentile": {"percentile": percentile}})
    histogram = seen(values)
    width = 2.0**histogram.exponent
    want = np.percentile(np.abs(values), percentile, method="inverted_cdf")
    assert observer(histogram, symmetric=True)[1] == pytest.approx(want, abs=width + 0.02)
    low, high = observer(histogram, symmetric=False)
    assert high == pytest.approx(np.percentile(values, percentile), abs=2 * width + 0.02)
    assert low == pytest.approx(np.percentile(values, 100 - percentile), abs=2 * width + 0.02)


def error_of(values, low, high, limit, target):
    found = quantizer(ActivationRange(low, high, limit), target)
    bounds = np.iinfo(found.zero_point.dtype)
    codes = np.rint(values.astype(np.float64) / found.scale) + int(found.zero_point)
    back = (np.clip(codes, bounds.min, bounds.max) - int(found.zero_point)) * found.scale
    return np.mean((back - values) ** 2)


@pytest.mark.parametrize("slack", [0, 0.1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_within_its_slack_of_brute_force_over_the_values(kind, slack):
    values = samples(kind)[:9_000]
    observer, histogram = plugins.create("observers", {"mse": {"slack": slack}}), seen(values)
    most = (1 + slack) * 1.02
    low, high = observer(histogram, symmetric=False)
    limit = observer(histogram, symmetric=True)[1]
    shares = np.linspace(0.2, 1, 33)
    bottom, top = min(values.min(), 0.0), max(values.max(), 0.0)
    lows, highs = ({0.0} if end == 0 else set(end * shares) for end in (bottom, top))
    brute = min(error_of(values, a, b, 1.0, "onnxruntime") for a in lows for b in highs)
    assert error_of(values, low, high, 1.0, "onnxruntime") <= brute * most
    largest = np.abs(values).max()
    brute = min(error_of(values, 0, 0, largest * s, "tensorrt") for s in shares)
    assert error_of(values, low, high, limit, "tensorrt") <= brute * most


@pytest.mark.parametrize("kind", KINDS)
def test_mse_takes_the_widest_range_that_its_slack_allows(kind):
    values = samples(kind)[:9_000]
    ranges = [
        plugins.create("observers", {"mse": {"slack": slack}})(seen(values), symmetric=False)
        for slack in (0, 0.1, 1e9)
    ]
    for (low, high), (lower, higher) in itertools.pairwise(ranges):
        assert lower <= low <= high <= higher
    assert ranges[-1] == pytest.approx((min(values.min(), 0), max(values.max(), 0)))


def hard_swish(v):
    return v * np.clip(v / 6 + 0.5, 0, 1)


@pytest.mark.parametrize("name", OBSERVERS)
def test_what_the_reader_does_not_tell_apart_is_not_kept(name):
    """Hard-swish is zero below -3: codes spent there are lost."""
    values = samples("skewed") * 4 - 10
    histogram = seen(values)
    histogram.through = hard_swish
    found = plugins.create("observers", name)(histogram, symmetric=False)
    low, high = histogram.trimmed(*found)
    assert -3.2 < low <= 0 < high
    histogram.through = None
    assert histogram.trimmed(-30.0, 2.0) == (-30.0, 2.0)


def test_mse_behind_a_function_is_within_two_percent_of_brute_force():
    values = samples("normal")[:9_000].astype(np.float64) * 4
    histogram = seen(values)
    histogram.through = hard_swish
    observer = plugins.create("observers", {"mse": {"slack": 0}})

    def error(low, high):
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        back = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
        return np.mean((hard_swish(back) - hard_swish(values)) ** 2)

    lows, highs = np.linspace(-8, -0.1, 40), np.linspace(6, values.max(), 40)
    brute = min(error(a, b) for a in lows for b in highs)
    assert error(*observer(histogram, symmetric=False)) <= brute * 1.02
    histogram.through = None
    assert error(*observer(histogram, symmetric=False)) > brute * 1.2  # so that it tells


def test_mse_clips_a_lone_outlier_and_minmax_does_not():
    values = np.append(samples("normal"), samples("normal"))
    values[7] = 8.0
    strict = plugins.create("observers", {"mse": {"slack": 0}})
    assert strict(seen(values), symmetric=True)[1] < 6
    assert plugins.create("observers", "mse")(seen(values), symmetric=True)[1] < 7


def test_entropy_keeps_a_uniform_distribution_and_clips_a_long_tail():
    observer = plugins.create("observers", "entropy")
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000)
    assert observer(seen(uniform), symmetric=True)[1] > 0.95
    assert observer(seen(samples("outlier")), symmetric=True)[1] < 10


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"percentile": {"percentile": 10}}, r"percentile 10.0 is not in \(50, 100\]"),
        ({"mse": {"steps": 1}}, "steps at least 3"),
        ({"mse": {"slack": -0.1}}, "slack at least 0"),
        ({"entropy": {"levels": 1}}, "must be at least 2"),
        ({"mse": {"step": 1}}, "no option 'step'"),
    ],
)
def test_wrong_options_are_refused(reference, message):
    with pytest.raises(UsageError, match=message):
        plugins.create("observers", reference)
