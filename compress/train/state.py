"""A training: its arguments, its progress, how it is validated, saved and resumed."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import evaluate
from compress.data import Dataset
from compress.errors import TrainingError
from compress.modules import breaks_channels_last, evaluating
from compress.modules.objective import Objective
from compress.modules.outputs import logits_of
from compress.recipe.settings import TrainSettings
from compress.tasks import Kind, Primary, Task, primary_of
from compress.train import checkpoints
from compress.train.batches import steps_in_epoch
from compress.train.checkpoints import Row
from compress.train.distributed import LossModule, Processes, Sharing
from compress.train.optimizers import make_optimizer

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNIMPORTANT = {"halve_batch", "track", "checkpoint_minutes"}  # may change on the way


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


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

    history: tuple[Row, ...]  # rows of metrics.jsonl
    epochs: float  # done, fewer than asked for if it stopped early
    steps: int
    best_top1_pct: float | None  # of ``metric`` on validation images; None where there are none
    best_epoch: int | None  # counted from 1; 0: with keep: best, the network before training
    last_top1_pct: float | None
    images_per_second: float | None  # of training, without validation; median of the rows
    precision: str
    stopped_early: bool = False
    metric: str = "top1_pct"  # what validation measures
    notes: tuple[str, ...] = ()


@dataclass
class Training:
    """The arguments of one call of ``train``, and the progress that a checkpoint holds."""

    model: nn.Module
    dataset: Dataset
    settings: TrainSettings
    objective: Objective
    processes: Processes
    folder: Path | None  # for checkpoints; None keeps nothing on disk
    seed: int
    task: Task | None  # None: one class an image
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done in the current epoch
    best: tuple[float, int] | None = None  # value of the metric, epoch counted from 1; 0 = start
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # where no folder keeps them
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last row
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        settings, device = self.settings, self.processes.device
        self.primary = FIDELITY if self._is_unlabelled else primary_of(self.task)
        self.precision = chosen_precision(settings.precision, device)
        self.memory_format = fastest_format(self.model, settings, device)
        self.steps = steps_in_epoch(self.dataset, settings)  # of an epoch
        self.batch_size = min(settings.batch_size, len(self.dataset.splits["train"]))  # of all
        self.parts = settings.accumulate  # that a batch is computed in
        self.objective.to(device)
        losses = LossModule(self.model, self.objective, settings.compile).to(device)
        self.sharing = Sharing(losses, self.processes, repeats=settings.halve_batch)
        self.optimizer = make_optimizer(self.model, losses.adapters, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.average = Average(self.model, settings.ema) if settings.ema else None

    @property
    def position(self) -> float:
        """Epochs done, with the fraction of the current one up to the middle of its next step."""
        return self.epoch + (self.step + 0.5) / self.steps

    @property
    def steps_done(self) -> int:
        """Steps of all epochs so far."""
        return self.epoch * self.steps + self.step

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not improved for as long as patience lasts."""
        patience, scores = self.settings.patience, self._scores
        if patience is None or not scores:
            return False
        drops = [self.primary.drop(scores[0], score) for score in scores]
        return self.epoch - (1 + drops.index(min(drops))) >= patience

    @property
    def watched(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.model

    def take_row(self, batch_size: int, started: float) -> Row:
        """Return a row of the learning curve: the steps since the last one, which are forgotten.

        A step has ``batch_size`` images over all processes; ``started`` is ``time.perf_counter()``
        at the first of them.

        Raises:
            TrainingError: a loss is not finite.
        """
        values = self.processes.sum(torch.stack(self.losses).double()).cpu()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["rate"]
        finite = torch.isfinite(values)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            step = self.steps_done - len(values) + first + 1
            raise self._not_finite(float(values[first]), step, rate)
        seconds = time.perf_counter() - started
        self.losses = []
        return {
            "epoch": round(self.epoch + self.step / self.steps, 6),
            "step": self.steps_done,
            "loss": float(values.mean()),
            "lr": rate,
            "images_per_second": round(len(values) * batch_size / max(seconds, 1e-9), 1),
        }

    def end_epoch(self, row: Row) -> Row:
        """Count the epoch as done and validate; returns ``row`` with the scores."""
        self.epoch, self.step = self.epoch + 1, 0
        self.processes.share_buffers(self.model)
        self.processes.share_buffers(self.watched)
        score = self._score()
        if score is None:
            return row
        value, loss = score
        drop = 0.0 if self.best is None else self.primary.drop(self.best[0], value)
        if self.best is None or drop < 0 or (drop == 0 and self.best[1] == 0):
            self._keep(value)
        scored = row | {self._key: value}
        return scored if loss is None else scored | {"validation_loss": loss}

    def judge_start(self) -> None:
        """Let the network as it came be the best so far, where the best is to be kept."""
        if self.settings.keep == "best" and self.settings.epochs and not self.steps_done:
            score = self._score()
            if score is not None:
                self._keep(score[0])

    def save(self) -> None:
        """Write a checkpoint that a training can go on from."""
        state = {
            "about": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "parts": self.parts,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "objective": self.objective.state_dict(),
            "best": list(self.best) if self.best else None,
            "history": self.rows,
            "notes": self.notes,
            "losses": [float(loss) for loss in self.losses],
        }
        self._write(checkpoints.LAST, state)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one.

        Raises:
            TrainingError: it belongs to another training, or processes found different ones.
        """
        folder, processes = self.folder, self.processes
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
        model, folder = self.model, self.folder
        self._tell_of_best()
        if self.settings.keep == "best" and self.best is not None:
            if folder is not None:
                self.processes.wait()  # until the main process has written it
                self.best_weights = checkpoints.load_state(folder / checkpoints.BEST)["model"]
            model.load_state_dict(self.best_weights)
        elif self.average is not None:
            model.load_state_dict(self.average.model.state_dict())
        scores = self._scores
        speeds = sorted(row["images_per_second"] for row in self.rows)
        return TrainResult(
            history=tuple(self.rows),
            epochs=self.epoch,
            steps=self.steps_done,
            best_top1_pct=self.best[0] if self.best else None,
            best_epoch=self.best[1] if self.best else None,
            last_top1_pct=scores[-1] if scores else None,
            images_per_second=speeds[math.floor(len(speeds) / 2)] if speeds else None,
            precision=self.precision,
            stopped_early=self.epoch < self.settings.epochs and self.stopped_early,
            metric=self.primary.name,
            notes=(*self.objective.notes, *self.notes),
        )

    @property
    def _is_unlabelled(self) -> bool:
        return self.task is not None and not self.task.kinds

    @property
    def _key(self) -> str:
        """The name of what validation measures, in rows."""
        return f"validation_{self.primary.name}"

    @property
    def _scores(self) -> list[float]:
        """What validation measured after each epoch."""
        return [row[self._key] for row in self.rows if self._key in row]

    def _score(self) -> Score | None:
        """Measure the watched network on validation images; None where nothing can be."""
        if self.task is None:
            at_once = -(-self.settings.batch_size // self.parts)
            return validate(self.watched, self.dataset, self.processes, self.precision, at_once)
        if self._is_unlabelled:
            found = self.objective.fidelity_db(self.watched, self.dataset)
        else:
            found = evaluate.primary_value(self.watched, self.dataset, self.task)
        return None if found is None else (found, None)

    def _keep(self, value: float) -> None:
        """Keep the watched network as the best so far."""
        self.best = (value, self.epoch)
        weights = self.watched.state_dict()
        if self.folder is None and self.settings.keep == "best":
            self.best_weights = {name: each.clone() for name, each in weights.items()}
        self._write(checkpoints.BEST, {"model": weights})

    def _tell_of_best(self) -> None:
        """Note where ``keep: best`` keeps another network than one would think."""
        if self.settings.keep != "best" or not self.rows:
            return
        note = "nothing could be measured to choose a checkpoint by: the last one is kept"
        if self.best is not None:
            if self.best[1]:
                return
            unit, drop = f" {self.primary.unit}".rstrip(), self.primary.drop
            after = min(self._scores, key=lambda score: drop(0.0, score))
            note = (
                f"every epoch left the network worse than it came ({self.primary.called} "
                f"{self.best[0]:.2f}{unit} on validation images, then {after:.2f} at best): it is "
                "kept as it was before training"
            )
        logger.warning(note)
        self.notes.append(note)

    def _load(self, path: Path) -> None:
        state = checkpoints.load_state(path)
        checkpoints.check_same(path, state["about"], self._identity())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        self.epoch, self.step, self.parts = state["epoch"], state["step"], state["parts"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.rows, self.notes = state["history"], state["notes"]
        losses = state.get("losses", [])  # absent where an older version saved
        self.losses = [torch.tensor(each, device=self.processes.device) for each in losses]
        logger.info("going on from %s, epoch %d, step %d", path, self.epoch, self.step)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with a training that goes on from it."""
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return {
            **self.settings.model_dump(mode="json", exclude=UNIMPORTANT),
            "seed": self.seed,
            "data": self.dataset.fingerprint,
            "network": shapes,
            "objective": type(self.objective).__name__,
        }

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if self.folder is not None and self.processes.is_main:
            checkpoints.save_state(self.folder / name, state)
            self.saved_at = time.monotonic()

    def _not_finite(self, loss: float, step: int, rate: float) -> TrainingError:
        folder = self.folder
        kept = folder is not None and (folder / checkpoints.LAST).exists()
        checkpoint = f"The last good checkpoint is {folder}/{checkpoints.LAST}. " if kept else ""
        return TrainingError(
            f"the loss became {loss} at step {step}, learning rate {rate:g}",
            where="train",
            expected="a finite loss",
            fix=f"{checkpoint}Try a lower rate: lr: {self.settings.lr / 3:.2g}",
        )


VALIDATION_BATCH = 256  # at most
FIDELITY = Primary("sqnr_db", Kind("dB", title="SQNR"))  # to the teacher, without labels


Score = tuple[float, float | None]  # the metric on validation images, and the loss where known


@torch.no_grad()
def validate(
    model: nn.Module, dataset: Dataset, processes: Processes, precision: str, at_once: int
) -> Score | None:
    """Return top-1 in percent and cross-entropy on "validation", shared among the processes.

    The network's modes are left as found. Returns None where no images are held back. At most
    ``at_once`` images are computed together: what training does, validation has memory for.
    """
    images = dataset.splits.get("validation")
    if images is None or not len(images):
        return None
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    with evaluating(model):
        count = min(VALIDATION_BATCH, at_once)
        starts = range(0, len(images), count)
        for start in list(starts)[processes.rank :: processes.world]:
            indices = np.arange(start, min(start + count, len(images)))
            target = torch.from_numpy(images.labels[indices]).to(processes.device)
            inputs = dataset.normalize(images.take(indices).to(processes.device))
            with autocast(precision, processes.device):
                logits = logits_of(model(inputs)).float()
            right = (logits.argmax(1) == target).sum().double()
            loss = F.cross_entropy(logits, target, reduction="sum").double()
            sums += torch.stack([right, loss])
    correct, total = processes.sum(sums).tolist()
    return 100 * correct / len(images), total / len(images)


def chosen_precision(wanted: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": the wanted one, or the fastest safe one for "auto".

    bf16 where the device multiplies it natively (AVX-512 BF16 or AMX; GPUs since Ampere), else
    fp16 on older GPUs and fp32 everywhere else.

    Raises:
        TrainingError: the device has no support for the wanted one.
    """
    if wanted != "auto":
        if device.type == "cuda" and wanted == "bf16" and not torch.cuda.is_bf16_supported():
            raise TrainingError(
                "this GPU does not compute in bf16", where="precision", fix="Set precision: fp16"
            )
        return wanted
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if native else "fp16"
    tell = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.9 has none
    has: Mapping[str, Any] = tell() if device.type == "cpu" else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


def fastest_format(
    model: nn.Module, settings: TrainSettings, device: torch.device
) -> torch.memory_format:
    """Return the memory format in which ``model`` trains fastest on ``device``.

    Channels last is it as a rule. On CPUs torch's BatchNorm walks channels last in vectors of 16
    channels; what is left over goes one by one, and costs a network of few channels (13 of 16 after
    pruning) more than its convolutions do: ResNet-20 at half its MACs trains 1.6 times as fast in
    NCHW. Compiled networks have a BatchNorm of their own. A strided 1x1 convolution of few channels
    ends the process on a CPU (``breaks_channels_last``).

    Returns:
        ``torch.preserve_format`` where the settings or the device want none.
    """
    if not settings.channels_last or device.type == "mps":
        return torch.preserve_format
    if device.type != "cpu":
        return torch.channels_last
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    if any(breaks_channels_last(c.weight, c.stride) for c in convolutions):
        return torch.contiguous_format
    if settings.compile:
        return torch.channels_last
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    slow = [norm for norm in norms if norm.num_features < 64 and norm.num_features % 16]
    return torch.contiguous_format if 2 * len(slow) > len(norms) else torch.channels_last


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a network computes in ``precision``."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
