"""The units of the GPU kit that are not latency: device, tests, carried engines, accuracy.

python benchmarks/gpu/measure.py device|tests|engines|accuracy --json FILE --work DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 0.02  # of the largest logit, between an engine in fp16 and ONNX Runtime in fp32
WEIGHTS = {
    "cifar10-resnet20": "resnet20-12fca82f.th",
    "cifar10-resnet56": "resnet56-4bfd9763.th",
}
TINY = (  # the recipes as rehearsed: a few images, steps and rounds
    "model.name=compress.models.cifar:resnet8", "data.name=digits",
    "model.options.in_channels=1", "model.num_classes=10", "data.batch_size=64",
    "data.root=null", "data.image_size=8", "data.calibration=16", "measure.rounds=3",
    "measure.round_ms=1", "measure.test_images=64",
)  # fmt: skip


def device(given: argparse.Namespace) -> dict[str, Any]:
    """Return the device, the driver, and what is installed."""
    import torch

    from compress import environment

    found = environment.describe_machine(ROOT)
    found["cuda_available"] = torch.cuda.is_available()
    try:
        asked = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        ended = subprocess.run(
            ["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True, timeout=60
        )
        found["nvidia_smi"] = ended.stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia_smi"] = [f"not read: {error}"]
    return found


def tests(given: argparse.Namespace) -> dict[str, Any]:
    """Return how many tests marked ``gpu`` passed, and what the others said."""
    given.work.mkdir(parents=True, exist_ok=True)
    report = given.work / "tests.xml"
    # Only the folders that hold such tests are collected: others may need packages not carried.
    files = sorted({str(f) for f in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in f.read_text()})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
    ended = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    if not report.is_file():
        raise SystemExit(f"pytest left no report: {(ended.stdout + ended.stderr)[-400:]}")
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    bad = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "said": (told.get("message") or "")}
        for case in ElementTree.parse(report).iter("testcase")
        for told in (*case.findall("failure"), *case.findall("error"), *case.findall("skipped"))
    ]
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"files": len(files), "not_passed": [_cut(each) for each in bad]}


def _cut(row: dict[str, str]) -> dict[str, str]:
    return {key: " ".join(value.split())[:300] for key, value in row.items()}


def engines(given: argparse.Namespace) -> dict[str, Any]:
    """Return which engines built elsewhere load here, and how far their logits are off."""
    from compress.errors import CompressError
    from compress.runtimes import open_session

    folder = HERE / "engines"
    files = sorted(folder.glob("*.rtx")) + sorted(folder.glob("*.engine"))
    if not files:
        return {"engines": {}, "skipped": "none carried: python benchmarks/gpu/kit.py pack"}
    with np.load(folder / "expected.npz") as arrays:
        images, expected = arrays["images"], arrays["logits"]
    rows: dict[str, Any] = {}
    for file in files:
        try:
            runtime = "tensorrt-rtx" if file.suffix == ".rtx" else "tensorrt"
            with open_session(file, runtime) as session:
                found = session.run(images)[0]
        except CompressError as error:
            rows[file.name] = {"loads": False, "said": str(error)}
            continue
        off = float(np.abs(found - expected).max() / np.abs(expected).max())
        same = float((found.argmax(1) == expected.argmax(1)).mean())
        rows[file.name] = {"loads": True, "off_of_largest_logit": off, "same_class_pct": 100 * same}
    return {"engines": rows}


def accuracy(given: argparse.Namespace) -> dict[str, Any]:
    """Carry out a recipe, going on where it was stopped, and return the rows of its report."""
    import compress

    overrides, reason = _settings(given)
    if reason:
        return {"skipped": reason}
    out = given.work / given.recipe.stem
    report = compress.run(given.recipe, out=out, overrides=overrides)
    content = json.loads((out / "report.json").read_text())
    return {
        "verdict": content["verdict"],
        "variants": [
            {key: variant.get(key) for key in ("name", "params", "macs", "size_mib", "results")}
            for variant in content["variants"]
        ],
        "gates_passed": getattr(report, "passed", None),
    }


def _settings(given: argparse.Namespace) -> tuple[list[str], str | None]:
    """Return what a recipe needs to be told here, or why it cannot run."""
    name = given.recipe.stem
    if given.rehearse:
        stages = [next(iter(s)) for s in _stages(given.recipe)]
        trained = [f"stages.{i}.{v}" for i, v in enumerate(stages) if v in ("train", "distill")]
        tiny = [f"{where}.{each}" for where in trained for each in ("epochs=1", "epoch_images=128")]
        tiny.append(f"stages.{stages.index('quantize')}.quantize.samples=16")
        pruning = f"stages.{stages.index('prune')}.prune"
        tiny += [f"{pruning}.criterion=l1", f"{pruning}.refit_steps=0"]
        return [*TINY, *tiny], None
    kind = name.split("-")[0]
    root = os.environ.get(f"COMPRESS_{kind.upper()}")
    if not root:
        return [], f"no {kind}: set COMPRESS_{kind.upper()} to its .npz file or its folder"
    overrides = [f"data.root={root}"]
    if name in WEIGHTS:
        folder = os.environ.get("COMPRESS_DATA")
        if not folder:
            return [], "no published weights: set COMPRESS_DATA to the folder with checkpoints/"
        overrides.append(f"model.weights={Path(folder) / 'checkpoints' / WEIGHTS[name]}")
    return overrides, None


def _stages(recipe: Path) -> list[dict[str, Any]]:
    import yaml

    return [
        {stage: {}} if isinstance(stage, str) else stage
        for stage in yaml.safe_load(recipe.read_text())["stages"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("unit", choices=("device", "tests", "engines", "accuracy"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    units = {"device": device, "tests": tests, "engines": engines, "accuracy": accuracy}
    given.json.write_text(json.dumps(units[given.unit](given), indent=1) + "\n")


if __name__ == "__main__":
    main()
