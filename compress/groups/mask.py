"""The masked twin of a pruned network: original shapes, zero wherever the plan cuts.

It shares no code with the cut: values are zeroed in place, shapes and attributes stay. Ops that
look across channels (LayerNorm, GroupNorm, a mean over channels, standardized weights) compute
over the kept channels only, in both; that is what pruning such a network means, and it is another
function than plain zeroing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.attention
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import PlanError
from compress.groups.calls import WatchedCalls, whole_name
from compress.groups.cut import check_fit
from compress.groups.plan import Dims, KeptOnly, PrunePlan
from compress.modules import network_of, with_gradients
from compress.modules.copying import full_copy, named_tensors

_NORMALIZED = ("norm", "softmax", "attention", "cumsum", "cumprod")  # 0 where cut; statistics get 1


@with_gradients()
def mask_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return the masked twin: equal to the pruned network on every input, in eval mode.

    Args:
        model: The network the plan was made for; it is left as it is.
        plan: What to zero, on the side that makes a channel and on the side that takes it.

    Raises:
        PlanError: the plan was made for another network.
    """
    model = network_of(model)
    check_fit(model, plan)
    twin = full_copy(model)
    tensors = dict(named_tensors(twin))
    with torch.no_grad():
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items():
                _zero(tensors[name], dim, kept)
    if plan.kept_only:
        watcher = _Watcher(plan.kept_only)
        twin.register_forward_pre_hook(watcher.enter)
        twin.register_forward_hook(watcher.leave, always_call=True)
    return twin


def _gone(size: int, kept: Any) -> Tensor:
    gone = np.ones(size, bool)
    gone[kept] = False
    return torch.from_numpy(np.flatnonzero(gone))


def _zero(tensor: Tensor, dim: int, kept: Any) -> None:
    tensor.index_fill_(dim, _gone(tensor.shape[dim], kept).to(tensor.device), 0)


class _Watcher:
    """Turns the mode on while the twin's forward runs."""

    def __init__(self, items: tuple[KeptOnly, ...]) -> None:
        self._items = items
        self._entered: list[tuple[_OverKept, contextlib.ExitStack]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watcher:
        return _Watcher(self._items)

    def enter(self, module: nn.Module, args: Any) -> None:
        ops, stack = _OverKept(self._items), contextlib.ExitStack()
        stack.enter_context(_unfused())
        stack.enter_context(ops)
        stack.enter_context(_WholeCalls(ops))
        self._entered.append((ops, stack))

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        ops, stack = self._entered.pop()
        with stack:
            if isinstance(output, Iterator):
                output = iter(list(output))  # it runs on while it is read
        if output is not None and not module.training:
            ops.check_finished()
        return output


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Compute attention from the single ops that the trace saw: a fused one hides its softmax."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _OverKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the listed ops over kept positions only, and puts the results back in place."""

    def __init__(self, items: tuple[KeptOnly, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._items = {(item.op, item.occurrence): item for item in items}
        self._watched = {_packet(item.op) for item in items}
        self._calls: dict[str, int] = {}
        self._inside_whole = False
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

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one op."""
        name = str(func)
        packet = _packet(name)
        if packet not in self._watched or self._inside_whole:
            return func(*args, **(kwargs or {}))
        return self._run(func, name, args, kwargs or {})

    def whole(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that the plan counts as one op."""
        self._inside_whole = True
        try:
            return self._run(func, f"aten.{name}.whole", args, kwargs)
        finally:
            self._inside_whole = False

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = _packet(name)
        occurrence = self._calls.get(packet, 0)
        self._calls[packet] = occurrence + 1
        item = self._items.get((name, occurrence))
        if item is None:
            return func(*args, **kwargs)
        self._missing.discard((name, occurrence))
        return _over_kept(func, item, args, kwargs)


class _WholeCalls(WatchedCalls):
    """Sees the calls that the plan counts as one op, also inside PyTorch's functions."""

    def __init__(self, ops: _OverKept) -> None:
        super().__init__()
        self._ops = ops

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one call of the program."""
        if (name := whole_name(func)) is not None:
            return self._ops.whole(func, name, args, kwargs or {})
        return self.inside(func, args, kwargs or {})


def _packet(op: str) -> str:
    return op.split(".")[1].removesuffix("_")


def _over_kept(func: Any, item: KeptOnly, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    for dim, size in item.sizes[position].items():
        if not isinstance(tensor, Tensor) or tensor.ndim <= dim or tensor.shape[dim] != size:
            raise PlanError(
                f"call {item.occurrence} of {item.op} is not the one the plan was made for",
                fix="Run the masked twin in eval mode on inputs shaped like the plan's example",
            )


def _selected(tensor: Tensor, dims: Dims) -> Tensor:
    for dim, kept in dims.items():
        tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
    return tensor


def _masked(tensor: Tensor, dims: Dims) -> Tensor:
    tensor = tensor.clone()
    for dim, kept in dims.items():
        _zero(tensor, dim, kept)
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
    dims: Mapping[int, Any] = item.outputs.get(number, {})
    for dim, kept in dims.items():
        if dim >= result.ndim or result.shape[dim] != len(kept):
            continue
        shape = list(result.shape)
        shape[dim] = item.output_sizes[number][dim]
        full = result.new_full(shape, fill)
        result = full.index_copy_(dim, torch.from_numpy(kept).to(result.device), result)
    return result
