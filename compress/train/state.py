"""The state of a training, averaged weights included, and how it is saved and resumed."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import tasks
from compress.data import Dataset
from compress.errors import TrainingError
from compress.modules.objective import Objective, Stateful
from compress.recipe.settings import TrainSettings
from compress.train import checkpoints
from compress.train.batches import steps_in_epoch
from compress.train.context import chosen_precision
from compress.train.distributed import Processes
from compress.train.metrics_log import Row
from compress.train.validation import Score, validate, validate_task


class Average:
    """A second network whose weights follow those of the first, smoothly.

    The decay grows with the steps, (1 + t) / (10 + t), until it reaches its limit, so that short
    trainings are not dominated by the initial weights.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averaged weights and statistics towards those after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


logger = logging.getLogger(__name__)

UNIMPORTANT = {"halve_batch", "track", "checkpoint_minutes"}  # may change on the way


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

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


@dataclass(frozen=True)
class Training:
    """The arguments of one call of ``train``, and what follows from them."""

    model: nn.Module
    dataset: Dataset
    settings: TrainSettings
    objective: Objective
    processes: Processes
    folder: Path | None  # for checkpoints; None keeps nothing on disk
    seed: int
    task: tasks.Task | None = None  # None: one class an image
    frozen: tuple[nn.Module, ...] = ()  # modules that stay in eval mode

    @cached_property
    def precision(self) -> str:
        """What the forward pass computes in: "fp32", "bf16" or "fp16"."""
        return chosen_precision(self.settings.precision, self.processes.device)

    @cached_property
    def steps(self) -> int:
        """Steps of an epoch."""
        return steps_in_epoch(self.dataset, self.settings)

    @property
    def batch_size(self) -> int:
        """Images of a step over all processes."""
        return min(self.settings.batch_size, len(self.dataset.splits["train"]))

    @property
    def images(self) -> int:
        """Images of the whole training, counting repetitions."""
        return self.settings.epochs * self.steps * self.batch_size

    def score(self, model: nn.Module, parts: int) -> Score | None:
        """Return how good ``model`` is on validation images, None where there are none."""
        if self.task is not None:
            return validate_task(model, self.dataset, self.task)
        at_once = -(-self.settings.batch_size // parts)
        return validate(model, self.dataset, self.processes, self.precision, at_once)

    def identity(self) -> dict[str, Any]:
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


@dataclass
class State:
    """The progress of a training: everything that a checkpoint holds."""

    training: Training
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    parts: int  # that a batch is computed in
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done in the current epoch
    best: tuple[float, int] | None = None  # value of the metric, epoch counted from 1
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # where no folder keeps them
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last row
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> float:
        """Epochs done, with the fraction of the current one up to the middle of its next step."""
        return self.epoch + (self.step + 0.5) / self.training.steps

    @property
    def steps_done(self) -> int:
        """Steps of all epochs so far."""
        return self.epoch * self.training.steps + self.step

    @property
    def images_done(self) -> int:
        """Images trained on so far, counting repetitions."""
        return self.steps_done * self.training.batch_size

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not improved for as long as patience lasts."""
        patience, best = self.training.settings.patience, self.best
        return patience is not None and best is not None and self.epoch - best[1] >= patience

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.training.settings.epochs or self.stopped_early

    @property
    def watched(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.training.model if self.average is None else self.average.model

    def take_row(self, batch_size: int, started: float) -> Row:
        """Return a row of the learning curve: the steps since the last one, which are forgotten.

        Args:
            batch_size: Images of a step over all processes.
            started: ``time.perf_counter()`` at the first of the steps.

        Raises:
            TrainingError: a loss is not finite.
        """
        values = self.training.processes.sum(torch.stack(self.losses).double()).cpu()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["rate"]
        finite = torch.isfinite(values)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            step = self.steps_done - len(values) + first + 1
            raise self._not_finite(float(values[first]), step, rate)
        seconds = time.perf_counter() - started
        self.losses = []
        return {
            "epoch": round(self.epoch + self.step / self.training.steps, 6),
            "step": self.steps_done,
            "loss": float(values.mean()),
            "lr": rate,
            "images_per_second": round(len(values) * batch_size / max(seconds, 1e-9), 1),
        }

    def end_epoch(self, row: Row) -> Row:
        """Count the epoch as done and validate; returns ``row`` with the scores."""
        self.epoch, self.step = self.epoch + 1, 0
        self.training.processes.share_buffers(self.training.model)
        self.training.processes.share_buffers(self.watched)
        score = self.training.score(self.watched, self.parts)
        if score is None:
            return row
        if self.best is None or score.is_better_than(self.best[0]):
            self.best = (score.value, self.epoch)
            self._keep_best()
        return row | score.row()

    def save(self) -> None:
        """Write a checkpoint that a training can go on from."""
        objective = self.training.objective
        state = {
            "about": self.training.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "parts": self.parts,
            "model": self.training.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "objective": objective.state_dict() if isinstance(objective, Stateful) else None,
            "best": list(self.best) if self.best else None,
            "history": self.rows,
            "notes": self.notes,
            "losses": [float(loss) for loss in self.losses],
        }
        self._write(checkpoints.LAST, state)

    def save_if_due(self) -> None:
        """Write a checkpoint if the last one is older than ``checkpoint_minutes``."""
        if time.monotonic() - self.saved_at > 60 * self.training.settings.checkpoint_minutes:
            self.save()

    def save_between_rows(self) -> None:
        """Write a checkpoint between two rows; of several processes each knows its own losses."""
        if self.training.processes.world == 1:
            self.save()

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one.

        Raises:
            TrainingError: it belongs to another training, or processes found different ones.
        """
        folder, processes = self.training.folder, self.training.processes
        path = folder / checkpoints.LAST if folder is not None else None
        if path is not None and path.exists():
            self._load(path)
        done = torch.tensor(float(self.steps_done), device=processes.device)
        if float(processes.sum(done.clone())) != float(done) * processes.world:
            raise TrainingError(
                f"process {processes.rank} found a checkpoint of step {int(done)}, another "
                "process found a different one or none",
                where=str(folder),
                fix="Use a folder that all machines share, or a fresh one",
            )

    def result(self) -> TrainResult:
        """Put the wanted weights into the network and return how it went."""
        training, folder = self.training, self.training.folder
        if training.settings.keep == "best" and self.best is not None:
            if folder is not None:
                training.processes.wait()  # until the main process has written it
                self.best_weights = checkpoints.load_state(folder / checkpoints.BEST)["model"]
            training.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            training.model.load_state_dict(self.average.model.state_dict())
        metric = "top1_pct" if training.task is None else training.task.primary
        scored = [row for row in self.rows if f"validation_{metric}" in row]
        speeds = sorted(row["images_per_second"] for row in self.rows)
        return TrainResult(
            history=tuple(self.rows),
            epochs=self.epoch,
            steps=self.steps_done,
            best_top1_pct=self.best[0] if self.best else None,
            best_epoch=self.best[1] if self.best else None,
            last_top1_pct=scored[-1][f"validation_{metric}"] if scored else None,
            images_per_second=speeds[math.floor(len(speeds) / 2)] if speeds else None,
            precision=training.precision,
            stopped_early=self.epoch < training.settings.epochs and self.stopped_early,
            metric=metric,
            notes=(*getattr(training.objective, "notes", ()), *self.notes),
        )

    def _load(self, path: Path) -> None:
        state, training = checkpoints.load_state(path), self.training
        checkpoints.check_same(path, state["about"], training.identity())
        training.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        if isinstance(training.objective, Stateful):
            training.objective.load_state_dict(state["objective"])
        self.epoch, self.step, self.parts = state["epoch"], state["step"], state["parts"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.rows, self.notes = state["history"], state["notes"]
        losses = state.get("losses", [])  # absent where an older version saved
        self.losses = [torch.tensor(each, device=training.processes.device) for each in losses]
        logger.info("going on from %s, epoch %d, step %d", path, self.epoch, self.step)

    def _keep_best(self) -> None:
        weights = self.watched.state_dict()
        if self.training.folder is None and self.training.settings.keep == "best":
            self.best_weights = {name: value.clone() for name, value in weights.items()}
        self._write(checkpoints.BEST, {"model": weights})

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if self.training.folder is not None and self.training.processes.is_main:
            checkpoints.save_state(self.training.folder / name, state)
            self.saved_at = time.monotonic()

    def _not_finite(self, loss: float, step: int, rate: float) -> TrainingError:
        folder = self.training.folder
        kept = folder is not None and (folder / checkpoints.LAST).exists()
        checkpoint = f"The last good checkpoint is {folder}/{checkpoints.LAST}. " if kept else ""
        return TrainingError(
            f"the loss became {loss} at step {step}, learning rate {rate:g}",
            where="train",
            expected="a finite loss",
            fix=f"{checkpoint}Try a lower rate: lr: {self.training.settings.lr / 3:.2g}",
        )
