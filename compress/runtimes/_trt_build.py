"""ONNX -> TensorRT engine: parse, profile, build, and keep what the builder said."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from onnx import ModelProto, TensorProto, helper

from compress import progress
from compress.artifact import replacing, write_json
from compress.errors import EngineError, UnknownNameError
from compress.graph.shapes import input_axes
from compress.runtimes import _session
from compress.runtimes._session import BuildRequest
from compress.runtimes._trt import Flavour, Log, gpu_capability, gpu_name


@dataclass(frozen=True)
class BuildSettings:
    """Options of the builder, of both flavours; a runtime fills in those it has."""

    capabilities: tuple[str, ...] = ()
    workspace_mib: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None


@dataclass
class Build:
    """One build under way."""

    flavour: Flavour
    settings: BuildSettings
    source: Path
    request: BuildRequest
    log: Log = field(default_factory=Log)

    def run(self, out: Path) -> dict[str, Any]:
        """Write the engine and its layers (``OUT.layers.json``); return facts about it.

        Raises:
            EngineError: the graph does not parse, does not fit, or the builder gives up.
        """
        trt = self.flavour.package()
        model = _session.of_precision(self.source, self.request.precision)
        check_quantization(model, self.source)
        builder = self._builder(trt)
        network = self._network(trt, builder, model)
        config = self._config(trt, builder, network)
        with self._timing_cache(config) as cache:
            blob = builder.build_serialized_network(network, config)
        if blob is None:
            raise self._failed()
        with replacing(out) as temporary:
            temporary.write_bytes(memoryview(blob))
        layers = self._layers(trt, blob)
        write_json(out.with_name(f"{out.name}.layers.json"), layers)
        return self._facts(trt, model, layers) | cache

    def _builder(self, trt: ModuleType) -> Any:
        if gpu_name() is None and not self.flavour.builds_without_gpu:
            raise EngineError(
                "TensorRT builds an engine on the GPU it is for, and there is none here",
                where=str(self.source),
                fix="Build on the target (compress bundle writes a script for it), or use runtime "
                "'tensorrt-rtx', which builds without a GPU",
            )
        try:
            return trt.Builder(self.log.attached(trt))
        except (TypeError, RuntimeError):  # the binding got a null pointer
            raise EngineError(
                f"{self.flavour.name} cannot start: {self.log.last_error()}",
                fix="Update the NVIDIA driver; compress doctor shows its version",
            ) from None

    def _network(self, trt: ModuleType, builder: Any, model: ModelProto) -> Any:
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, self.log.attached(trt))
        if self.request.precision == "fp16":
            parsed = parser.parse(model.SerializeToString())
        else:
            parsed = parser.parse_from_file(str(self.source))
        if not parsed:
            raise self._unparsed(parser)
        return network

    def _unparsed(self, parser: Any) -> EngineError:
        if not parser.num_errors:
            return EngineError(
                f"{self.flavour.name} cannot read it: {self.log.last_error()}",
                where=str(self.source),
            )
        error = parser.get_error(0)
        node, operator = error.node_name(), error.node_operator()
        place = f"node {node!r} ({operator}): " if operator else ""
        reason = error.desc().strip()
        if "Plugin not found" in reason or reason == "false":  # all that its assertion says
            reason = f"it has no operator {operator}"
        return EngineError(
            f"{place}{self.flavour.name} cannot take it: {reason}",
            where=str(self.source),
            fix="Replace the layer that makes it by standard ones, or run compress lint --target "
            "tensorrt --fix first",
        )

    def _config(self, trt: ModuleType, builder: Any, network: Any) -> Any:
        config, wanted = builder.create_builder_config(), self.settings
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # 2:4 kernels, where weights have it
        if wanted.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, wanted.workspace_mib << 20)
        if wanted.optimization_level is not None:
            config.builder_optimization_level = wanted.optimization_level
        if not wanted.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if wanted.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if wanted.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if wanted.capabilities:
            config.num_compute_capabilities = len(wanted.capabilities)
            for index, capability in enumerate(capabilities(trt, wanted.capabilities)):
                config.set_compute_capability(capability, index)
        self._profile(builder, network, config)
        return config

    def _profile(self, builder: Any, network: Any, config: Any) -> None:
        profile, dynamic = builder.create_optimization_profile(), False
        tensors = [network.get_input(index) for index in range(network.num_inputs)]
        shapes = {each.name: [None if s == -1 else int(s) for s in each.shape] for each in tensors}
        axes = input_axes(shapes)
        for tensor in tensors:
            sizes, axis = list(map(int, tensor.shape)), axes.get(tensor.name, 0)
            first, after = sizes[axis], sizes[axis + 1 :]
            wanted = [[*sizes[:axis], size, *after] for size in self.request.batch]
            if -1 in wanted[0]:
                raise EngineError(
                    f"input {tensor.name!r} has a free dimension besides the batch: {tuple(sizes)}",
                    where=str(self.source),
                    fix="Say the size of its images (--input-size C,H,W), or export it for one",
                )
            if first == -1:
                dynamic = True
                profile.set_shape(tensor.name, *wanted)
            elif (first, first, first) != self.request.batch:
                raise EngineError(
                    f"input {tensor.name!r} has the fixed batch {first}, and batch "
                    f"{','.join(map(str, self.request.batch))} was asked for",
                    where=str(self.source),
                    fix=f"Use batch {first}, or export with dynamic_batch",
                )
        if dynamic:
            config.add_optimization_profile(profile)

    @contextmanager
    def _timing_cache(self, config: Any) -> Iterator[dict[str, Any]]:
        """Use the timing cache of the settings; the facts it yields are filled in on leaving."""
        path, facts = self.settings.timing_cache, dict[str, Any]()
        if path is None:
            yield facts
            return
        before = path.read_bytes() if path.is_file() else b""
        if not _takes(config, before):
            progress.warn(
                f"{path}: is no timing cache of this GPU, driver and version; it is made again"
            )
            before = b""
            if not _takes(config, before):
                raise EngineError(
                    "no timing cache can be made", where=str(path), fix="Set timing_cache: none"
                )
        yield facts
        after = bytes(memoryview(config.get_timing_cache().serialize()))
        with replacing(path) as temporary:
            temporary.write_bytes(after)
        facts["timing_cache"] = {
            "path": str(path),
            "sha256_before": hashlib.sha256(before).hexdigest() if before else None,
            "sha256": hashlib.sha256(after).hexdigest(),
        }

    def _failed(self) -> EngineError:
        reason = self.log.last_error()
        memory = re.search(r"out of memory|insufficient.*memory|MEM_ALLOC", reason, re.IGNORECASE)
        lost = re.search(r"any implementation for node (\S+)", reason)
        fix = "See the reason above; compress lint --target tensorrt finds known causes"
        if memory:
            fix = "Set workspace_mib lower, or build for a smaller batch"
        elif lost:
            fix = f"Leave the Q/DQ pair at {lost[1]} out (quantize: exclude), and build again"
        return EngineError(
            f"{self.flavour.name} could not build an engine: {reason}",
            where=str(self.source),
            fix=fix,
        )

    def _layers(self, trt: ModuleType, blob: Any) -> dict[str, Any]:
        if gpu_name() is None:
            return from_log(self.log.messages)
        engine = trt.Runtime(self.log.attached(trt)).deserialize_cuda_engine(blob)
        return from_engine(trt, engine) if engine else {"Layers": []}

    def _facts(self, trt: ModuleType, model: ModelProto, layers: dict[str, Any]) -> dict[str, Any]:
        wanted = self.settings
        return {
            "version": trt.__version__,
            "built_on": gpu_name() or "no GPU",
            "built_for": self._built_for(),
            "version_compatible": wanted.version_compatible,
            "workspace_mib": wanted.workspace_mib,
            "tf32": wanted.tf32,
            "inputs": _session.inputs(model),
            "layers": len(layers["Layers"]),
            "weights_bytes": _said(self.log, r"Total Weights Memory: (\d+)"),
            "activation_bytes": _said(self.log, r"Total Activation Memory: (\d+)"),
            "warnings": self.log.warnings(),
        }

    def _built_for(self) -> list[str]:
        chosen = [capability_name(name) for name in self.settings.capabilities]
        here = gpu_capability()
        if chosen == ["CURRENT"] and here:
            return [here]
        if chosen:
            return chosen
        if self.flavour.builds_without_gpu or self.settings.hardware_compatible:
            return ["SM80+"]
        return [here] if here else []


def _takes(config: Any, content: bytes) -> bool:
    """Return whether the builder takes a timing cache with this content; empty is a new one."""
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def capabilities(trt: ModuleType, names: tuple[str, ...]) -> list[Any]:
    """Return TensorRT-RTX's own values for names like "SM89", "8.9" or "current".

    Raises:
        UsageError: it builds for no such compute capability.
    """
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")] + ["CURRENT"]
    found = []
    for name in names:
        if capability_name(name) not in known:
            raise UnknownNameError(
                "compute capability", name, known, where="runtime 'tensorrt-rtx'"
            )
        found.append(getattr(trt.ComputeCapability, capability_name(name)))
    return found


def capability_name(capability: str) -> str:
    """Return the one name of a compute capability: "SM89" for "8.9", "sm89" and "SM89"."""
    name = capability.upper().replace(".", "")
    return f"SM{name}" if name.isdigit() else name


def check_quantization(model: ModelProto, path: Path) -> None:
    """Check that TensorRT will read the Q/DQ nodes as they are meant.

    TensorRT takes a uint8 zero point for an int8 one with the same scale and only warns: half of
    the range is lost in silence.

    Raises:
        EngineError: the graph was quantized for another runtime.
    """
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            kinds[node.output[0]] = node.attribute[0].t.data_type
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        absent = len(node.input) < 3 or not node.input[2]
        declared = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        default = TensorProto.UINT8 if node.op_type == "QuantizeLinear" else 0
        kind = (declared or default) if absent else kinds.get(node.input[2], 0)
        if kind in (TensorProto.UINT8, TensorProto.UINT16):
            raise EngineError(
                f"node {node.name!r} quantizes to {helper.tensor_dtype_to_string(kind)}, and "
                "TensorRT would read that as int8 with the same scale: half of the range lost",
                where=str(path),
                expected="symmetric int8 Q/DQ nodes",
                fix="Quantize with --target tensorrt, or run compress lint --target tensorrt --fix",
            )


def _said(log: Log, pattern: str) -> int | None:
    found = [int(m[1]) for _, text in log.messages if (m := re.search(pattern, text))]
    return found[-1] if found else None


_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>\[.*?\]), "
    r"(?:Constants: (?P<constants>\[.*?\]), )?Outputs: (?P<outputs>\[.*?\])"
    r"(?:, (?P<rest>(?:ParameterType|TacticName|TacticValue|StreamId|Metadata).*))?$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\]"
    r".*?Format(?:/Datatype)?: (?P<format>[^}]*?)\s*\}"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")


def from_engine(trt: ModuleType, engine: Any) -> dict[str, Any]:
    """Return what the inspector of a loaded engine says, shaped by ``normalized_layers``."""
    inspector = engine.create_engine_inspector()
    told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return normalized_layers(json.loads(told))


def normalized_layers(told: dict[str, Any]) -> dict[str, Any]:
    """Return inspector JSON of TensorRT 10 or 11 in one shape.

    10 names its "Bindings" and writes "Format/Datatype" in one; 11 has "I/O Tensors" objects and
    writes them apart. Layers may be bare names where the engine was built without details.
    """
    layers = [
        {"Name": layer, "LayerType": "", "Inputs": [], "Outputs": [], "Constants": []}
        if isinstance(layer, str)
        else layer
        | {key: [_tensor(t) for t in layer.get(key) or []] for key in ("Inputs", "Outputs")}
        for layer in told.get("Layers", [])
    ]
    ends = told.get("I/O Tensors", told.get("Bindings", []))
    names = [end["Name"] if isinstance(end, dict) else end for end in ends]
    return {"Layers": layers, "Bindings": names}


def from_log(messages: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the layers that the builder printed; none if it printed none."""
    dumps = [text for _, text in messages if text.startswith("Layers:\n")]
    if not dumps:
        return {"Layers": [], "Bindings": []}
    head, _, tail = dumps[-1].partition("\nI/O Tensors:")
    layers = [_layer(found) for line in head.splitlines() if (found := _LAYER.match(line))]
    names = re.findall(r"^ ?Name: (.*?), IOMode", tail, re.MULTILINE)
    return {"Layers": layers, "Bindings": names}


