"""A QuantPlan simulated in torch: what the writer's graph computes, with gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.autograd import Function

from compress.graph.model import BIAS_LIMIT, GraphIndex
from compress.graph.preprocess import prepare
from compress.qdq.placement import Placement, place
from compress.qdq.plan import ActivationRange, QuantPlan, WeightScales
from compress.qdq.rewrite import apply_corrections, rewrite_for
from compress.qdq.writer import RULES, default_scales, quantizer, scale_axis, widest, write_qdq
from compress.quantize.qat.network import OnnxNetwork, Rounding


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Return (clip(round(x / scale) + zero, low, high) - zero) * scale, rounding half to even.

    This is ONNX's DequantizeLinear(QuantizeLinear(x)). The gradient of ``x`` passes where the
    value is not clipped (straight-through); that of ``scale`` is LSQ's.

    ``scale``, positive, and ``zero``, whole numbers, are of one shape that broadcasts to ``x``.

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


class WeightQuantizer(nn.Module):
    """The symmetric int8 rounding of one weight, a scale for each channel.

    The scale follows the largest magnitude of the channel, by the ratio the plan chose; or it is
    learned by itself.
    """

    ratio: Tensor

    def __init__(
        self, weight: Tensor, axis: int | None, planned: WeightScales | None, *, learned: bool
    ) -> None:
        super().__init__()
        self.axis, self.learned = axis, learned
        self.others = tuple(d for d in range(weight.ndim) if d != axis)
        self.shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        start = torch.from_numpy(default_scales(weight.numpy(), axis))
        chosen = start if planned is None else torch.tensor(planned.scales)
        self.register_buffer("ratio", chosen / start)
        if learned:
            self.learned_scale = nn.Parameter(chosen.clone())

    def scale(self, weight: Tensor, floor: Tensor) -> Tensor:
        """Return the scales in use, (C,) or (1,), none smaller than ``floor``."""
        if self.learned:
            count = weight.numel() / self.ratio.numel()
            return torch.maximum(
                scaled_gradient(self.learned_scale.abs(), (count * 127) ** -0.5), floor
            )
        peak = weight.detach().abs().amax(self.others).reshape(-1)
        scale = torch.where(peak > 0, peak / 127, torch.full_like(peak, 1 / 127))
        return torch.maximum(scale * self.ratio, floor)

    def forward(self, weight: Tensor, floor: Tensor) -> Tensor:
        """Return the weight rounded to int8 and back."""
        scale = self.scale(weight, floor).reshape(self.shape)
        return fake_quantize(weight, scale, torch.zeros_like(scale), -127, 127)


class SimulatedNetwork(OnnxNetwork):
    """The int8 graph of a plan on a target, trainable.

    Train it like any network; then ``write`` returns the Q/DQ graph of what was learned, which the
    same writer makes that makes graphs of post-training quantization.

    Args:
        plan: Ranges, scales, corrections (they are where training begins), layers left in float.
        learned_scales: Train the scales as well (LSQ).

    Raises:
        QuantizationError: the plan does not fit the graph, or an operator cannot be trained.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        plan: QuantPlan,
        *,
        learned_scales: bool = False,
    ) -> None:
        target = plan.target
        write_qdq(model, plan)  # whatever does not fit is said here, and in its words
        prepared = rewrite_for(apply_corrections(prepare(model), plan), target)
        super().__init__(prepared)
        self.plan, self.target, self.learned_scales = plan, target, learned_scales
        self.graph_nodes = {node.name: node for node in prepared.graph.node}
        self.placement = place(GraphIndex(prepared), target, plan.float_nodes)
        self.weighted = frozenset(self.placement.weights)
        self.groups = {name: _group(self.placement, name) for name in self.placement.readers}
        self.quantizers = {
            group: _quantizer(
                widest(plan.activations[name] for name in group), target, learned=learned_scales
            )
            for group in dict.fromkeys(self.groups.values())
        }
        made = enumerate(self.quantizers.values())
        self.activations = nn.ModuleDict({f"scale_{i}": each for i, each in made})
        self.roundings: dict[str, WeightQuantizer] = {}  # by weight
        for name in self.placement.weights:
            self._add_rounding(self.graph_nodes[name])
        kernels = enumerate(self.roundings.values())
        self.kernels = nn.ModuleDict({f"kernel_{i}": each for i, each in kernels})

    def write(self) -> onnx.ModelProto:
        """Return the Q/DQ graph for the target, with weights and scales as they are now."""
        return write_qdq(self.trained_model(), self.trained_plan())

    def trained_plan(self) -> QuantPlan:
        """Return the plan of what was learned, to go with ``trained_model``."""
        plan = self.plan.without_weights()
        weights = {
            self.graph_nodes[name].input[1]: self._weight_scales(name)
            for name in self.placement.weights
        }
        notes = (*plan.notes, "weights trained with simulated int8")
        if not self.learned_scales:
            return plan.changed(weights=weights, notes=notes)
        ranges = dict(plan.activations)
        for group, learned in self.quantizers.items():
            for name in group:
                ranges[name] = _learned_range(ranges[name], learned)
        return plan.changed(weights=weights, activations=ranges, notes=notes)

    def _rounding(self) -> Rounding:
        rounded: dict[str, Tensor] = {}

        def read(node: str, position: int, name: str, value: Tensor) -> Tensor:
            if (node, position) in self.placement.readers.get(name, ()):
                if name not in rounded:
                    rounded[name] = self.quantizers[self.groups[name]](value)
                return rounded[name]
            if node in self.weighted and position == 1:
                weight: Tensor = self.roundings[name](value, self._floor(node, value))
                return weight
            if node in self.weighted and position == 2 and RULES[self.target].int32_bias:
                return self._bias(node, value)
            return value

        return read

    def _floor(self, node: str, weight: Tensor) -> Tensor:
        """Return the smallest scales with which the int32 bias of ``node`` does not overflow."""
        inputs = self.graph_nodes[node].input
        bias = self.constant(inputs[2]) if len(inputs) > 2 else None
        if bias is None or not RULES[self.target].int32_bias:
            return torch.full((1,), 1e-12, device=weight.device)
        incoming = self.quantizers[self.groups[inputs[0]]].scale.detach()
        floor = (bias.detach().abs().double() / BIAS_LIMIT / incoming.double()).reshape(-1)
        if self.roundings[inputs[1]].axis is None:
            floor = floor.max().reshape(1)
        return floor.float().clamp(min=1e-12)

    def _bias(self, node: str, bias: Tensor) -> Tensor:
        """Return a bias rounded to int32, whose scale is input scale times weight scale."""
        inputs = self.graph_nodes[node].input
        weight = self.constant(inputs[1])
        if weight is None:
            return bias
        scale = self.roundings[inputs[1]].scale(weight, self._floor(node, weight)).detach()
        unit = scale.double() * self.quantizers[self.groups[inputs[0]]].scale.detach().double()
        rounded = torch.round(bias.detach().double() / unit) * unit.float().double()
        return bias + (rounded.float() - bias).detach()

    def _add_rounding(self, node: onnx.NodeProto) -> None:
        name = node.input[1]
        weight = self.constant(name)
        if weight is not None and name not in self.roundings:
            axis, planned = scale_axis(node, weight.ndim), self.plan.weights.get(name)
            self.roundings[name] = WeightQuantizer(
                weight.detach(), axis, planned, learned=self.learned_scales
            )

    def _weight_scales(self, node: str) -> WeightScales:
        name = self.graph_nodes[node].input[1]
        weight = self.constant(name)
        if weight is None:
            raise TypeError(f"{node} has no constant weight")
        kernel = self.roundings[name]
        scale = kernel.scale(weight, self._floor(node, weight)).detach().cpu().numpy()
        return WeightScales(kernel.axis, tuple(float(s) for s in scale))


def _group(placement: Placement, tensor: str) -> frozenset[str]:
    """Return the tensors whose common range ``tensor`` is quantized with."""
    source = placement.source(tensor)
    return frozenset(next((g for g in placement.joined if source in g), {source}))


def _quantizer(found: ActivationRange, target: str, *, learned: bool) -> FakeQuantizer:
    made = quantizer(found, target)
    info = np.iinfo(made.zero_point.dtype)
    limits: dict[str, Any] = {"low": int(info.min), "high": int(info.max), "learned": learned}
    return FakeQuantizer(float(made.scale), int(made.zero_point), **limits)


def _learned_range(before: ActivationRange, learned: FakeQuantizer) -> ActivationRange:
    """Return the range that the writer turns into the learned scale and the same zero point."""
    scale, zero = float(learned.scale.detach()), float(learned.zero)
    low, high = (learned.low - zero) * scale, (learned.high - zero) * scale
    if learned.low < 0:  # int8: the plan speaks of the symmetric range
        return dataclasses.replace(before, limit=127 * scale, observer="learned")
    return dataclasses.replace(
        before, low=low, high=high, limit=max(-low, high), observer="learned"
    )
