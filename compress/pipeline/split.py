"""Split an ONNX graph in two: a head for the edge and a tail for the server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from compress.artifact import replacing, write_json, write_text
from compress.errors import EngineError, ExportError, UsageError, did_you_mean
from compress.graph import files as onnx_file
from compress.graph.shapes import shapes_of
from compress.measure import Timing, bench, node_macs
from compress.measure.probe import inputs_for
from compress.progress import track
from compress.runtimes import open_session

if TYPE_CHECKING:
    from rich.table import Table

AUTO = "auto"
MEASURED = 8  # cut points of the front that are timed
LARGEST_DIFFERENCE = 1e-4  # between the two parts and the whole, as a share of the largest output
LARGEST_DIFFERENCE_INT8 = 0.1  # where a graph rounds: runtimes fuse otherwise beside a cut
INT8_OPSET = 11  # DynamicQuantizeLinear
INT8_BYTES = 5  # scale and zero point that go with a tensor
_TIMING = Timing(seconds=0.5, warmup_limit_seconds=1.0)


@dataclass(frozen=True)
class Cut:
    """A way to split the nodes of a graph: what is computed before ``tensor``, and the rest."""

    tensor: str
    crossing: tuple[str, ...]  # tensors that the tail needs from the head
    bytes: int  # of them, for one image
    head_macs_pct: float
    head: frozenset[int] = field(repr=False)  # numbers of the head's nodes


@dataclass(frozen=True)
class Place:
    """A cut with what it costs, for one image; without a cut one side computes all."""

    name: str
    bytes: int
    head_ms: float  # on the edge
    link_ms: float
    tail_ms: float  # on the server
    head_macs_pct: float

    @property
    def total_ms(self) -> float:
        """Head, link and tail one after the other."""
        return self.head_ms + self.link_ms + self.tail_ms

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self) | {"total_ms": self.total_ms}


@dataclass(frozen=True)
class Split:
    """The two files, what crosses between them, and what each place of the front costs."""

    head: Path
    tail: Path
    cut: Cut
    int8: bool
    difference: float  # of the two parts from the whole, as a share of the largest output
    link_mbps: float
    edge_slowdown: float
    places: tuple[Place, ...]  # this cut, or the front; then all on the edge and on the server

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        return {
            "head": self.head.name,
            "tail": self.tail.name,
            "tensor": self.cut.tensor,
            "crossing": list(self.cut.crossing),
            "bytes": next(p.bytes for p in self.places if p.name == self.cut.tensor),
            "int8": self.int8,
            "difference": self.difference,
            "link_mbps": self.link_mbps,
            "edge_slowdown": self.edge_slowdown,
            "places": [place.to_json() for place in self.places],
        }

    def table(self) -> Table:
        """Return the places as a table for the terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        kept = "int8 at the cut" if self.int8 else "equal to the whole"
        caption = (
            f"{self.head} and {self.tail}: {kept}, difference {self.difference:.1g} of the largest "
            f"output; what crosses: {', '.join(self.cut.crossing)}; one image, link "
            f"{self.link_mbps:g} Mbit/s, edge {self.edge_slowdown:g} x as slow as this machine"
        )
        table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        table.add_column("cut at", overflow="fold")
        for header in ("head MACs %", "KiB that cross", "head ms", "link ms", "tail ms", "sum ms"):
            table.add_column(header, justify="right")
        for place in self.places:
            times = (place.head_ms, place.link_ms, place.tail_ms, place.total_ms)
            mark = " *" if place.name == self.cut.tensor else ""
            cells = [f"{place.head_macs_pct:.1f}", f"{place.bytes / 1024:.1f}"]
            table.add_row(Text(place.name + mark), *cells, *(f"{t:.2f}" for t in times))
        return table


