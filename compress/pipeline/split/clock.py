"""Latency of the parts of a split graph, and their numerical difference from the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.artifact import replacing
from compress.errors import EngineError
from compress.measure import Timing, bench
from compress.measure.probe import inputs_for
from compress.pipeline.split.cutting import Parts
from compress.runtimes import Session, open_session


@dataclass(frozen=True)
class Cost:
    """Of one cut, for one image."""

    head_ms: float
    tail_ms: float
    bytes: int  # that cross


@dataclass(frozen=True)
class Clock:
    """Times parts on a runtime with random values, and compares them with the whole.

    Args:
        source: The whole file.
        runtime: Where all of them run.
        threads: CPU threads; all cores if absent.
        timing: How long.
    """

    source: Path
    runtime: str
    threads: int | None
    timing: Timing

    def cost(self, files: tuple[Path, Path]) -> Cost:
        """Return what head and tail take, timed in turns, and the bytes of what crosses.

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
                {"head": head, "tail": tail},
                {"head": arrays, "tail": crossing},
                timing=self.timing,
            )
        for name, reason in found.skipped.items():
            raise EngineError(f"the {name} does not run: {reason}", where=str(self.source))
        size = sum(array.nbytes for array in crossing)
        return Cost(found["head"].latency_ms_p50, found["tail"].latency_ms_p50, size)

    def whole(self) -> Cost:
        """Return what the whole takes, as a tail without a head: its inputs cross."""
        with self._open(self.source) as session:
            arrays = inputs_for(session, 1)
            found = bench({"whole": session}, arrays, timing=self.timing)
        size = sum(array.nbytes for array in arrays)
        return Cost(0.0, found["whole"].latency_ms_p50, size)

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


def write_parts(parts: Parts, folder: Path) -> tuple[Path, Path]:
    """Write ``head.onnx`` and ``tail.onnx`` and return where they are."""
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
