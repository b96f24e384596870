"""One training step: gradients of a batch, accumulated in parts, and the update."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import TrainingError, is_out_of_memory
from compress.modules.objective import Informed, Movable, Objective, TrainingProgress
from compress.train.batches import Batch, on_device, seed_of, training_view
from compress.train.context import autocast
from compress.train.distributed import Sharing, SyncedBatchNorm
from compress.train.optimizers import make_optimizer, rate_factor, set_rate
from compress.train.state import Average, State, Training

logger = logging.getLogger(__name__)


class LossModule(nn.Module):
    """Network and objective as one module, so that gradients of both are averaged together."""

    def __init__(self, model: nn.Module, objective: Objective, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.adapters = nn.ParameterList(objective.parameters())
        # In a tuple, neither a teacher nor the compiled twin becomes a submodule.
        network: Any = torch.compile(model) if compiled else model
        self._unregistered = (objective, network)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the objective's scalar."""
        objective, network = self._unregistered
        return objective(network, images, target)


class TrainStep:
    """Takes steps of a training; owns the ``state`` that they change."""

    def __init__(self, training: Training) -> None:
        settings, processes, model = training.settings, training.processes, training.model
        if isinstance(training.objective, Movable):
            training.objective.to(processes.device)
        module = LossModule(model, training.objective, settings.compile).to(processes.device)
        scaled = training.precision == "fp16"
        self.training = training
        self.sharing = Sharing(module, processes, repeats=settings.halve_batch)
        self.state = State(
            training,
            make_optimizer(model, module.adapters, settings),
            torch.amp.GradScaler(processes.device.type, enabled=scaled),
            Average(model, settings.ema) if settings.ema else None,
            settings.accumulate,
        )

    def __call__(self, batch: Batch) -> None:
        """Take one step with ``batch``; its loss joins ``state.losses``.

        Raises:
            TrainingError: memory does not suffice.
        """
        state, settings = self.state, self.training.settings
        set_rate(state.optimizer, settings.lr * rate_factor(state.position, settings))
        loss = self._gradients_or_none(batch)
        while loss is None:
            self._take_more_parts(batch)
            loss = self._gradients_or_none(batch)
        self.sharing.finish()
        self._update()
        state.losses.append(loss)
        state.step += 1

    def _gradients_or_none(self, batch: Batch) -> Tensor | None:
        """Compute gradients; None where memory ran out in any process and may be saved."""
        training, state = self.training, self.state
        rank = training.processes.rank
        torch.manual_seed(seed_of(training.seed, state.epoch, state.step, rank))  # of dropout
        loss = None
        try:
            loss = self._gradients(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if not training.settings.halve_batch:
            if loss is None:
                raise self._too_large(batch)
            return loss
        return None if training.processes.any(loss is None) else loss

    def _gradients(self, batch: Batch) -> Tensor:
        """Add the gradients of every part; returns this process's share of the mean loss, ()."""
        training, settings = self.training, self.training.settings
        device, world = training.processes.device, training.processes.world
        loss = torch.zeros((), device=device)
        pieces = torch.arange(len(batch.index)).tensor_split(
            min(self.state.parts, len(batch.index))
        )
        for number, piece in enumerate(pieces):
            share = len(piece) / batch.total
            rows = slice(int(piece[0]), int(piece[-1]) + 1)
            images, target = self._prepared(batch, rows)
            if isinstance(training.objective, Informed):
                index = batch.index[rows].to(device)
                training.objective.before(
                    TrainingProgress(self.state.position, index, training.model)
                )
            synced = settings.sync_batchnorm and world > 1
            with (
                self.sharing.part(last=number == len(pieces) - 1),
                SyncedBatchNorm() if synced else contextlib.nullcontext(),
            ):
                with autocast(training.precision, device):
                    value = self.sharing.module(images, target)
                penalized = value + self._l1() if settings.l1 else value
                self.state.scaler.scale(penalized * (share * world)).backward()
            loss += value.detach() * share
        return loss

    def _prepared(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Return images and target of some rows of a batch, on the device, augmented."""
        device = self.training.processes.device
        images = batch.images[rows].to(device, non_blocking=True)
        target = on_device(batch.target[rows], device)
        chances = batch.chances[rows].to(device, non_blocking=True)
        return training_view(images, target, chances, self.training.dataset, self.training.settings)

    def _l1(self) -> Tensor:
        parameters = self.training.model.parameters()
        weights = [p for p in parameters if p.requires_grad and p.ndim > 1]
        norm = torch.stack([weight.abs().sum() for weight in weights]).sum()
        return self.training.settings.l1 * norm

    def _update(self) -> None:
        state, clip_norm = self.state, self.training.settings.clip_norm
        if clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update(self.training.model, state.steps_done)

    def _take_more_parts(self, batch: Batch) -> None:
        """Compute batches in twice as many parts from now on; called when memory ran out."""
        state, processes = self.state, self.training.processes
        if state.parts >= batch.total // processes.world:
            raise self._too_large(batch)
        state.optimizer.zero_grad(set_to_none=True)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
        state.parts *= 2
        by = f" by each of {processes.world} processes" if processes.world > 1 else ""
        note = (
            f"out of memory at step {state.steps_done + 1}: batches of {batch.total} images are "
            f"now computed in {state.parts} parts{by}"
        )
        logger.warning(note)
        state.notes.append(note)

    def _too_large(self, batch: Batch) -> TrainingError:
        state, parts = self.state, self.state.parts
        halves = self.training.settings.halve_batch
        or_halve = "" if halves else ", or halve_batch: true to do so when needed"
        return TrainingError(
            f"out of memory at step {state.steps_done + 1}, {len(batch.index)} images in {parts} "
            f"part{'s' if parts > 1 else ''}",
            where="train",
            fix=f"Set accumulate: {2 * parts} to compute a batch in more parts{or_halve}",
        )
