"""Prune, distill and quantize trained CNNs, export them to engines, and prove what it did.

The names below are the public interface. Each is imported from its module when it is first used, so
that ``import compress`` takes no time and loads no runtime.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.errors import CompressError
    from compress.export import export_onnx
    from compress.groups.plan import PrunePlan
    from compress.groups.proof import apply_pruning, mask_pruning
    from compress.models import load_model, save_model
    from compress.pipeline import run
    from compress.prune import plan_pruning
    from compress.qdq.lint import lint_onnx
    from compress.quantize import QuantPlan, quantize_onnx
    from compress.report import Report
    from compress.runtimes import build_engine, open_session
    from compress.tasks import load_task
    from compress.train.distill import distiller

# ONNX Runtime reports home, and keeps a device id, unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "CompressError",
    "PrunePlan",
    "QuantPlan",
    "Report",
    "apply_pruning",
    "build_engine",
    "distiller",
    "evaluate",
    "export_onnx",
    "lint_onnx",
    "load_model",
    "load_task",
    "mask_pruning",
    "open_session",
    "plan_pruning",
    "prune",
    "quantize_onnx",
    "run",
    "save_model",
]

_HOMES = {
    "CompressError": "compress.errors",
    "PrunePlan": "compress.groups.plan",
    "QuantPlan": "compress.quantize",
    "Report": "compress.report",
    "apply_pruning": "compress.groups.proof",
    "build_engine": "compress.runtimes",
    "distiller": "compress.train.distill",
    "evaluate": "compress.evaluate",
    "export_onnx": "compress.export",
    "lint_onnx": "compress.qdq.lint",
    "load_model": "compress.models",
    "load_task": "compress.tasks",
    "mask_pruning": "compress.groups.proof",
    "open_session": "compress.runtimes",
    "plan_pruning": "compress.prune",
    "prune": "compress.prune",
    "quantize_onnx": "compress.quantize",
    "run": "compress.pipeline",
    "save_model": "compress.models",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from compress.packages import DISTRIBUTION, version

        return version(DISTRIBUTION) or "unknown: not installed"
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    if _HOMES[name] == f"compress.{name}":
        return module  # which can be called
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
