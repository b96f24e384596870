"""Rounding to integers and back in float, as Q and DQ do it, with gradients that pass through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Return (clip(round(x / scale) + zero, low, high) - zero) * scale, rounding half to even.

    This is ONNX's DequantizeLinear(QuantizeLinear(x)). The gradient of ``x`` passes where the
    value is not clipped (straight-through); that of ``scale`` is LSQ's.

    Args:
        x: Any shape, float32.
        scale: Positive, a scalar or broadcastable to ``x``.
        zero: Zero point, the shape of ``scale``, whole numbers.
        low: Smallest integer.
        high: Largest integer.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, https://arxiv.org/abs/1902.08153,
    equations 1 to 3.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero, low, high)
    return result


class _FakeQuantize(Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        low: int,
        high: int,
    ) -> Tensor:
        raw = x / scale
        codes = torch.round(raw) + zero
        inside = (codes >= low) & (codes <= high)
        steps = codes.clamp(low, high) - zero
        ctx.save_for_backward(raw, steps, inside, scale)
        return steps * scale

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        raw, steps, inside, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        to_x = gradient * inside if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        to_scale = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            slope = torch.where(inside, steps - raw, steps)
            to_scale = (gradient * slope).sum_to_size(scale.shape)
        return to_x, to_scale, None, None, None


class FakeQuantizer(nn.Module):
    """Q and DQ of one activation, or of several that share a scale."""

    start: Tensor
    zero: Tensor

    def __init__(self, scale: float, zero: int, low: int, high: int, *, learned: bool) -> None:
        super().__init__()
        self.low, self.high, self.learned = low, high, learned
        if learned:
            self.learned_scale = nn.Parameter(torch.tensor(scale))
        self.register_buffer("start", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(float(zero)))

    @property
    def scale(self) -> Tensor:
        """The scale in use, positive; exactly the one it began with unless it is learned."""
        return self.learned_scale.abs().clamp(min=1e-12) if self.learned else self.start

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the integers and back."""
        if not self.learned:
            return fake_quantize(x, self.scale, self.zero, self.low, self.high)
        count = x.numel() / max(len(x), 1)
        scale = scaled_gradient(self.scale, (count * self.high) ** -0.5)
        return fake_quantize(x, scale, self.zero, self.low, self.high)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``factor``, as LSQ does."""
    return (x - x * factor).detach() + x * factor
