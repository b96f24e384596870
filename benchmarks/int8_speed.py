"""Speed of int8 over fp32 on CPU runtimes: our graphs against those of ONNX Runtime and NNCF.

    python benchmarks/int8_speed.py [--networks resnet18,mobilenet_v2,densenet121] [--rounds 30]

Networks have random weights (speed does not depend on them), 224 x 224, batch 1 and 8. All graphs
of a network are timed in turns within each round, so that a change of the machine's load meets all
of them; the figure is the smallest time of each. Convolutions that the runtime left in float are
counted in ONNX Runtime's optimized graph. A graph that the runtime cannot run is listed as such.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import int8_peers
import numpy as np
import onnx

from compress.quantize import quantize_onnx

NETWORKS = "resnet18,mobilenet_v2,densenet121"
Run = Callable[[np.ndarray], object]


def export(name: str, path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    torch.onnx.export(
        model, (torch.zeros(2, 3, 224, 224),), str(path), dynamo=True, input_names=["input"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False, verbose=False,
    )  # fmt: skip


def open_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"input": x})


def open_openvino(path: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: request.infer({0: x})


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


def runnable(paths: dict[str, Path], opener: Callable[[Path, int], Run], threads: int) -> dict:
    """Return what runs each graph, or the first line of the error that it gives."""
    x = np.zeros((1, 3, 224, 224), np.float32)
    found: dict[str, Run | str] = {}
    for name, path in paths.items():
        try:
            found[name] = opener(path, threads)
            found[name](x)
        except Exception as error:  # noqa: BLE001 - each runtime has errors of its own
            found[name] = str(error).splitlines()[0]
    return found


def race(runs: dict[str, Run], batch: int, rounds: int) -> dict[str, float]:
    """Return the least milliseconds of each, timed in turns."""
    x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    for run in runs.values():
        run(x)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


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
        "| network | runtime | batch | graph | ms | speed-up over fp32 | Convs int8 / float |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for r in rows:
        counted = f"{r['convs_int8']} / {r['convs_float']}" if "convs_int8" in r else ""
        if "fails" in r:
            lines.append(f"| {r['network']} | {r['runtime']} | | {r['graph']} | does not run | | |")
            continue
        lines.append(
            f"| {r['network']} | {r['runtime']} | {r['batch']} | {r['graph']} |"
            f" {r['latency_ms_min']:.2f} | {r['speedup']:.2f} | {counted} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--graphs", type=Path, help="folder to make graphs in, or to find them")
    parser.add_argument("--make-only", action="store_true", help="make the graphs, time nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    openers = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
    for network in options.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            paths = graphs_of(network, (options.graphs or Path(folder)) / network)
            for runtime, opener in openers.items() if not options.make_only else ():
                found = runnable(paths, opener, options.threads)
                runs = {name: run for name, run in found.items() if not isinstance(run, str)}
                for name in found.keys() - runs.keys():
                    row = {"network": network, "runtime": runtime, "graph": name}
                    rows.append({**row, "fails": found[name]})
                for batch in (1, 8):
                    for name, best in (times := race(runs, batch, options.rounds)).items():
                        row = {"network": network, "runtime": runtime, "batch": batch}
                        row |= {"graph": name, "latency_ms_min": round(best, 3)}
                        row["speedup"] = round(times["fp32"] / best, 3)
                        if runtime == "onnxruntime" and name != "fp32":
                            row["convs_int8"], row["convs_float"] = convolutions(paths[name])
                        rows.append(row)
                        print(row, flush=True)
    if options.make_only:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"threads": options.threads, "rounds": options.rounds, "rows": rows}
    (options.out / "int8_speed.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "int8_speed.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
