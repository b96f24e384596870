"""Int8 of every torchvision classification CNN for every target: valid, loaded, without findings.

    python benchmarks/int8_coverage.py [--only resnet] [--skip NAME] [--size 64]

Networks that benchmarks/results/int8_coverage.json already holds are left out.

Each network has random weights and random BatchNorm statistics and is quantized with ranges alone
("plain"), on 8 images of noise: what is looked at is the structure of the graphs, not their
accuracy. Of each target's graph: ONNX's checker with shape inference (the writer runs it); that
ONNX Runtime loads and runs it at two batch sizes; the signal-to-noise ratio of its answers against
fp32 on other images; findings of ``compress lint``; for onnxruntime the weighted ops that are fused
into integer kernels and those that are not; for tensorrt what the parser of tensorrt-rtx says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import onnx
from export_torchvision import network, networks

from compress.export import export_onnx
from compress.qdq import TARGETS, read_onnx
from compress.qdq.lint import lint_onnx
from compress.quantize import quantize_targets
from compress.quantize.sessions import answers, session_of, sqnr_db

RESULTS = Path(__file__).parent / "results" / "int8_coverage.json"
FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")
INT8_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
SMALLEST = {"inception_v3": 96}


def noise(count: int, size: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, 3, size, size)).astype(np.float32)


def parser_warnings(path: Path) -> list[str]:
    """Return what the parser of tensorrt-rtx says about a graph, warnings and worse."""
    import tensorrt_rtx as trt

    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: object, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:  # type: ignore[operator]
                said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    parsed = builder.create_network(0)  # the parser does not keep it alive
    parser = trt.OnnxParser(parsed, logger)
    if not parser.parse_from_file(str(path)):
        said += [str(parser.get_error(i)) for i in range(parser.num_errors)]
    return said


def kernels(path: Path, folder: Path) -> dict[str, int]:
    """Return how many weighted ops ONNX Runtime runs in int8, and how many in float."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return {
        "int8_kernels": sum(kind in INT8_KERNELS for kind in kinds),
        "float_kernels": sum(kind in FLOAT_KERNELS for kind in kinds),
    }


def tried(name: str, size: int) -> dict[str, object]:
    """Return what became of one network."""
    size = max(size, SMALLEST.get(name, 0))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        import torch

        model = network(name)
        example = torch.from_numpy(noise(1, size, 0))
        path = export_onnx(model, example, folder / "fp32.onnx")
        del model
        started = time.process_time()
        outs = {target: folder / f"{target}.onnx" for target in TARGETS}
        plans = quantize_targets(path, [noise(8, size, 1)], outs, "plain")
        row: dict[str, object] = {"quantize_cpu_s": round(time.process_time() - started, 1)}
        feed = {"input": noise(4, size, 2)}
        fp32 = read_onnx(path)
        feed = {fp32.graph.input[0].name: feed["input"]}
        reference = answers(fp32, feed)
        del fp32
        for target, out in outs.items():
            row[target] = looked_at(target, out, feed, reference, folder)
            row[target]["float"] = dict(plans[target].float_nodes)
    return row


def looked_at(
    target: str, path: Path, feed: dict, reference: list[np.ndarray], folder: Path
) -> dict:
    written = onnx.load(str(path))
    found = {"sqnr_db": round(sqnr_db(reference, answers(written, feed)), 1)}
    session = session_of(written)
    for count in (1, 3):
        session.run(None, {name: array[:count] for name, array in feed.items()})
    findings = lint_onnx(path, target=target)
    found["findings"] = sorted({f"{finding.rule}: {finding.node}" for finding in findings})
    if target == "onnxruntime":
        found |= kernels(path, folder)
    if target == "tensorrt":
        found["parser_says"] = parser_warnings(path)
    return found


def table(rows: dict[str, dict]) -> str:
    heads = ("network", "SQNR dB, 3 targets", "findings", "ORT int8 / float kernels", "parser")
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|---|"]
    for name, row in sorted(rows.items()):
        if "fails" in row:
            lines.append(f"| {name} | fails: {row['fails'].splitlines()[-1]} | | | |")
            continue
        parts = [row[target] for target in TARGETS]
        sqnr = " ".join(f"{part['sqnr_db']:.0f}" for part in parts)
        count = sum(len(part["findings"]) for part in parts)
        ort, said = row["onnxruntime"], row["tensorrt"]["parser_says"]
        counted = f"{ort['int8_kernels']} / {ort['float_kernels']}"
        lines.append(f"| {name} | {sqnr} | {count} | {counted} | {len(said) or 'silent'} |")
    clean = sum(is_clean(row) for row in rows.values())
    return "\n".join([f"{clean} of {len(rows)} networks without a fault.", "", *lines]) + "\n"


def is_clean(row: dict) -> bool:
    """Return whether nothing failed and no linter or parser had anything to say."""
    if "fails" in row or row["tensorrt"]["parser_says"]:
        return False
    return not any(row[target]["findings"] for target in TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="-")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--again", action="store_true", help="try those that were not clean again")
    options = parser.parse_args()
    rows: dict[str, dict] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in networks():
        done = name in rows and (is_clean(rows[name]) or not options.again)
        if done or options.only not in name or options.skip in name:
            continue
        try:
            rows[name] = tried(name, options.size)
        except Exception:  # noqa: BLE001 - whatever it is, it is a result
            rows[name] = {"fails": traceback.format_exc(limit=-3)}
        print(name, json.dumps(rows[name]), flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
