"""The process that ``memory`` starts: load one artifact, run it, report its peak memory.

Reads a request as JSON from standard input and writes what it found as JSON to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """Carry out one request."""
    from compress.errors import CompressError

    request = json.load(sys.stdin)
    try:
        found = measured(request)
    except CompressError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """Return resident memory before and at its peak, times, and GPU memory that was taken."""
    from compress.runtimes import open_session

    runtime, options = request["runtime"], request["options"]
    _run_one_layer(runtime, options)
    _forget_peak()
    baseline, device_before = resident_mib()[0], _device_used_mib()
    start = time.perf_counter()
    with open_session(request["path"], runtime, **options) as session:
        loaded = time.perf_counter()
        arrays = inputs_for(session, request["batch"], request["shapes"])
        begun = time.perf_counter()
        session.run(*arrays)
        answered = time.perf_counter()
        for _ in range(request["calls"] - 1):
            session.run(*arrays)
        device_after = _device_used_mib()
        return {
            "baseline_rss_mib": baseline,
            "peak_rss_mib": resident_mib()[1],
            "load_ms": 1000 * (loaded - start),
            "first_call_ms": 1000 * (answered - begun),
            "peak_device_mib": None
            if device_before is None or device_after is None
            else device_after - device_before,
            **_told_by(session),
        }


def inputs_for(session: Any, batch: int, shapes: Any = None) -> list[np.ndarray]:
    """Return arrays that ``session`` takes, of random values.

    Raises:
        EngineError: a free dimension other than the batch, or an input of unknown shape.
    """
    from compress.errors import EngineError

    generator = np.random.default_rng(0)
    arrays = []
    for index, spec in enumerate(session.inputs):
        shape = _shape(spec.shape, shapes[index] if shapes and index < len(shapes) else None)
        if shape is None or any(isinstance(size, str) for size in shape[1:]):
            raise EngineError(
                f"the shape of input {spec.name!r} is not known: {shape}",
                fix="Give the size of its images, --image-size H,W, or an array of that shape, "
                "--data FILE.npy",
            )
        dims = (batch if isinstance(shape[0], str) else shape[0], *shape[1:]) if shape else ()
        dtype = spec.dtype or "float32"
        is_whole = "int" in dtype
        values = generator.integers(0, 128, size=dims) if is_whole else generator.normal(size=dims)
        arrays.append(np.asarray(values, dtype=dtype))
    return arrays


def _shape(own: Any, given: Any) -> Any:
    """Return the shape of an input, with what it leaves free as in ``given``, (B, C, H, W)."""
    from compress.graph.metadata import layout_of

    if own is None or given is None or len(own) != len(given):
        return own if own is not None else given
    if layout_of(own) == "NHWC":
        given = [given[dim] for dim in (0, 2, 3, 1)]
    return tuple(g if isinstance(size, str) else size for size, g in zip(own, given, strict=True))


def resident_mib() -> tuple[float, float]:
    """Return the resident memory of this process now and at its highest, MiB.

    The high-water mark belongs to this program: unlike ``ru_maxrss``, Linux's VmHWM starts anew
    with it instead of with the size of the process that started it.
    """
    if _STATUS.is_file():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            now, peak = (float(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
            return now, peak
    import psutil

    info = psutil.Process().memory_info()
    highest: int | None = getattr(info, "peak_wset", None)
    if highest is not None:  # Windows
        return info.rss / MIB, highest / MIB
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return info.rss / MIB, largest / (MIB if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Let the high-water mark start from here, where the system can do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # no such file, or no right to it: the peak of the imports counts as well
        return


def _run_one_layer(runtime: Any, options: dict[str, Any]) -> None:
    """Import the runtime and let it set up what it holds for any network."""
    import onnx

    from compress.artifact import scratch
    from compress.errors import CompressError
    from compress.runtimes import open_session

    ones = ", ".join(["1"] * 12)
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["": 17]>
        one_layer (float[1, 3, 8, 8] input) => (float[1, 4, 8, 8] logits)
        <float[4, 3, 1, 1] w = {{{ones}}}> {{ logits = Conv (input, w) }}""")
    with scratch() as folder:
        path = folder / "one-layer.onnx"
        onnx.save(model, path)
        try:
            with open_session(path, runtime, **options) as session:
                session.run(np.zeros((1, 3, 8, 8), np.float32))
        except CompressError:  # opens engines or folders only; its package is imported by now
            return


def _device_used_mib() -> float | None:
    """Return the memory of the first GPU that is taken, MiB; None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / MIB


def _told_by(session: Any) -> dict[str, float]:
    """Return what an engine says of its own weights and scratch memory, bytes as MiB."""
    raw = getattr(session, "raw", session)
    told = {"weights_mib": "weights_bytes", "activations_mib": "device_memory_bytes"}
    return {
        name: getattr(raw, attribute) / MIB
        for name, attribute in told.items()
        if getattr(raw, attribute, None) is not None
    }


if __name__ == "__main__":
    main()
