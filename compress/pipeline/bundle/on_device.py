#!/usr/bin/env python3
"""Build, check and measure the networks of this bundle on this device.

    python3 run.py [--runtime auto|tensorrt|tensorrt-rtx|onnxruntime] [--batch 1] [--seconds 3]

Needs Python 3.8, numpy, and tensorrt or onnxruntime; nothing else. For every network it builds an
engine (TensorRT) or a session (ONNX Runtime), compares its answers on the bundled images with the
answers it gave where the bundle was made, and times all of them in turns. Writes results.json and
exits with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import glob
import hashlib
import importlib.util
import json
import os
import site
import sys
import time
from typing import Any

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
DECIDED = ("classes", "class map")  # answers whose largest along the second dimension is meant
FLOAT_TOLERANCE = 0.02  # largest difference, relative to the largest logit; tf32 and fp16 fit
INT8_AGREEMENT = 0.9  # smallest share of images with the same answer as on the host
INT8_SQNR_DB = 15.0  # smallest ratio of answers to their difference, where none names a class
FLOAT_SQNR_DB = 34.0  # the same for boxes of a float network: 2 % of them, as FLOAT_TOLERANCE
OVERLAP = 0.5  # smallest intersection over union of a box here and its partner on the host
COUNTED = 0.1  # boxes of a score of this share of the host's best one must have a partner
CALLS = 5  # timed before it is another network's turn
DRAWS = 400  # of turns, for the interval of a speed-up
LOOSE = 1.5  # upper over lower end of that interval, from which no one number tells it


class DeviceError(Exception):
    """Something the user has to fix."""


def print_line(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class OnnxRuntime:
    """ONNX Runtime, on a GPU if this build has the provider, else on the CPU."""

    name = "onnxruntime"
    forms = ("onnxruntime", "openvino")

    def __init__(self, path: str, batch: int) -> None:
        import onnxruntime
        from kernels import take_exact_kernels  # type: ignore[import-not-found]  # beside it

        preferred = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        present = onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        take_exact_kernels(options)
        self.session = onnxruntime.InferenceSession(
            path, options, providers=[name for name in preferred if name in present]
        )
        self.device = self.session.get_providers()[0].replace("ExecutionProvider", "")
        first = self.session.get_inputs()[0]
        self.input, self.shape = first.name, first.shape
        self.dtype = {"float": "float32", "float16": "float16"}.get(first.type[7:-1], "uint8")
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, images: Any) -> Any:
        """Return the outputs for a batch."""
        return self.session.run(None, {self.input: images})


class Cuda:
    """The few calls of the CUDA runtime that running an engine takes."""

    def __init__(self) -> None:
        self.library = self._load()
        self.stream = ctypes.c_void_p()
        self.check(self.library.cudaStreamCreate(ctypes.byref(self.stream)))

    @staticmethod
    def _load() -> Any:
        packages = [*site.getsitepackages(), site.getusersitepackages()]
        wheels = [f for p in packages for f in glob.glob(p + "/nvidia/*/lib/libcudart.so*")]
        found = ctypes.util.find_library("cudart")
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
        for name in [*([found] if found else []), *names, *sorted(wheels, reverse=True)]:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise DeviceError("libcudart was not found. Install CUDA, or set LD_LIBRARY_PATH to it.")

    def check(self, code: int) -> None:
        """Raise what the CUDA runtime says about an error code."""
        if code:
            self.library.cudaGetErrorString.restype = ctypes.c_char_p
            raise DeviceError("CUDA: " + self.library.cudaGetErrorString(code).decode())

    def allocate(self, count: int) -> Any:
        """Return the address of ``count`` bytes on the device."""
        address = ctypes.c_void_p()
        self.check(self.library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(count)))
        return address

    def copy(self, target: Any, source: Any, count: int, kind: int) -> None:
        """Copy ``count`` bytes in the stream; kind 1 to the device, 2 from it."""
        self.check(
            self.library.cudaMemcpyAsync(
                target, source, ctypes.c_size_t(count), ctypes.c_int(kind), self.stream
            )
        )

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.check(self.library.cudaStreamSynchronize(self.stream))


class TensorRT:
    """TensorRT 10 or 11: the engine is built here, for the GPU that is here."""

    name = "tensorrt"
    module = "tensorrt"
    forms = ("tensorrt",)
    device = "GPU"

    def __init__(self, path: str, batch: int) -> None:
        self.trt = importlib.import_module(self.module)
        logger = self.trt.Logger(self.trt.Logger.WARNING)
        engine_path = os.path.splitext(path)[0] + "." + self.name + ".engine"
        blob = self._built(path, batch, logger)
        with open(engine_path, "wb") as file:
            file.write(blob)
        self.runtime = self.trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(blob)
        if self.engine is None:
            raise DeviceError("TensorRT does not load the engine it has just built from " + path)
        self.context = self.engine.create_execution_context()
        self.cuda = Cuda()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(n for n in names if modes[n] == self.trt.TensorIOMode.INPUT)
        self.outputs = [n for n in names if modes[n] == self.trt.TensorIOMode.OUTPUT]
        self.shape = tuple(self.engine.get_tensor_shape(self.input))
        self.dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(self.input))).name
        self.buffers: dict[Any, list[Any]] = {}

    def _built(self, path: str, batch: int, logger: Any) -> bytes:
        trt = self.trt
        builder = trt.Builder(logger)
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(path):
            reasons = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise DeviceError("TensorRT cannot read " + path + ": " + "; ".join(reasons))
        config = builder.create_builder_config()
        tensor = network.get_input(0)
        rest = [int(size) for size in tensor.shape][1:]
        if int(tensor.shape[0]) == -1:
            profile = builder.create_optimization_profile()
            largest = max(batch, 16)
            profile.set_shape(tensor.name, [1, *rest], [batch, *rest], [largest, *rest])
            config.add_optimization_profile(profile)
        blob = builder.build_serialized_network(network, config)
        if blob is None:
            raise DeviceError("TensorRT could not build an engine from " + path)
        return bytes(blob)

    def run(self, images: Any) -> Any:
        """Return the outputs for a batch; copies in and out are part of it."""
        images = np.ascontiguousarray(images)
        self.context.set_input_shape(self.input, images.shape)
        answers = [
            np.empty(
                tuple(self.context.get_tensor_shape(name)),
                self.trt.nptype(self.engine.get_tensor_dtype(name)),
            )
            for name in self.outputs
        ]
        if images.shape not in self.buffers:
            sizes = [array.nbytes for array in (images, *answers)]
            self.buffers[images.shape] = [self.cuda.allocate(size) for size in sizes]
        source, *targets = self.buffers[images.shape]
        self.cuda.copy(source, images.ctypes.data_as(ctypes.c_void_p), images.nbytes, 1)
        self.context.set_tensor_address(self.input, source.value)
        for name, target in zip(self.outputs, targets):  # noqa: B905 - 3.8
            self.context.set_tensor_address(name, target.value)
        if not self.context.execute_async_v3(self.cuda.stream.value):
            raise DeviceError("TensorRT failed to run the engine")
        for answer, target in zip(answers, targets):  # noqa: B905 - 3.8
            self.cuda.copy(answer.ctypes.data_as(ctypes.c_void_p), target, answer.nbytes, 2)
        self.cuda.synchronize()
        return answers


class TensorRTRTX(TensorRT):
    """TensorRT-RTX: the same API, for RTX GPUs."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


