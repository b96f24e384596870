"""Notes of a plan: what was kept, what stays in float, how far to trust its figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import GraphIndex, bodies, graphs_in, layers_inside
from compress.qdq.placement import place
from compress.quantize.sessions import sqnr_text
from compress.report.numbers import staying
from compress.runtimes._plain_kernels import EXACT_INT8

ENOUGH = 32  # images, with which an SQNR is right to about a decibel
STAYS = " stays in float"
_BEARING = 3  # an output that rests on less than every third image is not known well
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


def decided(trials: Sequence[str]) -> list[str]:
    """Return in one sentence what was kept of several trials, each "WHAT: FIGURES, VERDICT"."""
    kept = [trial for trial in trials[1:] if trial.endswith(", kept")]
    plans = [trials[0], *kept] if len(trials) > 1 else []
    if not plans:
        return list(trials)
    steps = ", ".join(plan.partition(": ")[0] for plan in plans)
    figures = plans[-1].partition(": ")[2].removesuffix(", kept")
    count = 1 + sum(trial.endswith(", kept") or ", not kept" in trial for trial in trials[1:])
    return [f"{steps}: {figures} ({len(plans)} of {count} trials kept)"]


def float_parts(graph: GraphIndex, target: str) -> list[str]:
    """Return a sentence for each part with weights that ``target`` cannot have in int8."""
    left = place(graph, target).left_float
    products = {n.name for n in graph.nodes if len(graph.data_inputs(n)) > 1}
    found = [f"{name}{STAYS}: {why}" for name, why in left.items() if name not in products]
    for node in graph.nodes:
        inside = layers_inside(node)
        if node.op_type in _RECURRENT:
            found.append(f"{node.name} ({node.op_type}){STAYS}: no target has it in int8")
        elif inside:
            found.append(f"{node.name} ({node.op_type}){STAYS}, {inside} layers inside")
        elif kinds := _recurrent_inside(node):
            found.append(f"{node.name} ({node.op_type}){STAYS}, {', '.join(kinds)} inside")
    return found


def _recurrent_inside(node: NodeProto) -> list[str]:
    parts = (part for body in bodies(node) for part in graphs_in(body))
    return sorted({child.op_type for part in parts for child in part.node} & _RECURRENT)


def by_reason(notes: Iterable[str]) -> list[str]:
    """Return notes with one line for all that stay in float for one reason: two names and how many.

    Other notes are returned as they are.
    """
    found: dict[str, dict[str, None]] = {}  # what is said of them -> names, in order
    for note in notes:
        name, stays, why = note.partition(STAYS)
        found.setdefault(why if stays else note, {})[name if stays else ""] = None
    return [
        note if list(names) == [""] else f"{staying(list(names))} in float{note}"
        for note, names in found.items()
    ]


def of_sessions(target: str) -> list[str]:
    """Return what a program that opens the graph itself has to know."""
    if target != "onnxruntime":
        return []
    key, value = EXACT_INT8
    return [
        "judged with exact int8 kernels; in a session of your own on x86-64 CPUs without VNNI, "
        f"options.add_session_config_entry({key!r}, {value!r}) chooses them, else int8 overflows; "
        "with VNNI leave it out: it makes int8 slow"
    ]


def of_judging(
    names: Sequence[str], reference: Sequence[NDArray[Any]], each_db: Sequence[float], images: int
) -> list[str]:
    """Return notes on outputs: their names, values in float, SQNR in decibels, images judged on.

    Values are (B, ...) of B images, but for those of regions inside them.
    """
    found = []
    told = [db for db in each_db if not math.isnan(db)]
    if len(names) > 1 and told:
        pairs = zip(names, each_db, strict=True)
        found.append(
            "SQNR by output: " + ", ".join(f"{name} {sqnr_text(db)}" for name, db in pairs)
        )
    if images < ENOUGH and told:
        found.append(
            f"judged on {images} images: an SQNR may be some dB off; give {2 * ENOUGH} or more"
        )
    rows = {n: v for n, v in zip(names, reference, strict=True) if len(v) == images}
    few = {n: count for n, v in rows.items() if (count := bearing_images(v)) < images / _BEARING}
    if few and told:
        each = ", ".join(f"{name} on {count:.1f}" for name, count in few.items())
        found.append(
            f"the SQNR of an output rests on few of the {images} images and says little ({each}); "
            "give more images, of what the network is for"
        )
    return found


def bearing_images(values: NDArray[Any]) -> float:
    """Return on how many images the power of ``values``, (B, ...), rests.

    B where all have the same power, 1 where one has nearly all of it: detectors answer next to
    nothing to images without their objects, and a ratio of noise to that is none of quality.
    """
    power = np.square(values.reshape(len(values), -1), dtype=np.float64).sum(1)
    return float(power.sum() ** 2 / max(np.square(power).sum(), 1e-300)) if power.any() else 0.0
