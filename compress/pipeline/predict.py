"""``compress predict``: predictions of an artifact for pictures, preprocessed as it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Group, RenderableType
from rich.text import Text

from compress.artifact import read_json, replacing
from compress.data import Dataset, load_pictures
from compress.data._annotated import image_size
from compress.data._pictures import Fit, opened_picture, to_8_bit
from compress.data.images import picture_files
from compress.errors import CompressError, DataError, UsageError, absence
from compress.evaluate import BATCH, answered
from compress.evaluate.feeding import ONNX_NAME, Fed, artifact_facts, completed, picture_of, shown
from compress.graph.metadata import CHANNELS
from compress.measure.artifacts import runtime_of
from compress.recipe.settings import DataSettings
from compress.report import numbers
from compress.report.run_folder import RUN_FILE, artifacts_in, one_artifact
from compress.runtimes import DEFAULT, Session, open_session
from compress.tasks import Prediction, Row, Task, default_task, load_task
from compress.terminal import table

DRAWN_SIDE = 320  # pixels: pictures with a shorter side are enlarged before they are drawn on
SHOWN_ROWS = 20  # of one image in the table; --json has all
FED = ("image_size", "resize", "interpolation", "crop", "color", "mean", "std")


@dataclass(frozen=True)
class Answers:
    """What an artifact answers to pictures."""

    artifact: Path
    runtime: str
    task: str
    fed: dict[str, Any]  # how the pictures became its input
    images: tuple[Path, ...]
    rows: tuple[list[Row], ...]  # of each image: what the task tells
    drawn: tuple[Path, ...]  # of each image: where the prediction is drawn; empty if nowhere
    predictions: tuple[Prediction, ...]  # of each image, as the task's ``predict`` returned it

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        images = [
            {"image": str(image), "answer": rows} | ({"drawn": str(drawn)} if drawn else {})
            for image, rows, drawn in zip(
                self.images, self.rows, self.drawn or (None,) * len(self.images), strict=True
            )
        ]
        return {
            "artifact": str(self.artifact),
            "runtime": self.runtime,
            "task": self.task,
            "input": self.fed,
            "images": images,
        }

    def table(self) -> RenderableType:
        """Return how it was fed, and one row for each thing that is told of each image."""
        told = [row for rows in self.rows for row in rows]
        columns = list(dict.fromkeys(key for row in told for key in row)) or ["answer"]
        headers = {name: name.replace("_pct", " %") for name in columns}
        lines = []
        for image, rows in zip(self.images, self.rows, strict=True):
            found = [[_cell(row.get(name)) for name in columns] for row in rows[:SHOWN_ROWS]]
            if len(rows) > SHOWN_ROWS:
                found.append([f"and {len(rows) - SHOWN_ROWS} more: --json FILE has all"])
            names = [str(image)] + [""] * len(found)
            found = found or [["nothing found"]]
            lines += [[name, *cells] for name, cells in zip(names, found, strict=False)]
        right = {headers[key] for row in told for key in row if isinstance(row[key], float)}
        drawn = table(["image", *headers.values()], lines, numbers=right)
        return Group(Text(_fed(self)), drawn)


def predict_pictures(
    artifact: Path,
    images: Sequence[Path],
    settings: DataSettings,
    *,
    task: str | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    out: Path | None = None,
) -> Answers:
    """Return what an artifact answers to pictures, and draw it.

    Args:
        artifact: ONNX file, engine, folder of a saved network or of a stage, or run (its last
            network; of int8 graphs the one for ``runtime``).
        images: Picture files, and folders of them.
        settings: What is known of the network's input beside what the artifact says.
        task: What the network is for; as the artifact says if absent, and if it does not, its raw
            outputs are told.
        runtime: Where it runs; its own, or ONNX Runtime for ONNX files, if absent.
        threads: CPU threads; all cores if absent.
        out: Folder for the pictures with the predictions drawn onto them; none if absent.

    Raises:
        DataError: a picture cannot be read; the message names it.
        UsageError: nothing says how pictures become the network's input, or it is contradicted.
        EngineError: the artifact cannot be opened or run, or its outputs are not the task's.
    """
    files = _pictures(images)
    source = _network(artifact, runtime)
    said = artifact_facts(source)
    reference = task or said.get("task") or _task_of_run(source)
    chosen, name = _task(reference, said.get("labels"), source, given=bool(task))
    where = runtime or runtime_of(source)
    with open_session(source, where, threads=threads) as session:
        dataset = load_pictures(_complete(settings, source, said, session), files)
        predictions = _predictions(session, dataset, chosen, source)
    facts = dataset.facts()
    fit = Fit(dataset.image_size, facts["resize"], facts["interpolation"], facts["crop"])
    placed = [
        chosen.in_picture(each, fit, (height, width))
        for each, (width, height) in zip(predictions, map(image_size, files), strict=True)
    ]
    return Answers(
        source,
        where,
        name,
        {key: facts[key] for key in FED if key in facts},
        tuple(files),
        tuple(chosen.describe(placed, [str(file) for file in files])),
        tuple(_drawn(chosen, predictions, files, fit, out)) if out is not None else (),
        tuple(predictions),
    )


def _predictions(session: Session, dataset: Dataset, task: Task, source: Path) -> list[Prediction]:
    try:
        batches = answered(Fed(session, dataset), task, dataset.pictures("test", BATCH))
        return [each for predictions, _ in batches for each in predictions]
    except CompressError as error:
        raise error if isinstance(error, DataError) else error.within(str(source)) from None


def _network(artifact: Path, runtime: str | None) -> Path:
    """Return the file or folder that ``artifact`` stands for on a runtime.

    Of a stage that is its ONNX file, which runs none of the user's code, unless PyTorch is asked.
    """
    found = artifacts_in(artifact)
    fitting = [file for file in found if file.name == f"model.{runtime or DEFAULT}.onnx"]
    source = fitting[0] if len(found) > 1 and fitting else one_artifact(artifact)
    own = runtime_of(source)  # refuses what does not exist
    exported = source / ONNX_NAME
    return exported if exported.is_file() and own != runtime else source


def _task_of_run(source: Path) -> Any:
    """Return the task of the run that a file lies in: files do not name a task of the user's."""
    for folder in (source, *source.parents[:2]):
        if (folder / RUN_FILE).is_file():
            return read_json(folder / RUN_FILE).get("recipe", {}).get("task")
    return None