def split_onnx(  # noqa: PLR0913 - the public face: every option by its name
    path: str | Path,
    out: str | Path,
    *,
    at: str = AUTO,
    link_mbps: float = 10.0,
    edge_slowdown: float = 1.0,
    int8: bool = False,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    timing: Timing | None = None,
) -> Split:
    """Write ``head.onnx`` and ``tail.onnx``, whose composition equals ``path``.

    The head holds every node that ``at`` depends on, the tail the others; all tensors that the tail
    then needs cross, such as both branches of a residual block. With "auto" the cuts where neither
    fewer bytes nor less work for the edge can be had without more of the other are timed, at most
    eight, and the one with the least sum of head, link and tail is taken.

    **Method:** head and tail are timed in turns on this machine with random values, one image at a
    time; the head's time is multiplied by ``edge_slowdown``. The link's time is bytes over speed,
    without its delay.

    Args:
        path: An ONNX file, whole or in int8.
        out: Folder for the two files, ``split.json`` and, with "auto", ``split.svg``.
        at: Name of a tensor, or "auto".
        link_mbps: Speed of the link, megabits a second.
        edge_slowdown: How many times slower than this machine the edge is.
        int8: Whether float tensors cross as uint8, each with the range it has at that moment.
        runtime: Where both are timed and compared with the whole.
        threads: CPU threads; all cores if absent.
        timing: How long.

    Raises:
        UsageError: no such tensor, or one that leaves nothing for a side; a speed of 0.
        ExportError: the two parts do not answer as the whole does.
    """
    for option, value in (("link_mbps", link_mbps), ("edge_slowdown", edge_slowdown)):
        if not value > 0 or not math.isfinite(value):
            raise UsageError(f"{option} is {value!r}", expected="a number above 0")
    folder, source = Path(out), Path(path)
    model = onnx_file.load(source)
    graph = _Graph(model)
    if int8:
        _check_int8(model, source)
    folder.mkdir(parents=True, exist_ok=True)
    cuts = _front(graph) if at == AUTO else [graph.cut(at)]
    if not cuts:
        raise UsageError(f"{source}: no tensor splits it in two", fix="Name one with --at TENSOR")
    clock = _Clock(source, runtime, threads, timing or _TIMING, folder)
    bits_per_ms = link_mbps * 1000
    places = []
    for cut in track(cuts, "split", len(cuts)):
        head_ms, tail_ms = clock.parts(_parts(graph, cut, int8))
        size = graph.bytes_of(cut, int8)
        link_ms = size * 8 / bits_per_ms
        slow_ms = head_ms * edge_slowdown
        places.append(Place(cut.tensor, size, slow_ms, link_ms, tail_ms, cut.head_macs_pct))
    best = min(range(len(cuts)), key=lambda number: places[number].total_ms)
    parts = _parts(graph, cuts[best], int8)
    files = _written(parts, folder)
    difference = clock.difference(files)
    rounds = any("Quant" in node.op_type for node in model.graph.node)
    limit = LARGEST_DIFFERENCE_INT8 if rounds else LARGEST_DIFFERENCE
    if not int8 and difference > limit:
        raise ExportError(
            f"head and tail differ from the whole by {difference:.2g} of the largest output",
            where=f"{source}, cut at {cuts[best].tensor}",
            expected=f"at most {limit}",
            fix="Cut elsewhere with --at TENSOR, and please report this network",
        )
    whole = clock.whole_ms()
    sent = graph.input_bytes()
    places.append(Place("(all on the edge)", 0, whole * edge_slowdown, 0.0, 0.0, 100.0))
    places.append(Place("(all on the server)", sent, 0.0, sent * 8 / bits_per_ms, whole, 0.0))
    split = Split(*files, cuts[best], int8, difference, link_mbps, edge_slowdown, tuple(places))
    write_json(folder / "split.json", split.to_json())
    if at == AUTO:
        write_text(folder / "split.svg", _chart(split))
    return split


def _check_int8(model: ModelProto, source: Path) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < INT8_OPSET:
        raise UsageError(
            f"{source}: int8 at the cut needs opset {INT8_OPSET}, the file has {opset}",
            fix="Export it again with a newer opset, or split it without int8",
        )


