"""Plan which channels to cut: scores and a budget in, a plan out.

The package can be called: ``compress.prune(model, example_input, ...)`` is :func:`prune_network`.
"""

from compress.callables import make_callable
from compress.prune.batchnorm import rebase_batchnorm, recalibrate_batchnorm
from compress.prune.budget import BUDGETS, keep_in_round, one_budget
from compress.prune.group_lasso import GroupLasso, WithGroupLasso
from compress.prune.latency_target import LatencyCheck, check_latency
from compress.prune.network import prune_network
from compress.prune.plan import plan_pruning
from compress.prune.reconstruction import refit

__all__ = [
    "BUDGETS",
    "GroupLasso",
    "LatencyCheck",
    "WithGroupLasso",
    "check_latency",
    "keep_in_round",
    "one_budget",
    "plan_pruning",
    "prune_network",
    "rebase_batchnorm",
    "recalibrate_batchnorm",
    "refit",
]

make_callable(__name__, "prune_network")
