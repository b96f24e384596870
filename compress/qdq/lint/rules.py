"""Every rule, in the order in which they are applied, and the targets it holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compress.errors import UnknownNameError
from compress.graph.values import EditableGraph
from compress.qdq.lint import (
    activations,
    heads,
    onnxruntime,
    openvino,
    placement,
    tensorrt,
    weights,
)
from compress.qdq.lint.finding import Problem

TARGETS = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Rule:
    """A named function that yields problems, and the targets it is right for."""

    find: Callable[[EditableGraph], Iterator[Problem]]
    targets: tuple[str, ...] = TARGETS

    @property
    def name(self) -> str:
        """Name of the rule: its function's, with hyphens."""
        return self.find.__name__.replace("_", "-")


_TRT = ("tensorrt",)
_ORT = ("onnxruntime",)
_OPENVINO = ("openvino",)
_CPU = ("onnxruntime", "openvino")

RULES = (
    Rule(placement.operator_format),
    Rule(placement.nothing_quantized),
    Rule(placement.unread_quantize),
    Rule(activations.scale_not_constant),
    Rule(activations.scale_not_positive),
    Rule(activations.pair_mismatch),
    Rule(activations.activation_per_channel),
    Rule(weights.weight_axis),
    Rule(weights.weight_zero_point),
    Rule(weights.weight_clipped),
    Rule(weights.weight_minus_128, _TRT),
    Rule(weights.weight_half_range, _TRT),
    Rule(weights.weight_per_tensor),
    Rule(placement.unfolded_batchnorm),
    Rule(activations.unsigned_activation, _TRT),
    Rule(activations.activation_zero_point, _TRT),
    Rule(placement.quantized_before_activation),
    Rule(openvino.split_activation, _OPENVINO),
    Rule(openvino.computed_batch, _OPENVINO),
    Rule(openvino.padded_average_pool, _OPENVINO),
    Rule(heads.vanishing_scores),
    Rule(placement.double_quantization),
    Rule(placement.duplicate_quantize),
    Rule(tensorrt.residual_both_sides, _TRT),
    Rule(tensorrt.residual_skip_float, _TRT),
    Rule(tensorrt.needless_pair, _TRT),
    Rule(onnxruntime.reduce_mean, _ORT),
    Rule(onnxruntime.rounded_up_pool, _ORT),
    Rule(placement.half_quantized),
    Rule(tensorrt.float_weight, _TRT),
    Rule(activations.signed_activation, _ORT),
    Rule(activations.signed_activation_with_zero_point, _OPENVINO),
    Rule(activations.wasted_range, _CPU),
    Rule(onnxruntime.missing_input_quantization, _ORT),
    Rule(onnxruntime.missing_output_quantization, _ORT),
    Rule(activations.moved_with_another_scale),
    Rule(activations.concat_scales, _TRT),
    Rule(weights.bias_quantized, _TRT),
    Rule(weights.bias_overflow, _ORT),
    Rule(weights.bias_scale, _ORT),
    Rule(weights.bias_float, _ORT),
)


def rules_for(target: str) -> list[Rule]:
    """Return the rules of ``target``, in order.

    Raises:
        UnknownNameError: there is no such target.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    return [rule for rule in RULES if target in rule.targets]
