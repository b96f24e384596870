"""Split an ONNX graph in two: a head for the edge and a tail for the server."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from compress import progress
from compress.artifact import write_json, write_text
from compress.errors import CompressError, ExportError, UsageError
from compress.graph import files as onnx_file
from compress.graph.shapes import dims_of, real_inputs
from compress.measure import Timing
from compress.pipeline.split.chart import split_chart
from compress.pipeline.split.clock import Clock, Cost, write_parts
from compress.pipeline.split.cutting import Cut, Cuttable, front
from compress.pipeline.split.int8 import check_opset, quantize_between

AUTO = "auto"
LARGEST_DIFFERENCE = 1e-4  # between the two parts and the whole, as a share of the largest output
LARGEST_DIFFERENCE_INT8 = 0.1  # where a graph rounds: runtimes fuse otherwise beside a cut
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
class _Devices:
    """How fast the edge and the link are."""

    link_mbps: float
    edge_slowdown: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 or not math.isfinite(value):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {value:g}", expected="a number above 0")

    def place(self, name: str, cost: Cost, head_macs_pct: float) -> Place:
        """Return what a cut costs whose parts were timed on this machine."""
        link_ms = cost.bytes * 8 / (self.link_mbps * 1000)
        edge_ms = cost.head_ms * self.edge_slowdown
        return Place(name, cost.bytes, edge_ms, link_ms, cost.tail_ms, head_macs_pct)


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
    devices = _Devices(link_mbps, edge_slowdown)
    source, folder = Path(path), Path(out)
    model = onnx_file.load(source)
    try:
        graph, cuts = _cuts(model, at, int8=int8)
    except CompressError as error:
        raise error.within(str(source)) from None
    clock = Clock(source, runtime, threads, timing or _TIMING)
    folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write, graph, folder, int8)
    places = _places(clock, devices, cuts, write)
    best = cuts[min(range(len(cuts)), key=lambda number: places[number].total_ms)]
    files = write(best)
    difference = clock.difference(files)
    if not int8:
        _check_equal(difference, model, f"{source}, cut at {best.tensor}")
    split = Split(*files, best, int8, difference, link_mbps, edge_slowdown, tuple(places))
    write_json(folder / "split.json", split.to_json())
    if at == AUTO:
        write_text(folder / "split.svg", split_chart(split))
    return split


def _places(
    clock: Clock, devices: _Devices, cuts: list[Cut], write: Callable[[Cut], tuple[Path, Path]]
) -> list[Place]:
    """Return what each cut costs; then all on the edge, and all on the server."""
    whole = clock.whole()
    return [
        *(
            devices.place(cut.tensor, clock.cost(write(cut)), cut.head_macs_pct)
            for cut in progress.track(cuts, "split")
        ),
        devices.place("(all on the edge)", Cost(whole.tail_ms, 0.0, 0), 100.0),
        devices.place("(all on the server)", whole, 0.0),
    ]


def _cuts(model: ModelProto, at: str, *, int8: bool) -> tuple[Cuttable, list[Cut]]:
    """Return the graph and the cuts to time."""
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


def _write(graph: Cuttable, folder: Path, int8: bool, cut: Cut) -> tuple[Path, Path]:
    """Write both parts and return where they are."""
    parts = graph.parts(cut)
    if int8:
        quantize_between(parts, graph.floats(cut))
    return write_parts(parts, folder)


def _check_equal(difference: float, model: ModelProto, where: str) -> None:
    """Check that head and tail answer as the whole.

    Raises:
        ExportError: they do not.
    """
    rounds = any("Quant" in node.op_type for node in model.graph.node)
    limit = LARGEST_DIFFERENCE_INT8 if rounds else LARGEST_DIFFERENCE
    if difference > limit:
        raise ExportError(
            f"head and tail differ from the whole by {difference:.2g} of the largest output",
            where=where,
            expected=f"at most {limit}",
            fix="Cut elsewhere with --at TENSOR, and please report this network",
        )
