"""Plan pruning: trace, score, select, and write the decision down as a plan."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

import numpy as np
from torch import nn

from compress import plugins
from compress.errors import PlanError, UsageError, listed, nearest
from compress.groups import Network, trace
from compress.groups.network import Group
from compress.groups.plan import PrunePlan, make_prune_plan
from compress.groups.proof import example_shapes
from compress.modules import network_of, with_gradients
from compress.modules.inputs import Example, example_of, read_batches
from compress.modules.outputs import as_places
from compress.prune.criteria import Criterion
from compress.prune.latency import counts_for_latency
from compress.prune.loss import Answers, Loss, SampledAnswers
from compress.prune.saliency import Batches, criterion_name, scores
from compress.prune.selection import (
    Budget,
    CandidateCounts,
    CostModel,
    Counts,
    Floats,
    Normalize,
    Quantity,
    Ranking,
    RoundTo,
    candidate_counts,
    kept_units,
    normalized,
    one_budget,
    select,
)

logger = logging.getLogger(__name__)
# Channels that kernels compute at once: ONNX Runtime leaves blocks of 16 for a slower way where a
# width is no multiple of 4.
LEAST_BLOCK, MOST_BLOCK = 4, 16


@with_gradients()
def plan_pruning(  # noqa: PLR0913 - the public face: every option by its name
    model: nn.Module,
    example_input: Example,
    *,
    criterion: str | Mapping[str, Any] | Criterion = "l2",
    keep_macs: float | None = None,
    keep_params: float | None = None,
    keep_channels: float | Mapping[str, float] | None = None,
    keep_latency: float | None = None,
    latency_ms: float | None = None,
    runtime: str = "onnxruntime",
    ranking: Ranking = "global",
    normalize: Normalize = "auto",
    round_to: RoundTo = 1,
    min_channels: int = 1,
    max_cut: float = 1.0,
    exclude: Iterable[str] = (),
    batches: Batches | None = None,
    loss: Loss | None = None,
    outputs: Iterable[str | int] | str | int | None = None,
    answers: Answers = "auto",
    seed: int = 0,
) -> PrunePlan:
    """Decide which channels of ``model`` to cut, so that one budget is kept.

    Args:
        model: A trained network, in a wrapper (compiled, DataParallel, EMA) or not. Not modified.
        example_input: An input for one image, (1, C, H, W), its shape, or a tuple or dict of
            several.
        criterion: Name of a criterion, ``{name: options}``, or a criterion.
        keep_macs: Share of the multiply-accumulates that is kept at most, in (0, 1].
        keep_params: Share of the parameters that is kept at most, in (0, 1].
        keep_channels: Share of the channels of every group, or of the layers named, in (0, 1].
        keep_latency: Share of the latency of one image on ``runtime`` that is kept at most, in
            (0, 1]; both networks are timed in turns, whatever the pace of the machine.
        latency_ms: Latency of one image to reach on ``runtime``, milliseconds.
        runtime: Where latency is measured.
        ranking: "global" compares units of all groups; "uniform" cuts the same share of each.
        normalize: How scores of different groups are compared. "mean" and "max" divide by the
            group's mean or maximum, "gaussian" standardizes, "none" compares them as they are,
            "per_cost" compares score per multiply-accumulate (or parameter) saved. "auto" is
            "per_cost" for criteria that estimate a change of the loss, "mean" for the others.
        round_to: Kept channels of a group are a multiple of this, or all of them. "auto": of what
            kernels take at once, 16 in groups of 128 and more, 8 and 4 in narrower ones; or a power
            of two below that, so that no budget is out of reach.
        min_channels: Channels that every group keeps at least.
        max_cut: Largest share of a group's channels that may go, in (0, 1].
        exclude: Layers, or modules holding layers, whose output channels stay.
        batches: For criteria that need data, as ``compress.modules.inputs.read_batch`` reads them:
            images (B, C, H, W) alone (taylor and hessian need targets), (images, targets), dicts.
        loss: ``loss(outputs, targets)``, a scalar, for criteria that take its gradients (taylor,
            hessian): ``outputs`` is what ``model`` returns, ``targets`` comes from ``batches``. By
            default cross-entropy for classes and rows of probabilities, binary cross-entropy for
            labels 0 and 1 of the output's shape, squared error for values beyond [0, 1] and images.
        outputs: Places of the outputs that count, as in what ``model`` returns: ``"0"``,
            ``"boxes"``, ``"1.scores"``; all if absent. The others, as the feature maps that
            detectors return beside their boxes, may get fewer channels.
        answers: For criteria that look at the network's own answers (fisher, obs): "classes"
            where they are logits, "numbers" for anything else; "auto" tells by their shape.
        seed: Seed of random choices; the same seed gives the same plan.

    Returns:
        The plan: for ``compress.apply_pruning``, ``compress.mask_pruning`` and ``plan.save``.

    Raises:
        UsageError: options that cannot be right; the message says which and what would be.
        PlanError: nothing can be cut, or the budget is below what can be reached.
    """
    budget = one_budget(
        keep_macs=keep_macs, keep_params=keep_params, keep_channels=keep_channels,
        keep_latency=keep_latency, latency_ms=latency_ms,
    )  # fmt: skip
    limits = _Limits(round_to, min_channels, max_cut, exclude)
    _check_choices(ranking=(ranking, Ranking), normalize=(normalize, Normalize),
                   answers=(answers, Answers))  # fmt: skip
    if not callable(criterion):
        criterion = cast("Criterion", plugins.create("criteria", criterion, seed=seed))
    if normalize == "auto":
        normalize = "per_cost" if getattr(criterion, "estimates_loss", False) else "mean"
    model, example, places = network_of(model), example_of(example_input), as_places(outputs)
    batches = None if batches is None else read_batches(batches, example)
    network = trace(model, example, places)
    _check_counted(network, budget)
    marked, excluded = _with_excluded(model, network, limits.exclude)
    own = SampledAnswers(answers, places, seed=seed)
    found = scores(model, network, criterion, batches, loss, own)
    rows = [normalized(row, normalize) for row in found]
    candidates = _candidates(network, rows, limits, excluded)
    about: dict[str, Any] = {
        "criterion": {criterion_name(criterion): _options(criterion)}, "budget": budget.to_json(),
        "ranking": ranking, "normalize": normalize, "limits": vars(limits), "seed": seed,
        "example": example_shapes(example),
    }  # fmt: skip
    if budget.kind in ("latency", "latency_ms"):
        importance = _importance(CostModel(network), candidates, normalize)
        counts, about["latency"] = counts_for_latency(
            model, example, network, candidates, importance, budget, runtime
        )
        about["budget"]["runtime"] = runtime
    else:
        per_cost = normalize == "per_cost"
        counts = _counts(model, network, candidates, budget, ranking, per_cost=per_cost)
    about |= {"outputs": places} if places is not None else {}
    about |= {"side_outputs": network.side_outputs} if network.side_outputs else {}
    return make_prune_plan(marked, kept_units(network, candidates, counts), **about)


class _Limits:
    """What a plan must respect besides its budget."""

    def __init__(
        self, round_to: RoundTo, min_channels: int, max_cut: float, exclude: Iterable[str]
    ) -> None:
        for name, value, word in (
            ("round_to", round_to, ', or "auto"'),
            ("min_channels", min_channels, ""),
        ):
            if word and value == "auto":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(
                    f"{name} is {value!r}", expected=f"a whole number, at least 1{word}"
                )
        if not isinstance(max_cut, int | float) or not 0 < max_cut <= 1:
            raise UsageError(f"max_cut is {max_cut!r}", expected="a share above 0, at most 1")
        self.round_to, self.min_channels, self.max_cut = round_to, min_channels, max_cut
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def multiple(self, channels: int) -> int:
        """Return what the kept ones of so many channels are a multiple of."""
        if self.round_to != "auto":
            return self.round_to
        share = 1 << max(channels // 8, 1).bit_length() - 1
        return min(max(share, LEAST_BLOCK), MOST_BLOCK, max(channels // 4, 1))


def _check_choices(**options: tuple[object, Any]) -> None:
    """Refuse an option, given with the ``Literal`` of what it may be, that is something else."""
    for option, (value, kind) in options.items():
        if value not in get_args(kind):
            expected = f"one of: {', '.join(get_args(kind))}"
            raise UsageError(f"{option} is {value!r}", expected=expected)


def _options(criterion: Criterion) -> dict[str, Any]:
    names = getattr(type(criterion), "__dataclass_fields__", {})
    return {name: getattr(criterion, name) for name in names}


def _check_counted(network: Network, budget: Budget) -> None:
    """Refuse a budget of MACs where layers ran on nothing, as a head without detections does."""
    idle = [
        name.removesuffix(".weight") for name, layer in network.layers.items() if not layer.macs
    ]
    if budget.kind != "macs" or not idle:
        return
    raise PlanError(
        f"keep_macs cannot be held: on the example input {listed(idle)} ran on empty "
        "tensors, so that their multiply-accumulates are unknown",
        fix="Give an example on which they compute something, such as an image with detections, or "
        "a budget in parameters or channels",
    )


def _with_excluded(
    model: nn.Module, network: Network, names: tuple[str, ...]
) -> tuple[Network, dict[int, str]]:
    """Return the network that says why groups stay whole, and those groups with their reasons.

    They are those that ``names`` exclude, and those of one unit.
    """
    numbered = enumerate(network.groups)
    whole = {number: _together(group) for number, group in numbered if group.size == 1}
    for name in names:
        found = _groups_of(model, network, name, "exclude")
        whole |= dict.fromkeys(found, f"excluded by the name {name!r}")
    why = {network.groups[number].name: reason for number, reason in whole.items()}
    if len(whole) == len(network.groups):
        raise PlanError(
            f"no channel of this network can be cut: {_by_reason({**why, **network.frozen})}"
        )
    if network.side_outputs:
        logger.warning(
            "the network also leaves tensors on attributes, which get fewer channels: %s; return "
            "them to keep their channels",
            listed(network.side_outputs),
        )
    return dataclasses.replace(network, frozen={**network.frozen, **why}), whole


def _by_reason(why: Mapping[str, str]) -> str:
    """Return the layers that stay, under the reason that they share."""
    layers: dict[str, list[str]] = {}
    for layer, reason in why.items():
        layers.setdefault(reason, []).append(layer)
    shown = [f"{listed(names, 3)}: {reason}" for reason, names in layers.items()]
    more = f"; and {len(shown) - 5} more reasons" if shown[5:] else ""
    return "; ".join(shown[:5]) + more


def _together(group: Group) -> str:
    """Return why the channels of a group of one unit stay."""
    if group.width == 1:
        return "it makes one channel"
    return "its channels are tied to one another and could only go all together"


def _groups_of(model: nn.Module, network: Network, layer: str, option: str) -> list[int]:
    """Return the groups whose channels ``layer``, or a layer inside it, produces."""
    found = [
        number
        for number, group in enumerate(network.groups)
        if group.name == layer
        or any(
            piece.role == "output" and f"{piece.tensor}.".startswith(f"{layer}.")
            for piece in group.slices
        )
    ]
    known = [name for name, _ in model.named_modules() if name]
    if not found and layer not in known:
        close = nearest(layer, known)
        names = f"Nearest names: {', '.join(close)}" if close else f"Layers: {', '.join(known[:8])}"
        raise UsageError(f"there is no layer {layer!r}", where=option, fix=names)
    return found


def _shares_by_group(
    model: nn.Module, network: Network, shares: Mapping[str, float]
) -> dict[int, float]:
    """Return the share of channels that each named group keeps."""
    found: dict[int, float] = {}
    said_by: dict[int, str] = {}
    for layer, share in shares.items():
        numbers = _groups_of(model, network, layer, "keep_channels")
        if not numbers and share < 1:
            reason = network.frozen.get(layer, "it produces no channels that could be cut")
            raise PlanError(f"the channels of this layer stay: {reason}", where=layer)
        for number in numbers:
            if found.setdefault(number, share) != share:
                raise PlanError(
                    f"keeps {share:g} of its channels but {said_by[number]}, which is cut together "
                    f"with it, keeps {found[number]:g}",
                    where=f"keep_channels: {layer}",
                    fix="Give both the same share, or name one of them",
                )
            said_by.setdefault(number, layer)
    return found


def _candidates(
    network: Network, found: list[Floats], limits: _Limits, excluded: Mapping[int, str]
) -> list[CandidateCounts]:
    """Return the counts each group may keep; limits are in channels, counts in units."""
    candidates = []
    for number, (group, values) in enumerate(zip(network.groups, found, strict=True)):
        multiple = limits.multiple(group.size * group.width)
        step = multiple // math.gcd(multiple, group.width)
        at_least = max(
            math.ceil(limits.min_channels / group.width),
            math.ceil(group.size * (1 - limits.max_cut) - 1e-9),
        )
        at_least = group.size if number in excluded else at_least
        few = limits.round_to == "auto"  # so that no budget is out of reach
        candidates.append(candidate_counts(values, step=step, at_least=at_least, below=few))
    return candidates


def _importance(cost: CostModel, candidates: list[CandidateCounts], way: Normalize) -> list[Floats]:
    """Return scores that can be added up over groups, in the order in which units are kept.

    Changes of the loss are. Other scores compare units of like cost: they are weighed by the MACs
    that a unit costs, as if each multiply-accumulate of equal score mattered alike.
    """
    if way == "per_cost":
        return [one.scores for one in candidates]
    weights = cost.marginal("macs", cost.sizes) / max(cost.total("macs", cost.sizes), 1)
    return [one.scores * weight for one, weight in zip(candidates, weights, strict=True)]


def _whole_layers(network: Network) -> str:
    """Return how many layers stay whole, and why most of them do, to end a sentence with."""
    for why, layers in Counter(network.frozen.values()).most_common(1):
        stay = "1 layer stays" if len(network.frozen) == 1 else f"{len(network.frozen)} layers stay"
        return f"; {stay} whole ({layers}: {why})"
    return ""


def _counts(
    model: nn.Module,
    network: Network,
    candidates: list[CandidateCounts],
    budget: Budget,
    ranking: Ranking,
    *,
    per_cost: bool,
) -> Counts:
    """Return the units that each group keeps within a budget of channels, MACs or parameters."""
    if budget.kind == "channels":
        shares: dict[int, float] = {}
        if isinstance(budget.value, Mapping):
            shares, others = _shares_by_group(model, network, budget.value), 1.0
        else:
            others = budget.value
        pairs = enumerate(candidates)
        kept = [one.level_at_most(shares.get(number, others) * one.size) for number, one in pairs]
        return np.array(kept, dtype=np.int64)
    cost = CostModel(network)
    quantity: Quantity = "params" if budget.kind == "params" else "macs"
    share = budget.share
    whole = cost.total(quantity, cost.sizes)
    smallest = cost.total(quantity, np.array([one.levels[0] for one in candidates], dtype=np.int64))
    if smallest > share * whole:
        raise PlanError(
            f"keep_{quantity} = {share:g} cannot be reached: with every group at its smallest, "
            f"{smallest / whole:.4f} of the {quantity} is left{_whole_layers(network)}",
            expected=f"at least {math.ceil(smallest / whole * 1e4) / 1e4:.4f}",
            fix="Ask for more, or relax min_channels, max_cut, round_to or exclude",
        )
    return select(
        candidates,
        lambda counts: cost.total(quantity, counts),
        (lambda counts: cost.marginal(quantity, counts)) if per_cost else None,
        share * whole,
        ranking,
    )
