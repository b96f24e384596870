"""The loop: batches in, a trained network out, resumable at any step, the rest left as found."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress import interruption, progress
from compress.data import Dataset
from compress.errors import TrainingError, UsageError, is_out_of_memory
from compress.modules.objective import CrossEntropy, Objective, TaskLoss, TrainingProgress
from compress.recipe.settings import TrainSettings
from compress.tasks import Task
from compress.train.batches import Batch, on_device, seed_of, train_batches, training_view
from compress.train.checkpoints import MetricsLog
from compress.train.distributed import (
    Processes,
    SyncedBatchNorm,
    failing_together,
    join_processes,
)
from compress.train.optimizers import frozen_layers, rate_factor
from compress.train.state import Training, TrainResult, autocast, fastest_format

logger = logging.getLogger(__name__)

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
        UsageError: a setting needs validation images and there are none, or ``objective`` is no
            ``Objective``.
    """
    if task is not None and task.tells_classes:
        task = None
    if objective is None:
        plain = CrossEntropy(settings.label_smoothing)
        objective = plain if task is None else TaskLoss(task)
    if not isinstance(objective, Objective):
        raise UsageError(
            f"the objective is a {type(objective).__name__}",
            expected="a compress.modules.objective.Objective",
            fix="Derive a class from it whose call returns your loss; the rest has defaults",
        )
    try:
        check_validation(dataset, settings)
        processes = join_processes(device)
        _check_repeatable(objective, settings, processes)
        with (
            failing_together(processes),
            left_as_found(model, settings, processes.device) as frozen,
        ):
            training = Training(model, dataset, settings, objective, processes, folder, seed, task)
            training.resume()
            training.judge_start()
            _all_epochs(training, frozen)
            return training.result()
    finally:
        objective.close()


@contextlib.contextmanager
def left_as_found(
    model: nn.Module, settings: TrainSettings, device: torch.device
) -> Iterator[list[nn.Module]]:
    """Prepare a network for training; restore everything but the weights afterwards.

    Modes, ``requires_grad``, device, memory format, global random state and flags of torch are
    as before afterwards.

    Yields:
        The modules that ``settings.freeze_until`` freezes; they stay in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    home = next((tensor.device for tensor in model.parameters()), device)
    frozen = [model.get_submodule(name) for name in frozen_layers(model, settings.freeze_until)]
    devices = [device] if device.type == "cuda" else []
    flags = _flags(settings, device)
    with torch.random.fork_rng(devices=devices), flags, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels, in DDP
        try:
            for module in frozen:
                module.requires_grad_(False)
            form = fastest_format(model, settings, device)
            model.to(device).to(memory_format=form)
            yield frozen
        finally:
            form = torch.contiguous_format if settings.channels_last else torch.preserve_format
            model.to(home).to(memory_format=form)
            for module, training in modes.items():
                module.training = training
            for parameter, requires_grad in wanted.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = None


@contextlib.contextmanager
def _flags(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    deterministic, threads = settings.deterministic, torch.get_num_threads()
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        torch.set_num_threads(settings.threads or threads)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _all_epochs(training: Training, frozen: Sequence[nn.Module]) -> None:
    """Train to the end; ``frozen`` modules stay in evaluation mode."""
    settings, writes = training.settings, training.processes.is_main
    log = MetricsLog(
        training.folder if writes else None, settings.track if writes else None, training.rows
    )
    size = training.batch_size
    images, done = settings.epochs * training.steps * size, training.steps_done * size
    with log, progress.task("train", images, done=done) as counter:
        while training.epoch < settings.epochs and not training.stopped_early:
            with interruption.deferred():
                training.model.train()
                for module in frozen:
                    module.eval()
                _one_epoch(training, log, counter)
            interruption.stop_if_asked()


def _one_epoch(training: Training, log: MetricsLog, counter: progress.ProgressTask) -> None:
    """Train to the end of the current epoch, validate, save."""
    settings, processes = training.settings, training.processes
    every = max(1, training.steps // ROWS_IN_EPOCH)
    batches = train_batches(
        training.dataset,
        settings,
        training.epoch,
        training.seed,
        rank=processes.rank,
        world=processes.world,
        skip=training.step,
    )
    started, note = time.perf_counter(), ""
    for batch in batches:
        if interruption.is_asked():
            if processes.world == 1:  # of several, each knows its own losses since the last row
                training.save()
            interruption.stop_if_asked()
        _step(training, batch)
        counter.advance(batch.total, note)
        if training.step % every == 0 or training.step == training.steps:
            row = training.take_row(batch.total, started)
            note = f"{row['images_per_second']:.0f} images/s, loss {row['loss']:.3f}"
            if training.step < training.steps:
                log.add(row)
                if time.monotonic() - training.saved_at > 60 * settings.checkpoint_minutes:
                    training.save()
            started = time.perf_counter()
    log.add(training.end_epoch(row))
    training.save()


def _step(training: Training, batch: Batch) -> None:
    """Take one step with ``batch``; its loss joins ``training.losses``."""
    settings = training.settings
    rate = settings.lr * rate_factor(training.position, settings)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    while (loss := _gradients_or_none(training, batch)) is None:
        _take_more_parts(training, batch)
    training.sharing.finish()
    _update(training)
    training.losses.append(loss)
    training.step += 1


def _gradients_or_none(training: Training, batch: Batch) -> Tensor | None:
    """Compute gradients; None where memory ran out in any process and may be saved."""
    rank = training.processes.rank
    torch.manual_seed(seed_of(training.seed, training.epoch, training.step, rank))  # of dropout
    loss = None
    try:
        loss = _gradients(training, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if not training.settings.halve_batch:
        if loss is None:
            raise _too_large(training, batch)
        return loss
    return None if training.processes.any(loss is None) else loss


def _gradients(training: Training, batch: Batch) -> Tensor:
    """Add the gradients of every part; returns this process's share of the mean loss, ()."""
    settings = training.settings
    device, world = training.processes.device, training.processes.world
    loss = torch.zeros((), device=device)
    count = len(batch.index)
    pieces = torch.arange(count).tensor_split(min(training.parts, count))
    for number, piece in enumerate(pieces):
        share = len(piece) / batch.total
        rows = slice(int(piece[0]), int(piece[-1]) + 1)
        images, target = training_view(
            batch.images[rows].to(device, non_blocking=True),
            on_device(batch.target[rows], device),
            batch.chances[rows].to(device, non_blocking=True),
            training.dataset,
            settings,
        )
        images = images.to(memory_format=training.memory_format)
        index = batch.index[rows].to(device)
        training.objective.before(TrainingProgress(training.position, index, training.model))
        synced = settings.sync_batchnorm and world > 1
        with (
            training.sharing.part(last=number == len(pieces) - 1),
            SyncedBatchNorm() if synced else contextlib.nullcontext(),
        ):
            with autocast(training.precision, device):
                value = training.sharing.module(images, target)
            penalized = value + _l1(training) if settings.l1 else value
            training.scaler.scale(penalized * (share * world)).backward()
        loss += value.detach() * share
    return loss