RUNTIMES: dict[str, Any] = {
    "tensorrt": (TensorRT, "tensorrt"),
    "tensorrt-rtx": (TensorRTRTX, "tensorrt_rtx"),
    "onnxruntime": (OnnxRuntime, "onnxruntime"),
}


def chosen_runtime(name: str) -> Any:
    """Return the class of the runtime to use."""
    if name != "auto":
        kind, module = RUNTIMES[name]
        if importlib.util.find_spec(module) is None:
            raise DeviceError(
                "the package " + module + " is not installed. Try: pip install " + module
            )
        return kind
    for runtime, (kind, module) in RUNTIMES.items():
        if importlib.util.find_spec(module) is None:
            continue
        if runtime == "onnxruntime" or _has_gpu():
            return kind
    raise DeviceError("neither tensorrt nor onnxruntime is installed. Try: pip install onnxruntime")


def _has_gpu() -> bool:
    try:
        count = ctypes.c_int()
        return not Cuda._load().cudaGetDeviceCount(ctypes.byref(count)) and count.value > 0
    except DeviceError:
        return False


def read_bundle() -> dict[str, Any]:
    """Return what the bundle holds, after every file was checked against its hash."""
    with open(os.path.join(HERE, "bundle.json"), encoding="utf-8") as file:
        bundle: dict[str, Any] = json.load(file)
    for name, expected in bundle["sha256"].items():
        try:
            with open(os.path.join(HERE, name), "rb") as file:
                found = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise DeviceError("cannot read " + name + ": " + str(error)) from None
        if found != expected:
            raise DeviceError(name + " is damaged: its SHA-256 is not the one in bundle.json")
    return bundle


