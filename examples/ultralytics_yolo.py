"""Prune YOLO11n, fine-tune it with Ultralytics' own trainer, save, reload, export, int8.

python examples/ultralytics_yolo.py DATA.yaml OUT
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import nn

import compress
from compress.data import load_data, parse_reference

REFERENCE = "ultralytics:yolo11n.yaml"
OUTPUTS = ("0", "1.boxes", "1.scores")  # what counts; the feature maps beside them may shrink


def fine_tuned(small: nn.Module, data: Path, out: Path, size: int, epochs: int) -> nn.Module:
    """Return ``small`` after Ultralytics' training; its EMA, as they ship it."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    class PrunedTrainer(DetectionTrainer):
        def get_model(self, *_: Any, **__: Any) -> nn.Module:
            return small  # theirs would build the network again, with all of its channels

    told = {"model": "yolo11n.yaml", "data": str(data), "imgsz": size, "epochs": epochs}
    place = {"project": str(out), "name": "train", "exist_ok": True, "workers": 0, "plots": False}
    trainer = PrunedTrainer(overrides={**told, **place, "batch": 8, "device": "cpu"})
    trainer.train()
    return trainer.ema.ema.float().eval()


def main(data: Path, out: Path, size: int, epochs: int, weights: str | None) -> None:
    """Carry it out and print the metrics before and after."""
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": size, "calibration": 64}
    dataset = load_data(parse_reference(f"yolo:{data}", **plain))
    classes = len(dataset.classes)
    original = compress.load_model(REFERENCE, weights, num_classes=classes)
    shown = list(dataset.batches("calibration", 8))
    options = {"keep_macs": 0.7, "outputs": OUTPUTS}
    small, plan = compress.prune(original, dataset.example, batches=shown, **options)
    trained = fine_tuned(small, data, out, size, epochs)
    pruned, fp32, int8 = out / "pruned", out / "model.onnx", out / "int8.onnx"
    compress.save_model(trained, pruned, plan=plan, reference=REFERENCE, num_classes=classes)
    export = ["export", str(pruned), "--input-size", f"3,{size},{size}", "--outputs", "0"]
    subprocess.run([sys.executable, "-m", "compress", *export, "--out", str(fp32)], check=True)
    compress.quantize_onnx(fp32, [images.numpy() for images, _ in shown], int8)
    with compress.open_session(int8) as session:
        for name, network in (("original", original), ("pruned", trained), ("int8", session)):
            found = compress.evaluate(network, dataset, "detection").metrics
            print(name, {key: round(each.value, 2) for key, each in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), size=640, epochs=100, weights=None)
