"""Two runs of bench differ by less than 5 % in the ratio, and one takes less than 30 s.

    python benchmarks/bench_stability.py [--runs 2] [--folder DIR] [--threads N]

ResNet-18 with random weights at 224 x 224, batch 1, fp32 and int8, on ONNX Runtime and OpenVINO:
four sessions in the same rounds, opened anew for each run. Written to
benchmarks/results/bench_stability.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: TID253 - this script measures one of its networks

from compress import environment
from compress.export import export_onnx
from compress.measure import Bench, bench
from compress.quantize import quantize_onnx
from compress.runtimes import open_session

RESULTS = Path(__file__).parent / "results" / "bench_stability.json"
SHAPE = (1, 3, 224, 224)
RUNTIMES = ("onnxruntime", "openvino")


def artifacts(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return file and runtime of each session by name, making the files that are not there."""
    fp32 = folder / "resnet18.onnx"
    if not fp32.is_file():
        torch.manual_seed(0)
        export_onnx(torchvision.models.resnet18().eval(), torch.randn(SHAPE), fp32)
    found = {f"fp32 {runtime}": (fp32, runtime) for runtime in RUNTIMES}
    images = [np.random.default_rng(0).normal(size=(8, *SHAPE[1:])).astype(np.float32)]
    for runtime in RUNTIMES:
        int8 = folder / f"resnet18.{runtime}.onnx"
        if not int8.is_file():
            quantize_onnx(fp32, images, int8, target=runtime, method="plain")
        found[f"int8 {runtime}"] = (int8, runtime)
    return found


def one_run(entries: dict[str, tuple[Path, str]], threads: int | None) -> tuple[Bench, float]:
    """Return what one run of bench measured, and the seconds it took, loading included."""
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(open_session(path, runtime, threads=threads, batch=1))
            for name, (path, runtime) in entries.items()
        }
        return bench(sessions, [image]), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Keep the artifacts here")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        entries = artifacts(given.folder or Path(temporary))
        runs = [one_run(entries, given.threads) for _ in range(given.runs)]
    rows = []
    print(f"{'session':20}  {'p50 ms, each run':32}  {'ratio, each run':24}  largest difference")
    for name in entries:
        latencies = [run[name] for run, _ in runs]
        ratios = [latency.speedup or 1.0 for latency in latencies]
        apart = max((max(a, b) / min(a, b) - 1 for a, b in combinations(ratios, 2)), default=0.0)
        rows.append(
            {
                "session": name,
                "latency_ms_p50": [latency.latency_ms_p50 for latency in latencies],
                "speedup": ratios,
                "speedup_ci95": [latency.speedup_ci95 for latency in latencies],
                "largest_difference_pct": 100 * apart,
            }
        )
        milliseconds = " ".join(f"{latency.latency_ms_p50:7.2f}" for latency in latencies)
        shown = " ".join(f"{ratio:6.3f}" for ratio in ratios)
        print(f"{name:20}  {milliseconds:32}  {shown:24}  {100 * apart:.2f} %")
    print("seconds of each run: " + ", ".join(f"{seconds:.1f}" for _, seconds in runs))
    content = {
        "rows": rows,
        "seconds": [seconds for _, seconds in runs],
        "method": runs[0][0].method,
        "conditions": [run.conditions for run, _ in runs],
        **environment.describe_machine(Path(__file__).parent),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
