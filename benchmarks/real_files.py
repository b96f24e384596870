"""Real ONNX files of other people's exporters, and images prepared as each file's network wants."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

Feed = dict[str, np.ndarray]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
WORDS = [
    "exit",
    "open",
    "sale",
    "train",
    "coffee",
    "north",
    "gate",
    "parking",
    "24",
    "hours",
    "museum",
]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Preparation:
    """How an RGB image, (H, W, 3) in 0..255, becomes the input of a network."""

    height: int
    width: int
    numbers: Callable[[np.ndarray], np.ndarray]
    nhwc: bool = False
    text: bool = False  # written on the photo: what a text detector looks for

    def __call__(self, file: Path) -> np.ndarray:
        """Return the input made of one image file, (1, ...)."""
        with Image.open(file) as image:
            sized = image.convert("RGB").resize((self.width, self.height))
        if self.text:
            write_text(sized, seed=zlib.crc32(file.name.encode()))
        values = self.numbers(np.asarray(sized, np.float32))
        return np.ascontiguousarray(values if self.nhwc else values.transpose(2, 0, 1))[None]


FILES = {
    "mnist": Preparation(28, 28, lambda x: 255 - x.mean(2, keepdims=True)),
    "mtcnn_pnet": Preparation(120, 160, lambda x: (x - 127.5) / 128, nhwc=True),
    "mtcnn_onet": Preparation(48, 48, lambda x: (x - 127.5) / 128, nhwc=True),
    "yunet_n320": Preparation(320, 320, lambda x: x[..., ::-1]),
    "yunet_n_dyn": Preparation(160, 192, lambda x: x[..., ::-1]),
    "ultra_rfb320": Preparation(240, 320, lambda x: (x - 127) / 128),
    "yolox_nano": Preparation(416, 416, lambda x: x[..., ::-1]),
    "ppocr2_det": Preparation(160, 192, lambda x: (x / 255 - MEAN) / STD, text=True),
    "ppocr2_cls": Preparation(48, 192, lambda x: (x / 255 - 0.5) / 0.5),
    "deeplab_v3": Preparation(257, 257, lambda x: x / 127.5 - 1, nhwc=True),
}


def write_text(image: Image.Image, seed: int) -> None:
    """Write one to three signs of two words on an image, in place."""
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(seed)
    for _ in range(rng.integers(1, 4)):
        font = ImageFont.load_default(size=int(rng.integers(12, 30)))
        place = tuple(rng.integers(0, (image.width * 5 // 8, image.height * 13 // 16)).tolist())
        words, ground = " ".join(rng.choice(WORDS, 2)), rng.integers(0, 256, 3)
        draw.rectangle(draw.textbbox(place, words, font), fill=tuple(ground.tolist()))
        draw.text(place, words, fill=tuple((255 - ground).tolist()), font=font)


def feeds(model: onnx.ModelProto, name: str, photos: Path, count: int, draw: int = 0) -> list[Feed]:
    """Return ``count`` inputs of the network in the file ``name``, one image each.

    Photos in an order of their own, another for each ``draw``; rectified noise for a network that
    takes activations.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    rng = np.random.default_rng(draw)
    if name in FILES:
        files = sorted(file for file in photos.rglob("*") if file.suffix.lower() in SUFFIXES)
        order = rng.permutation(len(files))[:count]
        return [{inputs[0].name: FILES[name](files[i]).astype(np.float32)} for i in order]
    shapes = {v.name: [1, *(d.dim_value for d in v.type.tensor_type.shape.dim[1:])] for v in inputs}
    return [
        {n: np.maximum(rng.normal(size=s), -0.2).astype(np.float32) for n, s in shapes.items()}
        for _ in range(count)
    ]
