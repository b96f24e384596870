"""Apply a plan: a pruned copy of a network."""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import PlanError, did_you_mean
from compress.groups.cutting import cut
from compress.groups.plan import PrunePlan
from compress.groups.traced_ints import read_attribute
from compress.modules import network_of, with_gradients
from compress.modules.copying import aliasing_copy, own_storage, parameters_and_buffers


@with_gradients()
def cut_by(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy of ``model``; see ``apply_pruning``, which proves plans first.

    Raises:
        PlanError: the plan was made for another network.
    """
    model = network_of(model)
    check_fit(model, plan)
    small = aliasing_copy(model)
    cut(small, plan.tensors, plan.attributes, plan.indices)
    own_storage(small, plan.tensors)
    return small


def check_fit(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """Return the tensors of ``model`` by name.

    Raises:
        PlanError: ``model`` lacks a tensor or module of the plan, or a shape is another.
    """
    tensors = dict(parameters_and_buffers(model))
    fix = "Use the network the plan was made for, not yet pruned, from the same constructor"
    numbers = {name: (len(index.values),) for name, index in plan.indices.items()}
    for name, shape in {**numbers, **plan.shapes}.items():
        if name not in tensors:
            what = f"the network has no such tensor{did_you_mean(name, tensors)}"
            raise PlanError(what, where=name, fix=fix)
        found = tuple(tensors[name].shape)
        if found != shape:
            expected = "x".join(map(str, shape))
            what = f"its shape is {'x'.join(map(str, found))}"
            raise PlanError(what, where=name, expected=f"{expected} as in the plan", fix=fix)
    modules = dict(model.named_modules())
    for module, values in plan.attributes.items():
        if module not in modules:
            what = f"the network has no such module{did_you_mean(module, modules)}"
            raise PlanError(what, where=module, fix=fix)
        for name, value in values.items():
            before = read_attribute(modules[module], name)
            if before is None or value > before:
                raise PlanError(
                    f"its attribute is to be {value}, and is {before or 'no whole number'}",
                    where=f"{module}.{name}",
                    fix=fix,
                )
    return tensors
