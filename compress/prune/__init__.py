"""Plan which channels to cut: scores and a budget in, a plan out.

The package can be called: ``compress.prune(model, example_input, ...)`` is :func:`prune_network`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.errors import UsageError
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning
from compress.modules import network_of
from compress.modules.inputs import Example, read_batches
from compress.packages import make_callable
from compress.prune.batchnorm import rebase_batchnorm, recalibrate_batchnorm
from compress.prune.blocks import check_blocks, refit_blocks
from compress.prune.criteria import Criterion
from compress.prune.latency import LatencyCheck, check_latency
from compress.prune.plan import plan_pruning
from compress.prune.reconstruction import refit
from compress.prune.reconstruction import refit as reconstruct
from compress.prune.saliency import Batches
from compress.prune.selection import BUDGETS, keep_in_round, one_budget
from compress.prune.sparsity import GroupLasso, WithGroupLasso

__all__ = [
    "BUDGETS",
    "GroupLasso",
    "LatencyCheck",
    "WithGroupLasso",
    "check_blocks",
    "check_latency",
    "keep_in_round",
    "one_budget",
    "plan_pruning",
    "prune_network",
    "rebase_batchnorm",
    "recalibrate_batchnorm",
    "refit",
    "refit_blocks",
]


def prune_network(
    model: nn.Module,
    example_input: Example,
    *,
    batches: Batches | None = None,
    criterion: str | Mapping[str, Any] | Criterion | None = None,
    refit: bool = True,
    refit_steps: int = 0,
    training_batches: Batches | None = None,
    **options: Any,
) -> tuple[nn.Module, PrunePlan]:
    """Return a pruned copy of ``model`` and the plan that it was cut by: ``compress.prune``.

    What the command does: channels are scored, the cheapest are cut, the weights that are left are
    fitted to the original's answers layer by layer, and BatchNorm's statistics are those of the
    pruned network. Train it afterwards with any trainer.

    Args:
        model: A trained network, in a wrapper or not. Not modified.
        example_input: An input for one image, (1, C, H, W), its shape, or a tuple or dict.
        batches: Images, float32 (B, C, H, W), with or without labels; a few hundred are enough.
            Without them nothing is fitted, and the criterion must need no data.
        criterion: As ``plan_pruning`` takes it; "obs" where there are batches, else "l2".
        refit: Fit the weights that are left; needs batches.
        refit_steps: Then fit whole blocks together, in so many steps each; 0: do not.
        training_batches: Images as training will show them, for BatchNorm; ``batches`` if absent.
        options: Of ``plan_pruning``: a budget (keep_macs, keep_params, ...), outputs, ...;
            ``round_to`` is "auto" if absent.

    Raises:
        UsageError: options that cannot be right.
        PlanError: nothing can be cut, or the budget is below what can be reached.
    """
    if batches is None and training_batches is not None:
        raise UsageError("training_batches without batches", fix="Give batches=, images to fit on")
    if refit_steps and (batches is None or not refit):
        raise UsageError(
            "refit_steps goes on from what refit found",
            fix="Give batches=, images to fit on, and leave refit on",
        )
    shown = None if batches is None else list(batches)
    if shown is not None and refit_steps:
        check_blocks(model, next(read_batches(shown)).args[0][:1])
    chosen = criterion if criterion is not None else "l2" if shown is None else "obs"
    options = {"round_to": "auto", "criterion": chosen} | options
    plan = plan_pruning(model, example_input, batches=shown, **options)
    original = network_of(model)
    small = apply_pruning(original, plan)
    if shown is not None and refit:
        trained = None if training_batches is None else list(training_batches)
        small = reconstruct(small, original, plan, shown, training_batches=trained)
        if refit_steps:
            refit_blocks(small, original, plan, shown, steps=refit_steps, training_batches=trained)
    return small, plan


make_callable(__name__, "prune_network")
