"""The method of timing, with a clock that only the sessions move."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import chain, cycle, groupby, repeat
from typing import Any

import numpy as np
import pytest

from compress.errors import EngineError, UsageError
from compress.measure import Timing, bench
from compress.measure.conditions import Conditions, EnergyMeter
from compress.measure.latency import verdict_of

INPUT = [np.zeros((2, 3, 4, 4), np.float32)]
QUICK = Timing(seconds=1.0, block_seconds=0.1, settle_seconds=0.01, min_rounds=10)


class Watch(Conditions):
    """An idle machine, or one where others took part of the processors."""

    def __init__(self, busy: str | None = None) -> None:
        self.busy = busy

    def sample(self) -> None:
        """Read nothing."""

    def summary(self) -> dict[str, Any]:
        return {} if self.busy is None else {"busy": self.busy}


class Clock:
    """Stands still unless a session moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sleeper:
    """A session whose calls take the given seconds; notes who was called in which order."""

    def __init__(
        self, clock: Clock, durations: Iterator[float], name: str = "", log: list[str] | None = None
    ) -> None:
        self.clock, self.durations, self.name, self.log = clock, durations, name, log
        self.calls = 0

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        self.calls += 1
        if self.log is not None:
            self.log.append(self.name)
        self.clock.now += next(self.durations)
        return []


def timed(durations: dict[str, Iterator[float]], timing: Timing = QUICK, **more: Any) -> Any:
    clock = Clock()
    sessions = {name: Sleeper(clock, values) for name, values in durations.items()}
    more = {"conditions": Watch()} | more
    return bench(sessions, INPUT, timing=timing, clock=clock, meters=[], **more)


def test_a_busy_machine_tells_small_differences_from_none() -> None:
    durations = {"old": 0.0105, "new": 0.010}
    verdicts = [
        timed({name: repeat(each) for name, each in durations.items()}, conditions=Watch(busy))
        for busy in (None, "other processes took 60 % of the processors")
    ]
    assert [found["new"].verdict for found in verdicts] == ["faster", "no difference"]
    assert "busy" in verdicts[1].conditions


def test_percentiles_and_throughput_of_known_delays() -> None:
    delays = [0.001] * 120 + [0.002] * 64 + [0.005] * 15 + [0.1]
    latency = timed({"a": cycle(delays)}, Timing(seconds=10, block_seconds=1.0))["a"]
    assert latency.latency_ms_p50 == pytest.approx(1.0)
    assert latency.latency_ms_p90 == pytest.approx(2.0)
    assert latency.latency_ms_p99 == pytest.approx(5.0)
    assert latency.latency_ms_mean == pytest.approx(2.115, rel=0.05)
    assert latency.throughput_ips == pytest.approx(2 / 2.115e-3, rel=0.05)
    assert latency.batch == 2


def test_rounds_are_interleaved_in_one_order() -> None:
    clock, log = Clock(), []
    sessions = {name: Sleeper(clock, repeat(0.01), name, log) for name in "ABC"}
    result = bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[])
    turns = "".join(name for name, _ in groupby(log))
    assert turns == "ABC" + "ABC" * result.method["rounds"]


def test_calls_before_each_block_are_not_timed() -> None:
    """The first call of every turn is ten times slower, and no percentile knows of it."""
    clock = Clock()
    last: list[Any] = [None]

    class Cold(Sleeper):
        def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
            clock.now += 0.1 if last[0] is not self else 0.0
            last[0] = self
            return super().run(*arrays)

    sessions = {name: Cold(clock, repeat(0.01)) for name in "AB"}
    for latency in bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[]).values():
        assert latency.latency_ms_p99 == pytest.approx(10.0)


def test_drift_of_the_machine_does_not_move_the_ratio() -> None:
    """The machine becomes three times slower half-way; the ratio stays what it was."""
    clock = Clock()

    class Drifting(Sleeper):
        def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
            clock.now += next(self.durations) * (3.0 if clock.now > 3 else 1.0)
            return []

    sessions = {"old": Drifting(clock, repeat(0.010)), "new": Drifting(clock, repeat(0.004))}
    timing = Timing(seconds=3, block_seconds=0.1)
    new = bench(sessions, INPUT, timing=timing, clock=clock, meters=[])["new"]
    assert new.speedup_ci95 is not None
    assert new.speedup_ci95[0] == pytest.approx(2.5, rel=0.01)
    assert new.verdict == "faster"


