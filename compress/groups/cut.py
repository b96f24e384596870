"""Apply a plan: keep some positions of tensors, set attributes; a pruned copy of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PlanError, did_you_mean
from compress.groups.network import Positions
from compress.groups.plan import PrunePlan
from compress.groups.traced_ints import read_attribute, write_attribute
from compress.modules import (
    aliasing_copy,
    memory_format_of,
    network_of,
    own_storage,
    parameters_and_buffers,
    with_gradients,
)

_LARGE_BYTES, _PIECE_BYTES = 2**23, 2**20


def cut(model: nn.Module, plan: PrunePlan) -> None:
    """Keep only the positions of tensors that the plan keeps and set attributes, in place."""
    modules = dict(model.named_modules())
    for path, values in plan.attributes.items():
        for name, value in values.items():
            write_attribute(modules[path], name, value)
    tensors = dict(parameters_and_buffers(model))
    swaps = {id(tensors[n]): _shortened(tensors[n], dims) for n, dims in plan.tensors.items()}
    for name, index in plan.indices.items():
        renumbered = torch.from_numpy(index.after()).to(tensors[name])
        swaps[id(tensors[name])] = _shortened(renumbered, plan.tensors.get(name, {}))
    changed = {id(module) for module in modules.values() if _swap(module, swaps)}
    for module in modules.values():
        parametrized = getattr(module._modules.get("parametrizations"), "weight", None)
        if id(module) in changed or id(parametrized) in changed:
            _follow(module)


def _shortened(tensor: Tensor, dims: Mapping[int, Positions]) -> Tensor:
    whole = tensor.detach()
    index = {dim: torch.from_numpy(kept).to(whole.device) for dim, kept in dims.items()}
    if len(index) > 1 and 0 in index and whole.nbytes > _LARGE_BYTES:
        # Some rows at a time: what the first dimension leaves for the next stays in the cache;
        # of all rows at once it is as large as the result (VGG's classifier in half the time).
        rows, counts = index.pop(0), list(whole.shape)
        for dim, positions in {0: rows, **index}.items():
            counts[dim] = len(positions)
        values = whole.new_empty(counts)
        step = 1 + _PIECE_BYTES // whole[0].nbytes
        for piece, into in zip(torch.split(rows, step), torch.split(values, step), strict=True):
            into.copy_(_selected(whole.index_select(0, piece), index))
    else:
        values = _selected(whole, index)
    values = values.contiguous(memory_format=memory_format_of(whole))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    return values


def _selected(values: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    for dim, positions in index.items():
        values = values.index_select(dim, positions)
    return values


def _swap(module: nn.Module, swaps: Mapping[int, Tensor]) -> bool:
    changed = False
    for own in (module._parameters, module._buffers):
        for name, tensor in own.items():
            if tensor is not None and (new := swaps.get(id(tensor))) is not None:
                own[name] = new  # type: ignore[assignment]
                changed = True
    return changed


def _follow(module: nn.Module) -> None:
    """Set the attributes of PyTorch's modules (and classes made from them) to the new shapes."""
    for kind, read in _FOLLOWERS:
        if isinstance(module, kind):
            for name, value in read(module).items():
                setattr(module, name, value)
            return


def _weight(module: nn.Module) -> Tensor:
    """Return the weight, or what a reparametrization computes it from, by its shape."""
    for owner in (module, getattr(getattr(module, "parametrizations", None), "weight", None)):
        for name in ("weight", "weight_v", "weight_orig", "original", "original1"):
            tensor = owner._parameters.get(name) if isinstance(owner, nn.Module) else None
            if tensor is not None:
                return tensor
    raise PlanError("the layer has no weight to read its size from", where=type(module).__name__)


def _conv(module: Any) -> dict[str, int]:
    rows, columns = _weight(module).shape[:2]
    if getattr(module, "transposed", False):
        return {"in_channels": rows, "out_channels": columns * module.groups}
    return {"in_channels": columns * module.groups, "out_channels": rows}


def _batch_norm(module: Any) -> dict[str, int]:
    return {
        "num_features": len(module.weight if module.running_mean is None else module.running_mean)
    }


def _recurrent(module: Any) -> dict[str, Any]:
    own = module._parameters
    weights = [own[name] for name in module._flat_weights_names]
    return {"input_size": own["weight_ih_l0"].shape[1], "_flat_weights": weights}


def _attention(module: Any) -> dict[str, int]:
    packed, keys, values = (
        module._parameters[f"{name}_weight"] for name in ("in_proj", "k_proj", "v_proj")
    )
    if packed is not None:
        rows, keys, values = packed.shape[0] // 3, packed, packed
    else:
        rows = keys.shape[0]
    sizes = {"kdim": keys.shape[1], "vdim": values.shape[1]}
    return sizes | {"embed_dim": rows, "head_dim": rows // module.num_heads}


_FOLLOWERS: tuple[tuple[Any, Callable[[Any], dict[str, Any]]], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (
        nn.Linear,
        lambda m: dict(zip(("out_features", "in_features"), _weight(m).shape, strict=True)),
    ),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (
        (nn.LayerNorm, nn.RMSNorm),
        lambda m: {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)},
    ),
    (nn.GroupNorm, lambda m: {} if m.weight is None else {"num_channels": len(m.weight)}),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.numel()}),
    (nn.RNNBase, _recurrent),
    (nn.MultiheadAttention, _attention),
)


@with_gradients()
def cut_by(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy of ``model``; see ``apply_pruning``, which proves plans first.

    Raises:
        PlanError: the plan was made for another network.
    """
    model = network_of(model)
    check_fit(model, plan)
    small = aliasing_copy(model)
    cut(small, plan)
    own_storage(small, plan.tensors)
    return small


def check_fit(model: nn.Module, plan: PrunePlan) -> None:
    """Raise PlanError where ``model`` lacks a tensor or module of the plan, or a shape differs."""
    if not isinstance(plan, PrunePlan):
        raise PlanError(
            f"{type(plan).__name__} is no pruning plan",
            expected="what compress.plan_pruning returns",
            fix="Read a file with compress.PrunePlan.load(path)",
        )
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
