"""What a runtime really runs in int8: the share of the work, and what stays in float and why.

Writing Q/DQ nodes is a wish. Whether the runtime fuses them into int8 kernels shows in what it
says about itself: the optimized graph of ONNX Runtime, the execution graph of OpenVINO, the engine
inspector (or the build log) of TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from compress.artifact import read_json, scratch
from compress.errors import EngineError, UsageError, reason_of
from compress.graph import files
from compress.graph.model import WEIGHTED, GraphIndex
from compress.graph.shapes import macs, shapes_of
from compress.runtimes import build_engine, open_session
from compress.runtimes._plain_kernels import take_exact_kernels


@dataclass(frozen=True)
class Work:
    """One node that multiplies."""

    node: str
    operator: str
    macs: int  # for a batch of one
    doubt: str  # why a runtime could not take it to int8, by the graph; "" if it could


@dataclass(frozen=True)
class Workload:
    """The nodes of an ONNX graph, by what they are to a runtime that fuses them."""

    work: dict[str, Work]  # by node name
    tensors: dict[str, int]  # element type of every tensor that is known
    nodes: frozenset[str]  # the names of all nodes
    makers: dict[str, str]  # the node that makes a tensor, by the tensor's name

    @property
    def macs(self) -> int:
        """Return all multiply-accumulates, for a batch of one."""
        return sum(work.macs for work in self.work.values())


def with_node_names(model: ModelProto) -> ModelProto:
    """Return a copy in which every node has a name of its own."""
    copy = deepcopy(model)
    seen: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
    return copy


def workload_of(model: ModelProto, *, needs_quantized_output: bool) -> Workload:
    """Return what ``model``, every node of it named, has to compute.

    ``needs_quantized_output``: the runtime takes a convolution to int8 only with a quantizer behind
    it, as ONNX Runtime does.
    """
    shapes, tensors = shapes_of(model, others=1)
    view = GraphIndex(model)
    work = {
        node.name: Work(
            node.name,
            node.op_type,
            macs(node, shapes) or 0,  # where a shape is not known
            _doubt(view, node, needs_quantized_output),
        )
        for node in model.graph.node
        if node.op_type in WEIGHTED
    }
    nodes = frozenset(node.name for node in model.graph.node)
    makers = {output: node.name for output, node in view.producer.items()}
    return Workload(work, tensors, nodes, makers)


def _doubt(graph: GraphIndex, node: NodeProto, needs_quantized_output: bool) -> str:
    def is_dequantized(name: str) -> bool:
        return name in graph.producer and graph.producer[name].op_type == "DequantizeLinear"

    if not is_dequantized(node.input[0]):
        return "its input is not quantized"
    if not is_dequantized(node.input[1]):
        return "its weight is not quantized"
    if needs_quantized_output and node.op_type in ("Conv", "MatMul"):
        last = graph.activation_after(node) or node
        readers = [reader.op_type for reader, _ in graph.readers.get(last.output[0], [])]
        if not readers or set(readers) != {"QuantizeLinear"}:
            return "its output is not quantized"
    return ""


_INT8 = re.compile(r"^(QLinear|QGemm|ConvInteger|MatMulInteger|DynamicQuantize)")
_MOVES_DATA = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"}
    | {"Gather", "Identity", "Pad", "Resize", "Concat", "DepthToSpace", "SpaceToDepth"}
)
_REFORMATS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput"}
)
_TOKEN = re.compile(r"_token_\d+$")  # what ONNX Runtime appends where it changes the layout
_NO_WORK = frozenset({"Const", "Input", "Output", "shape_call", "signal", "wait", "Constant"})
_MYELIN_MOVE = re.compile(r"^__myl_(?:Move|Tran|Cast|Repl|Conc|Resh|Slic|Pad)+_myl")
_KINDS = {"Int8": "int8", "UInt8": "int8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}


@dataclass(frozen=True)
class Kernel:
    """One thing a runtime executes."""

    name: str
    precision: str  # "int8", "fp32", "fp16", "bf16", or "" where it does not compute
    nodes: frozenset[str]  # the ONNX nodes it carries out, as far as they are told
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    is_reformat: bool = False  # only moves, casts or (de)quantizes


def of_onnxruntime(model: ModelProto, graph: Workload, threads: int | None) -> list[Kernel]:
    """Return the nodes of the graph as ONNX Runtime optimizes it for this CPU."""
    import onnxruntime as ort

    with scratch() as folder:
        source, optimized = folder / "source.onnx", folder / "optimized.onnx"
        onnx.save(model, str(source))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        take_exact_kernels(options)
        options.intra_op_num_threads = threads or 0
        options.optimized_model_filepath = str(optimized)
        try:
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common error class
            raise EngineError(f"ONNX Runtime: {reason_of(str(error))}") from error
        nodes = onnx.load(str(optimized)).graph.node
    return _followed(nodes, graph)


def _followed(nodes: Any, graph: Workload) -> list[Kernel]:
    """Return kernels of nodes, the precision of data movers following from what they move."""
    precisions: dict[str, str] = {}
    kernels = []
    for node in nodes:
        name = _TOKEN.sub("", node.name) or node.op_type
        known = [precisions[source] for source in node.input if source in precisions]
        if _INT8.match(node.op_type):
            precision = "int8"
        elif node.op_type.removeprefix("Nhwc") in _MOVES_DATA and known:
            precision = known[0]
        else:
            kind = graph.tensors.get(node.output[0], TensorProto.FLOAT)
            precision = "fp16" if kind == TensorProto.FLOAT16 else "fp32"
        produced = "int8" if node.op_type == "QuantizeLinear" else precision
        precisions.update(dict.fromkeys(node.output, produced))
        is_reformat = node.op_type in _REFORMATS or (
            node.op_type == "Transpose" and name not in graph.nodes
        )
        ends = (tuple(node.input), tuple(node.output))
        kernels.append(Kernel(name, precision, frozenset({name}), *ends, is_reformat))
    return kernels


def of_openvino(path: Path, graph: Workload, threads: int | None) -> list[Kernel]:
    """Return the nodes of the execution graph of OpenVINO on this CPU."""
    with open_session(path, "openvino", threads=threads) as session:
        compiled = session.raw.compiled  # type: ignore[attr-defined]
        operations = compiled.get_runtime_model().get_ordered_ops()
        return [kernel for op in operations if (kernel := _of_execution_node(op, graph))]


def _of_execution_node(operation: Any, graph: Workload) -> Kernel | None:
    facts = operation.get_rt_info()
    kind = facts["layerType"].astype(str)
    if kind in _NO_WORK:
        return None
    primitive = facts["primitiveType"].astype(str)
    written = facts["outputPrecisions"].astype(str)
    precision = "int8"
    if not primitive.upper().endswith("I8") and not written.startswith(("u8", "i8")):
        last = primitive.rsplit("_", 1)[-1]
        precision = {"f16": "fp16", "bf16": "bf16"}.get(last, "fp32")
    names = facts["originalLayersNames"].astype(str).split(",")
    nodes = {name.split("/")[0] for name in names if name}  # "fc/WithoutBiases" is of "fc"
    nodes |= {graph.makers[name] for name in nodes if name in graph.makers}  # results, by tensor
    return Kernel(
        operation.get_friendly_name(),
        precision,
        frozenset(nodes),
        tuple(source.get_node().get_friendly_name() for source in operation.input_values()),
        (operation.get_friendly_name(),),
        is_reformat=kind in ("Reorder", "Convert", "FakeQuantize"),
    )


def of_tensorrt(path: Path, runtime: str, engine: Path | None) -> list[Kernel]:
    """Return the layers that the builder of TensorRT told of; builds the engine if there is none.

    Raises:
        EngineError: the engine was built without its layers.
    """
    with scratch() as folder:
        if engine is None:
            engine = build_engine(path, folder / "engine", runtime=runtime, batch=1)
        file = engine.with_name(f"{engine.name}.layers.json")
        if not file.is_file():
            raise EngineError(
                "the layers of this engine are not known",
                where=str(engine),
                expected=f"{file.name} beside it, as compress build writes it",
            )
        layers = read_json(file)["Layers"]
    return [_of_layer(layer) for layer in layers if layer["LayerType"] not in _NO_WORK]


def _of_layer(layer: dict[str, Any]) -> Kernel:
    tensors = layer["Inputs"] + layer["Outputs"]
    kinds = [_KINDS.get(tensor["Datatype"], "") for tensor in tensors]
    precision = "int8" if "int8" in kinds else next((kind for kind in kinds if kind), "")
    told = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", ""))
    nodes = frozenset(told) or frozenset(layer["Name"].split(" + "))
    return Kernel(
        layer["Name"],
        precision,
        nodes,
        tuple(tensor["Name"] for tensor in layer["Inputs"]),
        tuple(tensor["Name"] for tensor in layer["Outputs"]),
        is_reformat=layer["LayerType"] == "Reformat" or bool(_MYELIN_MOVE.match(layer["Name"])),
    )


RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class FloatLayer:
    """A layer with weights that does not run in int8."""

    node: str
    operator: str
    macs: int
    precision: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """What a runtime made of a graph."""

    runtime: str
    macs: int  # of the whole graph, for a batch of one
    int8_macs: int
    float_layers: tuple[FloatLayer, ...]  # largest first
    islands: tuple[tuple[str, ...], ...]  # float kernels between int8 ones, by connected region
    reformats: tuple[str, ...]  # kernels that only move, cast or (de)quantize

    @property
    def int8_share(self) -> float:
        """Return the share of multiply-accumulates in int8 kernels, 0 to 1."""
        return self.int8_macs / self.macs if self.macs else 0.0


def check_fusion(
    path: str | Path, runtime: str, *, engine: str | Path | None = None, threads: int | None = None
) -> Fusion:
    """Return what ``runtime`` makes of the ONNX file ``path`` on this machine.

    Args:
        path: The ONNX file, with Q/DQ nodes or without.
        runtime: "onnxruntime", "openvino", "tensorrt" or "tensorrt-rtx".
        engine: For TensorRT: the engine built from it; else one is built for a batch of one.
        threads: CPU threads.

    Raises:
        EngineError: the runtime cannot take the graph.
        UsageError: the runtime cannot tell what it does.
    """
    if runtime not in RUNTIMES:
        raise UsageError(
            f"runtime {runtime!r} does not tell what it fuses",
            expected=f"one of {', '.join(RUNTIMES)}",
        )
    source = Path(path)
    model = with_node_names(files.load(source))
    graph = workload_of(model, needs_quantized_output=runtime == "onnxruntime")
    if runtime == "onnxruntime":
        found = of_onnxruntime(model, graph, threads)
    elif runtime == "openvino":
        with scratch() as folder:
            onnx.save(model, str(folder / "named.onnx"))
            found = of_openvino(folder / "named.onnx", graph, threads)
    else:
        found = of_tensorrt(source, runtime, Path(engine) if engine else None)
    return summed(runtime, graph, found)


def summed(runtime: str, graph: Workload, found: list[Kernel]) -> Fusion:
    """Return the summary of ``found`` kernels against the work of ``graph``."""
    carrier = {node: kernel for kernel in found for node in kernel.nodes & graph.work.keys()}
    for kernel in found:  # the kernel that multiplies is the one with int8 inputs, if one has
        for node in kernel.nodes & graph.work.keys():
            if carrier[node].precision != "int8" and kernel.precision == "int8":
                carrier[node] = kernel
    floats = [
        FloatLayer(
            node.node,
            node.operator,
            node.macs,
            carrier[node.node].precision if node.node in carrier else "unknown",
            node.doubt or "the runtime has no int8 kernel for it",
        )
        for node in graph.work.values()
        if node.node not in carrier or carrier[node.node].precision != "int8"
    ]
    floats.sort(key=lambda layer: -layer.macs)
    return Fusion(
        runtime=runtime,
        macs=graph.macs,
        int8_macs=graph.macs - sum(layer.macs for layer in floats),
        float_layers=tuple(floats),
        islands=tuple(islands(found)),
        reformats=tuple(kernel.name for kernel in found if kernel.is_reformat),
    )


def islands(found: list[Kernel]) -> list[tuple[str, ...]]:
    """Return connected regions of float kernels that have int8 kernels before and behind them."""
    makers = {name: index for index, kernel in enumerate(found) for name in kernel.outputs}
    before = [{makers[name] for name in k.inputs if name in makers} for k in found]
    behind: list[set[int]] = [set() for _ in found]
    for index, sources in enumerate(before):
        for source in sources:
            behind[source].add(index)
    is_int8 = [kernel.precision == "int8" for kernel in found]
    enclosed = {
        index
        for index, kernel in enumerate(found)
        if not is_int8[index]
        and not kernel.is_reformat
        and kernel.precision
        and _reaches(index, before, is_int8)
        and _reaches(index, behind, is_int8)
    }
    regions = _regions(enclosed, before, behind, found)
    return [tuple(found[index].name for index in sorted(region)) for region in regions]


def _reaches(start: int, steps: list[set[int]], wanted: list[bool]) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        for index in steps[waiting.pop()] - seen:
            if wanted[index]:
                return True
            seen.add(index)
            waiting.append(index)
    return False


def _regions(
    members: Iterable[int], before: list[set[int]], behind: list[set[int]], found: list[Kernel]
) -> list[set[int]]:
    left, regions = set(members), []
    while left:
        region, waiting = set[int](), [min(left)]
        while waiting:
            index = waiting.pop()
            if index in region:
                continue
            region.add(index)
            near = before[index] | behind[index]
            through = {n for r in near if found[r].is_reformat for n in before[r] | behind[r]}
            waiting.extend((near | through) & left - region)
        regions.append(region)
        left -= region
    return regions