class _Graph:
    """Who depends on whom in an ONNX graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in self.constants]
        self.outputs = [value.name for value in model.graph.output]
        self.shapes, self.kinds = shapes_of(model)
        self.macs = node_macs(model)
        self.needs = [tuple(_needed(node)) for node in self.nodes]
        self.maker = {name: n for n, node in enumerate(self.nodes) for name in node.output if name}
        self.before: list[int] = []  # of each node: itself and all it depends on, as bits
        self.live: list[bool] = []  # of each node: whether it depends on an input of the graph
        for number, names in enumerate(self.needs):
            makers = [self.maker[name] for name in names if name in self.maker]
            bits = 1 << number
            for maker in makers:
                bits |= self.before[maker]
            self.before.append(bits)
            fed = any(name in self.inputs for name in names)
            self.live.append(fed or any(self.live[maker] for maker in makers))

    def cut(self, tensor: str) -> Cut:
        """Return the cut before which ``tensor`` is computed.

        Raises:
            UsageError: there is no such tensor, or one side would be empty.
        """
        if tensor not in self.maker or not self.live[self.maker[tensor]]:
            known = [name for name, maker in self.maker.items() if self.live[maker]]
            is_there = tensor in self.maker or tensor in self.constants or tensor in self.inputs
            what = "is an input or a constant" if is_there else "is no tensor of this graph"
            raise UsageError(
                f"--at {tensor!r} {what}{did_you_mean(tensor, known)}",
                expected=f"the output of a node, such as {known[len(known) // 2]!r}",
            )
        bits = self.before[self.maker[tensor]]
        head = frozenset(n for n in range(len(self.nodes)) if bits >> n & 1 and self.live[n])
        tail = [n for n in range(len(self.nodes)) if n not in head and self.live[n]]
        if not tail:
            raise UsageError(
                f"--at {tensor!r} leaves nothing for the tail",
                fix="Name a tensor that other nodes compute with",
            )
        needed = dict.fromkeys(name for n in tail for name in self.needs[n])
        made = {name for n in head for name in self.nodes[n].output}
        crossing = tuple(name for name in needed if name in made or name in self.inputs)
        work = sum(self.macs.get(o, 0) for n in head for o in self.nodes[n].output)
        share = 100 * work / max(1, sum(self.macs.values()))
        return Cut(tensor, crossing, sum(map(self.size, crossing)), share, head)

    def size(self, tensor: str) -> int:
        """Return the bytes of a tensor for one image; sizes that are not known count as 1."""
        count = math.prod(size or 1 for size in self.shapes.get(tensor, ()))
        kind = self.kinds.get(tensor, TensorProto.FLOAT)
        return count * int(helper.tensor_dtype_to_np_dtype(kind).itemsize)

    def quantized(self, cut: Cut) -> list[str]:
        """Return what crosses in float and could cross in int8."""
        made = [name for name in cut.crossing if name not in self.inputs]
        return [name for name in made if self.kinds.get(name) == TensorProto.FLOAT]

    def bytes_of(self, cut: Cut, int8: bool) -> int:
        """Return the bytes that cross."""
        small = set(self.quantized(cut)) if int8 else set()
        return sum(
            self.size(name) // 4 + INT8_BYTES if name in small else self.size(name)
            for name in cut.crossing
        )

    def input_bytes(self) -> int:
        """Return the bytes of the graph's inputs."""
        return sum(map(self.size, self.inputs))


