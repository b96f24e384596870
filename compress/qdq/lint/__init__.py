"""Check a Q/DQ graph against the rules of a target, and fix it."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import checker, inliner

from compress.artifact import replacing
from compress.errors import ModelError, boundary
from compress.graph import files
from compress.graph.values import EditableGraph
from compress.qdq.lint.finding import Finding
from compress.qdq.lint.rules import RULES, TARGETS, Rule, rules_for

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
        if model.ByteSize() < LARGEST:
            checker.check_model(model)
        return inliner.inline_local_functions(model) if model.functions else model


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
        checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        onnx.save_model(model, temporary)
    return path
