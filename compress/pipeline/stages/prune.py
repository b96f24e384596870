"""The stages prune and sparsify: cut channels in rounds and prove it, or zero single weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import plugins, prune
from compress.groups import trace
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning, prove
from compress.modules.objective import TaskLoss
from compress.modules.outputs import returned
from compress.pipeline.context import RunContext, RunVariant, StageResult, save_stage
from compress.prune import sparsity
from compress.prune.saliency import takes_targets
from compress.recipe.settings import PruneSettings, SparsifySettings, TrainSettings
from compress.report import schema
from compress.tasks import OutputTask, Task
from compress.train import CrossEntropy, shown_batches


def prune_channels(
    context: RunContext, settings: PruneSettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Cut channels to the budget, in rounds if asked, and prove every cut."""
    parent = before[-1]
    model = context.network(parent)
    if settings.sparsity_training is not None:
        _train_sparse(context, model, settings, stage)
    model, plan, facts = _prune_in_rounds(context, model, settings, stage)
    facts |= {
        "macs": [plan.macs_before, plan.macs_after],
        "params": [plan.params_before, plan.params_after],
        "frozen": dict(plan.frozen),
    }
    if settings.latency_ms is not None or settings.keep_latency is not None:
        uncut, example = context.network(parent), context.dataset.example
        check = prune.check_latency(model, uncut, plan, example)
        gate = schema.Gate(
            name="latency_ms",
            limit=check.promised_ms,
            measured=check.measured_ms,
            passed=check.missed is None,
            variant="pruned",
            runtime=check.runtime,
            reason=check.missed,
        )
        facts["gates"] = [gate.model_dump(exclude_unset=True)]
    return save_stage(context, model, stage, "pruned", parent=parent, plan=plan, facts=facts)


def _prune_in_rounds(
    context: RunContext, model: nn.Module, settings: PruneSettings, stage: Path
) -> tuple[nn.Module, PrunePlan, dict[str, Any]]:
    """Return the network after all rounds, their joined plan, and what is recorded of them.

    That is the largest relative difference between a pruned network and its masked original, and
    the primary metric after each step of the last round.
    """
    example = context.dataset.example
    budget = prune.one_budget(**{name: getattr(settings, name) for name in prune.BUDGETS})
    if settings.refit_steps:
        prune.check_blocks(model, example)
    total: PrunePlan | None = None
    differences, validation = [], {"before": context.validation_pct(model)}
    for number in range(1, settings.rounds + 1):
        batches = list(context.dataset.batches("calibration"))
        plan = prune.plan_pruning(
            model,
            example,
            **budget.in_round(number, settings.rounds, total).to_json(),
            runtime=settings.runtime,
            criterion=settings.criterion,
            ranking=settings.ranking,
            normalize=settings.normalize,
            round_to=settings.round_to,
            min_channels=settings.min_channels,
            max_cut=settings.max_cut,
            exclude=settings.exclude,
            batches=batches,
            seed=context.recipe.seed,
            **outputs_read(context.task, model, example, settings),
        )
        differences.append(prove(model, plan, example))
        small = apply_pruning(model, plan)
        total = plan if total is None else total.then(plan)
        validation["cut"] = context.validation_pct(small)
        shown = functools.partial(_shown_batches, context, settings, number)
        if settings.refit:
            _refit(context, settings, (small, model, plan), batches, shown, validation)
        else:
            plain = itertools.islice(context.dataset.batches("train"), settings.recalibrate_batches)
            prune.recalibrate_batchnorm(small, shown() or plain)
            validation["recalibrated"] = context.validation_pct(small)
        model = small
        if settings.round_training is not None and number < settings.rounds:
            context.train(model, settings.round_training, stage / f"round-{number}")
    if total is None:
        raise ValueError("the number of rounds must be at least 1")
    facts = {"proof_relative_difference": max(differences), "validation_top1_pct": validation}
    return model, total, facts


def _refit(
    context: RunContext,
    settings: PruneSettings,
    cut: tuple[nn.Module, nn.Module, PrunePlan],
    batches: Sequence[tuple[Tensor, Tensor]],
    shown: Callable[[], Iterable[tuple[Tensor, Tensor]] | None],
    validation: dict[str, Any],
) -> None:
    """Fit the layers of a pruned network to its original, then its blocks if asked, in place.

    ``cut`` is the pruned network, its original and the plan between the two; ``validation`` gets
    the primary metric after each.
    """
    prune.refit(*cut, batches, training_batches=shown())
    validation["refitted"] = context.validation_pct(cut[0])
    if settings.refit_steps:
        steps = settings.refit_steps
        prune.refit_blocks(*cut, batches, steps=steps, training_batches=shown())
        validation["blocks refitted"] = context.validation_pct(cut[0])


def _shown_batches(
    context: RunContext, settings: PruneSettings, number: int
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Yield images as training after round ``number`` will show them; None if none follows."""
    training: TrainSettings | None = settings.round_training
    if number == settings.rounds:  # what the recipe trains by once the cut is made, if it does
        after = itertools.dropwhile(lambda each: each.prune is not settings, context.recipe.stages)
        trainings = (each.distill or each.finetune for each in after)
        training = next((each for each in trainings if each is not None), None)
    if training is None:
        return None
    return shown_batches(
        context.dataset, training, settings.recalibrate_batches, context.recipe.seed
    )


def outputs_read(
    task: Task, model: nn.Module, example: Tensor, settings: PruneSettings
) -> dict[str, Any]:
    """Return which outputs count and what they are, as the recipe or its task says."""
    if task.tells_classes:
        return {"outputs": settings.outputs}
    outputs = settings.outputs
    if outputs is None:
        outputs = task.counted_outputs(returned(model, example))
    found: dict[str, Any] = {"outputs": outputs, "answers": task.answers}
    criterion = plugins.plugin_class("criteria", plugins.parse("criteria", settings.criterion)[0])
    if isinstance(task, OutputTask) and takes_targets(criterion):
        found["loss"] = task.output_loss
    return found


def _train_sparse(
    context: RunContext, model: nn.Module, settings: PruneSettings, stage: Path
) -> None:
    training = settings.sparsity_training or TrainSettings()
    plain = CrossEntropy(training.label_smoothing)
    objective = prune.WithGroupLasso(
        plain if context.task.tells_classes else TaskLoss(context.task),
        prune.GroupLasso(trace(model, context.dataset.example)),
        settings.sparsity_strength,
    )
    context.train(model, training, stage / "sparsity", objective)


def zero_weights(
    context: RunContext, settings: SparsifySettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Zero single weights; every later training keeps them at zero."""
    parent = before[-1]
    model = context.network(parent)
    plan = sparsity.plan_sparsity(
        model,
        keep_weights=settings.keep_weights,
        pattern=settings.pattern,
        criterion=settings.criterion,
        ranking=settings.ranking,
        batches=list(context.dataset.batches("calibration")),
        seed=context.recipe.seed,
    )
    sparse = sparsity.apply_sparsity(model, plan)
    told = {"sparsity": plan.to_json()}
    return save_stage(context, sparse, stage, "sparse", parent=parent, facts=told)
