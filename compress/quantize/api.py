"""Quantize an fp32 ONNX file on images, by a method of choice: one Q/DQ file for each target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from onnx.numpy_helper import to_array
from threadpoolctl import ThreadpoolController

from compress.artifact import check_other_file, replacing
from compress.errors import CompressError, QuantizationError, UnknownNameError, boundary
from compress.graph.metadata import usual_range
from compress.graph.model import GraphIndex
from compress.graph.preprocess import prepare, read_onnx
from compress.packages import require
from compress.qdq.plan import TARGETS, ActivationRange, QuantPlan
from compress.quantize.calibration import begin_below_zero, calibrate, observed_tensors
from compress.quantize.confirm import Confirmation, check_prepared, confirmed, overflows
from compress.quantize.equalization import scalable
from compress.quantize.images import Batches, CalibrationImages, Feed, images_in
from compress.quantize.notes import decided
from compress.quantize.planning_graph import Rows, planning_graph
from compress.quantize.search import auto
from compress.quantize.workbench import Workbench


def import_nncf() -> Any:
    """Import NNCF."""
    return require("nncf", extra="", purpose="method 'nncf'")


def quantize_by_nncf(prepared: ModelProto, feed: Feed) -> ModelProto:
    """Return the graph that NNCF's defaults make, without its workaround for old processors."""
    import logging

    nncf = import_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    count = images_in(feed)
    items = [{name: array[i : i + 1] for name, array in feed.items()} for i in range(count)]
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.quantization.advanced_parameters.OverflowFix.DISABLE
    )
    copy = deepcopy(prepared)
    written: ModelProto = nncf.quantize(
        copy, nncf.Dataset(items), subset_size=count, advanced_parameters=advanced
    )
    return written


def by_nncf(bench: Workbench) -> QuantPlan:
    """Return a plan with the ranges and biases of NNCF where it has any; our writer writes it."""
    prepared, plan = bench.prepared, bench.ranges()
    graph = GraphIndex(quantize_by_nncf(prepared, bench.fitted))
    ranges = dict(plan.activations)
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in ranges:
            ranges[node.input[0]] = _range(graph, node.input[1], node.input[2])
    biases = {}
    originals = {node.name: node for node in prepared.graph.node}
    before = GraphIndex(prepared)
    for node in graph.nodes:
        original = originals.get(node.name)
        if original is None or original.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        new, old = graph.constant(node.input[2]), before.constant((*original.input, "")[2])
        if new is not None and (old is None or not np.array_equal(new, old)):
            biases[node.name] = tuple(float(b) for b in new.reshape(-1))
    return begin_below_zero(plan.changed(activations=ranges, biases=biases), prepared)


def _range(graph: GraphIndex, scale_name: str, zero_name: str) -> ActivationRange:
    scale, zero = graph.constant(scale_name), graph.constant(zero_name)
    if scale is None or zero is None:
        raise TypeError(f"{scale_name} is not constant")
    step, point = float(scale.item()), int(zero.item())
    bounds = np.iinfo(zero.dtype)
    low, high = (bounds.min - point) * step, (bounds.max - point) * step
    if zero.dtype == np.int8 and point == 0:
        low = -high
    return ActivationRange(low, high, max(-low, high), "nncf", (low, high))


BROKEN = "Check that ONNX Runtime runs the file on these images; export it again if it does not"
ALL_FLOAT = "nothing is int8: all of it stays in float"


Method = Callable[[Workbench], QuantPlan]


METHODS: Mapping[str, Method] = {
    "auto": auto,
    "plain": lambda bench: bench.ranges(),
    # Weight scales by search, biases corrected layer by layer.
    "bias-correction": lambda bench: bench.corrected(bench.scaled(bench.ranges())),
    "equalization": lambda bench: bench.corrected(
        bench.scaled(bench.equalized(bench.ranges(), alpha=0.5))
    ),
    # With feedback, and biases corrected, layer by layer.
    "rounding": lambda bench: bench.rounded(bench.ranges()),
    "nncf": by_nncf,
}
FOR_FIXED_BATCHES = frozenset({"auto", "plain"})
UNFITTED = "weights and biases are not fitted to images: the batch size is fixed in the graph"
EQUALIZING = frozenset({"auto", "equalization"})  # they must know channels


def check_method(method: str) -> None:
    """Raise UnknownNameError unless there is such a method."""
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)


def plan_by(method: str, bench: Workbench) -> QuantPlan:
    """Return the plan that ``method`` makes.

    Raises:
        UnknownNameError: there is no such method.
        QuantizationError: it needs a free batch size, and the graph's cannot be freed.
    """
    check_method(method)
    if not bench.is_free and method not in FOR_FIXED_BATCHES:
        raise QuantizationError(
            f"method {method!r} needs a free batch size, and this graph fixes it",
            fix="Export the network with a dynamic batch, or use method 'auto'",
        )
    made = METHODS[method](bench)
    unfitted = [] if bench.is_free or method == "plain" else [UNFITTED]
    notes = (*decided(made.notes), *unfitted, *bench.notes(made))
    return made.changed(method=method, notes=notes, trials=made.notes)


