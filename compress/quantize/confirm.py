"""The last check of a Q/DQ graph: run it on the target's own runtime, compare, find faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from compress import plugins, progress
from compress.artifact import scratch
from compress.errors import EngineError, QuantizationError
from compress.graph.metadata import layout_of, picture_input
from compress.graph.model import GraphIndex
from compress.graph.preprocess import prepare
from compress.graph.shapes import dims_of
from compress.qdq.placement import place
from compress.qdq.plan import ActivationRange, QuantPlan
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import write_qdq
from compress.quantize.images import Feed
from compress.quantize.planning_graph import selected_tensors
from compress.quantize.remedies import (
    LADDER,
    SAID,
    WHY,
    Remedy,
    most_asked,
    needed_in_float,
    with_headroom,
)
from compress.quantize.sessions import (
    CannotRunError,
    answers,
    answers_each,
    closeness,
    portions,
    sqnr_each,
)
from compress.quantize.workbench import Workbench
from compress.runtimes import BuildRequest

IMAGES = 4  # that the runtime answers
_SURE = 16  # and as many where answers of few numbers say that it is wrong
_LOST_DB = 3.0  # an integer kernel that rounds in another way loses less
_GAIN_DB = 1.0  # by which a remedy brings each output closer
_FINE_DB = 40.0  # and above this no layer is at fault
_FAINT_DB = 60.0  # noise so far down is not worth a word
_SOUND_DB = 30.0  # what no remedy brings closer is handed over from here on, and said
_SAME_DB = 20.0  # far below what half precision or another order of sums costs
_FEW_VALUES = 32  # of an output for one image, below which all images are judged together


@dataclass(frozen=True)
class NoisyOutput:
    """An output that a runtime computes with more noise than Q and DQ have in float, decibels."""

    name: str
    told_db: float
    real_db: float

    @property
    def is_lost(self) -> bool:
        """Whether so little is left that something is computed wrongly."""
        return self.real_db < min(self.told_db, _FINE_DB) - _LOST_DB

    def __str__(self) -> str:
        return f"{self.name} has {self.real_db:.1f} dB instead of {self.told_db:.1f} dB"


@dataclass(frozen=True)
class Confirmation:
    """Float answers for a few images, and what they were made from."""

    prepared: ModelProto  # the fp32 graph, with all inputs of the file
    feed: Feed  # images, and the values of inputs that are none
    fixed: int | None  # the batch that the graph fixes, or None
    images: int = IMAGES  # number of runs

    @cached_property
    def names(self) -> list[str]:
        """The float outputs whose rows do not depend on an order of values."""
        graph = GraphIndex(self.prepared)
        selected = selected_tensors(graph)
        outputs = [output.name for output in self.prepared.graph.output]
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
        return [n for n in outputs if n not in selected and graph.types.get(n, kinds[0]) in kinds]

    def losses(self, written: ModelProto, runtime: str) -> list[NoisyOutput]:
        """Return each output that has more noise in ``runtime``, in the mean of the images.

        Raises:
            EngineError: the runtime cannot load or run the graph.
        """
        names, feeds, wanted = self.names, self.feeds, self.wanted
        expected = answers_each(written, feeds, names=names)
        found = self._in_runtime(written, feeds, names, runtime)
        lost = []
        for k, name in enumerate(names):
            parts = [
                [answer[k].reshape(1, -1) for answer in side] for side in (wanted, expected, found)
            ]
            sizes = {part.size for part in parts[0]}
            one = min(sizes) < _FEW_VALUES or len(sizes) > 1  # two classes of an image say little
            want, should, got = (np.concatenate(part, axis=1 if one else 0) for part in parts)
            images = 1 if one else len(feeds)
            told, real = (closeness([want], [side], images).mean_db for side in (should, got))
            if real < min(told, _FAINT_DB) - _LOST_DB:
                lost.append(NoisyOutput(name, told, real))
        return lost

    @cached_property
    def wanted(self) -> list[list[NDArray[Any]]]:
        """The float answers to each of ``feeds``, the same for all graphs that are judged."""
        return answers_each(self.prepared, self.feeds, names=self.names)

    @cached_property
    def feeds(self) -> list[Feed]:
        """The inputs of one run each; a fixed batch is filled."""
        batch = self.fixed or 1
        some = {n: v[: self.images * batch] if v.ndim > 1 else v for n, v in self.feed.items()}
        return list(portions(some, batch))

    def _in_runtime(
        self, written: ModelProto, feeds: Sequence[Feed], names: Sequence[str], runtime: str
    ) -> list[list[NDArray[Any]]]:
        plugin = plugins.create("runtimes", runtime)
        with scratch() as folder:
            path = folder / "model.onnx"
            onnx.save(written, str(path))
            if plugin.opens == "engine":
                engine = path.with_suffix(plugin.extension)
                plugin.build(path, engine, BuildRequest.checked(self.fixed or 1, None))
                path = engine
            # its own session: ours wants a batch, and an input that is no image has none
            session = plugin.open(path)
            order = [spec.name for spec in session.inputs]
            outputs = [output.name for output in written.graph.output]
            found = []
            for feed in feeds:
                values = session.run(tuple(feed[name] for name in order))
                by_name = dict(zip(outputs, values, strict=True))
                found.append([by_name[name] for name in names])
            session.close()
        return found


def check_prepared(model: ModelProto, prepared: ModelProto, feed: Feed) -> None:
    """Refuse a prepared graph that answers otherwise than the file that it was made of.

    Opsets are converted there and layers folded; every later check takes its answers for true.
    Nothing is said of files that ONNX Runtime cannot run, that answer by chance, or whose answer is
    one of rounding, as that of a detector which sees nothing: scores of 1e-7.

    Raises:
        QuantizationError: an output is another.
    """
    names = Confirmation(prepared, feed, None).names
    try:
        want = answers(model, feed, names=names) if names else []
    except CannotRunError:
        return
    found = sqnr_each(want, answers(prepared, feed, names=names)) if names else []
    other = {name: db for name, db in zip(names, found, strict=True) if db < _SAME_DB}
    again = sqnr_each(want, answers(model, feed, names=names, optimized=False)) if other else []
    if other and not any(db < _SAME_DB for db in again):
        told = ", ".join(f"{name} has {db:.1f} dB" for name, db in other.items())
        raise QuantizationError(
            f"before anything is int8 the graph answers otherwise than the file: {told}",
            expected="the same answers",
            fix="Export the network again with a newer opset; this file is read wrongly",
        )


@cache
def overflows(target: str) -> bool:
    """Return whether the runtime for ``target`` adds products in 16 bits here, which overflow.

    Asked of one layer whose weights and inputs all are large.
    """
    from compress.runtimes import runtime_class

    runtime, _ = _runtime_for(target)
    if runtime is None or runtime_class(runtime).opens == "engine":  # of a GPU
        return False
    weight = numpy_helper.from_array(np.ones((16, 16, 1, 1), np.float32), "weight")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 16, 8, 8]) for n in "xy"]
    node = helper.make_node("Conv", ["x", "weight"], ["y"], name="layer")
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 17)]
    model = prepare(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    ranges = {"x": ActivationRange(0, 1, 1), "y": ActivationRange(0, 16, 16)}
    images = np.random.default_rng(0).uniform(0.6, 1, (IMAGES, 16, 8, 8)).astype(np.float32)
    written = write_qdq(model, QuantPlan(target, activations=ranges))
    try:
        return bool(Confirmation(model, {"x": images}, None).losses(written, runtime))
    except EngineError:  # it is told of the network itself
        return False


def confirmed(
    bench: Workbench, plan: QuantPlan, confirmation: Confirmation
) -> tuple[QuantPlan, ModelProto]:
    """Return ``plan`` and its graph, once a runtime that it was made for has computed it rightly.

    Where it does not, it is asked again with weights whose products cannot overflow (kernels for
    CPUs without VNNI add pairs of them in 16 bits), with transposed convolutions in float
    (OpenVINO's own were seen to lose 25 dB and more), with 7 bits, with the last layers in float,
    with several of these, then with the layers in float that a search finds to be at fault. A
    target without a runtime that is installed here and has its hardware is noted as not asked.

    Raises:
        QuantizationError: the runtime computes wrong answers all the same.
    """
    written = write_qdq(confirmation.prepared, plan)
    runtime, absent = _runtime_for(plan.target)
    if runtime is None:
        whys = "; ".join(f"{name}: {why}" for name, why in absent.items())
        return plan.changed(notes=(*plan.notes, f"not judged in a runtime: {whys}")), written
    confirmation, noisier = _first_losses(confirmation, written, runtime, plan.target)
    lost = [output for output in noisier if output.is_lost]
    if not lost:
        notes = [f"in {runtime} itself: {_listed(noisier)}"] if noisier else []
        as_it_is = plan.changed(notes=(*plan.notes, *notes)), written
        return _with_headroom_if_closer(bench, plan, confirmation, noisier, runtime) or as_it_is
    tried = [(plan, written, lost, ""), *_remedied(bench, plan, confirmation, runtime)]
    safer, written, left, said = tried[-1]
    if said and _is_sound(left):
        note = f"{said}: else, in {runtime}, {_listed(lost)}"
        note += f"; and still {_listed(left)}" * bool(left)
        return safer.changed(notes=(*safer.notes, note)), written
    searched = _without_faulty(bench, plan, confirmation, runtime)
    if searched is not None:
        safer, written, said = searched
        note = f"{said}: else, in {runtime}, {_listed(lost)}"
        return safer.changed(notes=(*safer.notes, note)), written
    safer, written, left, said = max(tried, key=lambda each: min(x.real_db for x in each[2]))
    if not _is_sound(left):
        fix = (
            "Leave layers near these outputs in float: exclude (--exclude); or use another runtime"
        )
        sizes = _sizes_that_help(confirmation, [graph for _, graph, *_ in tried], runtime)
        raise QuantizationError(
            f"{runtime} computes the int8 graph wrongly: {_listed(lost)}",
            expected="what Q and DQ computed in float give",
            fix=f"Fix the sizes of the images, with which it is right: {sizes}" if sizes else fix,
        )
    note = f"{f'{said}: ' * bool(said)}in {runtime}, {_listed(left)}"
    return safer.changed(notes=(*safer.notes, note)), written


def _is_sound(left: Sequence[NoisyOutput]) -> bool:
    return all(loss.real_db >= _SOUND_DB for loss in left)


def _remedied(
    bench: Workbench, plan: QuantPlan, confirmation: Confirmation, runtime: str
) -> Iterator[tuple[QuantPlan, ModelProto, list[NoisyOutput], str]]:
    """Yield ``plan`` with one remedy after another, its graph, what is wrong yet, what was done.

    The first that is sound is the last: coarser remedies would cost more.
    """
    made: dict[tuple[Remedy, ...], QuantPlan] = {(): plan}
    for remedies in LADDER:
        for count, remedy in enumerate(remedies):
            if remedies[: count + 1] not in made:
                made[remedies[: count + 1]] = remedy(bench, made[remedies[:count]])
        safer = made[remedies]
        if safer == plan:  # it has nothing to change here
            continue
        written = write_qdq(confirmation.prepared, safer)
        left = confirmation.losses(written, runtime)
        yield safer, written, left, " and ".join(SAID[remedy] for remedy in remedies)
        if _is_sound(left):
            return


def _with_headroom_if_closer(
    bench: Workbench,
    plan: QuantPlan,
    confirmation: Confirmation,
    noisier: Sequence[NoisyOutput],
    runtime: str,
) -> tuple[QuantPlan, ModelProto] | None:
    """Return ``plan`` with products that do not overflow, and its graph, if that helps all outputs.

    Few images may overflow little where others overflow much.
    """
    safer = with_headroom(bench, plan) if noisier else plan
    if safer == plan:
        return None
    written = write_qdq(confirmation.prepared, safer)
    left = {loss.name: loss.real_db for loss in confirmation.losses(written, runtime)}
    told = {output.name: output.real_db for output in noisier}
    if left.keys() - told.keys() or any(db < told[name] + _GAIN_DB for name, db in left.items()):
        return None
    note = f"{SAID[with_headroom]}: else, in {runtime}, {_listed(noisier)}"
    return safer.changed(notes=(*safer.notes, note)), written


def _without_faulty(
    bench: Workbench, plan: QuantPlan, confirmation: Confirmation, runtime: str
) -> tuple[QuantPlan, ModelProto, str] | None:
    """Return ``plan`` with the layers at fault in float, its graph, and what was done.

    None if more than half of the layers would have to be.
    """
    safer = with_headroom(bench, plan)
    graph = GraphIndex(apply_corrections(bench.prepared, safer))
    placement = place(graph, plan.target, safer.float_nodes)
    int8 = {name for readers in placement.readers.values() for name, _ in readers}
    layers = [node.name for node in graph.nodes if node.name in int8.union(placement.weights)]

    def is_right(floating: Sequence[str]) -> bool:
        left = confirmation.losses(
            write_qdq(confirmation.prepared, safer.keep_float(floating, WHY)), runtime
        )
        counter.advance()
        return _is_sound(left)

    with progress.task(f"Looking for layers wrong in {runtime}", most_asked(layers)) as counter:
        faulty = needed_in_float(layers, is_right)
    if faulty is None or len(faulty) > len(layers) / 2:
        return None
    found = safer.keep_float(faulty, WHY)
    shown = ", ".join(map(repr, faulty[:3])) + f" and {len(faulty) - 3} more" * (len(faulty) > 3)
    return found, write_qdq(confirmation.prepared, found), f"{shown} left in float"


def _first_losses(
    confirmation: Confirmation, written: ModelProto, runtime: str, target: str
) -> tuple[Confirmation, list[NoisyOutput]]:
    """Return what ``runtime`` computes with more noise, and the confirmation that says so.

    It has more images where the first few say that something is wrong by a few numbers: of two
    scores chance takes 4 dB.

    Raises:
        QuantizationError: the runtime cannot run the graph.
    """
    try:
        noisier = confirmation.losses(written, runtime)
        few = any(value.size < _FEW_VALUES for value in confirmation.wanted[0])
        if few and any(output.is_lost for output in noisier):
            confirmation = replace(confirmation, images=_SURE)
            noisier = confirmation.losses(written, runtime)
    except EngineError as error:
        raise QuantizationError(
            f"the int8 graph for {target} does not run in {runtime}: {error.what}",
            fix=f"Check that {runtime} runs the float file; if not, leave target {target} out",
        ) from error
    return confirmation, noisier


def _sizes_that_help(confirmation: Confirmation, graphs: Sequence[ModelProto], runtime: str) -> str:
    """Return the option that fixes free sizes of images if a graph is right with fixed ones.

    OpenVINO was seen to add other biases than a convolution has where a Resize takes its sizes from
    an image of free height and width.
    """
    free = picture_input(confirmation.prepared)
    if free is None or all(dims_of(free)[1:]) or free.name not in confirmation.feed:
        return ""
    for graph in graphs:
        sized = deepcopy(graph)
        sized.graph.ClearField("value_info")
        shape = confirmation.feed[free.name].shape[1:]
        value = next(each for each in sized.graph.input if each.name == free.name)
        for dim, size in zip(value.type.tensor_type.shape.dim[1:], shape, strict=True):
            dim.dim_value = size
        if not any(loss.is_lost for loss in confirmation.losses(sized, runtime)):
            channels_last = layout_of(dims_of(free)) == "NHWC"
            sides = (shape[2], *shape[:2]) if channels_last else shape
            return f"--input-size {','.join(map(str, sides))}"
    return ""


def _listed(lost: Sequence[NoisyOutput]) -> str:
    return "; ".join(map(str, lost))


def _runtime_for(target: str) -> tuple[str | None, dict[str, str]]:
    """Return a runtime that runs graphs for ``target`` here, or None and why each cannot."""
    from compress.runtimes import runtime_class, unavailable

    absent = {}
    for name in sorted(plugins.names("runtimes"), key=lambda name: name != target):
        if name == target or runtime_class(name).int8_form == target:
            why = unavailable(name)
            if why is None:
                return name, {}
            absent[name] = why
    return None, absent
