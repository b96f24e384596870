"""Pruning sensitivity: accuracy against kept channels, one group at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.artifact import replacing
from compress.errors import PlanError, UsageError
from compress.groups import trace
from compress.groups.plan import make_prune_plan
from compress.groups.proof import apply_pruning
from compress.modules.inputs import Example
from compress.progress import track
from compress.prune.batchnorm import recalibrate_batchnorm
from compress.prune.criteria.l2 import L2
from compress.prune.saliency import scores
from compress.prune.selection import CostModel, candidate_counts
from compress.tasks import TOP1, Kind, Primary

SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Point:
    """One group cut to one width, everything else whole."""

    keep_channels: float  # share of the group's units that is left
    kept: int
    value: float  # of the metric
    macs_share: float  # of the whole network's MACs that is left


@dataclass(frozen=True)
class GroupCurve:
    """Accuracy with one group cut to several widths."""

    group: str
    size: int
    layers: tuple[str, ...]  # whose outputs are cut together
    points: tuple[Point, ...]  # by falling share


@dataclass(frozen=True)
class PruneSensitivity:
    """Accuracy against kept channels for every group of a network."""

    baseline: float  # of the metric
    criterion: str
    curves: tuple[GroupCurve, ...]  # in the order of execution
    metric: Primary = TOP1

    def keep_channels(self, max_drop: float) -> dict[str, float]:
        """Return the smallest share that costs each group at most ``max_drop`` of the metric.

        It is a budget for ``plan_pruning(keep_channels=...)``. Groups are judged one at a time, so
        cutting them together costs more than that.
        """
        found = {}
        for curve in self.curves:
            share = 1.0
            for point in curve.points:
                if self.metric.drop(self.baseline, point.value) > max_drop:
                    break
                share = point.keep_channels
            found[curve.group] = share
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the curves as JSON-able data."""
        data = asdict(self)
        metric, baseline = data.pop("metric"), data.pop("baseline")
        named, key = {"metric": metric, "baseline": baseline}, "value"
        if self.metric == TOP1:
            named, key = {f"baseline_{TOP1.name}": baseline}, TOP1.name
        curves = [
            one
            | {
                "layers": list(one["layers"]),
                "points": [_renamed(point, "value", key) for point in one["points"]],
            }
            for one in data["curves"]
        ]
        return named | data | {"curves": curves}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneSensitivity:
        """Return the curves that ``to_json`` wrote.

        Raises:
            PlanError: the data is something else.
        """
        try:
            curves = []
            for one in data["curves"]:
                points = [Point(**_renamed(point, TOP1.name, "value")) for point in one["points"]]
                layers = tuple(one["layers"])
                curves.append(GroupCurve(one["group"], one["size"], layers, tuple(points)))
            if f"baseline_{TOP1.name}" in data:
                return cls(data[f"baseline_{TOP1.name}"], data["criterion"], tuple(curves))
            metric = Primary(data["metric"]["name"], Kind(**data["metric"]["kind"]))
            return cls(data["baseline"], data["criterion"], tuple(curves), metric)
        except (KeyError, TypeError) as error:
            raise PlanError(f"this is no sensitivity to pruning: {error!r}") from None


def _renamed(row: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in row.items()}


def prune_sensitivity(
    model: nn.Module,
    example_input: Example,
    evaluate: Callable[[nn.Module], float],
    *,
    shares: Sequence[float] = SHARES,
    recalibrate: Iterable[tuple[Tensor, Tensor]] = (),
) -> PruneSensitivity:
    """Cut one group at a time to several widths by L2 and return the accuracy of each cut.

    ``evaluate`` returns the accuracy of a network, always on the same images; where it is not top-1
    in percent, replace ``metric`` in the result. ``shares`` of each group's channels, in (0, 1),
    are kept. BatchNorm is estimated again on the images of ``recalibrate`` after every cut.

    Raises:
        UsageError: a share is out of range.
        PlanError: nothing can be cut.
    """
    for share in shares:
        if not 0 < share < 1:
            raise UsageError(f"shares holds {share!r}", expected="shares above 0 and below 1")
    network = trace(model, example_input)
    found = scores(model, network, L2())
    cost = CostModel(network)
    whole = cost.total("macs", cost.sizes)
    images = list(recalibrate)
    curves = []
    for number, group in enumerate(track(network.groups, "sensitivity")):
        one = candidate_counts(found[number], step=1, at_least=1)
        points = []
        for count in sorted({one.level_at_most(s * group.size) for s in shares}, reverse=True):
            small = apply_pruning(model, make_prune_plan(network, {group.name: one.kept(count)}))
            if images:
                recalibrate_batchnorm(small, images)
            counts = cost.sizes.copy()
            counts[number] = count
            left = cost.total("macs", counts) / max(whole, 1)
            points.append(Point(count / group.size, count, evaluate(small), round(left, 6)))
        layers = (p.tensor.rpartition(".")[0] for p in group.slices if p.role == "output")
        curves.append(
            GroupCurve(group.name, group.size, tuple(dict.fromkeys(layers)), tuple(points))
        )
    return PruneSensitivity(evaluate(model), "l2", tuple(curves))


def plot_sensitivity(found: PruneSensitivity, path: str | Path) -> Path:
    """Draw one small chart per group, the metric against kept channels, and return the file's path.

    It ends in .svg, .png or .pdf.
    """
    from matplotlib.figure import Figure

    target = Path(path)
    columns = min(4, max(1, len(found.curves)))
    rows = math.ceil(len(found.curves) / columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for axis, curve in zip(axes, found.curves, strict=False):
        shares = [1.0, *(point.keep_channels for point in curve.points)]
        values = [found.baseline, *(point.value for point in curve.points)]
        axis.plot(shares, values, marker="o", markersize=3, linewidth=1.2, color="#2a6f97")
        axis.axhline(found.baseline, color="#9aa5b1", linewidth=0.8)
        axis.set_title(f"{curve.group} ({curve.size})", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(found.curves) :]:
        axis.set_visible(False)
    figure.supxlabel("share of the group's channels kept", fontsize=9)
    figure.supylabel(found.metric.title, fontsize=9)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".") or "png", dpi=150)
    return target