def _layer(found: re.Match[str]) -> dict[str, Any]:
    rest = found["rest"] or ""
    tactic = re.search(r"TacticName: (.*?), StreamId", rest)
    metadata = re.search(r"Metadata: (.*)$", rest)
    return {
        "Name": found["name"],
        "LayerType": found["type"],
        "Inputs": _tensors(found["inputs"]),
        "Outputs": _tensors(found["outputs"]),
        "Constants": _tensors(found["constants"] or ""),
        "TacticName": tactic[1] if tactic else "",
        "Metadata": metadata[1] if metadata else "",
    }


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        _tensor(
            {
                "Name": found["name"],
                "Dimensions": [int(size) for size in found["dims"].split(",") if size],
                "Format": found["format"],
                "Datatype": (_DATATYPE.search(found[0]) or ["", ""])[1],
            }
        )
        for found in _TENSOR.finditer(text)
    ]


def _tensor(told: dict[str, Any]) -> dict[str, Any]:
    """Return one tensor with "Datatype" apart from "Format", whatever the dialect."""
    joined = told.get("Format/Datatype", told.get("Format", ""))
    return {
        "Name": told.get("Name", ""),
        "Dimensions": told.get("Dimensions", []),
        "Format": joined,
        "Datatype": told.get("Datatype") or _kind(joined),
    }


def _kind(text: str) -> str:
    """Return the data type that TensorRT 10 hides in a format: "... INT8 format", "Half"."""
    upper = text.upper()
    for mark, kind in (
        ("INT8", "Int8"),
        ("FP16", "Half"),
        ("HALF", "Half"),
        ("BF16", "BFloat16"),
        ("FP32", "Float"),
        ("FLOAT", "Float"),
        ("INT32", "Int32"),
        ("INT64", "Int64"),
    ):
        if mark in upper:
            return kind
    return ""
