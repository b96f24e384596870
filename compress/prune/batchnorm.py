"""Recalibrate BatchNorm: statistics are estimated again after a cut upstream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import DataError
from compress.modules import evaluating
from compress.modules.inputs import read_batches


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate the statistics of every BatchNorm from images (B, C, H, W), in place.

    They are plain averages over the batches (nothing of the old ones is left); weights, modes,
    momentum and everything else stay as they are. If the network raises, so do the statistics.
    Dropout is off meanwhile.

    Raises:
        UsageError: there is not one batch.
        DataError: a batch is too small to have a variance.
    """
    norms = tracking_norms(model)
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in statistics]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # None: a plain average
            _run(model, batches)
    except BaseException as error:
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(old)
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise DataError(
                f"a batch is too small to estimate BatchNorm from: {error}",
                fix="Use larger batches",
            ) from None
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model


def rebase_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set the statistics of every BatchNorm to those of images (B, C, H, W), in place.

    The answers stay: scale and shift take up what the statistics change by, and a BatchNorm without
    them is left alone. A network whose weights were fitted under the old statistics answers in
    training mode, where each batch is normalized by its own, as it does in eval mode: training goes
    on from where fitting ended.

    Raises:
        UsageError: there is not one batch.
    """
    seen = {norm: _Moments(norm.num_features) for norm in tracking_norms(model) if norm.affine}
    with evaluating(model), contextlib.ExitStack() as hooks:
        for norm, moments in seen.items():
            hooks.enter_context(norm.register_forward_pre_hook(moments))
        _run(model, batches)
    for norm, moments in seen.items():
        if moments.count:
            _rebase(norm, moments)
    return model


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of ``model`` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run ``model`` on every batch, without gradients."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in read_batches(batches):
            inputs = batch.to(device)
            model(*inputs.args, **inputs.kwargs)


class _Moments:
    """Running sums of what enters one BatchNorm, channel by channel."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double().cpu()  # (C, B * places)
        self.count += values.shape[1]
        self.sum += values.sum(1)
        self.squares += values.square().sum(1)


@torch.no_grad()
def _rebase(norm: _BatchNorm, moments: _Moments) -> None:
    mean = moments.sum / moments.count
    variance = (moments.squares / moments.count - mean.square()).clamp_min(0.0)
    old_mean, old_variance, scale, shift = (
        tensor.double().cpu()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if tensor is not None
    )
    slope = scale / (old_variance + norm.eps).sqrt()
    for tensor, value in (
        (norm.running_mean, mean),
        (norm.running_var, variance),
        (norm.weight, slope * (variance + norm.eps).sqrt()),
        (norm.bias, shift + slope * (mean - old_mean)),
    ):
        if tensor is not None:
            tensor.copy_(value)
