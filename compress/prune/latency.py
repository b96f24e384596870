"""Prune to a latency: a knapsack over groups, corrected by networks that were measured.

Afterwards ``check_latency`` says whether a pruned network takes the time it was pruned to.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.artifact import scratch
from compress.errors import PlanError
from compress.export import export_onnx
from compress.groups import Network
from compress.groups.plan import PrunePlan, make_prune_plan
from compress.groups.proof import apply_pruning
from compress.modules import evaluating, full_copy
from compress.modules.inputs import Example, call_inputs, copied
from compress.progress import task
from compress.prune.latency_table import (
    LatencyTable,
    LayerShape,
    kernel_step,
    table_for,
    time_calls,
)
from compress.prune.selection import (
    NAMES,
    Budget,
    CandidateCounts,
    Counts,
    Floats,
    kept_units,
    latency_left,
    rounds_of,
)
from compress.prune.windows import sliding
from compress.runtimes import Session, open_built, open_session, runtime_class

AIM = 0.97  # of the limit: what the plan is made for
ATTEMPTS = 8
MOST_LEVELS = 16  # counts of one group that the knapsack looks at
TOLERANCE = 0.10  # how far the measured latency may be from the limit
ROUNDS = 9  # in which two networks take turns
ROUND_SECONDS = 0.1  # of timed calls of each
BURST_SECONDS = 2.0  # for which a processor that was idle may run faster than it can go on (1.5x)


def counts_for_latency(
    model: nn.Module,
    example_input: Example,
    network: Network,
    candidates: Sequence[CandidateCounts],
    importance: Sequence[Floats],
    budget: Budget,
    runtime: str,
) -> tuple[Counts, dict[str, Any]]:
    """Return how many units each group keeps so that the network takes the time it may take.

    The table gives the sum of single layers. What a whole network takes is linear in that sum; the
    line is fitted to networks that were measured, first the uncut one and the smallest, then the
    plan itself, which is made again until it is measured to be within the limit.

    ``importance`` is that of each group's units in the order in which they are kept, additive over
    groups. Returned are the counts of the slowest network found that is fast enough, and what was
    measured, ms: "kept" says whether it is within ``TOLERANCE`` of the limit.

    Raises:
        PlanError: not even the smallest network is fast enough; the message says how fast it is.
        EngineError: nothing can run on ``runtime`` here.
    """
    layers = LayerTimes(model, example_input, network, table_for(runtime))
    candidates = [_snapped(one, layers.step(number)) for number, one in enumerate(candidates)]
    uncut, smallest = (
        np.array([one.levels[end] for one in candidates], dtype=np.int64) for end in (-1, 0)
    )
    with Stopwatch(model, example_input, runtime) as stopwatch:
        measured = [(layers.total(uncut), stopwatch.original_ms)]  # the sum over layers, in all

        def measure(counts: Counts) -> float:
            plan = make_prune_plan(network, kept_units(network, candidates, counts))
            measured.append((layers.total(counts), stopwatch.ms(apply_pruning(model, plan))))
            return measured[-1][1]

        original_ms = stopwatch.original_ms
        limit_ms = budget.share * (original_ms if budget.kind == "latency" else 1.0)
        facts = {"original_ms": round(original_ms, 4), "promised_ms": round(limit_ms, 4)}
        if original_ms <= limit_ms:
            return uncut, facts | {"planned_ms": round(original_ms, 4), "kept": True}
        least_ms = measure(smallest)
        if least_ms > limit_ms:
            raise _unreachable(budget, runtime, least_ms, original_ms)
        best, best_ms = smallest, least_ms
        with task(f"measure on {runtime}") as counter:
            for _ in range(ATTEMPTS):  # a regula falsi: every plan narrows the sum over layers
                aim = _layers_for(max(AIM * limit_ms, least_ms), measured)
                counts = knapsack(candidates, importance, layers.total, layers.changed, aim)
                ms = measure(counts)
                counter.advance(note=f"{ms:.3f} ms")
                if best_ms < ms <= limit_ms:
                    best, best_ms = counts, ms
                if (1 - TOLERANCE) * limit_ms <= ms <= limit_ms:
                    break
    layers.table.save()
    return best, facts | {
        "smallest_ms": round(least_ms, 4),
        "planned_ms": round(best_ms, 4),
        "kept": LatencyCheck(limit_ms, best_ms, runtime).missed is None,
    }


def _unreachable(budget: Budget, runtime: str, least_ms: float, original_ms: float) -> PlanError:
    """Return the error for a latency that not even the smallest network keeps."""
    least = f"{least_ms:.3f} ms" if budget.kind == "latency_ms" else f"{least_ms / original_ms:.3f}"
    return PlanError(
        f"{NAMES[budget.kind]} = {budget.share:g} cannot be reached on {runtime}: with every group "
        f"at its smallest the network takes {least_ms:.3f} ms (uncut {original_ms:.3f} ms)",
        expected=f"at least {least}",
        fix="Ask for more, or relax min_channels, max_cut, round_to or exclude",
    )


def _layers_for(latency_ms: float, measured: Sequence[tuple[float, float]]) -> float:
    """Return the sum over layers at which a network takes ``latency_ms``.

    It lies between the largest sum that was fast enough and the smallest that was not.
    """
    below = max(pair for pair in measured if pair[1] <= latency_ms)
    above = min(pair for pair in measured if pair[1] > latency_ms)
    if above[0] <= below[0]:  # the measurements contradict each other: stay on the safe side
        return 0.5 * (above[0] + min(measured)[0])
    share = (latency_ms - below[1]) / (above[1] - below[1])
    return below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0])


def _snapped(one: CandidateCounts, step: int) -> CandidateCounts:
    """Return candidate counts that are multiples of ``step``, and not more of them than needed."""
    lowest = int(one.levels[0])
    levels = one.levels[(one.levels % step == 0) | (one.levels == one.size)]
    if lowest not in levels and not len(levels[levels < one.size]):
        levels = np.append(levels, lowest)
    if len(levels) > MOST_LEVELS:
        chosen = np.unique(np.linspace(0, len(levels) - 1, MOST_LEVELS).round().astype(int))
        levels = levels[chosen]
    return CandidateCounts(np.unique(levels), one.order, one.scores)


class LayerTimes:
    """The sum of the table's latencies over the layers of a network, by the groups' counts."""

    def __init__(
        self, model: nn.Module, example_input: Example, network: Network, table: LatencyTable
    ) -> None:
        self.table = table
        self._shapes = _layer_shapes(model, example_input)
        self._network = network
        self._whole: Counts = np.array([group.size for group in network.groups], dtype=np.int64)
        self._widths = {
            tensor: tuple(network.owned.get((tensor, dim), {}) for dim in (0, 1))
            for tensor in self._shapes
        }
        self.changed: list[list[str]] = [
            [t for t, widths in self._widths.items() if any(number in each for each in widths)]
            for number in range(len(network.groups))
        ]

    def total(self, counts: Counts, tensors: Sequence[str] | None = None) -> float:
        """Return the sum over layers, ms; over some of them only if they are named."""
        return sum(self._ms(t, counts) for t in (self._shapes if tensors is None else tensors))

    def step(self, number: int) -> int:
        """Return the multiple in which the slowest producer of a group is best cut."""
        group = self._network.groups[number]
        producers = [
            piece.tensor
            for piece in group.slices
            if piece.role == "output" and piece.tensor in self._shapes
        ]
        if not producers:
            return 1
        slowest = max(producers, key=lambda tensor: self._ms(tensor, self._whole))
        inputs, outputs = self._channels(slowest, self._whole)
        found = kernel_step(self.table, self._shapes[slowest], inputs, outputs)
        return max(1, found // max(1, group.width))

    def _ms(self, tensor: str, counts: Counts) -> float:
        inputs, outputs = self._channels(tensor, counts)
        whole = self._channels(tensor, self._whole)
        return self.table.ms(self._shapes[tensor], inputs, outputs, whole)

    def _channels(self, tensor: str, counts: Counts) -> tuple[int, int]:
        """Return the input and output channels of a layer at these counts."""
        shape = self._network.shapes[tensor]
        lost = [
            sum(k * int(self._whole[g] - counts[g]) for g, k in owned.items())
            for owned in self._widths[tensor]
        ]
        outputs, inputs = shape[0] - lost[0], shape[1] - lost[1]
        groups = self._shapes[tensor].groups
        if groups > 1:  # either whole groups go, or the same channels of every group
            left = groups if lost[1] else max(1, round(groups * outputs / shape[0]))
            inputs *= left
        return inputs, outputs


def _layer_shapes(model: nn.Module, example_input: Example) -> dict[str, LayerShape]:
    """Return the shape of every convolution and linear layer that runs, by its weight's name."""
    found: dict[str, LayerShape] = {}
    model = full_copy(model)  # its caches and hooks are not the caller's

    def note(name: str, module: Any, inputs: Any, _output: Any) -> None:
        found[f"{name}.weight"] = _shape_of(module, inputs[0].shape)

    for name, module in model.named_modules():
        is_layer = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        if is_layer and "weight" in module._parameters:
            module.register_forward_hook(functools.partial(note, name))
    args, kwargs = copied(call_inputs(example_input))
    with evaluating(model), torch.no_grad():
        model(*args, **kwargs)
    return found


