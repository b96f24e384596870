"""Split an ONNX graph in two: a head for the edge and a tail for the server."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from rich.table import Table

from compress import progress
from compress.artifact import make_folder, replacing, write_json, write_text
from compress.errors import CompressError, EngineError, ExportError, UsageError
from compress.graph import files as onnx_file
from compress.graph.shapes import dims_of, real_inputs
from compress.measure import Timing, bench
from compress.measure.probe import inputs_for
from compress.pipeline.cutting import Cut, Cuttable, check_opset, front, quantize_between
from compress.runtimes import Session, open_session
from compress.terminal import table

AUTO = "auto"
LARGEST_DIFFERENCE = 1e-4  # between the two parts and the whole, as a share of the largest output
LARGEST_DIFFERENCE_INT8 = 0.1  # where a graph rounds: runtimes fuse otherwise beside a cut
LONGEST = 34  # letters of a tensor's name on the chart
PARTS = {  # of the time: its label, its colour
    "head_ms": ("head, edge", "#0b6e4f"),
    "link_ms": ("link", "#7a7a7a"),
    "tail_ms": ("tail, server", "#3f6fb0"),
}
_TIMING = Timing(seconds=0.5, warmup_limit_seconds=1.0)


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
class _Trial:
    """Where whole and parts run here with random values, and how fast edge and link are there."""

    source: Path
    runtime: str
    threads: int | None
    timing: Timing
    link_mbps: float
    edge_slowdown: float

    def __post_init__(self) -> None:
        for name in ("link_mbps", "edge_slowdown"):
            value = getattr(self, name)
            if not value > 0 or not math.isfinite(value):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {value:g}", expected="a number above 0")

    def cost(self, cut: Cut, files: tuple[Path, Path]) -> Place:
        """Return what head and tail take, timed in turns, and what crosses.

        Raises:
            EngineError: one of them does not run.
        """
        with ExitStack() as stack:
            head, tail = (stack.enter_context(self._open(file)) for file in files)
            arrays = inputs_for(head, 1)
            known = _named(head, arrays)
            known |= _named(tail, inputs_for(tail, 1))  # inputs that the tail alone takes
            known |= _answers(head, known)
            crossing = [known[spec.name] for spec in tail.inputs]
            found = bench(
                {"head": head, "tail": tail}, {"head": arrays, "tail": crossing}, timing=self.timing
            )
        for name, reason in found.skipped.items():
            raise EngineError(f"the {name} does not run: {reason}", where=str(self.source))
        head_ms, tail_ms = (found[name].latency_ms_p50 for name in ("head", "tail"))
        return self._place(cut.tensor, head_ms, tail_ms, crossing, cut.head_macs_pct)

    def ends(self) -> Iterator[Place]:
        """Yield what it takes to compute all on the edge, and all on the server."""
        with self._open(self.source) as session:
            arrays = inputs_for(session, 1)
            found = bench({"whole": session}, arrays, timing=self.timing)
        whole_ms = found["whole"].latency_ms_p50
        yield self._place("(all on the edge)", whole_ms, 0.0, (), 100.0)
        yield self._place("(all on the server)", 0.0, whole_ms, arrays, 0.0)

    def _place(
        self, name: str, head_ms: float, tail_ms: float, crossing: Sequence[np.ndarray], pct: float
    ) -> Place:
        size = sum(array.nbytes for array in crossing)
        link_ms = size * 8 / (self.link_mbps * 1000)
        return Place(name, size, head_ms * self.edge_slowdown, link_ms, tail_ms, pct)

    def difference(self, files: tuple[Path, Path]) -> float:
        """Return how far head and tail answer from the whole, as a share of its largest output.

        Raises:
            EngineError: the whole answers with NaN or infinity.
        """
        with self._open(self.source) as session:
            known = _named(session, inputs_for(session, 1))
            expected = _answers(session, known)
        for file in files:
            with self._open(file) as session:
                known |= _answers(session, known)
        worst = 0.0
        for name, value in expected.items():
            exact, found = (np.asarray(each, np.float64) for each in (value, known[name]))
            if exact.shape != found.shape:
                return math.inf
            largest = float(np.abs(exact).max(initial=0.0))
            worst = max(worst, float(np.abs(found - exact).max(initial=0.0)) / (largest or 1.0))
        if not math.isfinite(worst):
            raise EngineError("its outputs are not finite on random values", where=str(self.source))
        return worst

    def _open(self, path: Path) -> Any:
        return open_session(path, self.runtime, threads=self.threads)


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
        told = {key: value for key, value in vars(self).items() if key != "cut"}
        return told | {
            "head": self.head.name,
            "tail": self.tail.name,
            "tensor": self.cut.tensor,
            "crossing": list(self.cut.crossing),
            "bytes": next(p.bytes for p in self.places if p.name == self.cut.tensor),
            "places": [place.to_json() for place in self.places],
        }


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
        path: An ONNX file, whole or in int8; of its sizes only the batch may be free.
        out: Folder for the two files, ``split.json`` and, with "auto", ``split.svg``.
        at: Name of a tensor, or "auto".
        link_mbps: Speed of the link, megabits a second.
        edge_slowdown: How many times slower than this machine the edge is.
        int8: Whether float tensors cross as uint8, each with the range it has at that moment.
        runtime: Where both are timed and compared with the whole.
        threads: CPU threads; all cores if absent.
        timing: How long.

    Raises:
        UsageError: no such tensor, or one that leaves nothing for a side; a speed of 0; free sizes.
        ExportError: the two parts do not answer as the whole does.
    """
    source, folder = Path(path), Path(out)
    trial = _Trial(source, runtime, threads, timing or _TIMING, link_mbps, edge_slowdown)
    model = onnx_file.load(source)
    try:
        graph, cuts = _cuts(model, at, int8=int8)
    except CompressError as error:
        raise error.within(str(source)) from None
    ends = tuple(trial.ends())
    make_folder(folder)
    places = [
        trial.cost(cut, _write(graph, folder, cut, int8=int8))
        for cut in progress.track(cuts, "split")
    ]
    best = cuts[min(range(len(cuts)), key=lambda number: places[number].total_ms)]
    files = _write(graph, folder, best, int8=int8)
    difference = trial.difference(files)
    if not int8:
        _check_equal(difference, model, f"{source}, cut at {best.tensor}")
    split = Split(*files, best, int8, difference, link_mbps, edge_slowdown, (*places, *ends))
    write_json(folder / "split.json", split.to_json())
    if at == AUTO:
        write_text(folder / "split.svg", split_chart(split))
    return split


