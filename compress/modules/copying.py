"""Copies of a network that share nothing with it: on the meta device, or with its values."""

from __future__ import annotations

import copy
import types
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PlanError


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors have shapes and types but no values."""
    return _copy(
        model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    )


def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with its values; gradients and the graph are left behind."""
    return _copy(model, lambda t: t.detach().clone())


def aliasing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors still share their memory with it."""
    return _copy(model, lambda t: t.detach().clone() if t.is_inference() else t.detach())


def own_storage(copied: nn.Module, except_for: Container[str]) -> None:
    """Give every tensor of an aliasing copy, but those named, memory of its own."""
    for name, tensor in parameters_and_buffers(copied):
        if name not in except_for:
            tensor.data = tensor.data.clone()


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return how ``tensor`` is laid out: channels last where that differs from contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim)
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _copy(model: nn.Module, tensor: Any) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(tensor(parameter.detach()), parameter.requires_grad)
    # Also tensors that modules keep as plain attributes, as weight norm's hook does.
    kept = (value for module in model.modules() for value in module.__dict__.values())
    for value in (*model.buffers(), *(value for value in kept if isinstance(value, Tensor))):
        memo.setdefault(id(value), tensor(value.detach()))
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise PlanError(
            f"the network cannot be copied: {error}",
            where=type(model).__name__,
            fix="Remove what it keeps besides tensors and plain values (locks, files, handles)",
        ) from None
    for module in twin.modules():
        wrapped = isinstance(module.__dict__.get("forward"), types.FunctionType)
        if wrapped and type(module).forward is not nn.Module.forward:
            del module.__dict__["forward"]  # a wrapper around the forward of the original
    return twin


def parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, by the first of its names."""
    yield from model.named_parameters()
    yield from model.named_buffers()
