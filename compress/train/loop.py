"""The loop: batches in, a trained network out, resumable at any step."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress import progress
from compress.data import Dataset
from compress.errors import UsageError
from compress.modules.objective import CrossEntropy, Objective, TaskLoss
from compress.recipe.settings import TrainSettings
from compress.tasks import Task
from compress.train.context import left_as_found
from compress.train.distributed import Processes, failing_together, join_processes
from compress.train.run import Run, TrainResult


def train(  # noqa: PLR0913  # what a training is about, each with its default
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    objective: Objective | None = None,
    folder: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    task: Task | None = None,
) -> TrainResult:
    """Train ``model`` in place, in one process or in all that torchrun started.

    A training that was killed goes on from ``folder``'s last checkpoint; on a CPU its final weights
    equal those of an uninterrupted one bit by bit, because every random number is a function of
    seed, epoch and step.

    Args:
        model: The network. Its weights change; device, modes and hooks are left as found.
        dataset: Trained on "train", watched on "validation".
        settings: All about the loop.
        objective: What is minimized; cross-entropy if absent. Closed before this returns.
        folder: For last.pt, best.pt and metrics.jsonl; None writes nothing.
        seed: Decides order, augmentation and dropout.
        task: What the network is for, where that is not one class an image: its loss is minimized
            and its primary metric watched.
        device: "auto", "cpu", "cuda", ...; under torchrun each process has its own.

    Raises:
        TrainingError: the loss is not finite, memory does not suffice, a checkpoint belongs to
            another training, or another process died.
        UnknownNameError: a setting names a layer that is not there.
        UsageError: a setting needs validation images and there are none.
    """
    if task is not None and task.tells_classes:
        task = None
    if objective is None:
        plain = CrossEntropy(settings.label_smoothing)
        objective = plain if task is None else TaskLoss(task)
    try:
        _check_validation(dataset, settings)
        place = join_processes(device)
        _check_repeatable(objective, settings, place)
        with failing_together(place), left_as_found(model, settings, place.device) as frozen:
            run = Run(model, dataset, settings, objective, place, folder, seed, frozen, task)
            with run.journal_open(), progress.task("train", run.images_in_all) as counter:
                counter.advance(run.images_done)
                while not run.is_finished:
                    run.one_epoch(counter)
            return run.result()
    finally:
        objective.close()


def _check_validation(dataset: Dataset, settings: TrainSettings) -> None:
    wanting = "keep: best" if settings.keep == "best" else "patience"
    needed = settings.keep == "best" or settings.patience is not None
    if needed and not len(dataset.splits.get("validation", ())):
        raise UsageError(
            "no images are held back to judge checkpoints by",
            where=wanting,
            fix="Hold some back: data.validation: 0.1",
        )


def _check_repeatable(objective: Objective, settings: TrainSettings, place: Processes) -> None:
    """Refuse to repeat steps in which processes wait for each other half-way."""
    meeting = "sync_batchnorm" if settings.sync_batchnorm else getattr(objective, "meets_in", None)
    if settings.halve_batch and place.world > 1 and meeting:
        raise UsageError(
            f"with {meeting}, processes meet within a step, and one that runs out of memory "
            "cannot repeat it alone",
            where="halve_batch",
            fix="Leave it out, and set accumulate to compute batches in more parts",
        )
