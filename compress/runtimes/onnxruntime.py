"""ONNX Runtime: the CPU everywhere, CUDA and TensorRT where the installed build has them."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx

from compress.artifact import replacing
from compress.errors import EngineError, UnknownNameError, UsageError, reason_of
from compress.graph import files
from compress.graph.values import EditableGraph, constant
from compress.packages import require
from compress.runtimes import Runtime, _session
from compress.runtimes._plain_kernels import take_exact_kernels
from compress.runtimes._session import BuildRequest, Opens, TensorSpec

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
LOOP_SECONDS = 60.0  # after which a run of a graph with a Loop is ended: it may turn 2^62 times
# What it says of sizes that lie beside the file with the weights: it looks for them inside alone
OUTSIDE = "data from external tensors"
# And where exact int8 kernels are asked for and layers share integers, which it converts for each
TWICE = "Attempt to replace the existing tensor"
LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class Onnxruntime(Runtime):
    """ONNX Runtime on the CPU, or on a GPU where the installed build has its provider.

    Opens ONNX files. ``build`` writes the optimized graph as ONNX, which loads faster and shows
    what was fused.

    Options: ``threads`` (all cores if absent); ``device`` ("cpu", "cuda", "tensorrt" or "auto":
    the CPU); ``batch`` fixes a free batch dimension; ``optimization`` ("none", "basic",
    "extended", "all"): with "none", Q/DQ nodes are computed one by one in float, which is the
    arithmetic that TensorRT follows.
    """

    threads: int | None = None
    device: str = "auto"
    batch: int | None = None
    optimization: str = "all"

    extension: ClassVar[str] = ".onnx"
    opens: ClassVar[Opens] = "onnx"
    int8_form: ClassVar[str | None] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    enables: ClassVar[str] = "runs ONNX on the CPU, and proves every export"
    zero_weights: ClassVar[str] = (
        "runs dense kernels: zeros cost as much as other weights; the file compresses"
    )

    def __post_init__(self) -> None:
        if self.optimization not in LEVELS:
            raise UnknownNameError(
                "optimization", self.optimization, LEVELS, where="runtime 'onnxruntime'"
            )

    def device_kind(self) -> str:
        """Return where it runs: "cpu" or "cuda"."""
        return "cpu" if self.device in {"auto", "cpu"} else "cuda"

    def how(self) -> str:
        """Return the providers that are here."""
        providers = _package().get_available_providers()
        known = (name.removesuffix("ExecutionProvider") for name in providers)
        return ", ".join(name for name in known if name != "Azure")  # which calls other machines

    def build(self, source: Path, out: Path, request: BuildRequest) -> dict[str, Any]:
        """Write the graph as ONNX Runtime optimizes it for any CPU.

        Raises:
            EngineError: the graph is damaged or holds an operator ONNX Runtime does not know.
            UsageError: the name is one that ONNX Runtime reads as its own ORT format.
        """
        if out.suffix.lower() == ".ort":
            raise UsageError(
                f"ONNX Runtime reads {out.name!r} as its ORT format, and this writes ONNX",
                expected="an --out that ends in .onnx",
            )
        model = _session.of_precision(source, request.precision)
        options = self._options()
        ort = _package()
        if self.optimization == "all":  # the last level is for the CPU it was made on only
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        with replacing(out) as temporary:
            options.optimized_model_filepath = str(temporary)
            converted = request.precision == "fp16"
            self._session(model.SerializeToString() if converted else str(source), options, source)
            nodes = len(onnx.load(str(temporary), load_external_data=False).graph.node)
        return {"version": ort.__version__, "nodes": nodes, "inputs": _session.inputs(model)}

    def open(self, path: Path) -> OnnxruntimeSession:
        """Load an ONNX file.

        Raises:
            EngineError: it is damaged or holds an operator ONNX Runtime does not know.
        """
        limit = LOOP_SECONDS if files.has_loop(path) else None
        options = self._options()
        take_exact_kernels(options)
        return OnnxruntimeSession(self._session(str(path), options, path), limit)

    def _options(self) -> Any:
        ort = _package()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, LEVELS[self.optimization]
        )
        options.inter_op_num_threads = 1
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.batch is not None:
            options.add_free_dimension_override_by_name("batch", self.batch)
        return options

    def _session(self, model: str | bytes, options: Any, path: Path) -> Any:
        ort, providers = _package(), self._providers()
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # onnxruntime has no common error class
            if isinstance(model, str) and OUTSIDE in str(error):
                return self._session(files.load(path).SerializeToString(), options, path)
            if isinstance(model, str) and TWICE in str(error):
                unshared = with_integers_of_its_own(files.load(path))
                return self._session(unshared.SerializeToString(), options, path)
            raise onnxruntime_error(error, path) from error
        got = session.get_providers()
        if got[:1] != providers[:1]:  # it only warns, and takes the next one
            raise EngineError(
                f"ONNX Runtime could not start {providers[0]} and fell back to {', '.join(got)}",
                where=str(path),
                fix="compress doctor shows what is missing; or ask for device 'cpu'",
            )
        session.disable_fallback()  # to another provider, when a call fails
        return session

    def _providers(self) -> list[str]:
        device = "cpu" if self.device == "auto" else self.device
        if device not in PROVIDERS:
            raise UnknownNameError(
                "device", self.device, ["auto", *PROVIDERS], where="runtime 'onnxruntime'"
            )
        present = _package().get_available_providers()
        if PROVIDERS[device] not in present:
            raise EngineError(
                f"this build of onnxruntime has no {PROVIDERS[device]}",
                expected=f"one of {', '.join(k for k, v in PROVIDERS.items() if v in present)}",
                fix="Install onnxruntime-gpu instead of onnxruntime",
            )
        return [PROVIDERS[device]] + ([PROVIDERS["cpu"]] if device != "cpu" else [])


class OnnxruntimeSession:
    """A loaded ONNX file; a run is ended after ``limit`` seconds, if given."""

    def __init__(self, session: Any, limit: float | None = None) -> None:
        self.session, self.limit = session, limit
        self.inputs = tuple(_spec(entry) for entry in session.get_inputs())
        self.outputs = tuple(_spec(entry) for entry in session.get_outputs())
        self._input_names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return one array for each output."""
        feeds = dict(zip(self._input_names, arrays, strict=True))
        try:
            if self.limit is not None:
                return run_within(self.session, self._output_names, feeds, self.limit)
            answers: list[np.ndarray] = self.session.run(self._output_names, feeds)
        except TimeoutError:
            raise EngineError(
                f"a Loop of the graph does not end within {self.limit:g} seconds",
                fix="Check the number of its trips and its condition; or give smaller batches",
            ) from None
        except Exception as error:  # onnxruntime has no common error class
            raise onnxruntime_error(error, None) from error
        return answers

    def close(self) -> None:
        """Free the session."""
        self.session = None


