"""Latency of sessions side by side: interleaved rounds, percentiles, and the ratio's interval."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import statistics
from compress.errors import EngineError, UsageError
from compress.measure.conditions import Conditions, EnergyMeter
from compress.progress import track
from compress.report.schema import BUSY_RESOLUTION_PCT
from compress.runtimes import Session

LARGEST_BLOCK = 200  # calls in a row; more of the same moment tell nothing new
LONGEST_CALL = 3600.0  # seconds: more is no latency but a clock that was set
DEVICE_CALLS = 20  # timed on the device in each round, beside those timed on the host

Clock = Callable[[], float]  # seconds, monotonic


@dataclass(frozen=True)
class Timing:
    """How long and in which portions each session is timed."""

    seconds: float = 3.0  # of timed calls, for each session
    block_seconds: float = 0.1  # of one session's timed calls in a row
    settle_seconds: float = 0.02  # of calls not timed before each block
    min_rounds: int = 10
    warmup_seconds: float = 0.3  # at least
    warmup_limit_seconds: float = 5.0  # then it is timed as it is, and called unstable
    stable_pct: float = 3.0  # largest change of the median from one warm-up window to the next
    resolution_pct: float = 2.0  # smallest difference that is told from none
    busy_resolution_pct: float = BUSY_RESOLUTION_PCT  # the same where others took processors


@dataclass(frozen=True)
class Latency:
    """Time of one call of one session, measured beside others."""

    latency_ms_p50: float
    latency_ms_p50_ci95: tuple[float, float]
    latency_ms_p90: float
    latency_ms_p99: float
    latency_ms_p99_ci95: tuple[float, float]
    latency_ms_mean: float
    throughput_ips: float  # images a second by one caller: batch / mean
    batch: int
    calls: int
    rounds: int
    warmup_calls: int
    warmup_stable: bool
    speedup: float | None  # median of the first session / median of this one
    speedup_ci95: tuple[float, float] | None
    verdict: str  # "reference" | "faster" | "slower" | "no difference" | "not compared"
    device_latency_ms_p50: float | None  # on the GPU alone, without copies, where it can be timed
    device_latency_ms_p99: float | None
    energy_mj_per_image: dict[str, float]  # by meter, what the whole chip drew during the calls
    seconds: NDArray[np.float64] = field(repr=False)  # (R, n): every call, for plots and re-tests

    def to_json(self) -> dict[str, Any]:
        """Return these numbers as JSON-able data, without single calls and what is absent."""
        return {
            key: value
            for key, value in vars(self).items()
            if key != "seconds" and value is not None and value != {}
        }


@dataclass(frozen=True)
class Bench(Mapping[str, Latency]):
    """Latency by session name, the sessions that failed, and the state of the machine."""

    latencies: dict[str, Latency]
    skipped: dict[str, str]  # name -> why it was not measured
    conditions: dict[str, Any]  # clocks, temperature, power, throttling during the rounds
    method: dict[str, Any]

    def __getitem__(self, name: str) -> Latency:
        return self.latencies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.latencies)

    def __len__(self) -> int:
        return len(self.latencies)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        return {
            "results": {name: latency.to_json() for name, latency in self.items()},
            "skipped": self.skipped,
            "conditions": self.conditions,
            "method": self.method,
        }


def bench(
    sessions: Mapping[str, Session],
    inputs: Sequence[NDArray[Any]] | Mapping[str, Sequence[NDArray[Any]]],
    *,
    timing: Timing | None = None,
    clock: Clock = time.perf_counter,
    conditions: Conditions | None = None,
    meters: Sequence[EnergyMeter] | None = None,
) -> Bench:
    """Return the latency of each session, and how it compares with the first.

    **Method:** every session is called until the median of its calls settles. Then come rounds,
    each of which times a block of calls of every session in the same order (A B C A B C ...), so
    that a change of the machine's speed hits all alike. Before each block the session is called
    without timing, until its caches are warm and the threads of the one before it sleep. A call is
    timed on the host from arrays to arrays, copies to and from a device included, with Python's
    garbage collector off. The speed-up is the ratio of two medians over all rounds; its interval
    is a bootstrap over whole rounds, drawn in pairs. Where the interval reaches within
    ``resolution_pct`` of 1 the verdict is "no difference": two sessions of one file differ by as
    much, through where their memory lies and whom they follow in the round. Where other processes
    or other machines of the host took part of the processors meanwhile, the conditions say so under
    "busy", and it is ``busy_resolution_pct``. The numbers are those of one caller: they say nothing
    of a loaded server or of a first call.

    Args:
        sessions: Name -> session; the first is the reference of the ratios.
        inputs: Arrays that every session is called with, or those of each by name.
        timing: How long.
        clock: Seconds; tests pass a fake one.
        conditions: Reads clocks and temperatures between rounds; this machine's if absent.
        meters: Energy counters; those this machine has if absent.

    Raises:
        UsageError: there are no sessions or no inputs.
        EngineError: not one session could be timed.
    """
    timing = timing or Timing()
    meters = EnergyMeter.all() if meters is None else meters
    entrants = [
        _Entrant(name, session, _inputs_of(name, inputs), clock, meters)
        for name, session in sessions.items()
    ]
    if not entrants:
        raise UsageError("there is nothing to time", expected="at least one session")
    watch = conditions or Conditions()
    rounds = max(timing.min_rounds, round(timing.seconds / timing.block_seconds))
    skipped = _time_in_rounds(entrants, timing, rounds, watch)
    timed = [entrant for entrant in entrants if entrant.name not in skipped]
    if not timed:
        raise EngineError("; ".join(f"{name} {why}" for name, why in skipped.items()))
    first = entrants[0] if entrants[0] in timed else None
    found = watch.summary()
    resolution_pct = timing.busy_resolution_pct if "busy" in found else timing.resolution_pct
    return Bench(
        latencies={entrant.name: entrant.latency(first, resolution_pct) for entrant in timed},
        skipped=skipped,
        conditions=found,
        method={"rounds": rounds, **asdict(timing)},
    )


def _time_in_rounds(
    entrants: Sequence[_Entrant], timing: Timing, rounds: int, watch: Conditions
) -> dict[str, str]:
    """Warm all up, then time a block of each in every round; return who failed, and why."""
    skipped: dict[str, str] = {}
    with _no_garbage_collection():
        for entrant in entrants:
            _attempt(entrant, entrant.warm_up, timing, skipped)
        for _ in track(range(rounds), "timing", rounds):
            watch.sample()
            for entrant in entrants:
                _attempt(entrant, entrant.time_block, timing, skipped)
    return skipped


class _Entrant:
    """One session under test and its timings so far."""

    def __init__(
        self,
        name: str,
        session: Session,
        arrays: Sequence[NDArray[Any]],
        clock: Clock,
        meters: Sequence[EnergyMeter],
    ) -> None:
        self.name, self.session, self.arrays = name, session, tuple(arrays)
        self.clock, self.meters = clock, meters
        self.batch = len(self.arrays[0])
        self.blocks: list[NDArray[np.float64]] = []
        self.energy_mj = dict.fromkeys((meter.name for meter in meters), 0.0)
        self.device_timer = getattr(getattr(session, "raw", session), "device_latency_ms", None)
        self.device_ms: list[float] = []
        self.warmup_calls, self.is_stable, self.calls_per_block = 0, False, 1

    def call(self) -> float:
        """Return the seconds of one call."""
        start = self.clock()
        self.session.run(*self.arrays)
        seconds = self.clock() - start
        if not 0 <= seconds < LONGEST_CALL:
            raise EngineError(f"a call took {seconds} s by the clock")
        return seconds

    def warm_up(self, timing: Timing) -> None:
        """Call until two windows in a row have the same median, and choose the block's length."""
        spent, before, window = 0.0, float("inf"), [0.0]
        while spent < timing.warmup_limit_seconds and not self.is_stable:
            window = self._call_for(timing.warmup_seconds / 3, at_least=5)
            spent += sum(window)
            self.warmup_calls += len(window)
            median = float(np.median(window))
            if median <= 0:
                raise EngineError("took no time at all by the clock")
            settled = abs(median - before) <= timing.stable_pct / 100 * median
            self.is_stable = settled and spent >= timing.warmup_seconds
            before = median
        mean = sum(window) / len(window)  # not the median: interrupted calls take time as well
        self.calls_per_block = min(max(1, round(timing.block_seconds / mean)), LARGEST_BLOCK)

    def time_block(self, timing: Timing) -> None:
        """Call without timing until settled, then time a block."""
        self._call_for(timing.settle_seconds, at_least=1)
        before = [meter.read_mj() for meter in self.meters]
        block = [self.call() for _ in range(self.calls_per_block)]
        for meter, start in zip(self.meters, before, strict=True):
            self.energy_mj[meter.name] += meter.read_mj() - start
        self.blocks.append(np.array(block))
        if self.device_timer is not None:
            calls = min(self.calls_per_block, DEVICE_CALLS)
            self.device_ms += [self.device_timer(self.arrays) for _ in range(calls)]

    def _call_for(self, seconds: float, at_least: int) -> list[float]:
        calls, spent = list[float](), 0.0
        while len(calls) < at_least or spent < seconds:
            calls.append(self.call())
            spent += calls[-1]
            if not spent and len(calls) > LARGEST_BLOCK:
                raise EngineError("took no time at all by the clock")
        return calls

    def latency(self, first: _Entrant | None, resolution_pct: float) -> Latency:
        seconds = np.stack(self.blocks)
        milliseconds = 1000 * seconds
        p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
        speedup, interval, verdict = self._against(first, resolution_pct)
        images = self.batch * seconds.size
        return Latency(
            latency_ms_p50=float(p50),
            latency_ms_p50_ci95=statistics.quantile_interval(milliseconds, 0.5),
            latency_ms_p90=float(p90),
            latency_ms_p99=float(p99),
            latency_ms_p99_ci95=statistics.quantile_interval(milliseconds, 0.99),
            latency_ms_mean=float(milliseconds.mean()),
            throughput_ips=float(self.batch / seconds.mean()),
            batch=self.batch,
            calls=seconds.size,
            rounds=len(seconds),
            warmup_calls=self.warmup_calls,
            warmup_stable=self.is_stable,
            speedup=speedup,
            speedup_ci95=interval,
            verdict=verdict,
            device_latency_ms_p50=_percentile(self.device_ms, 50),
            device_latency_ms_p99=_percentile(self.device_ms, 99),
            energy_mj_per_image={name: mj / images for name, mj in self.energy_mj.items()},
            seconds=seconds,
        )

    def _against(
        self, first: _Entrant | None, resolution_pct: float
    ) -> tuple[float | None, statistics.Interval | None, str]:
        if first is None:
            return None, None, "not compared"
        if first is self:
            return 1.0, None, "reference"
        reference, own = np.stack(first.blocks), np.stack(self.blocks)
        interval = statistics.ratio_interval(reference, own)
        speedup = float(np.median(reference) / np.median(own))
        return speedup, interval, verdict_of(interval, resolution_pct)


