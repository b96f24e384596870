"""Apply a plan: a pruned copy of a network."""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import PlanError, did_you_mean
from compress.groups.copying import aliasing_copy, named_tensors, own_storage
from compress.groups.cutting import cut
from compress.modules import network_of, with_gradients
from compress.surgery.plan import PrunePlan


@with_gradients()
def apply_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy of ``model``: fewer channels, the same class and names.

    Args:
        model: The network the plan was made for (in a wrapper or not), or a fresh one from the same
            constructor. It is left as it is.
        plan: What to cut.

    Raises:
        PlanError: the plan was made for another network.
    """
    model = network_of(model)
    check_fit(model, plan)
    small = aliasing_copy(model)
    cut(small, plan.tensors, plan.attributes)
    own_storage(small, plan.tensors)
    return small


def check_fit(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """Return the tensors of ``model`` by name.

    Raises:
        PlanError: ``model`` lacks a tensor or module of the plan, or a shape is another.
    """
    tensors = dict(named_tensors(model))
    fix = "Use the network the plan was made for, not yet pruned, from the same constructor"
    for name, shape in plan.shapes.items():
        if name not in tensors:
            what = f"the network has no such tensor{did_you_mean(name, tensors)}"
            raise PlanError(what, where=name, fix=fix)
        found = tuple(tensors[name].shape)
        if found != shape:
            expected = "x".join(map(str, shape))
            what = f"its shape is {'x'.join(map(str, found))}"
            raise PlanError(what, where=name, expected=f"{expected} as in the plan", fix=fix)
    modules = dict(model.named_modules())
    for module in plan.attributes:
        if module not in modules:
            what = f"the network has no such module{did_you_mean(module, modules)}"
            raise PlanError(what, where=module, fix=fix)
    return tensors
