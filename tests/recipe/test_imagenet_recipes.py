"""The recipes for ImageNet, carried out on a stand-in of the same layout: a folder, and shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shards import picture, write_set

pytestmark = pytest.mark.slow

SMALL = {
    "model.weights": "null",
    "data.image_size": "32",
    "data.workers": "1",
    "data.calibration": "8",
    "data.validation": "0.2",
    "stages.1.distill.epochs": "1",
    "stages.1.distill.batch_size": "8",
    "stages.1.distill.warmup_epochs": "0",
    "stages.2.quantize.samples": "8",
    "stages.2.quantize.method": "plain",
    "measure.rounds": "3",
    "measure.round_ms": "1",
    "gates": "{}",
}
NETWORKS = {
    "imagenet-resnet50": {"model.options.width_per_group": "8"},
    "imagenet-mobilenetv2": {
        "model.options.width_mult": "0.25",
        "stages.1.distill.teacher": "torchvision:mobilenet_v2",
        "stages.1.distill.teacher_weights": "null",
        "stages.2.quantize.qat.epochs": "1",
        "stages.2.quantize.qat.batch_size": "8",
    },
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Where the stand-in lies, in each layout, as values of a recipe."""
    root = tmp_path_factory.mktemp("imagenet")
    for number in range(52):
        split, label = "train" if number < 40 else "val", number % 2
        place = root / "folder" / split / f"n0000000{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(picture(number, label, 40, "JPEG"))
    shards = {"imagenet1k-train": (2, 20), "imagenet1k-validation": (1, 12)}
    write_set(root / "shards", shards, ending="jpg", side=40)
    pattern = f"{root}/shards/imagenet1k-{{train-{{000..001}},validation-000}}.tar"
    return {
        "folder": {"data.root": f"{root}/folder"},
        "shards": {"data.name": "webdataset", "data.root": pattern},
    }


@pytest.mark.parametrize(
    ("name", "layout", "processes"),
    [
        ("imagenet-resnet50", "folder", 1),
        ("imagenet-resnet50", "shards", 2),
        ("imagenet-mobilenetv2", "shards", 1),
        ("imagenet-mobilenetv2", "folder", 2),
    ],
)
def test_the_recipe_runs_to_its_report(
    imagenet: dict[str, dict[str, str]], tmp_path: Path, name: str, layout: str, processes: int
):
    values = {**SMALL, **NETWORKS[name], **imagenet[layout]}
    if processes > 1:
        values["targets"] = "[{runtime: onnxruntime, precision: int8}]"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [
            sys.executable,
            *(launch if processes > 1 else []),
            *("-m", "compress", "run", f"recipes/{name}.yaml", "--out", str(tmp_path / "run")),
            *(f"--set={key}={value}" for key, value in values.items()),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trainings = 2 if name == "imagenet-mobilenetv2" else 1  # with QAT
    forms = 1 if processes > 1 else 3
    journals = list((tmp_path / "run").rglob("metrics.jsonl"))
    assert len(journals) == 1 + (trainings - 1) * forms
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    variants = [variant["name"] for variant in report["variants"]]
    assert variants[:4] == ["original", "pruned", "distilled", "int8-onnxruntime"]
    assert len(variants) == 3 + forms
    original, pruned = report["variants"][:2]
    assert pruned["macs"] < 0.75 * original["macs"]
    results = [r for v in report["variants"] for r in v["results"] if r["runtime"] == "onnxruntime"]
    assert {result["precision"] for result in results} == {"fp32", "int8"}
    assert all("top1_pct" in result and "latency_ms_p50" in result for result in results)
