"""The blood-cell detector pruned and in int8: ours, Torch-Pruning's group L2, the int8 peers.

    python benchmarks/detection.py pruning --original RUN/00-train --data BCCD
    python benchmarks/detection.py int8 --original RUN/00-train --yolo YOLO/00-train --data BCCD

RUN is what ``compress run recipes/bccd-detection.yaml`` left, YOLO what the same recipe leaves with
``ultralytics:yolov8n.yaml``, 160 x 192 pixels, 12 epochs at a rate of 0.001 and no later stage.

Pruning: both arms are cut to the same MACs and fine-tuned alike; mAP on the 72 test images, changes
paired over images. Int8: the scores' and the boxes' own SQNR behind a YOLO head, and mAP where
there are labels; every graph in plain Q/DQ arithmetic. Results are written after every row, and
rows that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import int8_peers
import numpy as np
import onnx
import torch_pruning_peer
from torch import nn

import compress
from compress import tasks
from compress.data import Dataset, load_data
from compress.evaluate import Evaluation
from compress.measure import count_module
from compress.packages import version
from compress.prune import plan_pruning, recalibrate_batchnorm, refit
from compress.quantize.sessions import answers, sqnr_db
from compress.recipe.settings import AugmentSettings, DataSettings, TrainSettings
from compress.train import shown_batches, train

RESULTS = Path(__file__).parent / "results"
TRAINING = TrainSettings(
    batch_size=8, optimizer="adamw", weight_decay=0.01, warmup_epochs=0.5, clip_norm=10.0,
    augment=AugmentSettings(flip=True, crop_padding=16), threads=1,
)  # fmt: skip
YOLO_SIZE = (160, 192)
SEEN = 16  # images that SQNR is taken on
RECALIBRATE_BATCHES = 16  # of 8 images, changed as in training
INT8 = ("ours onnxruntime", "ours openvino", "ours tensorrt", *int8_peers.PEERS)


def peer_cut(model: nn.Module, dataset: Dataset, keep: float) -> nn.Module:
    """Cut with Torch-Pruning's global group L2, in small steps, until the budget is met."""
    twin = compress.mask_pruning(model, plan_pruning(model, dataset.example, keep_macs=1.0))
    heads: Any = twin.heads
    ignored = [layer for head in heads for layer in (head.sides, head.scores)]
    return torch_pruning_peer.cut(
        twin, dataset.example, keep, ignored, lambda each: count_module(each, dataset.example).macs
    )


def our_cut(model: nn.Module, dataset: Dataset, keep: float) -> nn.Module:
    """Cut as the prune stage does: scored by obs, then fitted to the original, without labels."""
    seen = list(dataset.batches("calibration", 16))
    plan = plan_pruning(
        model, dataset.example, criterion="obs", keep_macs=keep, batches=seen, answers="numbers"
    )
    shown = shown_batches(dataset, TRAINING, RECALIBRATE_BATCHES)
    return refit(compress.apply_pruning(model, plan), model, plan, seen, training_batches=shown)


ARMS: dict[str, Callable[[nn.Module, Dataset, float], nn.Module]] = {
    "torch-pruning": peer_cut,
    "compress": our_cut,
}


def values(found: Evaluation) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in found.metrics.items()}


