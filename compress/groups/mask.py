"""The masked reference of a pruned network: original shapes, zeros where the plan cuts.

It shares no code with the cut: values are zeroed in place, shapes and attributes stay. Ops that
look across channels (LayerNorm, GroupNorm, a mean over channels, standardized weights) compute
over the kept channels only, in both; that is what pruning such a network means, and it is another
function than plain zeroing. So is a scale that the program computes from a width: the masked
reference takes the number from the pruned network.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.attention
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from compress.errors import PlanError
from compress.groups.calls import FollowedCalls, WatchedOps
from compress.groups.cut import check_fit, cut_by
from compress.groups.forward import copied, undisturbed
from compress.groups.plan import Kept, KeptOnly, PrunePlan
from compress.modules import network_of, set_mode, with_gradients
from compress.modules.copying import full_copy, parameters_and_buffers

Call = tuple[str, int]  # an op, and which call of it in one forward
Given = tuple[Any, Any]  # arguments and keyword arguments
_NORMALIZED = ("norm", "softmax", "attention", "cumsum", "cumprod")  # 0 where cut; statistics get 1


@with_gradients()
def mask_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return the masked reference: equal to the pruned network on every input, in eval mode.

    Args:
        model: The network the plan was made for; it is left as it is.
        plan: What to zero, on the side that makes a channel and on the side that takes it.

    Raises:
        PlanError: the plan was made for another network.
    """
    model = network_of(model)
    check_fit(model, plan)
    reference = full_copy(model)
    tensors = dict(parameters_and_buffers(reference))
    with torch.no_grad():
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items():
                if name not in plan.indices:
                    _zero(tensors[name], dim, kept)
        for name, index in plan.indices.items():
            tensors[name].copy_(torch.from_numpy(index.values))
    if plan.kept_only:
        numbers = any(item.numbers for item in plan.kept_only)
        watcher = _Watcher(plan.kept_only, cut_by(model, plan) if numbers else None)
        reference.register_forward_pre_hook(watcher.enter, with_kwargs=True)
        reference.register_forward_hook(watcher.leave, always_call=True)
    return reference


def _zero(tensor: Tensor, dim: int, kept: Any) -> None:
    gone = torch.from_numpy(np.setdiff1d(np.arange(tensor.shape[dim]), kept))
    tensor.index_fill_(dim, gone.to(tensor.device), 0)


