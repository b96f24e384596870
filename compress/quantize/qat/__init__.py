"""Quantization-aware training: a plan simulated in torch, trained, written by the one writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from compress.data import Dataset
from compress.qdq import QuantPlan, prepare
from compress.quantize.qat.network import OnnxNetwork
from compress.quantize.qat.simulation import SimulatedNetwork
from compress.recipe.settings import DistillSettings, QatSettings, QuantizeSettings
from compress.tasks import Task
from compress.train import TrainResult, train
from compress.train.distill import build_objective
from compress.train.distill.build import losses_on_outputs

__all__ = ["OnnxNetwork", "SimulatedNetwork", "Trained", "train_quantized"]


@dataclass(frozen=True)
class Trained:
    """What quantization-aware training made of a graph and its plan."""

    model: onnx.ModelProto  # fp32, prepared, with the trained weights
    plan: QuantPlan  # to write ``model`` with
    written: onnx.ModelProto  # the Q/DQ graph for the plan's target
    result: TrainResult


def train_quantized(
    model: onnx.ModelProto,
    plan: QuantPlan,
    dataset: Dataset,
    settings: QuantizeSettings,
    *,
    folder: Path | None = None,
    seed: int = 0,
    task: Task | None = None,
) -> Trained:
    """Train the weights of a quantized graph so that rounding costs less, and write it again.

    The loss is cross-entropy, or that of the task, plus distillation from the fp32 network by the
    losses on outputs that suit the task; the outputs alone where the task's loss is computed inside
    the original network or there are no labels. The loop is the one of all training, so it resumes
    from ``folder``.

    Settings say how to train (``qat``; one epoch at the defaults if absent), and whether the scales
    are trained as well (``learned_scales``: LSQ).

    Raises:
        QuantizationError: the plan does not fit, or an operator of the graph cannot be trained.
        TrainingError: as in ``train``.
    """
    loop = settings.qat or QatSettings()
    network = SimulatedNetwork(model, plan, learned_scales=settings.learned_scales)
    known = ("kd",) if task is None or task.tells_classes else losses_on_outputs(task)
    hard = 1.0 if task is None or task.loss_reads_outputs else 0.0
    distilling = DistillSettings(**loop.model_dump(), losses=known, hard=hard)
    objective = build_objective(
        network,
        OnnxNetwork(prepare(model)),
        dataset,
        distilling,
        folder=folder,
        seed=seed,
        task=task,
    )
    result = train(network, dataset, loop, objective=objective, folder=folder, seed=seed, task=task)
    return Trained(network.trained_model(), network.trained_plan(), network.write(), result)
