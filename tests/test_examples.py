"""The examples run as they stand, on a few images."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import compress

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("COMPRESS_DATA", ROOT.parent / "shared" / "data"))
CLASSES = ("Platelets", "RBC", "WBC")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "examples").glob("*.py")}
    assert len(lengths) >= 3 and max(lengths.values()) < 60, lengths


@pytest.mark.slow
def test_the_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("plain_loop").main(tmp_path, "digits", epochs=1)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][-3:] == [
        "original", "pruned", "int8",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_segmentation_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 4)):
        for kind, shape, most in (("images", (32, 32, 3), 255), ("masks", (32, 32), 2)):
            folder = tmp_path / "data" / part / kind
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = random.integers(0, most, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    example("segmentation").main(tmp_path / "data", tmp_path / "out", 64, 2, 255, epochs=1)
    assert "mIoU" in capsys.readouterr().out


def yolo_layout(root: Path, count: int) -> Path:
    """Write some BCCD images and their boxes as Ultralytics' trainer wants them."""
    bccd = DATA / "bccd"
    if not bccd.is_dir():
        pytest.skip(f"no blood cells at {bccd}: set COMPRESS_DATA")
    for split in ("train", "val"):
        stems = (bccd / "ImageSets" / "Main" / f"{split}.txt").read_text().split()[:count]
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for stem in stems:
            Image.open(bccd / "JPEGImages" / f"{stem}.jpg").save(
                root / "images" / split / f"{stem}.png"
            )
            rows = []
            for each in ElementTree.parse(bccd / "Annotations" / f"{stem}.xml").iter("object"):
                corners = ("xmin", "ymin", "xmax", "ymax")
                x1, y1, x2, y2 = (float(each.findtext(f"bndbox/{c}") or 0) for c in corners)
                middle = ((x1 + x2) / 1280, (y1 + y2) / 960, (x2 - x1) / 640, (y2 - y1) / 480)
                label = CLASSES.index(each.findtext("name") or "")
                rows.append(f"{label} " + " ".join(f"{min(v, 1.0):.6f}" for v in middle))
            (root / "labels" / split / f"{stem}.txt").write_text("\n".join(rows) + "\n")
    file = root / "data.yaml"
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(CLASSES))
    file.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return file


@pytest.mark.slow
def test_yolo_is_fine_tuned_by_its_own_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ultralytics")
    data = yolo_layout(tmp_path / "bccd", 12)
    out = tmp_path / "out"
    example("ultralytics_yolo").main(data, out, size=64, epochs=1, weights=None)
    said = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"original", "pruned", "int8"} <= set(said)
    code = f"import compress, torch; m = compress.load_model({str(out / 'pruned')!r}); "
    code += "torch.save(m(torch.full((1, 3, 64, 64), 0.5))[0], '" + str(out / "seen.pt") + "')"
    subprocess.run([sys.executable, "-c", code], check=True)
    fresh = torch.load(out / "seen.pt", weights_only=True)
    with compress.open_session(out / "model.onnx") as session:
        exact = session.run(np.full((1, 3, 64, 64), 0.5, np.float32))
    assert len(exact) == 1
    torch.testing.assert_close(torch.from_numpy(exact[0]), fresh, rtol=1e-3, atol=1e-2)