def _cuts(model: ModelProto, at: str, *, int8: bool) -> tuple[Cuttable, list[Cut]]:
    onnx_file.free_negative_sizes(model.graph)
    _refuse_free_sizes(model)
    if int8:
        check_opset(model)
    graph = Cuttable(model)
    if at == AUTO:
        cuts = front(graph)
        if not cuts:
            raise UsageError("no tensor splits it in two", fix="Name one with --at TENSOR")
        return graph, cuts
    cut = graph.cut(at)
    if len(cut.crossing) > 1:
        others = ", ".join(name for name in cut.crossing if name != at)
        progress.warn(f"{at} alone does not separate the graph: {others} cross as well")
    return graph, [cut]


def _refuse_free_sizes(model: ModelProto) -> None:
    for value in real_inputs(model):
        dims = value.type.tensor_type.shape.dim
        if None in dims_of(value)[1:]:
            shown = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in dims)
            raise UsageError(
                f"input {value.name!r} has free sizes ({shown}), which bytes and times depend on",
                fix="Fix them with --input-size C,H,W",
            )


def _write(graph: Cuttable, folder: Path, cut: Cut, *, int8: bool) -> tuple[Path, Path]:
    parts = graph.parts(cut)
    if int8:
        quantize_between(parts, graph.floats(cut))
    files = folder / "head.onnx", folder / "tail.onnx"
    for part, file in zip(parts, files, strict=True):
        with replacing(file) as temporary:
            onnx.save(part, temporary)
    return files


def _named(session: Session, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {spec.name: each for spec, each in zip(session.inputs, arrays, strict=True)}


def _answers(session: Session, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    results = session.run(*(known[spec.name] for spec in session.inputs))
    return {spec.name: each for spec, each in zip(session.outputs, results, strict=True)}


def _check_equal(difference: float, model: ModelProto, where: str) -> None:
    rounds = any("Quant" in node.op_type for node in model.graph.node)
    limit = LARGEST_DIFFERENCE_INT8 if rounds else LARGEST_DIFFERENCE
    if difference > limit:
        raise ExportError(
            f"head and tail differ from the whole by {difference:.2g} of the largest output",
            where=where,
            expected=f"at most {limit}",
            fix="Cut elsewhere with --at TENSOR, and please report this network",
        )


def split_table(split: Split) -> Table:
    """Return the places as a table for the terminal."""
    kept = "int8 at the cut" if split.int8 else "equal to the whole"
    caption = (
        f"{split.head} and {split.tail}: {kept}, difference {split.difference:.1g} of the largest "
        f"output; what crosses: {', '.join(split.cut.crossing)}; one image, link "
        f"{split.link_mbps:g} Mbit/s, edge {split.edge_slowdown:g} x as slow as this machine"
    )
    numbers = ("head MACs %", "KiB that cross", "head ms", "link ms", "tail ms", "sum ms")
    rows = []
    for place in split.places:
        times = (place.head_ms, place.link_ms, place.tail_ms, place.total_ms)
        sizes = (f"{place.head_macs_pct:.1f}", f"{place.bytes / 1024:.1f}")
        rows.append([_marked(place, split), *sizes, *(f"{time:.2f}" for time in times)])
    return table(["cut at", *numbers], rows, caption=caption, numbers=numbers)


def _marked(place: Place, split: Split) -> str:
    return place.name + " *" * (place.name == split.cut.tensor)


def split_chart(split: Split) -> str:
    """Return the front as SVG: where the time goes at each place, the edge's work rising."""
    import matplotlib as mpl

    mpl.use("agg", force=False)
    from matplotlib.figure import Figure

    order = sorted(split.places, key=lambda place: (-place.head_macs_pct, -place.bytes))
    figure = Figure(figsize=(7, 1.4 + 0.32 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(order))
    for name, (label, color) in PARTS.items():
        values = np.array([getattr(place, name) for place in order])
        axes.barh(range(len(order)), values, left=left, color=color, label=label)
        left = left + values
    for row, (place, end) in enumerate(zip(order, left, strict=True)):
        axes.text(end, row, f" {end:.1f} ms, {place.bytes / 1024:.0f} KiB", va="center", fontsize=8)
    names = [_marked(place, split) for place in order]
    axes.set_yticks(
        range(len(order)), [n if len(n) < LONGEST else f"...{n[4 - LONGEST :]}" for n in names]
    )
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, 1.3 * float(left.max()))
    axes.set_xlabel(f"ms for one image, link {split.link_mbps:g} Mbit/s")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
