"""A run packed for a device: ONNX files, recipe, ranges, labels, images, and one script.

The script needs numpy and one runtime there, and nothing of this package.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from compress.artifact import inside, read_json, replacing
from compress.data import Dataset, load_data
from compress.errors import RunError
from compress.recipe.settings import DataSettings
from compress.runtimes import open_session

__all__ = ["write_bundle"]

DECIDED = ("class", "mask")  # labels of tasks whose largest output of dimension 1 is the answer
IMAGES = 64  # of the test split: enough to see a wrong engine, small enough to send
KEYS = ("name", "file", "precision", "target")  # of a network, that the script needs
SCRIPT = Path(__file__).with_name("on_device.py")


def write_bundle(run: str | Path, out: str | Path) -> Path:
    """Pack a finished run for a device.

    Args:
        run: Run folder.
        out: The file to write, FILE.tar.gz.

    Returns:
        ``out``. It unpacks into one folder, whose ``run.py`` builds, checks and measures there.

    Raises:
        RunError: the folder holds no run, a file of it is missing, or its task names no classes.
        DataError: the images of the run cannot be read here.
    """
    folder, target = Path(run), Path(out)
    description = read_json(folder / "run.json")
    models = _models(folder)
    recipe = description["recipe"]
    dataset = load_data(DataSettings.model_validate(recipe["data"]), recipe["seed"])
    if dataset.target not in DECIDED:
        raise RunError(
            f"its data {dataset.name!r} has labels of the form {dataset.target!r}",
            where=str(folder),
            expected="networks that name a class, of each image or of each pixel: the script on "
            "the device compares these decisions with the host's",
            fix="Copy the ONNX files of the run and its report",
        )
    files: dict[str, bytes] = {
        "run.py": SCRIPT.read_bytes(),
        "recipe.yaml": yaml.safe_dump(_without_defaults(recipe), sort_keys=False).encode(),
        "labels.txt": "".join(f"{name}\n" for name in dataset.classes).encode(),
        "sample.npz": _sample(folder, models, dataset),
    }
    for model in models:
        files[model["file"]] = (folder / model["path"]).read_bytes()
    for plan in sorted(folder.glob("*-quantize/plan.*.json")):
        files[f"ranges/{plan.name}"] = plan.read_bytes()
    manifest = {
        "schema": 1,
        "name": recipe["name"],
        "images": min(IMAGES, len(dataset.splits["test"])),
        "input": {"mean": list(dataset.mean), "std": list(dataset.std), "range": [0, 1]},
        "models": [{key: model[key] for key in KEYS} for model in models],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["bundle.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    _pack(files, target, root=_folder_name(target))
    return target


def _models(folder: Path) -> list[dict[str, Any]]:
    """Return every network of the run, the original first, each with its name in the bundle."""
    found: list[dict[str, Any]] = []
    for stage in sorted(folder.glob("[0-9][0-9]-*/metrics.json")):
        found += read_json(stage).get("variants", [])
    if not found:
        raise RunError(
            "no stage of this run has left a network",
            where=str(folder),
            fix="Finish the run first: compress run RECIPE --resume",
        )
    for model in found:
        if not inside(folder, model["path"]).is_file():
            raise RunError("is gone from the run", where=str(folder / model["path"]))
        if Path(model["name"]).name != model["name"]:
            raise RunError(f"{model['name']!r} is no name of a network", where=str(folder))
        model["file"] = f"models/{model['name']}.onnx"
    return found


def _sample(folder: Path, models: list[dict[str, Any]], dataset: Dataset) -> bytes:
    """Return test images and what every network answers to them here, as .npz; classes if known.

    Int8 graphs are computed here operator by operator, which is the arithmetic all runtimes follow.
    """
    split = dataset.splits["test"]
    chosen = np.linspace(0, len(split) - 1, min(IMAGES, len(split))).astype(int)
    images = dataset.normalize(split.take(chosen)).numpy()
    content: dict[str, Any] = {"images": images}
    if dataset.target == "class":
        content["labels"] = split.labels[chosen]
    for model in models:
        level = "none" if model["precision"] == "int8" else "all"
        with open_session(folder / model["path"], optimization=level) as session:
            content[f"answers_{model['name']}"] = session.run(images)[0]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)
    return buffer.getvalue()


def _pack(files: Mapping[str, bytes], target: Path, *, root: str) -> None:
    with replacing(target) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = len(content)
            entry.mode = 0o755 if name == "run.py" else 0o644
            archive.addfile(entry, io.BytesIO(content))


def _without_defaults(content: Any) -> Any:
    """Return the recipe as a person would write it: without keys that are not set."""
    if isinstance(content, dict):
        return {k: _without_defaults(v) for k, v in content.items() if v is not None}
    return [_without_defaults(item) for item in content] if isinstance(content, list) else content


def _folder_name(target: Path) -> str:
    name = target.name
    for ending in (".gz", ".tgz", ".tar"):
        name = name.removesuffix(ending)
    return name or "bundle"
