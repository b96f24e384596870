"""Speed of int8 over fp32 on CPU runtimes: our graphs against those of ONNX Runtime and NNCF.

    python benchmarks/int8_speed.py [--networks resnet18,mobilenet_v2,densenet121,efficientnet_b0]

Networks have random weights (speed does not depend on them) and BatchNorm statistics of noise,
without which activations vanish in deep ones; 224 x 224, batch 1 and 8. All graphs
of a network are timed in the same rounds (``compress.measure.bench``): medians, and the interval of
the ratio to fp32. Convolutions that the runtime left in float are counted in ONNX Runtime's
optimized graph. A graph that the runtime cannot run is listed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import int8_peers
import numpy as np
import onnx

from compress import environment
from compress.errors import CompressError
from compress.measure import Bench, Timing, bench
from compress.quantize import quantize_onnx
from compress.runtimes import open_session

NETWORKS = "resnet18,mobilenet_v2,densenet121,efficientnet_b0"
RUNTIMES = ("onnxruntime", "openvino")


def export(name: str, path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(16, 3, 224, 224))
    model.eval()
    torch.onnx.export(
        model, (torch.zeros(2, 3, 224, 224),), str(path), dynamo=True, input_names=["input"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False, verbose=False,
    )  # fmt: skip


def convolutions(path: Path) -> tuple[int, int]:
    """Return how many convolutions ONNX Runtime runs in int8, and how many in float."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    return kinds.count("QLinearConv"), sum(k in ("Conv", "FusedConv") for k in kinds)


def survives(path: Path, runtime: str) -> bool:
    """Return whether a process of its own can run the graph: OpenVINO crashes on some of them.

    An error that the runtime reports is told by ``race``, in its words.
    """
    probe = (
        "import sys, numpy as np; from compress.runtimes import open_session\n"
        "session = open_session(sys.argv[1], sys.argv[2], threads=1, batch=1)\n"
        "session.run(np.zeros((1, 3, 224, 224), np.float32))"
    )
    command = [sys.executable, "-c", probe, str(path), runtime]
    return subprocess.run(command, capture_output=True, check=False).returncode >= 0


def race(paths: dict[str, Path], runtime: str, batch: int, threads: int, seconds: float) -> Bench:
    """Time all graphs in the same rounds, fp32 first; those that do not run are skipped."""
    x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sessions = {}
        for name, path in paths.items():
            if not survives(path, runtime):
                skipped[name] = "the runtime crashes"
                continue
            try:
                session = stack.enter_context(
                    open_session(path, runtime, threads=threads, batch=batch)
                )
                session.run(x)
            except CompressError as error:
                skipped[name] = str(error)
            else:
                sessions[name] = session
        found = bench(sessions, [x], timing=Timing(seconds=seconds))
    return Bench(found.latencies, skipped | found.skipped, found.conditions, found.method)


def graphs_of(name: str, folder: Path) -> dict[str, Path]:
    """Return the graphs of a network by who made them; those already in ``folder`` are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    fp32 = folder / "fp32.onnx"
    paths = {"fp32": fp32}
    images = np.random.default_rng(1).standard_normal((16, 3, 224, 224)).astype(np.float32)
    if not fp32.exists():
        export(name, fp32)
    for target in ("onnxruntime", "openvino", "tensorrt"):
        out = paths[f"ours {target}"] = folder / f"{target}.onnx"
        if not out.exists():
            quantize_onnx(fp32, [images], out, target, method="plain")
    for peer in ("ort defaults", "ort tuned", "nncf"):
        out = paths[peer] = folder / f"{peer}.onnx"
        if not out.exists():
            int8_peers.quantize_by(peer, fp32, images, out)
    return paths


def table(rows: list[dict]) -> str:
    lines = [
        "| network | runtime | batch | graph | ms, median | speed-up over fp32 (95 %) | "
        "Convs int8 / float |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for r in rows:
        counted = f"{r['convs_int8']} / {r['convs_float']}" if "convs_int8" in r else ""
        start = f"| {r['network']} | {r['runtime']} | {r['batch']} | {r['graph']} |"
        if "fails" in r:
            lines.append(f"{start} does not run | | |")
            continue
        ratio = "1.00"
        if r["speedup_ci95"]:
            low, high = r["speedup_ci95"]
            ratio = f"{r['speedup']:.2f} ({low:.2f}..{high:.2f})"
        lines.append(f"{start} {r['latency_ms_p50']:.2f} | {ratio} | {counted} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed calls, each graph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--graphs", type=Path, help="folder to make graphs in, or to find them")
    parser.add_argument("--make-only", action="store_true", help="make the graphs, time nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for network in options.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            paths = graphs_of(network, (options.graphs or Path(folder)) / network)
            cases = () if options.make_only else itertools.product(RUNTIMES, (1, 8))
            for runtime, batch in cases:
                found = race(paths, runtime, batch, options.threads, options.seconds)
                about = {"network": network, "runtime": runtime, "batch": batch}
                rows += [about | {"graph": n, "fails": why} for n, why in found.skipped.items()]
                for name, latency in found.items():
                    row = about | {"graph": name, "latency_ms_p50": latency.latency_ms_p50}
                    row |= {"speedup": latency.speedup, "speedup_ci95": latency.speedup_ci95}
                    if runtime == "onnxruntime" and name != "fp32":
                        row["convs_int8"], row["convs_float"] = convolutions(paths[name])
                    rows.append(row)
                    print(row, flush=True)
    if options.make_only:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment.describe_machine(),
        "threads": options.threads,
        "seconds": options.seconds,
        "rows": rows,
    }
    (options.out / "int8_speed.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "int8_speed.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
