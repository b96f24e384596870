"""Every distillation loss against no teacher, on one short schedule.

    python benchmarks/kd_losses.py [--images 4000] [--epochs 6] [--seeds 0 1 2] [--losses kd dkd]

ResNet-56 (93.39 % on the test images) teaches a ResNet-8 of half the width on a part of CIFAR-10.
Same student weights, order and augmentation per seed for every loss; each loss with the weight
that it has by default, beside a cross-entropy of weight 1. Every image is cropped and flipped once
and for all, so the teacher is run once; the benchmark remembers all that it computes. Needs
COMPRESS_DATA (the folder with checkpoints/) and COMPRESS_CIFAR10 (cifar10.npz). Written to
benchmarks/results/kd_losses.json and .md after every loss; the same call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import environment, plugins
from compress.data import Dataset
from compress.data._augment import augment
from compress.data._images import MemoryImages
from compress.evaluate import predict
from compress.models.cifar import resnet8, resnet56
from compress.recipe.settings import AugmentSettings, DistillSettings
from compress.train import train
from compress.train.batches import train_batches
from compress.train.distill import build_objective
from compress.train.distill.features import Tap
from compress.train.distill.teachers import TorchTeacher

RESULTS = Path(__file__).parent / "results"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = AugmentSettings(crop_padding=4, flip=True, fixed=True)
NONE = "none"
PUBLISHED = ("dkd", "dist", "reviewkd", "crd", "kd", NONE)  # best first, at full length


def cifar(images: int, tested: int) -> Dataset:
    with np.load(os.environ["COMPRESS_CIFAR10"]) as arrays:
        splits = {
            split: MemoryImages(
                torch.from_numpy(arrays[f"x_{kind}"][:count].transpose(0, 3, 1, 2).copy()),
                arrays[f"y_{kind}"][:count].reshape(-1).astype(np.int64),
            )
            for split, kind, count in (("train", "train", images), ("test", "test", tested))
        }
    return Dataset("cifar10", tuple(map(str, range(10))), MEAN, STD, splits, 256)


def teacher_network() -> torch.nn.Module:
    path = Path(os.environ["COMPRESS_DATA"]) / "checkpoints" / "resnet56-4bfd9763.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = resnet56()
    model.load_state_dict({name.removeprefix("module."): v for name, v in state.items()})
    return model.eval()


def settings(given: argparse.Namespace, loss: str) -> DistillSettings:
    return DistillSettings(
        epochs=given.epochs,
        batch_size=64,
        lr=0.05,
        augment=AUGMENT,
        precision="fp32",
        losses=() if loss == NONE else (loss,),
    )


class Remembering(TorchTeacher):
    """A network that has computed everything about every training image already."""

    def remember(self, dataset: Dataset, chosen: DistillSettings, seed: int) -> None:
        """Run through the images as the first epoch changes them; the others repeat it."""
        taps = [Tap("layer1"), Tap("layer2"), Tap("layer3"), Tap("linear", "input")]
        count = len(dataset.splits["train"])
        self.rows: dict[Tap | None, Tensor] = {}
        whole = chosen.model_copy(update={"batch_size": count // (count // 250)})
        for batch in train_batches(dataset, whole, 0, seed):
            images = augment(batch.images, batch.chances, AUGMENT, dataset.normalize)
            logits, seen = super().__call__(images, None, taps)
            for tap, value in {None: logits, **seen}.items():
                rows = self.rows.setdefault(tap, torch.full((count, *value.shape[1:]), torch.nan))
                rows[batch.index] = value

    def __call__(
        self, images: Tensor, index: Tensor | None, taps: Sequence[Tap]
    ) -> tuple[Tensor, dict[Tap, Tensor]]:
        """Return what is remembered of the images at ``index``."""
        if index is None:
            return super().__call__(images, None, taps)
        return self.rows[None][index], {tap: self.rows[tap][index] for tap in taps}


def one_run(
    loss: str, seed: int, dataset: Dataset, teacher: Remembering, given: argparse.Namespace
) -> float:
    """Return the student's top-1 on test images in percent, after the last epoch."""
    chosen = settings(given, loss)
    torch.manual_seed(seed)
    student = resnet8(width=given.width)
    if loss == NONE:
        objective = None
    else:
        objective = build_objective(student, teacher.model, dataset, chosen)
        objective.teacher = teacher
    train(student, dataset, chosen, objective=objective, seed=seed, device="cpu")
    return float(100 * predict(student, dataset.batches("test")).correct.mean())


def summary(runs: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain = runs.get(NONE, [])
    rows = []
    for loss, values in runs.items():
        gains = [a - b for a, b in zip(values, plain, strict=False)]
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append(
            {
                "loss": loss,
                "top1_pct": values,
                "mean": statistics.mean(values),
                "standard_deviation": spread,
                "gain_mean": statistics.mean(gains) if gains else None,
                "gain_smallest": min(gains) if gains else None,
            }
        )
    return sorted(rows, key=lambda row: -row["mean"])


def markdown(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    lines = [
        f"ResNet-56 -> ResNet-8 (width {given.width}), {given.images} CIFAR-10 images, "
        f"{given.epochs} epochs, batch 64, seeds {given.seeds}; top-1 on {given.tested} test "
        "images.",
        "",
        "| loss | top-1 % (mean ± deviation) | gain over none | smallest gain |",
        "|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row['standard_deviation']:.2f}" if row["standard_deviation"] else ""
        gain = f"{row['gain_mean']:+.2f} | {row['gain_smallest']:+.2f}"
        lines.append(f"| {row['loss']} | {row['mean']:.2f}{spread} | {gain} |")
    found = [row["loss"] for row in rows if row["loss"] in PUBLISHED]
    wanted = [loss for loss in PUBLISHED if loss in found]
    same = "appears" if found == wanted else "does not appear"
    lines += [
        "",
        f"Published at full length: {' > '.join(wanted)}. Here: {' > '.join(found)}. "
        f"That ordering {same} on this short schedule.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--tested", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=[NONE, *plugins.names("losses")])
    given = parser.parse_args()
    dataset = cifar(given.images, given.tested)
    teachers = {}
    for seed in given.seeds:
        teachers[seed] = Remembering(teacher_network(), dataset.example, None, None)
        teachers[seed].remember(dataset, settings(given, NONE), seed)
    runs = finished(given)
    start = time.perf_counter()
    for loss in given.losses:
        if loss in runs:
            continue
        runs[loss] = [one_run(loss, seed, dataset, teachers[seed], given) for seed in given.seeds]
        print(f"{time.perf_counter() - start:.0f} s: {loss} {runs[loss]}", flush=True)
        write(runs, given)
    print(markdown(summary(runs), given))


def finished(given: argparse.Namespace) -> dict[str, list[float]]:
    """Return what an earlier call with the same settings, but for the losses, has found."""
    path = RESULTS / "kd_losses.json"
    content = json.loads(path.read_text()) if path.is_file() else {"settings": {}, "rows": []}
    if {**content["settings"], "losses": given.losses} != vars(given):
        return {}
    return {row["loss"]: row["top1_pct"] for row in content["rows"]}


def write(runs: dict[str, list[float]], given: argparse.Namespace) -> None:
    rows = summary(runs)
    content = {
        "settings": vars(given),
        "rows": rows,
        **environment.describe_machine(RESULTS.parent),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kd_losses.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "kd_losses.md").write_text(markdown(rows, given))


if __name__ == "__main__":
    main()
