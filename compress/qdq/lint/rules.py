"""Every rule, in the order in which they are applied, and the targets it holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compress.errors import UnknownNameError
from compress.lint import biases, chain, heads, kernels, openvino, placement, scales, tensorrt
from compress.lint.finding import Problem
from compress.lint.graph import Graph

TARGETS = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Rule:
    """A named function that yields problems, and the targets it is right for."""

    find: Callable[[Graph], Iterator[Problem]]
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
    Rule(scales.scale_not_constant),
    Rule(scales.scale_not_positive),
    Rule(scales.pair_mismatch),
    Rule(scales.activation_per_channel),
    Rule(kernels.weight_axis),
    Rule(kernels.weight_zero_point),
    Rule(kernels.weight_clipped),
    Rule(kernels.weight_minus_128, _TRT),
    Rule(kernels.weight_half_range, _TRT),
    Rule(kernels.weight_per_tensor),
    Rule(placement.unfolded_batchnorm),
    Rule(scales.unsigned_activation, _TRT),
    Rule(scales.activation_zero_point, _TRT),
    Rule(placement.quantized_before_activation),
    Rule(openvino.split_activation, _OPENVINO),
    Rule(openvino.computed_batch, _OPENVINO),
    Rule(heads.vanishing_scores),
    Rule(placement.double_quantization),
    Rule(placement.duplicate_quantize),
    Rule(tensorrt.residual_both_sides, _TRT),
    Rule(tensorrt.residual_skip_float, _TRT),
    Rule(tensorrt.needless_pair, _TRT),
    Rule(chain.reduce_mean, _ORT),
    Rule(placement.half_quantized),
    Rule(tensorrt.float_weight, _TRT),
    Rule(scales.signed_activation, _ORT),
    Rule(scales.signed_activation_with_zero_point, _OPENVINO),
    Rule(scales.wasted_range, _CPU),
    Rule(chain.missing_input_quantization, _ORT),
    Rule(chain.missing_output_quantization, _ORT),
    Rule(scales.moved_with_another_scale),
    Rule(scales.concat_scales, _TRT),
    Rule(biases.bias_quantized, _TRT),
    Rule(biases.bias_overflow, _ORT),
    Rule(biases.bias_scale, _ORT),
    Rule(biases.bias_float, _ORT),
)


def rules_for(target: str) -> list[Rule]:
    """Return the rules of ``target``, in order.

    Raises:
        UnknownNameError: there is no such target.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    return [rule for rule in RULES if target in rule.targets]