def _shape_of(module: Any, size: torch.Size) -> LayerShape:
    if isinstance(module, nn.Linear):
        return LayerShape((), (), (), (), (), rows=int(np.prod(size[:-1])))
    how = sliding(module)
    is_depthwise = module.groups == module.in_channels == module.out_channels
    return LayerShape(
        how.kernel,
        how.stride,
        (*how.before, *how.after),
        how.dilation,
        tuple(size[2:]),
        0 if is_depthwise else module.groups,
    )


def knapsack(
    candidates: Sequence[CandidateCounts],
    importance: Sequence[Floats],
    total: Callable[..., float],
    changed: Sequence[Sequence[Any]],
    target: float,
) -> Counts:
    """Return the counts that keep the most importance while ``total`` is at most ``target``.

    Greedy: again and again the cut of one group, of any size, that saves the most time per
    importance lost. Then exchange: steps up that still fit, the most important per time first.

    ``importance`` is that of each group's units in the order in which they are kept, (C,).
    ``total`` gives the ms of (counts, layers), over all layers if none are given; ``changed`` has
    the layers whose time depends on each group. ``target``, ms, must be reachable.
    """
    sums = [np.concatenate(([0.0], np.cumsum(values))) for values in importance]
    counts = np.array([one.size for one in candidates], dtype=np.int64)

    def steps(*, down: bool) -> Iterator[tuple[float, float, int, int]]:
        """Yield ms saved and importance lost by each change of one count, the group, the count."""
        for number, one in enumerate(candidates):
            now = counts[number]
            chosen = one.levels < now if down else one.levels > now
            for level in one.levels[chosen].tolist():
                before = total(counts, changed[number])
                counts[number] = level
                saved = before - total(counts, changed[number])
                counts[number] = now
                yield saved, sums[number][now] - sums[number][level], number, level

    while total(counts) > target:
        cuts = [(ms / max(lost, 1e-30), n, k) for ms, lost, n, k in steps(down=True) if ms > 0]
        if not cuts:
            return np.array([one.levels[0] for one in candidates], dtype=np.int64)
        _, number, level = max(cuts, key=operator.itemgetter(0))
        counts[number] = level
    while True:
        room = total(counts) - target
        fits = [
            (-lost / max(-ms, 1e-9), number, level)
            for ms, lost, number, level in steps(down=False)
            if ms >= room and lost < 0
        ]
        if not fits:
            return counts
        _, number, level = max(fits, key=operator.itemgetter(0))
        counts[number] = level


class Stopwatch(ExitStack):
    """Latency of networks on a runtime, each timed in turns with the uncut one.

    A machine is faster in one minute than in the next. What is measured is therefore a ratio, and
    the milliseconds are that ratio times those of the uncut network at the start, or those that
    were measured before: ``original_ms``.
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
