"""One training: what it works on, how far it is, and how it takes the next step."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import interruption, progress, tasks
from compress.data import Dataset
from compress.errors import TrainingError
from compress.modules.objective import Informed, Moment, Movable, Objective, Stateful
from compress.recipe.settings import TrainSettings
from compress.train import checkpoints
from compress.train.batches import Batch, on_device, seed_of, shown, steps_in_epoch, train_batches
from compress.train.context import set_training
from compress.train.distributed import Processes, SyncedBatchNorm
from compress.train.ema import Average
from compress.train.gradient_sync import Sharing
from compress.train.memory import is_out_of_memory, more_parts, too_large
from compress.train.metrics_log import Journal, Row
from compress.train.optimizers import make_optimizer, set_rate
from compress.train.precision import autocast, chosen_precision
from compress.train.schedules import factor
from compress.train.validation import Score, validate, validate_task

logger = logging.getLogger(__name__)

ROWS_IN_EPOCH = 10  # of metrics.jsonl
UNIMPORTANT = {"halve_batch", "track", "checkpoint_minutes"}  # may change on the way


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    history: tuple[Row, ...]  # rows of metrics.jsonl
    epochs: float  # done, fewer than asked for if it stopped early
    steps: int
    best_top1_pct: float | None  # of ``metric`` on validation images; None where there are none
    best_epoch: int | None  # counted from 1
    last_top1_pct: float | None
    images_per_second: float | None  # of training, without validation; median of the rows
    precision: str
    stopped_early: bool = False
    metric: str = "top1_pct"  # what validation measures
    notes: tuple[str, ...] = ()


class Step(nn.Module):
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


class Run:
    """One training: what it works on and how far it is."""

    def __init__(  # noqa: PLR0913  # the parts of one call of train
        self,
        model: nn.Module,
        dataset: Dataset,
        settings: TrainSettings,
        objective: Objective,
        processes: Processes,
        folder: Path | None,
        seed: int,
        frozen: list[nn.Module],
        task: tasks.Task | None = None,
    ) -> None:
        self.task = task
        self.model, self.dataset, self.settings = model, dataset, settings
        self.objective, self.processes, self.frozen = objective, processes, frozen
        self.folder, self.seed = folder, seed
        self.steps = steps_in_epoch(dataset, settings)
        self.precision = chosen_precision(settings.precision, processes.device)
        if isinstance(objective, Movable):
            objective.to(processes.device)
        step = Step(model, objective, settings.compile).to(processes.device)
        self.sharing = Sharing(step, processes, repeats=settings.halve_batch)
        self.optimizer = make_optimizer(model, step.adapters, settings)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.precision == "fp16")
        self.average = Average(model, settings.ema) if settings.ema else None
        self.parts = settings.accumulate
        self.epoch, self.step = 0, 0  # whole epochs done, steps done in the current one
        self.best: tuple[float, int] | None = None  # top-1 in percent, epoch counted from 1
        self.best_weights: dict[str, Tensor] = {}  # where there is no folder to keep them in
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.losses: list[Tensor] = []  # of the steps since the last row
        self.journal = Journal(None, None)
        self.saved_at = time.monotonic()
        self._resume()

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.settings.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not improved for as long as patience lasts."""
        patience, best = self.settings.patience, self.best
        return patience is not None and best is not None and self.epoch - best[1] >= patience

    @property
    def images_in_all(self) -> int:
        """Images of the whole training, counting repetitions."""
        return self.settings.epochs * self.steps * self._batch_size

    @property
    def images_done(self) -> int:
        """Images trained on so far, counting repetitions."""
        return (self.epoch * self.steps + self.step) * self._batch_size

    @property
    def _batch_size(self) -> int:
        return min(self.settings.batch_size, len(self.dataset.splits["train"]))

    @property
    def _steps_done(self) -> int:
        return self.epoch * self.steps + self.step

    @contextlib.contextmanager
    def journal_open(self) -> Iterator[None]:
        """Write rows to the folder while the block runs; only the main process does."""
        if self.processes.is_main:
            self.journal = Journal(self.folder, self.settings.track, self.rows)
        else:
            self.journal = Journal(None, None, self.rows)
        try:
            yield
        finally:
            self.journal.close()
            self.rows = self.journal.rows

    def one_epoch(self, counter: progress.Task) -> None:
        """Train to the end of the current epoch, validate, save.

        Raises:
            InterruptedBySignal: a signal asked to stop; the steps taken are saved.
        """
        with interruption.deferred():
            self._steps_of_epoch(counter)
        interruption.stop_if_asked()

    def _steps_of_epoch(self, counter: progress.Task) -> None:
        set_training(self.model, self.frozen)
        batches = train_batches(
            self.dataset,
            self.settings,
            self.epoch,
            self.seed,
            rank=self.processes.rank,
            world=self.processes.world,
            skip=self.step,
        )
        every = max(1, self.steps // ROWS_IN_EPOCH)
        start, note = time.perf_counter(), ""
        for batch in batches:
            if interruption.is_asked():
                self._save_where_it_stands()
                interruption.stop_if_asked()
            self.losses.append(self._one_step(batch))
            self.step += 1
            counter.advance(batch.total, note)
            if self.step % every == 0 or self.step == self.steps:
                row = self._row(self.losses, batch.total, start)
                note = f"{row['images_per_second']:.0f} images/s, loss {row['loss']:.3f}"
                self.losses = []
                if self.step < self.steps:
                    self.journal.add(row)
                    self._save_now_and_then()
                start = time.perf_counter()
        self.epoch, self.step = self.epoch + 1, 0
        self._end_epoch(row)

    def _one_step(self, batch: Batch) -> Tensor:
        """Take one step; returns this process's part of the mean loss, a scalar."""
        position = self.epoch + (self.step + 0.5) / self.steps
        set_rate(self.optimizer, self.settings.lr * factor(position, self.settings))
        loss = self._gradients_or_none(batch, position)
        while loss is None:
            self._take_more_parts(batch)
            loss = self._gradients_or_none(batch, position)
        self.sharing.finish()
        self._update()
        return loss

    def _gradients_or_none(self, batch: Batch, position: float) -> Tensor | None:
        """Compute gradients; None where memory ran out in any process and may be saved."""
        seed = seed_of(self.seed, self.epoch, self.step, self.processes.rank)
        torch.manual_seed(seed)  # dropout and the like
        loss = None
        try:
            loss = self._gradients(batch, position)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if not self.settings.halve_batch:
            if loss is None:
                raise too_large(len(batch.index), self.parts, self._steps_done + 1, self.settings)
            return loss
        return None if self.processes.any(loss is None) else loss

    def _gradients(self, batch: Batch, position: float) -> Tensor:
        device, world = self.processes.device, self.processes.world
        loss = torch.zeros((), device=device)
        pieces = torch.arange(len(batch.index)).tensor_split(min(self.parts, len(batch.index)))
        for number, piece in enumerate(pieces):
            share = len(piece) / batch.total
            rows = slice(int(piece[0]), int(piece[-1]) + 1)
            images, target = self._prepared(batch, rows)
            if isinstance(self.objective, Informed):
                index = batch.index[rows].to(device)
                self.objective.before(Moment(position, index, self.model))
            synced = self.settings.sync_batchnorm and world > 1
            with (
                self.sharing.part(last=number == len(pieces) - 1),
                SyncedBatchNorm() if synced else contextlib.nullcontext(),
            ):
                with autocast(self.precision, device):
                    value = self.sharing.module(images, target)
                penalized = value + self._l1() if self.settings.l1 else value
                self.scaler.scale(penalized * (share * world)).backward()
            loss += value.detach() * share
        return loss

    def _prepared(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Return images and target of some rows of a batch, on the device, augmented."""
        device = self.processes.device
        images = batch.images[rows].to(device, non_blocking=True)
        target = on_device(batch.target[rows], device)
        chances = batch.chances[rows].to(device, non_blocking=True)
        return shown(images, target, chances, self.dataset, self.settings)

    def _l1(self) -> Tensor:
        weights = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        norm = torch.stack([weight.abs().sum() for weight in weights]).sum()
        return self.settings.l1 * norm

    def _update(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, self._steps_done)

    def _take_more_parts(self, batch: Batch) -> None:
        """Compute batches in twice as many parts from now on; called when memory ran out."""
        if self.parts >= batch.total // self.processes.world:
            raise too_large(len(batch.index), self.parts, self._steps_done + 1, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        self.parts *= 2
        note = more_parts(batch.total, self.parts, self._steps_done + 1, self.processes.world)
        logger.warning(note)
        self.notes.append(note)

    def _row(self, losses: list[Tensor], batch_size: int, start: float) -> Row:
        values = self.processes.sum(torch.stack(losses).double()).cpu()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["rate"]
        finite = torch.isfinite(values)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            self._fail(float(values[first]), self._steps_done - len(losses) + first + 1, rate)
        seconds = time.perf_counter() - start
        return {
            "epoch": round(self.epoch + self.step / self.steps, 6),
            "step": self._steps_done,
            "loss": float(values.mean()),
            "lr": rate,
            "images_per_second": round(len(losses) * batch_size / max(seconds, 1e-9), 1),
        }

    def _fail(self, loss: float, step: int, rate: float) -> None:
        kept = self.folder is not None and (self.folder / checkpoints.LAST).exists()
        checkpoint = f"The last good checkpoint is {self.folder}/{checkpoints.LAST}. "
        raise TrainingError(
            f"the loss became {loss} at step {step}, learning rate {rate:g}",
            where="train",
            expected="a finite loss",
            fix=f"{checkpoint if kept else ''}Try a lower rate: lr: {self.settings.lr / 3:.2g}",
        )

    def _end_epoch(self, row: Row) -> None:
        self.processes.share_buffers(self.model)
        self.processes.share_buffers(self._watched)
        score = self._score()
        if score is not None:
            row |= score.row()
            if self.best is None or score.is_better_than(self.best[0]):
                self.best = (score.value, self.epoch)
                self._keep_best()
        self.journal.add(row)
        self._save(checkpoints.LAST, self._state())

    def _score(self) -> Score | None:
        if self.task is not None:
            return validate_task(self._watched, self.dataset, self.task)
        at_once = -(-self.settings.batch_size // self.parts)
        return validate(self._watched, self.dataset, self.processes, self.precision, at_once)

    @property
    def _watched(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with a training that goes on from it."""
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        settings = self.settings.model_dump(mode="json", exclude=UNIMPORTANT)
        return {
            **settings,
            "seed": self.seed,
            "data": self.dataset.fingerprint,
            "network": shapes,
            "objective": type(self.objective).__name__,
        }

    def _state(self) -> dict[str, Any]:
        objective = self.objective
        return {
            "about": self._about(),
            "epoch": self.epoch,
            "step": self.step,
            "parts": self.parts,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "objective": objective.state_dict() if isinstance(objective, Stateful) else None,
            "best": list(self.best) if self.best else None,
            "history": self.journal.rows,
            "notes": self.notes,
            "losses": [float(loss) for loss in self.losses],
        }

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if self.folder is not None and self.processes.is_main:
            checkpoints.save(self.folder / name, state)
            self.saved_at = time.monotonic()

    def _keep_best(self) -> None:
        weights = self._watched.state_dict()
        if self.folder is None and self.settings.keep == "best":
            self.best_weights = {name: value.clone() for name, value in weights.items()}
        self._save(checkpoints.BEST, {"model": weights})

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes:
            self._save(checkpoints.LAST, self._state())

    def _save_where_it_stands(self) -> None:
        """Save between two rows; of several processes each knows its own losses only."""
        if self.processes.world == 1:
            self._save(checkpoints.LAST, self._state())

    def _resume(self) -> None:
        path = self.folder / checkpoints.LAST if self.folder is not None else None
        if path is not None and path.exists():
            self._go_on_from(path)
        done = torch.tensor(float(self._steps_done), device=self.processes.device)
        if float(self.processes.sum(done.clone())) != float(done) * self.processes.world:
            raise TrainingError(
                f"process {self.processes.rank} found a checkpoint of step {int(done)}, another "
                "process found a different one or none",
                where=str(self.folder),
                fix="Use a folder that all machines share, or a fresh one",
            )

    def _go_on_from(self, path: Path) -> None:
        state = checkpoints.load(path)
        checkpoints.check_same(path, state["about"], self._about())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        if isinstance(self.objective, Stateful):
            self.objective.load_state_dict(state["objective"])
        self.epoch, self.step, self.parts = state["epoch"], state["step"], state["parts"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.rows, self.notes = state["history"], state["notes"]
        losses = state.get("losses", [])  # absent where an older version saved
        self.losses = [torch.tensor(each, device=self.processes.device) for each in losses]
        logger.info("going on from %s, epoch %d, step %d", path, self.epoch, self.step)

    def result(self) -> TrainResult:
        """Put the wanted weights into the network and return how it went."""
        if self.settings.keep == "best" and self.best is not None:
            if self.folder is not None:
                self.processes.wait()  # until the main process has written it
                self.best_weights = checkpoints.load(self.folder / checkpoints.BEST)["model"]
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            self.model.load_state_dict(self.average.model.state_dict())
        metric = "top1_pct" if self.task is None else self.task.primary
        scored = [row for row in self.rows if f"validation_{metric}" in row]
        speeds = sorted(row["images_per_second"] for row in self.rows)
        return TrainResult(
            history=tuple(self.rows),
            epochs=self.epoch,
            steps=self._steps_done,
            best_top1_pct=self.best[0] if self.best else None,
            best_epoch=self.best[1] if self.best else None,
            last_top1_pct=scored[-1][f"validation_{metric}"] if scored else None,
            images_per_second=speeds[math.floor(len(speeds) / 2)] if speeds else None,
            precision=self.precision,
            stopped_early=self.epoch < self.settings.epochs and self.stopped_early,
            metric=metric,
            notes=(*getattr(self.objective, "notes", ()), *self.notes),
        )
