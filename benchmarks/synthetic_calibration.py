"""What synthetic calibration images cost: ResNet-56 on CIFAR-10 in int8, real images against made.

    python benchmarks/synthetic_calibration.py --cifar10 FILE.npz --weights resnet56-4bfd9763.th

For each target one graph is calibrated on 512 training images, as by default, and one on 64 images
that were made from the network's BatchNorm statistics alone (ZeroQ, Cai et al. 2020). Top-1 on the
test images; the change has a paired 95 % interval. The graph for ONNX Runtime runs
on its integer kernels, the others in plain float Q/DQ arithmetic.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from ptq_accuracy import CALIBRATION, MEAN, STD, normalize

import compress
from compress import environment
from compress.data import load_data
from compress.quantize import quantize_onnx
from compress.quantize.sessions import answers
from compress.recipe.settings import DataSettings
from compress.statistics import accuracy_change_interval

TARGETS = ("onnxruntime", "openvino", "tensorrt")
MADE = 86  # of which the kind of data holds back every fourth as a test image
LIMIT = 0.3  # points of top-1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", required=True, type=Path, help="npz of uint8 images")
    parser.add_argument("--weights", required=True, help="checkpoint of ResNet-56")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    arrays = np.load(given.cifar10)
    model = compress.load_model("compress.models.cifar:resnet56", given.weights, 10)
    began = time.perf_counter()
    settings = DataSettings(
        name="synthetic", image_size=32, mean=MEAN, std=STD, validation=0.0, batch_size=64,
        options={"images": MADE},
    )  # fmt: skip
    made = next(load_data(settings, 0, lambda: model).batches("train"))[0].numpy()
    seconds = time.perf_counter() - began
    images, labels = normalize(arrays["x_test"][: given.images]), arrays["y_test"][: given.images]
    chosen = np.random.default_rng(0).permutation(len(arrays["x_train"]))[:CALIBRATION]
    calibration = {"real": normalize(arrays["x_train"][chosen]), "synthetic": made}
    with tempfile.TemporaryDirectory() as folder:
        path = compress.export_onnx(model, torch.zeros(1, 3, 32, 32), Path(folder) / "fp32.onnx")
        rows = measured(path, calibration, images, labels.reshape(-1))
    content = {
        "environment": environment.describe_machine(),
        "images": given.images,
        "calibration_images": {name: len(each) for name, each in calibration.items()},
        "seconds_to_make": round(seconds, 1),
        "limit_points": LIMIT,
        "rows": rows,
    }
    given.out.mkdir(exist_ok=True)
    file = given.out / "synthetic_calibration.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def measured(
    path: Path, calibration: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray
) -> list[dict]:
    """Return top-1 of fp32 and of each target calibrated in both ways."""
    original = onnx.load(str(path))
    feed = {original.graph.input[0].name: images}
    fp32 = answers(original, feed)[0].argmax(1) == labels
    rows = [{"target": "fp32", "top1_pct": round(100 * float(fp32.mean()), 2)}]
    for target in TARGETS:
        right = {}
        for name, given in calibration.items():
            out = path.with_name("int8.onnx")
            quantize_onnx(path, np.array_split(given, len(given) // 32), out, target=target)
            kernels = "onnxruntime" if target == "onnxruntime" else None
            right[name] = answers(onnx.load(str(out)), feed, target=kernels)[0].argmax(1) == labels
        row = {f"{name}_pct": round(100 * float(each.mean()), 2) for name, each in right.items()}
        bounds = accuracy_change_interval(right["real"], right["synthetic"])
        rows.append(
            {
                "target": target,
                **row,
                "change_points": round(row["synthetic_pct"] - row["real_pct"], 2),
                "change_ci95": [round(100 * end, 2) for end in bounds],
            }
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| target | top-1 %, real images | top-1 %, synthetic images | change, points (95 %) |",
        "|---|--:|--:|--:|",
        f"| fp32 | {rows[0]['top1_pct']:.2f} | | |",
    ]
    for row in rows[1:]:
        low, high = row["change_ci95"]
        change = f"{row['change_points']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"| {row['target']} | {row['real_pct']:.2f} | {row['synthetic_pct']:.2f} | {change} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
