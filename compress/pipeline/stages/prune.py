"""The stage prune: cut in rounds if asked, prove every cut, reconstruct or recalibrate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import prune
from compress.groups import trace
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning, prove
from compress.modules.objective import TaskLoss
from compress.modules.outputs import returned
from compress.pipeline.context import Job, Outcome, Variant, leave
from compress.recipe.settings import PruneSettings, TrainSettings
from compress.report import schema
from compress.train import CrossEntropy, shown_batches


@dataclass(frozen=True)
class _Pruned:
    """A network after all rounds."""

    model: nn.Module
    plan: PrunePlan  # of all rounds together
    difference: float  # largest relative one between a pruned network and its masked original
    validation: Mapping[str, float | None]  # primary metric after each step of the last round


def prune_channels(
    job: Job, settings: PruneSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Cut channels to the budget, in rounds if asked, and prove every cut."""
    parent = before[-1]
    model = job.network(parent)
    if settings.sparsity_training is not None:
        _train_sparse(job, model, settings, stage)
    pruned = _prune_in_rounds(job, model, settings, stage)
    plan = pruned.plan
    facts: dict[str, Any] = {
        "proof_relative_difference": pruned.difference,
        "validation_top1_pct": dict(pruned.validation),
        "macs": [plan.macs_before, plan.macs_after],
        "params": [plan.params_before, plan.params_after],
        "frozen": dict(plan.frozen),
    }
    if settings.latency_ms is not None or settings.keep_latency is not None:
        promise = prune.check_promise(pruned.model, job.network(parent), plan, job.dataset.example)
        gate = schema.Gate(
            name="latency_ms",
            limit=promise.promised_ms,
            measured=promise.measured_ms,
            passed=promise.broken is None,
            variant="pruned",
            runtime=promise.runtime,
            reason=promise.broken,
        )
        facts["gates"] = [gate.model_dump(exclude_unset=True)]
    return leave(job, pruned.model, stage, "pruned", parent=parent, plan=plan, facts=facts)


def _prune_in_rounds(job: Job, model: nn.Module, settings: PruneSettings, stage: Path) -> _Pruned:
    """Return the network after all rounds, with their joined plan."""
    example = job.dataset.example
    budget = prune.one_budget(**{name: getattr(settings, name) for name in prune.BUDGETS})
    total: PrunePlan | None = None
    differences, validation = [], {"before": job.validation_pct(model)}
    for number in range(1, settings.rounds + 1):
        batches = list(job.dataset.batches("calibration"))
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
            seed=job.recipe.seed,
            **_reading(job, model, settings),
        )
        differences.append(prove(model, plan, example))
        small = apply_pruning(model, plan)
        shown = _shown_batches(job, settings, number)
        total = plan if total is None else total.then(plan)
        validation["cut"] = job.validation_pct(small)
        if settings.refit:
            model = prune.refit(small, model, plan, batches, training_batches=shown)
            validation["refitted"] = job.validation_pct(model)
        else:
            plain = itertools.islice(job.dataset.batches("train"), settings.recalibrate_batches)
            model = prune.recalibrate_batchnorm(small, shown or plain)
            validation["recalibrated"] = job.validation_pct(model)
        if settings.round_training is not None and number < settings.rounds:
            job.train(model, settings.round_training, stage / f"round-{number}")
    if total is None:
        raise ValueError("the number of rounds must be at least 1")
    return _Pruned(model, total, max(differences), validation)


def _shown_batches(
    job: Job, settings: PruneSettings, number: int
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Yield images as training after round ``number`` will show them; None if none follows."""
    is_last = number == settings.rounds
    training = _training_after(job, settings) if is_last else settings.round_training
    if training is None:
        return None
    return shown_batches(job.dataset, training, settings.recalibrate_batches, job.recipe.seed)


def _training_after(job: Job, settings: PruneSettings) -> TrainSettings | None:
    """Return what the recipe trains by once the cut is made, if it does."""
    stages = itertools.dropwhile(lambda stage: stage.prune is not settings, job.recipe.stages)
    trainings = (stage.distill or stage.finetune for stage in stages)
    return next((each for each in trainings if each is not None), None)


def _reading(job: Job, model: nn.Module, settings: PruneSettings) -> dict[str, Any]:
    """Return which outputs count and what they are, as the recipe or its task says."""
    if job.task.tells_classes:
        return {"outputs": settings.outputs}
    outputs = settings.outputs
    if outputs is None:
        outputs = job.task.counted_outputs(returned(model, job.dataset.example))
    return {"outputs": outputs, "answers": job.task.answers}


def _train_sparse(job: Job, model: nn.Module, settings: PruneSettings, stage: Path) -> None:
    training = settings.sparsity_training or TrainSettings()
    plain = CrossEntropy(training.label_smoothing)
    objective = prune.WithGroupLasso(
        plain if job.task.tells_classes else TaskLoss(job.task),
        prune.GroupLasso(trace(model, job.dataset.example)),
        settings.sparsity_strength,
    )
    job.train(model, training, stage / "sparsity", objective)