def with_integers_of_its_own(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with no int8 constant that two nodes read."""
    graph = EditableGraph(model)
    for node in graph.nodes:
        for index, value in enumerate(node.inputs):
            stored = constant(value)
            if value and stored is not None and stored.dtype == np.int8 and len(value.uses()) > 1:
                node.replace_input_with(index, graph.add_constant(str(value.name), stored))
    return graph.to_model()


def run_within(
    session: Any, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray], seconds: float
) -> list[np.ndarray]:
    """Return the outputs of an ``onnxruntime.InferenceSession``.

    Raises:
        TimeoutError: it was ended after ``seconds``, between two nodes.
    """
    options = _package().RunOptions()
    options.log_severity_level = 4  # fatal: what fails is raised
    timer = threading.Timer(seconds, setattr, (options, "terminate", True))
    timer.start()
    try:
        found: list[np.ndarray] = session.run(names, feeds, options)
    except Exception:
        if options.terminate:
            raise TimeoutError(f"it runs longer than {seconds:g} seconds") from None
        raise
    finally:
        timer.cancel()
    return found


def onnxruntime_error(error: Exception, path: Path | None) -> EngineError:
    """Return an error of ONNX Runtime as one of ours, with the node and a remedy where known."""
    text = str(error)
    where = str(path) if path else ""
    missing = re.search(r'In Node, \("(\S*?)", (\w+),.*No Op registered for', text)
    kernel = re.search(
        r"Could not find an implementation for (\w+)\(\d+\) node with name '(.*?)'", text
    )
    custom = re.search(r"error: (\S+?)\(-?\d+\) is not a registered function/op", text)
    if missing or kernel or custom:
        node, op = (
            (missing[1], missing[2])
            if missing
            else (kernel[2], kernel[1])
            if kernel
            else ("", custom[1] if custom else "")
        )
        return EngineError(
            f"ONNX Runtime has no operator {op}" + (f" (node {node!r})" if node else ""),
            where=where,
            fix="Replace the layer that makes it by standard ones, or export with another opset",
        )
    failed = re.search(
        r"while running (\w+) node\. Name:'(.*?)' Status Message: (.*)", text, re.DOTALL
    )
    if failed:
        lines = [line.strip() for line in failed[3].splitlines() if line.strip()]
        reason = reason_of(lines[-1] if lines else "no reason given")
        return EngineError(
            f"ONNX Runtime cannot compute node {failed[2]!r} ({failed[1]}): {reason}", where=where
        )
    return EngineError(f"ONNX Runtime: {reason_of(text)}", where=where)


def _spec(entry: Any) -> TensorSpec:
    shape = tuple(
        size if isinstance(size, int) else str(size or f"free_{axis}")
        for axis, size in enumerate(entry.shape)
    )
    return TensorSpec(entry.name, shape, DTYPES.get(entry.type))


def _package() -> ModuleType:
    return require("onnxruntime", extra="", purpose="runtime 'onnxruntime'")