class _Watcher:
    """Turns the mode on while the reference's forward runs; some ops need numbers of ``pruned``."""

    def __init__(self, items: tuple[KeptOnly, ...], pruned: nn.Module | None) -> None:
        self._items = items
        self._pruned = pruned
        self._entered: list[tuple[_CountedOps, contextlib.ExitStack]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watcher:
        return _Watcher(self._items, self._pruned)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        meet = functools.partial(_over_kept, self._numbers(module, args, kwargs))
        ops = _CountedOps(self._items, meet)
        stack = contextlib.ExitStack()
        stack.enter_context(_watching(ops))
        self._entered.append((ops, stack))

    def _numbers(self, reference: nn.Module, args: Any, kwargs: Any) -> Mapping[Call, Given]:
        """Return what the pruned network gives, on these inputs, to the ops that need numbers."""
        if self._pruned is None:
            return {}
        like, own = (
            next(t for _, t in parameters_and_buffers(net) if t.is_floating_point())
            for net in (reference, self._pruned)
        )
        if (like.dtype, like.device) != (own.dtype, own.device):
            self._pruned.to(like)
        given: dict[Call, Given] = {}

        def note(func: Any, item: KeptOnly, args: tuple[Any, ...], kwargs: Any) -> Any:
            given.update({(item.op, item.occurrence): (args, kwargs)} if item.numbers else {})
            return func(*args, **kwargs)

        set_mode(self._pruned, training=reference.training)
        inputs, named = tree_map(copied, (args, kwargs))
        with undisturbed(), _watching(_CountedOps(self._items, note)):
            _read_out(self._pruned(*inputs, **named))
        return given

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        ops, stack = self._entered.pop()
        with stack:
            output = _read_out(output)
        if output is not None and not module.training:
            ops.check_finished()
        return output


def _read_out(output: Any) -> Any:
    """Return the output, an iterator only after it was read: it runs on while it is."""
    return iter(list(output)) if isinstance(output, Iterator) else output


@contextlib.contextmanager
def _watching(ops: _CountedOps) -> Iterator[None]:
    """Let ``ops`` see the single ops of attention as well: a fused one hides its softmax."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        math = torch.nn.attention.SDPBackend.MATH
        with torch.nn.attention.sdpa_kernel(math), ops, FollowedCalls(ops):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _CountedOps(WatchedOps):
    """Counts the calls of ops, and lets ``meet`` compute those that the plan has ``items`` for."""

    def __init__(self, items: tuple[KeptOnly, ...], meet: Callable[..., Any]) -> None:
        super().__init__()
        self._meet = meet
        self._items = {(item.op, item.occurrence): item for item in items}
        self._watched = {_packet(item.op) for item in items}
        self._calls: dict[str, int] = {}
        self._missing = set(self._items)

    def check_finished(self) -> None:
        """Raise PlanError if a call that must be computed over kept channels was not made."""
        for op, occurrence in sorted(self._missing):
            raise PlanError(
                f"call {occurrence} of {op}, which mixes channels that were cut, was not made",
                where="masked network",
                expected="the same operations as when the plan was made",
                fix="Run it in eval mode on inputs shaped like the plan's example",
            )

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        return self._counted(func, str(func), args, kwargs)

    def whole(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that the plan counts as one op."""
        return self._counted(func, f"aten.{name}.whole", args, kwargs)

    def _counted(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = _packet(name)
        if packet not in self._watched:
            return func(*args, **kwargs)
        occurrence = self._calls.get(packet, 0)
        self._calls[packet] = occurrence + 1
        item = self._items.get((name, occurrence))
        if item is None:
            return func(*args, **kwargs)
        self._missing.discard((name, occurrence))
        return self._meet(func, item, args, kwargs)


def _packet(op: str) -> str:
    return op.split(".")[1].removesuffix("_")


def _over_kept(
    numbers: Mapping[Call, Given],
    func: Any,
    item: KeptOnly,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Compute an op over kept positions only, or with the numbers of the pruned network."""
    if item.numbers:
        theirs = numbers.get((item.op, item.occurrence), (args, kwargs))
        own, named = tree_map(
            lambda mine, its: mine if isinstance(mine, Tensor) else its, (args, kwargs), theirs
        )
        return func(*own, **named)
    given = list(args)
    for position, dims in item.inputs.items():
        _check(args[position], item, position)
        shrink = _masked if item.mask_only else _selected
        given[position] = shrink(args[position], dims)
    if item.mask_only:
        return func(*given, **kwargs)
    result = func(*_resized(item.op, given), **kwargs)
    fill = 0.0 if any(word in item.op for word in _NORMALIZED) else 1.0
    if isinstance(result, Tensor):
        return _spread(result, item, 0, fill)
    first, *rest = result
    return (
        _spread(first, item, 0, fill),
        *(_spread(r, item, i + 1, 1.0) for i, r in enumerate(rest)),
    )


def _check(tensor: Any, item: KeptOnly, position: int) -> None:
    for dim, kept in item.inputs[position].items():
        if not isinstance(tensor, Tensor) or tensor.ndim <= dim or tensor.shape[dim] != kept.size:
            raise PlanError(
                f"call {item.occurrence} of {item.op} is not the one the plan was made for",
                fix="Run it in eval mode on inputs shaped like the plan's example",
            )


def _selected(tensor: Tensor, dims: Mapping[int, Kept]) -> Tensor:
    for dim, kept in dims.items():
        tensor = tensor.index_select(dim, torch.from_numpy(kept.positions).to(tensor.device))
    return tensor


def _masked(tensor: Tensor, dims: Mapping[int, Kept]) -> Tensor:
    tensor = tensor.clone()
    for dim, kept in dims.items():
        _zero(tensor, dim, kept.positions)
    return tensor


def _resized(op: str, args: list[Any]) -> list[Any]:
    """Return the arguments with the numbers that say how many channels there are."""
    name = _packet(op)
    if name == "native_layer_norm":
        args[1] = list(args[0].shape[args[0].ndim - len(args[1]) :])
    elif name == "native_group_norm":
        args[4] = args[0].shape[1]
    return args


def _spread(result: Tensor, item: KeptOnly, number: int, fill: float) -> Tensor:
    for dim, kept in item.outputs.get(number, {}).items():
        if dim >= result.ndim or result.shape[dim] != len(kept.positions):
            continue
        shape = list(result.shape)
        shape[dim] = kept.size
        full = result.new_full(shape, fill)
        index = torch.from_numpy(kept.positions).to(result.device)
        result = full.index_copy_(dim, index, result)
    return result
