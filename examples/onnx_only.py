"""Somebody's ONNX file and a folder of pictures: int8, checked by the linter, run once.

python onnx_only.py net.onnx photos 64
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import compress


def batches(folder: Path, side: int) -> list[np.ndarray]:
    """Return the pictures below ``folder`` as the network takes them, (1, 3, side, side) each."""
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    found = []
    for file in sorted(folder.rglob("*.jpg"))[:128]:
        pixels = np.asarray(Image.open(file).convert("RGB").resize((side, side)), np.float32)
        found.append(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None])
    return found


if __name__ == "__main__":
    source, folder, side = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    images = batches(folder, side)
    out = source.with_suffix(".int8.onnx")
    compress.quantize_onnx(source, images, out, target="onnxruntime")
    for finding in compress.lint_onnx(out, target="onnxruntime"):
        print(finding)
    for path in (source, out):
        with compress.open_session(path, runtime="onnxruntime", threads=1) as session:
            print(path, session.run(images[0])[0])