def quantize_onnx(
    path: Path | str,
    batches: Batches,
    out: Path | str,
    target: str = "onnxruntime",
    method: str = "auto",
    observer: str | Mapping[str, Any] | None = None,
    *,
    exclude: Iterable[str] = (),
) -> QuantPlan:
    """Quantize an fp32 ONNX file for one target and return the plan it was written from.

    Args:
        path: An fp32 ONNX file, from any exporter. Not modified.
        batches: Calibration images as the network sees them: a list of float32 (B, C, H, W) arrays,
            or of dicts by input name; or a function that returns an iterator over them.
        out: Where the Q/DQ file goes; the dimension of the batch stays as it was.
        target: "onnxruntime", "openvino" or "tensorrt".
        method: "auto" tries all corrections and keeps those that help; "plain", "bias-correction",
            "equalization", "rounding" and "nncf" do one thing.
        observer: A plug-in of ``compress/quantize/observers``; the method's own choice if absent.
        exclude: Names of nodes to leave in float.

    Raises:
        QuantizationError: the file or the images cannot be used, or the runtime of ``target``,
            where it is installed, computes wrong answers; nothing is written.
        UnknownNameError: there is no such target, method, observer or node.
    """
    plans = quantize_targets(path, batches, {target: out}, method, observer, exclude=exclude)
    return plans[target]


def quantize_targets(
    path: Path | str,
    batches: Batches,
    outs: Mapping[str, Path | str],
    method: str = "auto",
    observer: str | Mapping[str, Any] | None = None,
    *,
    exclude: Iterable[str] = (),
    on_refusal: Callable[[str, CompressError], None] | None = None,
) -> dict[str, QuantPlan]:
    """Quantize an fp32 ONNX file for several targets after one pass of calibration.

    As ``quantize_onnx``, but that ``outs`` says where the Q/DQ file of each target goes.
    ``on_refusal`` is called with each target whose runtime computes wrong answers, and why; the
    others are written and returned. If it is absent, or if no target is left, that is raised.

    Raises:
        QuantizationError: the file or the images cannot be used, or a target is refused; nothing
            is written.
        UnknownNameError: there is no such target, method, observer or node.
    """
    for target, out in outs.items():
        if target not in TARGETS:
            raise UnknownNameError("target", target, TARGETS)
        check_other_file(path, out)
    check_method(method)
    plans: dict[str, QuantPlan] = {}
    written: dict[str, ModelProto] = {}
    try:
        where = boundary(QuantizationError, "cannot be quantized", where=str(path), fix=BROKEN)
        with where, _one_thread():
            model = read_onnx(path)
            rows = Rows.of(prepare(model))
            prepared, batches = rows.first(rows.prepared), rows.first_of_each(batches)
            excluded = excluded_nodes(GraphIndex(prepared), exclude)
            planned = planning_graph(prepared, batches)
            graph = GraphIndex(planned)
            bound = set(GraphIndex(prepared).inputs) - set(graph.inputs)
            images = CalibrationImages(graph, batches, bound=bound, usual=usual_range(model))
            given = {name: to_array(graph.initializers[name]).copy() for name in bound}
            some = next(images.feeds(images.fixed_batch or 2))
            check_prepared(rows.first(model), prepared, given | some)
            ranged = observed_tensors(planned, outs)
            scaled = scalable(graph, ranged, excluded) if method in EQUALIZING else ()
            statistics = calibrate(planned, images, targets=outs, by_channel=scaled)
            for target in outs:
                own = statistics.of(observed_tensors(planned, [target]))
                bench = Workbench(planned, images, own, target, observer, excluded)
                bench.overflows = method == "auto" and overflows(target)
                check = Confirmation(prepared, given | bench.for_runtime(), images.fixed_batch)
                try:
                    plans[target], written[target] = rows.put_back(
                        *confirmed(bench, plan_by(method, bench), check)
                    )
                except QuantizationError as error:
                    if on_refusal is None or (not written and target == list(outs)[-1]):
                        raise
                    on_refusal(target, _within(path, error))
    except QuantizationError as error:
        raise _within(path, error) from error.__cause__
    for target, model in written.items():
        plans[target] = _said_if_float(plans[target], model)
        with replacing(Path(outs[target])) as temporary:
            onnx.save(model, str(temporary))
    return plans


def _said_if_float(plan: QuantPlan, written: ModelProto) -> QuantPlan:
    if any(node.op_type == "DequantizeLinear" for node in written.graph.node):
        return plan
    return plan.changed(activations={}, notes=(ALL_FLOAT, *plan.notes))


def _within(path: Path | str, error: CompressError) -> CompressError:
    """Return ``error`` with the name of the file that was asked for."""
    return error if str(path) in error.where else error.within(str(path))


def excluded_nodes(graph: GraphIndex, names: Iterable[str]) -> dict[str, str]:
    """Return the reason for each excluded node.

    Raises:
        UnknownNameError: the graph has no such node.
    """
    known = {node.name for node in graph.nodes}
    for name in names:
        if name not in known:
            raise UnknownNameError("node", name, known)
    return dict.fromkeys(names, "excluded by the user")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let products of matrices take one thread.

    Small ones gain nothing from more, and the threads that wait for the next one spin: of a small
    network that was a fifth of all the processor time that quantization took.
    """
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield
