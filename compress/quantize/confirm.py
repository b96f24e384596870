"""The last check of a Q/DQ graph: its target's own runtime computes what the graph says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from compress import plugins
from compress.artifact import scratch
from compress.errors import QuantizationError
from compress.graph.model import Graph, tail
from compress.qdq.plan import QuantPlan, WeightScales
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import default_scales, scale_axis, write_qdq
from compress.quantize.images import Feed
from compress.quantize.planning_graph import SELECTING
from compress.quantize.sqnr import answers_each, portions, sqnr_each
from compress.quantize.workbench import Workbench

IMAGES = 4  # that the runtime answers
_LOST_DB = 3.0  # an integer kernel that rounds in another way loses less
_FINE_DB = 40.0  # and above this nothing is wrong
WHY = "the runtime computes it wrongly in int8"


@dataclass(frozen=True)
class Confirmation:
    """Float answers for a few images, and what they were made from.

    Args:
        prepared: The fp32 graph, with all inputs of the file.
        feed: Images, and the values of inputs that are none.
        fixed: The batch that the graph fixes, or None.
        target: The runtime.
    """

    prepared: ModelProto
    feed: Feed
    fixed: int | None
    target: str

    @property
    def names(self) -> list[str]:
        """The float outputs whose rows do not depend on an order of values."""
        graph = Graph(self.prepared)
        selected: set[str] = set()
        for node in graph.nodes:
            if node.op_type in SELECTING or selected.intersection(node.input):
                selected.update(node.output)
        outputs = [output.name for output in self.prepared.graph.output]
        return [name for name in outputs if name not in selected and graph.is_float(name)]

    def losses(self, written: ModelProto) -> list[str]:
        """Return a sentence for each output that the runtime computes wrongly.

        Raises:
            EngineError: the runtime cannot load or run the graph.
        """
        names = self.names
        feeds = list(self._feeds())
        wanted = answers_each(self.prepared, feeds, names=names)
        expected = answers_each(written, feeds, names=names)
        found = self._in_runtime(written, feeds, names)
        lost = []
        for k, name in enumerate(names):
            for want, should, got in zip(wanted, expected, found, strict=True):
                (told,) = sqnr_each([want[k]], [should[k]])
                (real,) = sqnr_each([want[k]], [got[k]])
                if not math.isnan(real) and real < min(told, _FINE_DB) - _LOST_DB:
                    lost.append(f"{name} has {real:.1f} dB instead of {told:.1f} dB")
                    break
        return lost

    def _feeds(self) -> list[Feed]:
        """Return the inputs of one run each; a fixed batch is filled."""
        batch = self.fixed or 1
        some = {n: v[: IMAGES * batch] if v.ndim > 1 else v for n, v in self.feed.items()}
        return list(portions(some, batch))

    def _in_runtime(
        self, written: ModelProto, feeds: Sequence[Feed], names: Sequence[str]
    ) -> list[list[NDArray[Any]]]:
        with scratch() as folder:
            path = folder / "model.onnx"
            onnx.save(written, str(path))
            # its own session: ours wants a batch, and an input that is no image has none
            session = plugins.create("runtimes", self.target).open(path)
            order = [spec.name for spec in session.inputs]
            outputs = [output.name for output in written.graph.output]
            found = []
            for feed in feeds:
                values = session.run(tuple(feed[name] for name in order))
                by_name = dict(zip(outputs, values, strict=True))
                found.append([by_name[name] for name in names])
            session.close()
        return found


def confirmed(
    bench: Workbench, plan: QuantPlan, confirmation: Confirmation
) -> tuple[QuantPlan, ModelProto]:
    """Return ``plan`` and its graph, once the target's own runtime has computed it rightly.

    Where it does not, it is asked again with weights of 7 bits (kernels for CPUs without VNNI add
    pairs of 8 bit products in 16 bits, which overflow), then with the last layers in float. A
    target whose runtime is not installed here, or lacks its hardware, is noted as not asked.

    Raises:
        QuantizationError: the runtime computes wrong answers all the same.
    """
    from compress.runtimes import unavailable

    prepared = confirmation.prepared
    written = write_qdq(prepared, plan)
    absent = unavailable(plan.target)
    if absent is not None:
        note = f"not judged in {plan.target} itself: {absent}"
        return plan.changed(notes=(*plan.notes, note)), written
    lost = still = confirmation.losses(written)
    for remedies in ([seven_bits], [ends_in_float], [seven_bits, ends_in_float]) if lost else ():
        safer = plan
        for remedy in remedies:
            safer = remedy(bench, safer)
        written = write_qdq(prepared, safer)
        still = confirmation.losses(written)
        if not still:
            said = " and ".join(_SAID[remedy.__name__] for remedy in remedies)
            note = f"{said}: else {plan.target} computes {'; '.join(lost)}"
            return safer.changed(notes=(*safer.notes, note)), written
    if still:
        raise QuantizationError(
            f"{plan.target} computes the int8 graph wrongly: {'; '.join(lost)}",
            expected="what Q and DQ computed in float give",
            fix="Leave layers near these outputs in float with --exclude, or use another runtime",
        )
    return plan, written


_SAID = {
    "seven_bits": "weights have 7 bits, as int8 kernels of CPUs without VNNI need",
    "ends_in_float": "the last layers are left in float",
}


def seven_bits(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with steps of weights twice as long, and biases that make up for it."""
    graph = Graph(apply_corrections(bench.prepared, plan))
    scales = {}
    for node in graph.nodes:
        value = graph.constant(node.input[1]) if graph.weight(node) else None
        if value is not None:
            axis = scale_axis(node, value.ndim)
            doubled = 2 * default_scales(value, axis)
            scales[node.input[1]] = WeightScales(axis, tuple(float(s) for s in doubled))
    coarser = plan.changed(weights=scales)
    return bench.corrected(coarser) if plan.biases else coarser


def ends_in_float(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the last layers in float, their biases as they were."""
    ends = last_layers(Graph(bench.prepared))
    biases = {node: bias for node, bias in plan.biases.items() if node not in ends}
    return plan.keep_float(ends, WHY).changed(biases=biases)


def last_layers(graph: Graph) -> list[str]:
    """Return the weighted ops of ``graph`` that no other one follows."""
    made = tail(graph.nodes)
    return [
        node.name
        for node in graph.nodes
        if graph.weight(node)
        and all(made.issuperset(reader.output) for reader, _ in graph.readers[node.output[0]])
    ]
