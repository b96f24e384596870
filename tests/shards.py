"""Writes the shards that tests read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, label: int, side: int = 24, ending: str = "png") -> bytes:
    """Return an image file whose class can be learnt: its top or bottom half is bright."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (side, side + 4, 3), dtype=np.uint8)
    half = slice(0, side // 2) if label else slice(side // 2, side)
    pixels[half] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if ending in ("jpg", "JPEG") else ending.upper())
    return file.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write samples, (key, {ending: content}), to a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, *, ending: str = "png", side: int = 24) -> tuple[str, dict[str, bytes]]:
    """Return a sample of class ``number % 2``."""
    label = number % 2
    return f"{number:05d}", {
        ending: picture(number, label, side, ending),
        "cls": str(label).encode(),
    }


def write_set(root: Path, splits: Mapping[str, tuple[int, int]], **options: object) -> None:
    """Write for each split so many shards with so many images each, ``root/SPLIT-NNN.tar``."""
    number = 0
    for split, (shards, images) in splits.items():
        for shard in range(shards):
            part = [sample(number + i, **options) for i in range(images)]  # type: ignore[arg-type]
            write_shard(root / f"{split}-{shard:03d}.tar", part)
            number += images
