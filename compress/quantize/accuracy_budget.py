"""Leave layers in float, the cheapest first, until the loss of accuracy is within a budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch

from compress import progress
from compress.artifact import read_json, write_bytes, write_json
from compress.qdq import QuantPlan, prepare, write_qdq
from compress.quantize.sensitivity import (
    Batches,
    Judge,
    QuantSensitivity,
    labelled_arrays,
    layer_macs,
    quantize_sensitivity,
)
from compress.tasks import Task

WHY = "given back to float to stay within the accuracy budget"


@dataclass(frozen=True)
class FloatTrial:
    """One set of layers in float, and what the graph answers then."""

    float_nodes: tuple[str, ...]  # beyond those of the plan
    value: float  # of the metric
    drop: float  # in its unit, against the fp32 graph on the same images
    float_cost: float  # share of the network's cost that is in float again


@dataclass(frozen=True)
class BudgetResult:
    """How a budget was met, or how near it came."""

    max_drop: float
    images: int
    float_value: float
    met: bool
    best: FloatTrial
    trials: tuple[FloatTrial, ...]  # in order
    plan: QuantPlan = field(compare=False)


def meet_budget(
    model: onnx.ModelProto,
    plan: QuantPlan,
    batches: Batches,
    *,
    max_drop: float,
    folder: Path,
    task: Task | None = None,
) -> BudgetResult:
    """Leave as few and as cheap layers in float as keep the loss of accuracy within a budget.

    Layers are ranked by the noise that each makes alone, divided by its MACs. The
    shortest head of that ranking that meets the budget is found by doubling and bisection; then
    its layers are tried in int8 again, the most expensive first. The best graph so far is always
    on disk, and a run that was killed repeats no evaluation.

    The fp32 graph is that of ``plan``, where the search begins. Batches are labelled validation
    images, not those of calibration; ``max_drop`` is the largest loss on them of the primary metric
    of ``task``, in its unit; of top-1 if there is none. ``folder`` gets ``model.<target>.onnx``,
    ``plan.<target>.json`` and ``budget.<target>.json``.

    Raises:
        QuantizationError: the plan does not fit the graph.
        DataError: there are no images.
        RunError: the folder cannot be written.
    """
    judge = Judge(labelled_arrays(batches), task)
    search = _BudgetSearch(model, plan, judge, max_drop, folder)
    with progress.task("Accuracy budget") as counter:
        search.counter = counter
        if not search.fits(()):
            pairs = [(torch.from_numpy(images), each) for images, each in judge.labelled]
            found = quantize_sensitivity(model, plan, pairs, task=task)
            search.run(_ranked(found, search.costs))
    best = search.best
    return BudgetResult(
        max_drop,
        judge.images,
        search.float_value,
        best.drop <= max_drop,
        best,
        tuple(search.trials),
        search.plan_of(best),
    )


class _BudgetSearch:
    """The trials made so far, the best of them on disk."""

    counter: progress.ProgressTask

    def __init__(  # the parts of one call of meet_budget
        self,
        model: onnx.ModelProto,
        plan: QuantPlan,
        judge: Judge,
        max_drop: float,
        folder: Path,
    ) -> None:
        self.model, self.plan, self.judge = model, plan, judge
        self.limit, self.folder = max_drop, folder
        prepared = prepare(model)
        self.costs = layer_macs(prepared)
        self.total = sum(self.costs.values()) or 1
        self.float_value = self._value(prepared)
        self.identity = _identity(model, plan, judge)
        self.trials: list[FloatTrial] = []
        self.known = self._recall()

    @property
    def best(self) -> FloatTrial:
        """The cheapest trial within the budget; the most accurate one if there is none."""
        fitting = [t for t in self.trials if t.drop <= self.limit]
        if fitting:
            return min(fitting, key=lambda t: (t.float_cost, t.drop))
        return min(self.trials, key=lambda t: (t.drop, t.float_cost))

    def plan_of(self, trial: FloatTrial) -> QuantPlan:
        """Return the plan that leaves the layers of ``trial`` in float."""
        return self.plan.keep_float(trial.float_nodes, WHY) if trial.float_nodes else self.plan

    def run(self, ranked: Sequence[str]) -> None:
        """Search heads of ``ranked``, then give back what is not needed."""
        count = 1
        while count < len(ranked) and not self.fits(ranked[:count]):
            count *= 2
        low, high = count // 2, min(count, len(ranked))
        if not self.fits(ranked[:high]):
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(ranked[:middle]) else (middle, high)
        chosen = list(ranked[:high])
        for node in sorted(chosen, key=lambda name: -self.costs.get(name, 0)):
            without = [name for name in chosen if name != node]
            if self.fits(without):
                chosen = without

    def fits(self, nodes: Sequence[str]) -> bool:
        """Return whether the budget is met with ``nodes`` in float; evaluated once only."""
        names = tuple(sorted(nodes))
        trial = next((t for t in self.trials if t.float_nodes == names), None)
        if trial is None:
            trial = self._try(names)
        return trial.drop <= self.limit

    def _try(self, names: tuple[str, ...]) -> FloatTrial:
        before = self.best if self.trials else None
        candidate = FloatTrial(
            names, 0.0, 0.0, sum(self.costs.get(n, 0) for n in names) / self.total
        )
        written = write_qdq(self.model, self.plan_of(candidate))
        value = self.known[names] if names in self.known else self._value(written)
        drop = self.judge.metric.drop(self.float_value, value)
        trial = FloatTrial(names, value, drop, candidate.float_cost)
        self.trials.append(trial)
        if self.best != before:
            target, best = self.plan.target, self.plan_of(trial)
            write_bytes(self.folder / f"model.{target}.onnx", written.SerializeToString())
            best.save(self.folder / f"plan.{target}.json")
        self._note()
        unit = self.judge.metric.points
        self.counter.advance(note=f"{len(names)} in float: {drop:+.2f} {unit} lost")
        return trial

    def _note(self) -> None:
        trials = {json.dumps(t.float_nodes): t.value for t in self.trials}
        known = {json.dumps(names): value for names, value in self.known.items()}
        write_json(self._journal, {"identity": self.identity, "values": known | trials})

    def _recall(self) -> dict[tuple[str, ...], float]:
        if not self._journal.is_file():
            return {}
        content = read_json(self._journal)
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            return {}  # of another graph, plan or images
        return {
            tuple(json.loads(names)): value for names, value in content.get("values", {}).items()
        }

    @property
    def _journal(self) -> Path:
        return self.folder / f"budget.{self.plan.target}.json"

    def _value(self, model: onnx.ModelProto) -> float:
        float_qdq = self.plan.target != "onnxruntime"
        return self.judge.value(self.judge.outputs(model, float_qdq=float_qdq))


def _ranked(found: QuantSensitivity, costs: Mapping[str, int]) -> list[str]:
    """Return the layers by noise saved for each unit of cost, the best bargain first."""
    cheapest = min((c for c in costs.values() if c > 0), default=1)

    def bargain(node: str, sqnr_db: float) -> float:
        return float(10 ** (-sqnr_db / 10)) / max(costs.get(node, cheapest), cheapest)

    layers = sorted(found.layers, key=lambda layer: -bargain(layer.node, layer.sqnr_db))
    return [layer.node for layer in layers]


def _identity(model: onnx.ModelProto, plan: QuantPlan, judge: Judge) -> str:
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    digest.update(json.dumps(plan.to_json(), sort_keys=True).encode())
    digest.update(f"{judge.metric}".encode())
    for images, targets in judge.labelled:
        digest.update(np.ascontiguousarray(images).tobytes())
        for target in torch.utils._pytree.tree_leaves(targets):
            digest.update(np.ascontiguousarray(target).tobytes())
    return digest.hexdigest()
