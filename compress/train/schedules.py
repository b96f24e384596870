"""Learning rates as a function of how much of the training is done."""

from __future__ import annotations

import math

from compress.recipe.settings import TrainSettings

ONE_CYCLE_RISE = 0.3  # share of the training in which the rate rises
ONE_CYCLE_START = 1 / 25  # of the peak
ONE_CYCLE_END = 1e-4 / 25


def rate_factor(epoch: float, settings: TrainSettings) -> float:
    """Return what the peak learning rate is multiplied with.

    Args:
        epoch: Epochs done, with the fraction of the current one, in [0, settings.epochs).
        settings: The schedule, its warm-up and its length.

    Returns:
        A factor in [0, 1].

    Source: cosine: Loshchilov and Hutter, SGDR, ICLR 2017, https://arxiv.org/abs/1608.03983;
    one-cycle: Smith and Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120;
    warm-up: Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677.
    """
    if settings.schedule == "one-cycle":
        return _one_cycle(epoch / settings.epochs)
    if epoch < settings.warmup_epochs:
        return epoch / settings.warmup_epochs
    if settings.schedule == "cosine":
        length = settings.epochs - settings.warmup_epochs
        return _cosine(1.0, 0.0, (epoch - settings.warmup_epochs) / length)
    if settings.schedule == "step":
        return float(settings.step_factor ** sum(epoch >= at for at in settings.step_epochs))
    return 1.0


def _one_cycle(done: float) -> float:
    if done < ONE_CYCLE_RISE:
        return _cosine(ONE_CYCLE_START, 1.0, done / ONE_CYCLE_RISE)
    return _cosine(1.0, ONE_CYCLE_END, (done - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
