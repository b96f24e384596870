"""Memory of an artifact: five quantities that are often mixed up, each with its method."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

import compress
from compress.artifact import state_of
from compress.errors import EngineError
from compress.graph import files
from compress.graph.shapes import real_inputs, shapes_of
from compress.measure.macs import MIB, size_mib


@dataclass(frozen=True)
class Memory:
    """What an artifact takes where, MiB; None is not measured, and ``skipped`` says why."""

    file_mib: float
    weights_mib: float | None
    activations_mib: float | None
    peak_rss_mib: float
    peak_memory_mib: float
    peak_device_mib: float | None
    load_ms: float
    first_call_ms: float
    batch: int
    skipped: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return these numbers as JSON-able data, without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


def memory(
    path: Path,
    runtime: str | Mapping[str, Any] = "onnxruntime",
    *,
    batch: int = 1,
    shapes: Sequence[Sequence[int]] | None = None,
    calls: int = 10,
    timeout_seconds: float = 600.0,
    **options: Any,
) -> Memory:
    """Return what an artifact takes on disk, in weights, in activations, and in a fresh process.

    **Method:** see ``METHODS``, a sentence for each number. The process is a new Python
    that runs nothing else; its memory is the operating system's own high-water mark, not a sample.

    Args:
        path: The artifact.
        runtime: Name of a runtime, or one name with its options.
        batch: Images in a call.
        shapes: Of the inputs, batch included, where the session cannot tell them.
        calls: Calls of the process.
        timeout_seconds: After which the process is ended.
        options: Further options of ``open_session``, such as ``threads``.

    Raises:
        EngineError: the artifact cannot be loaded or run, or took longer.
    """
    request = {
        "path": str(path.resolve()),
        "runtime": runtime,
        "batch": batch,
        "shapes": shapes,
        "calls": calls,
        "options": options,
    }
    found = _probe(request, timeout_seconds, str(path))
    weights, activations, skipped = _static(path, batch, found)
    if found["peak_device_mib"] is None:
        skipped["peak_device_mib"] = "it used no GPU that PyTorch sees"
    return Memory(
        file_mib=size_mib(path),
        weights_mib=weights,
        activations_mib=activations,
        peak_rss_mib=found["peak_rss_mib"],
        peak_memory_mib=max(0.0, found["peak_rss_mib"] - found["baseline_rss_mib"]),
        peak_device_mib=found["peak_device_mib"],
        load_ms=found["load_ms"],
        first_call_ms=found["first_call_ms"],
        batch=batch,
        skipped=skipped,
    )


def weights_mib(model: onnx.ModelProto) -> float:
    """Return the bytes of all constants of a graph, MiB."""
    return sum(_tensor_bytes(t.data_type, t.dims) for t in model.graph.initializer) / MIB


def activations_mib(model: onnx.ModelProto, batch: int = 1) -> float | None:
    """Return the largest sum of tensors alive at one time, MiB; None if a shape is not known.

    **Method:** a tensor lives from the node that makes it to the last node that reads it, inputs
    and outputs of the graph throughout; nodes run in the order of the file, none in place.
    """
    shapes, kinds = shapes_of(model, batch)
    constants = {tensor.name for tensor in model.graph.initializer}
    last_use = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    ends = {value.name for value in model.graph.output}
    alive = {value.name for value in real_inputs(model)}
    largest = 0
    for i, node in enumerate(model.graph.node):
        if node.op_type == "Constant":
            constants.update(node.output)
            continue
        alive |= {name for name in node.output if name}
        total = 0
        for name in alive - constants:
            shape = shapes.get(name, (None,))
            if None in shape or name not in kinds:
                return None
            total += _tensor_bytes(kinds[name], [size or 0 for size in shape])
        largest = max(largest, total)
        alive = {name for name in alive if name in ends or last_use.get(name, -1) > i}
    return largest / MIB


def _tensor_bytes(kind: int, dims: Sequence[int]) -> int:
    four_bit = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    bits = 4 if kind in four_bit else 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return math.prod(dims) * bits // 8


@functools.lru_cache(maxsize=256)
def _graph_mib(path: Path, state: tuple[int, ...], batch: int) -> tuple[float, float | None]:
    """Return weights and activations of an ONNX file in ``state``."""
    model = files.load(path)
    return weights_mib(model), activations_mib(model, batch)


def _static(
    path: Path, batch: int, found: Mapping[str, Any]
) -> tuple[float | None, float | None, dict[str, str]]:
    """Return weights, activations, and why one of them is missing."""
    weights, activations = found.get("weights_mib"), found.get("activations_mib")
    if path.suffix == ".onnx":
        weights, activations = _graph_mib(path.absolute(), state_of(path), batch)
    elif path.suffix == ".xml" and path.with_suffix(".bin").is_file():
        weights = path.with_suffix(".bin").stat().st_size / MIB
    silent = "this kind of artifact does not tell"
    unknown = "a shape in the graph is not known" if path.suffix == ".onnx" else silent
    skipped = {"weights_mib": silent} if weights is None else {}
    skipped |= {"activations_mib": unknown} if activations is None else {}
    return weights, activations, skipped


def _probe(request: Mapping[str, Any], timeout_seconds: float, where: str) -> dict[str, Any]:
    """Run ``probe.py`` in a fresh process and return what it found."""
    package_folder = str(Path(compress.__file__).parent.parent)
    search = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "compress.measure.probe"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env={**os.environ, "PYTHONPATH": search},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"did not load and run within {timeout_seconds:g} s",
            where=where,
            fix="Give it more time, or fewer calls",
        ) from None
    answer = ended.stdout.strip().splitlines()[-1:] or [""]
    if ended.returncode == 0 and answer[0].startswith("{"):
        found: dict[str, Any] = json.loads(answer[0])
        if "error" not in found:
            return found
        raise EngineError(found["error"])
    if ended.returncode < 0:
        raise EngineError(
            f"the process that loaded and ran it was killed by signal {-ended.returncode}",
            where=where,
            fix="Signal 9 mostly means that memory ran out: use a smaller batch",
        )
    tail = ended.stderr.strip().splitlines()[-1:] or ["no message"]
    raise EngineError(f"the process that loaded and ran it failed: {tail[0]}", where=where)
