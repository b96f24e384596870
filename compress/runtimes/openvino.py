"""OpenVINO: Intel and AMD x86 and Arm CPUs, and Intel GPUs and NPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from compress.artifact import replacing
from compress.errors import EngineError, UnknownNameError, UsageError
from compress.graph import files
from compress.packages import install_command, is_installed, require
from compress.runtimes import Runtime, _session
from compress.runtimes._session import BuildRequest, Opens, TensorSpec

PRECISIONS = ("f32", "bf16", "f16", "auto")


@dataclass(frozen=True)
class Openvino(Runtime):
    """OpenVINO on the CPU, or on an Intel GPU or NPU by name.

    Opens ONNX files and its own ``.xml`` with the ``.bin`` beside it, which ``build`` writes.
    Only the runtime is used, never the converter.

    Options: ``threads`` (all cores if absent); ``device`` ("cpu", "gpu", "npu", "auto": the CPU);
    ``batch`` fixes a free batch dimension, which gives it faster kernels; ``inference_precision``
    is "f32" unless said otherwise: left to itself ("auto"), OpenVINO computes float layers in
    bf16 on CPUs that have it, which is faster and not what the fp32 file says.
    """

    threads: int | None = None
    device: str = "auto"
    batch: int | None = None
    inference_precision: str = "f32"

    extension: ClassVar[str] = ".xml"
    opens: ClassVar[Opens] = "onnx"
    int8_form: ClassVar[str | None] = "openvino"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    enables: ClassVar[str] = "the fastest int8 on Intel and AMD CPUs"
    zero_weights: ClassVar[str] = (
        "runs dense kernels for convolutions: zeros cost as much as other weights"
    )

    def __post_init__(self) -> None:
        if self.inference_precision not in PRECISIONS:
            raise UnknownNameError(
                "inference_precision",
                self.inference_precision,
                PRECISIONS,
                where="runtime 'openvino'",
            )

    @staticmethod
    def owns(path: Path, magic: bytes) -> bool:
        """Return whether ``path`` is a file of this runtime alone."""
        return path.suffix == ".xml"

    def device_kind(self) -> str:
        """Return where it runs: "cpu", or a device by OpenVINO's name."""
        return "cpu" if self.device == "auto" else self.device

    def how(self) -> str:
        """Return the devices that are here."""
        return ", ".join(_core().available_devices)

    def available(self) -> str | None:
        """Return why nothing can run here, or None."""
        if not is_installed("openvino"):
            return f"the package 'openvino' is not installed: {install_command('openvino')}"
        return None

    def build(self, source: Path, out: Path, request: BuildRequest) -> dict[str, Any]:
        """Write the graph as OpenVINO's own files, ``out`` (.xml) and its weights (.bin).

        Raises:
            EngineError: the graph is damaged or holds an operator OpenVINO does not know.
            UsageError: ``out`` does not end in .xml.
        """
        if out.suffix != ".xml":
            raise UsageError(
                f"OpenVINO writes two files, NAME.xml and NAME.bin, and {out.name!r} is neither",
                expected="an --out that ends in .xml",
            )
        ov = _package()
        files.check_onnx(source)
        if request.precision == "fp16":
            model = self._read(_session.of_precision(source, "fp16").SerializeToString(), source)
        else:
            _session.of_precision(source, request.precision)
            model = self._read(str(source), source)
        with replacing(out.with_suffix(".bin")) as weights, replacing(out) as graph:
            ov.serialize(model, str(graph), str(weights))
            self._compiled(model, source)
        return {
            "version": ov.__version__,
            "nodes": len(model.get_ops()),
            "inputs": [vars(_spec(port)) for port in model.inputs],
        }

    def open(self, path: Path) -> OpenvinoSession:
        """Load an ONNX file or an OpenVINO graph.

        Raises:
            EngineError: it is damaged or holds an operator OpenVINO does not know.
        """
        _package()
        if path.suffix != ".xml":
            files.check_onnx(path)
        elif not path.with_suffix(".bin").is_file():
            raise EngineError(
                "its weights are not beside it",
                where=str(path),
                expected=str(path.with_suffix(".bin")),
            )
        model = self._read(str(path), path)
        if self.batch is not None:
            for port in model.inputs:
                if port.partial_shape[0].is_dynamic:
                    model.reshape({port: [self.batch, *list(port.partial_shape)[1:]]})
        return OpenvinoSession(self._compiled(model, path))

    def _read(self, source: str | bytes, path: Path) -> Any:
        try:
            return _core().read_model(source)
        except RuntimeError as error:
            raise openvino_error(error, path) from error

    def _compiled(self, model: Any, path: Path) -> Any:
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.inference_precision != "auto":
            config["INFERENCE_PRECISION_HINT"] = self.inference_precision
        core, device = _core(), self._device()
        if device == "CPU":
            config["INFERENCE_NUM_THREADS"] = self.threads or 0
        try:
            compiled = core.compile_model(model, device, config)
        except RuntimeError as error:
            raise openvino_error(error, path) from error
        self._check_kept(compiled, device, path)
        return compiled

    def _check_kept(self, compiled: Any, device: str, path: Path) -> None:
        """Refuse a device or a precision that OpenVINO took instead of the one asked for."""
        got = list(compiled.get_property("EXECUTION_DEVICES"))
        if any(name.split(".")[0] != device.split(".")[0] for name in got):
            raise EngineError(
                f"OpenVINO runs it on {', '.join(got)} instead of {device}", where=str(path)
            )
        wanted = self.inference_precision
        if wanted == "auto":
            return
        kept = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if kept != wanted:
            raise EngineError(
                f"OpenVINO computes in {kept} on this {device} instead of {wanted}",
                where=str(path),
                fix=f"Set inference_precision: {kept}, or 'auto'",
            )

    def _device(self) -> str:
        device = "CPU" if self.device == "auto" else self.device.upper()
        present = _core().available_devices
        if device.split(".")[0] not in {name.split(".")[0] for name in present}:
            raise EngineError(
                f"OpenVINO finds no device {self.device!r} here",
                expected=f"one of {', '.join(name.lower() for name in present)}",
            )
        return device