def gains(task: tasks.Task, reference: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    """Return candidate less reference of every metric, images paired."""
    found = tasks.compare_metrics(task, reference.scores, candidate.scores)
    return {name: asdict(change) for name, change in found.items()}


def compared(
    networks: dict[str, nn.Module], dataset: Dataset, task: tasks.Task, original: Evaluation
) -> dict[str, Any]:
    """Return the metrics of both arms and ours less the peer's."""
    found = {arm: compress.evaluate(each, dataset, task) for arm, each in networks.items()}
    told: dict[str, Any] = {
        arm: {"metrics": values(each), "change": gains(task, original, each)}
        for arm, each in found.items()
    }
    return told | {"gain": gains(task, found["torch-pruning"], found["compress"])}


def pruning(given: argparse.Namespace, dataset: Dataset, task: tasks.Task) -> None:
    result = known(given.out)
    rows: list[dict[str, Any]] = result.setdefault("pruning", [])
    wanted = [(keep, lr) for lr in (None, *given.lr) for keep in given.keep]
    wanted = [each for each in wanted if not is_there(rows, about(given, *each))]
    if not wanted:
        return
    model = compress.load_model(given.original)
    original = compress.evaluate(model, dataset, task)
    result |= {"original": values(original), "environment": environment()}
    for keep, lr in wanted:
        started = time.perf_counter()
        networks = {arm: cut(model, dataset, keep) for arm, cut in ARMS.items()}
        macs = {arm: count_module(each, dataset.example).macs for arm, each in networks.items()}
        if lr is not None:
            networks = {arm: fine_tuned(each, dataset, task, given.epochs, lr, given.seed)
                        for arm, each in networks.items()}  # fmt: skip
        took = {"macs": macs, "s": round(time.perf_counter() - started, 1)}
        rows.append(about(given, keep, lr) | took | compared(networks, dataset, task, original))
        write(given.out, result, rows[-1])


def about(given: argparse.Namespace, keep: float, lr: float | None) -> dict[str, Any]:
    """Return what tells a row of pruning from the others."""
    if lr is None:
        return {"keep": keep, "epochs": 0}
    return {"keep": keep, "epochs": given.epochs, "lr": lr, "seed": given.seed}


def fine_tuned(
    network: nn.Module, dataset: Dataset, task: tasks.Task, epochs: int, lr: float, seed: int
) -> nn.Module:
    """Return a copy of ``network`` after training; its BatchNorm gets statistics first."""
    import copy

    small = copy.deepcopy(network)
    recalibrate_batchnorm(small, shown_batches(dataset, TRAINING, RECALIBRATE_BATCHES))
    settings = TRAINING.model_copy(update={"epochs": epochs, "lr": lr})
    train(small, dataset, settings, seed=seed, task=task, device="cpu")
    return small.eval()


def int8(given: argparse.Namespace) -> None:
    result = known(given.out)
    rows: list[dict[str, Any]] = result.setdefault("int8", [])
    with tempfile.TemporaryDirectory() as folder:
        for name, export in heads(given, Path(folder)).items():
            wanted = [{"head": name, "graph": graph} for graph in INT8]
            wanted = [each for each in wanted if not is_there(rows, each)]
            if not wanted:
                continue
            path, images, labelled = export()
            original = onnx.load(path)
            feed = {original.graph.input[0].name: images[-SEEN:]}
            want = answers(original, feed)[0]
            floats = None if labelled is None else metrics_of(original, labelled)
            for row in wanted:
                written = quantized(row["graph"], path, images[:-SEEN], Path(folder))
                rows.append(row | sqnr_of(want, answers(written, feed)[0]))
                if labelled is not None and floats is not None:
                    found = metrics_of(written, labelled)
                    rows[-1] |= {"fp32": values(floats), "metrics": values(found)}
                    rows[-1]["change"] = gains(task_of(labelled), floats, found)
                rows[-1]["vanishing_scores"] = linted(written, Path(folder))
                result["environment"] = environment()
                write(given.out, result, rows[-1])


Head = tuple[Path, np.ndarray, Dataset | None]  # ONNX file, images, data with labels it knows


def heads(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Head]]:
    """Return what writes each network that ends in boxes and scores, by name."""

    def cells(run: Path, dataset: Dataset, **outputs: str) -> Head:
        model = compress.load_model(run)
        path = compress.export_onnx(model, dataset.example, folder / "cells.onnx", **outputs)
        return path, pictures(dataset), dataset

    def yolox() -> Head:
        images = 255 * pictures(cells_of(given.data, 416, 416, mean=[0.0], std=[1.0]))[:, ::-1]
        model = onnx.load(given.yolox)
        for node in model.graph.node:  # the peers' reader feeds "input"
            node.input[:] = ["input" if name == "images" else name for name in node.input]
        model.graph.input[0].name = "input"
        onnx.save(model, folder / "yolox.onnx")
        return folder / "yolox.onnx", images.copy(), None

    found: dict[str, Callable[[], Head]] = {}
    if given.original:
        found["small detector"] = partial(cells, given.original, cells_of(given.data))
    if given.yolo:
        unit = cells_of(given.data, *YOLO_SIZE, mean=[0.0], std=[1.0])
        found["YOLOv8n"] = partial(cells, given.yolo, unit, outputs="0")
    return found | ({"YOLOX-Nano of COCO": yolox} if given.yolox else {})


def pictures(dataset: Dataset) -> np.ndarray:
    """Return 64 images to calibrate on, and 16 that SQNR is taken on, as a network sees them."""
    parts = (dataset.batches("train", 16, 64), dataset.batches("test", 16, 16))
    return np.concatenate([images.numpy() for part in parts for images, _ in part])


def cells_of(root: str, height: int = 192, width: int = 256, **more: Any) -> Dataset:
    """Return BCCD at a size; the default is that of the recipe."""
    shape = {"image_size": (height, width), "batch_size": 16, "calibration": 64}
    options = {"invalid": "drop"}
    return load_data(DataSettings(name="voc", root=root, options=options, **shape, **more))


def quantized(graph: str, path: Path, images: np.ndarray, folder: Path) -> onnx.ModelProto:
    """Return the Q/DQ graph of ours or a peer."""
    out = folder / "int8.onnx"
    if graph.startswith("ours "):
        compress.quantize_onnx(path, [images], out, target=graph.removeprefix("ours "))
    else:
        int8_peers.quantize_by(graph, path, images, out)
    return onnx.load(out)


