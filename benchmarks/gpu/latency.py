"""Latency on a GPU: PyTorch in all its modes, ONNX Runtime, and engines built on this machine.

    python benchmarks/gpu/latency.py --network resnet50 --batch 8 --json FILE --work DIR

All sessions are timed in turns in one run; the first, PyTorch eager in fp32, is what the others
are compared with. What cannot be built or loaded here is in the result with what it said, such as
TensorRT-RTX on a GPU that is no RTX. With --rehearse all of it on the CPU, small and short: what
needs a GPU says so, and torch.compile is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compress
from compress.errors import CompressError
from compress.export import export_onnx
from compress.measure.latency import Timing, bench
from compress.quantize import quantize_onnx
from compress.runtimes import Session, build_engine, build_record, open_session
from compress.runtimes._fusion import check_fusion

PYTORCH: dict[str, dict[str, Any]] = {
    "pytorch eager fp32": {},
    "pytorch eager fp16": {"dtype": "float16"},
    "pytorch compiled fp32": {"compile": True},
    "pytorch compiled fp16": {"compile": True, "dtype": "float16"},
    "pytorch CUDA graph fp32": {"cuda_graph": True},
    "pytorch CUDA graph fp16": {"dtype": "float16", "cuda_graph": True},
}
ENGINES = ("tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")


class Entries:
    """Sessions that opened, and what the others said."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.sessions: dict[str, Session] = {}
        self.skipped: dict[str, str] = {}
        self.records: dict[str, Any] = {}
        self._stack = stack

    @contextlib.contextmanager
    def trying(self, label: str) -> Any:
        """Note what an attempt says when it fails."""
        try:
            yield
        except (CompressError, RuntimeError, AssertionError) as error:  # torch says it so
            self.skipped[label] = f"{type(error).__name__}: {error}"[:300]

    def add(self, label: str, artifact: Path | nn.Module, runtime: Any, **options: Any) -> None:
        """Open a session under a label."""
        with self.trying(label):
            session = open_session(artifact, runtime, **options)
            self.sessions[label] = self._stack.enter_context(session)


def add_engines(entries: Entries, files: dict[str, Path], work: Path, batch: int) -> None:
    """Build engines of every runtime and precision here, and open them."""
    for runtime in ENGINES:
        for precision in PRECISIONS:
            label = f"{runtime} {precision}"
            source = files["int8" if precision == "int8" else "fp32"]
            out = work / f"{precision}-{batch}.{runtime}"
            with entries.trying(label):
                engine = build_engine(
                    source, out, runtime=runtime, batch=batch, precision=precision
                )
                entries.records[label] = build_record(engine)
                if precision == "int8":
                    fusion = check_fusion(source, runtime, engine=engine)
                    entries.records[label]["int8_share"] = round(fusion.int8_share, 4)
                for graph in (False, True):
                    options = {runtime: {"cuda_graph": graph}}
                    entries.add(label + ", CUDA graph" * graph, engine, options)


def measured(model: nn.Module, files: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Time everything that opens, in turns."""
    device = "cpu" if given.rehearse else "cuda"
    with contextlib.ExitStack() as stack:
        entries = Entries(stack)
        for label, options in PYTORCH.items():
            if given.rehearse and options.get("compile"):
                entries.skipped[label] = "not rehearsed: compiling takes a minute"
                continue
            entries.add(label, model, {"pytorch": options}, device=device)
        if given.rehearse:
            entries.add("onnxruntime fp32, cpu", files["fp32"], "onnxruntime")
        for provider in ("cuda", "tensorrt"):
            label = f"onnxruntime fp32, {provider} provider"
            entries.add(label, files["fp32"], "onnxruntime", device=provider)
        add_engines(entries, files, given.work, given.batch)
        shape = (given.batch, 3, given.size, given.size)
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        result = bench(entries.sessions, [images], timing=Timing(seconds=given.seconds))
        return {
            "latencies": {label: found.to_json() for label, found in result.items()},
            "skipped": result.skipped | entries.skipped,
            "conditions": result.conditions,
            "records": entries.records,
        }


def onnx_files(model: nn.Module, given: argparse.Namespace) -> dict[str, Path]:
    """Export in fp32 and int8 once; later batches of the same network find the files there."""
    folder = given.work / f"{given.network.split(':')[-1]}-{given.size}"
    files = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "int8")}
    if not files["int8"].is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        count, shape = (2, (4, 3)) if given.rehearse else (4, (8, 3))
        images = [
            generator.normal(size=(*shape, given.size, given.size)).astype(np.float32)
            for _ in range(count)
        ]
        export_onnx(model, torch.from_numpy(images[0][:1]), files["fp32"])
        part = folder / "part.onnx"
        quantize_onnx(files["fp32"], images, part, target="tensorrt", method="plain")
        part.replace(files["int8"])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", default="torchvision:resnet50", help="MODEL, with random weights"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="side of the images; 224, or 32 in a rehearsal")
    parser.add_argument("--seconds", type=float, help="for each session")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    given.size = given.size or (32 if given.rehearse else 224)
    given.seconds = given.seconds or (0.02 if given.rehearse else 3.0)
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("there is no GPU here that PyTorch can use")
    torch.manual_seed(0)
    model = compress.load_model(given.network, num_classes=10).eval()
    found = measured(model, onnx_files(model, given), given)
    about = {"network": given.network, "batch": given.batch, "size": given.size}
    given.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
