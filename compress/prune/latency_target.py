"""Latency target: whether a pruned network takes the milliseconds it was pruned to."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from compress.artifact import scratch
from compress.errors import PlanError
from compress.export import export_onnx
from compress.groups.plan import PrunePlan
from compress.modules.inputs import Example, call_inputs
from compress.prune.budget import latency_left, rounds_of
from compress.prune.latency_table import time_calls
from compress.runtimes import Session, open_built, open_session, runtime_class

TOLERANCE = 0.10  # how far the measured latency may be from the limit
ROUNDS = 9  # in which two networks take turns
ROUND_SECONDS = 0.1  # of timed calls of each
BURST_SECONDS = 2.0  # for which a processor that was idle may run faster than it can go on (1.5x)


class Stopwatch(ExitStack):
    """Latency of networks on a runtime, each timed in turns with the uncut one.

    A machine is faster in one minute than in the next. What is measured is therefore a ratio, and
    the milliseconds are that ratio times those of the uncut network at the start.

    Args:
        original: The uncut network.
        example_input: An input for one image.
        runtime: Where it is measured.
        original_ms: What the uncut network takes, if that was measured before.
    """

    def __init__(
        self,
        original: nn.Module,
        example_input: Example,
        runtime: str,
        original_ms: float | None = None,
    ) -> None:
        self._example, self._runtime = example_input, runtime
        args, kwargs = call_inputs(example_input)
        self._arrays = [tensor.detach().cpu().numpy() for tensor in (*args, *kwargs.values())]
        super().__init__()
        self._reference = self._session(original, self)
        if original_ms is None:
            self._time(self._reference, BURST_SECONDS)
            original_ms = self._time(self._reference, ROUNDS * ROUND_SECONDS)
        self.original_ms = original_ms

    def ms(self, model: nn.Module) -> float:
        """Return the latency of ``model``, ms.

        **Method:** exported and loaded; ``ROUNDS`` rounds of calls in turns with the uncut network;
        the median of the rounds' ratios of median calls, times the uncut network's milliseconds.
        """
        with ExitStack() as stack:
            session = self._session(model, stack)
            ratios = []
            for _ in range(ROUNDS):
                reference = self._time(self._reference, ROUND_SECONDS)
                ratios.append(self._time(session, ROUND_SECONDS) / reference)
        return float(np.median(ratios)) * self.original_ms

    def _time(self, session: Session, seconds: float) -> float:
        return time_calls(lambda: session.run(*self._arrays), seconds)

    def _session(self, model: nn.Module, stack: ExitStack) -> Session:
        if runtime_class(self._runtime).opens == "network":
            return stack.enter_context(open_session(model, self._runtime))
        folder = stack.enter_context(scratch())
        example: Any = self._example
        example = tuple(example) if isinstance(example, list) else example
        path = export_onnx(model, example, folder / "network.onnx")
        return stack.enter_context(open_built(path, self._runtime))


@dataclass(frozen=True)
class LatencyCheck:
    """Whether a pruned network takes the time it was meant to take."""

    promised_ms: float
    measured_ms: float
    runtime: str
    is_cut: bool = True  # whether anything had to be cut for it

    @property
    def missed(self) -> str | None:
        """By how much the limit is missed, if by more than ``TOLERANCE``, up or down; else None.

        A network much faster than asked for was cut more than needed, unless nothing was cut.
        """
        ratio = self.measured_ms / self.promised_ms
        if ratio > 1 + TOLERANCE:
            return f"{self.measured_ms:.3f} ms is {100 * (ratio - 1):.0f} % slower than asked for"
        if ratio < 1 - TOLERANCE and self.is_cut:
            return (
                f"{self.measured_ms:.3f} ms is {100 * (1 - ratio):.0f} % faster than asked for: "
                "no network between was found, so more was cut than needed"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Return this as JSON-able data."""
        return {**self.__dict__, "kept": self.missed is None}


def check_latency(
    pruned: nn.Module, original: nn.Module, plan: PrunePlan, example_input: Example
) -> LatencyCheck:
    """Measure a pruned network and compare it with the milliseconds it was pruned to.

    Raises:
        PlanError: the plan, or a round of it, was made for something else than a latency.
    """
    last, *earlier = rounds = list(rounds_of(plan.about))
    if not all("latency" in each for each in rounds):
        raise PlanError(
            "the plan has no latency target",
            expected="one made with keep_latency or latency_ms, in every round of it",
        )
    runtime, original_ms = last["budget"]["runtime"], rounds[-1]["latency"]["original_ms"]
    if (promised_ms := last["budget"].get("latency_ms")) is None:
        promised_ms = last["budget"]["keep_latency"] * latency_left(earlier) * original_ms
    with Stopwatch(original, example_input, runtime, original_ms) as stopwatch:
        measured = stopwatch.ms(pruned)
    return LatencyCheck(promised_ms, measured, runtime, bool(plan.tensors))
