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
FLOAT_TOLERANCE = 0.02  # largest difference, relative to the largest logit; tf32 and fp16 fit
INT8_AGREEMENT = 0.9  # smallest share of images with the same answer as on the host
BOX = 4  # numbers of a box, before its scores
INT8_SQNR_DB = 15.0  # smallest ratio of answers to their difference, where none names a class


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

        preferred = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        present = onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # without it, CPUs without VNNI overflow in int8; elsewhere it changes nothing
        options.add_session_config_entry("session.x64quantprecision", "1")
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
    answers: Any, host: Any, labels: Any, precision: str, decided: bool = True, split: int = 0
) -> dict[str, Any]:
    """Return how far ``answers`` are from those of the host, and whether that is near enough.

    ``split`` is where scores begin behind boxes in pixels, which are compared by themselves: beside
    those they would not count. Where answers are ``decided``, the largest along the second
    dimension names the class of an image or a pixel: these are compared, and with ``labels`` (None:
    not known) as well.
    """
    parts = [slice(split), slice(split, None)] if split else [slice(None)]
    pairs = [(answers[:, p], host[:, p].astype(np.float64)) for p in parts if host[:, p].size]
    gap = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)
    sqnr = min(
        10 * np.log10(max(np.mean(b**2), 1e-30) / max(np.mean((a - b) ** 2), 1e-30))
        for a, b in pairs
    )
    agreement = float((answers.argmax(1) == host.argmax(1)).mean()) if decided else None
    alike = sqnr >= INT8_SQNR_DB if agreement is None else agreement >= INT8_AGREEMENT
    near = alike if precision == "int8" else gap <= FLOAT_TOLERANCE
    return {
        "difference_from_host": gap,
        "sqnr_to_host_db": float(sqnr),
        "agreement_with_host_pct": None if agreement is None else 100 * agreement,
        "top1_pct": None if labels is None else 100 * float((answers.argmax(1) == labels).mean()),
        "parity": bool(near and np.isfinite(answers).all()),
    }


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
            for _ in range(5):
                start = time.perf_counter()
                session.run(images)
                spent[name].append(time.perf_counter() - start)
    return spent


def print_rows(rows: list[list[str]]) -> None:
    """Print ``rows`` in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())  # noqa: B905 - 3.8


def measured_networks(
    bundle: dict[str, Any], kind: type[Any], batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Return one result for each network that suits the runtime."""
    sample = np.load(os.path.join(HERE, "sample.npz"))
    images = sample["images"]
    labels = sample["labels"] if "labels" in sample.files else None
    fitting = [m for m in bundle["models"] if m["target"] in (None, *kind.forms[:1])]
    answer = bundle["answer"]
    in_pixels = answer["form"] == "boxes" and not answer["options"]["nms_in_graph"]
    sessions: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    for model in fitting:
        started = time.perf_counter()
        session = kind(os.path.join(HERE, model["file"]), batch)
        built = time.perf_counter() - started
        whole = range(0, len(images) // batch * batch, batch)
        answers = np.concatenate([session.run(images[i : i + batch])[0] for i in whole])
        host = sample["answers_" + model["name"]][: len(answers)]
        known = None if labels is None else labels[: len(answers)]
        split = BOX if in_pixels and answers.shape[1] < answers.shape[2] else 0  # else by places
        found = compare_with_host(
            answers, host, known, model["precision"], "decided" in sample.files, split
        )
        sessions[model["name"]] = session
        results.append(dict(model, load_s=built, device=session.device, batch=batch, **found))
    spent = timed(sessions, images[:batch], seconds)
    first = np.median(spent[fitting[0]["name"]])
    for result in results:
        calls = np.array(spent[result["name"]])
        result["latency_ms_p50"] = float(np.median(calls) * 1e3)
        result["latency_ms_p99"] = float(np.percentile(calls, 99) * 1e3)
        result["speedup"] = float(first / np.median(calls))
    return results


def table_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows that are printed; what is known of no network has no column."""
    shares = {"top1_pct": "top-1 %", "agreement_with_host_pct": "as on host %"}
    if any(r["agreement_with_host_pct"] is None for r in results):
        shares["sqnr_to_host_db"] = "to host, dB"
    shares = {k: name for k, name in shares.items() if any(r[k] is not None for r in results)}
    rows = [["network", "precision", "p50 ms", "p99 ms", "speedup", *shares.values(), ""]]
    for r in results:
        numbers = [f"{r[key]:.3f}" for key in ("latency_ms_p50", "latency_ms_p99")]
        numbers.append(f"{r['speedup']:.2f}x")
        told = ["-" if r[key] is None else f"{r[key]:.1f}" for key in shares]
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
