"""Torch-Pruning's global group L2 (DepGraph), as every benchmark of pruning runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, nn


def cut(
    model: nn.Module,
    example: Tensor,
    keep: float,
    ignored: Sequence[nn.Module],
    macs: Callable[[nn.Module], int],
    *,
    largest: float = 0.95,
    round_to: int | None = None,
) -> nn.Module:
    """Cut ``model`` in place, in small steps, until it has ``keep`` of its MACs; return it.

    Args:
        model: Is modified.
        example: An input, (1, C, H, W).
        keep: Share of the MACs.
        ignored: Layers whose outputs stay as they are.
        macs: Counts the MACs of one image.
        largest: Share of channels that a layer may lose.
        round_to: Channels are kept in multiples of this.
    """
    import torch_pruning as tp

    whole = macs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=largest,
            iterative_steps=400,
            ignored_layers=list(ignored),
            round_to=round_to,
        )
        while macs(model) > keep * whole:
            pruner.step()
    return model
