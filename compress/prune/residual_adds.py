"""Find residual additions: which layer output is added to which earlier tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm

from compress.groups import meta_ops
from compress.groups.calls import WatchedOps
from compress.prune.batchnorm import tracking_norms

LEAST_SLOPE = 1e-3  # of a BatchNorm's largest: a channel below cannot take up what others lost


@dataclass(frozen=True)
class Join:
    """A residual addition: a layer's output, as it is or after a BatchNorm, is one operand.

    Args:
        number: Which of the sums of one forward it is.
        other: Which of its two operands is not the layer's.
        norm: The BatchNorm between the layer and the sum, in eval mode.
    """

    number: int
    other: int
    norm: _BatchNorm | None = None

    def gain(self) -> Tensor | float:
        """Return what the layer's answer must change by to change the sum by 1: (C,), or 1.

        It is 0 for channels that the BatchNorm hardly passes on.
        """
        norm = self.norm
        if norm is None or norm.running_var is None:
            return 1.0
        slope = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        passes = slope.abs() > LEAST_SLOPE * slope.abs().max()
        return torch.where(passes, 1 / slope, torch.zeros_like(slope))


class Sums(WatchedOps):  # type: ignore[no-untyped-call]
    """Shows every sum of two tensors: its number and both operands, before it is done."""

    def __init__(self, show: Callable[[int, tuple[Tensor, Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._show = show
        self._done = 0

    def skip(self, count: int) -> None:
        """Count sums that are not done in this pass."""
        self._done += count

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        if meta_ops.op_name(func) == "add" and not kwargs:
            operands = tuple(each for each in args if isinstance(each, Tensor))
            if len(operands) == 2:
                self._show(self._done, operands)
                self._done += 1
        return func(*args, **kwargs)


def joins(model: nn.Module, layers: Sequence[nn.Module], image: Tensor) -> dict[nn.Module, Join]:
    """Return the addition that each layer's output goes into, if the other operand comes first.

    Where the answers of two layers meet, this is so for the one that runs last.

    Args:
        model: A network in eval mode.
        layers: Those to look for; each runs once in a forward.
        image: What to run it on, (1, C, H, W).
    """
    found: dict[nn.Module, Join] = {}
    started: dict[nn.Module, int] = {}
    answers: dict[int, tuple[nn.Module, _BatchNorm | None]] = {}  # by the tensor's id

    def show(number: int, operands: tuple[Tensor, Tensor]) -> None:
        alike = operands[0].shape == operands[1].shape
        for own, other in ((0, 1), (1, 0)):
            layer, norm = answers.get(id(operands[own]), (None, None))
            if alike and layer is not None and watch.made_at(operands[other]) <= started[layer]:
                found.setdefault(layer, Join(number, other, norm))

    def starts(layer: nn.Module, _inputs: Any) -> None:
        started[layer] = watch.clock

    def ends(layer: nn.Module, _inputs: Any, answer: Tensor) -> None:
        answers[id(answer)] = (layer, None)

    def normalizes(norm: Any, inputs: tuple[Tensor, ...], answer: Tensor) -> None:
        layer, already = answers.get(id(inputs[0]), (norm, norm))
        if already is None and norm.affine:
            answers[id(answer)] = (layer, norm)

    watch = _Watch(show)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(starts))
            stack.enter_context(layer.register_forward_hook(ends))
        for norm in tracking_norms(model):
            stack.enter_context(norm.register_forward_hook(normalizes))
        stack.enter_context(watch)
        model(image)
    return found


class _Watch(Sums):  # type: ignore[no-untyped-call]
    """Also knows when each tensor was made. All are kept, so that no id is used twice."""

    def __init__(self, show: Callable[[int, tuple[Tensor, Tensor]], None]) -> None:
        super().__init__(show)
        self._made: dict[int, tuple[int, Tensor]] = {}

    @property
    def clock(self) -> int:
        """Tensors made so far."""
        return len(self._made)

    def made_at(self, tensor: Tensor) -> int:
        """Return when a tensor was made; 0 if before the forward."""
        return self._made.get(id(tensor), (0, tensor))[0]

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op and note what it makes."""
        result = super().op(func, args, kwargs)
        for tensor in meta_ops.tensors_in(result):
            self._made.setdefault(id(tensor), (self.clock + 1, tensor))
        return result
