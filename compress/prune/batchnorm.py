"""BatchNorm statistics, estimated again: whatever was cut upstream has shifted them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import DataError, UsageError
from compress.prune.evidence import evaluating


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """Estimate the running mean and variance of every BatchNorm from ``batches``, in place.

    The statistics are plain averages over the batches (nothing of the old ones is left); weights,
    modes, momentum and everything else stay as they are. If the network raises, so do the
    statistics. Dropout is off meanwhile.

    Args:
        model: A network, usually just pruned. Its BatchNorm buffers are replaced.
        batches: Images, float32 (B, C, H, W), with or without anything after them.

    Returns:
        The same ``model``.

    Raises:
        UsageError: there is not one batch.
        DataError: a batch is too small to have a variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    device = next(model.parameters()).device
    before = [(norm, norm.momentum, _statistics(norm)) for norm in norms]
    count = 0
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # None: a plain average
            for images, *_ in batches:
                model(images.to(device))
                count += 1
        if not count:
            raise UsageError("batches holds no images", fix="Give at least one batch")
    except BaseException as error:
        for norm, _, statistics in before:
            _restore(norm, statistics)
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise DataError(
                f"a batch is too small to estimate BatchNorm from: {error}",
                fix="Use larger batches",
            ) from None
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
    return model


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    return [buffer.clone() for buffer in norm.buffers(recurse=False)]


def _restore(norm: _BatchNorm, statistics: list[Tensor]) -> None:
    for buffer, old in zip(norm.buffers(recurse=False), statistics, strict=True):
        buffer.copy_(old)