def _l1(training: Training) -> Tensor:
    parameters = training.model.parameters()
    weights = [p for p in parameters if p.requires_grad and p.ndim > 1]
    norm = torch.stack([weight.abs().sum() for weight in weights]).sum()
    return training.settings.l1 * norm


def _update(training: Training) -> None:
    clip_norm = training.settings.clip_norm
    if clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    if training.average is not None:
        training.average.update(training.model, training.steps_done)


def _take_more_parts(training: Training, batch: Batch) -> None:
    """Compute batches in twice as many parts from now on; called when memory ran out."""
    processes = training.processes
    if training.parts >= batch.total // processes.world:
        raise _too_large(training, batch)
    training.optimizer.zero_grad(set_to_none=True)
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    training.parts *= 2
    by = f" by each of {processes.world} processes" if processes.world > 1 else ""
    note = (
        f"out of memory at step {training.steps_done + 1}: batches of {batch.total} images are "
        f"now computed in {training.parts} parts{by}"
    )
    logger.warning(note)
    training.notes.append(note)


def _too_large(training: Training, batch: Batch) -> TrainingError:
    parts = training.parts
    or_halve = (
        "" if training.settings.halve_batch else ", or halve_batch: true to do so when needed"
    )
    return TrainingError(
        f"out of memory at step {training.steps_done + 1}, {len(batch.index)} images in {parts} "
        f"part{'s' if parts > 1 else ''}",
        where="train",
        fix=f"Set accumulate: {2 * parts} to compute a batch in more parts{or_halve}",
    )


def check_validation(dataset: Dataset, settings: TrainSettings) -> None:
    """Check that there are validation images where the settings choose by them.

    Raises:
        UsageError: there are none.
    """
    wanting = "keep: best" if settings.keep == "best" else "patience"
    needed = settings.keep == "best" or settings.patience is not None
    if needed and not len(dataset.splits.get("validation", ())):
        raise UsageError(
            "no images are held back to judge checkpoints by",
            where=wanting,
            fix="Hold some back: data.validation: 0.1",
        )


def _check_repeatable(objective: Objective, settings: TrainSettings, processes: Processes) -> None:
    """Refuse to repeat steps in which processes wait for each other half-way."""
    meeting = "sync_batchnorm" if settings.sync_batchnorm else objective.meets_in
    if settings.halve_batch and processes.world > 1 and meeting:
        raise UsageError(
            f"with {meeting}, the processes synchronize within a step, and one that runs out of "
            "memory cannot repeat it alone",
            where="halve_batch",
            fix="Leave it out, and set accumulate to compute batches in more parts",
        )