def sqnr_of(want: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """Return the SQNR of boxes and of scores: rows are along the shorter of the last two sides."""
    if want.shape[1] > want.shape[2]:
        want, got = want.transpose(0, 2, 1), got.transpose(0, 2, 1)
    parts = {"boxes": slice(0, 4), "scores": slice(4, None)}
    return {
        f"{name}_db": round(sqnr_db([want[:, rows]], [got[:, rows]]), 2)
        for name, rows in parts.items()
    }


def metrics_of(model: onnx.ModelProto, dataset: Dataset) -> Evaluation:
    """Return what a graph reaches on the test images, in plain Q/DQ arithmetic."""
    name = model.graph.input[0].name
    return compress.evaluate(
        lambda images: {"output": answers(model, {name: images.numpy()})[0]},
        dataset,
        task_of(dataset),
    )


def task_of(dataset: Dataset) -> tasks.Task:
    return tasks.load_task("detection", classes=dataset.classes)


def linted(model: onnx.ModelProto, folder: Path) -> int:
    onnx.save(model, folder / "linted.onnx")
    found = compress.lint_onnx(folder / "linted.onnx", target="onnxruntime")
    return sum(each.rule == "vanishing-scores" for each in found)


def is_there(rows: list[dict[str, Any]], about: dict[str, Any]) -> bool:
    return any(about.items() <= row.items() for row in rows)


def known(folder: Path) -> dict[str, Any]:
    file = folder / "detection.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def environment() -> dict[str, Any]:
    return {
        "device": {"cpu": platform.processor() or platform.machine(), "threads": os.cpu_count()},
        "versions": {
            name: version(name) for name in ("torch", "torch-pruning", "onnxruntime", "nncf")
        },
    }


def write(folder: Path, result: dict[str, Any], row: dict[str, Any]) -> None:
    print({key: value for key, value in row.items() if not isinstance(value, dict)}, flush=True)
    folder.mkdir(exist_ok=True)
    (folder / "detection.json").write_text(json.dumps(result, indent=1) + "\n")
    tables = [table(result) for key, table in TABLES.items() if result.get(key)]
    (folder / "detection.md").write_text("\n".join(tables))


def shown(found: dict[str, Any], sign: str = "") -> str:
    low, high = found["ci95"]
    return f"{found['value']:{sign}.2f} ({low:{sign}.2f}..{high:{sign}.2f})"


def pruning_table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "# Blood-cell detector, cut and fine-tuned alike",
        "",
        f"Uncut: mAP50-95 {shown(result['original']['map50_95'])} %, mAP50 "
        f"{shown(result['original']['map50'])} %. 72 test images, bootstrap over images. Both arms "
        "get BatchNorm statistics from the same images before they are trained by AdamW with the "
        "task's loss, batch 8; one seed.",
        "",
        "| MACs kept (peer, ours) | epochs | rate | mAP50-95 peer, % | ours, % | ours - peer, "
        "paired | mAP50 peer, % | ours, % | ours - peer, paired |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["pruning"]:
        cells = [f"{row['keep']} ({row['macs']['torch-pruning']:,}, {row['macs']['compress']:,})"]
        cells += [str(row["epochs"]), str(row.get("lr", ""))]
        for metric in ("map50_95", "map50"):
            cells += [shown(row[arm]["metrics"][metric]) for arm in ARMS]
            cells.append(shown(row["gain"][metric], "+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def int8_table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "# Int8 of YOLO heads: boxes in pixels and scores up to 1 in one output",
        "",
        "| head | graph | scores, dB | boxes, dB | mAP50-95, % | change from fp32, paired "
        "| lint finds vanishing scores |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["int8"]:
        cells = [row["head"], row["graph"], f"{row['scores_db']:.1f}", f"{row['boxes_db']:.1f}"]
        has_labels = "metrics" in row
        cells.append(shown(row["metrics"]["map50_95"]) if has_labels else "no labels")
        cells.append(shown(row["change"]["map50_95"], "+") if has_labels else "no labels")
        cells.append(str(row["vanishing_scores"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES = {"pruning": pruning_table, "int8": int8_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pruning", "int8"])
    parser.add_argument("--original", type=Path, help="folder of the train stage")
    parser.add_argument("--data", default=os.environ.get("COMPRESS_DATA", ".") + "/bccd")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5], help="MACs kept")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, nargs="*", default=[0.001])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--yolo", type=Path, help="folder of a train stage of YOLOv8n")
    parser.add_argument("--yolox", type=Path, help="yolox_nano.onnx, if it is to be tried")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.what == "int8":
        int8(given)
    elif given.original is None:
        parser.error("pruning needs --original")
    else:
        dataset = cells_of(given.data)
        pruning(given, dataset, task_of(dataset))


if __name__ == "__main__":
    main()