def _needed(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, also from inside its subgraphs."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {v.name for v in (*graph.input, *graph.initializer)}
            own |= {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in _needed(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def _front(graph: _Graph) -> list[Cut]:
    """Return cuts that no other beats in both the bytes that cross and the work of the edge."""
    found: dict[frozenset[int], Cut] = {}
    for tensor, maker in graph.maker.items():
        is_last = tensor in graph.outputs and not any(tensor in names for names in graph.needs)
        if is_last or not graph.live[maker]:
            continue
        cut = graph.cut(tensor)
        if cut.crossing and all(name in graph.shapes for name in cut.crossing):
            found.setdefault(cut.head, cut)
    front: list[Cut] = []
    for cut in sorted(found.values(), key=lambda cut: (cut.head_macs_pct, cut.bytes)):
        if not front or cut.bytes < front[-1].bytes:
            front.append(cut)
    if len(front) <= MEASURED:
        return front
    chosen = np.unique(np.linspace(0, len(front) - 1, MEASURED).round().astype(int))
    return [front[number] for number in chosen]


class _Parts(NamedTuple):
    head: ModelProto
    tail: ModelProto


def _parts(graph: _Graph, cut: Cut, int8: bool) -> _Parts:
    """Return the two graphs."""
    values = _values(graph.model)
    small = graph.quantized(cut) if int8 else []
    sent = [name for name in cut.crossing if name not in graph.inputs]
    head_nodes = _with_constants(graph, cut.head)
    tail_nodes = _with_constants(
        graph, [n for n in range(len(graph.nodes)) if n not in cut.head and graph.live[n]]
    )
    made = {name for node in head_nodes for name in node.output}
    used = {name for n in cut.head for name in graph.needs[n]}
    passed = [name for name in sent if name not in small]
    for name in small:
        head_nodes += _packing(name)
        tail_nodes = [*_unpacking(name), *tail_nodes]
    wires = [wire for name in small for wire in _wires(name, values[name])]
    own = [name for name in graph.outputs if name in made and name not in passed]
    head = _model(
        graph.model,
        "head",
        head_nodes,
        [values[name] for name in graph.inputs if name in used],
        [*(values[name] for name in passed), *wires, *(values[name] for name in own)],
    )
    for entry in graph.model.metadata_props:
        head.metadata_props.add(key=entry.key, value=entry.value)
    shared = [name for name in cut.crossing if name in graph.inputs]
    tail = _model(
        graph.model,
        "tail",
        tail_nodes,
        [*(values[name] for name in (*shared, *passed)), *wires],
        [values[name] for name in graph.outputs if name not in made],
    )
    return _Parts(head, tail)


def _packed(name: str) -> tuple[str, str, str]:
    return f"{name}_uint8", f"{name}_scale", f"{name}_zero_point"


def _packing(name: str) -> list[NodeProto]:
    """Return what quantizes a tensor; scale and zero point get a dimension that sessions want."""
    packed, scale, zero = _packed(name)
    scalars = [f"{scale}_scalar", f"{zero}_scalar"]
    one = f"{name}_one"
    return [
        helper.make_node("DynamicQuantizeLinear", [name], [packed, *scalars]),
        helper.make_node(
            "Constant", [], [one], value=helper.make_tensor(one, TensorProto.INT64, [1], [1])
        ),
        helper.make_node("Reshape", [scalars[0], one], [scale]),
        helper.make_node("Reshape", [scalars[1], one], [zero]),
    ]


def _unpacking(name: str) -> list[NodeProto]:
    packed, scale, zero = _packed(name)
    scalars = [f"{scale}_scalar", f"{zero}_scalar"]
    none = f"{name}_none"
    no_dimensions = helper.make_tensor(none, TensorProto.INT64, [0], [])
    return [
        helper.make_node("Constant", [], [none], value=no_dimensions),
        helper.make_node("Reshape", [scale, none], [scalars[0]]),
        helper.make_node("Reshape", [zero, none], [scalars[1]]),
        helper.make_node("DequantizeLinear", [packed, *scalars], [name]),
    ]


def _wires(name: str, value: ValueInfoProto) -> list[ValueInfoProto]:
    """Return what crosses for a float tensor in int8: values, scale and zero point."""
    numbers = ValueInfoProto()
    numbers.CopyFrom(value)
    packed, scale, zero = _packed(name)
    numbers.name = packed
    numbers.type.tensor_type.elem_type = TensorProto.UINT8
    return [
        numbers,
        helper.make_tensor_value_info(scale, TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info(zero, TensorProto.UINT8, [1]),
    ]


def _with_constants(graph: _Graph, numbers: Sequence[int] | frozenset[int]) -> list[NodeProto]:
    """Return nodes with those that compute constants for them, in order."""
    bits = 0
    for number in numbers:
        bits |= graph.before[number]
    wanted = set(numbers)
    chosen = (n for n in range(len(graph.nodes)) if n in wanted or bits >> n & 1)
    return [graph.nodes[n] for n in chosen if n in wanted or not graph.live[n]]


def _values(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Return name, type and shape of every tensor, free sizes free as in the file."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {v.name: v for v in (*inferred.value_info, *inferred.output, *inferred.input)}


def _model(
    whole: ModelProto,
    name: str,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
) -> ModelProto:
    used = {each for node in nodes for each in _needed(node)}
    weights = [tensor for tensor in whole.graph.initializer if tensor.name in used]
    graph: GraphProto = helper.make_graph(nodes, name, inputs, outputs, weights)
    sparse = [t for t in whole.graph.sparse_initializer if t.values.name in used]
    graph.sparse_initializer.extend(sparse)
    model: ModelProto = helper.make_model(
        graph,
        opset_imports=whole.opset_import,
        functions=whole.functions,
        ir_version=whole.ir_version,
        producer_name=whole.producer_name,
    )
    return model


def _written(parts: _Parts, folder: Path) -> tuple[Path, Path]:
    files = folder / "head.onnx", folder / "tail.onnx"
    for part, file in zip(parts, files, strict=True):
        with replacing(file) as temporary:
            onnx.save(part, temporary)
    return files


@dataclass
class _Clock:
    """Times parts on a runtime, and compares them with the whole."""

    source: Path
    runtime: str
    threads: int | None
    timing: Timing
    folder: Path

    def parts(self, parts: _Parts) -> tuple[float, float]:
        """Return milliseconds of the head and of the tail for one image."""
        head, tail = _written(parts, self.folder)
        with self._open(head) as first, self._open(tail) as second:
            arrays = inputs_for(first, 1)
            feed = _named(first, arrays) | _results(first, arrays)
            inputs = {"head": arrays, "tail": [feed[spec.name] for spec in second.inputs]}
            found = bench({"head": first, "tail": second}, inputs, timing=self.timing)
        for name, reason in found.skipped.items():
            raise EngineError(f"the {name} does not run: {reason}", where=str(self.source))
        return found["head"].latency_ms_p50, found["tail"].latency_ms_p50

    def whole_ms(self) -> float:
        """Return milliseconds of the whole."""
        with self._open(self.source) as session:
            found = bench({"whole": session}, inputs_for(session, 1), timing=self.timing)
        return found["whole"].latency_ms_p50

    def difference(self, files: tuple[Path, Path]) -> float:
        """Return how far head and tail answer from the whole, of its largest output."""
        with self._open(self.source) as session:
            arrays = inputs_for(session, 1)
            given = _named(session, arrays)
            expected = _results(session, arrays)
        feed = dict(given)
        for file in files:
            with self._open(file) as session:
                feed |= _results(session, [feed[spec.name] for spec in session.inputs])
        worst = 0.0
        for name, value in expected.items():
            off = np.abs(np.asarray(feed[name], np.float64) - np.asarray(value, np.float64))
            largest = float(np.abs(np.asarray(value, np.float64)).max(initial=0.0))
            worst = max(worst, float(off.max(initial=0.0)) / (largest or 1.0))
        if not math.isfinite(worst):
            raise EngineError("its outputs are not finite on random values", where=str(self.source))
        return worst

    def _open(self, path: Path) -> Any:
        return open_session(path, self.runtime, threads=self.threads)


def _named(session: Any, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {spec.name: each for spec, each in zip(session.inputs, arrays, strict=True)}


def _results(session: Any, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    results = session.run(*arrays)
    return {spec.name: each for spec, each in zip(session.outputs, results, strict=True)}


def _chart(split: Split) -> str:
    """Return the front as SVG: bytes and the sum of times against the work of the edge."""
    import io

    import matplotlib as mpl

    mpl.use("agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    parts: Mapping[str, str] = {"head_ms": "#0b6e4f", "link_ms": "#7a7a7a", "tail_ms": "#3f6fb0"}
    labels = {"head_ms": "head, edge", "link_ms": "link", "tail_ms": "tail, server"}
    order = sorted(split.places, key=lambda place: place.head_macs_pct)
    left = np.zeros(len(order))
    for name, color in parts.items():
        values = np.array([getattr(place, name) for place in order])
        axes.barh(range(len(order)), values, left=left, color=color, label=labels[name])
        left = left + values
    for row, (place, end) in enumerate(zip(order, left, strict=True)):
        axes.text(end, row, f" {end:.1f} ms, {place.bytes / 1024:.0f} KiB", va="center", fontsize=8)
    names = [p.name + (" *" if p.name == split.cut.tensor else "") for p in order]
    axes.set_yticks(range(len(order)), [n if len(n) < 34 else f"...{n[-30:]}" for n in names])
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, 1.3 * float(left.max()))
    axes.set_xlabel(f"ms for one image, link {split.link_mbps:g} Mbit/s")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
