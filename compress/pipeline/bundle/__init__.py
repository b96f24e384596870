"""A run packed for a device: ONNX files, recipe, ranges, labels, images, and two scripts.

The scripts need numpy and one runtime there (to read pictures Pillow too), nothing of this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from compress.artifact import inside, replacing
from compress.data import UNFITTED, Dataset, load_data
from compress.errors import RunError, UsageError
from compress.evaluate.feeding import arrays_for, artifact_facts, completed, picture_of
from compress.pipeline.bundle import on_device
from compress.recipe.settings import DataSettings
from compress.report.html import without_unset
from compress.report.run_folder import RunFolder, recorded_variants
from compress.runtimes import Session, open_session
from compress.tasks import Task, default_task, load_task

__all__ = ["write_bundle"]

ENDINGS = (".tar.gz", ".tgz")
IMAGES = 64  # of the test split: enough to see a wrong engine, small enough to send
KEYS = ("name", "file", "precision", "target")  # of a network, that the script needs
PACKAGE = Path(__file__).parents[2]
SCRIPTS = {  # by their names in the bundle
    "run.py": "pipeline/bundle/on_device.py",
    "predict.py": "pipeline/bundle/on_device_predict.py",
    "pictures.py": "data/_plain_pictures.py",  # the same code here and on the device
    "answers.py": "tasks/_plain_answers.py",
    "kernels.py": "runtimes/_plain_kernels.py",
}


def write_bundle(run: str | Path, out: str | Path) -> Path:
    """Pack the finished run in a folder for a device as ``out``, FILE.tar.gz, and return that.

    It unpacks into one folder, whose ``run.py`` builds, checks and measures there and whose
    ``predict.py`` answers pictures.

    Raises:
        UsageError: ``out`` has another ending.
        RunError: the folder holds no run, a file of it is missing, or its networks take more than
            pictures or do not answer each by itself.
        DataError: the images of the run cannot be read here.
    """
    folder, target = Path(run), Path(out)
    if not target.name.endswith(ENDINGS):
        raise UsageError("is no name for a bundle", where=str(out), expected="FILE.tar.gz")
    recipe = RunFolder(folder).description()["recipe"]
    models = _models(folder)
    first = folder / models[0]["path"]
    data = completed(DataSettings.model_validate(recipe["data"]), [first])
    dataset = load_data(data, recipe["seed"])
    said = artifact_facts(first)
    labels = [str(name) for name in dataset.classes or said.get("labels", ())]
    task = load_task(
        recipe.get("task") or said.get("task") or default_task(dataset.target), classes=labels
    )
    files: dict[str, bytes] = {
        **{name: (PACKAGE / file).read_bytes() for name, file in SCRIPTS.items()},
        "recipe.yaml": yaml.safe_dump(without_unset(recipe), sort_keys=False).encode(),
        "labels.txt": "".join(f"{name}\n" for name in labels).encode(),
        "sample.npz": _sample(folder, models, dataset, task),
    }
    for model in models:
        files[model["file"]] = (folder / model["path"]).read_bytes()
    for plan in sorted(folder.glob("*-quantize/plan.*.json")):
        files[f"ranges/{plan.name}"] = plan.read_bytes()
    manifest = {
        "schema": 1,
        "name": recipe["name"],
        "images": min(IMAGES, len(dataset.splits["test"])),
        "labels": labels,
        "input": _input(dataset),
        "answer": {"form": task.form, "options": _options(task)},
        "models": [{key: model[key] for key in KEYS} for model in models],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["bundle.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    root = target.name
    for ending in ENDINGS:
        root = root.removesuffix(ending)
    with replacing(target) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{root or 'bundle'}/{name}")
            entry.size = len(content)
            entry.mode = 0o755 if name in SCRIPTS else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return target


def _models(folder: Path) -> list[dict[str, Any]]:
    """Return every network of the run, the original first, each with its name in the bundle."""
    found = recorded_variants(folder)
    if not found:
        raise RunError(
            "no stage of this run has left a network",
            where=str(folder),
            fix="Finish the run first: give its command again",
        )
    for model in found:
        if not inside(folder, model["path"]).is_file():
            raise RunError("is gone from the run", where=str(folder / model["path"]))
        if Path(model["name"]).name != model["name"]:
            raise RunError(f"{model['name']!r} is no name of a network", where=str(folder))
        model["file"] = f"models/{model['name']}.onnx"
    return found


def _input(dataset: Dataset) -> dict[str, Any]:
    told: dict[str, Any] = {
        "channels": dataset.channels,
        "layout": dataset.layout,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "range": [0, 1],
        "color": dataset.color,
        "interpolation": "bilinear",
        **UNFITTED,
    }
    left_out = ("labels", "input_range")
    return told | {key: value for key, value in dataset.facts().items() if key not in left_out}


def _options(task: Task) -> dict[str, Any]:
    """Return the options of a task but its classes, which are written once."""
    known: dict[str, Any] = dataclasses.asdict(task) if dataclasses.is_dataclass(task) else {}
    return {key: value for key, value in known.items() if key != "classes"}


def _sample(folder: Path, models: list[dict[str, Any]], dataset: Dataset, task: Task) -> bytes:
    """Return test images and what every network answers to them here, as .npz; classes if known.

    Int8 graphs are computed here operator by operator, which is the arithmetic all runtimes follow.
    """
    split = dataset.splits["test"]
    chosen = np.linspace(0, len(split) - 1, min(IMAGES, len(split))).astype(int)
    stored = split.take(chosen)
    content: dict[str, Any] = {}
    for model in models:
        level = "none" if model["precision"] == "int8" else "all"
        with open_session(folder / model["path"], optimization=level) as session:
            images = arrays_for([picture_of(session.inputs)], stored, dataset)[0]
            if len(session.inputs) > 1:
                raise RunError(
                    f"takes {len(session.inputs)} inputs",
                    where=model["path"],
                    expected="networks that take pictures and nothing else",
                    fix="Copy the ONNX files of the run and its report",
                )
            content["images"] = images
            content[f"answers_{model['name']}"] = _answers(session, images, model["path"])
    if task.form in on_device.DECIDED and dataset.target == "class":
        content["labels"] = split.labels[chosen]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)
    return buffer.getvalue()


def _answers(session: Session, images: NDArray[Any], where: str) -> NDArray[Any]:
    """Return what the script compares, for all images, in batches that the session takes."""
    shape = session.inputs[0].shape
    size = shape[0] if shape and isinstance(shape[0], int) else len(images)
    names = [output.name for output in session.outputs]
    whole = range(0, len(images) // size * size, size)
    runs = (session.run(images[i : i + size]) for i in whole)
    answers: NDArray[Any] = np.concatenate([on_device.joined(names, outputs) for outputs in runs])
    if len(answers) != len(images) // size * size:
        raise RunError(
            f"answers {len(images)} images with an output of shape {answers.shape}",
            where=where,
            expected="the images along the first dimension of the first output",
            fix="Copy the ONNX files of the run and its report",
        )
    return answers
