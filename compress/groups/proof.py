"""Prove a plan: pruned network and masked reference give the same outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.errors import PlanError, boundary
from compress.groups.cut import check_fit, cut_by
from compress.groups.forward import copied, undisturbed
from compress.groups.mask import mask_pruning
from compress.groups.plan import PrunePlan
from compress.modules import full_copy, network_of, parameters_and_buffers, set_mode, with_gradients
from compress.modules.detectors import on_batch
from compress.modules.inputs import Example, call_inputs, example_of
from compress.modules.outputs import chosen_outputs, leaves

logger = logging.getLogger(__name__)

LARGEST_EXAMPLE = 2**26  # values of an input that a stored plan is proved on
TOLERANCE = 1e-4  # relative to the largest answer; beyond it, float64 decides


def apply_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy of ``model``: fewer channels, the same class and names.

    A plan that was read from a file is proved first, as ``prove`` does, on a copy with random
    weights and statistics: behind those of a fresh network a misaligned BatchNorm hides.

    Args:
        model: The network the plan was made for (in a wrapper or not), or a fresh one from the same
            constructor. It is left as it is.
        plan: What to cut.

    Raises:
        PlanError: the plan was made for another network, or was changed: what it cuts does not
            belong together.
    """
    if not plan.is_proved:
        _check_stored(network_of(model), plan)
    return cut_by(model, plan)


def example_shapes(example_input: Example) -> Any:
    """Return what a plan keeps of its example input: sizes and types, from which it is proved.

    None where the network takes something else than tensors, lists of them or dicts of them.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, Mapping):
            return {"named": {str(name): kept(each) for name, each in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [kept(each) for each in value]}
        raise TypeError

    try:
        return kept(example_of(example_input))
    except TypeError:
        return None


def _example_from(kept: Any) -> Any:
    """Return random inputs of the sizes that ``example_shapes`` kept."""
    if "shape" in kept:
        shape, kind = kept["shape"], getattr(torch, kept["dtype"])
        if not isinstance(kind, torch.dtype) or math.prod(shape) > LARGEST_EXAMPLE:
            raise ValueError(f"no example input: {shape} of {kind}")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return values.to(kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
    if "named" in kept:
        return {name: _example_from(each) for name, each in kept["named"].items()}
    parts = [_example_from(each) for each in kept.get("tuple", kept.get("list", ()))]
    return tuple(parts) if "tuple" in kept else parts


def _check_stored(model: nn.Module, plan: PrunePlan) -> None:
    check_fit(model, plan)
    kept = plan.about.get("example")
    if kept is None:
        logger.warning(
            "the plan cannot be proved: it does not say what its network takes (it is of an older "
            "version, or the network takes no tensors)"
        )
        return
    fix = "Use the plan as it was written, with the network it was made for; or plan again"
    with boundary(PlanError, "the plan does not fit the network", fix=fix):
        example = _example_from(kept)
        difference = prove(_shaken(model), plan, example)
    if not difference <= TOLERANCE:
        raise PlanError(
            f"what it cuts does not belong together: pruned and masked network differ by "
            f"{difference:.1e} of the largest output",
            expected=f"at most {TOLERANCE}",
            fix=fix,
        )


def _shaken(model: nn.Module) -> nn.Module:
    """Return a copy whose floating-point values are all different, positive ones still positive."""
    copy = full_copy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in parameters_and_buffers(copy):
            if tensor.is_floating_point() and not tensor.is_meta:
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.mul_(1 + noise / 2).add_(noise / 10)
    return copy


@with_gradients()
def prove(model: nn.Module, plan: PrunePlan, example_input: Example) -> float:
    """Return the largest relative difference of the pruned network from the masked reference.

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
    args, kwargs = call_inputs(example_input)
    with undisturbed():
        small = _answers(cut_by(model, plan), args, kwargs, plan.outputs)
        reference = _answers(mask_pruning(model, plan), args, kwargs, plan.outputs)
    if not reference:
        raise PlanError(
            "the network returns no tensor, number or text: nothing can be compared",
            where=type(model).__name__,
            fix="Return what it computes, or wrap it in a module that does",
        )
    forms = [
        [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in each]
        for each in (small, reference)
    ]
    if forms[0] != forms[1]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(small, reference, strict=True)), default=0.0)


def _answers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[str] | None,
) -> list[Any]:
    own, named = tree_map(copied, (args, kwargs))  # a network may write into its inputs
    # The least difference may reorder boxes after NMS.
    model = model if outputs else on_batch(model, own, named)
    set_mode(model, training=False)
    found = chosen_outputs(leaves(model(*own, **named)), outputs)
    return [_comparable(leaf) for _, leaf in found if leaf is not None]


def _comparable(leaf: Any) -> Any:
    """Return numbers as a tensor, everything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().as_subclass(Tensor)
    if isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray):
        array = np.asarray(leaf)
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else array.tolist()
    return leaf


def _relative(small: Any, reference: Any) -> float:
    if not isinstance(reference, Tensor) or not reference.numel():
        return 0.0
    kind = torch.complex128 if reference.is_complex() else torch.float64
    small, reference = small.to(kind), reference.to(kind)
    if not torch.isfinite(reference).all() or not torch.isfinite(small).all():
        return 0.0 if torch.equal(small.nan_to_num(), reference.nan_to_num()) else float("inf")
    scale = reference.abs().max().clamp_min(1e-12)
    return float((small - reference).abs().max() / scale)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