def compare_with_host(
    answers: Any, host: Any, labels: Any, precision: str, decided: bool = True
) -> dict[str, Any]:
    """Return how far ``answers`` are from those of the host, and whether that is near enough.

    Where they are ``decided``, the largest along the second dimension names the class of an image
    or a pixel: these are compared, and with ``labels`` (None: not known) as well.
    """
    gap, sqnr = distance(answers, host)
    agreement = float((answers.argmax(1) == host.argmax(1)).mean()) if decided else None
    alike = sqnr >= INT8_SQNR_DB if agreement is None else agreement >= INT8_AGREEMENT
    near = alike if precision == "int8" else gap <= FLOAT_TOLERANCE
    return {
        "difference_from_host": gap,
        "sqnr_to_host_db": sqnr,
        "agreement_with_host_pct": None if agreement is None else 100 * agreement,
        "top1_pct": None if labels is None else 100 * float((answers.argmax(1) == labels).mean()),
        "parity": bool(near and np.isfinite(answers).all()),
    }


def distance(answers: Any, host: Any) -> tuple[float, float]:
    """Return the largest difference, relative to the largest number, and the SQNR in dB."""
    host = np.asarray(host, np.float64)
    off = np.abs(answers - host)
    ratio = max(np.mean(host**2), 1e-30) / max(np.mean(off**2), 1e-30)
    return float(off.max() / max(np.abs(host).max(), 1e-6)), float(10 * np.log10(ratio))


def compare_boxes(
    answers: list[Any], host: list[Any], precision: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``compare_with_host`` does, for boxes, scores and labels of each image.

    They are sets: where scores are nearly equal, rounding changes the order in which boxes come. A
    box has a partner where one of its class overlaps it; coordinates and scores are compared there.
    """
    best = max((there[1].max(initial=0) for there in host), default=0)
    least = max(COUNTED * best, options["score_threshold"])
    pairs, alone = [], 0
    for here, there in zip(answers, host):  # noqa: B905 - 3.8
        found = partners(there, here)
        counted, counted_here = (
            (each[1] >= least) & (np.arange(len(each[1])) < options["max_boxes"])
            for each in (there, here)
        )
        single = np.setdiff1d(np.flatnonzero(counted_here), found)
        alone += int((counted & (found < 0)).sum()) + len(single)
        both = np.flatnonzero(found >= 0)
        both = both[counted[both] | counted_here[found[both]]]
        columns = [np.c_[each[0], each[1]] for each in (here, there)]
        pairs.append((columns[0][found[both]], columns[1][both]))
    mine, theirs = (np.concatenate(each) for each in zip(*pairs))  # noqa: B905 - 3.8
    partnered = len(mine)
    parts = [(mine[:, at], theirs[:, at]) for at in (slice(4), slice(4, 5))] if partnered else []
    told = [distance(*part) for part in parts] or [(0.0, 0.0 if alone else 300.0)]
    sqnr = min(each[1] for each in told)
    enough = partnered >= INT8_AGREEMENT * (partnered + alone)
    return {
        "difference_from_host": max(each[0] for each in told),
        "sqnr_to_host_db": sqnr,
        "agreement_with_host_pct": None,
        "top1_pct": None,
        "boxes": partnered + alone,
        "boxes_with_partner": partnered,
        "parity": enough and sqnr >= (INT8_SQNR_DB if precision == "int8" else FLOAT_SQNR_DB),
    }


def partners(one: Any, two: Any) -> Any:
    """Return which box of ``two`` overlaps each of ``one`` most, of its class; -1 for none."""
    found = np.full(len(one[0]), -1)
    free = np.ones(len(two[0]), bool)
    for number, (box, label) in enumerate(zip(one[0], one[2])):  # noqa: B905 - 3.8
        overlap = overlap_of(box, two[0]) * (free & (two[2] == label))
        if overlap.max(initial=0) >= OVERLAP:
            found[number] = overlap.argmax()
            free[found[number]] = False
    return found


def overlap_of(box: Any, boxes: Any) -> Any:
    """Return the intersection over union of a box with others."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return both / np.maximum((box[2:] - box[:2]).prod() + areas - both, 1e-9)


def joined(names: list[str], outputs: list[Any]) -> Any:
    """Return the first output; where boxes, scores and labels stand apart, rows of all three."""
    named = dict(zip(names, outputs))  # noqa: B905 - 3.8
    if not {"boxes", "scores", "labels"} <= set(named) or named["boxes"].ndim != 3:
        return outputs[0]
    rows = [named["boxes"], named["scores"][..., None], named["labels"][..., None]]
    return np.concatenate([each.astype(np.float32) for each in rows], -1)


def detected(head: Any, classes: int, options: dict[str, Any]) -> Any:
    """Return boxes, scores and labels of an image, best first; None where the form is not known.

    Known are rows of six after NMS, and before it (4 + classes, places) or, with objectness,
    (places, 5 + classes).
    """
    if head.shape[1] == 6 and (head[:, 5] % 1 == 0).all():  # x1, y1, x2, y2, score, class
        order = np.argsort(-head[:, 4], kind="stable")
        labels = head[order, 5].astype(np.int64) - int(options["background"])
        return head[order, :4], head[order, 4], labels
    places, columns = head.shape
    known = columns == 5 + classes and places != 4 + classes if classes else places > columns > 5
    if known and head[:, 4:].min(initial=0) >= 0 and head[:, 4:].max(initial=0) <= 1:
        head = np.concatenate([head[:, :4], head[:, 4:5] * head[:, 5:]], 1).T
    if head.shape[0] <= 4 or classes not in (0, head.shape[0] - 4):
        return None
    likely = head[4:].max(0) > options["score_threshold"]
    centre, size = head[:2, likely].T, head[2:4, likely].T
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1).astype(np.float32)
    scores, labels = head[4:, likely].max(0).astype(np.float32), head[4:, likely].argmax(0)
    kept = best_of_overlapping(boxes, scores, labels, options)
    return boxes[kept], scores[kept], labels[kept]


