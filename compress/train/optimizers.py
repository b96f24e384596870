"""Optimizers, learning-rate schedules, and what each parameter is trained with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compress.errors import UnknownNameError, UsageError
from compress.recipe.settings import TrainSettings

ONE_CYCLE_RISE = 0.3  # share of the training in which the rate rises
ONE_CYCLE_START = 1 / 25  # of the peak
ONE_CYCLE_END = 1e-4 / 25


def make_optimizer(
    model: nn.Module, extra: Iterable[nn.Parameter], settings: TrainSettings
) -> torch.optim.Optimizer:
    """Return an optimizer over parameters with ``requires_grad``, and ``extra`` ones.

    Weights (two dimensions or more) decay; biases and the scales and shifts of norms do not. Layers
    may have a share of the rate; ``extra`` ones have all of it.

    Raises:
        UnknownNameError: ``settings.layer_lr`` names a layer that is not there.
        UsageError: nothing is left to train.
    """
    factors = settings.layer_lr
    for prefix in factors:
        check_layer(model, prefix, "layer_lr")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fitting = [prefix for prefix in factors if f"{name}.".startswith(f"{prefix}.")]
            rate = factors[max(fitting, key=len)] if fitting else 1.0
            key = (rate, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    for parameter in extra:
        groups.setdefault((1.0, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise UsageError(
            "no parameter is left to train",
            where=f"freeze_until: {settings.freeze_until}",
            fix="Freeze fewer layers",
        )
    rows = [
        {
            "params": parameters,
            "lr": settings.lr * rate,
            "rate": rate,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (rate, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return _optimizer(rows, settings)


def _optimizer(rows: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    lr = settings.lr
    devices = {parameter.device.type for row in rows for parameter in row["params"]}
    fused = True if devices <= {"cpu", "cuda"} else None  # one kernel for all, where there is one
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(
            rows, lr=lr, momentum=settings.momentum, nesterov=nesterov, fused=fused
        )
    if settings.optimizer == "adam":
        return torch.optim.Adam(rows, lr=lr, fused=fused)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(rows, lr=lr, fused=fused)
    return torch.optim.RMSprop(rows, lr=lr, momentum=settings.momentum)


def frozen_layers(model: nn.Module, until: str | None) -> list[str]:
    """Return the modules that come before the one named ``until``, in the order of definition.

    Raises:
        UnknownNameError: there is no such layer.
    """
    if until is None:
        return []
    check_layer(model, until, "freeze_until")
    names = [name for name, _ in model.named_modules() if name]
    before = names[: names.index(until)]
    return [name for name in before if not until.startswith(f"{name}.")]


def check_layer(model: nn.Module, name: str, key: str) -> None:
    """Raise UnknownNameError unless ``model`` has a layer ``name``; ``key`` is the setting."""
    known = [layer for layer, _ in model.named_modules() if layer]
    if name not in known:
        raise UnknownNameError("layer", name, known, where=key)


def rate_factor(epoch: float, settings: TrainSettings) -> float:
    """Return what the peak learning rate is multiplied with, in [0, 1], after ``epoch`` epochs.

    Source: cosine: Loshchilov and Hutter, SGDR, ICLR 2017, https://arxiv.org/abs/1608.03983;
    one-cycle: Smith and Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120;
    warm-up: Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677.
    """
    if settings.schedule == "one-cycle":
        done = epoch / settings.epochs
        if done < ONE_CYCLE_RISE:
            return _cosine(ONE_CYCLE_START, 1.0, done / ONE_CYCLE_RISE)
        return _cosine(1.0, ONE_CYCLE_END, (done - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
    if epoch < settings.warmup_epochs:
        return epoch / settings.warmup_epochs
    if settings.schedule == "cosine":
        length = settings.epochs - settings.warmup_epochs
        return _cosine(1.0, 0.0, (epoch - settings.warmup_epochs) / length)
    if settings.schedule == "step":
        return float(settings.step_factor ** sum(epoch >= at for at in settings.step_epochs))
    return 1.0


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
