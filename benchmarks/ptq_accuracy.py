"""Accuracy of int8 on CIFAR-10: ours for each target against ONNX Runtime's quantizer and NNCF.

    python benchmarks/networks_for_int8.py --cifar10 FILE.npz --out DIR --checkpoints FOLDER
    python benchmarks/ptq_accuracy.py --cifar10 FILE.npz --networks DIR [--images 10000]

Top-1 with a Wilson interval, agreement with fp32, and SQNR of the logits, on test images;
calibration on 512 training images, the same for all. Graphs for ONNX Runtime (ours and the peers')
run on its integer kernels; the TensorRT and OpenVINO forms in plain float Q/DQ arithmetic. NNCF's
graph is also read as TensorRT reads it: uint8 as int8 with the same scale.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import warnings
from pathlib import Path

import int8_peers
import numpy as np
import onnx

from compress import environment
from compress.quantize import quantize_onnx
from compress.quantize.sessions import answers, sqnr_db

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION = 512


def normalize(images: np.ndarray) -> np.ndarray:
    """Return uint8 (B, H, W, C) as standardized float32 (B, C, H, W)."""
    scaled = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, percent."""
    z, p = 1.96, hits / count
    middle = (p + z * z / 2 / count) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / 2 / count) ** 2)
    return 100 * (middle - half), 100 * (middle + half)


def read_as_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose uint8 pairs are int8 with the same scale and zero point 0."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = constants[node.input[2]]
            if zero.data_type == onnx.TensorProto.UINT8:
                value = np.zeros(tuple(zero.dims), np.int8)
                zero.CopyFrom(onnx.numpy_helper.from_array(value, zero.name))
    del model.graph.value_info[:]  # it says uint8
    return model


def measure(
    name: str,
    model: onnx.ModelProto,
    feed: dict,
    labels: np.ndarray,
    reference: list,
    kernels: bool,
) -> dict:
    found = answers(model, feed, target="onnxruntime" if kernels else None)
    chosen = found[0].argmax(1)
    hits = int((chosen == labels).sum())
    low, high = wilson(hits, len(labels))
    row = {
        "graph": name,
        "top1_pct": round(100 * hits / len(labels), 2),
        "top1_ci95": [round(low, 2), round(high, 2)],
        "agreement_pct": round(100 * float((chosen == reference[0].argmax(1)).mean()), 2),
        "sqnr_db": round(sqnr_db(reference, found), 2) if found is not reference else None,
    }
    print(row, flush=True)
    return row


def compare(path: Path, calibration: np.ndarray, feed: dict, labels: np.ndarray) -> list[dict]:
    """Return one row for each graph made of the network in ``path``."""
    original = onnx.load(str(path))
    reference = answers(original, feed)
    rows = [measure("fp32", original, feed, labels, reference, False)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        batches = np.array_split(calibration, len(calibration) // 64)
        for target in ("onnxruntime", "openvino", "tensorrt"):
            plan = quantize_onnx(path, batches, out, target=target)
            kernels = target == "onnxruntime"
            row = measure(f"ours {target}", onnx.load(str(out)), feed, labels, reference, kernels)
            rows.append({**row, "notes": list(plan.notes)})
        for peer in int8_peers.PEERS:
            int8_peers.quantize_by(peer, path, calibration, out)
            kernels = peer != "ort tensorrt form"
            written = onnx.load(str(out))
            rows.append(measure(peer, written, feed, labels, reference, kernels))
            if peer == "nncf":
                read = read_as_tensorrt(written)
                rows.append(
                    measure("nncf as TensorRT reads it", read, feed, labels, reference, False)
                )
    return rows


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        "| network | graph | top-1 % (95 %) | agreement with fp32 % | SQNR dB |",
        "|---|---|--:|--:|--:|",
    ]
    for network, rows in results.items():
        for r in rows:
            low, high = r["top1_ci95"]
            sqnr = "" if r["graph"] == "fp32" else f"{r['sqnr_db']:.1f}"
            lines.append(
                f"| {network} | {r['graph']} | {r['top1_pct']:.2f} ({low:.2f} to {high:.2f}) |"
                f" {r['agreement_pct']:.2f} | {sqnr} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--networks", type=Path, required=True, help="folder of ONNX files")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", help="this network; the results of others are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with np.load(options.cifar10) as data:
        chosen = np.random.default_rng(0).permutation(len(data["x_train"]))[:CALIBRATION]
        calibration = normalize(data["x_train"][chosen])
        feed = {"input": normalize(data["x_test"][: options.images])}
        labels = data["y_test"][: options.images].reshape(-1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "ptq_accuracy.json"
    about = {"images": options.images, "calibration": CALIBRATION}
    known = json.loads(file.read_text()) if file.exists() else {}
    results = known["networks"] if known.items() >= about.items() else {}
    for path in sorted(options.networks.glob(f"{options.only or '*'}.onnx")):
        print(path.stem, flush=True)
        results[path.stem] = compare(path, calibration, feed, labels)
        file.write_text(
            json.dumps(
                {"environment": environment.describe_machine(), **about, "networks": results},
                indent=1,
            )
            + "\n"
        )
        (options.out / "ptq_accuracy.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