def best_of_overlapping(boxes: Any, scores: Any, labels: Any, options: dict[str, Any]) -> Any:
    """Return which boxes stay, best first: of one class none overlaps a better one by more."""
    kept: list[Any] = []
    order = np.argsort(-scores, kind="stable")
    while len(order) and len(kept) < 2 * options["max_boxes"]:  # more than are told of
        best, rest = order[0], order[1:]
        kept.append(best)
        near = overlap_of(boxes[best], boxes[rest]) > options["nms_iou"]
        order = rest[~(near & (labels[rest] == labels[best]))]
    return np.array(kept, np.int64)


def timed(sessions: dict[str, Any], images: Any, seconds: float) -> dict[str, list[float]]:
    """Return seconds of every call of every session, timed in turns so that drift hits all."""
    for session in sessions.values():
        for _ in range(10):
            session.run(images)
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < end:
        for name, session in sessions.items():
            session.run(images)  # not counted: fills the caches after another network
            for _ in range(CALLS):
                start = time.perf_counter()
                session.run(images)
                spent[name].append(time.perf_counter() - start)
    return spent


def print_rows(rows: list[list[str]]) -> None:
    """Print ``rows`` in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())  # noqa: B905 - 3.8


def parity_of(
    answers: Any, host: Any, labels: Any, precision: str, bundle: dict[str, Any]
) -> dict[str, Any]:
    """Return how far answers are from the host's: boxes as sets, all others place by place."""
    form, options = bundle["answer"]["form"], bundle["answer"]["options"]
    if form == "boxes" and answers.ndim == 3 and np.isfinite(answers).all():
        classes = len(bundle["labels"])
        here, there = ([detected(e, classes, options) for e in each] for each in (answers, host))
        if all(each is not None for each in [*here, *there]):
            return compare_boxes(here, there, precision, options)
    return compare_with_host(answers, host, labels, precision, form in DECIDED)