def _task(reference: Any, labels: Any, source: Path, *, given: bool) -> tuple[Task, str]:
    """Return the task and its name; that of unlabelled images where nothing is known."""
    classes = [str(label) for label in labels] if isinstance(labels, list) else []
    reference = reference or default_task("none")
    try:
        task = load_task(reference, classes=classes)
    except CompressError as error:
        raise (error if given else error.within(str(source))) from None
    inner = getattr(task, "inner", None)  # of one that compares outputs of a known task
    if inner is not None:
        return inner, type(inner).__name__.lower()
    return task, reference if isinstance(reference, str) else next(iter(reference))


def _complete(
    settings: DataSettings, source: Path, said: dict[str, Any], session: Session
) -> DataSettings:
    """Return the settings with everything that the network's input needs."""
    found = completed(settings, [source])
    if "mean" in said and "resize" not in found.options:  # images of its own size were not fitted
        found = found.model_copy(
            update={"options": {"resize": "squash", "crop": 1.0, **found.options}}
        )
    picture = picture_of(session.inputs, found.inputs or {})
    sizes = [picture.shape[axis] for axis in (1, 3)] if picture.shape else []
    if sizes and all(isinstance(size, int) and size not in CHANNELS for size in sizes):
        raise UsageError(
            f"input {picture.name!r} of shape {picture.shape} takes no pictures",
            where=str(source),
            expected="1 or 3 channels",
        )
    if found.image_size is None:
        raise UsageError(
            "does not say which size of images it takes",
            where=str(source),
            fix="Give --image-size SIDE, or H,W",
        )
    normalizes_itself = picture.dtype == "uint8"
    absent = [f"--{key}" for key in ("mean", "std") if getattr(found, key) is None]
    if absent and found.input_range is None and not normalizes_itself:
        raise UsageError(
            "does not say how its images are normalized",
            where=str(source),
            expected=f"{' and '.join(absent)}, or --input-range",
            fix="Give those it was trained with: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 "
            "for many; --input-range 0,1 or 0,255 for images that are not normalized",
        )
    return found


def _pictures(given: Sequence[Path]) -> list[Path]:
    """Return the picture files that are given, and those in folders that are."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [path / name for name in picture_files(path)]
            if not inside:
                raise DataError("holds no pictures", where=str(path))
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise DataError(absence(path), where=str(path), expected="a picture")
    return files


def _drawn(
    task: Task, predictions: Sequence[Prediction], files: Sequence[Path], fit: Fit, out: Path
) -> list[Path]:
    """Draw each prediction onto its picture, enlarged if it is small; return where."""
    written: list[Path] = []
    for prediction, file in zip(predictions, files, strict=True):
        with opened_picture(file, where=str(file)) as image:
            picture = np.array(to_8_bit(image, 3, where=str(file)))
        times = -(-DRAWN_SIDE // min(picture.shape[:2]))
        picture = picture.repeat(times, 0).repeat(times, 1)
        placed = task.in_picture(prediction, fit, (picture.shape[0], picture.shape[1]))
        target = _free(out / f"{file.stem}.png", written)
        with replacing(target) as temporary:
            Image.fromarray(np.ascontiguousarray(task.draw(picture, placed))).save(temporary, "PNG")
        written.append(target)
    return written


def _free(target: Path, taken: Sequence[Path]) -> Path:
    """Return ``target``, with a number if another picture of this call has the name."""
    number, free = 1, target
    while free in taken:
        number += 1
        free = target.with_name(f"{target.stem}-{number}.png")
    return free


def _fed(answers: Answers) -> str:
    fed = {key: shown(value) for key, value in answers.fed.items()}
    height, width = answers.fed["image_size"]
    lines = [
        f"{answers.artifact} on {answers.runtime}",
        f"fed {height} x {width} pixels: resize {fed['resize']}, crop {fed['crop']}, "
        f"{fed['color']}, mean {fed['mean']}, std {fed['std']}",
    ]
    if answers.task == default_task("none"):
        lines.append("nothing says what its outputs are: --task NAME shows them as that task does")
    if answers.drawn:
        lines.append(f"drawn in {answers.drawn[0].parent}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else numbers.number(value, 4)