class OpenvinoSession:
    """A compiled OpenVINO model with one inference request."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)
        self._request = compiled.create_infer_request()

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return one array for each output."""
        feeds = dict(enumerate(arrays))
        try:
            answers = self._request.infer(feeds, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise openvino_error(error, None) from error
        return list(answers.values())

    def close(self) -> None:
        """Free the model."""
        self._request = self.compiled = None


def openvino_error(error: Exception, path: Path | None) -> EngineError:
    """Return an error of OpenVINO as one of ours: its last telling line, not its source lines."""
    text = str(error)
    where = str(path) if path else ""
    missing = re.search(
        r"(?:No conversion rule found for|not support the following ONNX) operations: (.+)", text
    )
    if missing:
        names = ", ".join(part.strip(" .").rsplit("-", 1)[0] for part in missing[1].split(","))
        return EngineError(
            f"OpenVINO has no operator {names}{_nodes_of(path, names)}",
            where=where,
            fix="Replace the layer that makes it by standard ones, or export with another opset",
        )
    lines = [
        line.strip()
        for line in text.splitlines()
        if line.strip()
        and not re.match(r"(Exception from|Check '|FrontEnd API failed|Summary)", line)
    ]
    return EngineError(f"OpenVINO: {lines[-1] if lines else text}", where=where)


def _nodes_of(path: Path | None, names: str) -> str:
    """Return the nodes of ``path`` whose operators are ``names``, for a message."""
    if path is None or path.suffix != ".onnx":
        return ""
    wanted = {name.rsplit(".", 1)[-1] for name in names.split(", ")}
    graph = files.load(path, weights=False).graph
    nodes = [repr(node.name) for node in graph.node if node.op_type in wanted]
    return f" (node {', '.join(nodes[:3])})" if nodes else ""


def _spec(port: Any) -> TensorSpec:
    shape = tuple(
        ("batch" if axis == 0 else f"free_{axis}") if size.is_dynamic else size.get_length()
        for axis, size in enumerate(port.partial_shape)
    )
    return TensorSpec(_name(port), shape, np.dtype(port.element_type.to_dtype()).name)


def _name(port: Any) -> str:
    """Return what the file calls an input or output.

    Where a node without effect was next to it, such as a Cast to the type that it has, the port
    bears the names of both sides.
    """
    names: set[str] = port.get_names()
    own: str = port.node.friendly_name.split("/sink_port_")[0]
    return own if own in names or not names else min(names)


_cores: list[Any] = []


def _core() -> Any:
    """Return the one Core of this process; making one costs 20 ms and a thread pool.

    Of two, the first to end leaves signals a stack that is gone, which kills the process (2026.4).
    """
    if not _cores:
        _cores.append(_package().Core())
    return _cores[0]


def _package() -> ModuleType:
    return require("openvino", extra="openvino", purpose="runtime 'openvino'")
