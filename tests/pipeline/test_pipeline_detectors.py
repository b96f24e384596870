"""Torchvision's detectors, tiny, through every stage of a run on images of blood cells."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_detectors

import compress
from compress.recipe.loading import validate_recipe

DATA = Path(os.environ.get("COMPRESS_DATA", Path(__file__).parents[3] / "shared" / "data")) / "bccd"
COUNTS = {"train": 44, "val": 6, "test": 6}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: set COMPRESS_DATA"),
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the images, as Pascal VOC lays them out."""
    root = tmp_path_factory.mktemp("cells")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for part, count in COUNTS.items():
        names = (DATA / "ImageSets" / "Main" / f"{part}.txt").read_text().split()[:count]
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            shutil.copy(DATA / "Annotations" / f"{name}.xml", root / "Annotations")
            shutil.copy(DATA / "JPEGImages" / f"{name}.jpg", root / "JPEGImages")
    return root


def content(kind: str, root: Path, task: Any = "detection") -> dict[str, Any]:
    training = {"epochs": 1, "batch_size": 8, "lr": 0.002, "clip_norm": 5.0}
    targets = ("onnxruntime", "openvino", "tensorrt-rtx")
    return {
        "name": kind,
        "model": {"name": f"{tiny_detectors.__file__}:{kind}"},
        "data": {
            "name": "voc", "root": str(root), "image_size": [64, 96], "batch_size": 8,
            "calibration": 8, "options": {"invalid": "drop"}, "mean": [0.0], "std": [1.0],
        },
        "task": task,
        "stages": [
            {"train": training}, {"prune": {"keep_macs": 0.7}}, {"distill": training},
            {"quantize": {"samples": 8}},
        ],
        "targets": [{"runtime": name, "precision": "int8", "when_installed": True}
                    for name in targets],
        "measure": {"rounds": 3, "round_ms": 1},
    }  # fmt: skip


@pytest.mark.parametrize("kind", tiny_detectors.KINDS)
def test_a_detector_goes_through_the_whole_pipeline(kind, cells, tmp_path):
    task = {"detection": {"nms_in_graph": True}} if kind == "retinanet" else "detection"
    recipe = validate_recipe(content(kind, cells, task), where="test")
    assert compress.run(recipe, tmp_path / "run") is not None
    report = json.loads((tmp_path / "run/report.json").read_text())
    names = [variant["name"] for variant in report["variants"]]
    assert names[:3] == ["original", "pruned", "distilled"]
    assert "int8-onnxruntime" in names[3:]
    for variant in report["variants"]:
        for result in variant["results"]:
            assert result["primary"] == "map50_95", result
            assert set(result["metrics"]) == {"map50_95", "map50"}
            assert "accuracy" not in result["skipped"], result["skipped"]
    assert report["details"]["drawn"], "boxes are drawn"
    assert report["variants"][1]["macs"] < 0.75 * report["variants"][0]["macs"]