def measured_networks(
    bundle: dict[str, Any], kind: type[Any], batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Return one result for each network that suits the runtime."""
    sample = np.load(os.path.join(HERE, "sample.npz"))
    images = sample["images"]
    labels = sample["labels"] if "labels" in sample.files else None
    fitting = [m for m in bundle["models"] if m["target"] in (None, *kind.forms[:1])]
    sessions: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    for model in fitting:
        started = time.perf_counter()
        session = kind(os.path.join(HERE, model["file"]), batch)
        built = time.perf_counter() - started
        whole = range(0, len(images) // batch * batch, batch)
        runs = (session.run(images[i : i + batch]) for i in whole)
        answers = np.concatenate([joined(session.outputs, outputs) for outputs in runs])
        host = sample["answers_" + model["name"]][: len(answers)]
        known = None if labels is None else labels[: len(answers)]
        found = parity_of(answers, host, known, model["precision"], bundle)
        sessions[model["name"]] = session
        results.append(dict(model, load_s=built, device=session.device, batch=batch, **found))
    spent = timed(sessions, images[:batch], seconds)
    first = np.median(spent[fitting[0]["name"]])
    for result in results:
        calls = np.array(spent[result["name"]])
        result["latency_ms_p50"] = float(np.median(calls) * 1e3)
        result["latency_ms_p99"] = float(np.percentile(calls, 99) * 1e3)
        result["speedup"] = float(first / np.median(calls))
        result["speedup_ci95"] = speedup_interval(spent[fitting[0]["name"]], spent[result["name"]])
    return results


def speedup_interval(first: list[float], own: list[float]) -> list[float]:
    """Return the ends of the 95 % bootstrap interval of a speed-up, of turns drawn in pairs."""
    pairs = np.stack([np.reshape(calls, (-1, CALLS)) for calls in (first, own)])
    random = np.random.default_rng(0)
    drawn = (pairs[:, random.integers(len(pairs[0]), size=len(pairs[0]))] for _ in range(DRAWS))
    ratios = [float(np.divide(*np.median(each, axis=(1, 2)))) for each in drawn]
    return [float(end) for end in np.percentile(ratios, (2.5, 97.5))]


def speedup_of(result: dict[str, Any]) -> str:
    """Return a speed-up as it is printed: its interval where no one number tells it."""
    low, high = result["speedup_ci95"]
    return f"{low:.2g}..{high:.2g}x" if high > LOOSE * low else f"{result['speedup']:.2f}x"


def table_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows that are printed; what is known of no network has no column."""
    shares = {"top1_pct": "top-1 %", "agreement_with_host_pct": "as on host %"}
    if any(r["agreement_with_host_pct"] is None for r in results):
        shares["sqnr_to_host_db"] = "to host, dB"
    shares = {k: name for k, name in shares.items() if any(r[k] is not None for r in results)}
    boxes = ["boxes with partner"] if any("boxes" in r for r in results) else []
    rows = [["network", "precision", "p50 ms", "p99 ms", "speedup", *shares.values(), *boxes, ""]]
    for r in results:
        numbers = [f"{r[key]:.3f}" for key in ("latency_ms_p50", "latency_ms_p99")]
        numbers.append(speedup_of(r))
        told = ["-" if r[key] is None else f"{r[key]:.1f}" for key in shares]
        if boxes:
            told.append(f"{r['boxes_with_partner']} of {r['boxes']}" if "boxes" in r else "-")
        verdict = "ok" if r["parity"] else "DIFFERS FROM THE HOST"
        rows.append([r["name"], r["precision"], *numbers, *told, verdict])
    return rows


def main() -> int:
    """Read the bundle, build, check, measure, print, and leave results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each network")
    wanted = parser.parse_args()
    try:
        bundle = read_bundle()
        if not 1 <= wanted.batch <= bundle["images"]:
            raise DeviceError("--batch must be from 1 to " + str(bundle["images"]))
        kind = chosen_runtime(wanted.runtime)
        results = measured_networks(bundle, kind, wanted.batch, wanted.seconds)
    except DeviceError as error:
        sys.stderr.write(str(error) + "\n")
        return 2
    rows = table_of(results)
    print_line(f"{bundle['name']}: {kind.name} on {results[0]['device']}, batch {wanted.batch}")
    print_rows(rows)
    with open(os.path.join(HERE, "results.json"), "w", encoding="utf-8") as file:
        json.dump({"runtime": kind.name, "results": results}, file, indent=2)
    return 0 if all(r["parity"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
