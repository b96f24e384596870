"""The proof of a plan: pruned network and masked twin give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.errors import PlanError
from compress.groups.copying import full_copy
from compress.groups.trace import Example, inputs_of, undisturbed
from compress.inputs import example_of
from compress.modules import network_of, set_mode, with_gradients
from compress.outputs import chosen, leaves
from compress.surgery.cut import apply_pruning
from compress.surgery.mask import mask_pruning
from compress.surgery.plan import PrunePlan

TOLERANCE = 1e-4  # relative to the largest answer; beyond it, float64 decides


@with_gradients()
def prove(model: nn.Module, plan: PrunePlan, example_input: Example) -> float:
    """Return the largest difference of pruned network and masked twin, relative to the twin.

    Both run in eval mode. A difference above 1e-4 may be float32 rounding in a badly conditioned
    network: then both are computed again in float64, and that difference is returned.

    Args:
        model: The network the plan was made for; left as it is.
        plan: The plan to prove.
        example_input: An input with values, preferably random ones; as for ``trace``.

    Raises:
        PlanError: the network returns nothing that could be compared.
    """
    model = network_of(model)
    difference = _difference(model, plan, example_input)
    if difference <= TOLERANCE:
        return difference
    doubled = tree_map(_double, example_of(example_input))
    return _difference(full_copy(model).double(), plan, doubled)


def _difference(model: nn.Module, plan: PrunePlan, example_input: Example) -> float:
    args, kwargs = inputs_of(example_input)
    with undisturbed():
        small = _answers(apply_pruning(model, plan), args, kwargs, plan.outputs)
        twin = _answers(mask_pruning(model, plan), args, kwargs, plan.outputs)
    if not twin:
        raise PlanError(
            "the network returns no tensor, number or text: nothing can be compared",
            where=type(model).__name__,
            fix="Return what it computes, or wrap it in a module that does",
        )
    if [_form(leaf) for leaf in small] != [_form(leaf) for leaf in twin]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(small, twin, strict=True)), default=0.0)


def _answers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[str] | None,
) -> list[Any]:
    own, named = tree_map(_clone, (args, kwargs))  # a network may write into its inputs
    set_mode(model, training=False)
    found = chosen(leaves(model(*own, **named)), outputs)
    return [_value(leaf) for _, leaf in found if leaf is not None]


def _value(leaf: Any) -> Any:
    """Return numbers as a tensor, everything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().as_subclass(Tensor)
    if isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray):
        array = np.asarray(leaf)
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else array.tolist()
    return leaf


def _form(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Tensor) else leaf


def _relative(small: Any, twin: Any) -> float:
    if not isinstance(twin, Tensor) or not twin.numel():
        return 0.0
    kind = torch.complex128 if twin.is_complex() else torch.float64
    small, twin = small.to(kind), twin.to(kind)
    if not torch.isfinite(twin).all() or not torch.isfinite(small).all():
        return 0.0 if torch.equal(small.nan_to_num(), twin.nan_to_num()) else float("inf")
    scale = twin.abs().max().clamp_min(1e-12)
    return float((small - twin).abs().max() / scale)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
