"""Check a Q/DQ graph against the rules of a target, and fix it: every rule, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from compress.artifact import replacing
from compress.errors import ModelError, UnknownNameError, boundary
from compress.graph import files
from compress.graph.values import EditableGraph
from compress.graph.weightless import check_rules, without_functions
from compress.qdq.lint import activations, onnxruntime, openvino, placement, tensorrt, weights
from compress.qdq.lint.patterns import Problem
from compress.qdq.plan import TARGETS

__all__ = [
    "RULES",
    "TARGETS",
    "Finding",
    "Rule",
    "fix_model",
    "fix_onnx",
    "lint_model",
    "lint_onnx",
    "load_onnx",
]

LARGEST = 2**31 - 1  # bytes of one protobuf message
INVALID = "is not valid ONNX"
FIX = "Export it again, or copy it again and compare its SHA-256"
MOST_ROUNDS = 12  # mending one thing can uncover another; three rounds are the rule


@dataclass(frozen=True)
class Finding:
    """One thing that costs accuracy or speed on the target."""

    rule: str  # name of the rule, as in ``compress.qdq.lint.RULES``
    node: str  # name of the node it is about
    message: str  # what is wrong, what it costs, and what to do
    fixable: bool  # whether ``fix_onnx`` fixes it

    def to_json(self) -> dict[str, Any]:
        """Return this finding as JSON-able data."""
        return asdict(self)


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
    Rule(placement.vanishing_scores),
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


def lint_onnx(path: str | Path, target: str = "tensorrt") -> list[Finding]:
    """Return what in an ONNX file costs accuracy or speed on ``target``, worst kinds first.

    Args:
        path: Any ONNX file with QuantizeLinear and DequantizeLinear nodes.
        target: "onnxruntime" (on a CPU), "openvino" or "tensorrt" (also TensorRT-RTX).

    Raises:
        EngineError: the file is absent, cut short, or wants weights from outside its folder.
        ModelError: it is no valid ONNX.
        UnknownNameError: there is no such target.
    """
    rules = rules_for(target)
    with boundary(ModelError, INVALID, where=str(path), fix=FIX):
        return lint_model(load_onnx(path), rules=rules)


def fix_onnx(path: str | Path, out: str | Path, target: str = "tensorrt") -> list[Finding]:
    """Fix in ``path`` all that can be fixed for ``target`` and write the result to ``out``.

    Returns:
        What is left: findings that need the float network or calibration images. Ask ``lint_onnx``
        for what there was before.

    Raises:
        EngineError: the file is absent, cut short, or wants weights from outside its folder.
        ModelError: it is no valid ONNX.
        UnknownNameError: there is no such target.
    """
    rules = rules_for(target)
    with boundary(ModelError, INVALID, where=str(path), fix=FIX):
        fixed = fix_model(load_onnx(path), rules=rules)
        save_onnx(fixed, out)
        return lint_model(fixed, rules=rules)


def lint_model(model: onnx.ModelProto, *, rules: list[Rule]) -> list[Finding]:
    """Return the findings of ``rules`` on a model that ``load_onnx`` returned."""
    graph = EditableGraph(model)
    return [
        Finding(rule.name, problem.node, problem.message, problem.edit is not None)
        for rule in rules
        for problem in rule.find(graph)
    ]


def fix_model(model: onnx.ModelProto, *, rules: list[Rule]) -> onnx.ModelProto:
    """Return a copy of ``model`` with every problem fixed that its rule can fix."""
    graph = EditableGraph(model)
    for _ in range(MOST_ROUNDS):
        fixed = 0
        for rule in rules:
            for problem in rule.find(graph):
                if problem.edit is not None:
                    problem.edit()
                    fixed += 1
            graph.sweep()
        if not fixed:
            break
    return graph.to_model()


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Return the model in ``path`` with its weights, checked, its local functions inlined.

    Raises:
        EngineError: the file is absent, cut short, or wants weights from outside its folder.
        ModelError: it is no valid ONNX.
    """
    model = files.load(path)
    with boundary(ModelError, INVALID, where=str(path), fix=FIX):
        check_rules(model)
        return without_functions(model)


def save_onnx(model: onnx.ModelProto, path: str | Path) -> Path:
    """Write ``model`` to ``path`` after checking it with full shape inference.

    Raises:
        ModelError: the model is larger than one file of ONNX can be, or breaks its rules.
    """
    path = Path(path)
    if model.ByteSize() >= LARGEST:
        raise ModelError(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB",
            where=str(path),
            expected="less than 2 GiB, all that one ONNX file can hold",
        )
    with boundary(ModelError, INVALID, where=str(path)):
        check_rules(model, full=True)
    with replacing(path) as temporary:
        onnx.save_model(model, temporary)
    return path