def test_two_runs_on_a_noisy_machine_differ_by_less_than_five_percent_in_the_ratio() -> None:
    ratios = []
    for seed in range(4):
        noise = np.random.default_rng(seed)

        def jitter(median: float, noise: np.random.Generator = noise) -> Iterator[float]:
            while True:  # a tenth of the calls is interrupted
                yield median * float(noise.lognormal(sigma=0.08)) * (1 + 3 * (noise.random() < 0.1))

        ratios.append(timed({"old": jitter(0.01), "new": jitter(0.004)})["new"].speedup)
    assert max(ratios) / min(ratios) < 1.05
    assert np.mean(ratios) == pytest.approx(2.5, rel=0.03)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "no difference"), (0.99, "no difference"), (0.9, "faster"), (1.2, "slower")],
)
def test_verdict_of_equal_and_of_different_sessions(factor: float, verdict: str) -> None:
    noise = np.random.default_rng(1)
    result = timed(
        {
            "old": (0.01 * float(noise.lognormal(sigma=0.02)) for _ in repeat(0)),
            "new": (factor * 0.01 * float(noise.lognormal(sigma=0.02)) for _ in repeat(0)),
        }
    )
    assert result["old"].verdict == "reference"
    assert result["new"].verdict == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1.03, 1.5), "faster"), ((1.01, 1.5), "no difference"), ((0.5, 0.97), "slower")],
)
def test_verdict_needs_more_than_the_resolution(
    interval: tuple[float, float], verdict: str
) -> None:
    assert verdict_of(interval, resolution_pct=2.0) == verdict


def test_timings_without_any_variance_are_points() -> None:
    result = timed({"a": repeat(0.01), "b": repeat(0.01)})
    assert result["b"].latency_ms_p50_ci95 == pytest.approx((10.0, 10.0))
    assert result["b"].speedup_ci95 == pytest.approx((1.0, 1.0))
    assert result["b"].verdict == "no difference"


def test_warm_up_goes_on_until_the_median_settles() -> None:
    slow_start = chain((0.1 * 0.9**i for i in range(40)), repeat(0.001))
    latency = timed({"a": slow_start})["a"]
    assert latency.warmup_calls > 40
    assert latency.warmup_stable
    assert latency.latency_ms_p99 == pytest.approx(1.0)


def test_warm_up_that_never_settles_ends_and_is_told() -> None:
    ever_slower = (0.001 * 1.02**i for i in range(10_000))
    latency = timed({"a": ever_slower}, Timing(seconds=0.1, warmup_limit_seconds=2.0))["a"]
    assert not latency.warmup_stable


def test_a_slow_session_is_called_once_in_a_round() -> None:
    latency = timed({"a": repeat(2.0)})["a"]
    assert (latency.calls, latency.rounds) == (10, 10)


def test_a_fast_session_is_called_no_more_than_tells_something() -> None:
    result = timed({"a": repeat(1e-5)})
    assert result["a"].calls == 10 * 200


def test_interrupted_calls_do_not_make_a_round_longer() -> None:
    """Every tenth call takes a hundred times as long: blocks are sized by the mean."""
    clock = Clock()
    session = Sleeper(clock, cycle([0.001] * 9 + [0.1]))
    result = bench({"a": session}, INPUT, timing=QUICK, clock=clock, meters=[])
    assert result["a"].calls < 10 * 15
    assert clock.now < 5


def failing(after: int, seconds: float = 0.01) -> Callable[[Clock], Any]:
    def make(clock: Clock) -> Any:
        class Failing(Sleeper):
            def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
                if self.calls >= after:
                    raise RuntimeError("out of memory")
                return super().run(*arrays)

        return Failing(clock, repeat(seconds))

    return make


