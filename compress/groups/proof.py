"""Prove a plan: the pruned network and its masked reference give the same outputs.

The masked reference has the original shapes and zeros where the plan cuts. It shares no code with
the cut: values are zeroed in place, shapes and attributes stay. Ops that look across channels
(LayerNorm, GroupNorm, a mean over channels, standardized weights) compute over the kept channels
only, in both; that is what pruning such a network means, and it is another function than plain
zeroing. So is a scale that the program computes from a width: the masked reference takes the number
from the pruned network.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.attention
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from compress.errors import PlanError, boundary
from compress.groups.calls import TAKERS, FollowedCalls, WatchedCalls, WatchedOps
from compress.groups.cut import check_fit, cut_by
from compress.groups.forward import undisturbed
from compress.groups.plan import KeptOnly, PrunePlan
from compress.modules import full_copy, network_of, parameters_and_buffers, set_mode, with_gradients
from compress.modules.detectors import on_batch
from compress.modules.inputs import Example, call_inputs, copied, example_of
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
    check_fit(network_of(model), plan)
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
    network: then both are computed again in float64, and that difference is returned. The example
    is one with values, preferably random ones.

    Raises:
        PlanError: the network returns nothing that could be compared.
    """
    model = network_of(model)
    difference = _difference(model, plan, example_input)
    if difference <= TOLERANCE:
        return difference
    doubled = tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v,
        example_of(example_input),
    )
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
    # The least difference may reorder boxes after NMS.
    model = model if outputs else on_batch(model, args, kwargs)
    set_mode(model, training=False)
    found = chosen_outputs(leaves(_answered(model, args, kwargs)), outputs)
    answers = [_comparable(leaf) for _, leaf in found if leaf is not None]
    if any(not isinstance(each, Tensor) or each.numel() for each in answers):
        return answers
    with _Taken() as taken:  # nothing was found: what it is looked for in says more
        _answered(model, args, kwargs)
    return [*answers, *taken.values]


def _answered(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own, named = copied((args, kwargs))  # a network may write into its inputs
    return model(*own, **named)


class _Taken(WatchedCalls):
    """Keeps the tensors out of which the program takes their values."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") in TAKERS:
            self.values.append(args[0].detach().clone())
        return self.inside(func, args, kwargs)


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
        inputs, named = copied((args, kwargs))
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
        tensor = args[position]
        for dim, kept in dims.items():
            if not isinstance(tensor, Tensor) or tensor.shape[dim : dim + 1] != (kept.size,):
                raise PlanError(
                    f"call {item.occurrence} of {item.op} is not the one the plan was made for",
                    fix="Run it in eval mode on inputs shaped like the plan's example",
                )
            if item.mask_only:
                tensor = tensor.clone()
                _zero(tensor, dim, kept.positions)
            else:
                index = torch.from_numpy(kept.positions).to(tensor.device)
                tensor = tensor.index_select(dim, index)
        given[position] = tensor
    if item.mask_only:
        return func(*given, **kwargs)
    result = func(*_resized(item.op, given), **kwargs)
    fill = 0.0 if any(word in item.op for word in _NORMALIZED) else 1.0
    if isinstance(result, Tensor):
        return _spread(result, item, 0, fill)
    return tuple(_spread(r, item, i, 1.0 if i else fill) for i, r in enumerate(result))


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