def verdict_of(interval: statistics.Interval, resolution_pct: float = 0.0) -> str:
    """Return what the interval of old time / new time says: "faster", "slower" or "no difference".

    Differences up to ``resolution_pct`` are none.
    """
    margin = 1 + resolution_pct / 100
    if interval[0] > margin:
        return "faster"
    return "slower" if interval[1] < 1 / margin else "no difference"


def _attempt(
    entrant: _Entrant, step: Callable[[Timing], None], timing: Timing, skipped: dict[str, str]
) -> None:
    """Carry out one step; a session that fails is out, and the others go on."""
    if entrant.name in skipped:
        return
    try:
        step(timing)
    except Exception as error:  # noqa: BLE001 - runtimes raise what they like; the bench goes on
        when = f"in round {len(entrant.blocks) + 1}" if entrant.is_stable else "while warming up"
        skipped[entrant.name] = f"failed {when}: {error}"


def _inputs_of(
    name: str, inputs: Sequence[NDArray[Any]] | Mapping[str, Sequence[NDArray[Any]]]
) -> Sequence[NDArray[Any]]:
    own = inputs.get(name, ()) if isinstance(inputs, Mapping) else inputs
    if not own or len(own[0]) == 0:
        raise UsageError(f"{name!r} has no inputs to be timed on", expected="at least one array")
    return own


def _percentile(values: Sequence[float], q: float) -> float | None:
    return float(np.percentile(values, q)) if values else None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
