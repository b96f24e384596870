"""Latency on a GPU: PyTorch in all its modes, and whatever engines this machine can build and run.

    python benchmarks/gpu_runtimes.py [--network resnet50] [--batches 1,8] [--seconds 3]

All sessions are timed in turns in one run; the first, PyTorch eager in fp32, is what the others
are compared with. What cannot be built or loaded here is in the table with what it said, such as
TensorRT-RTX on a GPU that is no RTX. Written to benchmarks/results/gpu_runtimes.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: TID253 - the networks are its
from torch import nn

from compress.errors import CompressError
from compress.export import export_onnx
from compress.fusion import check_fusion
from compress.measure.latency import Timing, bench
from compress.quantize import quantize_onnx
from compress.runtimes import Session, build_engine, build_record, open_session
from compress.runtimes.tensorrt import driver_version

RESULTS = Path(__file__).parent / "results" / "gpu_runtimes.json"
SIZE = 224

PYTORCH: dict[str, dict[str, Any]] = {
    "pytorch fp32": {},
    "pytorch fp16": {"dtype": "float16"},
    "pytorch fp32, CUDA graph": {"cuda_graph": True},
    "pytorch fp16, CUDA graph": {"dtype": "float16", "cuda_graph": True},
    "pytorch fp32, compiled": {"compile": True},
    "pytorch fp16, compiled": {"compile": True, "dtype": "float16"},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.eval()


def engines(
    files: dict[str, Path], folder: Path, batch: int, stack: contextlib.ExitStack
) -> tuple[dict[str, Session], dict[str, str], dict[str, Any]]:
    """Return engines that run here by label, what the others said, and the build records."""
    sessions: dict[str, Session] = {}
    silent: dict[str, str] = {}
    records: dict[str, Any] = {}
    for device in ("cuda", "tensorrt"):
        label = f"onnxruntime fp32, {device} provider"
        try:
            session = open_session(files["fp32"], "onnxruntime", device=device)
            sessions[label] = stack.enter_context(session)
        except CompressError as error:
            silent[label] = str(error)
    for runtime in ("tensorrt", "tensorrt-rtx"):
        for precision in ("fp32", "fp16", "int8"):
            label = f"{runtime} {precision}"
            source = files["int8" if precision == "int8" else "fp32"]
            try:
                engine = build_engine(
                    source,
                    folder / f"{precision}-{batch}.{runtime}",
                    runtime=runtime,
                    batch=batch,
                    precision=precision,
                )
                records[label] = build_record(engine)
                if precision == "int8":
                    fusion = check_fusion(source, runtime, engine=engine)
                    records[label]["fusion"] = fusion.sentence()
                for graph in (False, True):
                    session = open_session(engine, {runtime: {"cuda_graph": graph}})
                    sessions[label + ", CUDA graph" * graph] = stack.enter_context(session)
            except CompressError as error:
                silent[label] = str(error)
    return sessions, silent, records


def measured(
    model: nn.Module, files: dict[str, Path], batch: int, seconds: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {
            label: stack.enter_context(open_session(model, {"pytorch": options}, device="cuda"))
            for label, options in PYTORCH.items()
        }
        built, silent, records = engines(files, Path(name), batch, stack)
        images = np.random.default_rng(0).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)
        result = bench(sessions | built, [images], timing=Timing(seconds=seconds))
        return {
            "latencies": {label: found.to_json() for label, found in result.items()},
            "skipped": result.skipped | silent,
            "conditions": result.conditions,
            "records": records,
        }


def table(rows: dict[str, Any]) -> str:
    text = "| session | batch | ms | device ms | speed-up |\n|---|--:|--:|--:|--:|\n"
    for batch, row in rows.items():
        for label, found in row["latencies"].items():
            device = found.get("device_latency_ms_p50")
            speedup = found.get("speedup") or 1
            text += (
                f"| {label} | {batch} | {found['latency_ms_p50']:.3f} | "
                f"{'' if device is None else f'{device:.3f}'} | {speedup:.2f}x |\n"
            )
        for label, reason in row["skipped"].items():
            text += f"| {label} | {batch} | not measured: {reason} | | |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--seconds", type=float, default=3.0)
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here that PyTorch can use")
    model = network(wanted.network)
    generator = np.random.default_rng(0)
    images = [generator.normal(size=(8, 3, SIZE, SIZE)).astype(np.float32) for _ in range(4)]
    with tempfile.TemporaryDirectory() as name:
        example = torch.from_numpy(images[0][:1])
        files = {"fp32": export_onnx(model, example, Path(name, "fp32.onnx"))}
        files["int8"] = Path(name, "int8.onnx")
        quantize_onnx(files["fp32"], images, files["int8"], target="tensorrt", method="plain")
        rows = {
            size: measured(model, files, int(size), wanted.seconds)
            for size in wanted.batches.split(",")
        }
    about = {
        "network": wanted.network,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": about, "batches": rows}, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    text = f"# GPU runtimes\n\n`python benchmarks/gpu_runtimes.py`; {facts}.\n\n{table(rows)}"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
