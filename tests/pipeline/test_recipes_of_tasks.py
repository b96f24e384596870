"""The recipes of restoration, generators, embeddings and several labels, carried out in small."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import compress

QUICK = (
    "stages.0.train.epochs=1", "stages.2.distill.epochs=1", "stages.0.train.batch_size=8",
    "stages.2.distill.batch_size=8", "stages.3={quantize: {method: plain, samples: 8}}",
    "targets=[{runtime: onnxruntime}]", "gates={}", "measure.rounds=3", "measure.round_ms=1",
    "data.calibration=8",
)  # fmt: skip
RESTORED = ("model.options={width: 4, depth: 1}", "data.image_size=8")
GENERATED = (
    "data.options={of: digits, size: 8}", "data.root=null", "data.image_size=8",
    "model.options={code: 8, width: 4, side: 8}", "stages.0.train.epoch_images=64",
    "stages.2.distill.epoch_images=64", "measure.test_images=32",
)  # fmt: skip
EMBEDDED = (
    "data.options={of: digits, held_back: ['7', '8', '9']}", "data.root=null",
    "model.options={in_channels: 1, width: 4}", "stages.0.train.epoch_images=64",
    "stages.2.distill.epoch_images=64", "measure.test_images=64",
)  # fmt: skip
LABELLED = ("data.name=csv", "data.options={label: 'red,green'}", "data.image_size=16")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures, and a table of which of two colours are in them."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows: list[list[object]] = [["file", "red", "green"]]
    for n in range(60):
        coarse = random.integers(0, 80, (4, 4, 3)).astype(np.uint8)
        red, green = n % 2, (n // 2) % 2
        coarse[: 2 * red, :, 0] = 250
        coarse[2 : 2 + 2 * green, :, 1] = 250
        picture = Image.fromarray(coarse).resize((20, 20), Image.Resampling.BICUBIC)
        picture.save(root / f"{n:02d}.png")
        rows.append([f"{n:02d}.png", red, green])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def carried_out(name: str, out: Path, *overrides: str) -> dict[str, Any]:
    compress.run(f"recipes/{name}.yaml", out, overrides=[*QUICK, *overrides])
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    names = [variant["name"] for variant in report["variants"]]
    assert names == ["original", "pruned", "distilled", "int8-onnxruntime"]
    assert report["variants"][1]["macs"] <= 0.56 * report["variants"][0]["macs"]
    return report


TITLES = {"psnr": "PSNR", "recall_at_k": "recall at 1", "map": "mAP"}


def check_language(report: dict[str, Any], out: Path, metric: str, unit: str) -> None:
    """The metric with its unit is told everywhere, and nothing of one class an image anywhere."""
    for variant in report["variants"]:
        result = variant["results"][0]
        assert result["primary"] == metric and result["metrics"][metric]["unit"] == unit
        assert not {"top1_pct", "top5_pct", "ece_pct"} & result.keys()
    assert TITLES[metric] in report["verdict"]
    page = (out / "report.html").read_text()
    assert not [
        word for word in ("Top-1", "top-1", "Confusion", "calibration error") if word in page
    ]
    assert "Does it still look" not in page


def test_super_resolution(pictures: Path, tmp_path: Path) -> None:
    report = carried_out("photos-super-resolution", tmp_path, *RESTORED, f"data.root={pictures}")
    check_language(report, tmp_path, "psnr", "dB")
    last = report["variants"][-1]["results"][0]
    assert last["agreement"]["unit"] == "dB" and "agreement_pct" not in last
    drawn = report["details"]["drawn"]
    assert len(drawn) == 6 and drawn[0]["agreement"] == min(each["agreement"] for each in drawn)
    assert all(each["truth"] and each["change"] for each in drawn)


def test_a_generator(tmp_path: Path) -> None:
    report = carried_out("fashion-generator", tmp_path, *GENERATED)
    check_language(report, tmp_path, "psnr", "dB")
    pruned, distilled = (each["results"][0] for each in report["variants"][1:3])
    assert pruned["agreement"]["value"] > 8 and distilled["agreement"]["unit"] == "dB"


def test_embeddings(tmp_path: Path) -> None:
    report = carried_out("fashion-embedding", tmp_path, *EMBEDDED)
    check_language(report, tmp_path, "recall_at_k", "pct")
    assert not report["details"].get("drawn")
    assert report["provenance"]["data"]["images"]["test"] < 150  # three of ten classes


def test_several_labels(pictures: Path, tmp_path: Path) -> None:
    report = carried_out("bccd-multilabel", tmp_path, *LABELLED, f"data.root={pictures}/labels.csv")
    check_language(report, tmp_path, "map", "pct")
    classes = report["details"]["class_metrics"]
    assert [each["variant"] for each in classes][:2] == ["original", "pruned"]
    assert classes[0]["classes"] == ["red", "green"] and classes[0]["metric"] == "AP"
    mean = np.mean([value for value in classes[0]["values"] if value is not None])
    assert mean == pytest.approx(report["variants"][0]["results"][0]["metrics"]["map"]["value"])
