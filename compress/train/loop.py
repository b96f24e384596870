"""The loop: batches in, a trained network out, resumable at any step."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from compress import interruption, progress
from compress.data import Dataset
from compress.errors import UsageError
from compress.modules.objective import CrossEntropy, Objective, TaskLoss
from compress.recipe.settings import TrainSettings
from compress.tasks import Task
from compress.train.batches import train_batches
from compress.train.context import left_as_found, set_training
from compress.train.distributed import Processes, failing_together, join_processes
from compress.train.metrics_log import MetricsLog
from compress.train.state import Training, TrainResult
from compress.train.step import TrainStep

ROWS_IN_EPOCH = 10  # of metrics.jsonl


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
            training = Training(
                model, dataset, settings, objective, place, folder, seed, task, tuple(frozen)
            )
            return _all_epochs(TrainStep(training), training)
    finally:
        objective.close()


def _all_epochs(train_step: TrainStep, training: Training) -> TrainResult:
    """Train to the end, from where the folder's checkpoint stands."""
    state, writes = train_step.state, training.processes.is_main
    state.resume()
    log = MetricsLog(
        training.folder if writes else None, training.settings.track if writes else None, state.rows
    )
    with log, progress.task("train", training.images, done=state.images_done) as counter:
        while not state.is_finished:
            with interruption.deferred():
                _one_epoch(train_step, training, log, counter)
            interruption.stop_if_asked()
    return state.result()


def _one_epoch(
    train_step: TrainStep, training: Training, log: MetricsLog, counter: progress.ProgressTask
) -> None:
    """Train to the end of the current epoch, validate, save."""
    state, settings, processes = train_step.state, training.settings, training.processes
    every = max(1, training.steps // ROWS_IN_EPOCH)
    set_training(training.model, training.frozen)
    batches = train_batches(
        training.dataset,
        settings,
        state.epoch,
        training.seed,
        rank=processes.rank,
        world=processes.world,
        skip=state.step,
    )
    started, note = time.perf_counter(), ""
    for batch in batches:
        if interruption.is_asked():
            state.save_between_rows()
            interruption.stop_if_asked()
        train_step(batch)
        counter.advance(batch.total, note)
        if state.step % every == 0 or state.step == training.steps:
            row = state.take_row(batch.total, started)
            note = f"{row['images_per_second']:.0f} images/s, loss {row['loss']:.3f}"
            if state.step < training.steps:
                log.add(row)
                state.save_if_due()
            started = time.perf_counter()
    log.add(state.end_epoch(row))
    state.save()


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
            f"with {meeting}, the processes synchronize within a step, and one that runs out of "
            "memory cannot repeat it alone",
            where="halve_batch",
            fix="Leave it out, and set accumulate to compute batches in more parts",
        )