@pytest.mark.parametrize(
    ("after", "when"), [(0, "while warming up"), (3, "while warming up"), (80, "in round")]
)
def test_a_session_that_fails_is_skipped_and_the_others_go_on(after: int, when: str) -> None:
    clock = Clock()
    sessions = {"good": Sleeper(clock, repeat(0.01)), "bad": failing(after)(clock)}
    result = bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[])
    assert list(result) == ["good"]
    assert result["good"].rounds == 10
    assert result.skipped["bad"].startswith(f"failed {when}")
    assert "out of memory" in result.skipped["bad"]


def test_without_its_reference_nothing_is_compared() -> None:
    clock = Clock()
    sessions = {"bad": failing(0)(clock), "good": Sleeper(clock, repeat(0.01))}
    good = bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[])["good"]
    assert (good.speedup, good.speedup_ci95, good.verdict) == (None, None, "not compared")
    assert "speedup" not in good.to_json()


def test_when_all_fail_the_error_says_why_for_each() -> None:
    clock = Clock()
    with pytest.raises(EngineError, match=r"a failed.*out of memory; b failed"):
        bench({"a": failing(0)(clock), "b": failing(1)(clock)}, INPUT, clock=clock, meters=[])


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(EngineError, match="no time at all"):
        timed({"a": repeat(0.0)}, Timing(warmup_seconds=0.0))


@pytest.mark.parametrize(
    ("sessions", "inputs", "message"),
    [
        ({}, INPUT, "nothing to time"),
        ({"a": None}, [], "'a' has no inputs"),
        ({"a": None}, {"b": INPUT}, "'a' has no inputs"),
        ({"a": None}, [np.zeros((0, 3, 4, 4), np.float32)], "'a' has no inputs"),
    ],
)
def test_nothing_to_time_is_an_error(sessions: Any, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(sessions, inputs, meters=[])


def test_garbage_collection_is_off_while_timing_and_left_as_it_was() -> None:
    clock, seen = Clock(), set()

    class Watching(Sleeper):
        def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
            seen.add(gc.isenabled())
            return super().run(*arrays)

    assert gc.isenabled()
    bench({"a": Watching(clock, repeat(0.01))}, INPUT, timing=QUICK, clock=clock, meters=[])
    assert seen == {False}
    assert gc.isenabled()


def test_energy_of_a_session_is_what_its_own_blocks_drew() -> None:
    """A meter of 30 W while a runs and 5 W while b runs."""
    clock, drawn = Clock(), [0.0]

    class Drawing(Sleeper):
        watts = 0.0

        def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
            drawn[0] += self.watts * 0.01 * 1000
            return super().run(*arrays)

    sessions = {"a": Drawing(clock, repeat(0.01)), "b": Drawing(clock, repeat(0.01))}
    sessions["a"].watts, sessions["b"].watts = 30.0, 5.0
    meter = EnergyMeter("chip", lambda: drawn[0])
    result = bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[meter])
    assert result["a"].energy_mj_per_image == {"chip": pytest.approx(150.0)}  # 300 mJ for 2 images
    assert result["b"].energy_mj_per_image == {"chip": pytest.approx(25.0)}


def test_a_device_that_times_itself_is_asked_as_well() -> None:
    clock = Clock()

    class Raw:
        def device_latency_ms(self, arrays: tuple[np.ndarray, ...]) -> float:
            assert len(arrays) == 1
            clock.now += 100.0  # not within the calls timed on the host
            return 4.0

    session = Sleeper(clock, repeat(0.01))
    session.raw = Raw()
    sessions = {"gpu": session, "cpu": Sleeper(clock, repeat(0.01))}
    result = bench(sessions, INPUT, timing=QUICK, clock=clock, meters=[])
    assert result["gpu"].device_latency_ms_p50 == 4.0
    assert result["gpu"].latency_ms_p99 == pytest.approx(10.0)
    assert result["cpu"].device_latency_ms_p50 is None
    assert "device_latency_ms_p50" not in result["cpu"].to_json()


def test_json_holds_units_and_no_single_calls() -> None:
    import json

    told = timed({"a": repeat(0.01), "b": repeat(0.02)}).to_json()
    json.dumps(told, allow_nan=False)
    assert told["results"]["b"]["speedup"] == pytest.approx(0.5)
    assert "seconds" not in told["results"]["b"]
    assert {"latency_ms_p50", "latency_ms_p99", "throughput_ips"} <= set(told["results"]["a"])
