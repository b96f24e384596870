"""What a runtime really runs in int8: the share of the work, and what stays in float and why.

Writing Q/DQ nodes is a wish. Whether the runtime fuses them into int8 kernels shows in what it
says about itself: the optimized graph of ONNX Runtime, the execution graph of OpenVINO, the engine
inspector (or the build log) of TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from compress.artifact import scratch
from compress.errors import UsageError
from compress.graph import files
from compress.runtimes._fusion import kernels
from compress.runtimes._fusion import kernels as work
from compress.runtimes._fusion.kernels import Kernel

__all__ = ["FloatLayer", "Fusion", "check_fusion"]

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
    kernels: int
    float_layers: tuple[FloatLayer, ...]  # largest first
    islands: tuple[tuple[str, ...], ...]  # float kernels between int8 ones, by connected region
    reformats: tuple[str, ...]  # kernels that only move, cast or (de)quantize
    unfused_adds: tuple[str, ...]  # residual Adds that are kernels of their own
    adds: int

    @property
    def int8_share(self) -> float:
        """Return the share of multiply-accumulates in int8 kernels, 0 to 1."""
        return self.int8_macs / self.macs if self.macs else 0.0

    def sentence(self) -> str:
        """Return one sentence for a report."""
        said = f"{100 * self.int8_share:.0f} % of MACs run in int8"
        if not self.float_layers:
            return said
        shown = [
            f"{layer.node} ({100 * layer.macs / max(self.macs, 1):.1f} %): {layer.reason}"
            for layer in self.float_layers[:3]
        ]
        more = len(self.float_layers) - len(shown)
        return f"{said}; not {'; '.join(shown)}" + (f"; and {more} more" if more else "")

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return asdict(self) | {"int8_share": self.int8_share, "sentence": self.sentence()}


def check_fusion(
    path: str | Path,
    runtime: str,
    *,
    engine: str | Path | None = None,
    threads: int | None = None,
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
    model = work.with_node_names(files.load(source))
    graph = work.read(model, needs_quantized_output=runtime == "onnxruntime")
    if runtime == "onnxruntime":
        found = kernels.of_onnxruntime(model, graph, threads)
    elif runtime == "openvino":
        with scratch() as folder:
            onnx.save(model, str(folder / "named.onnx"))
            found = kernels.of_openvino(folder / "named.onnx", graph, threads)
    else:
        found = kernels.of_tensorrt(source, runtime, Path(engine) if engine else None)
    return summed(runtime, graph, found)


def summed(runtime: str, graph: work.Workload, found: list[Kernel]) -> Fusion:
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
    adds = frozenset(graph.adds)
    return Fusion(
        runtime=runtime,
        macs=graph.macs,
        int8_macs=graph.macs - sum(layer.macs for layer in floats),
        kernels=sum(not kernel.is_reformat for kernel in found),
        float_layers=tuple(floats),
        islands=tuple(islands(found)),
        reformats=tuple(kernel.name for kernel in found if kernel.is_reformat),
        unfused_adds=tuple(
            sorted(
                name
                for kernel in found
                if not kernel.nodes & graph.work.keys()
                for name in kernel.nodes & adds
            )
        ),
        adds=len(adds),
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
    members: Iterable[int],
    before: list[set[int]],
    behind: list[set[int]],
    found: list[Kernel],
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
